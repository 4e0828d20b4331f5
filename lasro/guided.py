"""Two methods that follow a reward's gradient as LaSRO does: RG-LCD's latent proxy, and the true reward where it can be differentiated."""
import torch
import torch.nn.functional as F
from fastcore.basics import patch
from torch.utils.checkpoint import checkpoint

from .baselines import Baseline, part_size, reward_calls
from .lasro import ScoreNormaliser
from .models import decode
from .sampling import add_noise, denoise, draw_lcm_noise, lcm_target, pseudo_huber, sample
from .surrogate import make_surrogate, rank_accuracy
from .task import MicroGroup, Task
from .training import Arm, Trained

def pair_kl(expert: torch.Tensor, latent: torch.Tensor # scores of M sets of J latents, (M, J)
           ) -> torch.Tensor: # (M,)
    "Return the mean KL over all pairs within each set (nbs/methods.ipynb, 3.6)."
    a, b = torch.combinations(torch.arange(expert.shape[1])).T
    e = expert[:, a]-expert[:, b]
    d = latent[:, a]-latent[:, b]
    p = e.sigmoid()
    cross = F.binary_cross_entropy_with_logits(d, p, reduction='none')
    entropy = F.binary_cross_entropy_with_logits(e, p, reduction='none')
    return (cross-entropy).mean(1)

class RewardGuided(Baseline):
    "After RG-LCD: the LCM loss with a reward on one-step predictions, by a latent proxy (nbs/methods.ipynb, 3.6)."
    def __init__(self, task: Task):
        super().__init__(task)
        o = self.options
        torch.manual_seed(task.seed) # the head's initial weights
        network = make_surrogate(o.backbone, task.teacher, task.pipe.vae, lora_rank=o.surrogate_rank).to(task.device)
        self.proxy = Trained(task, network, o.surrogate_lr, betas=(.9, .99))
        self.share = .5 if o.backbone == 'unet' else 1. # of a UNet pass

