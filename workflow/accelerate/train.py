"""Tunes a few-step model on several GPUs, with the parameters of nbs/14_sdxl.ipynb:
accelerate launch --config_file workflow/accelerate/ddp.yaml workflow/accelerate/train.py -p SMALL False -p PROFILE sdxl -p OUT runs/ssd-1b ...
"""
import argparse, ast, json, sys, warnings
from pathlib import Path

warnings.filterwarnings('ignore')
import lasro # first: it lets a CUDA-built torchvision import beside a CPU torch # noqa: F401
import torch
import torch.distributed as dist
import lasro.sdxl as sdxl
from lasro.core import ROOT

NOTEBOOK = ROOT/'nbs'/'14_sdxl.ipynb'


def defaults() -> dict:
    "What the notebook's parameters cell says."
    cells = json.loads(NOTEBOOK.read_text())['cells']
    source = ''.join(next(c for c in cells if 'parameters' in c['metadata'].get('tags', []))['source'])
    return {t.id: ast.literal_eval(node.value) for node in ast.parse(source).body for t in node.targets}


def parameters(changed) -> dict:
    "The defaults with (name, value) pairs in their places; an unknown name is refused."
    known = defaults()
    for name, value in changed:
        if name not in known: raise ValueError(f"there is no parameter {name}: it is one of {', '.join(known)}")
        known[name] = value if isinstance(known[name], str) else ast.literal_eval(value)
    return known


def train(p: dict):
    "The run of the notebook's parameters, in this process."
    processes = sdxl.join_processes(cpu=not torch.cuda.is_available())
    first = processes.rank == 0
    gpu = processes.device.startswith('cuda')
    dtype = torch.bfloat16 if gpu else torch.float32
    if not p['OUT']: raise ValueError('OUT is needed: the folder of the run')
    out = Path(p['OUT'])
    if p['SMALL']:
        torch.manual_seed(p['SEED'])
        form = sdxl.small_form(p['MODEL'], out.parent/f'small-{processes.rank}')
    else: form = sdxl.FORMS[p['MODEL']]
    form = sdxl.replace(form, **{k.lower(): p[k] for k in ('BASE', 'UNET', 'LORA', 'TEACHER', 'VAE', 'RESOLUTION') if p[k]})
    model = sdxl.load_few_step(form, processes.device, dtype)
    overrides, options = json.loads(p['OVERRIDES']), json.loads(p['REWARD_OPTIONS'])
    setting = sdxl.Setting(lora_rank=4, surrogate_rank=4, micro=4, sample_batch=4) if p['SMALL'] else sdxl.choose_setting(sdxl.configs_of(model), p['CARD_GB'] or sdxl.free_memory(model.device))[0]
    setting = sdxl.replace(setting, **{k: overrides.pop(k) for k in ('lora_rank', 'surrogate_rank', 'micro', 'blocks', 'sample_batch') if k in overrides})
    if first: print(sdxl.memory_plan(sdxl.configs_of(model), setting).round(2).to_string(), flush=True)
    asked = sdxl.read_prompt_set(p['PROMPTS']) if p['PROMPTS'] else sdxl.BUILT_IN
    texts, _ = sdxl.readable(asked, model.pipe.tokenizer)
    cond = sdxl.cached_prompts(model, texts, out.parent/'prompts')
    sdxl.drop_text_encoders(model)
    reward = sdxl.elsewhere(p['REWARD'], p['REWARD_DEVICE'], **options) if p['REWARD_DEVICE'] else sdxl.load_full_reward(p['REWARD'], processes.device, **options)
    run = sdxl.tune(model, reward, texts, cond, setting, p['NUM_STEPS'], out, p['ARM'], p['SEED'], p['PROFILE'], processes=processes, dtype=torch.bfloat16 if gpu else None, **overrides)
    if first: print(run, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-p', nargs=2, action='append', default=[], metavar=('NAME', 'VALUE'), dest='parameters')
    try: train(parameters(parser.parse_args().parameters))
    except (ValueError, OSError, MemoryError) as e: sys.exit(str(e))
    finally:
        if dist.is_initialized(): dist.destroy_process_group()


if __name__ == '__main__': main()
