"""Transitional: split by definition."""
from dataclasses import replace
from functools import partial
from itertools import product
from torch import nn
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel
import math
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from .task import Budget, Task, make_task
from .lasro import LaSRO
from .exploration import Labelled
from .baselines import PerPromptStatTracker, log_prob
from .sampling import add_noise, alphas_cumprod, denoise, sample
from .models import decode, latent_shape
from .worlds.shapes_world import features_of
from .surrogate import frozen, ordered_pairs
from .core import randn
from .evaluation import world_spread

def agreement(g: torch.Tensor # (K, P)
             ) -> tuple[torch.Tensor, torch.Tensor]: # (K,) and (K,)
    "The product d of each vector with the mean of the others, and its square."
    squares = g.square().sum(1)
    return (g @ g.sum(0)-squares)/(len(g)-1), squares

def pseudo_values(dots: np.ndarray) -> np.ndarray: return 2*dots-dots.mean()

def signal_to_noise(rows: np.ndarray # (K, 2): pseudo-values and squares
                   ) -> float: # 0 where no signal is seen
    "Length of the mean over root mean square noise, of one vector."
    signal, square = rows.mean(0)
    return math.sqrt(max(signal, 0)/(square-signal))

def channels_second(x: torch.Tensor) -> torch.Tensor: # (B, C, positions)
    "Maps (B, C, h, w), tokens (B, T, C) and vectors (B, C) in one form."
    return x.flatten(2) if x.ndim == 4 else x.mT if x.ndim == 3 else x[..., None]

def note_call(calls: list, module, inputs, output):
    "Forward hook: once the gradient of `output` is known, append each sample's gradient of the weight."
    if not output.requires_grad: return
    k, a = len(calls), channels_second(inputs[0].detach())
    calls.append(None)
    def product(d): calls[k] = torch.einsum('boi,bri->bor', channels_second(d), a).flatten(1)
    output.register_hook(product)

class SampleGradients:
    "Gradients of each sample with respect to a LoRA's B matrices, at its start (B = 0)."
    def __init__(self, unet):
        self.layers = [m for n, m in unet.named_modules() if n.endswith('lora_B.default')]
        self.weights, self.calls = [m.weight for m in self.layers], [[] for _ in self.layers]
        for m, calls in zip(self.layers, self.calls): m.register_forward_hook(partial(note_call, calls))
        self.size = sum(w.numel() for w in self.weights)
    def __call__(self, values: torch.Tensor # (B,), each a function of its own sample alone
                ) -> torch.Tensor: # (B, calls of the UNet, P)
        torch.autograd.grad(values.sum(), self.weights)
        out = torch.stack([torch.cat(layers, 1) for layers in zip(*self.calls)], 1)
        self.forget()
        return out
    def forget(self):
        "Drop the calls that were noted; needed only after a gradient that was taken by other means."
        for calls in self.calls: calls.clear()

NO_DATA = torch.zeros(0, 4, 8, 8), torch.zeros(0, dtype=torch.long) # no LCM loss is taken here

def analysis_task(pipe, reward, texts: list[str], teacher, rank: int = 4) -> tuple[Task, SampleGradients]:
    "A task whose UNet carries a fresh LoRA, and the gradients of that LoRA."
    task = make_task(pipe, reward, texts, teacher, NO_DATA, lora_rank=rank)
    return task, SampleGradients(task.pipe.unet)

