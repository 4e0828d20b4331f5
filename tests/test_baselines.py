"Every baseline in the loop: two rounds, taken up again bit for bit, at LaSRO's number of reward calls."
import json, math, re, subprocess, sys
from dataclasses import asdict

import pytest, torch
from conftest import ROOT
from safetensors.torch import load_file

from lasro.baselines import ARMS, Baseline, BaselineOptions, ddpo_loss, log_prob, reward_calls
from lasro.finetune import checkpoint, find_arm, finetune, make_options, make_task, train
from lasro.models import load_pipeline, load_teacher
from lasro.shapes import prompts

TEXTS = prompts('train', 6)
NAMES = [name for name, (cls, _) in ARMS.items() if issubclass(cls, Baseline)]
SMALL = dict(generator_steps=2, pretrain_steps=1)
DDPO = ROOT/'tests'/'oracles'/'ddpo_trl.py'


def redness(images, prompts, metadata): return images[:, 0].mean((1, 2))-images[:, 1:].mean((1, 2, 3))
redness.differentiable = True
def indifferent(images, prompts, metadata): return torch.zeros(len(images))


@pytest.fixture(scope='module')
def parts():
    "Pipeline, teacher, and the clean latents of the LCM loss."
    pipe, teacher = load_pipeline(), load_teacher()
    return pipe, teacher, make_task(pipe, None, TEXTS, teacher).data


def build(name: str, parts, reward=redness, num_steps: int = 2, **changed):
    (pipe, teacher, data), (cls, differs) = parts, find_arm(name)
    options = BaselineOptions(**asdict(make_options('smoke')) | differs | SMALL | changed)
    return cls(make_task(pipe, reward, TEXTS, teacher, data, num_steps, lora_rank=options.lora_rank), options)


