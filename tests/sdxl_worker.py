"What `test_sdxl.py` runs in one process or in two: `accelerate launch ... tests/sdxl_worker.py FOLDER SCENARIO ...`."
import json, sys
from dataclasses import replace
from pathlib import Path

import lasro # first: it lets a CUDA-built torchvision import beside a CPU torch # noqa: F401
import torch
import torch.distributed as dist

from lasro.finetune import checkpoint, find_arm, train
from lasro.sdxl import FORMS, Processes, Setting, Shared, join_processes, load_few_step, make_tune_task, sampled_data, spread, tune_options
from lasro.models import encode_prompts
from lasro.rewards import RewardError, load_reward

TEXTS = ['a red ring and a blue cross', 'a large green square', 'a cyan circle', 'an orange cross and a blue ring']
OPTIONS = dict(pretrain_prompts=3, n_noises=2, pretrain_steps=2, outer_steps=5, generator_steps=1, surrogate_steps=1, collect_prompts=2, batch_size=3, lcm_batch=3, groups=2, probe_prompts=0, lr=1e-3, warmup=1)
LORA, FULL = Setting(lora_rank=4, surrogate_rank=4, micro=1, blocks=True, sample_batch=4), Setting(lora_rank=0, surrogate_rank=0, micro=0, blocks=False, sample_batch=4)


def redness(images, prompts, metadata): return images[:, 0].mean((1, 2))-images[:, 1:].mean((1, 2, 3))


def choosy(images, prompts, metadata):
    "Cannot read the last prompt, which the last process scores."
    if TEXTS[-1] in prompts: raise ValueError('it names nothing')
    return images.mean((1, 2, 3))


def failing(processes: Processes) -> list[dict]:
    "What each process is told where one cannot score its rows."
    reward = load_reward(choosy)
    try: Shared(**vars(reward), inner=reward, processes=processes)(torch.zeros(4, 3, 8, 8), TEXTS)
    except RewardError as e: return [dict(said=str(e))]


def scenario(folder: Path, name: str, processes: Processes) -> list[dict]:
    "Metrics of a run: 'lora', 'full', 'stopped' after two rounds of five, 'resumed' from there."
    places = {k: str(Path(folder)/'form'/v) for k, v in dict(base='base', teacher='base', unet='unet').items()}
    model = load_few_step(replace(FORMS['lcm-ssd-1b'], **places, vae='', resolution=64))
    setting = FULL if name == 'full' else LORA
    options = tune_options('lasro', 'smoke', setting, **OPTIONS | (dict(outer_steps=2) if name == 'full' else {}))
    cond = encode_prompts(model.pipe, TEXTS, guidance_scale=model.guidance)
    task = make_tune_task(model, redness, TEXTS, cond, options, 2, 0)
    arm = find_arm('lasro')[0](task, options)
    spread(arm, replace(processes, shards=name == 'full' and processes.world > 1), setting)
    task.data = sampled_data(task.pipe, cond, batch_size=4)
    kept = Path(folder)/'checkpoints'
    rows = train(arm, 2 if name == 'stopped' else options.outer_steps, kept if name == 'resumed' else None, progress=False)
    if name == 'stopped': checkpoint(arm, kept, 2, rows)
    return rows


if __name__ == '__main__':
    processes = join_processes()
    for name in sys.argv[2:]:
        rows = failing(processes) if name == 'failing' else scenario(Path(sys.argv[1]), name, processes)
        if processes.rank == 0: (Path(sys.argv[1])/f'{name}-{processes.world}.json').write_text(json.dumps(dict(world=processes.world, rows=rows)))
    dist.destroy_process_group()
