"Backbones of the surrogate, the alarm over whole runs, and the gradient that reaches the generator."
import csv
import json
import logging

import pytest
import torch
from conftest import PROMPTS, redness

from lasro.core import generator, randn
from lasro.finetuning import finetune
from lasro.models import decode, encode_prompts, load_teacher
from lasro.monitor import HackingAlarm
from lasro.surrogate import BACKBONES, frozen, make_surrogate, ordered_pairs, rank_accuracy, surrogate_loss
from lasro.worlds.shapes_rewards import load_clip

LONG = dict(profile='smoke', outer_steps=10, probe_prompts=4, snapshot_every=0)


def surrogate_on(backbone: str, pipe, **options):
    "A surrogate of the embedded world."
    vision = load_clip()[2] if backbone in ('clip', 'blip') else None
    return make_surrogate(backbone, load_teacher(), pipe.vae, vision=vision, **options)


@pytest.mark.parametrize('backbone', BACKBONES)
def test_a_backbone_learns_redness(pipe, backbone):
    "Pairs that differ in how red they decode teach it to order new ones; gradients reach the latents, not the decoder."
    torch.manual_seed(0)
    surrogate, g = surrogate_on(backbone, pipe), generator(0, 'redness')
    cond = encode_prompts(pipe, PROMPTS*12)
    z = [randn(48, 4, 8, 8, generator=g) for _ in range(2)]
    with torch.no_grad(): r = [redness(decode(pipe.vae, x), None, None) for x in z]
    group = torch.arange(4).repeat(12)
    optimizer = torch.optim.AdamW([p for p in surrogate.parameters() if p.requires_grad], 1e-3)
    kept = {k: v.clone() for k, v in pipe.vae.state_dict().items()}
    winners, losers, _ = ordered_pairs(r[0], group)
    for _ in range(25):
        loss = surrogate_loss(surrogate, z[0], cond, winners, losers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert rank_accuracy(surrogate, z[1], cond, r[1], group) > .65
    assert all(torch.equal(v, kept[k]) for k, v in pipe.vae.state_dict().items())
    x = z[1][:2].clone().requires_grad_()
    with frozen(surrogate): surrogate(x, cond[:2]).sum().backward()
    assert x.grad.abs().amax((1, 2, 3)).min() > 0 and all(p.grad is None for p in pipe.vae.parameters())


@pytest.mark.parametrize('backbone', BACKBONES)
def test_fresh_weights_are_fresh(pipe, backbone):
    before, fresh = surrogate_on(backbone, pipe), surrogate_on(backbone, pipe, pretrained=False)
    body = 'unet' if backbone.startswith('unet') else 'vision'
    other = dict(fresh.named_parameters())
    same = [torch.equal(p, other[k]) for k, p in before.named_parameters() if body in k and p.ndim > 1]
    assert len(same) > 5 and not any(same)
    assert sum(p.numel() for p in before.parameters()) == sum(p.numel() for p in fresh.parameters())


@pytest.mark.parametrize('backbone', ['clip', 'blip'])
def test_picture_backbones_train_in_the_loop(pipe, backbone):
    run = finetune(pipe, redness, PROMPTS, backbone=backbone, **LONG | dict(outer_steps=1))
    assert run.metrics.grad_norm.iloc[-1] > 0


def alarms(folder): return [r['alarm'] for r in csv.DictReader((folder/'metrics.csv').open())]


def test_the_alarm_warns_once_and_is_recorded(pipe, tmp_path, monkeypatch, caplog):
    "With a bound that no rank correlation reaches the sign comes after eight rounds, once."
    monkeypatch.setattr('lasro.monitor.HackingAlarm', lambda: HackingAlarm(least_rank=1.1))
    with caplog.at_level(logging.WARNING, 'lasro'): run = finetune(pipe, redness, PROMPTS, tmp_path/'run', **LONG)
    said = [m for m in caplog.messages if m.startswith('hacking alarm (rank)')]
    assert len(said) == 1 and '\n' not in said[0] and 'surrogate_steps' in said[0]
    found = alarms(tmp_path/'run')
    assert len(found) == 11 and not any(found[:8]) and found[8:] == ['rank']*3
    record = json.loads((tmp_path/'run'/'run.json').read_text())
    assert record['alarms'] == dict(rank=8) and record['rounds'] == 10 and 'rank from update 8' in repr(run)


def test_the_alarm_stops_where_asked(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr('lasro.monitor.HackingAlarm', lambda: HackingAlarm(least_rank=1.1))
    finetune(pipe, redness, PROMPTS, tmp_path/'run', stop_on_alarm=True, **LONG)
    record = json.loads((tmp_path/'run'/'run.json').read_text())
    assert len(alarms(tmp_path/'run')) == 9 and record['rounds'] == 8


def test_prompts_that_the_reward_cannot_read_are_left_out(pipe, caplog):
    "attribute_binding finds no thing in two of these prompts; image_reward can read all, its held-out reward cannot."
    texts = ['something red and large', 'a picture of it', *PROMPTS]
    with caplog.at_level(logging.WARNING, 'lasro'):
        run = finetune(pipe, 'attribute_binding', texts, **LONG | dict(outer_steps=1))
    assert run.record['n_prompts'] == len(PROMPTS) and any('cannot read 2 of 6 prompts' in m for m in caplog.messages)
    with pytest.raises(ValueError, match='can read none of the 2 prompts'):
        finetune(pipe, 'attribute_binding', texts[:2], **LONG | dict(outer_steps=1))
    run = finetune(pipe, 'image_reward', texts[:2], **LONG | dict(outer_steps=1))
    assert 'probe_reward' in run.metrics and 'probe_held_out' not in run.metrics
