"Faults of the full-size path that were found by reading and by runs; each has its test, on small random networks."
import copy
import sys

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, python
from safetensors.torch import save_file
from torch import nn

from lasro.core import generator, load_json
from lasro.finetuning import finetune
from lasro.models import adapter_layers, adapters_off, add_lora
from lasro.sdxl.config import make_config
from lasro.sdxl.prepare import prepare
from lasro.surrogate import octave_noise


def brightness(images, prompts, metadata=None): return images.mean((1, 2, 3))
def darkness(images, prompts, metadata=None): return -images.mean((1, 2, 3))


def config(**changes):
    "A run of the small model without pictures and without evaluation."
    given = dict(small=True, reward='test_sdxl:brightness', held_out='', features='', test_noises=0)
    return make_config(**given | changes)


# 2. what a resumed run must not change

def test_reward_options_cannot_change_in_a_resumed_run(tmp_path):
    first = config(reward='clip_score', reward_options=dict(folder='a'), out=str(tmp_path/'run'))
    first.keep()
    (tmp_path/'run'/'checkpoints').mkdir()
    first.check_start()
    second = config(reward='clip_score', reward_options=dict(folder='b'), out=str(tmp_path/'run'))
    with pytest.raises(ValueError, match='^[^\n]*reward_options[^\n]*another folder or force$'): second.check_start()


# 7. presets: no distillation towards another model

@pytest.mark.parametrize('model', ['sdxl-turbo', 'dmd2-sdxl'])
def test_turbo_and_dmd2_are_anchored_to_themselves(model):
    from lasro.sdxl.config import MODEL_OPTIONS
    assert MODEL_OPTIONS[model]['c'] == 0 and MODEL_OPTIONS[model]['anchor'] > 0
    options = config(model=model).make_options()
    if hasattr(options, 'anchor'): assert options.c == 0 and options.anchor > 0


# 8. LCM-LoRA stays an adapter; its base is the teacher

@pytest.fixture(scope='module')
def lcm_lora(tmp_path_factory):
    from lasro.sdxl.loading import load_few_step
    from lasro.sdxl.sources import small_source
    source = small_source('lcm-lora-sdxl', tmp_path_factory.mktemp('small'))
    return load_few_step(source)


def test_the_base_is_loaded_once(lcm_lora):
    student = {p.data_ptr() for p in lcm_lora.pipe.unet.parameters()}
    assert all(p.data_ptr() in student for p in lcm_lora.teacher.parameters())
    adapter = sum(p.numel() for n, p in lcm_lora.pipe.unet.named_parameters() if 'distilled' in n)
    whole = sum(p.numel() for p in lcm_lora.pipe.unet.parameters())
    assert whole-adapter == sum(p.numel() for p in lcm_lora.teacher.parameters())


def test_without_its_tuning_an_lcm_lora_is_still_an_lcm(lcm_lora):
    from lasro.models import predict_noise
    from lasro.sdxl.passes import random_inputs
    model = copy.deepcopy(lcm_lora)
    unet = model.pipe.unet
    cond, noise = random_inputs(unet, model.pipe.vae, 2)
    with torch.no_grad():
        before = predict_noise(unet, noise[0], 999, cond)
        assert (before-predict_noise(model.teacher, noise[0], 999, cond)).abs().max() > .01
        trained = add_lora(unet, 4)
        for p in trained: nn.init.normal_(p, std=.1)
        assert (before-predict_noise(unet, noise[0], 999, cond)).abs().max() > .01
        with adapters_off(unet): assert torch.equal(before, predict_noise(unet, noise[0], 999, cond))
    assert not any(p.requires_grad for n, p in unet.named_parameters() if 'distilled' in n)


# 9. noise of the surrogate at two sizes of the latents

def test_octave_noise_is_the_same_at_the_same_scale_of_the_picture():
    small = octave_noise(torch.zeros(64, 4, 8, 8), .25, generator(0, 'small'))
    large = octave_noise(torch.zeros(64, 4, 128, 128), .25, generator(0, 'large'))
    for cells in (1, 2, 4, 8):
        a, b = (F.adaptive_avg_pool2d(x, cells).std() for x in (small, large))
        assert .95 < b/a < 1.25, (cells, a, b) # the finer octaves leave a third of a variance at 8 cells


# 10. smaller ones

def test_an_empty_vae_is_the_pipelines_own(tmp_path):
    from lasro.sdxl.sources import model_source
    assert model_source('lcm-sdxl', vae='').vae == ''
    assert model_source('lcm-sdxl', base=str(tmp_path)).vae == '' # a folder on this machine brings its own
    assert model_source('lcm-sdxl').vae


def test_parquet_reads_only_the_column_of_prompts(tmp_path, monkeypatch):
    from lasro.sdxl.prompts import read_prompt_set
    pd.DataFrame(dict(caption=['a red ring'], jpg_0=[b'x'*1000])).to_parquet(tmp_path/'shard.parquet')
    read, asked = pd.read_parquet, []
    def noted(path, columns=None):
        asked.append(columns)
        return read(path, columns=columns)
    monkeypatch.setattr(pd, 'read_parquet', noted)
    assert read_prompt_set(tmp_path/'shard.parquet') == ['a red ring'] and asked == [['caption']]


