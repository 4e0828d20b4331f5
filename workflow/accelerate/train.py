"""Tune a few-step model on several GPUs.

The parameters are those of nbs/experiments/tune_sdxl.ipynb, from a YAML file or by -p:
accelerate launch --config_file workflow/accelerate/ddp.yaml workflow/accelerate/train.py recipe.yaml -p OUT runs/first
"""
import argparse
import ast
import os
import sys
from pathlib import Path

import lasro # first, so that a CUDA-built torchvision imports beside a CPU torch  # noqa: F401
import torch
import yaml

from lasro.finetuning import finetune
from lasro.sdxl.config import make_config, prepare


def literal(text: str):
    "Return the Python value that a command line means: a number, True, None, a dictionary, else the text."
    try: return ast.literal_eval(text)
    except (ValueError, SyntaxError): return text


def parameters() -> dict:
    "Return the parameters of the recipe, and those of the command line in their places."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipe', nargs='?', help='YAML file of parameters')
    parser.add_argument('-p', nargs=2, action='append', default=[], metavar=('NAME', 'VALUE'), dest='changes')
    given = parser.parse_args()
    values = yaml.safe_load(Path(given.recipe).read_text()) if given.recipe else {}
    return {name.lower(): v for name, v in values.items()} | {name.lower(): literal(v) for name, v in given.changes}


def main():
    rank = os.environ.get('RANK', '0')
    try:
        ready = prepare(make_config(**parameters()))
        hub_ids = ready.model.source.hub_ids
        if rank == '0': print(f'{len(ready.left_out)} prompts left out; from the hub: {hub_ids}', flush=True)
        run = finetune(**ready.arguments)
        if rank == '0': print(run, flush=True)
    except (ValueError, OSError, MemoryError, ImportError, FloatingPointError, torch.OutOfMemoryError) as e:
        sys.exit(f'process {rank}: {e}')


if __name__ == '__main__': main()
