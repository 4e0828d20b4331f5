"""Times the reward gradient at true size, through the surrogate and through the decoder with a reward on pixels:
`python bench/true_size.py --out results/lab/bench/true_size.json`.

Random weights: only cost is measured. Each side builds only what it needs. Rounds are interleaved, and CPU seconds are
counted beside wall seconds, because other work on the machine lengthens the latter. On a CPU the memory is the
process's peak above what it held before the pass (VmHWM after a reset); on a GPU it is the allocator's.

The reward on pixels is a ViT-H/14 at 224 pixels, as PickScore's. The row of the CPU takes about eight minutes on one
thread and 7 GB; `--small` takes seconds and shows that the script works.
"""
import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import lasro # first: it lets a CUDA-built torchvision import beside a CPU torch # noqa: F401
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from lasro.core import environment, save_json
from lasro.models import Conditioning
from lasro.sdxl.passes import MemorySetting, ModelShape, build_networks, random_inputs
from lasro.sdxl.rewards import clip_inputs

NAMES = ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'patch_size', 'projection_dim')
VIT_H = dict(zip(NAMES, (1280, 5120, 32, 16, 14, 1024)))
VIT_SMALL = dict(zip(NAMES, (32, 64, 1, 2, 56, 16)))


def release():
    "Give freed memory back to the system, so that the peak is not hidden in what was freed."
    gc.collect()
    if platform.system() == 'Linux': ctypes.CDLL(None).malloc_trim(0)


def status_gb(name: str) -> float:
    "Read a line of /proc/self/status, in GB of 2^30 bytes."
    line = next(x for x in Path('/proc/self/status').read_text().splitlines() if x.startswith(name))
    return int(line.split()[1])/2**20


def measured(run, device: torch.device) -> dict:
    "Run once; return wall and CPU seconds, and GB above what was held before."
    release()
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)/2**30
    else:
        Path('/proc/self/clear_refs').write_text('5') # resets VmHWM
        before = status_gb('VmRSS')
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if device.type == 'cuda': torch.cuda.synchronize(device)
    seconds = dict(wall_s=time.perf_counter()-wall, cpu_s=time.process_time()-cpu)
    peak = torch.cuda.max_memory_allocated(device)/2**30 if device.type == 'cuda' else status_gb('VmHWM')
    return {name: round(x, 3) for name, x in (seconds | dict(gb=peak-before)).items()}


def autocast(device: torch.device, dtype: torch.dtype):
    "The context of a forward pass."
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def surrogate_gradient(surrogate, latents: torch.Tensor, cond: Conditioning, dtype):
    "Differentiate the surrogate's score in the latents."
    z = latents.clone().requires_grad_()
    with autocast(z.device, dtype): score = surrogate(z, cond).sum()
    torch.autograd.grad(score, z)


def pixel_gradient(vae, tower, latents: torch.Tensor, dtype):
    "Differentiate a reward on the decoded pictures in the latents."
    z = latents.clone().requires_grad_()
    images = vae.decode(z.to(dtype)).sample.float()/2+.5
    pixels = clip_inputs(images.clamp(0, 1), tower.config.image_size, dtype)
    with autocast(z.device, dtype): score = tower(pixels).image_embeds.sum()
    torch.autograd.grad(score, z)


def passes(shape: ModelShape, args, device: torch.device, dtype: torch.dtype) -> tuple[dict, dict]:
    "Build both sides; return name: pass, and name: parameters."
    ranks = dict(lora_rank=4, surrogate_rank=4) if args.small else {}
    setting = MemorySetting(gradient_checkpointing=False, **ranks)
    student, surrogate, vae = build_networks(shape, setting, dtype)
    cond, latents = random_inputs(student, vae, args.batch)
    cond.guidance = None # the teacher embeds none
    del student
    surrogate.encoder.unet.up_blocks = torch.nn.ModuleList() # the half that is never run
    with torch.device(device): # built as a run has it: in the dtype of the frozen weights
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        config = CLIPVisionConfig(image_size=224, **VIT_SMALL if args.small else VIT_H)
        tower = CLIPVisionModelWithProjection(config)
        torch.set_default_dtype(before)
    for network in (surrogate, vae, tower): network.to(device).eval().requires_grad_(False)
    z = latents[0].to(device)
    runs = dict(
        surrogate=partial(surrogate_gradient, surrogate, z, cond.to(device), dtype),
        pixels=partial(pixel_gradient, vae, tower, z, dtype))
    sizes = dict(surrogate=surrogate, decoder=vae.decoder, reward=tower)
    return runs, {name: sum(p.numel() for p in network.parameters()) for name, network in sizes.items()}


def summary(rows: list[dict], name: str) -> dict:
    "Return median, least and greatest of each number of a side."
    mine = [row for row in rows if row['side'] == name]
    return {key: [statistics.median(found), min(found), max(found)]
            for key in ('wall_s', 'cpu_s', 'gb') for found in [[row[key] for row in mine]]}


def bench(args) -> dict:
    "Measure both sides in turn."
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype)
    shape = ModelShape(args.architecture, 64 if args.small else args.resolution, args.small)
    runs, parameters = passes(shape, args, device, dtype)
    for run in runs.values(): measured(run, device) # the first pass of each is not counted
    rows = [dict(side=name, round=k) | measured(run, device) for k in range(args.rounds) for name, run in runs.items()]
    sides = {name: summary(rows, name) for name in runs}
    key = 'cpu_s' if device.type == 'cpu' else 'wall_s'
    ratios = {'seconds': key} | {'memory': 'gb'}
    ratios = {name: round(sides['pixels'][k][0]/max(sides['surrogate'][k][0], 1e-6), 2) for name, k in ratios.items()}
    asked = vars(args) | dict(resolution=shape.resolution, threads=torch.get_num_threads())
    return dict(asked=asked, parameters=parameters, sides=sides, ratios=ratios, rows=rows, environment=environment())


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument('--architecture', default='ssd-1b', choices=('ssd-1b', 'sdxl'))
    parser.add_argument('--resolution', type=int, default=512)
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--dtype', default='bfloat16', choices=('bfloat16', 'float32'))
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--small', action='store_true', help='small networks: shows that the script works')
    parser.add_argument('--out', default='', help='a json file')
    args = parser.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', str(args.threads))
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    found = bench(args)
    if args.out: save_json(found, Path(args.out))
    print(json.dumps({name: found[name] for name in ('parameters', 'sides', 'ratios')}, indent=1))


if __name__ == '__main__': main()
