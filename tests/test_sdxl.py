"The full-size path, on small random networks of the real classes and configs."
import json, os, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd
import pytest, torch
from conftest import ROOT
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from lasro import sdxl
from lasro.finetune import ARMS, NO_REWARD, checkpoint, find_arm, train
from lasro.models import Conditioning, decode
from lasro.rewards import Reward, RewardError
from lasro.sampling import sample
from lasro.sdxl import FORMS, Processes, Setting, cached_prompts, load_few_step, make_tune_task, small_form, spread, tune, tune_options

TEXTS = ['a red ring and a blue cross', 'a large green square', 'a cyan circle', 'an orange cross and a blue ring']
SETTING = Setting(lora_rank=4, surrogate_rank=4, micro=0, blocks=False, sample_batch=4)
FEW = dict(pretrain_prompts=2, n_noises=2, pretrain_steps=1, outer_steps=2, generator_steps=1, surrogate_steps=1, collect_prompts=2, batch_size=2, lcm_batch=2, groups=2, probe_prompts=0)


def brightness(images, prompts, metadata): return images.mean((1, 2, 3))
brightness.differentiable, brightness.range = True, (0, 1)


@pytest.fixture(scope='session')
def forms(tmp_path_factory):
    "Small random folders of every form."
    folder = tmp_path_factory.mktemp('forms')
    torch.manual_seed(0)
    return {name: small_form(name, folder/name) for name in FORMS}


@pytest.fixture
def fresh(forms, tmp_path):
    "A model of a form, fresh, and the conditioning of `TEXTS`."
    def make(name='lcm-ssd-1b'):
        model = load_few_step(forms[name])
        return model, cached_prompts(model, TEXTS, tmp_path/'prompts')
    return make


def one_line(e) -> str:
    assert '\n' not in str(e.value)
    return str(e.value)


def stock_pictures(form, guidance, lora=None, steps=2):
    "By diffusers alone."
    student = dict(unet=UNet2DConditionModel.from_pretrained(form.unet)) if form.unet else {}
    pipe = StableDiffusionXLPipeline.from_pretrained(form.base, add_watermarker=False, **student)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=50)
    if form.lora: pipe.load_lora_weights(form.lora, weight_name='pytorch_lora_weights.safetensors'); pipe.fuse_lora(); pipe.unload_lora_weights()
    if lora: pipe.load_lora_weights(lora, weight_name='pytorch_lora_weights.safetensors')
    pipe.set_progress_bar_config(disable=True)
    return pipe(TEXTS, num_inference_steps=steps, guidance_scale=guidance or 1., generator=torch.Generator().manual_seed(5), output_type='pt').images


def our_pictures(pipe, cond, steps=2):
    g = torch.Generator().manual_seed(5)
    noise = [torch.randn(len(TEXTS), 4, 8, 8, generator=g) for _ in range(steps)]
    with torch.no_grad(): return decode(pipe.vae, sample(pipe.unet, cond, noise[0], noise[1:], steps).final)


@pytest.mark.parametrize('name', FORMS)
def test_every_form_samples_as_stock_diffusers(fresh, name):
    model, cond = fresh(name)
    assert (cond.guidance is not None) == bool(model.form.unet) == bool(model.pipe.unet.config.time_cond_proj_dim)
    ours, stock = our_pictures(model.pipe, cond), stock_pictures(model.form, model.guidance)
    assert (ours-stock).abs().max() < 1e-4
    assert not any(p.requires_grad for m in (model.pipe.unet, model.pipe.vae, model.teacher) for p in m.parameters())


@pytest.mark.parametrize('name', FORMS)
def test_what_comes_out_loads_in_stock_diffusers(fresh, tmp_path, name):
    model, cond = fresh(name)
    before = our_pictures(model.pipe, cond)
    run = tune(model, brightness, TEXTS, cond, SETTING, out=tmp_path/'run', profile='smoke', **FEW | dict(lr=3e-3, warmup=1))
    ours, stock = our_pictures(run.pipe, cond), stock_pictures(model.form, model.guidance, tmp_path/'run'/'lora')
    assert (ours-stock).abs().max() < 1e-4 and (ours-before).abs().max() > 1e-3
    card = (tmp_path/'run'/'lora'/'README.md').read_text()
    for word in (model.form.licence, model.form.base, 'brightness', 'load_lora_weights', 'reward calls'): assert word in card, word
    assert {p.name for p in (tmp_path/'run'/'lora').iterdir()} == {'README.md', 'grid.png', 'pytorch_lora_weights.safetensors'}
    with pytest.raises(FileExistsError, match='finished run'): tune(model, brightness, TEXTS, cond, SETTING, out=tmp_path/'run', profile='smoke', **FEW)


