"""Times the update of `rlcm` against that of trl 0.23.1's DDPOTrainer, in turns: `python bench/rlcm_trl.py TRL_PYTHON [OUT]`.

Both take a step of AdamW on the same batch of two-step samples: a UNet of the shapes pipeline's size without added conditions, all weights, no guidance, both steps of a sample in one update.
In the same turns the UNet alone is timed on as many latents, forward and backward: `floor` is its share of trl's time, below which no update that trains on these samples can come.
TRL_PYTHON is the interpreter of an environment with trl, as tests/oracles/ddpo_trl.py says. OUT is a folder, by default results/lab/bench. With CUDA in both environments the GPU is used, else the CPU with OMP_NUM_THREADS threads.
"""
import contextlib, json, statistics, subprocess, sys, time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

BATCH, STEPS, DIM, TOKENS, SIZE = 64, 2, 112, 28, 8
TIMES = (999, 499)
WARMUP, ROUNDS = 5, 40


def device() -> str: return 'cuda' if torch.cuda.is_available() else 'cpu'


def numbers(*shape, seed: int) -> torch.Tensor: return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device())


def seconds(update) -> float:
    "What one call takes."
    start = time.perf_counter()
    update()
    if device() == 'cuda': torch.cuda.synchronize()
    return time.perf_counter()-start


def trl_update(config: dict):
    "One DDPO update by the trainer's own code, as a call."
    from accelerate import Accelerator
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from trl.models.modeling_sd_base import scheduler_step
    from trl.trainer.ddpo_trainer import DDPOTrainer
    scheduler = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', clip_sample=False)
    scheduler.set_timesteps(STEPS)
    accelerator = Accelerator(gradient_accumulation_steps=STEPS, cpu=device() == 'cpu')
    unet = UNet2DConditionModel(**config)
    unet, optimizer = accelerator.prepare(unet, torch.optim.AdamW(unet.parameters(), 1e-6))
    self = SimpleNamespace(accelerator=accelerator, optimizer=optimizer, trainable_layers=unet, num_train_timesteps=STEPS, autocast=contextlib.nullcontext, loss=partial(DDPOTrainer.loss, None),
        config=SimpleNamespace(train_cfg=False, sample_eta=1., train_adv_clip_max=10., train_clip_range=1e-4, train_max_grad_norm=5.),
        sd_pipeline=SimpleNamespace(unet=unet, scheduler_step=partial(scheduler_step, scheduler)))
    self.calculate_loss = partial(DDPOTrainer.calculate_loss, self)
    x = numbers(BATCH, STEPS+1, 4, SIZE, SIZE, seed=0)
    sample = dict(prompt_embeds=numbers(BATCH, TOKENS, DIM, seed=1), latents=x[:, :-1], next_latents=x[:, 1:], log_probs=numbers(BATCH, STEPS, seed=2), advantages=numbers(BATCH, seed=3),
                  timesteps=torch.tensor(TIMES, device=device()).expand(BATCH, STEPS))
    return lambda: DDPOTrainer._train_batched_samples(self, 0, 0, 0, [sample])


def lasro_update(config: dict):
    "One update of `rlcm`, as a call."
    import lasro # first: it lets a CUDA-built torchvision import beside a CPU torch
    from diffusers import UNet2DConditionModel
    from lasro.baselines import RLCM, BaselineOptions
    from lasro.models import Conditioning
    unet, cond = UNet2DConditionModel(**config).to(device()), Conditioning(numbers(BATCH, TOKENS, DIM, seed=1), numbers(BATCH, 64, seed=4))
    task = SimpleNamespace(pipe=SimpleNamespace(unet=unet), params=list(unet.parameters()), num_steps=STEPS, cond=cond, budget=SimpleNamespace(forward=lambda *_, **__: None))
    arm = RLCM(task, BaselineOptions(c=0., lr=1e-6, max_norm=5., generator_steps=1))
    x = numbers(BATCH, STEPS+1, 4, SIZE, SIZE, seed=0)
    arm.batch = dict(inputs=x[:, :-1], following=x[:, 1:], log_probs=numbers(BATCH, STEPS, seed=2), advantages=numbers(BATCH, seed=3), prompt=torch.arange(BATCH))
    return lambda: arm.update(0, 0)


def unet_alone(config: dict):
    "Forward and backward of the UNet on the latents of one update, as a call."
    from diffusers import UNet2DConditionModel
    unet, x, words = UNet2DConditionModel(**config).to(device()), numbers(BATCH*STEPS, 4, SIZE, SIZE, seed=0), numbers(BATCH*STEPS, TOKENS, DIM, seed=1)
    times = torch.tensor(TIMES, device=device()).repeat(BATCH)
    def update():
        unet.zero_grad()
        unet(x, times, words).sample.mean().backward()
    return update


def worker(config: dict):
    "Answer each line on stdin with the seconds of one of trl's updates."
    update = trl_update(config)
    for _ in sys.stdin: print(seconds(update), flush=True)


def main(trl_python: str, out: Path):
    from lasro.core import environment, save_json
    from lasro.models import build_unet
    config = {k: v for k, v in build_unet().config.items() if not k.startswith('_')} | dict(addition_embed_type=None, addition_time_embed_dim=None, projection_class_embeddings_input_dim=None)
    theirs = subprocess.Popen([trl_python, __file__, '--worker', json.dumps(config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    def trl():
        theirs.stdin.write('go\n'); theirs.stdin.flush()
        line = theirs.stdout.readline()
        if not line: sys.exit(f'{trl_python} cannot run trl: see its message above')
        return float(line)
    ours, alone, rows = lasro_update(config), unet_alone(config), []
    for i in range(WARMUP+ROUNDS):
        row = dict(lasro_s=seconds(ours), trl_s=trl(), alone_s=seconds(alone))
        if i >= WARMUP: rows.append(row)
    theirs.stdin.close(); theirs.wait()
    quartiles = lambda key: statistics.quantiles([r[key]/r['trl_s'] for r in rows], n=4)
    (low, median, high), (floor_low, floor, floor_high) = quartiles('lasro_s'), quartiles('alone_s')
    record = dict(name='rlcm_trl', batch=BATCH, num_steps=STEPS, threads=torch.get_num_threads(), environment=environment(), trl='0.23.1', lasro_ms=1e3*statistics.median(r['lasro_s'] for r in rows),
                  trl_ms=1e3*statistics.median(r['trl_s'] for r in rows), ratio=median, ratio_q25=low, ratio_q75=high, floor=floor, floor_q25=floor_low, floor_q75=floor_high, n=ROUNDS)
    save_json(record, out/f'rlcm_trl-{device()}.json')
    print(json.dumps(record, indent=1))


if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']: worker(json.loads(sys.argv[2]))
    elif len(sys.argv) < 2: sys.exit(__doc__)
    else: main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parents[1]/'results'/'lab'/'bench')
