"""The one call a user makes, at every size: an explicit table of arms, `finetune`, and the run that it returns."""
import hashlib
import json
import logging
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd
import torch
from diffusers import StableDiffusionXLPipeline
from fastcore.basics import patch

from .baselines import GORS, RLCM, RLCMDropped
from .core import check_writable, environment, generator, is_finished, load_json, save_json, show_images
from .guided import Direct, RewardGuided
from .lasro import LaSRO
from .models import adapters_off, encode_prompts, latent_shape
from .monitor import first_alarms, save_metrics, save_trained, start_trackers
from .preference import DiffusionDPO, PSO
from .rewards import load_reward
from .sampling import draw_noise, generate
from .task import Inputs, Options, Task, make_options, make_task
from .training import LCMContinued, train
from .world import load_world

log = logging.getLogger('lasro')

ARMS = { # name: class, options that differ from its defaults
    'base': (LCMContinued, dict(outer_steps=0)),
    'lcm_continued': (LCMContinued, {}),
    'lasro': (LaSRO, {}),
    'lasro-frozen': (LaSRO, dict(online=False)),
    'lasro-onpolicy': (LaSRO, dict(off_policy=False)),
    'lasro-second-only': (LaSRO, dict(c1=0.)),
    'lasro-no-lcm': (LaSRO, dict(c=0.)),
    'lasro-no-clip': (LaSRO, dict(s_form='none')),
    'lasro-detached': (LaSRO, dict(detach=True)),
    'rlcm': (RLCM, dict(lr=4e-4, c=0., max_norm=5.)),
    'rlcm-dropped': (RLCMDropped, dict(lr=4e-4, c=0., max_norm=5.)),
    'diffusion_dpo': (DiffusionDPO, dict(lr=1e-4, c=0.)),
    'pso': (PSO, dict(lr=2e-4, c=0.)),
    'gors_lcm': (GORS, dict(c=0.)),
    'reward_guided': (RewardGuided, dict(lr=1e-4)),
    'direct': (Direct, dict(lr=8e-4)),
}
NO_REWARD = ('base', 'lcm_continued') # they do not use the reward: one run serves all rewards

def find_arm(name: str) -> tuple[type, dict]: # class, options that differ from its defaults
    "Return the arm called `name`; raise ValueError if there is none."
    if name not in ARMS:
        raise ValueError(f"unknown arm {name!r}: choose one of {', '.join(ARMS)}")
    return ARMS[name]

# ---- the run
@dataclass(repr=False)
class Run:
    "A finished fine-tuning: the tuned pipeline, the one it came from, its curve and its cost."
    pipe: StableDiffusionXLPipeline
    base: StableDiffusionXLPipeline | None # None where the pipeline was tuned in place
    metrics: pd.DataFrame
    record: dict
    out: Path | None = None

@patch
def summary(self: Run) -> dict: # for reading
    "Return what the run was, what it cost and what it gained on training prompts."
    r = self.record
    out = {k: r[k] for k in ('arm', 'reward', 'rounds', 'reward_calls')} | dict(seconds=round(r['wall_s']))
    curve = self.metrics.get('probe_reward', pd.Series(dtype=float)).dropna()
    if len(curve): out |= {'reward before': round(curve.iloc[0], 3), 'reward after': round(curve.iloc[-1], 3)}
    watched = self.metrics.get('probe_held_out', pd.Series(dtype=float)).dropna()
    if len(watched): out |= {'held out before': round(watched.iloc[0], 3), 'held out after': round(watched.iloc[-1], 3)}
    if r.get('alarms'): out['alarms'] = ', '.join(f'{sign} from update {step}' for sign, step in r['alarms'].items())
    return out

@patch
def __repr__(self: Run): return ', '.join(f'{k} {v}' for k, v in self.summary().items())

@patch
def _repr_markdown_(self: Run): return '\n'.join(['| | |', '|---|---|', *(f'| {k} | {v} |' for k, v in self.summary().items())])

@patch
def before_after(self: Run, prompts: list[str], seed: int = 0):
    "Draw the same prompts and noise before (above) and after (below); return the figure."
    pipe, n = self.pipe, self.record['parameters']['num_steps']
    cond = encode_prompts(pipe, prompts)
    noise = draw_noise(len(prompts), n, generator(seed, 'before after'), latent_shape(pipe), pipe.device)
    after = generate(pipe, cond, *noise, n)
    if self.base: before = generate(self.base, cond, *noise, n)
    else:
        with adapters_off(pipe.unet): before = generate(pipe, cond, *noise, n)
    return show_images(torch.cat([before, after]), list(prompts)+['']*len(prompts), ncols=len(prompts), scale=1.6)

# ---- what is checked before anything is computed
def read_prompts(prompts # a list, or a text file with one prompt per line
                ) -> list[str]:
    "Return prompts from a list or a file."
    if not isinstance(prompts, (str, Path)): return list(prompts)
    if not Path(prompts).is_file():
        raise FileNotFoundError(f'{prompts} is no file: give a list of prompts or a text file with one per line')
    lines = Path(prompts).read_text(encoding='utf-8-sig').splitlines()
    return [line.strip() for line in lines if line.strip()]

