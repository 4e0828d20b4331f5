"""Transitional: split by definition."""
from dataclasses import dataclass
from functools import cache
import math
import torch
import torch.nn.functional as F
from .shapes import COLOURS, Phrase, RADII, SHAPES, Scenes, coverage, grid, signed_distances
from ..core import generator

CHROMA = torch.tensor([[2, -1, -1], [0, math.sqrt(3), -math.sqrt(3)]])/math.sqrt(6)

COLOUR_CHROMA = torch.tensor(list(COLOURS.values())) @ CHROMA.T # (8, 2)

def colour_maps(images: torch.Tensor # (B, 3, 32, 32) in [0, 1]
               ) -> torch.Tensor: # (B, 8, 32, 32) in [0, 1]
    "Opacity of each colour at each pixel: its length along the colour's ray, shared among colours by angle."
    chroma = torch.einsum('dc,bchw->bdhw', CHROMA.to(images), images.float())
    ray = COLOUR_CHROMA.to(chroma)
    unit = F.normalize(chroma, dim=1, eps=1e-3)
    share = (torch.einsum('kd,bdhw->bkhw', F.normalize(ray, dim=1), unit)*60).softmax(1)
    length = torch.einsum('kd,bdhw->bkhw', ray/ray.square().sum(1, keepdim=True), chroma)
    return share*(length/.925).clamp(0, 1)

@cache
def templates() -> tuple[torch.Tensor, torch.Tensor]: # (10, 21, 21) each: T and W; five small shapes, then five large
    "What each shape looks like at each size, and where to look."
    gx, gy = grid(21)
    d = torch.cat([signed_distances(gx-10.5, gy-10.5, torch.tensor(r)) for r in RADII.values()])
    return coverage(d), (coverage(d-2) > .5).float()

def explained(maps: torch.Tensor # (N, 32, 32) opacity of one colour
             ) -> torch.Tensor: # (N, 10, 32, 32), at most 1; 1 is a perfect match
    "The fraction q of every template, at every position."
    t, w = templates()
    energy = t.square().sum((1, 2))
    weight = torch.stack([2*t, -w], 1)/energy[:, None, None, None]
    return F.conv2d(torch.stack([maps, maps.square()], 1), weight.to(maps), padding=10)

TEMPERATURE = .015

def presence(maps: torch.Tensor # (N, 32, 32) opacity of one colour
            ) -> torch.Tensor: # (N, 10, 32, 32) in [0, 1], 0 off the peaks
    "How surely each shape and size stands at each position."
    q = explained(maps)
    best = q.amax(1)
    n, y, x = ((best > .2) & (best == F.max_pool2d(best, 9, 1, 4))).nonzero().unbind(1) # a few of 1,024
    window = F.pad(q, [1]*4, value=-9).unfold(2, 3, 1).unfold(3, 3, 1) # a peak's match is the best within a pixel
    p = (window[n, :, y, x].amax((2, 3))/TEMPERATURE).softmax(1)
    out = torch.zeros_like(q)
    out[n, :, y, x] = p * ((best[n, y, x]-.2)/.5).clamp(0, 1)[:, None]
    return out

def template_weights(phrases: list[Phrase]) -> torch.Tensor: # (N, 10), 1 where a template is what the phrase names
    "One template where the phrase names a size, both sizes where it names none."
    weight = torch.zeros(len(phrases), 2*len(SHAPES))
    for row, p in zip(weight, phrases):
        if p.size != 'large': row[SHAPES.index(p.shape)] = 1
        if p.size != 'small': row[SHAPES.index(p.shape)+len(SHAPES)] = 1
    return weight

def ask(images: torch.Tensor, # (B, 3, 32, 32) in [0, 1]
        phrases: list[list[Phrase]] # the questions to each picture
       ) -> list[torch.Tensor]: # for each picture, one answer in [0, 1] a question
    "Is there such a thing in the picture?"
    flat = [p for ps in phrases for p in ps]
    if not flat: return [torch.ones(0) for _ in phrases]
    picture = [i for i, ps in enumerate(phrases) for _ in ps]
    colour = [list(COLOURS).index(p.colour) for p in flat]
    seen = presence(colour_maps(images)[picture, colour])
    answers = torch.einsum('nkhw,nk->nhw', seen, template_weights(flat).to(seen)).amax((1, 2)).clamp(max=1)
    return list(answers.split([len(ps) for ps in phrases]))

@dataclass(frozen=True)
class Thing:
    "A detected thing; `x` and `y` in pixels, `sure` in [0, 1]."
    colour: str
    shape: str
    size: str
    x: float
    y: float
    sure: float

def detect(images: torch.Tensor, # (B, 3, 32, 32) in [0, 1]
           threshold: float = .5 # least presence to count
          ) -> list[list[Thing]]: # for each picture, surest first
    "All things seen, without being asked."
    maps, out = colour_maps(images), [[] for _ in images]
    live = (maps.flatten(2).sum(2) > 8).nonzero() # a small thing covers 40 pixels
    best, k = presence(maps[live[:, 0], live[:, 1]]).max(1)
    for n, y, x in (best > threshold).nonzero().tolist():
        i, c = live[n].tolist()
        size, shape = divmod(int(k[n, y, x]), len(SHAPES))
        out[i].append(Thing(list(COLOURS)[c], SHAPES[shape], list(RADII)[size], x+.5, y+.5, float(best[n, y, x])))
    return [sorted(things, key=lambda t: -t.sure) for things in out]

def phrases_of(scene: Scenes) -> list[Phrase]:
    "The true phrases of one scene, sizes named."
    return [Phrase(1, 'large' if l else 'small', list(COLOURS)[c], SHAPES[s]) for c, s, l in zip(scene.colour.tolist(), scene.shape.tolist(), scene.large.tolist()) if s >= 0]

def near_misses(phrases: list[Phrase], generator: torch.Generator) -> list[Phrase]:
    "For each phrase one that differs in one attribute and is not in the scene."
    out = []
    for p in phrases:
        options = [Phrase(1, p.size, c, p.shape) for c in COLOURS] + [Phrase(1, p.size, p.colour, s) for s in SHAPES] + [Phrase(1, z, p.colour, p.shape) for z in RADII]
        options = [o for o in options if o not in phrases]
        out.append(options[int(torch.randint(len(options), (), generator=generator))])
    return out

def detector_accuracy(images: torch.Tensor, # pictures of `scenes`, rendered or reconstructed
                      scenes: Scenes, generator: torch.Generator
                     ) -> dict[str, float]: # shares in [0, 1]
    "Share of right answers to questions about things present and near misses, and share of pictures with all right."
    true = [phrases_of(scenes[i]) for i in range(len(scenes))]
    false = [near_misses(p, generator) for p in true]
    yes, no = ask(images, true), ask(images, false)
    right = [torch.cat([y > .5, n <= .5]) for y, n in zip(yes, no)]
    return dict(answers=float(torch.cat(right).float().mean()), present=float((torch.cat(yes) > .5).float().mean()),
                near_miss=float((torch.cat(no) <= .5).float().mean()), pictures=float(torch.stack([r.all() for r in right]).float().mean()))
