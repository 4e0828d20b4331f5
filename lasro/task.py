"""What every arm receives: checked options, a counted budget, and a task on one process or many."""
import copy
import logging
import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import StableDiffusionXLPipeline
from fastcore.basics import patch
from torch import nn

from .core import generator, profile
from .exploration import PAIRS, label
from .models import Conditioning, add_lora, encode_prompts, latent_shape, load_teacher
from .rewards import Reward, RewardError, load_reward
from .sampling import draw_noise, sample
from .surrogate import BACKBONES
from .world import World, load_world

log = logging.getLogger('lasro')

# ---- options
def option(default, low=None, # least value
           high=None, # greatest value
           choices=None # all values there are
          ):
    "A field of an options class with the range that `check_options` holds it to."
    return field(default=default, metadata=dict(low=low, high=high, choices=choices))

def _as_declared(name: str, value, kind: type):
    "Return `value` as `kind`; an int may stand for a float. Raise ValueError if the type is another."
    if kind is float and type(value) is int: return float(value)
    if type(value) is kind: return value
    raise ValueError(f'{name}={value!r} is {type(value).__name__}, but must be {kind.__name__}')

def check_options(options):
    "Raise ValueError, in one line, for the first option whose type or range is wrong."
    for f in fields(options):
        value = _as_declared(f.name, getattr(options, f.name), f.type)
        low, high, choices = (f.metadata.get(k) for k in ('low', 'high', 'choices'))
        if value != value:
            raise ValueError(f'{f.name} is not a number')
        if low is not None and value < low:
            raise ValueError(f'{f.name}={value!r} is too small: give at least {low}')
        if high is not None and value > high:
            raise ValueError(f'{f.name}={value!r} is too large: give at most {high}')
        if choices and value not in choices:
            raise ValueError(f"{f.name}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}")
        object.__setattr__(options, f.name, value)

@dataclass(frozen=True)
class Options:
    "What can be chosen in a run. Not stated in the paper unless the comment says so; then we chose."
    num_steps: int = option(2, 1, 4)             # sampling steps trained for; stated: 2
    pretrain_prompts: int = option(70, 1)        # prompts labelled before the generator moves
    n_noises: int = option(6, 1)                 # N_s, initial noises per prompt and visit; stated: 6, for ImageReward 1
    pretrain_steps: int = option(60, 0)          # Bradley-Terry steps before the generator moves
    outer_steps: int = option(20, 0)             # rounds of generator, collection, surrogate
    generator_steps: int = option(2, 1)          # K1, generator updates per round; stated: 1 to 10
    surrogate_steps: int = option(6, 0)          # K2, surrogate updates per round; stated: 1 to 50
    collect_prompts: int = option(12, 1)         # prompts labelled again per round
    batch_size: int = option(64, 1)              # samples in a generator update
    lr: float = option(4e-4, 0., 1.)             # of the generator
    warmup: int = option(8, 0)                   # updates in which the rate rises
    surrogate_lr: float = option(5e-4, 0., 1.)
    backbone: str = option('unet-whole', choices=BACKBONES) # of the surrogate; stated: 'unet', the down and mid blocks
    surrogate_rank: int = option(0, 0)           # 0 tunes a copy of the teacher, else the surrogate is the teacher with an adapter
    groups: int = option(8, 1)                   # groups of a prompt and a step in a surrogate update
    smooth: float = option(.25, 0.)              # deviation of the noise on the latents in a surrogate update
    pairs: str = option('all', choices=PAIRS) # what is compared: within a prompt and step, across prompts, across steps too, or only best and worst
    lcm_batch: int = option(48, 1)               # samples in the LCM loss
    c: float = option(1., 0.)                    # weight of the LCM loss; 0 leaves it out
    c1: float = option(.02, 0.)                  # weight of the reward after each step but the last
    c2: float = option(.2, 0.)                   # weight of the reward after the last step
    s_form: str = option('a', choices=('a', 'b', 'none')) # form of S
    detach: bool = option(False)                 # cut the gradient between the steps
    online: bool = option(True)                  # keep training the surrogate
    off_policy: bool = option(True)              # new initial noises, not only new injected ones; stated
    lora_rank: int = option(0, 0)                # of the generator's adapter; 0 tunes all weights
    max_norm: float = option(1., 0.)             # gradient clipping
    min_gap: float = option(.05, 0.)             # least reward gap of a pair, in deviations
    buffer: int = option(4096, 1)                # labelled latents kept
    micro_groups: int = option(1, 1)             # parts of every batch, computed one after the other and shared out over processes
    gradient_checkpointing: bool = option(False) # keep the inputs of a UNet's blocks only and compute the rest again
    mixed_precision: str = option('no', choices=('no', 'bf16', 'fp16')) # of accelerate's autocast
    sample_batch: int = option(0, 0)             # samples made at once where nothing is learnt; 0: all
    probe_prompts: int = option(256, 0)          # training prompts scored every 5 rounds to draw the curve; 0 draws none
    stop_on_alarm: bool = option(False)          # end the run at the first sign of a hacked reward
    snapshot_every: int = option(5, 0)           # rounds between sample grids and weights in out/snapshots; 0 keeps none
    log_with: str = option('', choices=('', 'tensorboard', 'trackio', 'wandb')) # besides metrics.csv
    def __post_init__(self): check_options(self)
    def _repr_markdown_(self):
        default = type(self)()
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)}
        rows = [f'| {name} | {value!r} |' for name, value in changed.items()] or ['| *all* | *default* |']
        return '\n'.join([f'**{type(self).__name__}**: what differs from the default', '', '| option | value |', '|---|---|', *rows])

