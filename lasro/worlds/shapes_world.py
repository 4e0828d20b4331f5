"""Transitional: split by definition."""
from functools import cache
import numpy as np
import torch
from ..core import generator
from ..rewards import compressibility, incompressibility
from ..world import World
from .shapes import prompts
from .shapes_rewards import FOLDER, attribute_binding, clip_score, count, image_reward, relation, text_alignment
from .networks import FeatureNet
from .shapes import HELD_OUT, KINDS, PROMPT_THREE_THINGS, SEEN, cat_scenes, leave_out, render, sample_scenes, scenes_of
from ..models import encode_images, load_module

REFERENCE_SIZE = 2048

@cache
def feature_net(device: str = 'cpu') -> FeatureNet:
    "The shipped feature network."
    return load_module(FeatureNet(), FOLDER/'features'/'features.safetensors').to(device)

@torch.no_grad()
def features_of(images: torch.Tensor, # (B, 3, 32, 32) in [0, 1]
             batch_size: int = 64) -> torch.Tensor: # (B, 48), on the CPU
    "What FID, KID and diversity are computed from."
    net = feature_net(str(images.device))
    return torch.cat([net(x.float()).cpu() for x in images.split(batch_size)])

def reference_features(name: str = 'fid reference' # of the stream; 'fid floor' is the second set
                      ) -> np.ndarray: # (2048, 48)
    "Features of renders, half of seen and half of held-out combinations."
    scenes = cat_scenes([sample_scenes(REFERENCE_SIZE//2, generator(0, name, combos), 'attribute', pairs, PROMPT_THREE_THINGS) for combos, pairs in (('seen', SEEN), ('held_out', HELD_OUT))])
    return features_of(torch.cat([render(scenes[i]) for i in torch.arange(REFERENCE_SIZE).split(256)])).numpy().astype(np.float64)

DISTILL_GUIDANCE = 3. # the scale of the teacher's steps that the student learns

LEFT_OUT = .55 # share of the scenes with several things that lack one

@torch.no_grad()
def rendered_data(pipe, texts: list[str], per_prompt: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    "Latents of renders of the prompts, of which some lack a thing, as those that the student was distilled on."
    index, g = torch.arange(len(texts)).repeat(per_prompt), generator(0, 'lcm data')
    return encode_images(pipe.vae, render(leave_out(scenes_of([texts[i] for i in index], g), LEFT_OUT, g))), index

SHAPES = World('shapes', folder=FOLDER, prompts=prompts, kinds=KINDS, lcm_data=rendered_data, guidance_scale=DISTILL_GUIDANCE,
    features=features_of, reference_features=reference_features,
    rewards={f.__name__: f for f in (image_reward, attribute_binding, text_alignment, clip_score, relation, count, compressibility, incompressibility)},
    scored=('image_reward', 'attribute_binding', 'text_alignment', 'clip_score', 'compressibility'))
