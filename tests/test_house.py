"The house is in order: notebooks, modules, links, paths, generated files."
import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from conftest import NOTEBOOKS, ROOT

CELLS = {p.relative_to(ROOT/'nbs').as_posix(): json.loads(p.read_text())['cells'] for p in NOTEBOOKS}
PACKAGE = ROOT/'lasro'
FILES = [p for p in PACKAGE.rglob('*.py') if p.name not in ('_modidx.py', '__init__.py', '__main__.py')]
MODULES = {p.relative_to(PACKAGE).with_suffix('').as_posix(): p for p in FILES}


def source(cell) -> str: return ''.join(cell['source'])


def code_cells(cells: list) -> list: return [c for c in cells if c['cell_type'] == 'code' and source(c).strip()]


CODE = {name: code_cells(cells) for name, cells in CELLS.items()}
RUNNABLE = [name for name in CODE if name.startswith(('experiments/', 'paper/'))]


def code_lines(text: str) -> list[str]:
    return [x for x in text.splitlines() if x.strip() and not x.strip().startswith('#')]


def tracked() -> list[str]:
    "Files of the repository; everything that is not ignored, where there is no git."
    command = ['git', '-C', ROOT, 'ls-files', '-co', '--exclude-standard', '-z']
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode: pytest.skip('not a git checkout')
    return [f for f in found.stdout.split('\0') if f and (ROOT/f).is_file()]


@pytest.mark.parametrize('name', RUNNABLE)
def test_one_parameters_cell_where_it_runs(name):
    tagged = [c for c in CODE[name] if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    assert not any(re.search(r'^#\|\s*export', source(c), re.M) for c in CODE[name]), 'only reference notebooks export'


@pytest.mark.parametrize('name', [n for n in CODE if n not in RUNNABLE])
def test_no_parameters_in_reference_and_tutorials(name):
    assert not any('parameters' in c['metadata'].get('tags', []) for c in CODE[name])


@pytest.mark.parametrize('name', CODE)
def test_outputs_are_stored_clean_and_small(name):
    outputs = [o for c in CODE[name] for o in c['outputs']]
    assert outputs, 'no stored output: a reader sees no result'
    assert not [o for o in outputs if o['output_type'] == 'error']
    assert not [o for o in outputs if o.get('name') == 'stderr']
    assert (ROOT/'nbs'/name).stat().st_size < 700_000


@pytest.mark.parametrize('name', CODE)
def test_no_notebook_exports_while_it_runs(name): assert not any('nbdev_export(' in source(c) for c in CODE[name])


def test_lines_are_short():
    "100 columns soft, 120 hard, in notebooks and scripts."
    scripts = [p for d in ('tests', 'workflow', 'bench') for p in (ROOT/d).rglob('*.py')]
    lines = [x for cells in CODE.values() for c in cells for x in code_lines(source(c))]
    lines += [x for p in scripts for x in code_lines(p.read_text())]
    assert sum(len(x) > 100 for x in lines) <= .05*len(lines)
    assert sum(len(x) > 120 for x in lines) <= .01*len(lines)
    assert not [x for x in lines if len(x) > 140]


def test_cells_are_small():
    "Characters of code: the goal is a median of 180 and a 90th percentile of 500; not yet reached."
    cells = [code_lines(source(c)) for cells in CODE.values() for c in cells]
    sizes = [sum(len(x.strip()) for x in lines) for lines in cells if lines]
    assert statistics.median(sizes) <= 195 and sorted(sizes)[int(.9*len(sizes))] <= 530


@pytest.mark.parametrize('name', MODULES)
def test_modules_are_of_one_kind(name):
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= 450
    assert not re.search(r'autograd\.Function|__class__ *=|register_post_accumulate', text)
    if name != 'task': assert not re.search(r'\bAccelerator\(', text), 'one place makes the Accelerator'


def order() -> list[str]:
    "Modules in the order of their notebooks: the core, worlds and sdxl each by number."
    found = {}
    for name, cells in CODE.items():
        for c in cells:
            if m := re.search(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M): found[m[1].replace('.', '/')] = name
    assert len(found) == len(set(found)), 'two notebooks export to one module'
    return sorted(found, key=lambda m: found[m])


def test_every_module_has_its_notebook(): assert set(order()) == set(MODULES)


def imports(module: str) -> set[str]:
    "The modules of this package that a module imports when it is loaded."
    tree, found = ast.parse(MODULES[module].read_text()), set()
    parent = module.split('/')[:-1]
    for n in tree.body:
        if isinstance(n, ast.ImportFrom) and n.level:
            base = parent[:len(parent)-n.level+1]
            found.add('/'.join([*base, *(n.module or '').split('.')]).strip('/'))
    return found & set(MODULES)


def test_no_module_imports_a_later_one():
    "Numbered notebooks import earlier ones of their own folder; sdxl may use the core, worlds the core's first rooms."
    modules = order()
    for module in modules:
        for other in imports(module):
            same = module.count('/') == other.count('/') and module.split('/')[0:-1] == other.split('/')[0:-1]
            if same: assert modules.index(other) < modules.index(module), (module, other)
            if '/' not in module: assert '/' not in other, f'{module} imports {other}: no algorithm names a world'


def test_importing_changes_nothing_elsewhere():
    others = 'lasro.plan, lasro.report, lasro.sdxl.rewards'
    code = f'import lasro.finetuning as f; n = dict(f.ARMS); import {others}; assert f.ARMS == n'
    assert not subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True).returncode


