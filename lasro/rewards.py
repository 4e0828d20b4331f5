"""Transitional: split by definition."""
from .world import load_world
from PIL import Image
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from transformers.utils import logging as transformers_logging
import importlib.util
import io
import math
import torch

transformers_logging.disable_progress_bar()

class RewardError(ValueError):
    "A reward failed, or returned what is no reward; the message is one line and names it."

def check_rewards(name: str, # of the reward, for the message
                  rewards, # what its function returned
                  images: torch.Tensor # (B, 3, H, W), the pictures it saw
                 ) -> torch.Tensor: # (B,) float, finite, on the device of `images`
    "Convert what a reward returned; a `RewardError` names the reward and the first bad sample."
    try:
        if isinstance(rewards, (list, tuple)) and any(map(torch.is_tensor, rewards)): rewards = torch.stack([torch.as_tensor(r) for r in rewards])
        rewards = torch.as_tensor(rewards).to(images.device, torch.float32)
    except (TypeError, ValueError, RuntimeError) as e: raise RewardError(f'reward {name!r} returned {type(rewards).__name__}, which holds no numbers: {first_line(e)}') from None
    if rewards.shape != (len(images),): raise RewardError(f'reward {name!r} returned shape {tuple(rewards.shape)} for {len(images)} pictures: expected ({len(images)},)')
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad: raise RewardError(f'reward {name!r} returned {rewards[bad[0]].item()} for sample {bad[0]}')
    return rewards

def first_line(e: Exception) -> str: return (str(e).splitlines() or [''])[0]

@dataclass(frozen=True)
class Reward:
    "A named reward. Call it as `reward(images, prompts)`."
    name: str
    fn: Callable # (images, prompts, metadata) -> rewards or (rewards, info)
    range: tuple[float, float] = (-math.inf, math.inf)
    differentiable: bool = False # with respect to the pictures
    held_out: str | None = None # the reward that is watched while this one is trained
    readable: Callable | None = None
    def readable_prompts(self, prompts): return [i for i, p in enumerate(prompts) if self.readable is None or self.readable(p)]
    def __call__(self, images: torch.Tensor, # (B, 3, H, W) in [0, 1]
                 prompts: list[str], # B prompts
                 metadata: list | None = None # handed on to the function
                ) -> tuple[torch.Tensor, dict]: # (B,) and whatever else the function tells
        "Score pictures; a `RewardError` if the function raises or returns no finite number for each."
        if images.ndim != 4 or isinstance(prompts, str) or len(prompts) != len(images):
            raise RewardError(f'reward {self.name!r} got pictures of shape {tuple(images.shape)} and {len(prompts)} prompts: expected (B, 3, H, W) and a list of B')
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            try: found = self.fn(images, prompts, metadata)
            except Exception as e: raise RewardError(f'reward {self.name!r} raised {type(e).__name__}: {first_line(e)}') from e
            pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict | None)
            rewards, info = found if pair else (found, {})
            return check_rewards(self.name, rewards, images), info or {}
    def submit(self, images: torch.Tensor, prompts: list[str]) -> Future: # its `result()` is what a call returns
        "As a call; a reward that runs elsewhere (`14_sdxl`) returns before it has scored."
        done = Future()
        done.set_result(self(images, prompts))
        return done

def jpeg_kb(images: torch.Tensor # (B, 3, H, W) in [0, 1]
           ) -> torch.Tensor: # (B,) kB
    "Size of each picture as a JPEG of quality 95."
    sizes = []
    for x in (images.detach()*255).round().clamp(0, 255).to('cpu', torch.uint8).permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(x).save(buffer, format='JPEG', quality=95)
        sizes.append(buffer.tell()/1000)
    return torch.tensor(sizes)

def compressibility(device='cpu') -> Reward:
    "Minus the JPEG's size in kB."
    return Reward('compressibility', lambda images, texts, metadata: -jpeg_kb(images), (-math.inf, 0), held_out='image_reward')

def incompressibility(device='cpu') -> Reward:
    "The JPEG's size in kB."
    return Reward('incompressibility', lambda images, texts, metadata: jpeg_kb(images), (0, math.inf), held_out='image_reward')

def import_function(path: str # 'module:function'
                   ) -> Callable:
    "The function at an import path; a `ValueError` in one line if it is not there."
    module, _, name = path.partition(':')
    try: fn = getattr(importlib.import_module(module), name)
    except Exception as e: raise ValueError(f'reward {path!r} cannot be imported: {type(e).__name__}: {first_line(e)}') from None
    if not callable(fn): raise ValueError(f'reward {path!r} is {type(fn).__name__}, not a function')
    return fn

def load_reward(reward: str | Callable | Reward, # a name of `world.rewards`, 'module:function', or the function
                device='cpu', # where its networks live
                world='shapes' # a name of `WORLDS` or a World
               ) -> Reward:
    "The reward called so; a `ValueError` in one line if there is none."
    if isinstance(reward, Reward): return reward
    if isinstance(reward, str) and ':' not in reward:
        known = load_world(world).rewards
        if reward not in known: raise ValueError(f"unknown reward {reward!r}: choose one of {', '.join(known)}, or give your own as module:function")
        return known[reward](device=device)
    fn = import_function(reward) if isinstance(reward, str) else reward
    if not callable(fn): raise ValueError(f'a reward is a name, module:function or a function, not {type(fn).__name__}')
    if isinstance(fn, Reward): return fn
    stated = {k: getattr(fn, k) for k in ('range', 'differentiable', 'held_out') if hasattr(fn, k)}
    return Reward(reward if isinstance(reward, str) else getattr(fn, '__name__', type(fn).__name__), fn, **stated)
