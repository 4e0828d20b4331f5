"""Counts the passes that memory plans are made of, and measures accumulation:
`python bench/memory.py [--accumulation] [--again]`.

Without arguments every pass of SMALL and FULL is counted on fake tensors and kept in
lasro/assets/sdxl/pass_costs.csv. A pass of SDXL takes minutes on one core. Passes in the file are
skipped, so a killed call goes on; `--again` counts all.

`--accumulation` measures updates of the small SDXL with real numbers beside their counts. It writes
results/lab/tables/tab_memory.csv and results/lab/figures/fig_memory.png. Nothing here needs a GPU.
"""
import argparse
from dataclasses import replace
from functools import partial

import lasro # first: it lets a CUDA-built torchvision import beside a CPU torch # noqa: F401
import pandas as pd
import torch

from lasro.core import atomic_path, results_dir
from lasro.sdxl import memory
from lasro.sdxl.passes import PASSES, MemorySetting, ModelShape
from lasro.sdxl.passes import build_networks, count_pass, measure_pass

SMALL = ModelShape('sdxl', 64, small=True), ModelShape('ssd-1b', 64, small=True)
FULL = ModelShape('ssd-1b'), ModelShape('sdxl'), ModelShape('sdxl', 512)
SETTINGS = (
    MemorySetting(gradient_checkpointing=True),
    MemorySetting(gradient_checkpointing=False),
    MemorySetting(lora_rank=16, surrogate_rank=16),
)
PLAIN = memory.SMALL_SETTINGS[0]
SMALL_SETTINGS = PLAIN, replace(PLAIN, gradient_checkpointing=True)
COMPARED = 'decoding', 'sampling step', 'surrogate gradient', 'decoder gradient' # without checkpointing
ROWS = {'generator update': (1, 2, 4), 'surrogate step': (2, 4)} # the rest is extrapolated


def jobs(shapes, settings):
    "Yield name, shape, setting and rows of the passes to count."
    for shape in shapes:
        for setting in settings:
            for name in PASSES:
                if name in COMPARED and setting.gradient_checkpointing: continue
                for rows in ROWS.get(name, (1,)): yield name, shape, setting, rows


def kept(again: bool) -> dict: # key: row
    "Return the rows of the file."
    if again or not memory.COSTS_FILE.exists(): return {}
    rows = pd.read_csv(memory.COSTS_FILE).to_dict('records')
    return {tuple(row[k] for k in memory.KEY_COLUMNS): row for row in rows}


def known_flops(done: dict, name: str, shape, setting, rows: int) -> float | None:
    "Return the operations of a pass from those of fewer rows: they are proportional."
    fewest = ROWS.get(name, (1,))[0]
    first = done.get(tuple(memory.pass_key(name, shape, setting, fewest).values()))
    return first['flops']*rows/fewest if first else None


def count(again: bool):
    "Count what is not in the file."
    memory.COSTS_FILE.parent.mkdir(parents=True, exist_ok=True)
    done = kept(again)
    for job in (*jobs(SMALL, SMALL_SETTINGS), *jobs(FULL, SETTINGS)):
        key = memory.pass_key(*job)
        if tuple(key.values()) in done: continue
        cost = count_pass(*job, known_flops(done, *job))
        done[tuple(key.values())] = key | memory.cost_values(cost)
        with atomic_path(memory.COSTS_FILE) as tmp:
            pd.DataFrame(done.values()).to_csv(tmp, index=False)
        print(*key.values(), flush=True)


def counted_mb(rows: int) -> float:
    "Count an update of the small SDXL in float32."
    build = partial(build_networks, SMALL[0], PLAIN, torch.float32)
    run = partial(PASSES['generator update'], rows=rows)
    return round(measure_pass(build, run, flops=0.).working_gb*1024, 3)


def accumulation():
    "Measure updates of the small SDXL, and count the same."
    runs = memory.measure_accumulation()
    table = memory.accumulation_table(runs)
    table['counted_mb'] = [counted_mb(run.micro_rows) for run in runs]
    lab = results_dir('lab')
    with atomic_path(lab/'tables'/'tab_memory.csv') as tmp: table.to_csv(tmp, index=False)
    figure = memory.plot_accumulation([runs[0], runs[-1]])
    with atomic_path(lab/'figures'/'fig_memory.png') as tmp:
        figure.savefig(tmp, format='png', dpi=150)
    print(table.to_string(index=False))


if __name__ == '__main__':
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument('--accumulation', action='store_true')
    parser.add_argument('--again', action='store_true')
    args = parser.parse_args()
    accumulation() if args.accumulation else count(args.again)
