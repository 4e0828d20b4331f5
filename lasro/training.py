"""The loop that every arm runs in: prepared networks, updates over micro-groups, checkpoints, resume."""
import logging
import math
from dataclasses import asdict
from pathlib import Path

import torch
from fastcore.basics import patch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import trange

from .core import load_json, save_json
from .models import gathered, load_checkpoint, restore_training_state, save_checkpoint, training_state
from .monitor import PROBE_EVERY, log_row, note_alarm, probe, save_metrics, snapshot
from .sampling import denoise, draw_lcm_noise, lcm_loss, lcm_timesteps
from .task import MicroGroup, Options, Task

log = logging.getLogger('lasro')

class Prepared(nn.Module):
    "What accelerate prepares: it runs any function inside its forward, where the hooks of DDP and FSDP act."
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
    def forward(self, f, *args, **kwargs): return f(*args, **kwargs)

class Trained:
    "A network with its optimiser, prepared by the task's Accelerator."
    def __init__(self, task: Task, network: nn.Module, lr: float, betas=(.9, .999), max_norm: float = 1.):
        self.task, self.network, self.max_norm, self.skipped = task, network, max_norm, 0
        params = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr, betas=betas, weight_decay=0.)
        self.prepared, self.optimizer = task.accelerator.prepare(Prepared(network), optimizer)
    def __call__(self, f, *args):
        "Run `f`, which uses the network, outside of an update."
        if isinstance(self.prepared, FSDPModule): return self.prepared(f, *args)
        with self.task.accelerator.autocast(): return f(*args)
    def set_lr(self, lr: float):
        for group in self.optimizer.param_groups: group['lr'] = lr
    def state(self, prefix: str) -> dict[str, torch.Tensor]: return training_state(self.network, self.optimizer, prefix)
    def restore(self, tensors: dict, prefix: str): restore_training_state(tensors, self.network, self.optimizer, prefix)

@patch
def step(self: Trained) -> float: # norm of the gradient
    "Make one optimiser step, unless the gradient is not finite or exactly 0: then Adam's momentum would walk on."
    norm = self.task.accelerator.clip_grad_norm_(self.prepared.parameters(), self.max_norm)
    norm = float(gathered(norm))
    self.skipped = 0 if math.isfinite(norm) else self.skipped+1
    if self.skipped == 5:
        raise FloatingPointError('the gradient was not finite in 5 updates in a row: lower lr, or c1 and c2')
    if math.isfinite(norm) and norm > 0: self.optimizer.step()
    return norm

@patch
def update(self: Trained, loss, # (micro-group) -> (loss, dict of numbers), both this micro-group's share of the batch's mean
          ) -> dict: # numbers, means over all micro-groups
    "Make one update on a batch: a backward pass for each of this process's micro-groups, then one step."
    a, rows = self.task.accelerator, []
    for group in self.task.micro_groups():
        with a.accumulate(self.prepared):
            value, row = self.prepared(loss, group)
            a.backward(value)
            rows.append({k: v.detach().float() for k, v in row.items()})
            if a.sync_gradients: norm = self.step()
            if a.sync_gradients: self.optimizer.zero_grad()
    means = {k: torch.stack([r[k] for r in rows]).mean() for k in rows[0]}
    return {k: float(a.reduce(v, 'mean')) for k, v in means.items()} | dict(grad_norm=norm)

# ---- arms
class Arm:
    "A way to train the generator. A subclass gives `draw` and `loss`, and may give `prepare`, `round`, `state`, `restore`."
    Options = Options
    def __init__(self, task: Task):
        o = task.options
        self.task, self.options = task, o
        self.generator = Trained(task, task.pipe.unet, o.lr, max_norm=o.max_norm)
    def prepare(self) -> dict: return {} # numbers of round 0
    def draw(self, k: int, i: int) -> dict: return {} # everything random of update i of round k
    def loss(self, batch: dict, group: MicroGroup) -> tuple[torch.Tensor, dict]: raise NotImplementedError
    def state(self) -> dict[str, torch.Tensor]: return self.generator.state('generator.')
    def restore(self, tensors: dict): self.generator.restore(tensors, 'generator.')

def learning_rate(o: Options, k: int, i: int) -> float:
    "Return the rate of update i of round k: it rises for `warmup` updates and falls linearly to 0."
    n = k*o.generator_steps+i
    total = max(1, o.outer_steps*o.generator_steps)
    rise = min(1, (n+1)/max(1, o.warmup))
    return o.lr*rise*max(0, 1-n/total)

@patch
def update(self: Arm, k: int, i: int) -> dict: # numbers to log
    "Make update i of round k."
    self.generator.set_lr(learning_rate(self.options, k, i))
    batch = self.draw(k, i)
    return self.generator.update(lambda group: self.loss(batch, group))

@patch
def round(self: Arm, k: int) -> dict: # means of the round's numbers
    "Make K1 generator updates."
    rows = [self.update(k, i) for i in range(self.options.generator_steps)]
    return {key: sum(r[key] for r in rows)/len(rows) for key in rows[0]}