@pytest.mark.parametrize('name', ['lcm-ssd-1b', 'lcm-lora-sdxl']) # with a guidance embedding, and without
@pytest.mark.parametrize('arm', ARMS)
def test_every_arm_runs(fresh, arm, name):
    model, cond = fresh(name)
    before, teacher = our_pictures(model.pipe, cond), {k: v.clone() for k, v in model.teacher.state_dict().items()}
    options = dict(FEW, outer_steps=0) if arm == 'base' else FEW | dict(lr=3e-3, warmup=1)
    run = tune(model, brightness, TEXTS, cond, SETTING, arm=arm, profile='smoke', **options)
    moved = (our_pictures(run.pipe, cond)-before).abs().max()
    assert moved < 1e-6 if arm == 'base' else moved > 1e-3
    after = {k.replace('.base_layer', ''): v for k, v in model.teacher.state_dict().items()} # LaSRO's surrogate is an adapter on it
    assert all(torch.equal(v, after[k]) for k, v in teacher.items())
    losses = run.metrics.filter(regex='loss|grad_norm')
    assert arm == 'base' or (len(losses.columns) and np.isfinite(losses.iloc[1:].dropna(axis=1, how='all')).all().all())
    assert len(run.metrics) == (0 if arm == 'base' else 3) and run.record['arm'] == arm
    calls = 0 if arm in NO_REWARD else (2+2*2)*2*2
    assert run.record['reward_calls'] == calls
    assert all(torch.isfinite(p).all() for p in run.pipe.unet.parameters())


def test_full_weights_are_tuned_too(fresh, tmp_path):
    model, cond = fresh()
    run = tune(model, brightness, TEXTS, cond, replace(SETTING, lora_rank=0, surrogate_rank=0), out=tmp_path/'run', profile='smoke', **FEW)
    assert (tmp_path/'run'/'unet.safetensors').exists() and not (tmp_path/'run'/'lora').exists()
    assert run.record['parameters']['lora_rank'] == 0


def near(x, rel: float): return x if isinstance(x, str) else pytest.approx(x, rel=rel, abs=1e-5, nan_ok=True)


def rows(run): return [{k: v for k, v in row.items() if k != 'wall_s'} for row in run.metrics.to_dict('records')]


@pytest.mark.parametrize('arm', ['lasro', 'direct'])
def test_parts_and_blocks_change_nothing_but_memory(fresh, arm):
    curves = []
    for setting in (replace(SETTING, sample_batch=16), replace(SETTING, micro=1, blocks=True, sample_batch=1)):
        model, cond = fresh()
        curves.append(rows(tune(model, brightness, TEXTS, cond, setting, arm=arm, profile='smoke', **FEW)))
    for a, b in zip(*curves):
        for k in a: assert a[k] == near(b[k], 1e-4), k


def test_a_stopped_run_goes_on(fresh, tmp_path):
    def new():
        model, cond = fresh()
        return model, cond
    whole = rows(tune(*new_args(new()), SETTING, profile='smoke', **FEW | dict(outer_steps=3)))
    model, cond = new()
    arm = started(model, cond, outer_steps=3)
    done = train(arm, 2, progress=False)
    checkpoint(arm, tmp_path/'run'/'checkpoints', 2, done)
    resumed = rows(tune(*new_args(new()), SETTING, out=tmp_path/'run', profile='smoke', **FEW | dict(outer_steps=3)))
    assert repr(resumed) == repr(whole)


def new_args(pair): return pair[0], brightness, TEXTS, pair[1]


def started(model, cond, processes=Processes(), setting=SETTING, **options):
    "An arm as `tune` makes it."
    opts = tune_options('lasro', 'smoke', setting, **FEW | options)
    task = make_tune_task(model, brightness, TEXTS, cond, opts, 2, 0)
    arm = find_arm('lasro')[0](task, opts)
    spread(arm, processes, setting)
    task.data = sdxl.sampled_data(task.pipe, cond, batch_size=setting.sample_batch)
    return arm


@pytest.mark.parametrize('places, message', [
    (dict(base='/nowhere/at-all'), 'base: there is no folder'), (dict(unet='/nowhere'), 'unet: there is no folder'), (dict(teacher='no folder'), 'teacher: there is no folder'),
    (dict(vae='/nowhere'), 'vae: there is no folder'), (dict(lora='/nowhere'), 'lora: there is no folder'), (dict(lora='.'), 'lora: . holds no pytorch_lora_weights.safetensors'), (dict(resolution=60), 'no multiple of 8')])
def test_a_wrong_place_gets_one_line(forms, places, message):
    with pytest.raises((OSError, ValueError), match=message) as e: load_few_step(replace(forms['lcm-ssd-1b'], **places))
    one_line(e)


