"Builds a site of the executed notebooks in _docs/: directives and hidden cells are dropped first."
import re, shutil, subprocess, sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
PAGES = ROOT/'build'/'docs'
TEXTS = ('README.md', 'CHANGELOG.md', 'LOG.md', 'LICENSE', 'Makefile', 'settings.ini', 'constraints.txt',
         'CITATION.cff')
FOLDERS = ('results', 'workflow', 'tests', 'lasro')


def strip(path: Path) -> nbformat.NotebookNode:
    "The notebook as a reader wants it: no `#|` lines, no hidden or empty cells."
    nb, cells = nbformat.read(path, 4), []
    for cell in nb.cells:
        if cell.cell_type == 'code' and re.search(r'^#\|\s*hide', cell.source, re.M): continue
        cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M) if cell.cell_type == 'code' else cell.source
        if cell.source.strip(): cells.append(cell)
    nb.cells = cells
    return nb


def main():
    shutil.rmtree(PAGES, ignore_errors=True)
    (PAGES/'nbs').mkdir(parents=True)
    for path in sorted((ROOT/'nbs').glob('[0-9]*.ipynb')): nbformat.write(strip(path), PAGES/'nbs'/path.name)
    for name in TEXTS: shutil.copy(ROOT/name, PAGES/('index.md' if name == 'README.md' else name))
    runs = shutil.ignore_patterns('runs', 'executed', 'retrain', 'smoke', 'quick', '*.ipynb')
    shutil.copytree(ROOT/'results', PAGES/'results', ignore=runs)
    other = shutil.ignore_patterns('__pycache__', 'assets', 'mkdocs.yml')
    for name in FOLDERS[1:]: shutil.copytree(ROOT/name, PAGES/name, ignore=other)
    mkdocs = Path(sys.executable).with_name('mkdocs')
    subprocess.run([mkdocs, 'build', '-q', '-f', ROOT/'workflow'/'mkdocs.yml'], check=True)
    index = ROOT/'_docs'/'index.html'
    print(f'open {index.relative_to(Path.cwd()) if Path.cwd() == ROOT else index}')


if __name__ == '__main__': main()
