"The house is in order: notebooks, links, paths, generated files."
import ast, json, os, re, shutil, subprocess, sys, sysconfig, zipfile

import pytest
from conftest import NOTEBOOKS, ROOT

CODE = {p.stem: [c for c in json.loads(p.read_text())['cells'] if c['cell_type'] == 'code' and ''.join(c['source']).strip()] for p in NOTEBOOKS}
ALL_CELLS = {p.stem: json.loads(p.read_text())['cells'] for p in NOTEBOOKS}
FULL = [name for name in CODE if name != 'index']
source = lambda cell: ''.join(cell['source'])
lines = lambda cell: sum(bool(l.strip()) and not l.strip().startswith('#') for l in source(cell).splitlines())
exported = lambda cell: re.search(r'^#\|\s*export', source(cell), re.M)


def tracked() -> list[str]:
    "Files of the repository; everything that is not ignored, where there is no git."
    found = subprocess.run(['git', '-C', ROOT, 'ls-files', '-co', '--exclude-standard', '-z'], capture_output=True, text=True)
    if found.returncode: pytest.skip('not a git checkout')
    return [f for f in found.stdout.split('\0') if f and (ROOT/f).is_file()]


@pytest.mark.parametrize('name', CODE)
def test_one_parameters_cell_where_it_runs(name):
    tagged = [c for c in CODE[name] if 'parameters' in c['metadata'].get('tags', [])]
    runnable = any(re.search(r'^PROFILE\s*=', source(c), re.M) for c in CODE[name])
    assert len(tagged) == 1 or not runnable
    assert all(re.search(r"^PROFILE\s*=\s*'smoke'|^RETRAIN\s*=\s*False", source(c), re.M) for c in tagged)


@pytest.mark.parametrize('name', CODE)
def test_outputs_are_stored_without_errors_and_small(name):
    outputs = [o for c in CODE[name] for o in c['outputs']]
    assert outputs, 'no stored output: a reader sees no result'
    assert not [o for o in outputs if o['output_type'] == 'error']
    assert (ROOT/'nbs'/f'{name}.ipynb').stat().st_size < 300_000
    counts = [c['execution_count'] for c in CODE[name] if c['execution_count']]
    assert not counts or counts == list(range(1, len(CODE[name])+1)), 'not executed from top to bottom in one go'


@pytest.mark.parametrize('name', FULL)
def test_cells_are_short_and_followed_by_something_that_runs(name):
    sizes = sorted(map(lines, CODE[name]))
    assert sizes[int(.9*(len(sizes)-1))] <= 12 and sizes[-1] <= 40
    followed = [any(not exported(d) for d in CODE[name][i+1:i+3]) for i, c in enumerate(CODE[name]) if exported(c)]
    assert sum(followed) >= .9*len(followed)


@pytest.mark.parametrize('name', CODE)
def test_no_notebook_exports_while_it_runs(name): assert not any('nbdev_export(' in source(c) for c in CODE[name])


def test_no_module_imports_a_later_one():
    order = [m[1] for name in sorted(CODE) for c in CODE[name] if (m := re.search(r'^#\|\s*default_exp\s+(\w+)', source(c), re.M))]
    assert len(order) == len(set(order)), 'two notebooks export to one module'
    for i, module in enumerate(order):
        tree = ast.parse((ROOT/'lasro'/f'{module}.py').read_text())
        found = {n.module.removeprefix('lasro.') for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('lasro.')}
        assert found <= set(order[:i]), module


def links(text: str) -> list[str]: return [l.split('#')[0] for l in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', text) for l in l if l and not re.match(r'https?:|#|mailto:|data:|attachment:', l)]


def test_every_link_leads_somewhere():
    texts = {ROOT/f: (ROOT/f).read_text() for f in tracked() if f.endswith('.md')}
    texts |= {p: '\n'.join(source(c) for c in ALL_CELLS[p.stem] if c['cell_type'] == 'markdown') for p in NOTEBOOKS}
    assert not [f'{path.relative_to(ROOT)}: {link}' for path, text in texts.items() for link in links(text) if not (path.parent/link).exists()]


def test_no_path_or_package_index_of_one_machine():
    places = '|'.join(('wor'+'k', 'op'+'t', 'home', 'root', 'tmp', 'Users'))
    bad = re.compile(rf'(?<![\w.])/(?:{places})/\w|index-'+'url|trusted-'+'host')
    binary = ('.png', '.safetensors', '.npz', '.gz')
    found = {f: m[0] for f in tracked() if not f.endswith(binary) if (m := bad.search((ROOT/f).read_text(errors='ignore')))}
    assert not found


def test_versions_are_the_same_everywhere():
    settings = (ROOT/'settings.ini').read_text()
    version = re.search(r'^version = (.+)$', settings, re.M)[1]
    assert f'__version__ = "{version}"' in (ROOT/'lasro'/'__init__.py').read_text()
    assert f'version: {version}' in (ROOT/'CITATION.cff').read_text() and f'## {version}' in (ROOT/'CHANGELOG.md').read_text()


@pytest.mark.parametrize('script', ['readme.py', 'results_readme.py'])
def test_generated_texts_are_current(script):
    check = subprocess.run([sys.executable, ROOT/'workflow'/script, '--check'], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_an_installed_package_holds_the_weights(tmp_path):
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(ROOT/name, tmp_path/name)
    shutil.copytree(ROOT/'lasro', tmp_path/'lasro', ignore=shutil.ignore_patterns('__pycache__'))
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path/'dist', tmp_path], check=True)
    names = set(zipfile.ZipFile(next((tmp_path/'dist').glob('*.whl'))).namelist())
    shipped = {p.relative_to(ROOT).as_posix() for p in (ROOT/'lasro').rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    assert shipped <= names


@pytest.mark.slow
def test_nbdev_3_tests_this_checkout(tmp_path):
    "Through the shim of pyproject.toml. The environment holds nbdev 3 and what it brings; the rest is found in this one."
    env = tmp_path/'nbdev3'
    subprocess.run([sys.executable, '-m', 'venv', env], check=True)
    site = next((env/'lib').glob('python*'))/'site-packages'
    pip = subprocess.run([env/'bin'/'python', '-m', 'pip', 'install', '-q', '--retries', '1', 'nbdev>=3,<4'], capture_output=True, text=True)
    if pip.returncode: pytest.skip(f'pip cannot install nbdev 3: {pip.stderr.strip().splitlines()[-1]}')
    (site/'this.pth').write_text(sysconfig.get_path('purelib'))
    found = subprocess.run([env/'bin'/'nbdev-test', '--n-workers', '1'], cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert found.returncode == 0 and 'Success' in found.stdout+found.stderr, found.stdout[-2000:]+found.stderr[-2000:]