def test_a_wrong_network_gets_one_line(forms, tmp_path):
    from diffusers import AutoencoderKL
    UNet2DConditionModel(block_out_channels=(32, 64), down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'), cross_attention_dim=32).save_pretrained(tmp_path/'sd15')
    for place in ('unet', 'teacher'):
        with pytest.raises(ValueError, match='is no SDXL UNet') as e: load_few_step(replace(forms['lcm-ssd-1b'], **{place: str(tmp_path/'sd15')}))
        one_line(e)
    AutoencoderKL(block_out_channels=(8, 8), down_block_types=('DownEncoderBlock2D',)*2, up_block_types=('UpDecoderBlock2D',)*2, latent_channels=4, norm_num_groups=4).save_pretrained(tmp_path/'vae')
    with pytest.raises(ValueError, match='the autoencoder shrinks by 2') as e: load_few_step(replace(forms['sdxl-turbo'], vae=str(tmp_path/'vae')))
    one_line(e)
    (tmp_path/'empty').mkdir()
    with pytest.raises(OSError, match='base: .*cannot be loaded') as e: load_few_step(replace(forms['sdxl-turbo'], base=str(tmp_path/'empty')))
    one_line(e)


OFFLINE_SCRIPT = """
import socket, sys
asked = []
def refuse(*a, **k): asked.append(a); raise OSError('the network was asked')
socket.socket.connect = socket.getaddrinfo = refuse
import lasro, torch
from pathlib import Path
from lasro import sdxl
if __name__ == '__main__': # the reward's process imports this file too
    sys.path.append(sys.argv[2])
    from test_sdxl import FEW, SETTING, TEXTS, brightness, replace
    forms = {n: sdxl.replace(sdxl.FORMS[n], **{k: str(Path(sys.argv[1])/n/v) for k, v in places.items()}, vae='', resolution=64) for n, places in
             {'lcm-lora-sdxl': dict(base='base', teacher='base', lora='lora'), 'lcm-ssd-1b': dict(base='base', teacher='base', unet='unet')}.items()}
    model = sdxl.load_few_step(forms['lcm-lora-sdxl'])
    out = Path(sys.argv[3])
    run = sdxl.tune(model, brightness, TEXTS, sdxl.cached_prompts(model, TEXTS, out/'prompts'), SETTING, out=out/'run', profile='smoke', **FEW)
    sdxl.drop_text_encoders(model)
    sdxl.export_merged(run, model, out/'merged')
    assert not asked, asked
    try: sdxl.load_few_step(sdxl.replace(forms['lcm-ssd-1b'], teacher='nobody/nothing'))
    except OSError as e: assert 1 <= len(asked) <= 2 and 'teacher: nobody/nothing cannot be loaded (the hub cannot be reached' in str(e) and '\\n' not in str(e), (e, asked)
    else: raise AssertionError('it was found')
    asked.clear()
    sdxl.hub_answers.cache_clear()
    try: sdxl.load_few_step(sdxl.replace(forms['lcm-ssd-1b'], unet='nobody/nothing', vae='/nowhere'))
    except OSError as e: assert 'vae: there is no folder' in str(e), e # before anything is loaded
    try: sdxl.load_few_step(sdxl.replace(forms['lcm-lora-sdxl'], lora='nobody/nothing'))
    except OSError as e: assert 'lora: nobody/nothing cannot be loaded' in str(e) and '\\n' not in str(e), e
"""


def test_the_network_is_asked_only_for_hub_ids(forms, tmp_path):
    "In a process to which nobody has said that it is offline."
    (tmp_path/'script.py').write_text(OFFLINE_SCRIPT)
    folder = Path(forms['lcm-ssd-1b'].base).parents[1]
    environment = {k: v for k, v in os.environ.items() if k not in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE')}
    found = subprocess.run([sys.executable, tmp_path/'script.py', folder, ROOT/'tests', tmp_path], capture_output=True, text=True, timeout=300, env=environment | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', TMPDIR=str(tmp_path)))
    assert found.returncode == 0, found.stderr[-3000:]


def test_a_reward_elsewhere_is_offline(monkeypatch):
    monkeypatch.delenv('HF_HUB_OFFLINE')
    apart = sdxl.elsewhere('compressibility')
    try: assert apart.pool.submit(os.getenv, 'HF_HUB_OFFLINE').result() == '1' and 'HF_HUB_OFFLINE' not in os.environ
    finally: apart.pool.shutdown()


@pytest.mark.parametrize('name', sdxl.FULL_REWARDS)
def test_a_missing_reward_file_gets_one_line(name):
    for folder in ('', '/nowhere'):
        with pytest.raises(FileNotFoundError, match=f'reward {name}: .*give') as e: sdxl.load_full_reward(name, folder=folder)
        one_line(e)


def test_too_little_memory_gets_one_line_before_anything_is_loaded():
    with pytest.raises(MemoryError, match=r'the leanest plan needs \d+\.\d GB and the card has 8') as e: sdxl.choose_setting(sdxl.full_configs('lcm-sdxl'), 8)
    one_line(e)


def test_parameters_are_counted_exactly():
    "Against SDXL's known 2,567,463,684, and against what a small network really has."
    configs = sdxl.full_configs('lcm-lora-sdxl')
    assert sdxl.student_pass(sdxl.as_json(configs[0]), 64)[1] == 2_567_463_684
    unet = sdxl.small_unet('ssd-1b', time_cond_proj_dim=256)
    _, frozen, trained = sdxl.student_pass(sdxl.as_json(unet.config), 4)
    assert frozen == sdxl.count_parameters(unet)
    assert trained == sum(p.numel() for p in sdxl.add_lora(unet, 4))
    teacher = sdxl.small_unet('ssd-1b')
    _, trained = sdxl.surrogate_pass(sdxl.as_json(teacher.config), 4)
    assert trained == sum(p.numel() for p in sdxl.SurrogateReward(teacher, lora_rank=4).parameters() if p.requires_grad)


@pytest.mark.parametrize('card', [24, 40, 80])
def test_plans_fit_their_cards(card):
    "The paper's own models with a LoRA, at their resolutions; a larger card is never planned leaner."
    for name in ('lcm-ssd-1b', 'lcm-sdxl', 'sdxl-turbo'):
        setting, plan = sdxl.choose_setting(sdxl.full_configs(name), card)
        assert plan.GB['peak'] < card and sdxl.LADDER.index(setting) <= sdxl.LADDER.index(sdxl.choose_setting(sdxl.full_configs(name), 24)[0])
        assert plan.GB['peak'] == pytest.approx(plan.GB.iloc[:-3].sum()+plan.GB.iloc[-3:-1].max())


def test_the_shared_surrogate_leaves_the_teacher_alone(fresh):
    model, cond = fresh('lcm-sdxl')
    before = our_pictures(replace_unet(model), Conditioning(*list(vars(cond).values())[:3]))
    arm = started(model, cond)
    for p in arm.surrogate.parameters():
        if p.requires_grad: torch.nn.init.normal_(p, std=.1)
    for i in range(2): arm.prepare() if i == 0 else arm.round(0)
    assert arm.surrogate.encoder.unet is model.teacher
    assert torch.equal(our_pictures(replace_unet(model), Conditioning(*list(vars(cond).values())[:3])), before)


def replace_unet(model):
    from types import SimpleNamespace
    return SimpleNamespace(unet=model.teacher, vae=model.pipe.vae)


def test_prompts_are_encoded_once(fresh, tmp_path):
    model, _ = fresh()
    first = cached_prompts(model, TEXTS, tmp_path/'cache')
    files = list((tmp_path/'cache').iterdir())
    model.pipe.encode_prompt = None # it is not called again
    again = cached_prompts(model, TEXTS, tmp_path/'cache')
    assert len(files) == 1 and files[0].suffix == '.safetensors' and all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values()))
    with pytest.raises(TypeError): cached_prompts(model, TEXTS[:2], tmp_path/'cache')
    sdxl.drop_text_encoders(model)
    tune(model, brightness, TEXTS, first, SETTING, profile='smoke', **FEW)


def test_labels_of_another_process_are_the_same(fresh):
    model, cond = fresh()
    pictures = our_pictures(model.pipe, cond)
    apart = sdxl.elsewhere('compressibility')
    try:
        here = sdxl.load_full_reward('compressibility')((pictures*255).round()/255, TEXTS)[0]
        assert torch.equal(apart(pictures, TEXTS)[0], here)
        waiting = [apart.submit(pictures, TEXTS) for _ in range(3)] # it does not block
        assert all(torch.equal(w.result()[0], here) for w in waiting)
        run = tune(model, apart, TEXTS, cond, SETTING, profile='smoke', **FEW)
        assert run.record['reward'] == 'compressibility' and run.record['reward_calls'] == 24
    finally: apart.pool.shutdown()
    with pytest.raises(FileNotFoundError, match='reward image_reward'): sdxl.elsewhere('image_reward', folder='/nowhere')


def test_a_reward_that_dies_elsewhere_is_named():
    apart = sdxl.elsewhere('compressibility')
    apart.pool.submit(os._exit, 1)
    with pytest.raises(RewardError, match="reward 'compressibility' in its own process failed") as e:
        for _ in range(3): apart(torch.rand(1, 3, 64, 64), ['a'])
    one_line(e)


def test_spacy_finds_the_noun_phrases():
    spacy = pytest.importorskip('spacy')
    vocab = spacy.blank('en').vocab
    words, heads = ['a', 'green', 'bench', 'on', 'the', 'left', 'of', 'a', 'red', 'car'], [2, 2, 2, 2, 5, 3, 5, 9, 9, 6]
    deps, pos = ['det', 'amod', 'ROOT', 'prep', 'det', 'pobj', 'prep', 'det', 'amod', 'pobj'], ['DET', 'ADJ', 'NOUN', 'ADP', 'DET', 'NOUN', 'ADP', 'DET', 'ADJ', 'NOUN']
    doc = spacy.tokens.Doc(vocab, words=words, heads=heads, deps=deps, pos=pos)
    assert sdxl.noun_phrases(None, lambda text: doc) == ['a green bench', 'a red car']


@pytest.mark.parametrize('name, text, expected', [
    ('color_val.txt', 'a green bench and a red car\n\n a dog \n', ['a green bench and a red car', 'a dog']), ('drawbench.csv', 'Prompts,Category\n"One cat, two dogs.",Counting\n', ['One cat, two dogs.']),
    ('test.jsonl', '{"prompt": "a cat"}\n{"prompt": "a cat"}\n{"prompt": "a dog"}\n', ['a cat', 'a dog']), ('4k.json', '["a cat", "a dog"]', ['a cat', 'a dog']), ('pick.json', '[{"caption": "a cat"}]', ['a cat']), ('MINE.TXT', 'a fox\n', ['a fox'])])
def test_prompt_files(tmp_path, name, text, expected):
    (tmp_path/name).write_text(text)
    assert sdxl.read_prompt_set(tmp_path/name) == expected


@pytest.mark.parametrize('name, content, message', [
    ('x.csv', b'a,b\n1,2\n', 'has no column of prompts'), ('x.csv', b'', 'x.csv cannot be read as csv'), ('x.csv', b'prompt,style\n,photo\n', 'x.csv holds no prompts'), ('x.txt', b'\n \n', 'x.txt holds no prompts'),
    ('x.txt', b'\xff\xfe\x00', 'x.txt cannot be read as txt'), ('x.json', b'{"a": 1}', 'x.json cannot be read as json'), ('x.json', b'[1,', 'x.json cannot be read as json'), ('x.parquet', b'PAR1', 'x.parquet cannot be read as parquet'),
    ('x.xlsx', b'', 'prompts are read from .txt, .csv, .tsv, .jsonl, .parquet, .json')])
def test_a_broken_prompt_file_gets_one_line(tmp_path, name, content, message):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as e: sdxl.read_prompt_set(tmp_path/name)
    assert str(tmp_path/name) in one_line(e)


def test_a_folder_that_is_not_hpsv2_gets_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="not HPSv2's") as e: sdxl.read_prompt_set(tmp_path)
    one_line(e)


