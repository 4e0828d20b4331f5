"What goes wrong is said in one line, and results stay as they were."
import csv
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, redness
from safetensors.torch import load_file

from lasro.core import check_writable
from lasro.finetuning import finetune

SMALL = dict(profile='smoke', snapshot_every=0)


def brightness(images, prompts, metadata): return images.mean((1, 2, 3)), {}
def wrong_shape(images, prompts, metadata): return torch.zeros(len(images)+1), {}
def not_a_number(images, prompts, metadata): return [float('nan')]*len(images), {}
def broken(images, prompts, metadata): raise RuntimeError('the scorer is out of order')


def untouched(folder: Path): return not [p for p in folder.rglob('*') if p.is_file()]


BAD_REWARDS = [(wrong_shape, 'shape'), (not_a_number, 'nan for sample 0'), (broken, 'the scorer is out of order')]


@pytest.mark.parametrize('reward, message', BAD_REWARDS)
def test_a_bad_reward_is_named(pipe, tmp_path, reward, message):
    with pytest.raises(ValueError, match=message) as e: finetune(pipe, reward, PROMPTS, tmp_path/'run', **SMALL)
    assert reward.__name__ in str(e.value) and '\n' not in str(e.value)
    assert not (tmp_path/'run'/'run.json').exists()


@pytest.mark.parametrize('reward', [None, 'beauty', 3, 'no.such:function'])
def test_what_is_no_reward_is_refused(pipe, tmp_path, reward):
    with pytest.raises(ValueError, match='^[^\n]*reward[^\n]*$'):
        finetune(pipe, reward, PROMPTS, tmp_path/'run', **SMALL)
    assert untouched(tmp_path)


BAD_OPTIONS = [
    dict(batch_size=0), dict(n_noises=0), dict(lr='1e-4'), dict(num_steps=2.), dict(num_steps=5), dict(lr=-1.),
    dict(c2=float('nan')), dict(backbone='resnet'), dict(pairs='some'), dict(s_form='c'), dict(online=1),
    dict(lora_rank=-1), dict(micro_groups=0), dict(mixed_precision='fp8'), dict(log_with='paper'),
    dict(batchsize=4), dict(arm='larso'), dict(profile='smokey'), dict(world='circles')]


@pytest.mark.parametrize('wrong', BAD_OPTIONS, ids=lambda w: '-'.join(map(str, *w.items())))
def test_a_bad_option_is_refused_at_once(pipe, tmp_path, wrong):
    start = time.monotonic()
    with pytest.raises(ValueError) as e: finetune(pipe, redness, PROMPTS, tmp_path/'run', **SMALL | wrong)
    name = next(iter(wrong))
    assert name in str(e.value) and '\n' not in str(e.value)
    assert time.monotonic()-start < 2 and untouched(tmp_path)


UNREADABLE = [[' '], ['a red ring', 'a red ring '*250], ['красный круг'], ['赤い円']]


@pytest.mark.parametrize('prompts', [[], 'no such file.txt', *UNREADABLE])
def test_a_bad_prompt_is_refused(pipe, tmp_path, prompts):
    with pytest.raises((ValueError, OSError)) as e: finetune(pipe, brightness, prompts, tmp_path/'run', **SMALL)
    assert 'prompt' in str(e.value)
    assert '\n' not in str(e.value) and untouched(tmp_path/'run')


def test_unwritable_results_are_said_before_training(pipe, tmp_path):
    (tmp_path/'file').write_text('')
    def never(images, prompts, metadata): raise AssertionError('training began')
    with pytest.raises(OSError, match='cannot write to'): finetune(pipe, never, PROMPTS, tmp_path/'file'/'run', **SMALL)


def test_no_space_is_said_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard)) # files over 1,000 bytes fail, as on a full disk
    try:
        with pytest.raises(OSError, match='cannot write to .*free some space'): check_writable(tmp_path/'results')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert untouched(tmp_path)


def test_a_finished_run_is_not_overwritten(pipe, tmp_path):
    (tmp_path/'run.json').write_text('{}')
    with pytest.raises(FileExistsError, match='holds a finished run'):
        finetune(pipe, brightness, PROMPTS, tmp_path, **SMALL)
    assert (tmp_path/'run.json').read_text() == '{}'


CALLS = '''
import os, signal, sys
from pathlib import Path
from lasro import finetune, load_pipeline
out, last, calls = Path(sys.argv[1]), int(sys.argv[2]), 0

def redness(images, prompts, metadata):
    global calls
    calls += 1
    if calls == last: os.kill(os.getpid(), signal.SIGKILL)
    return images[:, 0].mean((1, 2)), {}

finetune(load_pipeline(), redness, %r, out, **%r)
print('calls', calls)
''' % (PROMPTS, dict(SMALL, outer_steps=10, lora_rank=4)) # long enough for a checkpoint


def run(out: Path, last: int = 0 # reward call in which the process is killed; 0 lets it live
       ) -> tuple[int, int]: # exit status, reward calls where it lived
    "Fine-tune in a process of its own."
    command = [sys.executable, '-c', CALLS, str(out), str(last)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode in (0, -signal.SIGKILL), found.stderr
    return found.returncode, int(found.stdout.split()[-1]) if found.returncode == 0 else last


def weights(out: Path): return load_file(next(out.rglob('pytorch_lora_weights.safetensors')))


def metrics(out: Path):
    rows = csv.DictReader((out/'metrics.csv').open())
    return [{k: v for k, v in row.items() if k != 'wall_s'} for row in rows]


def test_a_killed_run_ends_as_if_it_had_lived(pipe, tmp_path):
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    _, calls = run(whole)
    status, _ = run(killed, last=calls-1)
    assert status == -signal.SIGKILL and not (killed/'run.json').exists()
    call = dict(reward=redness, prompts=PROMPTS, **SMALL | dict(outer_steps=10, lora_rank=4))
    other = dict(prompts=PROMPTS[:3], reward=brightness, seed=1, lr=1e-5)
    for name, changed in other.items(): # another run is refused, and changes nothing
        with pytest.raises(ValueError, match=f'unfinished run.*{name}'):
            finetune(pipe, out=killed, **call | {name: changed})
    _, rest = run(killed)
    a, b = weights(whole), weights(killed)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert metrics(whole) == metrics(killed)
    assert rest < calls, 'it began again from nothing'
    assert not [p for p in tmp_path.rglob('*') if p.suffix in ('.pkl', '.bin', '.pt')]


def test_a_damaged_checkpoint_is_passed_over(pipe, tmp_path, caplog):
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    _, calls = run(whole)
    run(killed, last=calls-1)
    newest = max((killed/'checkpoints').glob('round-*.safetensors'))
    newest.write_bytes(newest.read_bytes()[:-100])
    run(killed)
    a, b = weights(whole), weights(killed)
    assert all(torch.equal(a[k], b[k]) for k in a)
