"""Times full-size networks with random weights on one GPU, row by row: `python bench/sdxl.py [OUT] [--rows WORD ...] [--again]`.

Each row runs in a process of its own and writes OUT/ROW.json (by default results/sdxl/bench), 1024 px first; a row that is there is skipped, so a killed call goes on. `--rows` takes the rows
whose names hold one of the words. A batch that does not fit is halved, and the row says so (`too_large`). The rows are: sampling two steps; labelling (decoding, and a reward of PickScore's architecture); a step of the surrogate; a step of the generator, plain and with one change
each (VARIANTS), which is the table of what a change gives; and the reward's gradient through the surrogate beside that through the decoder and the reward itself. Milliseconds are a median with its quartiles.
FLOP use is of the operations that are needed, counted on meta tensors without what is computed twice, against a bfloat16 matmul measured in the same process. Without a GPU nothing is measured or written.
"""
import argparse, gc, statistics, subprocess, sys, time
from pathlib import Path

import lasro # first: it lets a CUDA-built torchvision import beside a CPU torch # noqa: F401
import torch

MODELS = ('lcm-ssd-1b', 'lcm-sdxl')
RESOLUTIONS = (1024, 512)
VARIANTS = ('channels_last', 'fused', 'cudnn_attention', 'no_blocks', 'compile') # the last one without checkpointed blocks, as a compiled block cannot be computed twice
WARMUP, ROUNDS, SECONDS = 3, 12, 120 # a row stops early after so many seconds
BATCH = 4


def rows() -> list[tuple[str, str, int, str]]: # what, model, resolution, variant
    "All rows, in order."
    plain = [(what, model, r, 'plain') for r in RESOLUTIONS for model in MODELS for what in ('generator', 'generator1', 'gradient', 'surrogate', 'sampling', 'labelling')]
    return plain + [('generator', 'lcm-ssd-1b', 1024, v) for v in VARIANTS]


def name(row) -> str: return '-'.join(map(str, row))


def sync(device):
    if device == 'cuda': torch.cuda.synchronize()


def timed(call, device: str, rounds: int = ROUNDS, warmup: int = WARMUP) -> dict: # ms, ms_q25, ms_q75, n, peak_gb
    "A median with its quartiles, and the peak of memory."
    for _ in range(warmup): call()
    if device == 'cuda': torch.cuda.reset_peak_memory_stats()
    times, started = [], time.perf_counter()
    while len(times) < rounds and (len(times) < 3 or time.perf_counter()-started < SECONDS):
        sync(device); start = time.perf_counter()
        call()
        sync(device); times.append(1e3*(time.perf_counter()-start))
    low, median, high = statistics.quantiles(times, n=4)
    return dict(ms=median, ms_q25=low, ms_q75=high, n=len(times), peak_gb=torch.cuda.max_memory_allocated()/2**30 if device == 'cuda' else float('nan'))


def ceiling(device: str, n: int = 8192) -> float: # FLOP/s
    "What a bfloat16 matmul of n by n achieves here."
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    return 2*n**3/(timed(lambda: a @ a, device, 10)['ms']/1e3)