def test_what_spreadsheets_leave_is_read(tmp_path):
    (tmp_path/'x.csv').write_bytes('\ufeffPrompt,style\n a fox ,photo\n,photo\na fox,anime\n'.encode())
    assert sdxl.read_prompt_set(tmp_path/'x.csv') == ['a fox']


def test_fid_of_folders(tmp_path):
    g = torch.Generator().manual_seed(0)
    for name, shift in (('a', 0.), ('b', .3)):
        (tmp_path/name).mkdir()
        for i in range(8): sdxl.save_picture((torch.rand(3, 32, 32, generator=g)*.6+shift).clamp(0, 1), tmp_path/name/f'{i}.png')
    features = lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)/255
    np.savez(tmp_path/'b.npz', **sdxl.fid_statistics(tmp_path/'b', features))
    far, n = sdxl.fid(tmp_path/'a', tmp_path/'b.npz', features)
    assert n == 8 and far == pytest.approx(sdxl.fid(tmp_path/'a', tmp_path/'b', features)[0], rel=1e-4)
    assert far == pytest.approx(3*.3**2, rel=.1) and sdxl.fid(tmp_path/'a', tmp_path/'a', features)[0] == pytest.approx(0, abs=1e-4)


# Several processes

WORKER = ROOT/'tests'/'sdxl_worker.py'