def split_inputs(others: dict) -> tuple[Inputs, dict]: # what a run is given, and options
    "Separate the fields of `Inputs` from options."
    names = [f.name for f in fields(Inputs)]
    return Inputs(**{k: v for k, v in others.items() if k in names}), {k: v for k, v in others.items() if k not in names}

def check_folder(out: Path | str | None, force: bool) -> Path | None:
    "Raise in one line if nothing can be written to `out`, or if it holds a finished run."
    if out is None: return None
    out = Path(out)
    check_writable(out)
    if is_finished(out) and not force:
        raise FileExistsError(f'{out} holds a finished run: pass force=True to train again, or another folder')
    if force: shutil.rmtree(out/'checkpoints', ignore_errors=True)
    return out

def leave_out_unreadable(reward, texts: list[str], inputs: Inputs) -> tuple[list[str], Inputs]:
    "Leave out the prompts that the reward states it cannot read; raise ValueError if none is left."
    kept = range(len(texts)) if reward is None or reward.readable is None else reward.readable_prompts(texts)
    if len(kept) == len(texts): return texts, inputs
    if not len(kept):
        raise ValueError(f'{reward.name} can read none of the {len(texts)} prompts: look at the first, {texts[0][:40]!r}')
    log.warning('%s cannot read %d of %d prompts: they are left out', reward.name, len(texts)-len(kept), len(texts))
    if inputs.cond is not None: inputs.cond = inputs.cond[torch.as_tensor(kept)]
    return [texts[i] for i in kept], inputs

MAY_CHANGE = ('sample_batch', 'log_with', 'snapshot_every', 'gradient_checkpointing') # without another result, up to rounding

def identity(task: Task, arm: str) -> dict:
    "Return what a resumed run must have in common with the one that was interrupted."
    options = {k: v for k, v in asdict(task.options).items() if k not in MAY_CHANGE}
    texts = hashlib.sha256('\n'.join(task.texts).encode()).hexdigest()[:16]
    unet = task.pipe.unet
    model = dict(model=unet.config.get('_name_or_path', ''), latent=list(task.noise_shape), dtype=str(unet.dtype))
    return dict(arm=arm, seed=task.seed, reward=task.reward.name if task.reward else 'none', prompts=texts) | model | options

def check_same_run(out: Path, asked: dict, writes: bool):
    "Note what a run is; raise ValueError if its checkpoints are of another run."
    path = out/'checkpoints'/'run.json'
    known = load_json(path) if path.exists() else asked
    changed = [f'{k} was {known.get(k)!r}, not {v!r}' for k, v in json.loads(json.dumps(asked)).items() if known.get(k) != v]
    if changed:
        raise ValueError(f"{out} holds an unfinished run of another kind ({'; '.join(changed)}): give another folder or force=True")
    if writes: save_json(asked, path)

# ---- the one call
def finetune(
    pipe: StableDiffusionXLPipeline, # a few-step model of the SDXL family
    reward,                          # a name, 'module:function', a callable (images, prompts, metadata) -> rewards, or a Reward
    prompts,                         # a list of training prompts, or a text file
    out: Path | str | None = None,   # folder for record, metrics, weights, snapshots and checkpoints; None keeps nothing
    arm: str = 'lasro',              # one of `ARMS`
    seed: int = 0,
    profile: str = 'lab',            # sizes
    force: bool = False,             # train again although `out` holds a finished run
    **others                         # fields of `Inputs` (teacher, data, world, held_out, ...) and options of the arm
) -> Run:
    "Fine-tune a few-step pipeline with a reward. A killed call resumes where it stopped; a finished one is not repeated."
    kind, changed = find_arm(arm)
    inputs, options = split_inputs(others)
    options = make_options(profile, kind.Options, **changed | options)
    texts = read_prompts(prompts)
    reward = None if arm in NO_REWARD else load_reward(reward, pipe.device, load_world(inputs.world))
    texts, inputs = leave_out_unreadable(reward, texts, inputs)
    out = check_folder(out, force)
    task = make_task(pipe, reward, texts, options, seed, inputs, project_dir=out)
    if out: check_same_run(out, identity(task, arm), task.writes)
    method = kind(task)
    start_trackers(task, asdict(options) | dict(arm=arm, seed=seed))
    rows = train(method, out)
    return finish(task, None if inputs.in_place else pipe, rows, out, inputs.before_record, dict(arm=arm, profile=profile))

def finish(task: Task, base, rows: list[dict], # of metrics
           out: Path | None, before_record, # called with the Run
           named: dict # arm and profile
          ) -> Run:
    "Save weights, metrics and, last, the record."
    if out: save_trained(task, out)
    task.pipe.unet.eval().requires_grad_(False)
    o = task.options
    record = named | dict(reward=task.reward.name if task.reward else 'none', world=task.world.name, num_steps=o.num_steps, seed=task.seed,
                          n_prompts=len(task.texts), parameters=asdict(o), environment=environment(), alarms=first_alarms(rows),
                          rounds=max(0, len(rows)-1), processes=task.accelerator.num_processes, **task.budget.record())
    run = Run(task.pipe, base, pd.DataFrame(rows), record, out)
    if before_record: before_record(run)
    task.accelerator.end_training()
    if out and task.writes:
        save_metrics(rows, out/'metrics.csv')
        save_json(run.record, out/'run.json')
        shutil.rmtree(out/'checkpoints', ignore_errors=True)
    return run
