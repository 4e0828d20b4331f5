"What tests/test_processes.py runs in one process or in several: one arm on the embedded shapes for a few updates."
import json
import os
import signal
import sys
import warnings

warnings.filterwarnings('ignore')
import lasro # first: it lets a CUDA-built torchvision import beside a CPU torch # noqa: F401
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState

from lasro import lasro as lasro_arm
from lasro import task
from lasro.finetuning import finetune
from lasro.models import load_pipeline
from lasro.worlds.shapes_world import SHAPES


def sharded_accelerator(*args, **kwargs) -> Accelerator:
    "FSDP2 on the CPU: accelerate chooses it by itself only on accelerators, so the state is told here."
    accelerator = Accelerator(*args, **kwargs)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy='transformer_based_wrap',
                                            transformer_cls_names_to_wrap=['BasicTransformerBlock', 'ResnetBlock2D'],
                                            cpu_ram_efficient_loading=False, reshard_after_forward=True)
    PartialState().distributed_type = DistributedType.FSDP
    AcceleratorState().distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def kill_at(round: int):
    "Kill this process when that round begins."
    once = lasro_arm.LaSRO.round

    def deadly(self, k):
        if k == round: os.kill(os.getpid(), signal.SIGKILL)
        return once(self, k)
    lasro_arm.LaSRO.round = deadly


def main(out: str, arm: str, kind: str, options: str):
    torch.manual_seed(0)
    if kind == 'fsdp': task.Accelerator = sharded_accelerator
    sizes = dict(outer_steps=5, generator_steps=1, surrogate_steps=2, pretrain_steps=3, pretrain_prompts=8,
                 collect_prompts=4, n_noises=3, batch_size=12, lcm_batch=12, groups=6, probe_prompts=12,
                 snapshot_every=0, lr=2e-7, surrogate_lr=2e-7)
    texts = SHAPES.prompts('train', 64)
    if 'KILL_AT_ROUND' in os.environ: kill_at(int(os.environ['KILL_AT_ROUND']))
    folder = None if out == 'none' else out
    changed = sizes | json.loads(options)
    run = finetune(load_pipeline(), 'attribute_binding', texts, out=folder, arm=arm, **changed)
    if PartialState().is_main_process: print('CURVE', run.metrics.to_json(orient='records'))


if __name__ == '__main__': main(*sys.argv[1:])
