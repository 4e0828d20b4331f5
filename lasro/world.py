"""What an embedded world is made of: a pipeline, prompts, rewards, and what its pictures are measured by."""
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True, eq=False)
class World:
    "Everything that an experiment needs to know about one kind of pictures; no algorithm looks further."
    name: str                       # e.g. 'shapes'
    rewards: dict[str, Callable]    # name: factory, called with `device`, returns a `Reward`
    folder: Path | None = None      # its pipeline in SDXL format, with `teacher_unet/` inside
    prompts: Callable | None = None # (split, n, combos=None, kind=None) -> list of n prompts
    kinds: tuple[str, ...] = ()     # kinds of prompts; the first is the default, others are named like their reward
    lcm_data: Callable | None = None # (pipe, texts) -> clean latents (M, C, h, w) and the prompt of each (M,), for the LCM loss
    guidance_scale: float = 8.      # of the teacher in the LCM loss
    scored: tuple[str, ...] = ()    # rewards that every evaluation measures
    features: Callable | None = None # images (B, 3, H, W) -> features (B, F) on the CPU, for FID, KID and diversity
    reference_features: Callable | None = None # name of a random stream -> features (n, F) of the world's own pictures
    def kind_of(self, reward: str) -> str:
        "The kind of prompts that the reward called `reward` is asked about."
        return reward if reward in self.kinds else (self.kinds or ('',))[0]

WORLDS = dict(shapes='lasro.worlds.shapes_world:SHAPES', sdxl='lasro.sdxl.rewards:SDXL_WORLD')

def load_world(name: str | World # one of `WORLDS`, or a World
              ) -> World:
    "Return the world called `name`; raises ValueError if there is none."
    if isinstance(name, World): return name
    if name not in WORLDS: raise ValueError(f"unknown world {name!r}: choose one of {', '.join(WORLDS)}")
    module, attribute = WORLDS[name].split(':')
    return getattr(importlib.import_module(module), attribute)
