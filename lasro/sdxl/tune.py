"""Transitional: split by definition."""
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
import json
import pandas as pd
import torch
import torch.distributed as dist
import warnings
from .prompts import BUILT_IN, draw_protocol, protocol, read_prompt_set, readable
from ..models import Conditioning, add_lora
from .sources import FewStep, cached_prompts, drop_text_encoders
from .memory import MEMORY_SETTINGS, SMALL_SETTINGS, MemorySetting, choose_plan
from ..finetune import NO_REWARD, find_arm, finish
from ..rewards import Reward, load_reward
from ..surrogate import SurrogateReward
from ..task import Task, make_options, sampled_data
from .export import TunedRun, draw_grid, write_outputs
from ..sampling import check_steps
from ..core import check_writable, is_finished, profile
from .rewards import remote_reward, load_full_reward
from ..baselines import reward_calls
from ..training import train

def spread(arm, processes: Processes, s: MemorySetting, dtype=None # of autocast
          ):
    "Fit an arm to memory and processes, in place."
    task = arm.task
    for m in networks_of(arm):
        if s.gradient_checkpointing: (m.encoder.unet if isinstance(m, SurrogateReward) else m).enable_gradient_checkpointing(checkpoint_block)
        in_parts(m, processes, s.micro_rows, dtype)
    if s.gradient_checkpointing: task.pipe.vae.enable_gradient_checkpointing(checkpoint_block) # `direct` goes back through it
    if processes.world == 1: return
    task.writes = processes.rank == 0
    decode_in_parts(task.pipe.vae, processes)
    task.reward, task.held_out = (r and Shared(r.name, r.fn, r.range, r.differentiable, r.held_out, r, processes) for r in (task.reward, task.held_out))
    if not processes.shards: sum_gradients(arm)
    else: shard(arm, dist.device_mesh.init_device_mesh(torch.device(processes.device).type, (processes.world,)))

SDXL_OPTIONS = dict(backbone='unet', lr=3e-5, surrogate_lr=1e-4, lcm_batch=8, groups=4, buffer=2048, warmup=10) # not stated; we chose: rates between those of METHODS 2.3 and 4.5, batches that a card can hold

PUBLISHED = dict(clip_range=1e-4, dpo_beta=5000., pso_beta=50.) # for latents of this size; the defaults were found for the shapes pipeline, as the arms' rates were

def tune_options(arm: str, profile: str, s: MemorySetting, **overrides):
    "An arm's options at size."
    cls, changed = find_arm(arm)
    fitted = {k: v for k, v in PUBLISHED.items() if hasattr(cls.Options, k)} | dict(lora_rank=s.lora_rank, surrogate_rank=s.surrogate_rank, sample_batch=s.sample_batch)
    return make_options(profile, cls.Options, **changed | SDXL_OPTIONS | fitted | overrides)

def make_tune_task(model: FewStep, reward, texts: list[str], cond: Conditioning, options, num_steps: int, seed: int, data=None, held_out=None) -> Task:
    "The task of a model that is tuned in place."
    unet = model.pipe.unet
    check_steps(num_steps)
    torch.manual_seed(seed) # an adapter's initial weights
    add_lora(unet, options.lora_rank) if options.lora_rank else unet.float().requires_grad_(True)
    reward, held_out = (None if r is None else load_reward(r) for r in (reward, held_out))
    return Task(model.pipe, model.teacher, reward, texts, cond, data, num_steps, seed, held_out, model.source.guidance_scale)

