"Backbones of the surrogate, and the alarm over whole runs."
import csv, json, logging

import pandas as pd
import pytest, torch

from lasro.core import randn, generator
from lasro.evaluation import read_runs
from lasro.finetune import HackingAlarm, finetune, first_alarms
from lasro.models import encode_prompts, load_teacher
from lasro.surrogate import BACKBONES, frozen, make_surrogate, ordered_pairs, rank_accuracy, surrogate_step

PROMPTS = ['a red ring and a blue cross', 'a large green square and a small pink circle', 'a cyan circle and a red square', 'an orange cross and a blue ring']
LONG = dict(profile='smoke', outer_steps=10, probe_prompts=4)


def redness(images, prompts, metadata): return images[:, 0].mean((1, 2))-images[:, 1:].mean((1, 2, 3))


@pytest.mark.parametrize('backbone', BACKBONES)
def test_a_backbone_learns_redness(pipe, backbone):
    "From pairs of latents that differ in how red they decode it orders new ones; gradients reach the latents and no decoder."
    from lasro.models import decode
    torch.manual_seed(0)
    surrogate, g = make_surrogate(backbone, load_teacher(), pipe.vae), generator(0, 'redness')
    cond = encode_prompts(pipe, PROMPTS*12)
    z = [randn(48, 4, 8, 8, generator=g) for _ in range(2)]
    with torch.no_grad(): r = [redness(decode(pipe.vae, x), None, None) for x in z]
    group, optimizer = torch.arange(4).repeat(12), torch.optim.AdamW([p for p in surrogate.parameters() if p.requires_grad], 1e-3)
    kept = {k: v.clone() for k, v in pipe.vae.state_dict().items()}
    for _ in range(25): surrogate_step(surrogate, optimizer, z[0], cond, *ordered_pairs(r[0], group)[:2])
    assert rank_accuracy(surrogate, z[1], cond, r[1], group) > .65
    assert all(torch.equal(v, kept[k]) for k, v in pipe.vae.state_dict().items())
    x = z[1][:2].clone().requires_grad_()
    with frozen(surrogate): surrogate(x, cond[:2]).sum().backward()
    assert x.grad.abs().amax((1, 2, 3)).min() > 0 and all(p.grad is None for p in pipe.vae.parameters())


@pytest.mark.parametrize('backbone', BACKBONES)
def test_fresh_weights_are_fresh(pipe, backbone):
    teacher = load_teacher()
    before, fresh = (make_surrogate(backbone, teacher, pipe.vae, start) for start in (True, False))
    body = 'unet' if backbone.startswith('unet') else 'vision'
    same = [torch.equal(p, dict(fresh.named_parameters())[k]) for k, p in before.named_parameters() if body in k and p.ndim > 1]
    assert len(same) > 5 and not any(same)
    assert sum(p.numel() for p in before.parameters()) == sum(p.numel() for p in fresh.parameters())


def alarms(folder): return [r['alarm'] for r in csv.DictReader((folder/'metrics.csv').open())]


def test_the_alarm_warns_once_and_is_recorded(pipe, tmp_path, monkeypatch, caplog):
    "With a bound that no rank correlation reaches the sign comes after eight rounds, once."
    monkeypatch.setattr('lasro.finetune.HackingAlarm', lambda: HackingAlarm(rank=1.1))
    with caplog.at_level(logging.WARNING, 'lasro'): run = finetune(pipe, redness, PROMPTS, out=tmp_path/'run', **LONG)
    said = [m for m in caplog.messages if m.startswith('hacking alarm (rank)')]
    assert len(said) == 1 and '\n' not in said[0] and 'surrogate_steps' in said[0]
    found = alarms(tmp_path/'run')
    assert len(found) == 11 and not any(found[:8]) and found[8:] == ['rank']*3
    record = json.loads((tmp_path/'run'/'run.json').read_text())
    assert record['alarms'] == dict(rank=8) and record['rounds'] == 10 and record['parameters']['stop_on_alarm'] is False and 'rank alarm' in repr(run)


def test_the_alarm_stops_where_asked(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr('lasro.finetune.HackingAlarm', lambda: HackingAlarm(rank=1.1))
    finetune(pipe, redness, PROMPTS, out=tmp_path/'run', stop_on_alarm=True, **LONG)
    record = json.loads((tmp_path/'run'/'run.json').read_text())
    assert len(alarms(tmp_path/'run')) == 9 and record['rounds'] == 8 and record['parameters']['stop_on_alarm'] is True


def test_the_alarm_is_silent_and_changes_nothing(pipe, tmp_path, monkeypatch, caplog):
    "A run without signs has the weights that it had without the alarm."
    with caplog.at_level(logging.WARNING, 'lasro'): a = finetune(pipe, redness, PROMPTS, out=tmp_path/'a', **LONG | dict(outer_steps=2))
    monkeypatch.setattr('lasro.finetune.note_alarm', lambda rows: None)
    b = finetune(pipe, redness, PROMPTS, out=tmp_path/'b', **LONG | dict(outer_steps=2))
    assert not [m for m in caplog.messages if 'hacking alarm' in m] and not any(alarms(tmp_path/'a'))
    assert all(torch.equal(p, q) for p, q in zip(a.pipe.unet.parameters(), b.pipe.unet.parameters()))


@pytest.mark.parametrize('arm, signs', [('lasro', set()), ('lasro-frozen', {'held_out'})])
def test_committed_runs(arm, signs):
    "Every frozen surrogate is found out, and no default run is."
    runs = read_runs('lab', arm=arm, setting='default', num_steps=2, split='test')
    runs = [r for r in runs if arm != 'lasro' or r.record['reward'] in ('image_reward', 'attribute_binding', 'text_alignment')]
    assert len(runs) >= 3
    for run in runs:
        rows = [{k: v for k, v in row.items() if v == v} for row in pd.read_csv(run.folder/'metrics.csv').to_dict('records')]
        found = set(first_alarms(rows))
        assert found >= signs and (signs or not found), (run.folder, found)


def test_a_held_out_reward_that_cannot_read_the_prompts_is_left_out(pipe):
    "attribute_binding checks on image_reward, and finds no thing in these prompts."
    run = finetune(pipe, 'image_reward', ['something red and large', 'a picture of it'], **LONG | dict(outer_steps=1))
    assert 'probe_reward' in run.metrics and 'probe_held_out' not in run.metrics
