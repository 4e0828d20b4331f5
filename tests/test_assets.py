"The shipped weights, as unmodified diffusers sees them."
import json
import shutil

import pandas as pd
import pytest, torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline

from lasro.core import ASSETS as WORLDS_FOLDER
from lasro.models import add_lora, check_manifest, load_pipeline, save_lora
from lasro.worlds.detectors import ask
from lasro.worlds.shapes import parse, prompts
from lasro.worlds.shapes_rewards import attribute_binding

ASSETS = WORLDS_FOLDER/'shapes'
STEPS = dict(num_inference_steps=2, guidance_scale=1., output_type='pt')


def stock() -> StableDiffusionXLPipeline:
    "What a user has who never imported this project's loaders."
    pipe = StableDiffusionXLPipeline.from_pretrained(ASSETS)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


def mean_answers(images, texts) -> torch.Tensor:
    "How surely each picture shows what a prompt names."
    return torch.stack([a.mean() for a in ask(images, [parse(t) for t in texts])])


def seeded(): return torch.Generator().manual_seed(0)


def test_manifest_holds():
    check_manifest(ASSETS)
    files = [p for p in ASSETS.rglob('*') if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 20e6
    assert not [p for p in files if p.suffix in ('.pt', '.bin', '.pkl', '.ckpt')]


def test_model_card_says_how_they_were_made_and_how_good_they_are():
    card = (ASSETS/'README.md').read_text()
    for word in ('make retrain', 'teacher', 'student', 'guidance', 'sha256'): assert word in card.lower(), word


@pytest.mark.parametrize('damage', ['changed', 'missing'])
def test_damaged_weights_are_named(tmp_path, damage):
    folder = tmp_path/'shapes'
    shutil.copytree(ASSETS, folder)
    names = json.loads((folder/'manifest.json').read_text())
    name = next(n for n in names if n.startswith('unet/') and n.endswith('.safetensors'))
    path = folder/name
    if damage == 'missing': path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    message = f'^{name} is damaged: expected sha256 [0-9a-f]{{16}}, found [^\n]*$'
    with pytest.raises(OSError, match=message): load_pipeline(folder)


def test_stock_diffusers_draws_what_the_prompt_says():
    "As well as the model card says, and better than it draws another prompt."
    texts = prompts('validation', 64)
    images = stock()(texts, generator=seeded(), **STEPS).images
    assert images.shape == (64, 3, 32, 32)
    right = attribute_binding()(images, texts)[0]
    answers, others = mean_answers(images, texts), mean_answers(images, texts[1:]+texts[:1])
    table = pd.read_csv(ASSETS/'headroom.csv')
    row = table.query("model == 'student' and num_steps == 2 and split == 'seen' and reward == 'attribute_binding'")
    card = row['mean'].item()
    assert abs(right.mean()-card) < 3*right.std()/8+.05, (right.mean(), card)
    assert right.mean() > .3, right.mean() # recognisable: every phrase of the prompt is there
    assert answers.mean() > others.mean()+3*(answers-others).std()/8, (answers.mean(), others.mean())


def test_stock_diffusers_loads_our_lora(tmp_path):
    texts = prompts('validation', 4)
    ours, theirs = load_pipeline(), stock()
    base = theirs(texts, generator=seeded(), **STEPS).images
    generator = torch.Generator().manual_seed(1)
    for p in add_lora(ours.unet, rank=4): torch.nn.init.normal_(p, std=.05, generator=generator)
    save_lora(ours, tmp_path)
    theirs.load_lora_weights(tmp_path, weight_name='pytorch_lora_weights.safetensors')
    changed, loaded = (p(texts, generator=seeded(), **STEPS).images for p in (ours, theirs))
    assert (changed-loaded).abs().max() < 1e-4
    assert (changed-base).abs().mean() > 1e-2