@patch
def one_step(self: RewardGuided, rows: torch.Tensor, # of the task's data
             times: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: # the student's prediction, the target's
    "Predict clean latents in one step from the task's latents, diffused to random times."
    t = self.task
    latents, cond = t.data[0][rows], t.cond[t.data[1][rows]]
    times = times.to(latents.device)
    x = add_noise(latents, noise.to(latents), times)
    target = lcm_target(t.pipe.unet, t.teacher, x, times, cond, t.guidance_scale)
    return denoise(t.pipe.unet, x, times, cond), target

@patch
@torch.no_grad()
def collect_sets(self: RewardGuided, j: int, m: int) -> tuple[dict, float]: # latents (m, 4, C, h, w), rewards (m, 4), prompt (m,)
    "Label `m` sets of four latents: student's and target's one-step prediction, the data's latent, a fresh sample."
    t, g = self.task, self.task.stream('collect', j)
    rows = torch.randint(len(t.data[0]), (m,), generator=g)
    times, noise = draw_lcm_noise(m, t.noise_shape, g)
    x_T, injected = t.noise(m, g)
    prompt, mine = t.data[1][rows], t.own_rows(m)
    latents = []
    for b in t.batches(len(mine), default=128):
        i = mine[b]
        both = self.generator(self.one_step, rows[i], times[i], noise[i])
        fresh = self.generator(sample, t.pipe.unet, t.cond[prompt[i]], x_T[i], injected[:, i], t.num_steps).final
        latents.append(torch.stack([*both, t.data[0][rows[i]], fresh], 1))
    rewards, _ = t.label_steps(latents, [t.texts[p] for p in prompt[mine].tolist()])
    t.budget.reward(4*m)
    t.budget.forward((4+t.num_steps)*m)
    return dict(latents=t.gather(torch.cat(latents), m).cpu(), rewards=t.gather(rewards, m).cpu(), prompt=prompt)

@patch
def proxy_share(self: RewardGuided, rows: torch.Tensor, # sets
                group: MicroGroup) -> tuple[torch.Tensor, dict]:
    "Return the micro-group's share of the mean KL, with the expert's rewards in units of their deviation."
    n = len(rows)
    mine = group.rows(n)
    rows = rows[mine if len(mine) else [0]] # a micro-group without sets takes part with a loss of 0
    latents, expert = self.pick(rows, 'latents', 'rewards')
    cond = self.task.cond[self.batch['prompt'][rows].repeat_interleave(4)]
    scores = self.proxy.network(latents.flatten(0, 1), cond).view(-1, 4)
    scale = self.batch['rewards'].std(correction=0)+1e-8
    loss = group.mean(pair_kl(expert/scale, scores), n)*bool(len(mine))
    return loss, dict(proxy_loss=loss)

@patch
def train_proxy(self: RewardGuided, j: int, steps: int) -> list[float]: # losses
    "Make KL updates on random sets, each on as many latents as an update of LaSRO's surrogate."
    t, o, losses = self.task, self.options, []
    n = max(1, o.groups*o.n_noises//4)
    for i in range(steps):
        rows = torch.randint(len(self.batch['prompt']), (n,), generator=t.stream('proxy', j, i))
        losses.append(self.proxy.update(lambda group: self.proxy_share(rows, group))['proxy_loss'])
        t.budget.forward(4*n, backward=True, share=self.share)
    return losses

@patch
def collect_batch(self: RewardGuided, j: int) -> dict: # numbers to log
    "Collect as many sets as the calls so far allow (up to 3 calls stay unspent), then train the proxy."
    t, o = self.task, self.options
    before = o.n_noises*sum(self.n_visits(i) for i in range(j))
    after = before+o.n_noises*self.n_visits(j)
    if after//4 == before//4: return {}
    new = self.collect_sets(j, after//4-before//4)
    r = new['rewards']
    group = torch.arange(len(r)).repeat_interleave(4)
    cond = t.cond[new['prompt'].repeat_interleave(4)]
    accuracy = self.proxy(rank_accuracy, self.proxy.network, new['latents'].flatten(0, 1).to(t.device), cond, r.flatten(), group)
    self.remember(new, o.buffer//4)
    losses = self.train_proxy(j, o.surrogate_steps if j else o.pretrain_steps)
    row = dict(reward=float(r[:, 3].mean()), reward_one_step=float(r[:, 0].mean()), rank_accuracy=accuracy)
    return row | dict(proxy_loss=sum(losses)/max(1, len(losses)))

@patch
def draw(self: RewardGuided, k: int, i: int) -> dict:
    "Draw rows of the data, times and noise, and count the passes."
    t, n = self.task, self.options.batch_size
    g = t.stream('generator', k, i)
    rows = torch.randint(len(t.data[0]), (n,), generator=g)
    times, noise = draw_lcm_noise(n, t.noise_shape, g)
    t.budget.forward(n, backward=True)
    t.budget.forward(3*n) # guided teacher, target
    t.budget.forward(n, backward=True, share=self.share)
    return dict(rows=rows, times=times, noise=noise)

@patch
def loss(self: RewardGuided, batch: dict, group: MicroGroup) -> tuple[torch.Tensor, dict]:
    "Return the micro-group's share of c times the LCM loss less c2 times the proxy's reward of the same predictions."
    t, o, n = self.task, self.options, len(batch['rows'])
    mine = group.rows(n)
    if not len(mine): return self.zero_loss(), {}
    rows = batch['rows'][mine]
    student, target = self.one_step(rows, batch['times'][mine], batch['noise'][mine])
    z = student.detach().requires_grad_()
    r = self.proxy(self.proxy.network, z, t.cond[t.data[1][rows]]).float()
    gradient, = torch.autograd.grad(-o.c2*r.sum(), z)
    carried = (student*(gradient*group.count/n)).sum()
    lcm = group.mean(pseudo_huber(student-target).expand(len(rows)), n)
    return o.c*lcm+carried, dict(lcm_loss=lcm, surrogate=group.mean(r.detach(), n))

@patch
def state(self: RewardGuided) -> dict[str, torch.Tensor]: return Baseline.state(self) | self.proxy.state('proxy.')

@patch
def restore(self: RewardGuided, tensors: dict):
    Baseline.restore(self, tensors)
    self.proxy.restore(tensors, 'proxy.')

class Direct(Baseline):
    "Back-propagation of the true reward through the decoder and all steps (nbs/methods.ipynb, 3.7)."
    def __init__(self, task: Task):
        o, n = task.options, task.num_steps
        if not task.reward.differentiable:
            raise ValueError(f'direct is not defined for {task.reward.name}: it states no gradient; set differentiable=True on a reward that has one')
        super().__init__(task)
        self.weights = {j: w for j, w in enumerate([o.c1]*(n-1)+[o.c2]) if w}
        self.normalise = {j: ScoreNormaliser(o.s_form) for j in self.weights}
        if o.outer_steps and not self.n_samples(-1, o.generator_steps-1):
            raise ValueError('direct has fewer reward calls than updates: raise n_noises or lower generator_steps')
    def collect_batch(self, j: int) -> dict: return {}

@patch
def n_samples(self: Direct, k: int, i: int) -> int:
    "Return the samples of update i of round k; `prepare` takes the last of round -1."
    o = self.options
    total = reward_calls(o, len(self.task.texts))//len(self.weights)
    return part_size(total, o.outer_steps*o.generator_steps+1, k*o.generator_steps+i+1)

@patch
def draw_rows(self: Direct, k: int, i: int) -> dict:
    "Draw prompts and noise of update i of round k."
    t, n = self.task, self.n_samples(k, i)
    g = t.stream('generator', k, i)
    prompt = torch.randint(len(t.texts), (n,), generator=g)
    noise, injected = t.noise(n, g)
    t.budget.reward(n*len(self.weights))
    t.budget.forward(n*t.num_steps, backward=k >= 0)
    return dict(prompt=prompt, noise=noise, injected=injected)

@patch
def true_rewards(self: Direct, z: torch.Tensor, # (B, C, h, w)
                 texts: list[str]) -> torch.Tensor: # (B,)
    "Score with gradient, `sample_batch` pictures at a time; if these are not all, each part is computed again in the backward pass."
    t = self.task
    size = self.options.sample_batch or len(z)
    def score(z, texts): return t.reward(decode(t.pipe.vae, z), texts)[0]
    if len(z) <= size: return score(z, texts)
    parts = [checkpoint(score, part, texts[i*size:(i+1)*size], use_reentrant=False) for i, part in enumerate(z.split(size))]
    return torch.cat(parts)

@patch
def rewarded(self: Direct, drawn: dict, rows: torch.Tensor) -> dict[int, torch.Tensor]: # step: rewards (B,)
    "Sample rows of a drawn batch and score the steps that have a weight."
    t = self.task
    prompt = drawn['prompt'][rows]
    texts = [t.texts[p] for p in prompt.tolist()]
    z = sample(t.pipe.unet, t.cond[prompt], drawn['noise'][rows], drawn['injected'][:, rows], t.num_steps, self.options.detach).denoised
    return {j: self.true_rewards(z[j], texts) for j in self.weights}

def _reward_names(num_steps: int) -> dict[int, str]: # step: name in the log
    return {num_steps-1: 'reward'} | ({0: 'reward_first'} if num_steps > 1 else {})

@patch
@torch.no_grad()
def prepare(self: Direct) -> dict:
    "Score a batch of the untouched model, to set S."
    t, drawn = self.task, self.draw_rows(-1, self.options.generator_steps-1)
    n = len(drawn['prompt'])
    r = self.generator(self.rewarded, drawn, t.own_rows(n))
    r = {j: t.gather(x.float(), n) for j, x in r.items()}
    for j, s in self.normalise.items(): s.set(r[j])
    return {name: float(r[j].mean()) for j, name in _reward_names(t.num_steps).items() if j in r}

@patch
def reward_loss(self: Direct, drawn: dict, group: MicroGroup) -> tuple[torch.Tensor, dict]:
    "Return the micro-group's share of LaSRO's loss, with the true reward."
    t, n = self.task, len(drawn['prompt'])
    rows = group.rows(n)
    if not len(rows): return self.zero_loss(), {}
    r = self.rewarded(drawn, rows)
    for j, x in r.items(): self.scores[j].append(x.detach())
    loss = -sum(w*group.mean(self.normalise[j](r[j]), n) for j, w in self.weights.items())
    names = _reward_names(t.num_steps)
    return loss, {name: group.mean(r[j].detach(), n) for j, name in names.items() if j in r}

@patch
def update(self: Direct, k: int, i: int) -> dict:
    "Make one update; then its scores move S."
    self.scores = {j: [] for j in self.weights}
    row = Arm.update(self, k, i)
    for j, found in self.scores.items(): self.normalise[j].move(self.task.gather_uneven(torch.cat(found)))
    return row

@patch
def state(self: Direct) -> dict[str, torch.Tensor]:
    return Baseline.state(self) | {f'normalise.{j}': s.stats for j, s in self.normalise.items() if s.stats is not None}

@patch
def restore(self: Direct, tensors: dict):
    Baseline.restore(self, tensors)
    for j, s in self.normalise.items(): s.stats = tensors.get(f'normalise.{j}')
