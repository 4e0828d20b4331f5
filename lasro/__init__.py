"Reward fine-tuning of few-step diffusion models with any reward. Generated from nbs/, but for this file."
__version__ = "0.2.0"

import importlib
import importlib.util
import sys
import warnings

_FRONT = dict(finetune='finetuning', load_pipeline='models', load_reward='rewards', load_world='world') # name: module it comes from


def __getattr__(name):
    "Import what the front door hands out when it is first asked for: `import lasro` alone stays fast."
    if name not in _FRONT: raise AttributeError(f'module lasro has no attribute {name!r}')
    return getattr(importlib.import_module(f'lasro.{_FRONT[name]}'), name)


warnings.filterwarnings('ignore', message='IProgress not found') # without ipywidgets, tqdm draws its bars as text


class _TorchvisionBesideCpuTorch:
    """PyPI's torchvision is built for CUDA; beside a CPU torch its library does not load and its import fails, and with it transformers'
    and diffusers'. When torchvision is first imported and its library cannot be loaded, declare the two operators that it misses.
    Inert where the library loads."""
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != 'torchvision': return None
        sys.meta_path.remove(_TorchvisionBesideCpuTorch)
        spec = importlib.util.find_spec('torchvision')
        if spec: _declare_missing_operators(spec)
        return spec


def _declare_missing_operators(spec):
    import ctypes, pathlib, torch
    try: ctypes.CDLL(str(next(pathlib.Path(spec.origin).parent.glob('_C*.so'))))
    except (OSError, StopIteration):
        global _library # lives as long as the declarations shall
        _library = torch.library.Library('torchvision', 'DEF')
        _library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        _library.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')


if 'torchvision' not in sys.modules: sys.meta_path.insert(0, _TorchvisionBesideCpuTorch)
