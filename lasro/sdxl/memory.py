"""Transitional: split by definition."""
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace
from diffusers import AutoencoderKL
from diffusers import UNet2DConditionModel
from functools import cache
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
import json
import pandas as pd
import torch
import torch.nn.functional as F
import weakref
from ..models import Conditioning, add_lora, predict_noise
from .sources import SOURCES, FewStep
from .architectures import count_parameters, full_unet
from ..surrogate import SurrogateReward, frozen
from ..worlds.shapes import prompts

HALVES, SINGLES = (F.linear, F.conv2d, torch.conv2d, torch.matmul, F.scaled_dot_product_attention), (F.group_norm, F.layer_norm, torch.group_norm, torch.layer_norm)

class AsOnGPU(TorchFunctionMode):
    "On meta tensors a GPU's fused attention; with `autocast` also its casts to bfloat16 and float32 as on CUDA."
    def __init__(self, autocast=True): super().__init__(); self.autocast, self.casts = autocast, {} # of weights, each made once
    def cast(self, x, dtype):
        if not torch.is_tensor(x) or not x.is_floating_point() or x.dtype == dtype: return x
        if not isinstance(x, nn.Parameter): return x.to(dtype)
        if (id(x), dtype) not in self.casts: self.casts[id(x), dtype] = x.to(dtype)
        return self.casts[id(x), dtype]
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, dtype = kwargs or {}, torch.bfloat16 if func in HALVES else torch.float32 if func in SINGLES else None
        if dtype and self.autocast: args, kwargs = [self.cast(a, dtype) for a in args], {k: self.cast(v, dtype) for k, v in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            q, k, v = (*args, *(kwargs[name] for name in ('query', 'key', 'value') if name in kwargs))[:3]
            if q.is_meta: return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return func(*args, **kwargs)

def keep(into: dict, tensors):
    "Note the storages of tensors; keeping them keeps their names unique."
    for t in tensors:
        if torch.is_tensor(t): into[t.untyped_storage()._cdata] = t.untyped_storage()

@contextmanager
def saved(into: dict):
    "Note what autograd saves inside the block."
    def pack(t): keep(into, [t]); return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): yield

def gigabytes(storages: dict, apart: dict) -> float:
    "Size of the storages that are not in `apart`."
    return sum(s.nbytes() for k, s in storages.items() if k not in apart)/2**30

@dataclass
class Counted:
    "One pass of one sample; in GB of 2^30 bytes."
    kept: float   # saved for the backward with checkpointing: the blocks' inputs, and what is outside of blocks
    block: float  # saved by the greediest block while it is computed again
    whole: float  # saved without checkpointing
    flops: float  # of the forward

def count_pass(network: nn.Module, # on meta
               blocks_of: nn.Module, # the part whose blocks are checkpointed
               run, # () -> output
              autocast: bool = True) -> Counted:
    "Count a pass of `run` through `network`."
    weights, kept, everything, blocks = {}, {}, {}, [0.]
    keep(weights, network.parameters())
    def block(module, *args):
        inside = {}
        keep(kept, args)
        with saved(inside): out = module(*args)
        everything.update(inside)
        blocks.append(gigabytes(inside, weights))
        return out
    blocks_of.enable_gradient_checkpointing(block)
    with AsOnGPU(autocast), FlopCounterMode(display=False) as flops, saved(kept): run()
    return Counted(gigabytes(kept, weights), max(blocks), gigabytes(kept | everything, weights), flops.get_total_flops())

def meta_inputs(config: dict, # a UNet's
                n: int = 1) -> tuple[torch.Tensor, Conditioning]: # latents, conditioning
    "What a UNet of this config takes, on meta."
    size, c = config['sample_size'], config
    new = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, device='meta', dtype=dtype)
    cond = Conditioning(new(n, 77, c['cross_attention_dim']), new(n, c['projection_class_embeddings_input_dim']-6*c['addition_time_embed_dim']), new(n, 6), new(n))
    return new(n, 4, size, size, dtype=torch.float32).requires_grad_(), cond

def meta_unet(config: dict) -> UNet2DConditionModel:
    "A frozen UNet of this config in bfloat16, without memory."
    with torch.device('meta'): return UNet2DConditionModel.from_config(dict(config)).bfloat16().requires_grad_(False)

class Alive(TorchDispatchMode):
    "The most bytes alive at a time among the tensors that operations make."
    def __init__(self): super().__init__(); self.now = self.most = 0; self.users = {}
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t): self.follow(t)
        return out
    def follow(self, t):
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self.users.get(key): self.now += size; self.most = max(self.most, self.now)
        self.users[key] = self.users.get(key, 0)+1
        weakref.finalize(t, self.drop, key, size)
    def drop(self, key, size):
        self.users[key] -= 1
        if not self.users[key]: self.now -= size

