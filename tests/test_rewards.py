"Sums, options, servers and samples without a reward, in whole runs."
import json
import math

import pytest
import torch
from conftest import PROMPTS, redness, without_clock

from lasro.finetuning import ARMS, NO_REWARD, finetune
from lasro.rewards import Reward, RewardError, load_reward

SMALL = dict(profile='smoke', snapshot_every=0, probe_prompts=8)
SUM = {'attribute_binding': 1, 'compressibility': .5}


def patchy(images, prompts, metadata):
    "Redness, but about every seventh picture has none."
    values = redness(images, prompts, metadata).tolist()
    dark = (images.sum((1, 2, 3))*1000).long() % 7 == 0
    return [math.nan if d else v for v, d in zip(values, dark.tolist())]


PATCHY = Reward('patchy', patchy, on_nan='skip')


def same_weights(a, b) -> bool:
    pairs = zip(a.pipe.unet.state_dict().values(), b.pipe.unet.state_dict().values())
    return all(torch.equal(x, y) for x, y in pairs)


def test_a_sum_trains_and_shows_its_parts(pipe, tmp_path):
    run = finetune(pipe, SUM, PROMPTS, tmp_path/'run', **SMALL)
    columns = {'probe_reward', 'reward/attribute_binding', 'reward/compressibility'}
    assert columns <= set(run.metrics)
    record = run.record
    assert record['reward'] == 'attribute_binding+0.5*compressibility'
    deviations = record['reward_options']['deviations']
    point = run.metrics.dropna(subset=['probe_reward']).iloc[0]
    parts = point['reward/attribute_binding'], point['reward/compressibility']
    total = parts[0]/deviations[0]+.5*parts[1]/deviations[1]
    assert abs(total-point['probe_reward']) < 1e-3
    alone = finetune(pipe, 'compressibility', PROMPTS, **SMALL)
    assert record['reward_calls'] == alone.record['reward_calls']+64


def interrupt(monkeypatch, after: int):
    "Let a run be interrupted after so many rounds."
    import lasro.training as training
    known = training.checkpoint
    def interrupted(arm, folder, k, rows):
        known(arm, folder, k, rows)
        if k >= after: raise KeyboardInterrupt
    monkeypatch.setattr(training, 'checkpoint', interrupted)


@pytest.mark.parametrize('reward', [SUM, PATCHY], ids=['sum', 'skip'])
def test_a_killed_run_ends_as_if_it_had_lived(pipe, tmp_path, monkeypatch, reward):
    sizes = SMALL | dict(outer_steps=10)
    whole = finetune(pipe, reward, PROMPTS, **sizes)
    with monkeypatch.context() as m:
        interrupt(m, 8)
        with pytest.raises(KeyboardInterrupt):
            finetune(pipe, reward, PROMPTS, tmp_path/'run', **sizes)
    resumed = finetune(pipe, reward, PROMPTS, tmp_path/'run', **sizes)
    assert same_weights(whole, resumed)
    rows = whole.metrics.to_dict('records'), resumed.metrics.to_dict('records')
    assert without_clock(rows[0]) == without_clock(rows[1])


KINDS = {kind: arm for arm, (kind, _) in reversed(ARMS.items()) if arm not in (*NO_REWARD, 'direct', 'lasro-pairs')}

@pytest.mark.parametrize('arm', KINDS.values())
def test_every_arm_leaves_out_what_has_no_reward(pipe, arm):
    visits = hasattr(ARMS[arm][0].Options, 'group_size')
    sizes = SMALL | dict(group_size=3) if visits else SMALL # of six samples, one would often lack a reward
    run = finetune(pipe, PATCHY, PROMPTS, arm=arm, **sizes)
    skipped = run.metrics.skipped.dropna()
    assert skipped.sum() > 0
    numbers = run.metrics[['reward', 'probe_reward', 'grad_norm']]
    assert not numbers.iloc[-1].isna().any()
    assert all(p.isfinite().all() for p in run.pipe.unet.parameters())


def test_a_skipped_sample_is_in_no_pair(pipe):
    "What the surrogate compares holds no sample without a reward."
    from lasro.lasro import LaSRO
    from lasro.options import make_options
    from lasro.task import make_task
    arm = LaSRO(make_task(pipe, PATCHY, PROMPTS, make_options('smoke', LaSRO.Options)))
    arm.prepare()
    assert arm.buffer.samples.rewards.isfinite().all()
    assert len(arm.buffer.samples) < arm.task.budget.reward_calls
    assert len(arm.buffer.winners)


def test_direct_needs_every_reward(pipe):
    reward = Reward('patchy', patchy, differentiable=True, on_nan='skip')
    with pytest.raises(ValueError, match='direct needs a reward for every picture'):
        finetune(pipe, reward, PROMPTS, arm='direct', **SMALL)


def test_a_judge_that_never_answers_ends_the_run(pipe):
    silent = Reward('silent', lambda images, *_: [math.nan]*len(images), on_nan='skip')
    with pytest.raises(RewardError, match="'silent' returned nan in each of"):
        finetune(pipe, silent, PROMPTS, **SMALL)


def louder(threshold: float = .5):
    "A factory with an option."
    def fn(images, prompts, metadata): return (images.mean((1, 2, 3))-threshold).abs()
    return fn


def test_a_run_resumes_with_the_same_options_only(pipe, tmp_path, monkeypatch):
    sizes = SMALL | dict(outer_steps=10)
    with monkeypatch.context() as m:
        interrupt(m, 8)
        with pytest.raises(KeyboardInterrupt):
            finetune(pipe, (louder, dict(threshold=.3)), PROMPTS, tmp_path/'run', **sizes)
    other = (louder, dict(threshold=.4))
    with pytest.raises(ValueError, match="reward_options was {'threshold': 0.3}, not {'threshold': 0.4}"):
        finetune(pipe, other, PROMPTS, tmp_path/'run', **sizes)
    run = finetune(pipe, (louder, dict(threshold=.3)), PROMPTS, tmp_path/'run', **sizes)
    assert run.record['reward_options'] == dict(threshold=.3)


def test_a_constant_part_is_named(pipe):
    constant = Reward('constant', lambda images, *_: torch.ones(len(images)))
    from lasro.rewards import weighted_sum
    summed = weighted_sum([load_reward('compressibility'), constant], [1, 1])
    with pytest.raises(ValueError, match="reward 'constant' is the same for 64 samples"):
        finetune(pipe, summed, PROMPTS, **SMALL)


def softness(images, prompts, metadata): return -images.flatten(1).std(1)


@pytest.mark.parametrize('form', ['dict', 'text'])
def test_a_sum_trains_a_small_sdxl(tmp_path, form):
    from lasro.sdxl.config import make_config
    from lasro.sdxl.prepare import prepare
    weights = {'compressibility': 1, 'test_rewards:softness': .5}
    reward = weights if form == 'dict' else json.dumps(weights)
    sizes = dict(outer_steps=1, pretrain_prompts=2, probe_prompts=2)
    ready = prepare(make_config(small=True, reward=reward, device='cpu', overrides=sizes))
    run = finetune(**ready.arguments)
    assert run.record['reward'] == 'compressibility+0.5*test_rewards:softness'
    assert len(run.record['reward_options']['deviations']) == 2
    assert 'reward/test_rewards:softness' in run.metrics