def random_model(model: str, resolution: int, device: str, small: bool):
    "A few-step model with random weights and random prompt embeddings."
    from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from lasro import sdxl
    from lasro.models import Conditioning
    if small: student, teacher = (sdxl.small_unet('ssd-1b' if 'ssd' in model else 'sdxl', **k).config for k in (dict(time_cond_proj_dim=256), {})); vae = sdxl.small_pipeline('sdxl').vae.config; resolution = 64
    else: student, teacher, vae, _ = sdxl.full_configs(model)
    dtype = torch.bfloat16 if device == 'cuda' else torch.float32
    torch.manual_seed(0)
    def make(cls, config):
        with torch.device(device): return cls.from_config(dict(config)).to(dtype).eval().requires_grad_(False)
    unet, teacher, vae = make(UNet2DConditionModel, student), make(UNet2DConditionModel, teacher), make(AutoencoderKL, vae)
    unet.register_to_config(sample_size=resolution//8)
    pipe = StableDiffusionXLPipeline(vae, None, None, None, None, unet, LCMScheduler(), add_watermarker=False)
    vae.enable_slicing()
    c = unet.config
    new = lambda *shape: torch.randn(*shape, device=device).to(dtype)
    cond = Conditioning(new(64, 77, c.cross_attention_dim), new(64, c.projection_class_embeddings_input_dim-6*c.addition_time_embed_dim), torch.tensor([resolution, resolution, 0, 0, resolution, resolution], device=device, dtype=torch.float32).expand(64, 6), torch.full((64,), 8., device=device))
    return sdxl.FewStep(pipe, teacher, sdxl.replace(sdxl.FORMS[model], resolution=resolution)), cond


def pickscore(device: str, small: bool):
    "A reward of PickScore's architecture, CLIP ViT-H/14, with random weights and words."
    from transformers import CLIPConfig, CLIPModel
    from lasro.rewards import Reward
    from lasro.sdxl import pixels_for
    vision, text = (dict(hidden_size=h, intermediate_size=4*h, num_hidden_layers=l, num_attention_heads=16, projection_dim=1024) for h, l in ((1280, 32), (1024, 24)))
    if small: vision = text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, projection_dim=16)
    config = CLIPConfig(text_config=text, vision_config=dict(**vision, image_size=56 if small else 224, patch_size=14), projection_dim=text['projection_dim'])
    with torch.device(device): model = CLIPModel(config).to(torch.bfloat16 if device == 'cuda' else torch.float32).eval().requires_grad_(False)
    words = torch.full((64, 77), 320, device=device); words[:, -1] = 49407
    def fn(images, texts, metadata):
        out = model(input_ids=words[:len(images)], pixel_values=pixels_for(images, config.vision_config.image_size, model.dtype))
        return (out.image_embeds*out.text_embeds).sum(1).float()
    return Reward('pickscore', fn, (-1, 1), differentiable=True)


def change(arm, variant: str):
    "One change to an arm."
    unet = arm.task.pipe.unet
    if variant == 'channels_last': unet.to(memory_format=torch.channels_last); arm.task.teacher.to(memory_format=torch.channels_last)
    if variant == 'fused': arm.optimizer = torch.optim.AdamW(arm.task.params, arm.options.lr, weight_decay=0., fused=True)
    if variant == 'compile':
        from torch import _dynamo
        _dynamo.config.recompile_limit = 64 # one block is compiled for generator, teacher and surrogate
        for block in (b for u in (unet, arm.task.teacher) for b in (*u.down_blocks, *u.up_blocks, u.mid_block) if b is not None): block.compile(dynamic=False)
    if variant == 'cudnn_attention': [torch.backends.cuda.enable_flash_sdp(False), torch.backends.cuda.enable_mem_efficient_sdp(False), torch.backends.cuda.enable_cudnn_sdp(True)]


def fitted(row: tuple, **keywords) -> dict:
    "One row with the largest batch that fits, the usual one or its half, its quarter ...; without numbers if none does."
    batch, too_large, least = BATCH, [], {'surrogate': 2, 'generator1': BATCH}.get(row[0], 1) # a pair needs two
    while batch >= least:
        try: return measure(*row, batch=batch, **keywords) | dict(too_large=too_large)
        except torch.OutOfMemoryError: too_large.append(batch)
        batch //= 2
        gc.collect(); torch.cuda.empty_cache()
    return dict(zip(('what', 'model', 'resolution', 'variant'), row), row=name(row), too_large=too_large)


