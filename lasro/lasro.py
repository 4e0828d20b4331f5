"""LaSRO: the score normaliser S, the surrogate's training, the generator's loss, one round."""
import logging
from dataclasses import fields

import torch
from fastcore.basics import patch
from scipy.stats import spearmanr

from .evaluation import diversity
from .exploration import Labelled, ReplayBuffer, draw_exploration, pairs_within
from .sampling import sample
from .surrogate import make_surrogate, octave_noise, surrogate_loss
from .task import MicroGroup, Task
from .training import Arm, Trained

log = logging.getLogger('lasro')

class ScoreNormaliser:
    "S, form 'a', 'b' or 'none' (nbs/methods.ipynb, 2.2). It never looks at its own batch: `set` and `move` change its statistics."
    def __init__(self, form: str = 'a', decay: float = .9, clip: float = 2.):
        self.form, self.decay, self.clip, self.stats = form, decay, clip, None
    def __call__(self, r: torch.Tensor # rewards, (B,)
                ) -> torch.Tensor: # (B,)
        if self.form == 'none': return r
        mean, top, std = self.stats.to(r)
        if self.form == 'a': return ((r-mean)/(top-mean+1e-8)).clamp(max=1)
        return ((r-mean)/(std+1e-8)).clamp(-self.clip, self.clip)
    def statistics(self, scores: torch.Tensor) -> torch.Tensor: # mean, maximum, deviation
        d = scores.detach().float()
        return torch.stack([d.mean(), d.max(), d.std(correction=0)])
    def set(self, scores: torch.Tensor # of the newest samples
           ):
        "Take the statistics of these scores."
        self.stats = self.statistics(scores)
    def move(self, scores: torch.Tensor # of a finished update
            ):
        "Move the statistics towards those of these scores."
        now = self.statistics(scores)
        self.stats = now if self.stats is None else torch.lerp(now, self.stats.to(now), self.decay)

class LaSRO(Arm):
    "Latent-space surrogate reward optimisation (nbs/methods.ipynb, 2)."
    def __init__(self, task: Task):
        super().__init__(task)
        o = self.options
        torch.manual_seed(task.seed) # the head's initial weights
        network = make_surrogate(o.backbone, task.teacher, task.pipe.vae, lora_rank=o.surrogate_rank).to(task.device)
        self.surrogate = Trained(task, network, o.surrogate_lr, betas=(.9, .99))
        self.share = .5 if o.backbone == 'unet' else 1. # of a UNet pass
        self.buffer = ReplayBuffer(o.buffer, o.min_gap)
        self.normalise = [ScoreNormaliser(o.s_form) for _ in range(task.num_steps)]
        self.weights = {j: w for j, w in enumerate([o.c1]*(task.num_steps-1)+[o.c2]) if w} # of the reward after step j

# ---- exploration
@patch
@torch.no_grad()
def explore(self: LaSRO, prompt: torch.Tensor, # (P,) indices
            g: torch.Generator) -> tuple[Labelled, torch.Tensor]: # labelled latents of every step, features of the last pictures (N, F)
    "Sample every prompt N_s times, each process its rows, and label the clean latents of every step."
    t, o, n_steps = self.task, self.options, self.task.num_steps
    index, noise, injected = draw_exploration(prompt, o.n_noises, n_steps, t.noise_shape, g, o.off_policy)
    noise, injected = noise.to(t.device), injected.to(t.device)
    n, mine = len(index), t.own_rows(len(index))
    latents = []
    for b in t.batches(len(mine)):
        i = mine[b]
        z = self.generator(sample, t.pipe.unet, t.cond[index[i]], noise[i], injected[:, i], n_steps).denoised
        latents.append(torch.stack(z, 1))
    rewards, features = t.label_steps(latents, [t.texts[p] for p in index[mine].tolist()])
    latents = t.gather(torch.cat(latents), n).transpose(0, 1).flatten(0, 1)
    rewards = t.gather(rewards, n).T.flatten().cpu()
    step = torch.arange(n_steps).repeat_interleave(n)
    return Labelled(latents, rewards, index.repeat(n_steps), step), t.gather(features, n).cpu()

@patch
def collect(self: LaSRO, name, # of the random stream: a round, or 'pretrain'
            n_prompts: int) -> tuple[Labelled, torch.Tensor]: # labelled latents, features of the last pictures
    "Label samples of random prompts; after the first time only prompts that the buffer holds."
    t = self.task
    g = t.stream('collect', name)
    known = torch.arange(len(t.texts)) if self.buffer.samples is None else self.buffer.samples.prompt.unique()
    prompt = known[torch.randperm(len(known), generator=g)[:n_prompts]]
    found, features = self.explore(prompt, g)
    t.budget.reward(len(found))
    t.budget.forward(len(found))
    return found, features

# ---- the surrogate
@patch
def pairs_of(self: LaSRO, rows: torch.Tensor # of the buffer, one micro-group's
            ) -> tuple[torch.Tensor, torch.Tensor]: # winners, losers: indices into `rows`
    "Pair a micro-group's samples; what counts as a clear gap is measured on the whole buffer."
    s = self.buffer.samples[rows.to(self.buffer.samples.prompt.device)]
    return pairs_within(s.rewards, s.prompt, s.step, self.options.pairs, self.options.min_gap, self.buffer.scale)

