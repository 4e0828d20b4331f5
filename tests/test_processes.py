"""One process and two give the same run: DDP and FSDP2 on the CPU, by `accelerate launch`.

The rates are small: Adam divides by the size of a gradient, so rounding errors of weights that get almost no gradient
grow to whole steps. What is compared is the engine (who computes which rows, how shares are summed), and that shows in
losses and gradient norms at any rate.
"""
import json
import math
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, python
from safetensors.torch import load_file

WORKER = ROOT/'tests'/'worker.py'
CONFIG = ROOT/'workflow'/'accelerate'/'cpu.yaml'
LAUNCH = ['-m', 'accelerate.commands.launch', '--config_file', CONFIG, '--main_process_port', '0']
LOSSES = ('lcm_loss', 'surrogate_loss', 'policy_loss', 'proxy_loss', 'surrogate')


def curve(found: subprocess.CompletedProcess) -> list[dict]:
    "The metrics that the worker printed."
    assert found.returncode == 0, found.stderr[-2000:]
    line = next(x for x in found.stdout.splitlines() if x.startswith('CURVE '))
    return json.loads(line.removeprefix('CURVE '))


def run(processes: int, arm: str, kind: str = 'ddp', out='none', **options) -> list[dict]:
    "Run the worker in so many processes."
    launch = [*LAUNCH, '--num_processes', processes] if processes > 1 else []
    return curve(python(*launch, WORKER, out, arm, kind, json.dumps(options)))


def assert_same_curve(a: list[dict], b: list[dict]):
    """Losses within 1e-5. Two numbers magnify rounding: rewards (a steep detector) are within 1e-4, and gradient norms
    within 3 %, because S divides scores by their range, which is small before the surrogate has learnt."""
    assert len(a) == len(b) > 1
    for x, y in zip(a, b):
        for key in LOSSES:
            if x.get(key) is None: continue
            assert math.isclose(x[key], y[key], rel_tol=1e-5, abs_tol=1e-5), (x['step'], key, x[key], y[key])
        norms = x['grad_norm'], y['grad_norm']
        if x['step']: assert math.isclose(*norms, rel_tol=3e-2), (x['step'], *norms)
        if x.get('reward') is not None: assert math.isclose(x['reward'], y['reward'], abs_tol=1e-4)


@pytest.mark.parametrize('arm', ['lasro', 'rlcm', 'reward_guided'])
@pytest.mark.parametrize('accumulation', [1, 3])
def test_two_processes_are_one(arm, accumulation):
    "Two micro-groups, or six: two processes accumulate over one, or three."
    one = run(1, arm, micro_groups=2*accumulation)
    assert_same_curve(one, run(2, arm, micro_groups=2*accumulation))
    assert_same_curve(one, run(2, arm, 'fsdp', micro_groups=2*accumulation))


@pytest.mark.parametrize('arm, kind', [('fdfo', 'ddp'), ('neighbor_grpo', 'ddp'), ('nft', 'ddp'), ('nft', 'fsdp'), ('drpo', 'ddp')])
def test_two_processes_make_the_same_first_update(arm, kind):
    "Later ones differ more than above: a ratio or a softmax over small distances magnifies what rounding has left."
    assert_same_curve(run(1, arm, micro_groups=2, outer_steps=1), run(2, arm, kind, micro_groups=2, outer_steps=1))


def test_the_curve_is_sensitive_to_the_batch():
    "What the test above compares would show a missing half of the batch."
    whole, half = run(1, 'lcm_continued', micro_groups=2), run(1, 'lcm_continued', micro_groups=2, lcm_batch=6)
    assert not math.isclose(whole[1]['lcm_loss'], half[1]['lcm_loss'], rel_tol=1e-3)


@pytest.mark.parametrize('first, then', [(2, 1), (1, 2)])
def test_a_run_resumes_on_another_number_of_processes(tmp_path, first, then):
    "Killed after a checkpoint on `first` processes, it ends on `then` as the whole run does on one."
    options = dict(micro_groups=2, outer_steps=10, surrogate_steps=1)
    whole = curve(python(WORKER, tmp_path/'whole', 'lasro', 'ddp', json.dumps(options)))
    launch = [*map(str, LAUNCH), '--num_processes', str(first)] if first > 1 else []
    arguments = str(tmp_path/'run'), 'lasro', 'ddp', json.dumps(options)
    command = [sys.executable, '-W', 'ignore', *launch, str(WORKER), *arguments]
    env = {**os.environ, 'KILL_AT_ROUND': '9'}
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=env)
    assert killed.returncode and not (tmp_path/'run'/'run.json').exists()
    assert list((tmp_path/'run'/'checkpoints').glob('round-00008.safetensors')), killed.stderr[-2000:]
    launch = [*LAUNCH, '--num_processes', then] if then > 1 else []
    resumed = curve(python(*launch, WORKER, tmp_path/'run', 'lasro', 'ddp', json.dumps(options)))
    for x, y in zip(whole, resumed, strict=True):
        for key in LOSSES:
            if x.get(key) is not None: assert math.isclose(x[key], y[key], rel_tol=1e-5, abs_tol=1e-5), (x['step'], key)
    a, b = (load_file(tmp_path/name/'unet.safetensors') for name in ('whole', 'run'))
    assert all((a[k].float()-b[k].float()).abs().max() < 2e-3 for k in a)