def tune(model: FewStep, reward, # as `finetune` takes it
         texts: list[str], cond: Conditioning, # of the prompts, and of captions of `data` behind them
         setting: MemorySetting, num_steps: int = 2, out: Path | str | None = None, arm: str = 'lasro', seed: int = 0, profile: str = 'sdxl',
         data=None, # clean latents and the row of `cond` of each, for the LCM loss; None samples the model itself
         held_out=None, # a reward that is only watched
         processes: Processes = Processes(), dtype=None, # of autocast, e.g. torch.bfloat16
         test: tuple | None = None, # a protocol, its prompts and their conditioning; drawn to out/protocol
         **options) -> TunedRun:
    "Tune a few-step model of full size, in place. A killed call goes on where it stopped, on any number of processes."
    opts, out = tune_options(arm, profile, setting, **dict(sample_batch=setting.sample_batch*processes.world) | options), Path(out) if out else None
    if out: check_writable(out)
    if out and is_finished(out): raise FileExistsError(f'{out} holds a finished run: give another folder')
    task = make_tune_task(model, None if arm in NO_REWARD else reward, texts, cond, opts, num_steps, seed, held_out=held_out)
    method = find_arm(arm)[0](task, opts)
    spread(method, processes, setting, dtype)
    task.data = data or sampled_data(task.pipe, cond[:len(texts)], batch_size=setting.sample_batch*processes.world)
    before = draw_grid(task)
    if out: same_run(out/'checkpoints', dict(arm=arm, seed=seed, num_steps=num_steps, **asdict(opts)), task.writes)
    rows = train(method, opts.outer_steps, out/'checkpoints' if out else None, progress=task.writes)
    if out: save_round(method, out/'checkpoints', opts.outer_steps, rows) # what follows may take long
    tuned = []
    def outputs(run): # the record is written last
        tuned.append(TunedRun(**vars(run), before=before, after=draw_grid(task), texts=texts))
        if out and task.writes: write_outputs(tuned[0], model, out)
        if out and test: draw_protocol(model, test, out/'protocol', num_steps, processes=processes)
    finish(task, None, rows, arm, opts, profile, out, outputs)
    return tuned[0]

def json_dict(name: str, text: str) -> dict:
    "A parameter that is JSON of names and values; one line if it is not."
    try: found = json.loads(text)
    except ValueError: found = None
    if not isinstance(found, dict): raise ValueError(f"""{name} {text!r} is no JSON of names and values, such as '{{"lr": 1e-5}}'""")
    return found

def split_overrides(overrides: str) -> tuple[dict, dict]: # fields of `MemorySetting`, options of the arm
    "Overrides as JSON, by whom they concern."
    given, known = json_dict('OVERRIDES', overrides), MemorySetting.__dataclass_fields__
    for k, v in given.items():
        if k in known and not (type(v) is type(known[k].default) and v >= 0): raise ValueError(f'OVERRIDES: {k} is {v!r}, but is of the kind of {known[k].default!r}')
    return {k: v for k, v in given.items() if k in known}, {k: v for k, v in given.items() if k not in known}

def check_overrides(arm: str, profile_name: str, overrides: str):
    "One line if an override is unknown or of the wrong kind."
    (fixed, options), first = split_overrides(overrides), find_arm(arm)[0].Options()
    for k in options:
        if k not in vars(first): raise ValueError(f"OVERRIDES: {k!r} is no option of {arm} ({', '.join(vars(first))}) and no field of MemorySetting ({', '.join(MemorySetting.__dataclass_fields__)})")
    o = tune_options(arm, profile_name, replace(MEMORY_SETTINGS[0], **fixed), **options)
    for k in options:
        if isinstance(getattr(first, k), (int, float)) and not isinstance(getattr(o, k), (int, float)): raise ValueError(f'OVERRIDES: {k} is {options[k]!r}, but must be a number')

def check_parameters(p: dict, out: Path):
    "What can be told to be wrong before anything is loaded, in one line."
    check_steps(p['NUM_STEPS'])
    find_arm(p['ARM']); profile(p['PROFILE'])
    check_overrides(p['ARM'], p['PROFILE'], p['OVERRIDES'])
    for name in ('REWARD_OPTIONS', 'HELD_OUT_OPTIONS'): json_dict(name, p[name])
    if bool(p['PROTOCOL']) != bool(p['TEST_PROMPTS']): raise ValueError('PROTOCOL and TEST_PROMPTS go together: what is drawn, and of which prompts')
    if p['PROTOCOL']: protocol(p['PROTOCOL'])
    if is_finished(out): raise FileExistsError(f'{out} holds a finished run: give another folder')

