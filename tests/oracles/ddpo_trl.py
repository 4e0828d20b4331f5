"""What trl's DDPOTrainer computes on a few tensors: `python ddpo_trl.py OUT` writes OUT/ddpo_trl.safetensors.

trl 0.23.1 is the last release with DDPOTrainer and wants older libraries than lasro,
so this runs in a throw-away environment (Python 3.11, about 1.5 GB):

    python -m venv trlenv
    trlenv/bin/pip install trl==0.23.1 torch==2.13.0 transformers==4.56.2 diffusers==0.35.2 \\
        accelerate==1.10.1 datasets==4.1.1 peft==0.17.1
    trlenv/bin/python tests/oracles/ddpo_trl.py tests/oracles

The real `DDPOTrainer.calculate_loss` and `scheduler_step` run, in float64.
Only the UNet is replaced by the tensor it would give, `denoised`.
Keys `denoised` and `x_next` (8, 4, 2, 2), `t_next` and `log_prob` (8,) are shared.
Of each case there are the inputs `old_log_prob` and `advantages` (8,), `clip_range` and `adv_clip`,
and trl's `loss`, `approx_kl`, `clipfrac`, `grad_log_prob` (8,) and `grad_denoised` (8, 4, 2, 2).
"""
import contextlib, math, sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch, trl
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from trl.models.modeling_sd_base import _get_variance, scheduler_step
from trl.trainer.ddpo_trainer import DDPOTrainer

# outside and inside of a clip of .2, both signs of the advantage for each
LOG_RATIO = torch.tensor([-.5, -.5, -.1, -.1, .1, .1, .5, .5], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.5, -.75, .5, -2., .25, -1.25, 1., -.5], dtype=torch.float64)
CASES = dict( # log of the ratio, advantages, clip_range
    on_policy=(0*LOG_RATIO, ADVANTAGES, 1e-4),
    clipped=(LOG_RATIO, ADVANTAGES, .2),
    published_clip=(4e-4*LOG_RATIO, ADVANTAGES, 1e-4),
    far_advantages=(LOG_RATIO, torch.tensor([15., -7.5, 5., -5., 0., -20., 6., -.5], dtype=torch.float64), .2))


def draw(seed: int) -> torch.Tensor:
    "Normal numbers on a grid of 1/1024: the same on every machine."
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(8, 4, 2, 2, dtype=torch.float64, generator=g)*1024).round()/1024


def lcm_eta(scheduler, t: torch.Tensor, t_next: torch.Tensor) -> float:
    "The eta at which DDIM's step is the LCM's: all of the variance 1-abar is fresh noise, nothing points back to x_t."
    abar, variance = scheduler.alphas_cumprod[t_next][0], _get_variance(scheduler, t, t_next)[0]
    eta = math.sqrt((1-abar)/variance)
    while 1-abar-(eta*variance.sqrt())**2 < 0: eta = math.nextafter(eta, 0)
    return eta


def run(scheduler, t, denoised, x_next, eta, old, advantages, clip_range) -> dict:
    "trl's loss of one batch, and its gradients."
    f, seen = denoised.clone().requires_grad_(), []
    def step(*args, **kwargs):
        seen.append(scheduler_step(scheduler, *args, **kwargs))
        seen[0].log_probs.retain_grad()
        return seen[0]
    clips = dict(train_adv_clip_max=5., train_clip_range=clip_range)
    trainer = SimpleNamespace(
        config=SimpleNamespace(train_cfg=False, sample_eta=eta, **clips), autocast=contextlib.nullcontext,
        sd_pipeline=SimpleNamespace(unet=lambda *_: SimpleNamespace(sample=f), scheduler_step=step),
        loss=partial(DDPOTrainer.loss, None))
    x = denoised*scheduler.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1) # any x_t does: the step's mean is sqrt(abar) f
    loss, approx_kl, clipfrac = DDPOTrainer.calculate_loss(trainer, x, t, x_next, old, advantages, None)
    loss.backward()
    return dict(loss=loss.detach(), approx_kl=approx_kl.detach(), clipfrac=clipfrac,
                grad_log_prob=seen[0].log_probs.grad, grad_denoised=f.grad)


def main(out: Path):
    betas = dict(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear')
    scheduler = DDIMScheduler(**betas, clip_sample=False, prediction_type='sample')
    scheduler.set_timesteps(2)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    t, t_next = torch.full((8,), 999), torch.full((8,), 499)
    denoised, eta = draw(0), lcm_eta(scheduler, t, t_next)
    abar = scheduler.alphas_cumprod[t_next].view(-1, 1, 1, 1)
    x_next = abar.sqrt()*denoised+(1-abar).sqrt()*draw(1)
    x_next = (x_next*1024).round()/1024
    x = denoised*scheduler.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    log_prob = scheduler_step(scheduler, denoised, t, x, eta=eta, prev_sample=x_next).log_probs
    found = dict(denoised=denoised, x_next=x_next, t_next=t_next, log_prob=log_prob)
    for name, (log_ratio, advantages, clip_range) in CASES.items():
        clips = dict(clip_range=torch.tensor(clip_range, dtype=torch.float64),
                     adv_clip=torch.tensor(5., dtype=torch.float64))
        inputs = dict(old_log_prob=log_prob-log_ratio, advantages=advantages) | clips
        outputs = run(scheduler, t, denoised, x_next, eta, inputs['old_log_prob'], advantages, clip_range)
        found |= {f'{name}.{k}': v.clone() for k, v in (inputs | outputs).items()}
    save_file(found, out/'ddpo_trl.safetensors', dict(trl=trl.__version__))


if __name__ == '__main__': main(Path(sys.argv[1]))