@patch
def surrogate_batch(self: LaSRO, name, i: int, # round and number of the update
                    prompts: torch.Tensor | None) -> dict: # rows of the buffer, noisy latents, and pairs for each micro-group
    "Draw groups from the buffer and deal them out to micro-groups; pairs are formed inside each."
    o, g = self.options, self.task.stream('surrogate', name, i)
    buffer, size = self.buffer, max(2, o.n_noises) if o.pairs == 'within' else o.n_noises
    rows, *_ = buffer.draw(o.groups, size, g, prompts, o.pairs)
    latents = octave_noise(buffer.samples.latents[rows], o.smooth, g)
    owner = buffer.samples.prompt[rows].unique(return_inverse=True)[1] % o.micro_groups # whole prompts in one micro-group
    parts = [(owner == m).nonzero()[:, 0] for m in range(o.micro_groups)]
    pairs = [self.pairs_of(rows[part]) for part in parts]
    n_pairs = sum(len(winners) for winners, _ in pairs)
    return dict(rows=rows, latents=latents, parts=parts, pairs=pairs, n_pairs=n_pairs)

@patch
def train_surrogate(self: LaSRO, name, steps: int, prompts: torch.Tensor | None = None) -> list[float]: # losses
    "Make Bradley-Terry updates on groups of `prompts`, or of all, in the buffer."
    t, losses = self.task, []
    for i in range(steps):
        batch = self.surrogate_batch(name, i, prompts)
        if not batch['n_pairs']: continue # every reward is a tie
        row = self.surrogate.update(lambda group: self.surrogate_share(batch, group))
        losses.append(row['surrogate_loss'])
        t.budget.forward(len(batch['rows']), backward=True, share=self.share)
    return losses

@patch
def surrogate_share(self: LaSRO, batch: dict, group: MicroGroup) -> tuple[torch.Tensor, dict]:
    "Return a micro-group's share of the mean Bradley-Terry loss over all pairs."
    part = batch['parts'][group.index]
    winners, losers = batch['pairs'][group.index]
    part = part if len(part) else torch.zeros(1, dtype=torch.long) # without pairs the loss of any row is 0
    cond = self.task.cond[self.buffer.samples.prompt[batch['rows'][part]]]
    loss = surrogate_loss(self.surrogate.network, batch['latents'][part], cond, winners, losers)
    share = loss*len(winners)*group.count/batch['n_pairs']
    return share, dict(surrogate_loss=share)

@patch
@torch.no_grad()
def score(self: LaSRO, found: Labelled) -> torch.Tensor: # (N,), on the CPU
    "Return the surrogate's rewards of labelled latents."
    t, n = self.task, len(found)
    mine = t.own_rows(n)
    parts = []
    for b in t.batches(len(mine), default=256):
        i = mine[b]
        parts.append(self.surrogate(self.surrogate.network, found.latents[i], t.cond[found.prompt[i]]))
    return t.gather(torch.cat(parts), n).float().cpu()

@patch
def set_statistics(self: LaSRO, found: Labelled # the newest samples
                  ):
    "Set S anew after the surrogate has changed."
    scores = self.score(found)
    for j, s in enumerate(self.normalise): s.set(scores[found.step == j])

# ---- is the surrogate still right?
def rank_correlation(scores: torch.Tensor, rewards: torch.Tensor, prompt: torch.Tensor) -> float: # nan where no prompt has two different rewards
    "Return the mean Spearman correlation within prompts."
    rho = []
    for p in prompt.unique():
        a, b = scores[prompt == p], rewards[prompt == p]
        if a.std(correction=0) > 0 and b.std(correction=0) > 1e-6: rho.append(spearmanr(a, b).statistic)
    return float(sum(rho)/len(rho)) if rho else float('nan')

@patch
def health(self: LaSRO, found: Labelled, # fresh samples, which the surrogate has not been trained on
           features: torch.Tensor # of their last pictures, (N, F)
          ) -> dict:
    "Return the true reward after the first and the last step, the rank correlation and the diversity."
    last, n = found.step == found.step.max(), self.options.n_noises
    rho = rank_correlation(self.score(found)[last], found.rewards[last], found.prompt[last])
    out = dict(reward=float(found.rewards[last].mean()), reward_first=float(found.rewards[found.step == 0].mean()), rank_correlation=rho)
    if features.shape[1] and n > 1: out['diversity'] = diversity(features.view(-1, n, features.shape[1]), self.task.world)
    return out

# ---- stage A
@patch
def prepare(self: LaSRO) -> dict:
    "Label samples of the untouched model and pre-train the surrogate."
    o = self.options
    found, features = self.collect('pretrain', o.pretrain_prompts)
    self.buffer.add(found)
    if o.n_noises > 1 and not len(self.buffer.winners):
        log.warning('%s gives all samples of each prompt the same reward: there is nothing to learn from yet', self.task.reward.name)
    losses = self.train_surrogate('pretrain', o.pretrain_steps)
    self.set_statistics(found)
    row = dict(surrogate_loss=sum(losses[-10:])/max(1, len(losses[-10:])), pairs=len(self.buffer.winners), dropped=self.buffer.dropped)
    return row | self.health(found, features)

