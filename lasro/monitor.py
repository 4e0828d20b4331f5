"""What is watched while a run trains: the curve, sample grids, trackers, snapshots, and signs of a hacked reward."""
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from fastcore.basics import patch

from .core import atomic_path, save_csv, save_json, show_images
from .evaluation import fid, moments
from .models import decode, gathered, save_lora, save_weights
from .rewards import RewardError
from .sampling import sample
from .task import Task

PROBE_EVERY = 5 # rounds
log = logging.getLogger('lasro')

# ---- drawing with a model that may be sharded
@torch.no_grad()
def draw_latents(task: Task, generator, # a `Trained` UNet of the task
                 prompt: torch.Tensor, # (n,) index of training prompts
                 noise: torch.Tensor, injected: torch.Tensor, default: int = 0 # samples at once where `sample_batch` is 0
                ): # yields latents (b, C, h, w) of this process's rows, and their row numbers
    "Sample this process's rows, batch by batch."
    rows = task.own_rows(len(prompt))
    for b in task.batches(len(rows), default):
        i = rows[b]
        found = generator(sample, task.pipe.unet, task.cond[prompt[i]], noise[i], injected[:, i], task.num_steps)
        yield found.final, i

# ---- the curve
def held_out_scores(task: Task, images: torch.Tensor, texts: list[str]) -> torch.Tensor: # (B,), nan where it cannot be read
    "Score pictures by the held-out reward."
    try: return task.held_out(images, texts)[0].float().to(task.device)
    except RewardError: return torch.full((len(images),), torch.nan, device=task.device)

def summary_of(name: str, scores: torch.Tensor) -> dict:
    "Return mean and deviation of scores, without those that could not be read."
    known = scores[scores.isfinite()]
    if not len(known): return {}
    return {name: float(known.mean()), f'{name}_std': float(known.std(correction=0))}

@torch.no_grad()
def probe(task: Task, generator, # a `Trained` UNet of the task
          n: int, # training prompts
         ) -> dict: # mean and deviation of the reward and of the held-out one; FID of these few pictures
    "Measure the model on training prompts, with the same noise each time."
    g = task.stream('probe')
    prompt = torch.randperm(len(task.texts), generator=g)[:n]
    noise, injected = task.noise(len(prompt), g)
    latents = list(draw_latents(task, generator, prompt, noise, injected, default=64))
    scores, watched, features = [], [], []
    error = None
    try:
        for z, i in latents:
            images = decode(task.pipe.vae, z)
            texts = [task.texts[p] for p in prompt[i].tolist()]
            scores.append(task.reward(images, texts)[0].float().to(task.device))
            if task.held_out: watched.append(held_out_scores(task, images, texts))
            if task.world.features: features.append(task.world.features(images).to(task.device))
    except Exception as e: error = e
    task.agree(error)
    n = len(prompt)
    out = summary_of('probe_reward', task.gather(torch.cat(scores), n))
    if watched: out |= summary_of('probe_held_out', task.gather(torch.cat(watched), n))
    if features and n > 1: out['probe_fid'] = fid(*moments(task.gather(torch.cat(features), n).cpu().numpy()), task.world)
    return out

# ---- the hacking alarm
@dataclass(frozen=True)
class HackingAlarm:
    "Signs of reward hacking in the rows of a run; a sign whose numbers are missing is skipped."
    rounds: int = 8          # that the rank correlation is averaged over
    least_rank: float = .05  # least mean rank correlation
    probes: int = 3          # that held-out reward and FID are averaged over
    held_out_loss: float = 1.2 # of the held-out reward beyond the gain of the trained one, in deviations
    fid_rise: float = 3.     # of the probe's FID, as a multiple of the first one
    def __call__(self, rows: list[dict] # of metrics
                ) -> dict[str, str]: # sign: what is seen, and what to do
        probes = [r for r in rows if 'probe_reward' in r] or [{}]
        last = probes[1:][-self.probes:] if len(probes) > self.probes else []
        signs = dict(rank=self.rank_check(rows), held_out=self.held_out_check(probes[0], last), fid=self.fid_check(probes[0], last))
        return {sign: text for sign, text in signs.items() if text}

@patch
def rank_check(self: HackingAlarm, rows: list[dict]) -> str: # '' where all is well
    "Does the surrogate still order fresh samples as the reward does?"
    rho = [r.get('rank_correlation', math.nan) for r in rows[1:]]
    rho = [x for x in rho if math.isfinite(x)][-self.rounds:]
    if len(rho) < self.rounds or np.mean(rho) >= self.least_rank: return ''
    return (f'rank correlation of the surrogate on fresh samples is {np.mean(rho):.2f} over {self.rounds} rounds: '
            'raise surrogate_steps or lower c2 or lr')

@patch
def fid_check(self: HackingAlarm, first: dict, last: list[dict]) -> str:
    "Do the pictures still look like the world's?"
    found = [r['probe_fid'] for r in last if 'probe_fid' in r]
    if not found or np.mean(found) <= self.fid_rise*first.get('probe_fid', math.inf): return ''
    return f"FID rose from {first['probe_fid']:.2f} to {np.mean(found):.2f}: lower c2 or lr, or raise c"