def launch(*args, processes: int = 2):
    "Start the worker as `accelerate launch` does with the shipped CPU config."
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', ROOT/'workflow'/'accelerate'/'cpu.yaml', '--num_processes', processes, '--main_process_port', '0', WORKER, *args]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=540, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''})
    assert found.returncode == 0, found.stderr[-3000:]


def close(a: list[dict], b: list[dict], places=('lcm_loss', 'surrogate', 'grad_norm', 'surrogate_loss', 'reward', 'rank_correlation')):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        for k in set(places) & set(x): assert x[k] == near(y[k], 1e-5), (k, x['step'])


def test_two_processes_compute_what_one_does(tmp_path):
    "LoRA by rows, and full weights shared out; then one process goes on where two have stopped."
    from sdxl_worker import scenario
    torch.manual_seed(0)
    small_form('lcm-ssd-1b', tmp_path/'form')
    launch(tmp_path, 'failing', 'lora', 'stopped', 'full')
    two = {name: json.loads((tmp_path/f'{name}-2.json').read_text()) for name in ('lora', 'stopped', 'full')}
    assert two['lora']['world'] == 2 and len(two['lora']['rows']) == 6
    lora = scenario(tmp_path, 'lora', Processes())
    close(lora, two['lora']['rows'])
    close(scenario(tmp_path, 'full', Processes()), two['full']['rows'])
    close(lora, scenario(tmp_path, 'resumed', Processes()))
    assert len(two['stopped']['rows']) == 3
    assert json.loads((tmp_path/'failing-2.json').read_text())['rows'] == [dict(said='the reward failed in another process')] # and nobody waits for ever