def make_options(profile_name: str, kind: type = Options, # the arm's options class
                 **changed) -> Options:
    "Return the defaults at a profile's sizes with the changed values; raise ValueError for an unknown name."
    names = [f.name for f in fields(kind)]
    for name in changed:
        if name not in names:
            raise ValueError(f"unknown option {name!r}: choose from {', '.join(names)}")
    sizes = {k: v for k, v in asdict(profile(profile_name)).items() if k in names}
    return kind(**sizes | changed)

# ---- budget
def peak_memory() -> float: # MB
    "Return the most memory taken so far: allocated on the GPU if there is one, else resident in this process."
    if torch.cuda.is_available(): return torch.cuda.max_memory_allocated()/2**20
    unit = 2**20 if sys.platform == 'darwin' else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/unit

@dataclass
class Budget:
    "What a run has spent; `restore(record)` goes on from an earlier record."
    reward_calls: int = 0           # pictures scored by the true reward
    forward_equivalents: float = 0. # UNet forward passes of one sample
    wall_s: float = 0.              # seconds before this process
    peak_mb: float = 0.
    started: float = field(default_factory=time.monotonic, repr=False)
    def reward(self, n: int): self.reward_calls += int(n)
    def forward(self, n: int, # samples
                backward: bool = False, # a backward pass follows
                share: float = 1. # of a whole UNet's work
               ):
        self.forward_equivalents += n*share*(3 if backward else 1)

@patch
@contextmanager
def paused(self: Budget):
    "Measuring is not training: what happens inside takes no time."
    start = time.monotonic()
    try: yield
    finally: self.started += time.monotonic()-start

@patch
def record(self: Budget) -> dict:
    "Return what was spent until now, for a record or a checkpoint."
    seconds = self.wall_s+time.monotonic()-self.started
    return dict(reward_calls=self.reward_calls, forward_equivalents=round(self.forward_equivalents, 1),
                wall_s=round(seconds, 3), peak_mb=round(max(self.peak_mb, peak_memory()), 1))

@patch
def restore(self: Budget, record: dict): self.__init__(**record)

# ---- accelerator
def make_accelerator(device: torch.device, micro_groups: int = 1, # parts of a batch
                     mixed_precision: str = 'no', log_with: str = '', project_dir=None) -> Accelerator:
    "Return the one Accelerator of a run; started by `accelerate launch` it knows the other processes."
    AcceleratorState._reset_state() # an earlier run of this Python may have had another precision
    GradientState._reset_state()
    accelerator = Accelerator(cpu=device.type == 'cpu', mixed_precision=mixed_precision, log_with=log_with or None, project_dir=project_dir)
    if micro_groups % accelerator.num_processes:
        raise ValueError(f'micro_groups={micro_groups} is no multiple of the {accelerator.num_processes} processes: give {accelerator.num_processes} or a multiple of it')
    accelerator.gradient_accumulation_steps = micro_groups//accelerator.num_processes
    return accelerator

