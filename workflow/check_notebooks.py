"Is lasro/ what the notebooks export, and are the notebooks clean? Works on copies: the checkout is left as it is."
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns('assets', '__pycache__', '.ipynb_checkpoints')


def copy_checkout(to: Path):
    "Copy what nbdev reads."
    for name in ('settings.ini', 'pyproject.toml', 'setup.py', 'README.md'): shutil.copy(ROOT/name, to/name)
    for name in ('nbs', 'lasro'): shutil.copytree(ROOT/name, to/name, ignore=LEFT_OUT)


def differing(folder: str, pattern: str, copy: Path) -> list[str]:
    "Return the files that are not the same in the checkout and in `copy`."
    names = set()
    for base in (ROOT, copy):
        found = [p for p in (base/folder).rglob(pattern) if '.ipynb_checkpoints' not in p.parts]
        names |= {p.relative_to(base).as_posix() for p in found}
    same = [n for n in names if (ROOT/n).exists() and (copy/n).exists() and filecmp.cmp(ROOT/n, copy/n, shallow=False)]
    return sorted(names-set(same))


def main():
    with tempfile.TemporaryDirectory() as d:
        copy = Path(d)/'lasro'
        copy.mkdir()
        copy_checkout(copy)
        for command in ('nbdev_clean', 'nbdev_export'):
            subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, check=True)
        dirty, stale = differing('nbs', '*.ipynb', copy), differing('lasro', '*.py', copy)
    for name in dirty: print(f'{name} is not clean: run nbdev_clean')
    for name in stale: print(f'{name} is not what the notebooks export: run nbdev_export')
    sys.exit(bool(dirty+stale))


if __name__ == '__main__': main()