def visit(task: Task, num_steps: int, visits: int, # different prompts
          n_noises: int, # samples of each
          *names # of the stream
         ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: # prompt (N,), x_T (N, ...), injected (num_steps, N, ...)
    "Prompts, visit by visit, and all noise of their samples."
    g = task.stream('analysis', *names)
    prompt = torch.randperm(len(task.texts), generator=g)[:visits].repeat_interleave(n_noises)
    draws = randn(num_steps+1, len(prompt), *latent_shape(task.pipe.unet, task.pipe.vae), generator=g, device=task.cond.pooled.device)
    return prompt, draws[0], draws[1:]

def mean_distance(x: torch.Tensor, # (n, d)
                  power: int = 1) -> float:
    "Mean distance, or squared distance, between two of n vectors; exactly 0 where all are equal."
    n = len(x)
    return float(torch.cdist(x, x, compute_mode='donot_use_mm_for_euclid_dist').pow(power).sum()/(n*(n-1)))

@torch.no_grad()
def latent_diversity(vae, latents: torch.Tensor # (n, 4, h, w)
                    ) -> dict: # pixels in [0, 1], latents, features, cosine
    "How different n samples are."
    images = decode(vae, latents)
    f = features_of(images)
    return dict(pixels=mean_distance(images.flatten(1))/images[0].numel()**.5, latents=float((latents-latents[:1]).std(0).mean()),
                features=mean_distance(f)/world_spread(), cosine=mean_distance(F.normalize(f), 2)/2)

@torch.no_grad()
def diversity_records(task: Task, pairs: int, # (prompt, x_T)
                      draws: int, # samples of each
                      steps: tuple = (1, 2, 4, 8)) -> pd.DataFrame:
    "A row for each pair, number of steps, and kind of noise: 'fixed' or 'free' x_T."
    rows = []
    for i in range(pairs):
        prompt, noise, injected = visit(task, max(steps), 1, draws, 'diversity', i)
        for kind, start in dict(fixed=noise[:1].expand_as(noise), free=noise).items():
            for n in steps:
                z = sample(task.pipe.unet, task.cond[prompt], start, injected, n).final
                rows.append(dict(num_steps=n, noise=kind, pair=i, **latent_diversity(task.pipe.vae, z)))
    return pd.DataFrame(rows)

def score_vectors(task: Task, grads: SampleGradients, prompt, noise, injected, num_steps: int
                 ) -> tuple[torch.Tensor, torch.Tensor]: # (N, num_steps, P), and the last clean latents
    "Gradient of each step's log-likelihood in RLCM's official form (METHODS 3.2)."
    out = sample(task.pipe.unet, task.cond[prompt], noise, injected, num_steps, detach=True)
    times, last = out.timesteps, out.final.detach()
    following = [*out.inputs[1:], add_noise(last, injected[num_steps-1], times[-1]) if num_steps > 1 else last] # at one step the code adds no noise
    return grads(sum(log_prob(x, z, t) for x, z, t in zip(following, out.denoised, times[1:]+times[-1:]))), last

def advantages(prompt: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    "RLCM's, each prompt by its own samples in this batch."
    return PerPromptStatTracker(min_count=2)(prompt, rewards).clamp(-10, 10)

@torch.no_grad()
def rewards_of(task: Task, prompt, latents, reward=None) -> torch.Tensor:
    "True rewards of clean latents."
    return (reward or task.reward)(decode(task.pipe.vae, latents), [task.texts[i] for i in prompt.tolist()])[0]

def policy_terms(task: Task, grads: SampleGradients, prompt, noise, injected, num_steps: int) -> torch.Tensor: # (num_steps, P)
    "The mean over a batch of each step's policy-gradient term."
    s, z = score_vectors(task, grads, prompt, noise, injected, num_steps)
    return torch.einsum('i,isp->sp', advantages(prompt, rewards_of(task, prompt, z)), s)/len(s)

def advantage_slope(rewards: torch.Tensor # (visits, m)
                   ) -> torch.Tensor: # the same shape
    "How a sample's advantage changes with its own reward."
    m, sd = rewards.shape[1], rewards.std(1, correction=0, keepdim=True)
    return (1-1/m-((rewards-rewards.mean(1, keepdim=True))/sd).square()/m)/sd

def true_terms(task: Task, grads: SampleGradients, prompt, noise, injected, num_steps: int) -> torch.Tensor: # (num_steps, P)
    "What the policy-gradient terms of a batch should be in the mean, by back-propagation of the reward through all steps."
    z = sample(task.pipe.unet, task.cond[prompt], noise, injected, num_steps).final
    r = task.reward(decode(task.pipe.vae, z), [task.texts[i] for i in prompt.tolist()])[0]
    slope = advantage_slope(r.detach().view(len(prompt.unique()), -1)).flatten()
    return torch.einsum('i,isp->sp', slope, grads(r))/len(r)/noise[0].numel()

def term_rows(policy: torch.Tensor, truth: torch.Tensor, # (batches, P) each
            **columns) -> list[dict]: # a row for each batch of both
    "What `degeneracy_records` keeps of a term's gradients."
    rows = []
    for source, g, other in (('policy', policy, truth), ('truth', truth, policy)):
        kept = zip(*(x.tolist() for x in (*agreement(g), g @ other.mean(0))))
        rows += [dict(columns, source=source, batch=b, product=d, square=q, along=a) for b, (d, q, a) in enumerate(kept)]
    return rows

def degeneracy_records(task: Task, grads: SampleGradients, batches: tuple[int, int], # of the policy gradient, of back-propagation
                       visits: int = 8, n_noises: int = 6, steps: tuple = (1, 2, 4, 8)) -> pd.DataFrame:
    "Rows of `term_rows` for each number of steps and each term: '1', '2', ..., 'official', 'dropped'."
    rows = []
    for n in steps:
        policy, truth = (torch.stack([f(task, grads, *visit(task, n, visits, n_noises, f.__name__, n, b), n) for b in range(k)]) for f, k in zip((policy_terms, true_terms), batches))
        for k in range(n): rows += term_rows(policy[:, k], truth[:, k], num_steps=n, term=str(k+1))
        rows += term_rows(policy.mean(1), truth.mean(1), num_steps=n, term='official')
        if n > 1: rows += term_rows(policy[:, :-1].mean(1), truth.mean(1), num_steps=n, term='dropped')
    return pd.DataFrame(rows)

def unit_direction(like: torch.Tensor, # (..., 4, h, w)
                   g: torch.Generator) -> torch.Tensor: # the same shape, of norm 1 over the last three dimensions
    "Random directions."
    u = randn(*like.shape, generator=g, device=like.device)
    return u/u.flatten(-3).norm(dim=-1)[..., None, None, None]

@torch.no_grad()
def smoothness_records(task: Task, pairs: int, # (prompt, x_T)
                       radii: tuple, steps: tuple = (1, 2, 4, 8)) -> pd.DataFrame:
    "A row for each pair, number of steps, h, and what is moved: 'first' noise or 'all'."
    prompt, noise, injected = visit(task, max(steps), pairs, 1, 'smoothness')
    g, rows = task.stream('analysis', 'directions'), []
    u, U = unit_direction(noise, g), unit_direction(injected, g)
    def outcome(n, h=0., H=0.): # pictures, rewards
        z = sample(task.pipe.unet, task.cond[prompt], noise+h*u, injected+H*U, n).final
        return decode(task.pipe.vae, z).flatten(1), rewards_of(task, prompt, z)
    for n in steps:
        x, r = outcome(n)
        for moved, h in ((moved, h) for moved in ('first', 'all') for h in radii):
            y, s = outcome(n, h, h*(moved == 'all'))
            rows += [dict(num_steps=n, moved=moved, h=h, pair=i, picture=a, reward=b) for i, (a, b) in enumerate(zip(((y-x).norm(dim=1)/h).tolist(), ((s-r).abs()/h).tolist()))]
    return pd.DataFrame(rows)

def jacobian_norm(f, # of (B, ...), sample by sample
                  x: torch.Tensor, # (B, ...)
                  iterations: int, g: torch.Generator) -> torch.Tensor: # (B,), from below
    "Spectral norm of each sample's Jacobian, by power iteration."
    def unit(v): return v/v.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, *[1]*(v.ndim-1))
    u = unit(randn(*x.shape, generator=g, device=x.device).to(x.dtype))
    with sdpa_kernel(SDPBackend.MATH): # the faster attention kernels have no forward differentiation
        _, vjp = torch.func.vjp(f, x)
        for _ in range(iterations):
            v = torch.func.jvp(f, (x,), (u,))[1]
            u = unit(vjp(v)[0])
    return v.flatten(1).norm(dim=1).detach()

def jacobian_records(task: Task, # without adapter
                     pairs: int, iterations: int = 10, steps: tuple = (1, 2, 4, 8)) -> pd.DataFrame:
    "A row for each pair, number of steps and step, 0 for the whole map."
    prompt, noise, injected = visit(task, max(steps), pairs, 1, 'jacobian')
    cond, unet, rows, g = task.cond[prompt], task.pipe.unet, [], task.stream('analysis', 'power')
    for n in steps:
        with torch.no_grad(): out = sample(unet, cond, noise, injected, n)
        maps = [(noise, 1., lambda x: sample(unet, cond, x, injected, n).final)]
        maps += [(x, float(alphas_cumprod[after].sqrt()) if after else 1., lambda x, t=t: denoise(unet, x, t, cond)) for x, t, after in zip(out.inputs, out.timesteps, out.timesteps[1:]+[0])]
        with frozen(unet): norms = [factor*jacobian_norm(f, x, iterations, g) for x, factor, f in maps]
        rows += [dict(num_steps=n, step=k, pair=i, norm=v) for k, values in enumerate(norms) for i, v in enumerate(values.tolist())]
    return pd.DataFrame(rows)

def pair_weights(prompt: torch.Tensor, rewards: torch.Tensor # (N,) each
                ) -> torch.Tensor: # (N,)
    "Wins less losses of each sample over all clear pairs within prompts, by pair: PSO's gradient at its start."
    winners, losers, _ = ordered_pairs(rewards, prompt)
    wins, losses = (torch.bincount(i, minlength=len(rewards)) for i in (winners, losers))
    return (wins-losses)/max(1, len(winners))

def policy_pool(task: Task, grads: SampleGradients, rewards: dict, # name: Reward
                blocks: int, visits: int, n_noises: int, # of each block
                *stream # names the noise
               ) -> tuple[dict, dict]: # (reward, arm): (blocks, P); latents, prompt and every reward, (samples, ...)
    "Labelled two-step samples in independent blocks, and what the policy gradients make of each."
    vectors, kept = {}, []
    for b in range(blocks):
        prompt, noise, injected = visit(task, 2, visits, n_noises, 'pool', *stream, b)
        s, z = score_vectors(task, grads, prompt, noise, injected, 2)
        labels = {name: rewards_of(task, prompt, z, reward) for name, reward in rewards.items()}
        kept.append(dict(latents=z, prompt=prompt, **labels))
        for name, r in labels.items():
            a, w = advantages(prompt, r)/len(r), pair_weights(prompt, r)
            for arm, v in {'rlcm': a @ s.mean(1), 'rlcm-dropped': a @ s[:, 0], 'pso': w @ s[:, 0]}.items(): vectors.setdefault((name, arm), []).append(v)
    return {k: torch.stack(v) for k, v in vectors.items()}, {k: torch.cat([x[k] for x in kept]) for k in kept[0]}

def direct_pool(task: Task, grads: SampleGradients, blocks: int, visits: int, n_noises: int, *stream) -> torch.Tensor: # (blocks, P)
    "The true reward's gradient through decoder and both steps, of blocks of samples."
    out = []
    for b in range(blocks):
        prompt, noise, injected = visit(task, 2, visits, n_noises, 'direct', *stream, b)
        z = sample(task.pipe.unet, task.cond[prompt], noise, injected).final
        out.append(grads(task.reward(decode(task.pipe.vae, z), [task.texts[i] for i in prompt.tolist()])[0]).sum(1).mean(0))
    return torch.stack(out)

def surrogate_gradient(task: Task, grads: SampleGradients, latents, prompt, rewards, # labelled samples
                       options, # of LaSRO
                       samples: int, # at which the gradient is taken; they need no label
                       seed: int, batch_size: int = 32) -> torch.Tensor: # (P,)
    "LaSRO's generator gradient after pre-training a surrogate on these labels."
    arm = LaSRO(replace(task, seed=seed, budget=Budget()), options)
    arm.buffer.add(Labelled(latents, rewards, prompt, torch.ones_like(prompt)))
    arm.train_surrogate('pretrain', options.pretrain_steps)
    total = torch.zeros(grads.size)
    for b, part in enumerate(torch.arange(samples).split(batch_size)):
        prompt, noise, injected = visit(task, 2, len(part), 1, 'generator', seed, b)
        z = sample(task.pipe.unet, task.cond[prompt], noise, injected).final
        with frozen(arm.surrogate): total += grads(arm.surrogate(z, task.cond[prompt])).sum((0, 1))
    return total/samples

def orthonormal(vectors: torch.Tensor # (K, P), independent
               ) -> torch.Tensor: # (K, P), of norm 1 and at right angles
    "Directions that span the same space."
    return torch.linalg.qr(vectors.T)[0].T.contiguous()

@torch.no_grad()
def common_noise_differences(task: Task, grads: SampleGradients, directions: torch.Tensor, # (K, P)
                             rewards: list, # of Reward
                             h: float, batches: int, batch_size: int, *stream) -> torch.Tensor: # (rewards, batches, K)
    "Slopes of the mean rewards along directions of the adapter, by differences with common noise."
    rows = []
    for b in range(batches):
        prompt, noise, injected = visit(task, 2, batch_size, 1, 'differences', *stream, b)
        texts = [task.texts[i] for i in prompt.tolist()]
        def means(vector):
            nn.utils.vector_to_parameters(vector, grads.weights)
            images = decode(task.pipe.vae, sample(task.pipe.unet, task.cond[prompt], noise, injected).final)
            return torch.stack([reward(images, texts)[0].mean() for reward in rewards])
        rows.append(torch.stack([(means(h*d)-means(-h*d))/(2*h) for d in directions], 1))
    nn.utils.vector_to_parameters(torch.zeros(grads.size), grads.weights)
    return torch.stack(rows, 1)

def joined(blocks: torch.Tensor, # (K, P), independent
           k: int) -> torch.Tensor: # (K//k, P)
    "Means of k blocks each."
    return blocks[:len(blocks)//k*k].unflatten(0, (-1, k)).mean(1)

def quality(estimates: list, # of each repeat, (E, P)
            references: list, # of each repeat: view of a gradient, what that view should be
            **columns) -> list[dict]: # a row for each estimate
    "Cosine with the repeat's reference, and mean cosine with all other estimates (nan if there is none)."
    every = F.normalize(torch.cat(estimates), dim=1)
    agree = iter(agreement(every)[0].tolist() if len(every) > 1 else [float('nan')]*len(every))
    return [dict(columns, repeat=i, cosine=c, agreement=next(agree)) for i, (g, (along, reference)) in enumerate(zip(estimates, references)) for c in F.cosine_similarity(along(g), reference[None]).tolist()]

def gradient_pools(task: Task, # with a differentiable reward
                   grads: SampleGradients, black_box, # a Reward without gradient
                   size: dict, # blocks, reference (blocks), visits, n_noises; directions, h, batches, batch_size
                   repeat: int = 0) -> tuple: # (reward, arm): (blocks, P); labelled samples; reward: (view of a gradient, blocks of the reference)
    "What the policy gradients, `direct` and the differences make of the same model."
    of_block = size['visits'], size['n_noises']
    vectors, labelled = policy_pool(task, grads, {r.name: r for r in (task.reward, black_box)}, size['blocks'], *of_block, repeat)
    vectors[task.reward.name, 'direct'] = direct_pool(task, grads, size['blocks'], *of_block, 'estimate', repeat)
    d = orthonormal(direct_pool(task, grads, size['directions'], *of_block, 'directions', repeat))
    known, slopes = common_noise_differences(task, grads, d, [task.reward, black_box], *(size[k] for k in ('h', 'batches', 'batch_size')), repeat)
    reference = direct_pool(task, grads, size['reference'], *of_block, 'reference', repeat)
    return vectors, labelled, {task.reward.name: (lambda g: g, reference), black_box.name: (lambda g: g @ d.T, slopes), 'check': (lambda g: g @ d.T, known)}

def reliability(blocks: torch.Tensor # (K, P), independent
               ) -> float: # at most 1; below 0 by chance
    "The share of the square of the blocks' mean that is signal."
    product, squares = (x.mean() for x in agreement(blocks))
    return float(len(blocks)*product/(squares+(len(blocks)-1)*product))

def gradient_records(task: Task, grads: SampleGradients, pools: list, # of `gradient_pools`, one for each repeat
                     options, # of LaSRO
                     size: dict # besides the pools' sizes: joined, samples
                    ) -> pd.DataFrame:
    "Rows of `quality` for both rewards, every method, and growing numbers of reward calls."
    rows, n = [], size['visits']*size['n_noises']
    references = {name: [(p[2][name][0], p[2][name][1].mean(0)) for p in pools] for name in pools[0][2]}
    for i, (_, _, compared) in enumerate(pools): rows += [dict(reward=name, arm='reference', calls=0, repeat=i, cosine=float('nan'), agreement=reliability(compared[name][1])) for name in list(compared)[:2]]
    for i, p in enumerate(pools): rows.append(dict(reward=task.reward.name, arm='differences', calls=0, repeat=i, cosine=float(F.cosine_similarity(references['check'][i][1], references['check'][i][0](p[2][task.reward.name][1].mean(0)), dim=0)), agreement=float('nan')))
    for k in size['joined']:
        for name, arm in pools[0][0]: rows += quality([joined(p[0][name, arm], k) for p in pools], references[name], reward=name, arm=arm, calls=k*n)
        for name in list(references)[:2]:
            trained = [surrogate_gradient(task, grads, *(p[1][x][:k*n] for x in ('latents', 'prompt', name)), options, max(size['samples'], k*n), i)[None] for i, p in enumerate(pools)]
            rows += quality(trained, references[name], reward=name, arm='surrogate', calls=k*n)
    return pd.DataFrame(rows)