def links(text: str) -> list[str]:
    found = re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', text)
    elsewhere = re.compile(r'https?:|#|mailto:|data:|attachment:')
    return [x.split('#')[0] for pair in found for x in pair if x and not elsewhere.match(x)]


def test_every_link_leads_somewhere():
    texts = {ROOT/f: (ROOT/f).read_text() for f in tracked() if f.endswith('.md')}
    for name, cells in CELLS.items():
        texts[ROOT/'nbs'/name] = '\n'.join(source(c) for c in cells if c['cell_type'] == 'markdown')
    found = [(p, x) for p, text in texts.items() for x in links(text)]
    assert not [f'{p.relative_to(ROOT)}: {x}' for p, x in found if not (p.parent/x).exists()]


def test_no_path_or_package_index_of_one_machine():
    places = '|'.join(('wor'+'k', 'op'+'t', 'home', 'root', 'tmp', 'Users'))
    bad = re.compile(rf'(?<![\w.])/(?:{places})/\w|index-'+'url|trusted-'+'host')
    binary = ('.png', '.safetensors', '.npz', '.gz')
    texts = {f: (ROOT/f).read_text(errors='ignore') for f in tracked() if not f.endswith(binary)}
    assert not {f: m[0] for f, text in texts.items() if (m := bad.search(text))}


def test_versions_are_the_same_everywhere():
    settings = (ROOT/'settings.ini').read_text()
    version = re.search(r'^version = (.+)$', settings, re.M)[1]
    assert f'__version__ = "{version}"' in (ROOT/'lasro'/'__init__.py').read_text()
    assert f'version: {version}' in (ROOT/'CITATION.cff').read_text()
    assert f'## {version}' in (ROOT/'CHANGELOG.md').read_text()


@pytest.mark.parametrize('script', ['readme.py', 'results_readme.py'])
def test_generated_texts_are_current(script):
    check = subprocess.run([sys.executable, ROOT/'workflow'/script, '--check'], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_an_installed_package_holds_the_weights(tmp_path):
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT/name, tmp_path/name)
    shutil.copytree(ROOT/'lasro', tmp_path/'lasro', ignore=shutil.ignore_patterns('__pycache__'))
    pip = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation']
    subprocess.run([*pip, '-w', tmp_path/'dist', tmp_path], check=True)
    names = set(zipfile.ZipFile(next((tmp_path/'dist').glob('*.whl'))).namelist())
    files = [p for p in (ROOT/'lasro').rglob('*') if p.is_file() and '__pycache__' not in p.parts]
    assert {p.relative_to(ROOT).as_posix() for p in files} <= names


@pytest.mark.slow
def test_nbdev_3_tests_this_checkout(tmp_path):
    "Through the shim of pyproject.toml. The environment holds nbdev 3; all other packages are found in this one."
    env = tmp_path/'nbdev3'
    subprocess.run([sys.executable, '-m', 'venv', env], check=True)
    site = next((env/'lib').glob('python*'))/'site-packages'
    install = [env/'bin'/'python', '-m', 'pip', 'install', '-q', '--retries', '1', 'nbdev>=3,<4']
    pip = subprocess.run(install, capture_output=True, text=True)
    if pip.returncode: pytest.skip(f'pip cannot install nbdev 3: {pip.stderr.strip().splitlines()[-1]}')
    (site/'this.pth').write_text(sysconfig.get_path('purelib'))
    command = [env/'bin'/'nbdev-test', '--n-workers', '1']
    threads = {**os.environ, 'OMP_NUM_THREADS': '1'}
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=threads)
    assert found.returncode == 0 and 'Success' in found.stdout+found.stderr, found.stdout[-2000:]+found.stderr[-2000:]
