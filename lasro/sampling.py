"""Transitional: split by definition."""
from dataclasses import dataclass
import torch
from .models import Conditioning, adapters_off, decode, predict_noise
from .core import generator, randn

NUM_TRAIN_TIMESTEPS = 1000

ORIGINAL_STEPS = 50

betas = torch.linspace(.00085**.5, .012**.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float64)**2

alphas_cumprod = (1-betas).cumprod(0).float()

def lcm_timesteps(num_steps: int # 1 to 50
                 ) -> list[int]: # descending
    "The timesteps of the n-step sampler, as `LCMScheduler.set_timesteps` (diffusers, scheduling_lcm.py)."
    origin = [20*(i+1)-1 for i in range(ORIGINAL_STEPS)][::-1]
    return [origin[int(i*ORIGINAL_STEPS/num_steps)] for i in range(num_steps)]

def coefficients(timesteps: torch.Tensor, # (B,) ints
                 like: torch.Tensor # its shape, device and dtype are taken
                ) -> tuple[torch.Tensor, ...]: # sqrt(abar), sqrt(1-abar), c_skip, c_out, each (B, 1, 1, 1)
    "The scalars of the equations above."
    t = torch.as_tensor(timesteps).cpu().expand(len(like))
    abar, s = alphas_cumprod[t], 10.*t
    scalars = abar.sqrt(), (1-abar).sqrt(), .25/(s*s+.25), s/(s*s+.25).sqrt()
    return tuple(c.to(like).view(-1, *[1]*(like.ndim-1)) for c in scalars)

def denoise(unet, latents: torch.Tensor, # x_t, (B, 4, h, w)
            timesteps, # t, int or (B,)
            cond: Conditioning) -> torch.Tensor: # (B, 4, h, w)
    "The consistency function f: the clean latents seen from x_t."
    t = torch.as_tensor(timesteps, device=latents.device).expand(len(latents))
    alpha, sigma, c_skip, c_out = coefficients(t, latents)
    noise = predict_noise(unet, latents, t, cond)
    return c_skip*latents + c_out*(latents-sigma*noise)/alpha

def add_noise(denoised: torch.Tensor, # clean latents
              noise: torch.Tensor, timesteps) -> torch.Tensor:
    "x_t: clean latents diffused to time t."
    alpha, sigma, *_ = coefficients(torch.as_tensor(timesteps), denoised)
    return alpha*denoised + sigma*noise

@dataclass
class Trajectory:
    "What an n-step sample went through."
    inputs: list[torch.Tensor]   # x_t at each step, (B, 4, h, w)
    denoised: list[torch.Tensor] # z_1 ... z_n, clean latents after each step
    timesteps: list[int]
    @property
    def final(self): return self.denoised[-1]

def sample(unet, # or a pipeline
           cond: Conditioning, # B prompts
           noise: torch.Tensor, # x_T, (B, 4, h, w)
           injected: list[torch.Tensor] | torch.Tensor, # noise put in after each step but the last
           num_steps: int = 2, detach: bool = False # cut the gradient between steps
          ) -> Trajectory:
    "Sample with the n-step consistency sampler (METHODS 2.1); all randomness is in the arguments."
    unet, timesteps, latents, inputs, denoised = getattr(unet, 'unet', unet), lcm_timesteps(num_steps), noise, [], []
    for i, t in enumerate(timesteps):
        inputs.append(latents)
        denoised.append(denoise(unet, latents, t, cond))
        if i+1 < num_steps: latents = add_noise(denoised[-1].detach() if detach else denoised[-1], injected[i], timesteps[i+1])
    return Trajectory(inputs, denoised, timesteps)

def check_steps(num_steps: int):
    "Raise a `ValueError` in one line unless there are 1 to 4 sampling steps."
    if num_steps not in range(1, 5): raise ValueError(f'{num_steps} sampling steps: give 1 to 4')

def draw_noise(n: int, # samples
               num_steps: int, # of the sampler, 1 to 4
               generator: torch.Generator, shape: tuple = (4, 8, 8), # of one latent
               device='cpu', dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]: # x_T (n, ...) and injected (num_steps-1, n, ...)
    "Initial and injected noise for `n` samples, drawn sample by sample so that more steps or samples leave the first ones as they were."
    check_steps(num_steps)
    draws = torch.stack([torch.randn(4, *shape, generator=generator) for _ in range(n)]).to(device, dtype)
    return draws[:, 0], draws[:, 1:num_steps].transpose(0, 1)

@torch.no_grad()
def ddim_step(teacher, x_t: torch.Tensor, t: torch.Tensor, t_prev: torch.Tensor, cond: Conditioning, guidance_scale: float) -> torch.Tensor:
    "One guided DDIM step from t to t_prev: the guided x0 and the guided noise, recombined."
    n = len(x_t)
    uncond, text = predict_noise(teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), Conditioning.cat([cond.zeros(), cond])).split(n)
    noise = uncond+guidance_scale*(text-uncond)
    alpha, sigma, *_ = coefficients(t, x_t)
    return add_noise((x_t-sigma*noise)/alpha, noise, t_prev)

def draw_lcm_noise(n: int, # samples
                   shape: tuple, # of one latent
                   generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]: # times t (n,) of the solver's grid, 19 to 999; noise (n, *shape)
    "What an LCM loss on `n` clean latents needs: a time of the 50-step grid and a noise for each."
    t = 20*torch.randint(1, ORIGINAL_STEPS+1, (n,), generator=generator)-1
    return t, randn(n, *shape, generator=generator)

def lcm_target(target, # the network that gives the target: an average of the student, or the student itself
               teacher, x_t: torch.Tensor, # (B, C, h, w)
               t: torch.Tensor, # (B,)
               cond: Conditioning, guidance_scale: float) -> torch.Tensor: # (B, C, h, w)
    "Where the student's prediction at t shall be: the prediction at t - 20, one guided DDIM step of the teacher further."
    t_prev = (t-20).clamp(min=0)
    with torch.no_grad(), adapters_off(teacher): x_prev = ddim_step(teacher, x_t, t, t_prev, cond, guidance_scale)
    with torch.no_grad(): return denoise(target, x_prev, t_prev, cond)

def pseudo_huber(error: torch.Tensor, c: float = .001) -> torch.Tensor: # mean over all elements
    "A square near 0, an absolute value far from it."
    return (error.square()+c**2).sqrt().mean()-c

def lcm_loss(student, target, teacher, latents: torch.Tensor, # clean, (B, C, h, w)
             t: torch.Tensor, noise: torch.Tensor, # of `draw_lcm_noise`
             cond: Conditioning, guidance_scale: float) -> torch.Tensor:
    "The latent consistency distillation loss, averaged over batch and elements."
    noise, t = noise.to(latents), t.to(latents.device)
    x_t = add_noise(latents, noise, t)
    goal = lcm_target(target, teacher, x_t, t, cond, guidance_scale)
    return pseudo_huber(denoise(student, x_t, t, cond)-goal)

@torch.no_grad()
def generate(pipe, cond: Conditioning, # B prompts
             noise: torch.Tensor, injected: torch.Tensor, # of `draw_noise`
             num_steps: int = 2) -> torch.Tensor: # (B, 3, H, W) in [0, 1]
    "Sample and decode, without gradient."
    return decode(pipe.vae, sample(pipe.unet, cond, noise, injected, num_steps).final)
