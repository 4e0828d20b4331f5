"What the tests share. No test needs a network, but those marked slow: `pytest -m slow tests`."
import os, subprocess, sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
os.environ.pop('LASRO_RESULTS', None)
import lasro # first: it lets a CUDA-built torchvision import beside a CPU torch
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'workflow'))
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
RUN_NOTEBOOK = ROOT/'nbs'/'09_lasro.ipynb'


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "With several workers, tests of a module that share a run or a drawn batch stay in one."
    for item in items:
        if {'drawn', 'finished'} & set(item.fixturenames): item.add_marker(pytest.mark.xdist_group(item.path.stem))


def start(*args, results: Path, cwd: Path, **parameters) -> subprocess.Popen:
    "Start workflow/run.py on 09_lasro with results under `results`."
    command = [sys.executable, ROOT/'workflow'/'run.py', RUN_NOTEBOOK, cwd/f'{"-".join(map(str, parameters.values()))}.ipynb']
    for name, value in parameters.items(): command += ['-p', name, str(value)]
    return subprocess.Popen(list(map(str, command)), cwd=cwd, env={**os.environ, 'LASRO_RESULTS': str(results)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def pipe():
    "The shipped pipeline, fresh."
    from lasro.models import load_pipeline
    return load_pipeline()


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
    "A smoke run of lasro by papermill, started in a folder that is not the repository: (its folder, the results folder, what it printed)."
    from lasro.core import run_dir
    cwd = tmp_path_factory.mktemp('elsewhere')
    process = start(results=cwd/'results', cwd=cwd, PROFILE='smoke', ARM='lasro', REWARD='attribute_binding', SEED=3)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    run = cwd/'results'/run_dir('smoke', 'lasro', 'attribute_binding', 2, 3).relative_to(ROOT/'results')
    return run, cwd/'results', out