# Parameters

def parameters(**changed) -> dict:
    import importlib.util
    spec = importlib.util.spec_from_file_location('launcher', ROOT/'workflow'/'accelerate'/'train.py')
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    return launcher.parameters([(k, str(v)) for k, v in changed.items()])


def test_parameters_reach_the_run(fresh, tmp_path):
    model, _ = fresh()
    (tmp_path/'prompts.txt').write_text('a red ring\na blue cross\n'+'a red ring '*50)
    (tmp_path/'test.txt').write_text('a green ring\n')
    p = parameters(OVERRIDES='{"micro": 3, "blocks": false, "batch_size": 5}', HELD_OUT='incompressibility', PROMPTS=tmp_path/'prompts.txt', PROTOCOL='t2i-compbench', TEST_PROMPTS=tmp_path/'test.txt', ARM='rlcm')
    ready = sdxl.prepare(model, p, tmp_path/'run', float('inf'))
    assert ready.call['setting'] == replace(sdxl.SMALL_LADDER[0], micro=3, blocks=False) and ready.call['batch_size'] == 5 and ready.call['held_out'].name == 'incompressibility'
    assert ready.call['texts'] == ['a red ring', 'a blue cross'] and ready.left_out == 1 and model.pipe.text_encoder is None
    with pytest.raises(MemoryError, match='the leanest plan needs'): sdxl.fit_to_card(model, p, 2, 1., 0.)
    less = sdxl.fit_to_card(model, p | dict(OVERRIDES='{"batch_size": 2}'), 2, float('inf'), 3.)[1]
    assert less.GB['reward'] == 3 and less.GB['latents and noise of a batch'] < ready.plan.GB['latents and noise of a batch']
    test = ready.call['test']
    with pytest.warns(UserWarning, match='asks for 300 prompts and 1 are given'): assert sdxl.draw_protocol(model, test, tmp_path/'drawn', 2) == 10
    assert sdxl.draw_set(model, test[2], test[1], tmp_path/'other', 1, seed=51) == 1 # a picture depends on its seed alone
    same = [Image.open(next((tmp_path/f).glob(f'*_{i:06d}.png'))) for f, i in (('drawn', 9), ('other', 0))]
    assert np.array_equal(*map(np.asarray, same))


@pytest.mark.parametrize('changed, message', [(dict(NUM_STEPS=5), 'give 1 to 4'), (dict(NUM_STEPS=0), 'give 1 to 4'), (dict(OVERRIDES='lr=1'), 'is no JSON'), (dict(PROTOCOL='coco', TEST_PROMPTS='x.txt'), 'it is one of t2i-compbench'), (dict(PROTOCOL='drawbench'), 'go together'), (dict(OVERRIDES='{"micro": "x"}'), 'micro is .x.'), (dict(OVERRIDES='{"lr": "x"}'), 'lr is .x., but must be a number'), (dict(ARM='ppo'), 'ppo'), (dict(PROFILE='huge'), 'huge'), (dict(REWARD_OPTIONS='[1]'), 'REWARD_OPTIONS .* is no JSON'), (dict(REWARD='compressibility', REWARD_OPTIONS='{"folder": "x"}'), 'takes no folder'), (dict(REWARD='beauty'), 'no reward .beauty.: choose one of image_reward'), (dict(OVERRIDES='{"mirco": 1}'), 'no option of lasro .* and no field of Setting')])
def test_a_wrong_parameter_gets_one_line(fresh, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message) as e: sdxl.prepare(fresh()[0], parameters(**changed), tmp_path/'run', float('inf'))
    one_line(e)


@pytest.mark.parametrize('name, value', [('NUM_STEPS', 'two'), ('NUM_STEPS', '2.0'), ('SMALL', 'false'), ('CARD_GB', '24 GB'), ('CARD_GB', -5), ('RESOLUTION', -64), ('SEED', 'None')])
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(ValueError, match=f'{name} is .*but is of the kind of') as e: parameters(**{name: value})
    one_line(e)


