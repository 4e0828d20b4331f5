"Every arm in the loop: two rounds, resumed bit for bit, at LaSRO's number of reward calls."
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from conftest import PROMPTS, ROOT, indifferent, redness, without_clock
from safetensors.torch import load_file

from lasro.baselines import ddpo_loss, log_prob, reward_calls
from lasro.finetuning import ARMS, NO_REWARD, find_arm, finetune
from lasro.models import load_pipeline
from lasro.options import make_options
from lasro.task import make_task
from lasro.training import _note, checkpoint, train

NEWER = ['fdfo', 'neighbor_grpo', 'nft', 'drpo']
NAMES = ['lasro', 'rlcm', 'rlcm-dropped', 'diffusion_dpo', 'pso', 'gors_lcm', 'reward_guided', 'direct', *NEWER]
SMALL = dict(generator_steps=2, pretrain_steps=1, probe_prompts=4, snapshot_every=0)
TEXTS = PROMPTS+['a pink square and a red circle', 'a yellow ring and a green triangle']
DDPO = ROOT/'tests'/'oracles'/'ddpo_trl.py'


def build(name: str, reward=redness, **changed):
    "An arm of a small task."
    kind, differs = find_arm(name)
    options = make_options('smoke', kind.Options, **differs | SMALL | changed)
    return kind(make_task(load_pipeline(), reward, TEXTS, options))


def weights(arm): return [p.detach().clone() for p in arm.generator.network.parameters() if p.requires_grad]
def equal(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_table_is_explicit():
    assert set(NAMES) < set(ARMS) and set(NO_REWARD) < set(ARMS)
    code = "from lasro import finetune; from lasro.finetuning import ARMS; print('rlcm' in ARMS)"
    assert 'True' in subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('micro_groups', [1, 3])
def test_a_run_resumes_bit_for_bit_and_costs_what_lasro_costs(name, micro_groups, tmp_path):
    whole = build(name, micro_groups=micro_groups)
    start = weights(whole)
    rows = train(whole)
    stopped = build(name, micro_groups=micro_groups)
    first = rows_of_one_round(stopped)
    checkpoint(stopped, tmp_path/'checkpoints', 1, first)
    resumed = build(name, micro_groups=micro_groups)
    again = train(resumed, tmp_path)
    assert not equal(start, weights(whole)) and equal(weights(whole), weights(resumed))
    assert without_clock(rows) == without_clock(again)
    unit = 4 if name == 'reward_guided' else 1 # it labels sets of four
    assert whole.task.budget.reward_calls == reward_calls(whole.options, len(TEXTS))//unit*unit
    assert math.isfinite(rows[-1]['reward']) and rows[-1]['grad_norm'] > 0
    if name in ('rlcm', 'rlcm-dropped', 'pso', 'fdfo', 'neighbor_grpo'): assert {'ratio', 'approx_kl', 'clipfrac'} <= rows[-1].keys()


def rows_of_one_round(arm) -> list[dict]:
    "Prepare and make one round, as `train` does."
    rows = []
    _note(arm, rows, 0, arm.prepare(), None)
    _note(arm, rows, 1, arm.round(0), None)
    return rows


@pytest.mark.parametrize('name', ['lasro', 'rlcm', 'reward_guided', 'direct', *NEWER])
def test_micro_groups_change_nothing_but_rounding(name):
    "The first update of three micro-groups has the gradient of the whole batch."
    norms = []
    for micro_groups in (1, 3):
        arm = build(name, micro_groups=micro_groups, batch_size=6, lcm_batch=6, pretrain_steps=0)
        arm.prepare()
        norms.append(arm.round(0)['grad_norm'])
    assert math.isclose(*norms, rel_tol=1e-3), norms


ONE_STEP = [(n, 1) for n in ('lasro', 'diffusion_dpo', 'gors_lcm', 'reward_guided', 'direct', *NEWER)]
MORE_STEPS = [('lasro', 4), *((n, 3) for n in ('rlcm', 'pso', *NEWER))]


@pytest.mark.parametrize('name, num_steps', ONE_STEP+MORE_STEPS)
def test_other_numbers_of_steps(name, num_steps):
    arm = build(name, num_steps=num_steps, outer_steps=1)
    train(arm)
    unit = 4 if name == 'reward_guided' else 1
    assert arm.task.budget.reward_calls == reward_calls(arm.options, len(TEXTS))//unit*unit


@pytest.mark.parametrize('name', ['rlcm', 'rlcm-dropped', 'pso'])
def test_no_likelihood_at_one_step(name):
    with pytest.raises(ValueError, match='^[^\n]* is not defined at 1 step: [^\n]*$'): build(name, num_steps=1)


def test_direct_needs_a_gradient():
    with pytest.raises(ValueError, match='^[^\n]*attribute_binding[^\n]*gradient[^\n]*$'):
        build('direct', reward='attribute_binding')


@pytest.mark.parametrize('name', ['rlcm', 'diffusion_dpo', 'pso', *NEWER])
def test_equal_rewards_move_nothing(name):
    "A gradient that is exactly zero makes no step, not even by momentum."
    arm = build(name, reward=indifferent)
    start = weights(arm)
    train(arm)
    assert equal(start, weights(arm))


@pytest.mark.parametrize('name', ['diffusion_dpo', 'gors_lcm'])
def test_all_samples_may_come_first(name):
    arm = build(name, online=False)
    rows = train(arm)
    assert rows[0]['reward_calls'] == rows[-1]['reward_calls'] == reward_calls(arm.options, len(TEXTS))


@pytest.mark.parametrize('name', ['fdfo', 'neighbor_grpo', 'drpo'])
def test_a_single_sample_cannot_be_compared(name):
    with pytest.raises(ValueError, match='^[^\n]* set group_size to 2 or more$'): build(name, group_size=1)


@pytest.mark.parametrize('name', ['lasro', 'rlcm', 'reward_guided', *NEWER])
def test_adapters_and_checkpointed_blocks(name, tmp_path):
    "A LoRA with a surrogate that shares the teacher: blocks that are computed twice give the same losses."
    rows = []
    for checkpointing in (False, True):
        adapters = dict(lora_rank=2, surrogate_rank=2, backbone='unet', outer_steps=1)
        arm = build(name, gradient_checkpointing=checkpointing, **adapters)
        rows.append(train(arm))
    for a, b in zip(*rows):
        for key in ('lcm_loss', 'surrogate_loss', 'grad_norm', 'policy_loss'):
            if key in a: assert math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=1e-6), key