def as_json(config: dict) -> str: return json.dumps({k: v for k, v in config.items() if not k.startswith('_')}, default=list)

def meta_decoder(config: str, # an autoencoder's, as JSON
                 resolution: int) -> tuple[AutoencoderKL, torch.Tensor]: # and what it decodes
    "A frozen autoencoder in bfloat16 without memory, and one latent."
    with torch.device('meta'): return AutoencoderKL.from_config(json.loads(config)).bfloat16().requires_grad_(False), torch.empty(1, 4, resolution//8, resolution//8, dtype=torch.bfloat16, requires_grad=True)

@cache
def decode_memory(config: str, resolution: int) -> float: # GB
    "The most that decoding one picture has alive, weights apart."
    vae, z = meta_decoder(config, resolution)
    with torch.no_grad(), AsOnGPU(autocast=False), Alive() as alive: vae.decode(z)
    return alive.most/2**30

FULL_VAE = dict(block_out_channels=(128, 256, 512, 512), down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4, layers_per_block=2, latent_channels=4, sample_size=1024)

@cache
def decoder_pass(config: str, resolution: int) -> Counted:
    "Decoding one picture with a backward."
    vae, z = meta_decoder(config, resolution)
    return count_pass(vae, vae, lambda: vae.decode(z), autocast=False)

@dataclass(frozen=True)
class Setting:
    "How a run is fitted to memory."
    lora_rank: int = 64      # 0 tunes all weights
    surrogate_rank: int = 32 # 0 tunes a copy of the teacher's half
    micro: int = 1           # rows a network works on at a time; 0 takes all
    blocks: bool = True      # checkpoint blocks
    sample_batch: int = 2    # pictures decoded and scored at a time

LADDER = (Setting(surrogate_rank=0, micro=8, blocks=False, sample_batch=16), Setting(surrogate_rank=0, micro=4, blocks=False, sample_batch=16), Setting(micro=4, blocks=False, sample_batch=8),
          Setting(micro=2, blocks=False, sample_batch=8), Setting(micro=1, blocks=False, sample_batch=4), Setting())

SMALL_LADDER = (Setting(lora_rank=4, surrogate_rank=4, micro=4, sample_batch=4),) # of the small random networks

@cache
def student_pass(config: str, # a UNet's, as JSON
                 lora_rank: int) -> tuple[Counted, int, int]: # its pass, frozen and trained parameters
    "The generator with its adapter, or with all weights trained."
    unet = meta_unet(json.loads(config))
    with torch.device('meta'): trained = sum(p.numel() for p in (add_lora(unet, lora_rank) if lora_rank else unet.float().requires_grad_(True).parameters()))
    z, c = meta_inputs(unet.config)
    return count_pass(unet, unet, lambda: predict_noise(unet, z, 999, c)), count_parameters(unet)-trained, trained

@cache
def surrogate_pass(config: str, # the teacher's, as JSON
                   rank: int) -> tuple[Counted, int]: # its pass, trained parameters
    "The half of the UNet, with its head."
    with torch.device('meta'): surrogate = SurrogateReward(meta_unet(json.loads(config)), lora_rank=rank)
    trained = sum(p.numel() for p in surrogate.parameters() if p.requires_grad)
    z, c = meta_inputs(json.loads(config))
    return count_pass(surrogate, surrogate.encoder.unet, lambda: surrogate(z, c)), trained

def full_configs(name: str) -> tuple[dict, dict, dict, int]: # student, teacher, autoencoder, resolution
    "Configs of a form of full size."
    architecture, form = 'ssd-1b' if 'ssd' in name else 'sdxl', SOURCES[name]
    with torch.device('meta'): student, teacher = full_unet(architecture, **(dict(time_cond_proj_dim=256) if form.unet else {})), full_unet(architecture)
    size = form.resolution//8
    return dict(student.config, sample_size=size), dict(teacher.config, sample_size=size), FULL_VAE, form.resolution

def configs_of(model: FewStep) -> tuple[dict, dict, dict, int]:
    "The same of a loaded model."
    size = model.pipe.unet.config.sample_size
    return dict(model.pipe.unet.config), dict(model.teacher.config, sample_size=size), dict(model.pipe.vae.config), size*model.pipe.vae_scale_factor

def activations(passes: list[tuple[Counted, int]], # a pass of one sample, and its rows
                s: Setting) -> float: # GB
    "The most that the backward of an update has alive."
    held, top = 0., 0.
    for counted, rows in passes:
        part, at_once = min(s.micro or rows, rows), counted.kept if s.blocks else counted.whole
        again = part < rows
        held += 0. if again else rows*at_once
        top = max(top, part*((at_once if again else 0.)+(counted.block if s.blocks else 0.)))
    return held+top

OVERHEAD, MARGIN, TRAINED = 1.5, .05, 22 # GB and the share of a card that is kept free, both assumed; bytes of a trained weight

@cache
def size_of(cls, config: str) -> int: # parameters
    "Of a network of this class and config, as JSON."
    with torch.device('meta'): return count_parameters(cls.from_config(json.loads(config)))

def weights_memory(configs: tuple, s: Setting) -> dict: # GB
    "What stays on the card."
    student, teacher, vae, _ = configs
    _, frozen, trained = student_pass(as_json(student), s.lora_rank)
    decoder, guide = size_of(AutoencoderKL, as_json(vae)), size_of(UNet2DConditionModel, as_json(teacher))
    own = {'student, frozen': 2*frozen, 'student, trained': TRAINED*trained, 'teacher': 2*guide, 'surrogate, trained': TRAINED*surrogate_pass(as_json(teacher), s.surrogate_rank)[1], 'autoencoder': 2*decoder}
    return {k: v/2**30 for k, v in own.items()}

def memory_plan(configs: tuple, s: Setting, prompts: int = 2000, buffer: int = 2048, # samples kept
                batch_size: int = 16, lcm_batch: int = 8, num_steps: int = 2, reward_gb: float = 0., # of the reward's networks on this card
                world: int = 1, shards: bool = False, # processes that share rows and, with `shards`, weights
                pixels: int = 0 # pictures that an update decodes with a backward, as `direct` does
               ) -> pd.DataFrame: # a row a part, in GB of 2^30 bytes; the last row is the peak
    "What takes how much, while the generator is updated or while pictures are labelled."
    student, teacher, vae, resolution = configs
    latent, p, h = 4*(resolution//8)**2*4/2**30, student_pass(as_json(student), s.lora_rank)[0], surrogate_pass(as_json(teacher), s.surrogate_rank)[0]
    batch, lcm = -(-batch_size//world), -(-lcm_batch//world) # rows of one process
    fixed = {k: v/(world if shards else 1) for k, v in weights_memory(configs, s).items()} | {'prompts': prompts*77*student['cross_attention_dim']*2/2**30, 'replay buffer': buffer*latent, 'latents and noise of a batch': 12*batch_size*latent, 'reward': reward_gb, 'CUDA (assumed)': OVERHEAD}
    d = decoder_pass(as_json(vae), resolution) if pixels else Counted(0., 0., 0., 0.)
    decoding = min(s.sample_batch, -(-pixels//world))*(d.kept if s.blocks else d.whole)+d.block*s.blocks # the decoder takes one picture at a time, and keeps them all
    update = activations([(p, batch)]*num_steps+[(h, num_steps*batch), (p, lcm)], s)+decoding
    labels = decode_memory(as_json(vae), resolution)+s.sample_batch*2*3*resolution**2*4/2**30
    return pd.DataFrame(dict(GB=fixed | {'an update': update, 'or labelling': labels, 'peak': sum(fixed.values())+max(update, labels)}))

def choose_setting(configs: tuple, card_gb: float, changed: dict | None = None, # fields of `Setting` that are fixed beforehand
                   ladder=LADDER, **sizes # of `memory_plan`
                  ) -> tuple[Setting, pd.DataFrame]:
    "The most generous setting that fits with a margin; one line if none does."
    for s in (replace(s, **changed or {}) for s in ladder):
        plan = memory_plan(configs, s, **sizes)
        if plan.GB['peak'] <= (1-MARGIN)*card_gb: return s, plan
    raise MemoryError(f"the leanest plan needs {plan.GB['peak']:.1f} GB and the card has {card_gb:.1f}, of which {MARGIN:.0%} stay free: take a smaller resolution, batch_size, lora_rank or buffer, put the reward on another device, or use LCM-SSD-1B")

def update_flops(configs: tuple, s: Setting, options, num_steps: int = 2) -> dict: # floating-point operations
    "Of one generator update: what it needs, and what is computed in all, with blocks and parts computed again."
    student, teacher, *_ = configs
    f, h = student_pass(as_json(student), s.lora_rank)[0].flops, surrogate_pass(as_json(teacher), s.surrogate_rank)[0].flops
    backward, b, l = (1 if s.lora_rank else 2), options.batch_size, options.lcm_batch if options.c else 0
    again = s.blocks+(s.micro < b)
    need = num_steps*b*((1+backward)*f+2*h)+l*((1+backward)*f+f+2*f) # the teacher's two passes count as two of the student's
    return dict(needed=need, computed=need+again*(num_steps*b*(f+h)+l*f))