@dataclass
class Prepared:
    "What parameters ask for, ready to be run."
    call: dict                # keywords of `tune`
    plan: pd.DataFrame
    left_out: int             # prompts that cannot be read

def read_and_encode(model: FewStep, path: str, folder: Path) -> tuple[list[str], Conditioning, int]:
    "The readable prompts of a file, encoded, and the number of others."
    texts, left_out = readable(read_prompt_set(path) if path else BUILT_IN, model.pipe.tokenizer)
    return texts, cached_prompts(model, texts, folder), left_out

def given_rewards(p: dict, device) -> tuple[Reward, Reward | None]: # trained on, and only watched
    "The rewards that the parameters name."
    options, held_out = json_dict('REWARD_OPTIONS', p['REWARD_OPTIONS']), p['HELD_OUT']
    reward = remote_reward(p['REWARD'], p['REWARD_DEVICE'], **options) if p['REWARD_DEVICE'] else load_full_reward(p['REWARD'], device, **options)
    return reward, load_full_reward(held_out, device, **json_dict('HELD_OUT_OPTIONS', p['HELD_OUT_OPTIONS'])) if held_out else None

def fit_to_card(model: FewStep, p: dict, n_prompts: int, card: float, reward_gb: float, processes: Processes = Processes(), n_test: int = 0) -> tuple[MemorySetting, pd.DataFrame, dict]: # and the arm's options
    "The setting of a run, its plan, and its other overrides."
    fixed, options = split_overrides(p['OVERRIDES'])
    ladder = SMALL_SETTINGS if p['SMALL'] else MEMORY_SETTINGS
    o = tune_options(p['ARM'], p['PROFILE'], replace(ladder[0], **fixed), **options)
    if o.backbone != 'unet': warnings.warn(f"the plan counts the teacher's down and mid blocks; backbone {o.backbone!r} takes more")
    pixels = -(-reward_calls(o, p['NUM_STEPS'], n_prompts)//(o.outer_steps*o.generator_steps+1)) if p['ARM'] == 'direct' else 0
    sizes = dict(pixels=pixels, prompts=n_prompts+n_test, buffer=getattr(o, 'buffer', 0), batch_size=o.batch_size, lcm_batch=o.lcm_batch, num_steps=p['NUM_STEPS'], reward_gb=reward_gb, world=processes.world, shards=processes.shards)
    return *choose_plan(model, card, ladder), options

def prepare(model: FewStep, p: dict, # the parameters at the top by name
            out: Path, card: float, # GB that were free before anything lay on the card
            processes: Processes = Processes()) -> Prepared:
    "Read and encode prompts, drop the text towers, load the rewards and fit the run to the card."
    check_parameters(p, out)
    (texts, cond, left_out), test = read_and_encode(model, p['PROMPTS'], out.parent/'prompts'), None
    if p['PROTOCOL']: test = (protocol(p['PROTOCOL']), *read_and_encode(model, p['TEST_PROMPTS'], out.parent/'prompts')[:2])
    drop_text_encoders(model)
    before = taken_memory(model.device)
    reward, held_out = given_rewards(p, processes.device)
    setting, plan, options = fit_to_card(model, p, len(texts), processes.least(card), taken_memory(model.device)-before, processes, len(test[1]) if test else 0)
    call = dict(reward=reward, texts=texts, cond=cond, setting=setting, num_steps=p['NUM_STEPS'], out=out, arm=p['ARM'], seed=p['SEED'], profile=p['PROFILE'], held_out=held_out, processes=processes, dtype=torch.bfloat16 if model.half else None, test=test)
    return Prepared(call | options, plan, left_out)