@patch
def draw_lcm(self: Arm, k: int, i: int) -> dict: # rows of the task's data, times, noise
    "Draw the batch of the LCM loss and count its passes."
    t, n = self.task, self.options.lcm_batch
    g = t.stream('lcm', k, i)
    rows = torch.randint(len(t.data[0]), (n,), generator=g)
    times, noise = draw_lcm_noise(n, t.data[0].shape[1:], g)
    t.budget.forward(n, backward=True)
    t.budget.forward(3*n) # guided teacher, target
    return dict(rows=rows, times=times, noise=noise)

@patch
def lcm(self: Arm, batch: dict, # of `draw_lcm`
        group: MicroGroup) -> torch.Tensor: # the micro-group's share of the mean
    "Return the LCM loss; the target is the student itself without gradient."
    t = self.task
    mine = group.rows(len(batch['rows']))
    if not len(mine): return self.zero_loss()
    rows = batch['rows'][mine]
    loss = lcm_loss(t.pipe.unet, t.pipe.unet, t.teacher, t.data[0][rows], batch['times'][mine], batch['noise'][mine],
                    t.cond[t.data[1][rows]], t.guidance_scale)
    return group.mean(loss.expand(len(mine)), len(batch['rows']))

@patch
def zero_loss(self: Arm) -> torch.Tensor:
    "Return 0 times the output for one sample: where there is nothing to learn, every process still takes part in the backward pass."
    t = self.task
    z = t.data[0][:1]
    return 0*denoise(t.pipe.unet, z, lcm_timesteps(1)[0], t.cond[t.data[1][:1]]).sum()

class LCMContinued(Arm):
    "The control: the LCM loss alone."
    def draw(self, k: int, i: int) -> dict: return self.draw_lcm(k, i)
    def loss(self, batch: dict, group: MicroGroup) -> tuple[torch.Tensor, dict]:
        lcm = self.lcm(batch, group)
        return self.options.c*lcm, dict(lcm_loss=lcm)

# ---- the loop
def note(arm: Arm, rows: list[dict], k: int, row: dict, out: Path | None):
    "Finish the row of round k: cost, curve, alarm, files, trackers."
    t, o = arm.task, arm.options
    spent = t.budget.record()
    row = dict(step=k*o.generator_steps, reward_calls=spent['reward_calls'],
               forward_equivalents=spent['forward_equivalents'], wall_s=spent['wall_s']) | row
    last = k == o.outer_steps
    with t.budget.paused():
        if t.reward and o.probe_prompts and (k % PROBE_EVERY == 0 or last): row |= probe(t, arm.generator, o.probe_prompts)
        rows.append(row)
        if t.reward: note_alarm(rows)
        if out and t.writes: save_metrics(rows, out/'metrics.csv')
        if out and o.snapshot_every and (k % o.snapshot_every == 0 or last): snapshot(t, arm.generator, rows, out)
        log_row(t, row)

def train(arm: Arm, out: Path | None = None, # for metrics, snapshots and checkpoints; None keeps nothing
          every: int = 8, # rounds between checkpoints
          progress: bool = False) -> list[dict]: # a row of metrics per round
    "Prepare and run `arm`, from the newest sound checkpoint in `out` on."
    o = arm.options
    start, rows = resume(arm, out/'checkpoints' if out else None)
    if start == 0 and o.outer_steps: note(arm, rows, 0, arm.prepare(), out)
    bar = trange(start, o.outer_steps, mininterval=10, disable=not progress or not arm.task.writes, desc=type(arm).__name__)
    for k in bar:
        note(arm, rows, k+1, arm.round(k), out)
        if 'probe_reward' in rows[-1]: bar.set_postfix(reward=f"{rows[-1]['probe_reward']:.3f}")
        if o.stop_on_alarm and rows[-1].get('alarm'): break
        if out and (k+1) % every == 0 and k+1 < o.outer_steps: checkpoint(arm, out/'checkpoints', k+1, rows)
    return rows

def checkpoint(arm: Arm, folder: Path, k: int, rows: list[dict]):
    "Write round k with a checksum; keep this checkpoint and the one before."
    writes = arm.task.writes
    tensors = {name: gathered(v, writes) for name, v in arm.state().items()} # one at a time, where weights are sharded
    if not writes: return
    save_checkpoint(folder/f'round-{k:05d}.safetensors', tensors, round=k, rows=rows, budget=arm.task.budget.record())
    for old in sorted(folder.glob('round-*.safetensors'))[:-2]: old.unlink()

def resume(arm: Arm, folder: Path | None) -> tuple[int, list[dict]]: # round to start from, rows so far
    "Restore the newest sound checkpoint; a damaged one is named and passed over."
    for path in sorted(folder.glob('round-*.safetensors'), reverse=True) if folder else []:
        try: tensors, meta = load_checkpoint(path)
        except OSError as e:
            log.warning('%s; using the one before', e)
            continue
        arm.restore(tensors)
        arm.task.budget.restore(meta['budget'])
        return meta['round'], meta['rows']
    return 0, []