def test_an_unfinished_run_is_not_another_one(fresh, tmp_path):
    def go(setting=SETTING, **changed):
        model, cond = fresh()
        return tune(model, brightness, TEXTS, cond, setting, **dict(out=tmp_path/'run', profile='smoke', **FEW) | changed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdxl, 'write_outputs', lambda *args: 1/0)
        with pytest.raises(ZeroDivisionError): go()
    for changed, message in ((dict(setting=replace(SETTING, surrogate_rank=0)), 'surrogate_rank 4, not 0'), (dict(seed=1), 'seed 0, not 1'), (dict(arm='rlcm'), "arm 'lasro', not 'rlcm'")):
        with pytest.raises(ValueError, match=message) as e: go(**changed)
        one_line(e)
    assert len(go(setting=replace(SETTING, micro=1, blocks=True, sample_batch=2)).metrics) == 3


def test_what_the_decoder_keeps_is_counted_right(fresh):
    vae, kept, weights = fresh()[0].pipe.vae.bfloat16(), {}, {}
    sdxl.keep(weights, vae.parameters())
    with sdxl.saved(kept): vae.decode(torch.zeros(1, 4, 16, 16, dtype=torch.bfloat16).requires_grad_())
    counted = sdxl.decoder_pass(sdxl.as_json(vae.config), 128)
    assert counted.whole == pytest.approx(sdxl.gigabytes(kept, weights), rel=.05) and counted.kept+counted.block < counted.whole


def test_the_plan_of_direct_has_the_decoder_in_it(fresh):
    model, p = fresh()[0], parameters(ARM='direct')
    direct, lasro = (sdxl.fit_to_card(model, p | dict(ARM=arm), 8, float('inf'), 0.)[1].GB['an update'] for arm in ('direct', 'lasro'))
    assert direct > lasro
    configs, s = sdxl.full_configs('lcm-ssd-1b'), Setting()
    some, many, none = (sdxl.memory_plan(configs, s, pixels=n).GB['an update'] for n in (2, 85, 0))
    assert some == many and some-none > 5 # pictures are decoded again, two at a time
    with pytest.warns(UserWarning, match="backbone 'clip' takes more"): sdxl.fit_to_card(model, p | dict(ARM='lasro', OVERRIDES='{"backbone": "clip"}'), 8, float('inf'), 0.)


def test_processes_share_rows_in_the_plan():
    "More processes compute less twice and keep more: what fits one alone may not fit each of four."
    configs, s = sdxl.full_configs('lcm-sdxl'), Setting(micro=4, blocks=False)
    alone, four, many = (sdxl.memory_plan(configs, s, world=n).GB['an update'] for n in (1, 4, 16))
    assert four > alone > many
    assert sdxl.LADDER.index(sdxl.choose_setting(configs, 80, world=4)[0]) > sdxl.LADDER.index(sdxl.choose_setting(configs, 80, world=1)[0])
    full = replace(s, lora_rank=0, surrogate_rank=0)
    assert sdxl.memory_plan(configs, full, world=4, shards=True).GB['student, trained'] == pytest.approx(sdxl.memory_plan(configs, full, world=4).GB['student, trained']/4)


def test_a_wrong_form_gets_one_line():
    with pytest.raises(ValueError, match='there is no model .sdxl.: it is one of lcm-ssd-1b') as e: sdxl.chosen_form('sdxl')
    one_line(e)
    mine = sdxl.chosen_form('lcm-ssd-1b', unet='/my/unet')
    assert mine.unet == '/my/unet' and mine.licence == 'that of the folders given for lcm-ssd-1b' and 'unet' in sdxl.hub_places(mine)


def test_the_card_runs(fresh, tmp_path):
    "What the model card tells to run, run as it stands beside the weights."
    model, cond = fresh()
    run = tune(model, brightness, TEXTS, cond, SETTING, out=tmp_path/'run', profile='smoke', **FEW)
    code = (tmp_path/'run'/'lora'/'README.md').read_text().split('```python\n')[1].split('```')[0]
    found = subprocess.run([sys.executable, '-c', f'import lasro\n{code}\nassert image.size == (64, 64)'], cwd=tmp_path/'run'/'lora', capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]


def test_the_record_is_written_last(fresh, tmp_path, monkeypatch):
    "A run that dies over its grid is not finished, and goes on."
    def die(*args): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(sdxl, 'write_outputs', die)
        model, cond = fresh()
        with pytest.raises(KeyboardInterrupt): tune(model, brightness, TEXTS, cond, SETTING, out=tmp_path/'run', profile='smoke', **FEW)
    assert not (tmp_path/'run'/'run.json').exists()
    model, cond = fresh()
    tune(model, brightness, TEXTS, cond, SETTING, out=tmp_path/'run', profile='smoke', **FEW)
    assert (tmp_path/'run'/'run.json').exists() and (tmp_path/'run'/'lora'/'grid.png').exists()


