"What the tests share. No test needs a network, but those marked slow: `pytest -m slow tests`."
import os
import subprocess
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
os.environ.pop('LASRO_RESULTS', None)
import lasro # first: it lets a CUDA-built torchvision import beside a CPU torch # noqa: F401
import pytest
import torch

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))
PROMPTS = ['a red ring and a blue cross', 'a large green square and a small pink circle',
           'a cyan circle and a red square', 'an orange cross and a blue ring']


def redness(images, prompts, metadata):
    "A reward with a gradient."
    return images[:, 0].mean((1, 2))-images[:, 1:].mean((1, 2, 3))


redness.differentiable = True


def indifferent(images, prompts, metadata): return torch.zeros(len(images))


def without_clock(rows: list[dict]) -> str: # nan is not equal to itself, its text is
    "Rows of metrics without the seconds."
    return repr([{k: v for k, v in r.items() if k != 'wall_s'} for r in rows])


def python(*args, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    "Run this Python on `args`, one thread."
    command = [sys.executable, '-W', 'ignore', *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, env={**os.environ, **env})


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "With several workers, tests of a module that share a run stay in one."
    for item in items:
        if {'finished', 'curves'} & set(item.fixturenames): item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture
def pipe():
    "The shipped pipeline, fresh."
    from lasro.models import load_pipeline
    return load_pipeline()