def _gain(key: str, first: dict, last: list[dict]) -> float: # in deviations of the first probe
    return float(np.mean([r[key]-first[key] for r in last]))/max(first[f'{key}_std'], 1e-8)

@patch
def held_out_check(self: HackingAlarm, first: dict, last: list[dict]) -> str:
    "Does the held-out reward fall by more than the trained one rises?"
    if 'probe_held_out' not in first or not last: return ''
    won = _gain('probe_reward', first, last)
    change = _gain('probe_held_out', first, last)
    if -change-won <= self.held_out_loss: return ''
    return (f'held-out reward changed by {change:+.2f} deviations, the trained one by {won:+.2f}: '
            'lower c2 or lr, stop earlier, or train on both rewards')

def note_alarm(rows: list[dict] # the last one is new
              ):
    "Write the signs into the last row, and warn of those that were never there before."
    known = ' '.join(r.get('alarm', '') for r in rows[:-1]).split()
    found = HackingAlarm()(rows)
    rows[-1]['alarm'] = ' '.join(found)
    for sign, text in found.items():
        if sign not in known: log.warning('hacking alarm (%s) at update %d: %s', sign, rows[-1]['step'], text)

def first_alarms(rows: list[dict]) -> dict[str, int]: # sign: update of its first row
    "Return when each sign came first."
    out = {}
    for k, row in enumerate(rows):
        for sign in HackingAlarm()(rows[:k+1]): out.setdefault(sign, row['step'])
    return out

# ---- files and trackers
def save_metrics(rows: list[dict], path: Path):
    "Write the rows as csv, atomically; a column that a row lacks stays empty."
    columns = list(dict.fromkeys(k for r in rows for k in r))
    text = lambda v: f'{v:.5g}' if isinstance(v, float) else v
    save_csv([{k: text(r.get(k, '')) for k in columns} for r in rows] or [dict(step=0)], path)

def start_trackers(task: Task, config: dict, # parameters of the run
                  ):
    "Open the tracker that `log_with` names."
    plain = {k: v for k, v in config.items() if isinstance(v, int | float | str | bool)}
    if task.options.log_with: task.accelerator.init_trackers('lasro', plain)

def log_row(task: Task, row: dict):
    "Hand the numbers of a round to the tracker."
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != 'step'}
    task.accelerator.log(numbers, step=row['step'])

def log_pictures(task: Task, images: torch.Tensor, # (n, 3, H, W) in [0, 1]
                 step: int):
    "Hand pictures to the tracker."
    arrays = (images*255).round().byte().permute(0, 2, 3, 1).numpy()
    for tracker in task.accelerator.trackers:
        if tracker.name == 'tensorboard': tracker.log_images({'samples': arrays}, step=step, dataformats='NHWC')
        if tracker.name == 'wandb': tracker.log_images({'samples': list(arrays)}, step=step)

@torch.no_grad()
def draw_samples(task: Task, generator, # a `Trained` UNet
                 n: int = 8) -> torch.Tensor: # (n, 3, H, W), on the CPU
    "Draw the first training prompts from fixed noise."
    prompt = torch.arange(min(n, len(task.texts)))
    noise, injected = task.noise(len(prompt), task.stream('grid'))
    images = [decode(task.pipe.vae, z) for z, _ in draw_latents(task, generator, prompt, noise, injected)]
    return task.gather(torch.cat(images), len(prompt)).cpu()

def save_samples(images: torch.Tensor, # (n, 3, H, W) in [0, 1]
                 texts: list[str], # at least n
                 path: Path):
    "Write a grid of pictures with their prompts."
    figure = show_images(images, texts[:len(images)], ncols=4, scale=2)
    with atomic_path(path) as tmp: figure.savefig(tmp, format='png', dpi=100)
    plt.close(figure)

def save_trained(task: Task, folder: Path):
    "Write what was trained: a LoRA in diffusers' format, or the UNet's weights in half precision."
    unet = task.pipe.unet
    if task.options.lora_rank and task.writes: save_lora(task.pipe, folder/'lora')
    if task.options.lora_rank: return
    weights = {name: gathered(v, task.writes) for name, v in unet.state_dict().items()}
    if task.writes: save_weights(weights, folder/'unet.safetensors')

def snapshot(task: Task, generator, rows: list[dict], out: Path):
    "Keep a sample grid and the weights of this round, and note the best round by the held-out reward."
    row = rows[-1]
    folder = out/'snapshots'/f"step-{row['step']:05d}"
    images = draw_samples(task, generator)
    log_pictures(task, images, row['step'])
    if task.writes: save_samples(images, task.texts, folder/'grid.png')
    save_trained(task, folder)
    if task.writes: note_best(rows, out)

def note_best(rows: list[dict], out: Path):
    "Write `snapshots/best.json`: the snapshot with the highest held-out reward, or trained reward where none is watched."
    key = 'probe_held_out' if any('probe_held_out' in r for r in rows) else 'probe_reward'
    there = [r for r in rows if key in r and (out/'snapshots'/f"step-{r['step']:05d}").exists()]
    if not there: return
    best = max(there, key=lambda r: r[key])
    save_json(dict(folder=f"step-{best['step']:05d}", by=key, value=round(best[key], 5)), out/'snapshots'/'best.json')
