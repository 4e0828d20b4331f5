"""The methods that LaSRO is compared with and that learn from labels alone: RLCM, Diffusion-DPO, PSO, GORS-LCM. One loop, one counter, equal reward calls."""
import copy
import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fastcore.basics import patch

from .core import randn
from .evaluation import diversity
from .models import adapters_off, predict_noise
from .sampling import add_noise, coefficients, denoise, draw_lcm_noise, lcm_loss, lcm_timesteps, sample
from .surrogate import ordered_pairs
from .task import MicroGroup, Options, Task, option
from .training import Arm

log = logging.getLogger('lasro')

@dataclass(frozen=True)
class BaselineOptions(Options):
    "What the baselines add to `Options`; each name begins with its method."
    clip_range: float = option(3e-5, 0.)  # rlcm: half-width of the ratio's clip for 64x64x4 latents, rescaled to the latents at hand; published 1e-4
    adv_clip: float = option(10., 0.)     # rlcm: greatest advantage; published
    history: int = option(32, 1)          # rlcm: rewards remembered of each prompt; published 16 or 32
    min_count: int = option(6, 1)         # rlcm: with fewer rewards of a prompt the batch's statistics serve; published 16
    dpo_beta: float = option(20., 0.)     # diffusion_dpo: published 5000, for latents 64 times as large
    pso_beta: float = option(500., 0.)    # pso: published 50
    pso_clip: float = option(.1, 0., .99) # pso: half-width of the ratio's clip; published
    top: float = option(.1, 0., 1.)       # gors_lcm: share of the samples that is kept
    gors_form: str = option('lcm', choices=('lcm', 'x0')) # gors_lcm: the LCM loss, or plain regression onto the kept samples

# ---- equal reward calls
def reward_calls(o: Options, n_prompts: int # training prompts; fewer than P or C bound a visit
                ) -> int: # pictures
    "Return what a LaSRO run of these sizes has labelled at its end, and so does any arm."
    first = min(o.pretrain_prompts, n_prompts)
    each = min(o.collect_prompts, first)
    return (first+o.outer_steps*each)*o.n_noises*o.num_steps

def part_size(total: int, parts: int, j: int) -> int:
    "Return the size of part j when `total` things are dealt out evenly."
    return (j+1)*total//parts - j*total//parts

class Baseline(Arm):
    "An arm that learns from labelled final samples. A subclass gives `store`, `draw_rows` and `reward_loss`."
    Options = BaselineOptions
    on_policy = False # True: every batch is of the same size and replaces the one before
    undefined = ''    # why there is no such method at one step; empty where there is one
    def __init__(self, task: Task):
        if self.undefined and task.num_steps < 2:
            raise ValueError(f'{type(self).__name__} is not defined at 1 step: {self.undefined}')
        super().__init__(task)
        self.batch = {}
    def prepare(self) -> dict: return self.collect_batch(0)
    def round(self, k: int) -> dict: return Arm.round(self, k) | self.collect_batch(k+1)
    def store(self, found: dict, j: int): self.batch = found # what to keep of batch j

@patch
def n_visits(self: Baseline, j: int) -> int: # 0 comes before the first round
    "Return how many prompts batch j visits, each with N_s noises."
    o = self.options
    n_prompts = len(self.task.texts)
    total = reward_calls(o, n_prompts)//o.n_noises
    each = o.num_steps*min(o.collect_prompts, o.pretrain_prompts, n_prompts)
    if self.on_policy: return part_size(total, o.outer_steps+1, j)
    if not o.online: return 0 if j else total
    return each if j else total-each*o.outer_steps