# ---- stage B
@patch
def draw(self: LaSRO, k: int, i: int) -> dict:
    "Draw prompts and noise of one generator update, and the LCM loss's batch."
    t, o = self.task, self.options
    g = t.stream('generator', k, i)
    prompt = torch.randint(len(t.texts), (o.batch_size,), generator=g)
    noise, injected = t.noise(o.batch_size, g)
    t.budget.forward(o.batch_size*t.num_steps, backward=True)
    t.budget.forward(o.batch_size*len(self.weights), backward=True, share=self.share)
    return dict(prompt=prompt, noise=noise, injected=injected, lcm=self.draw_lcm(k, i) if o.c else None)

@patch
def reward_gradient(self: LaSRO, latents: list[torch.Tensor], # z_j, (B, C, h, w), of every step j that is rewarded
                    cond, # of the B prompts
                    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]: # d(sum of -w_j S_j)/dz, R_j, S_j
    "Differentiate the weighted rewards with respect to the latents; the surrogate's own weights get no gradient."
    steps = list(self.weights)
    z = torch.cat([latents[j].detach() for j in steps]).requires_grad_()
    together = cond.cat([cond]*len(steps))
    with torch.enable_grad():
        r = self.surrogate(self.surrogate.network, z, together).float().chunk(len(steps))
        s = [self.normalise[j](x) for j, x in zip(steps, r)]
        loss = -sum(self.weights[j]*x.sum() for j, x in zip(steps, s))
    gradient, = torch.autograd.grad(loss, z)
    return gradient, [x.detach() for x in r], [x.detach() for x in s]

@patch
def reward_loss(self: LaSRO, batch: dict, group: MicroGroup) -> tuple[torch.Tensor, dict]:
    "Return the micro-group's share of -c1 S(R(z_1)) - c2 S(R(z_2)), with the surrogate's gradient carried into the generator."
    t, n = self.task, len(batch['prompt'])
    rows = group.rows(n)
    cond = t.cond[batch['prompt'][rows]]
    z = sample(t.pipe.unet, cond, batch['noise'][rows], batch['injected'][:, rows], t.num_steps, self.options.detach).denoised
    gradient, r, s = self.reward_gradient(z, cond)
    for j, x in zip(self.weights, r): self.scores[j].append(x)
    rewarded = torch.cat([z[j] for j in self.weights])
    carried = (rewarded*(gradient*group.count/n)).sum() # its gradient is the reward's; its value means nothing
    numbers = dict(surrogate=group.mean(r[-1], n), clipped=group.mean((s[-1] >= 1).float(), n))
    return carried, numbers

@patch
def loss(self: LaSRO, batch: dict, group: MicroGroup) -> tuple[torch.Tensor, dict]:
    "Return the micro-group's share of L(theta)."
    rewarded = self.weights and len(group.rows(len(batch['prompt'])))
    loss, numbers = self.reward_loss(batch, group) if rewarded else (self.zero_loss(), {})
    if batch['lcm'] is None: return loss, numbers
    lcm = self.lcm(batch['lcm'], group)
    return self.options.c*lcm+loss, numbers | dict(lcm_loss=lcm)

@patch
def update(self: LaSRO, k: int, i: int) -> dict:
    "Make one generator update; then its scores move S."
    self.scores = {j: [] for j in self.weights}
    row = Arm.update(self, k, i)
    for j, found in self.scores.items():
        self.normalise[j].move(self.task.gather_uneven(torch.cat(found)))
    return row

@patch
def round(self: LaSRO, k: int) -> dict:
    "Make one round: generator, collection, surrogate."
    row = Arm.round(self, k)
    found, features = self.collect(k, self.options.collect_prompts)
    row |= self.health(found, features)
    if not self.options.online: return row
    self.buffer.add(found)
    losses = self.train_surrogate(k, self.options.surrogate_steps, found.prompt.unique())
    self.set_statistics(found)
    return row | dict(surrogate_loss=sum(losses)/max(1, len(losses)))

# ---- checkpoints
@patch
def state(self: LaSRO) -> dict[str, torch.Tensor]:
    "Return all that a resumed run needs, by name."
    out = Arm.state(self) | self.surrogate.state('surrogate.')
    out |= {f'buffer.{name}': v for name, v in vars(self.buffer.samples).items()}
    return out | {f'normalise.{j}': s.stats for j, s in enumerate(self.normalise) if s.stats is not None}

@patch
def restore(self: LaSRO, tensors: dict):
    "Undo `state`."
    Arm.restore(self, tensors)
    self.surrogate.restore(tensors, 'surrogate.')
    self.buffer.samples = None
    self.buffer.add(Labelled(*(tensors[f'buffer.{f.name}'] for f in fields(Labelled))))
    self.buffer.samples.latents = self.buffer.samples.latents.to(self.task.device)
    for j, s in enumerate(self.normalise): s.stats = tensors.get(f'normalise.{j}')