def test_float16_is_prepared_with_a_scaled_loss():
    "Cards before Ampere have no bfloat16 units; accelerate scales the loss there, and only on a GPU."
    ready = prepare(config(dtype='float16', overrides=dict(outer_steps=1)))
    assert ready.model.teacher.dtype == torch.float16 and ready.arguments['mixed_precision'] == 'fp16'
    assert ready.model.pipe.unet.dtype == torch.float16


def test_the_card_runs_in_half_precision_on_a_gpu(lcm_lora):
    from lasro.sdxl.card import usage
    code = usage(lcm_lora)
    assert code.count('torch.float16') == code.count('from_pretrained') and "pipe.to('cuda')" in code


def test_nothing_is_copied_on_the_card(monkeypatch):
    "A LoRA run copies neither UNet: both copies would take gigabytes on a GPU."
    ready = prepare(config(overrides=dict(outer_steps=1)))
    networks = (ready.model.pipe.unet, ready.model.teacher)
    real = copy.deepcopy
    def checked(x, *args):
        assert not any(x is network for network in networks)
        return real(x, *args)
    monkeypatch.setattr(copy, 'deepcopy', checked)
    finetune(**ready.arguments)


def test_how_long_counts_labels_and_surrogate():
    from lasro.sdxl.memory import count_work
    work = count_work('lcm-ssd-1b', config(small=False).make_options())
    assert set(work.index) == {'samples and labels', 'surrogate updates', 'generator updates'}
    assert work['generator updates'] < .75*work.sum()


def test_every_copy_of_a_reward_is_in_the_plan(monkeypatch):
    "6. Each process of a launch loads its own copy; on the card of the run the plan counts them all."
    from lasro.sdxl.memory import RunSizes, memory_plan
    import lasro.sdxl.prepare # noqa: F401
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    asked = config(small=False, reward='compressibility', reward_device='cuda:0')
    assert asked.reward_copies('cuda:0') == 4 and asked.reward_copies('cuda:1') == 0
    plan = memory_plan('lcm-ssd-1b', sizes=RunSizes(reward_gb=1.5, reward_copies=4))
    assert set(plan.loc['reward']) == {6.}


def test_out_of_memory_steps_down_and_resumes(tmp_path):
    from lasro.sdxl.tuning import tune
    calls = []
    def scarce(images, prompts, metadata=None):
        calls.append(len(images))
        if len(calls) == 40: raise torch.OutOfMemoryError('CUDA out of memory')
        return images.mean((1, 2, 3))
    sys.modules[__name__].scarce = scarce
    run = tune(config(reward='test_sdxl:scarce', out=str(tmp_path/'run'), overrides=dict(outer_steps=12)))
    assert run.record['rounds'] == 12
    kept = load_json(tmp_path/'run'/'config.json')
    assert kept['overrides']['sample_batch'] < 4, 'it was not made leaner'
    assert (tmp_path/'run'/'config.json').exists() and max(calls[40:]) < max(calls[:40])


# a whole run by its recipe

RECIPES = sorted((ROOT/'recipes').glob('*.yaml'))


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_configuration(path):
    "Names and types are right, and the experiment notebook has all of its parameters."
    from lasro.command import check_parameters, read_recipe
    given = read_recipe(path)
    make_config(**given)
    check_parameters(ROOT/'nbs'/'experiments'/'tune_sdxl.ipynb', given)


def test_the_small_recipe_does_the_whole_way(tmp_path):
    "Training, tensorboard, grid, snapshots, judgement, card and two forms of the LoRA: under a minute on a free core."
    out = tmp_path/'run'
    found = python('-m', 'lasro', 'run', ROOT/'recipes'/'small.yaml', '-p', 'OUT', out)
    assert found.returncode == 0, found.stderr[-2000:]
    files = {p.relative_to(out).as_posix() for p in out.rglob('*') if p.is_file()}
    lora = {'README.md', 'grid.png', 'lora_comfyui_a1111.safetensors'} | {'pytorch_lora_weights.safetensors'}
    assert {f'lora/{name}' for name in lora} <= files
    assert {'run.json', 'metrics.csv', 'eval.csv.gz', 'eval_table.csv'} <= files
    assert {'snapshots/best.json', 'snapshots/step-00001/grid.png'} <= files
    assert any('events.out.tfevents' in name for name in files)
    table = pd.read_csv(out/'eval_table.csv').set_index('measure')
    assert {'compressibility', 'clip_score', 'diversity', 'distance_to_base'} <= set(table.index)
    assert 'diversity' in (out/'lora'/'README.md').read_text()
    again = python('-m', 'lasro', 'run', ROOT/'recipes'/'small.yaml', '-p', 'OUT', out)
    assert again.returncode == 1 and 'holds a finished run' in again.stderr.splitlines()[-1]