@dataclass(frozen=True)
class MicroGroup:
    "Part `index` of `count` parts of a batch."
    index: int
    count: int
    def rows(self, n: int # rows of the whole batch
            ) -> torch.Tensor: # this part's row numbers
        return torch.arange(n).tensor_split(self.count)[self.index]
    def mean(self, values: torch.Tensor, # one number for each of this part's rows
             n: int # rows of the whole batch
            ) -> torch.Tensor:
        "This part's share of the batch's mean: the mean over all parts of this is the mean over all rows."
        return values.sum()*self.count/n

# ---- task
@dataclass
class Task:
    "Everything an arm may use; it never sees what the pictures truly show."
    pipe: StableDiffusionXLPipeline # its UNet is trained
    teacher: nn.Module              # the many-step UNet, frozen
    reward: Reward | None           # None for an arm that uses none
    texts: list[str]                # training prompts
    cond: Conditioning              # of `texts`
    data: tuple[torch.Tensor, torch.Tensor] # clean latents (M, C, h, w) for the LCM loss, and the prompt of each (M,)
    options: Options
    seed: int
    accelerator: Accelerator
    world: World
    held_out: Reward | None = None  # only watched
    guidance_scale: float = 8.      # the teacher's in the LCM loss
    budget: Budget = field(default_factory=Budget)
    @property
    def num_steps(self) -> int: return self.options.num_steps
    @property
    def device(self) -> torch.device: return self.cond.pooled.device
    @property
    def writes(self) -> bool: return self.accelerator.is_main_process
    def stream(self, *names) -> torch.Generator: return generator(self.seed, *names)

@patch(as_prop=True)
def noise_shape(self: Task) -> tuple[int, int, int]:
    "The shape of one latent."
    return latent_shape(self.pipe)

@patch
def noise(self: Task, n: int, # samples
          g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]: # x_T (n, C, h, w), injected (num_steps - 1, n, C, h, w)
    "Draw all noise of `n` samples."
    return draw_noise(n, self.num_steps, g, self.noise_shape, self.device)

@patch
def micro_groups(self: Task) -> list[MicroGroup]:
    "Return the parts of a batch that this process computes."
    count, a = self.options.micro_groups, self.accelerator
    return [MicroGroup(i, count) for i in range(a.process_index, count, a.num_processes)]