def weights(arm): return [p.detach().clone() for p in arm.task.params]
def equal(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
def no_clock(rows): return repr([{k: v for k, v in r.items() if k != 'wall_s'} for r in rows]) # nan is not equal to itself


def test_all_are_there(): assert set(NAMES) == {'rlcm', 'rlcm-dropped', 'diffusion_dpo', 'pso', 'gors_lcm', 'reward_guided', 'direct'}


@pytest.mark.parametrize('name', NAMES)
def test_a_run_resumes_bit_for_bit_and_costs_what_lasro_costs(name, parts, tmp_path):
    whole, start = build(name, parts), weights(build(name, parts))
    rows = train(whole, 2, progress=False)
    stopped = build(name, parts)
    checkpoint(stopped, tmp_path, 1, train(stopped, 1, progress=False))
    resumed = build(name, parts)
    again = train(resumed, 2, tmp_path, progress=False)
    assert not equal(start, weights(whole)) and equal(weights(whole), weights(resumed))
    assert no_clock(rows) == no_clock(again)
    assert whole.task.budget.reward_calls == reward_calls(whole.options, 2, len(TEXTS))
    assert math.isfinite(rows[-1]['reward']) and rows[-1]['grad_norm'] > 0
    if name in ('rlcm', 'rlcm-dropped', 'pso'): assert {'ratio', 'approx_kl', 'clipfrac'} <= rows[-1].keys()


def test_lasro_makes_as_many_reward_calls(parts):
    arm = build('lasro', parts)
    train(arm, 2, progress=False)
    assert arm.task.budget.reward_calls == reward_calls(arm.options, 2, len(TEXTS))


@pytest.mark.parametrize('name, num_steps', [(n, 1) for n in ('diffusion_dpo', 'gors_lcm', 'reward_guided', 'direct')]+[('rlcm', 3), ('pso', 3), ('direct', 3)])
def test_other_numbers_of_steps(name, num_steps, parts):
    arm = build(name, parts, num_steps=num_steps, outer_steps=1)
    train(arm, 1, progress=False)
    unit = 4 if name == 'reward_guided' else 1 # it labels sets of four
    assert arm.task.budget.reward_calls == reward_calls(arm.options, num_steps, len(TEXTS))//unit*unit


@pytest.mark.parametrize('name', ['rlcm', 'rlcm-dropped', 'pso'])
def test_no_likelihood_at_one_step(name, parts):
    with pytest.raises(ValueError, match='^[^\n]* is not defined at 1 step: [^\n]*$'): build(name, parts, num_steps=1)


def test_direct_needs_a_gradient(parts):
    with pytest.raises(ValueError, match='^Direct is not defined for attribute_binding: [^\n]*$'): build('direct', parts, reward='attribute_binding')


@pytest.mark.parametrize('name', ['rlcm', 'rlcm-dropped', 'diffusion_dpo', 'pso'])
def test_equal_rewards_move_nothing(name, parts):
    arm = build(name, parts, reward=indifferent)
    start = weights(arm)
    train(arm, 2, progress=False)
    assert equal(start, weights(arm))


@pytest.mark.parametrize('name', ['diffusion_dpo', 'gors_lcm'])
def test_all_samples_may_come_first(name, parts):
    arm = build(name, parts, online=False)
    rows = train(arm, 2, progress=False)
    assert rows[0]['reward_calls'] == rows[-1]['reward_calls'] == reward_calls(arm.options, 2, len(TEXTS))


def test_a_baseline_leaves_an_adapter_and_a_record(pipe, tmp_path):
    finetune(pipe, redness, TEXTS, arm='pso', profile='smoke', out=tmp_path, lora_rank=2)
    record = json.loads((tmp_path/'run.json').read_text())
    assert record['arm'] == 'pso' and record['reward_calls'] == reward_calls(make_options('smoke'), 2, len(TEXTS))
    assert list(tmp_path.rglob('pytorch_lora_weights.safetensors'))


@pytest.mark.parametrize('case', ['on_policy', 'clipped', 'published_clip', 'far_advantages'])
def test_the_ddpo_loss_is_that_of_trl(case):
    found = load_file(DDPO.with_suffix('.safetensors'))
    trl = {k.removeprefix(f'{case}.'): v for k, v in found.items() if k.startswith(f'{case}.')}
    rest = trl['old_log_prob'], trl['advantages'].clamp(-trl['adv_clip'], trl['adv_clip']), trl['clip_range'].item()
    close = lambda ours, theirs, tolerance: torch.testing.assert_close(torch.as_tensor(ours, dtype=torch.float64), theirs.double(), rtol=tolerance, atol=tolerance)

    log_probs = found['log_prob'].clone().requires_grad_()
    loss, row = ddpo_loss(log_probs, *rest)
    loss.backward()
    for ours, key in (loss.detach(), 'loss'), (log_probs.grad, 'grad_log_prob'), (row['approx_kl'], 'approx_kl'), (row['clipfrac'], 'clipfrac'): close(ours, trl[key], 1e-12)

    denoised = found['denoised'].clone().requires_grad_() # through our likelihood too, whose schedule is rounded to float32
    ours = log_prob(found['x_next'], denoised, found['t_next'])
    loss, _ = ddpo_loss(ours, *rest)
    loss.backward()
    for ours, theirs in (ours.detach(), found['log_prob']), (loss.detach(), trl['loss']), (denoised.grad, trl['grad_denoised']): close(ours, theirs, 1e-6)


@pytest.mark.slow
def test_trl_still_says_so(tmp_path):
    python, wanted = tmp_path/'trlenv'/'bin'/'python', re.search(r'pip install (.+)', DDPO.read_text())[1].split()
    subprocess.run([sys.executable, '-m', 'venv', tmp_path/'trlenv'], check=True)
    pip = subprocess.run([python, '-m', 'pip', 'install', '-q', '--retries', '1', *wanted], capture_output=True, text=True)
    if pip.returncode: pytest.skip(f'pip cannot install trl and what it needs: {pip.stderr.strip().splitlines()[-1]}')
    subprocess.run([python, '-I', DDPO, tmp_path], check=True)
    new, kept = (load_file(folder/'ddpo_trl.safetensors') for folder in (tmp_path, DDPO.parent))
    assert new.keys() == kept.keys() and all(torch.equal(new[k], kept[k]) for k in kept)