def test_a_run_leaves_an_adapter_and_a_record(pipe, tmp_path):
    finetune(pipe, redness, TEXTS, tmp_path, arm='pso', profile='smoke', lora_rank=2)
    record = json.loads((tmp_path/'run.json').read_text())
    assert record['arm'] == 'pso' and record['reward_calls'] == reward_calls(make_options('smoke'), len(TEXTS))
    assert (tmp_path/'lora'/'pytorch_lora_weights.safetensors').exists()
    assert not list(tmp_path.rglob('*.pkl')) and not list(tmp_path.rglob('*.bin'))


@pytest.mark.parametrize('case', ['on_policy', 'clipped', 'published_clip', 'far_advantages'])
def test_the_ddpo_loss_is_that_of_trl(case):
    found = load_file(DDPO.with_suffix('.safetensors'))
    trl = {k.removeprefix(f'{case}.'): v for k, v in found.items() if k.startswith(f'{case}.')}
    limit = trl['adv_clip']
    rest = trl['old_log_prob'], trl['advantages'].clamp(-limit, limit), trl['clip_range'].item()

    def close(ours, theirs, tolerance):
        ours = torch.as_tensor(ours, dtype=torch.float64)
        torch.testing.assert_close(ours, theirs.double(), rtol=tolerance, atol=tolerance)

    log_probs = found['log_prob'].clone().requires_grad_()
    loss = ddpo_loss(log_probs, *rest).mean()
    loss.backward()
    close(loss.detach(), trl['loss'], 1e-12)
    close(log_probs.grad, trl['grad_log_prob'], 1e-12)

    # through our likelihood too, whose schedule is rounded to float32
    denoised = found['denoised'].clone().requires_grad_()
    ours = log_prob(found['x_next'], denoised, found['t_next'])
    loss = ddpo_loss(ours, *rest).mean()
    loss.backward()
    close(ours.detach(), found['log_prob'], 1e-6)
    close(loss.detach(), trl['loss'], 1e-6)
    close(denoised.grad, trl['grad_denoised'], 1e-6)


@pytest.mark.slow
def test_trl_still_says_so(tmp_path):
    python, wanted = tmp_path/'trlenv'/'bin'/'python', re.search(r'pip install (.+)', DDPO.read_text())[1].split()
    subprocess.run([sys.executable, '-m', 'venv', tmp_path/'trlenv'], check=True)
    install = [python, '-m', 'pip', 'install', '-q', '--retries', '1', *wanted]
    pip = subprocess.run(install, capture_output=True, text=True)
    if pip.returncode: pytest.skip(f'pip cannot install trl and what it needs: {pip.stderr.strip().splitlines()[-1]}')
    subprocess.run([python, '-I', DDPO, tmp_path], check=True)
    new, kept = (load_file(folder/'ddpo_trl.safetensors') for folder in (tmp_path, DDPO.parent))
    assert new.keys() == kept.keys() and all(torch.equal(new[k], kept[k]) for k in kept)
