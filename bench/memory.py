"""Counts the passes that memory plans are made of, and measures accumulation: `python bench/memory.py [--accumulation] [--again]`.

Without arguments every pass of SHAPES and SETTINGS is counted on fake tensors and kept in lasro/assets/sdxl/pass_costs.csv. A pass of SDXL takes minutes on one core; passes that are in the file are skipped,
so a killed call goes on. `--again` counts all. `--accumulation` measures updates of the small SDXL with real numbers beside their counts, and writes results/lab/tables/tab_memory.csv and
results/lab/figures/fig_memory.png. Nothing here needs a GPU or weights.
"""
import argparse
from dataclasses import replace
from functools import partial

import lasro # first: it lets a CUDA-built torchvision import beside a CPU torch # noqa: F401
import pandas as pd
import torch

from lasro.core import atomic_path, results_dir
from lasro.sdxl import memory
from lasro.sdxl.memory import MemorySetting, ModelShape

SMALL = ModelShape('sdxl', 64, small=True), ModelShape('ssd-1b', 64, small=True)
FULL = ModelShape('ssd-1b'), ModelShape('sdxl'), ModelShape('sdxl', 512)
SETTINGS = (
    MemorySetting(gradient_checkpointing=True),
    MemorySetting(gradient_checkpointing=False),
    MemorySetting(lora_rank=16, surrogate_rank=16),
)
SMALL_SETTINGS = memory.SMALL_SETTINGS[0], replace(memory.SMALL_SETTINGS[0], gradient_checkpointing=True)
ROWS = {'generator update': (1, 2), 'surrogate step': (2, 4)} # cost is affine in the rows


def wanted():
    "Yield every pass to count: name, shape, setting, rows."
    for shapes, settings in ((SMALL, SMALL_SETTINGS), (FULL, SETTINGS)):
        for shape in shapes:
            for setting in settings:
                for name in memory.PASSES:
                    if name in ('decoding', 'decoder gradient') and setting != settings[0]: continue
                    for rows in ROWS.get(name, (1,)): yield name, shape, setting, rows


def count(again: bool):
    "Count what is not in the file."
    path = memory.COSTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [] if again or not path.exists() else pd.read_csv(path).to_dict('records')
    key = lambda row: tuple(row[c] for c in list(memory.cost_row('', SMALL[0], SETTINGS[0], 0, memory.PassCost(0, {})))[:-1])
    done = {key(row): row for row in table}
    for name, shape, setting, rows in wanted():
        new = partial(memory.cost_row, name, shape, setting)
        if key(new(rows, memory.PassCost(0, {}))) in done: continue
        first = done.get(key(new(ROWS.get(name, (1,))[0], memory.PassCost(0, {})))) # operations are proportional to the rows
        flops = first['flops']*rows/first['rows'] if first else None
        row = new(rows, memory.count_pass(name, shape, setting, rows, flops))
        done[key(row)] = row
        with atomic_path(path) as tmp: pd.DataFrame(done.values()).to_csv(tmp, index=False)
        print(*key(row), flush=True)


def accumulation():
    "Measure updates of the small SDXL, and count the same."
    runs = memory.measure_accumulation()
    table = memory.accumulation_table(runs)
    shape, setting = SMALL[0], memory.SMALL_SETTINGS[0]
    build = partial(memory.build_networks, shape, setting, torch.float32)
    costs = [memory.measure_pass(build, partial(memory.PASSES['generator update'], rows=r.micro_rows), 0.) for r in runs]
    table['counted_mb'] = [round(cost.working_gb*1024, 3) for cost in costs]
    lab = results_dir('lab')
    with atomic_path(lab/'tables'/'tab_memory.csv') as tmp: table.to_csv(tmp, index=False)
    figure = memory.plot_accumulation([runs[0], runs[-1]])
    with atomic_path(lab/'figures'/'fig_memory.png') as tmp: figure.savefig(tmp, format='png', dpi=150)
    print(table.to_string(index=False))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--accumulation', action='store_true')
    parser.add_argument('--again', action='store_true')
    args = parser.parse_args()
    accumulation() if args.accumulation else count(args.again)