def test_merged_without_text_towers(fresh, tmp_path):
    model, cond = fresh('lcm-lora-sdxl')
    run = tune(model, brightness, TEXTS, cond, SETTING, profile='smoke', **FEW | dict(lr=3e-3, warmup=1))
    ours = our_pictures(run.pipe, cond)
    sdxl.drop_text_encoders(model)
    merged = StableDiffusionXLPipeline.from_pretrained(sdxl.export_merged(run, model, tmp_path/'merged'), add_watermarker=False)
    merged.set_progress_bar_config(disable=True)
    stock = merged(TEXTS, num_inference_steps=2, guidance_scale=1., generator=torch.Generator().manual_seed(5), output_type='pt').images
    assert (ours-stock).abs().max() < 1e-3


# The launcher and the bench

def test_the_launcher_refuses_an_unknown_parameter():
    found = subprocess.run([sys.executable, ROOT/'workflow'/'accelerate'/'train.py', '-p', 'MODLE', 'x'], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert found.returncode == 1 and 'there is no parameter MODLE' in found.stderr.splitlines()[-1]


def test_the_bench_without_a_gpu_writes_nothing(tmp_path):
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    (tmp_path/'kept.json').write_text('{}')
    found = subprocess.run([sys.executable, ROOT/'bench'/'sdxl.py', tmp_path], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert found.returncode == 0 and 'no GPU here: nothing was measured' in found.stdout
    assert [p.name for p in tmp_path.iterdir()] == ['kept.json']


@pytest.fixture(scope='module')
def bench():
    sys.path.insert(0, str(ROOT/'bench'))
    import sdxl as module
    sys.path.pop(0)
    return module


@pytest.mark.parametrize('what, variant', [*((w, 'plain') for w in ('generator', 'generator1', 'gradient', 'surrogate', 'sampling', 'labelling')), *(('generator', v) for v in ('channels_last', 'fused', 'no_blocks'))])
def test_every_row_of_the_bench_runs(bench, what, variant):
    row = bench.measure(what, 'lcm-ssd-1b', 64, variant, device='cpu', small=True, rounds=3, warmup=0)
    assert row['ms'] > 0 and row['ms_q25'] <= row['ms'] <= row['ms_q75'] and row['n'] == 3
    assert what == 'labelling' or row['flops'] > 0
    assert what != 'gradient' or row['time_ratio'] > 0
    assert len(set(map(bench.name, bench.rows()))) == len(bench.rows()) and bench.rows()[0][2] == 1024


@pytest.mark.slow
def test_a_compiled_update_runs(bench):
    assert bench.measure('generator', 'lcm-ssd-1b', 64, 'compile', device='cpu', small=True, rounds=3, warmup=1)['ms'] > 0


def test_a_batch_that_does_not_fit_is_halved(bench, monkeypatch):
    asked = []
    def measure(what, *args, batch, **keywords):
        asked.append(batch)
        if batch > 1: raise torch.OutOfMemoryError('too large')
        return dict(what=what, batch=batch)
    monkeypatch.setattr(bench, 'measure', measure)
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: None)
    assert bench.fitted(('generator', 'lcm-sdxl', 1024, 'plain')) == dict(what='generator', batch=1, too_large=[4, 2]) and asked == [4, 2, 1]
    row = bench.fitted(('surrogate', 'lcm-sdxl', 1024, 'plain'))
    assert row['too_large'] == [4, 2] and row['resolution'] == 1024 and 'ms' not in row


def test_the_notebook_runs_in_bfloat16(tmp_path):
    "As on a GPU, but on the CPU."
    found = subprocess.run([sys.executable, ROOT/'workflow'/'run.py', ROOT/'nbs'/'14_sdxl.ipynb', tmp_path/'out.ipynb', '-p', 'DTYPE', 'bfloat16', '-p', 'OUT', str(tmp_path/'run')], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    assert np.isfinite(pd.read_csv(tmp_path/'run'/'metrics.csv').surrogate_loss.iloc[1:]).all()


@pytest.mark.slow
def test_the_notebook_runs_by_papermill_in_a_minute(tmp_path):
    found = subprocess.run([sys.executable, ROOT/'workflow'/'run.py', ROOT/'nbs'/'14_sdxl.ipynb', tmp_path/'out.ipynb', '-p', 'OUT', str(tmp_path/'run')], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert (tmp_path/'run'/'run.json').exists() and (tmp_path/'run'/'lora'/'pytorch_lora_weights.safetensors').exists()


def test_the_launcher_runs_two_processes(tmp_path):
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', ROOT/'workflow'/'accelerate'/'cpu.yaml', '--main_process_port', '0', ROOT/'workflow'/'accelerate'/'train.py', '-p', 'OUT', tmp_path/'run']
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=540, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''})
    assert found.returncode == 0, found.stderr[-3000:]
    assert {p.name for p in tmp_path.iterdir()} == {'run', 'prompts'}
    assert '2 processes; ' in found.stdout and json.loads((tmp_path/'run'/'run.json').read_text())['reward'] == 'compressibility'