WRONG = [('MODEL', 'hyper-sd', 'refused'), ('REWRAD', 'x', 'unknown parameter'), ('PROMPTS', 'no.txt', 'no prompt file')]


@pytest.mark.parametrize('name, value, message', WRONG)
def test_what_is_wrong_with_a_recipe_is_one_line(name, value, message):
    found = python('-m', 'lasro', 'run', ROOT/'recipes'/'small.yaml', '-p', name, value)
    assert found.returncode == 1 and len(found.stderr.strip().splitlines()) == 1 and message in found.stderr


# 12. presets and signs of hacking

def test_the_first_run_makes_400_updates_at_a_rate_that_moves():
    options = config(small=False).make_options()
    assert options.lr == 1e-4 and options.outer_steps*options.generator_steps == 400


def test_signs_of_hacking_exist_at_size(tmp_path):
    "Diversity, a held-out reward and the distance to the untouched model, without being asked for."
    given = dict(small=True, reward='test_sdxl:brightness', test_noises=0, overrides=dict(outer_steps=1))
    ready = prepare(make_config(**given))
    run = finetune(**ready.arguments)
    assert {'probe_held_out', 'probe_fid', 'diversity'} <= set(run.metrics.columns)


# forms: a single file, DMD2's timesteps

RENAMED = {
    'time_embedding.linear_1': 'time_embed.0',
    'time_embedding.linear_2': 'time_embed.2',
    'add_embedding.linear_1': 'label_emb.0.0',
    'add_embedding.linear_2': 'label_emb.0.2',
    'conv_in': 'input_blocks.0.0',
    'conv_norm_out': 'out.0',
    'conv_out': 'out.2',
}


def single_file_name(name: str) -> str:
    "The name of a weight of a UNet in a file of Stability's format."
    from lasro.sdxl.export import _ldm_block, _ldm_name
    layer, _, kind = name.rpartition('.')
    if layer in RENAMED: return f'model.diffusion_model.{RENAMED[layer]}.{kind}'
    for norm, other in (('.norm1', '.in_layers.0'), ('.norm2', '.out_layers.0')):
        if '.resnets.' in layer and layer.endswith(norm):
            section, *rest = layer.split('.')
            level = 0 if section == 'mid_block' else int(rest.pop(0))
            return f'model.diffusion_model.{_ldm_block(section, level, rest[0], int(rest[1]))}{other}.{kind}'
    return f'model.diffusion_model.{_ldm_name(layer)}.{kind}'


def test_a_community_checkpoint_is_one_file(tmp_path):
    "The UNet is read from the file, the configuration from the published base; the other networks are given here."
    from diffusers import StableDiffusionXLPipeline
    from lasro.sdxl import parts
    from lasro.sdxl.sources import model_source, small_source
    published = small_source('lcm-lora-sdxl', tmp_path/'small')
    pipe = StableDiffusionXLPipeline.from_pretrained(published.base, add_watermarker=False)
    for p in pipe.unet.parameters(): nn.init.normal_(p, std=.02)
    weights = {single_file_name(name): w.contiguous() for name, w in pipe.unet.state_dict().items()}
    save_file(weights, tmp_path/'community.safetensors')
    source = model_source('lcm-lora-sdxl', base=str(tmp_path/'community.safetensors'), config=published.base)
    given = {name: getattr(pipe, name) for name in ('vae', 'text_encoder', 'text_encoder_2')}
    loaded = parts._load_single_file(source, torch.float32, add_watermarker=False, **given)
    for name, w in loaded.unet.state_dict().items(): assert torch.equal(w, pipe.unet.state_dict()[name]), name


def test_dmd2_samples_as_the_scheduler_does(tmp_path):
    "Four steps at DMD2's own timesteps, against diffusers' LCM scheduler with the same noise."
    from diffusers import LCMScheduler
    from lasro.models import predict_noise
    from lasro.sampling import sample
    from lasro.sdxl.loading import load_few_step
    from lasro.sdxl.passes import random_inputs
    from lasro.sdxl.sources import small_source
    model = load_few_step(small_source('dmd2-sdxl', tmp_path))
    cond, noise = random_inputs(model.pipe.unet, model.pipe.vae, 1, draws=4)
    with torch.no_grad():
        found = sample(model.pipe, cond, noise[0], noise[1:], 4)
        assert found.timesteps == [999, 749, 499, 249]
        scheduler = LCMScheduler.from_config(model.pipe.scheduler.config)
        scheduler.set_timesteps(timesteps=found.timesteps)
        x = noise[0]
        for i, t in enumerate(scheduler.timesteps):
            predicted = predict_noise(model.pipe.unet, x, t, cond)
            out = scheduler.step(predicted, t, x, generator=torch.Generator())
            z = out.denoised
            if i < 3:
                alpha = scheduler.alphas_cumprod[scheduler.timesteps[i+1]]
                x = alpha.sqrt()*z + (1-alpha).sqrt()*noise[i+1]
            assert (z-found.denoised[i]).abs().max() < 1e-3