@patch
def draw_visits(self: Baseline, j: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: # prompt (N,), x_T, injected noise
    "Draw prompts and noise of batch j, visit by visit."
    t, o = self.task, self.options
    g, m = t.stream('collect', j), self.n_visits(j)
    orders = [torch.randperm(len(t.texts), generator=g) for _ in range(1+m//len(t.texts))]
    prompt = torch.cat(orders)[:m].repeat_interleave(o.n_noises)
    noise, injected = t.noise(len(prompt), g)
    if not o.off_policy: noise = noise[::o.n_noises].repeat_interleave(o.n_noises, 0) # one x_T for each visit
    return prompt, noise, injected

@patch
@torch.no_grad()
def collect(self: Baseline, j: int) -> tuple[dict, torch.Tensor]: # inputs, denoised (N, n, C, h, w), rewards, prompt (N,); features by visit
    "Sample, shuffle and label batch j, each process its rows."
    t = self.task
    prompt, noise, injected = self.draw_visits(j)
    n = len(prompt)
    order = torch.randperm(n, generator=t.stream('shuffle', j))
    mine = order[t.own_rows(n)]
    inputs, denoised = [], []
    for b in t.batches(len(mine), default=256):
        i = mine[b]
        found = self.generator(sample, t.pipe.unet, t.cond[prompt[i]], noise[i], injected[:, i], t.num_steps)
        inputs.append(torch.stack(found.inputs, 1))
        denoised.append(torch.stack(found.denoised, 1))
    rewards, features = t.label_steps([z[:, -1:] for z in denoised], [t.texts[p] for p in prompt[mine].tolist()])
    t.budget.reward(n)
    t.budget.forward(n*t.num_steps)
    found = dict(inputs=t.gather(torch.cat(inputs), n).cpu(), denoised=t.gather(torch.cat(denoised), n).cpu(),
                 rewards=t.gather(rewards[:, 0], n).cpu(), prompt=prompt[order])
    return found, t.gather(features, n).cpu()[order.argsort()]

@patch
def collect_batch(self: Baseline, j: int) -> dict: # numbers to log
    "Collect batch j and keep what `store` wants of it."
    if not self.n_visits(j): return {}
    found, features = self.collect(j)
    self.store(found, j)
    if j == 0 and not len(ordered_pairs(found['rewards'], found['prompt'], 0)[0]):
        log.warning('%s gives all samples of each prompt the same reward: there is nothing to learn from yet', self.task.reward.name)
    row, n = dict(reward=float(found['rewards'].mean())), self.options.n_noises
    if features.shape[1] and n > 1: row['diversity'] = diversity(features.view(-1, n, features.shape[1]), self.task.world)
    return row

@patch
def remember(self: Baseline, new: dict, limit: int):
    "Append rows to the batch and forget the oldest beyond `limit`."
    self.batch = {k: torch.cat([self.batch[k], v] if self.batch else [v])[-limit:] for k, v in new.items()}

@patch
def pick(self: Baseline, rows: torch.Tensor, *keys) -> list[torch.Tensor]:
    "Return rows of the batch, on the generator's device."
    return [self.batch[k][rows].to(self.task.device) for k in keys]

@patch
def draw(self: Baseline, k: int, i: int) -> dict:
    "Draw the rows of update i of round k, and the LCM loss's batch."
    return dict(drawn=self.draw_rows(k, i), lcm=self.draw_lcm(k, i) if self.options.c else None)

@patch
def loss(self: Baseline, batch: dict, group: MicroGroup) -> tuple[torch.Tensor, dict]:
    "Return the micro-group's share of the method's loss and of c times the LCM loss."
    loss, numbers = (self.zero_loss(), {}) if batch['drawn'] is None else self.reward_loss(batch['drawn'], group)
    if batch['lcm'] is None: return loss, numbers
    lcm = self.lcm(batch['lcm'], group)
    return loss+self.options.c*lcm, numbers | dict(lcm_loss=lcm)

@patch
def state(self: Baseline) -> dict[str, torch.Tensor]: return Arm.state(self) | {f'batch.{k}': v for k, v in self.batch.items()}

@patch
def restore(self: Baseline, tensors: dict):
    Arm.restore(self, tensors)
    self.batch = {k.removeprefix('batch.'): v.clone() for k, v in tensors.items() if k.startswith('batch.')}

# ---- RLCM
def log_prob(x_next: torch.Tensor, # where the sampler went, (B, C, h, w)
             denoised: torch.Tensor, # f at the state before, (B, C, h, w)
             t_next: int # time of `x_next`
            ) -> torch.Tensor: # (B,)
    "Return the log-likelihood of a step, averaged over the latent's dimensions (nbs/methods.ipynb, 3.1)."
    alpha, sigma, *_ = coefficients(t_next, denoised)
    error = (x_next-alpha*denoised)/sigma
    return (-error.square()/2-sigma.log()-math.log(2*math.pi)/2).flatten(1).mean(1)

class PerPromptStatTracker:
    "Advantages by the newest `history` rewards of each prompt, by the whole batch below `min_count`."
    def __init__(self, history: int = 32, min_count: int = 6):
        self.history, self.min_count = history, min_count
        self.prompt, self.rewards = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    def __call__(self, prompt: torch.Tensor, # (N,) index
                 rewards: torch.Tensor # (N,)
                ) -> torch.Tensor: # (N,) advantages
        self.prompt = torch.cat([self.prompt, prompt])
        self.rewards = torch.cat([self.rewards, rewards])
        out = torch.zeros_like(rewards)
        for p in prompt.unique():
            known = self.rewards[self.prompt == p][-self.history:]
            base = known if len(known) >= self.min_count else rewards
            mine = prompt == p
            out[mine] = (rewards[mine]-base.mean())/(base.std(correction=0)+1e-8)
        return out

def ddpo_loss(log_probs: torch.Tensor, # now, any shape
              old: torch.Tensor, # when the sample was drawn
              advantages: torch.Tensor, # broadcast
              clip_range: float # epsilon
             ) -> torch.Tensor: # the shape of `log_probs`
    "Return DDPO's clipped policy-gradient loss of every step (nbs/methods.ipynb, 3.1)."
    ratio = (log_probs-old).exp()
    clipped = ratio.clamp(1-clip_range, 1+clip_range)
    return torch.maximum(-advantages*ratio, -advantages*clipped)

def ratio_numbers(log_ratio: torch.Tensor, # (B, ...)
                  clip_range: float) -> dict[str, torch.Tensor]: # one number for each row, (B,)
    "Return ratio, approximate KL and share of clipped steps."
    d = log_ratio.detach().flatten(1)
    ratio = d.exp()
    return dict(ratio=ratio.mean(1), approx_kl=d.square().mean(1)/2, clipfrac=((ratio-1).abs() > clip_range).float().mean(1))

class RLCM(Baseline):
    "DDPO for consistency models, official form (nbs/methods.ipynb, 3.1)."
    on_policy, dummy, undefined = True, True, 'no noise is injected, so no step has a likelihood'
    def __init__(self, task: Task):
        super().__init__(task)
        self.tracker = PerPromptStatTracker(self.options.history, self.options.min_count)
    def transitions(self) -> list[tuple[int, int]]: # (t, t') of every trained step
        times = lcm_timesteps(self.task.num_steps)
        return list(zip(times, times[1:]+times[-1:]*self.dummy))

class RLCMDropped(RLCM):
    "RLCM without the dummy last term."
    dummy = False

@patch
def store(self: RLCM, found: dict, j: int):
    "Keep likelihoods of the steps as drawn, and advantages."
    x, z = found['inputs'], found['denoised']
    last = z[:, -1]
    noise = randn(*last.shape, generator=self.task.stream('dummy', j))
    dummy = add_noise(last, noise, self.transitions()[-1][1])
    following = torch.cat([x[:, 1:], dummy[:, None]], 1)[:, :len(self.transitions())]
    old = [log_prob(following[:, s], z[:, s], t) for s, (_, t) in enumerate(self.transitions())]
    limit = self.options.adv_clip
    advantages = self.tracker(found['prompt'], found['rewards']).clamp(-limit, limit)
    self.batch = dict(inputs=x, following=following, log_probs=torch.stack(old, 1), advantages=advantages, prompt=found['prompt'])

@patch
def clip_range(self: RLCM) -> float:
    "Return the half-width of the clip at this latent size."
    return self.options.clip_range*64*64*4/self.batch['inputs'][0, 0].numel()

@patch
def draw_rows(self: RLCM, k: int, i: int) -> torch.Tensor:
    "Return part i of the batch: every sample is used once per round."
    n = len(self.batch['prompt'])
    parts = torch.arange(n).split(-(-n//self.options.generator_steps))
    rows = parts[i % len(parts)]
    self.task.budget.forward(len(rows)*len(self.transitions()), backward=True)
    return rows

@patch
def reward_loss(self: RLCM, drawn: torch.Tensor, group: MicroGroup) -> tuple[torch.Tensor, dict]:
    "Return the clipped loss on the micro-group's rows."
    t, n = self.task, len(drawn)
    rows = drawn[group.rows(n)]
    if not len(rows): return self.zero_loss(), {}
    x, following, old, advantages = self.pick(rows, 'inputs', 'following', 'log_probs', 'advantages')
    cond = t.cond[self.batch['prompt'][rows]]
    new = [log_prob(following[:, s], denoise(t.pipe.unet, x[:, s], a, cond), b) for s, (a, b) in enumerate(self.transitions())]
    new = torch.stack(new, 1)
    loss = group.mean(ddpo_loss(new, old, advantages[:, None], self.clip_range()).mean(1), n)
    numbers = {k: group.mean(v, n) for k, v in ratio_numbers(new-old, self.clip_range()).items()}
    return loss, dict(policy_loss=loss, **numbers)

@patch
def state(self: RLCM) -> dict[str, torch.Tensor]:
    return Baseline.state(self) | {'tracker.prompt': self.tracker.prompt, 'tracker.rewards': self.tracker.rewards}

@patch
def restore(self: RLCM, tensors: dict):
    Baseline.restore(self, tensors)
    self.tracker.prompt = tensors['tracker.prompt'].clone()
    self.tracker.rewards = tensors['tracker.rewards'].clone()

# ---- learning from pairs
class Paired(Baseline):
    "An arm that learns from pairs of samples."
    def __init__(self, task: Task):
        self.copy = None if task.options.lora_rank else copy.deepcopy(task.pipe.unet).requires_grad_(False)
        super().__init__(task)
    @contextmanager
    def reference(self):
        "The UNet as it was before the run, without gradient."
        with torch.no_grad():
            if self.copy: yield self.copy
            else:
                with adapters_off(self.task.pipe.unet) as unet: yield unet

@patch
def draw_pairs(self: Paired, k: int, i: int) -> torch.Tensor | None: # (2, n) rows: winners, losers; None if every reward is a tie
    "Draw half a batch of pairs for update i of round k."
    winners, losers, _ = ordered_pairs(self.batch['rewards'], self.batch['prompt'], self.options.min_gap)
    if not len(winners): return None
    chosen = torch.randint(len(winners), (max(1, self.options.batch_size//2),), generator=self.task.stream('pairs', k, i))
    return torch.stack([winners[chosen], losers[chosen]])

def dpo_margin(won: torch.Tensor, lost: torch.Tensor, # errors of the policy on winners and losers, (N,)
               ref_won: torch.Tensor, ref_lost: torch.Tensor, # of the reference, (N,)
               beta: float) -> torch.Tensor: # (N,); the loss is -log sigmoid of it
    "Return Diffusion-DPO's margin (nbs/methods.ipynb, 3.4)."
    return -beta/2*((won-lost)-(ref_won-ref_lost))

class DiffusionDPO(Paired):
    "Diffusion-DPO on the model's own samples, at the sampler's times."
    def store(self, found: dict, j: int):
        kept = dict(latents=found['denoised'][:, -1], rewards=found['rewards'], prompt=found['prompt'])
        self.remember(kept, self.options.buffer)

@patch
def draw_rows(self: DiffusionDPO, k: int, i: int) -> dict | None:
    "Draw pairs; both of a pair get one noise and one of the sampler's times."
    t, pairs = self.task, self.draw_pairs(k, i)
    if pairs is None: return None
    g, n = t.stream('dpo', k, i), pairs.shape[1]
    times = torch.tensor(lcm_timesteps(t.num_steps))[torch.randint(t.num_steps, (n,), generator=g)]
    noise = randn(n, *t.noise_shape, generator=g)
    t.budget.forward(2*n)
    t.budget.forward(2*n, backward=True)
    return dict(pairs=pairs, times=times, noise=noise)

@patch
def reward_loss(self: DiffusionDPO, drawn: dict, group: MicroGroup) -> tuple[torch.Tensor, dict]:
    "Return -log sigmoid of the margins; the mean over the batch is taken outside the logarithm."
    t, n = self.task, drawn['pairs'].shape[1]
    mine = group.rows(n)
    if not len(mine): return self.zero_loss(), {}
    rows = drawn['pairs'][:, mine].flatten()
    latents, = self.pick(rows, 'latents')
    cond = t.cond[self.batch['prompt'][rows]]
    noise = drawn['noise'][mine].repeat(2, 1, 1, 1).to(latents)
    times = drawn['times'][mine].repeat(2).to(latents.device)
    x = add_noise(latents, noise, times)
    def errors(unet): return (predict_noise(unet, x, times, cond)-noise).square().flatten(1).mean(1).chunk(2)
    with self.reference() as unet: reference = errors(unet)
    margin = dpo_margin(*errors(t.pipe.unet), *reference, self.options.dpo_beta)
    loss = group.mean(-F.logsigmoid(margin), n)
    return loss, dict(policy_loss=loss, pair_accuracy=group.mean((margin > 0).float(), n))

def pso_margin(log_ratio_w: torch.Tensor, log_ratio_l: torch.Tensor, # of winners and losers, same shape
               beta: float, clip: float # epsilon
              ) -> torch.Tensor: # the same shape; the loss is -log sigmoid of it
    "Return online PSO's margin (nbs/methods.ipynb, 3.3); outside the clip its gradient is 0."
    low, high = math.log(1-clip), math.log(1+clip)
    return beta*(log_ratio_w.clamp(low, high)-log_ratio_l.clamp(low, high))

class PSO(Paired):
    "Online pairwise sample optimisation."
    on_policy, undefined = True, 'no noise is injected, so no step is stochastic'
    def store(self, found: dict, j: int): self.batch = {k: found[k] for k in ('inputs', 'rewards', 'prompt')}
    def transitions(self) -> list[tuple[int, int]]: # (t, t') of the stochastic steps
        times = lcm_timesteps(self.task.num_steps)
        return list(zip(times, times[1:]))

@patch
def log_probs(self: PSO, unet, x: torch.Tensor, # what the UNet saw, (B, n, C, h, w)
              cond) -> torch.Tensor: # (B, n - 1)
    "Return the likelihood of each stochastic step under `unet`."
    steps = [log_prob(x[:, s+1], denoise(unet, x[:, s], a, cond), b) for s, (a, b) in enumerate(self.transitions())]
    return torch.stack(steps, 1)

@patch
def draw_rows(self: PSO, k: int, i: int) -> torch.Tensor | None:
    "Draw pairs of trajectories of this round."
    pairs = self.draw_pairs(k, i)
    if pairs is None: return None
    passes = pairs.numel()*len(self.transitions())
    self.task.budget.forward(passes)
    self.task.budget.forward(passes, backward=True)
    return pairs

@patch
def reward_loss(self: PSO, drawn: torch.Tensor, group: MicroGroup) -> tuple[torch.Tensor, dict]:
    "Return -log sigmoid of the clipped margins."
    t, o, n = self.task, self.options, drawn.shape[1]
    mine = group.rows(n)
    if not len(mine): return self.zero_loss(), {}
    rows = drawn[:, mine].flatten()
    x, = self.pick(rows, 'inputs')
    cond = t.cond[self.batch['prompt'][rows]]
    with self.reference() as unet: old = self.log_probs(unet, x, cond)
    log_ratio = self.log_probs(t.pipe.unet, x, cond)-old
    margin = pso_margin(*log_ratio.chunk(2), o.pso_beta, o.pso_clip)
    loss = group.mean(-F.logsigmoid(margin).mean(1), n)
    numbers = {k: group.mean(v, 2*n) for k, v in ratio_numbers(log_ratio, o.pso_clip).items()}
    return loss, dict(policy_loss=loss, **numbers)

# ---- GORS
def gors_weights(rewards: torch.Tensor, # (N,)
                 top: float # share to keep
                ) -> torch.Tensor: # (N,) weights; 0 where not kept, mean 1 over the kept
    "Return weights for rewards of any range (nbs/methods.ipynb, 3.5)."
    kept = rewards >= rewards.quantile(1-top, interpolation='higher')
    weights = (rewards-rewards.min())*kept
    return weights/weights[kept].mean() if weights.any() else kept.float()

class GORS(Baseline):
    "GORS-LCM: distillation on the model's own best samples."
    def store(self, found: dict, j: int):
        kept = dict(latents=found['denoised'][:, -1], rewards=found['rewards'], prompt=found['prompt'])
        self.remember(kept, self.options.buffer)

@patch
def draw_rows(self: GORS, k: int, i: int) -> dict:
    "Draw samples by weight, with times and noise."
    t, o = self.task, self.options
    g = t.stream('gors', k, i)
    n = o.batch_size
    rows = torch.multinomial(gors_weights(self.batch['rewards'], o.top), n, replacement=True, generator=g)
    times, noise = draw_lcm_noise(n, t.noise_shape, g)
    if o.gors_form == 'x0': times = torch.tensor(lcm_timesteps(t.num_steps))[torch.randint(t.num_steps, (n,), generator=g)]
    t.budget.forward(n, backward=True)
    if o.gors_form == 'lcm': t.budget.forward(3*n) # guided teacher, target
    return dict(rows=rows, times=times, noise=noise)

@patch
def reward_loss(self: GORS, drawn: dict, group: MicroGroup) -> tuple[torch.Tensor, dict]:
    "Return the LCM loss or the regression on the drawn samples."
    t, n = self.task, len(drawn['rows'])
    mine = group.rows(n)
    if not len(mine): return self.zero_loss(), {}
    rows, times, noise = (drawn[k][mine] for k in ('rows', 'times', 'noise'))
    latents, = self.pick(rows, 'latents')
    cond = t.cond[self.batch['prompt'][rows]]
    if self.options.gors_form == 'lcm':
        loss = lcm_loss(t.pipe.unet, t.pipe.unet, t.teacher, latents, times, noise, cond, t.guidance_scale).expand(len(rows))
    else:
        x = add_noise(latents, noise.to(latents), times)
        loss = (denoise(t.pipe.unet, x, times, cond)-latents).square().flatten(1).mean(1)
    loss = group.mean(loss, n)
    return loss, dict(policy_loss=loss)