def measure(what: str, model: str, resolution: int, variant: str = 'plain', batch: int = BATCH, device: str = 'cuda', small: bool = False, **fewer) -> dict:
    "One row."
    from lasro import sdxl
    from lasro.exploration import label
    from lasro.finetune import LaSRO
    from lasro.models import decode
    from lasro.sampling import draw_noise, sample
    from lasro.surrogate import frozen, surrogate_step
    few, cond = random_model(model, resolution, device, small)
    n = 1 if what == 'generator1' else batch
    setting = sdxl.Setting(**dict(lora_rank=4, surrogate_rank=4) if small else {}, micro=n, blocks=variant not in ('no_blocks', 'compile'))
    dtype = torch.bfloat16 if device == 'cuda' else None
    options = sdxl.tune_options('lasro', 'sdxl', setting, batch_size=n, lcm_batch=n, probe_prompts=0)
    reward = pickscore(device, small)
    task = sdxl.make_tune_task(few, reward, ['']*len(cond), cond, options, 2, 0)
    arm = LaSRO(task, options)
    sdxl.spread(arm, sdxl.Processes(device=device), setting, dtype)
    change(arm, variant)
    size = few.pipe.unet.config.sample_size
    z = torch.randn(n, 4, size, size, device=device)
    task.data = (z, torch.arange(n))
    noise, injected = draw_noise(n, 2, torch.Generator().manual_seed(0), (4, size, size), device)
    configs = sdxl.configs_of(few)
    f, h = sdxl.student_pass(sdxl.as_json(configs[0]), setting.lora_rank)[0].flops, sdxl.surrogate_pass(sdxl.as_json(configs[1]), setting.surrogate_rank)[0].flops
    out, flops = {}, 0.
    if what in ('generator', 'generator1'): out, flops = timed(lambda: arm.update(0, 0), device, **fewer), sdxl.update_flops(configs, setting, options)['needed']
    if what == 'surrogate':
        pairs = torch.arange(n//2), torch.arange(n//2, n)
        out, flops = timed(lambda: surrogate_step(arm.surrogate, arm.surrogate_optimizer, z, cond[:n], *pairs), device, **fewer), 2*n*h
    if what == 'sampling':
        with torch.no_grad(): out, flops = timed(lambda: sample(few.pipe.unet, cond[:n], noise, injected, 2), device, **fewer), 2*n*f
    if what == 'labelling': out = timed(lambda: label(few.pipe.vae, z, ['']*n, reward)[0].result(), device, **fewer)
    if what == 'gradient':
        x = z.clone().requires_grad_()
        def through_surrogate():
            with frozen(arm.surrogate): torch.autograd.grad(arm.surrogate(x, cond[:n]).sum(), x)
        def through_pixels(): torch.autograd.grad(reward(decode(few.pipe.vae, x), ['']*n)[0].sum(), x)
        at_rest = torch.cuda.memory_allocated()/2**30 if device == 'cuda' else 0.
        out, direct = timed(through_surrogate, device, **fewer), timed(through_pixels, device, **fewer)
        flops = 2*n*h
        out |= {f'direct_{k}': v for k, v in direct.items()} | dict(at_rest_gb=at_rest, time_ratio=direct['ms']/out['ms'], memory_ratio=(out['peak_gb']-at_rest)/max(1e-9, direct['peak_gb']-at_rest))
    top = ceiling(device, 256 if small else 8192)
    return dict(row=name((what, model, resolution, variant)), what=what, model=model, resolution=resolution, variant=variant, batch=n, images_per_s=1e3*n/out['ms'], flops=flops, ceiling_flops=top,
                flop_use=flops/(out['ms']/1e3)/top if flops else float('nan'), planned_gb=float(sdxl.memory_plan(configs, setting, len(cond), 0, n, n).GB['peak']), **out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', nargs='?', type=Path)
    parser.add_argument('--rows', nargs='+', default=[''], metavar='WORD')
    parser.add_argument('--again', action='store_true')
    parser.add_argument('--one', nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available(): return print('no GPU here: nothing was measured and nothing was written')
    from lasro.core import environment, results_dir, save_json
    out = args.out or results_dir('sdxl')/'bench'
    if args.one:
        what, model, resolution, variant = args.one
        found = fitted((what, model, int(resolution), variant))
        return save_json(found | dict(device=torch.cuda.get_device_name(), environment=environment()), out/f"{found['row']}.json")
    for row in (r for r in rows() if any(word in name(r) for word in args.rows)):
        if (out/f'{name(row)}.json').exists() and not args.again: continue
        code = subprocess.run([sys.executable, __file__, str(out), '--one', *map(str, row)]).returncode
        print(name(row), 'done' if code == 0 else f'failed with {code}: not written', flush=True)


if __name__ == '__main__': main()
