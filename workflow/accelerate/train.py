"""Tunes a few-step model on several GPUs, with the parameters of nbs/14_sdxl.ipynb:
accelerate launch --config_file workflow/accelerate/ddp.yaml workflow/accelerate/train.py -p SMALL False -p PROFILE sdxl -p OUT runs/ssd-1b ...
"""
import argparse, ast, json, os, sys, tempfile, warnings
from pathlib import Path

warnings.filterwarnings('ignore')
warnings.filterwarnings('default', module=r'lasro\.')
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


def literal(name: str, value: str, default):
    "A parameter that is no string."
    try: found = ast.literal_eval(value)
    except (ValueError, SyntaxError): found = None
    kind = (int, float) if name == 'CARD_GB' else type(default)
    if not isinstance(found, kind) or isinstance(found, bool) != isinstance(default, bool) or found < 0: raise ValueError(f'{name} is {value!r}, but is of the kind of {default!r}')
    return found


def parameters(changed) -> dict:
    "The defaults with (name, value) pairs in their places; an unknown name is refused."
    known = defaults()
    for name, value in changed:
        if name not in known: raise ValueError(f"there is no parameter {name}: it is one of {', '.join(known)}")
        known[name] = value if isinstance(known[name], str) else literal(name, value, known[name])
    return known


def train(p: dict, folder: str):
    "The run of the notebook's parameters, in this process; small networks are written to `folder`."
    if not p['OUT']: raise ValueError('OUT is needed: the folder of the run')
    out = Path(p['OUT'])
    sdxl.check_parameters(p, out)
    torch.manual_seed(p['SEED'])
    form = sdxl.chosen_form(p['MODEL'], Path(folder) if p['SMALL'] else None, **{k.lower(): p[k] for k in ('BASE', 'UNET', 'LORA', 'TEACHER', 'VAE', 'RESOLUTION')})
    processes = sdxl.join_processes() # after the small networks are written: transformers lets only the first of several processes save
    card = p['CARD_GB'] or sdxl.free_memory(processes.device)
    model = sdxl.load_few_step(form, processes.device, sdxl.weights_dtype(p['DTYPE'], processes.device))
    ready = sdxl.prepare(model, p, out, card, processes)
    if processes.rank == 0: print(f"{processes.world} processes; {len(ready.call['texts'])} prompts, {ready.left_out} left out; from the hub: {sdxl.hub_places(form) or 'nothing'}\n{ready.plan.round(2).to_string()}", flush=True)
    run = sdxl.tune(model, **ready.call)
    if processes.rank == 0: print(run, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-p', nargs=2, action='append', default=[], metavar=('NAME', 'VALUE'), dest='parameters')
    given = parser.parse_args().parameters
    try:
        with tempfile.TemporaryDirectory() as folder: train(parameters(given), folder)
    except (ValueError, OSError, MemoryError, ImportError, FloatingPointError, torch.OutOfMemoryError) as e: sys.exit(f"process {os.environ['RANK']}: {e}" if 'RANK' in os.environ else str(e))
    finally:
        if dist.is_initialized(): dist.destroy_process_group()


if __name__ == '__main__': main()