@patch
def own_rows(self: Task, n: int # rows that all processes share
            ) -> torch.Tensor: # (ceil(n / processes),), the last ones may repeat the last row
    "Return the rows that this process works on, equally many in each."
    each = -(-n//self.accelerator.num_processes)
    first = self.accelerator.process_index*each
    return torch.arange(first, first+each).clamp(max=n-1)

@patch
def gather(self: Task, x: torch.Tensor, # this process's rows
           n: int) -> torch.Tensor: # (n, ...), all rows
    "Collect the rows of all processes, without gradient."
    return self.accelerator.gather(x.contiguous())[:n]

@patch
def gather_uneven(self: Task, x: torch.Tensor # (n,) this process's finite numbers; another process may have more or fewer
                 ) -> torch.Tensor:
    "Collect the numbers of all processes, without gradient."
    padded = self.accelerator.pad_across_processes(x.detach(), pad_index=float('nan'))
    whole = self.accelerator.gather(padded)
    return whole[whole.isfinite()]

@patch
def batches(self: Task, n: int, # rows
            default: int = 0 # rows at a time where `sample_batch` is 0; 0 takes all
           ) -> tuple[torch.Tensor, ...]:
    "Split row numbers into what is sampled at once."
    size = self.options.sample_batch or default or n
    return torch.arange(n).split(size)

@patch
def agree(self: Task, error: Exception | None):
    "Raise on every process if one has failed."
    failed = torch.tensor([float(error is not None)], device=self.accelerator.device)
    if not self.accelerator.gather(failed).any(): return
    raise error or RewardError('the reward failed in another process')

@patch
def features(self: Task, images: torch.Tensor) -> torch.Tensor: # (B, F), with F = 0 in a world without a feature network
    "Return the world's features of pictures, on the task's device."
    if self.world.features is None: return torch.zeros(len(images), 0, device=self.device)
    return self.world.features(images).to(self.device)

@patch
@torch.no_grad()
def label_steps(self: Task, latents: list[torch.Tensor], # batches (b, steps, C, h, w) of this process's samples
                texts: list[str] # of the samples
               ) -> tuple[torch.Tensor, torch.Tensor]: # rewards (B, steps); features of the last pictures (B, F)
    "Decode and score every step's latents; a failure in one process ends all of them."
    pending, features, rewards, start, error = [], [], None, 0, None
    try:
        for z in latents:
            mine = texts[start:start+len(z)]
            found = [label(self.pipe.vae, z[:, j], mine, self.reward) for j in range(z.shape[1])]
            pending.append([future for future, _ in found])
            features.append(self.features(found[-1][1]))
            start += len(z)
        rewards = [torch.stack([future.result()[0] for future in step], 1) for step in pending]
    except Exception as e: error = e
    self.agree(error)
    return torch.cat(rewards).float().to(self.device), torch.cat(features)

@torch.no_grad()
def sampled_data(pipe, cond: Conditioning, limit: int = 512, # samples at most
                 batch_size: int = 64) -> tuple[torch.Tensor, torch.Tensor]: # clean latents, prompt of each
    "Return the model's own 4-step samples: data for the LCM loss where there are no pictures."
    index = torch.arange(min(limit, len(cond)))
    noise, injected = draw_noise(len(index), 4, generator(0, 'lcm data'), latent_shape(pipe), pipe.device)
    latents = [sample(pipe.unet, cond[i], noise[i], injected[:, i], 4).final for i in index.split(batch_size)]
    return torch.cat(latents), index

@dataclass
class Inputs:
    "What a run may be given besides pipeline, reward and prompts."
    teacher: nn.Module | None = None     # the many-step UNet; None takes the world's
    data: tuple | None = None            # clean latents and prompt indices for the LCM loss; None takes the world's, else samples the model
    cond: Conditioning | None = None     # of the prompts; None encodes them
    world: str | World = 'shapes'
    held_out: object = None              # a reward that is only watched; None takes the one that the reward names
    guidance_scale: float | None = None  # the teacher's in the LCM loss; None takes the world's
    in_place: bool = False               # tune `pipe.unet` itself instead of a copy
    before_record: object = None         # called with the Run before its record is written

def trainable_pipeline(pipe, lora_rank: int, in_place: bool = False, seed: int = 0) -> StableDiffusionXLPipeline:
    "Return a pipeline whose UNet can be trained: a copy unless `in_place`, all weights unless `lora_rank`."
    unet = pipe.unet if in_place else copy.deepcopy(pipe.unet)
    unet.requires_grad_(True)
    torch.manual_seed(seed) # an adapter's initial weights
    if lora_rank: add_lora(unet, lora_rank)
    if in_place: return pipe
    parts = {name: part for name, part in pipe.components.items() if name != 'unet'}
    tuned = type(pipe)(**parts, unet=unet, add_watermarker=False)
    tuned.set_progress_bar_config(disable=True)
    return tuned

def make_task(pipe, reward, # a name, 'module:function', a callable, a Reward, or None
              texts: list[str], options: Options = Options(), seed: int = 0, inputs: Inputs = Inputs(), project_dir=None) -> Task:
    "Gather what an arm needs: a trainable UNet, encoded prompts, rewards, data for the LCM loss."
    world = load_world(inputs.world)
    reward = None if reward is None else load_reward(reward, pipe.device, world)
    accelerator = make_accelerator(pipe.device, options.micro_groups, options.mixed_precision, options.log_with, project_dir)
    pipe = pipe.to(accelerator.device)
    cond = encode_prompts(pipe, texts) if inputs.cond is None else inputs.cond.to(accelerator.device)
    if accelerator.is_fsdp2 and (options.lora_rank or options.surrogate_rank):
        raise ValueError('FSDP shards full tuning: set lora_rank=0 and surrogate_rank=0, or launch with workflow/accelerate/ddp.yaml')
    watched = inputs.held_out or (reward.held_out if reward and world.folder else None)
    held_out = load_reward(watched, accelerator.device, world) if watched else None
    teacher = load_teacher(world.folder, accelerator.device) if inputs.teacher is None else inputs.teacher
    data = inputs.data or (world.lcm_data(pipe, texts) if world.lcm_data else sampled_data(pipe, cond))
    tuned = trainable_pipeline(pipe, options.lora_rank, inputs.in_place, seed)
    if options.gradient_checkpointing: tuned.unet.enable_gradient_checkpointing()
    guidance = world.guidance_scale if inputs.guidance_scale is None else inputs.guidance_scale
    return Task(tuned, teacher, reward, texts, cond, data, options, seed, accelerator, world, held_out, guidance)
