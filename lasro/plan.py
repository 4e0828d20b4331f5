"""Transitional: split by definition."""
from itertools import product
from pathlib import Path
import time
from .finetune import ARMS, NO_REWARD, Run, find_arm, finetune
from .core import ASSETS, Profile, is_finished, load_json, profile, run_dir
from .task import Options, make_options
from .evaluation import SCORED, eval_set, evaluate, load_rewards, write_eval
from .rewards import load_reward
from .worlds.shapes_world import prompt_kind, rendered_data
from .worlds.shapes import prompts

def train_texts(size, # a Profile
                kind: str) -> list[str]:
    "Its training prompts; at most 1,000 where they are not of the kind 'attribute'."
    return prompts('train', size.train_prompts if kind == 'attribute' else min(1000, size.train_prompts), kind=kind)

def stored_under(arm: str, reward) -> str: # 'none' or the reward's name
    "The reward that names a run's folder."
    return 'none' if arm in NO_REWARD and reward in ('none', *SCORED) else load_reward(reward).name

def run_arm(pipe, teacher, # as shipped
            arm: str, reward: str, seed: int, num_steps: int, profile_name: str,
            setting: str = 'default', # name of the folder for `options`
            split: str = 'test', # prompts of the evaluation
            force: bool = False, # train again although the run is finished
            **options # that differ from the arm's defaults
           ) -> tuple[Path, Run | None]: # the folder, and the run if it has been trained now
    "Train and evaluate one run of the shapes world."
    find_arm(arm)
    size, name = profile(profile_name), stored_under(arm, reward)
    folder, texts = run_dir(profile_name, arm, name, num_steps, seed, setting), train_texts(size, prompt_kind(reward))
    if is_finished(folder) and not force: return folder, None
    def judge(run): evaluate_run(run, size, setting, split, None if name == 'none' else reward)
    return folder, finetune(pipe, reward, texts, num_steps, folder, arm, teacher, rendered_data(pipe, texts), seed, profile_name, judge, force, **options)

def evaluate_run(run: Run, size, # its Profile
                 setting: str, split: str,
                 reward=None # scored beside `SCORED`, on prompts of its kind
                ):
    "Protocol of 06_evaluation at 1, 2 and the run's own number of steps, written beside its record."
    start, tests = time.monotonic(), eval_set(run.base, size, split, prompt_kind(reward))
    own = None if reward in (None, *SCORED) else load_reward(reward, run.base.device)
    scored = load_rewards(device=run.base.device) | ({own.name: own} if own else {})
    write_eval(run.out, {n: evaluate(run.pipe.unet, run.base, tests, size, n, scored) for n in sorted({1, 2, run.record['num_steps']})})
    run.record |= dict(setting=setting, split=split, reward=own.name if own else run.record['reward'], inputs=load_json(ASSETS/'manifest.json'), evaluation_s=round(time.monotonic()-start, 3))

FIRST_SIZES = dict(pretrain_prompts=150, pretrain_steps=100, collect_prompts=8, surrogate_steps=4) # of the first round, for arms that collect before they learn

def tries(knob: str, *pairs, **fixed) -> tuple: return tuple({'lr': lr, knob: value} | fixed for lr, value in pairs)

CLIPPED = tries('clip_range', *product((3e-5, 1e-4, 2e-4, 4e-4), (1e-4, 1e-3)), (4e-4, 3e-5), (8e-4, 3e-5), (8e-4, 1e-4), (16e-4, 3e-5))

GRID = {
    'lasro':         tries('c2', *product((3e-5, 1e-4), (.1, .2)), pairs='prompts', **FIRST_SIZES) + tries('c2', (1e-4, .1), (1e-4, .2), pairs='prompts')
                     + tries('c2', (1e-4, .1), (1e-4, .2), (2e-4, .2), (4e-4, .1), (4e-4, .2), (8e-4, .2)),
    'rlcm':          CLIPPED,
    'rlcm-dropped':  CLIPPED,
    'diffusion_dpo': tries('dpo_beta', *product((3e-5, 1e-4), (500., 5000.)), **FIRST_SIZES) + tries('dpo_beta', *product((3e-5, 1e-4), (50., 500.)), (1e-4, 20.), (2e-4, 20.), (2e-4, 50.), (4e-4, 50.)),
    'pso':           tries('pso_beta', *product((3e-5, 1e-4, 2e-4, 4e-4), (50., 500.)), (4e-4, 20.), (8e-4, 20.), (8e-4, 50.), (16e-4, 50.)),
    'gors_lcm':      tries('top', *product((3e-5, 1e-4), (.1, .3)), **FIRST_SIZES) + tries('top', *product((1e-4, 2e-4), (.1, .3)), (2e-4, .5), (4e-4, .1), (4e-4, .3), (8e-4, .3)),
    'reward_guided': tries('c2', *product((3e-5, 1e-4), (.2, 1.)), **FIRST_SIZES) + tries('c2', *product((1e-4, 2e-4), (.2, 1.)), (2e-4, .1), (4e-4, .1), (4e-4, .2), (8e-4, .2)),
    'direct':        tries('c2', *product((3e-5, 1e-4, 2e-4, 4e-4), (.1, .2)), (4e-4, .5), (8e-4, .1), (8e-4, .2), (8e-4, .5))}

FINALISTS = {'lasro': (3, 8, 10), 'rlcm': (4, 6, 8), 'rlcm-dropped': (4, 6, 8), 'diffusion_dpo': (4, 6, 8), 'pso': (2, 5, 6), 'gors_lcm': (4, 7, 9), 'reward_guided': (4, 6, 9), 'direct': (9, 10, 11)} # each arm's three best tries

def tuning(arm: str, setting: str, # 'tune-<i>' for half a run, 'full-<i>' for a whole one
           profile_name: str) -> dict: # the overrides of the run
    "One of the settings that `arm` tries."
    (kind, i), size = setting.split('-'), profile(profile_name)
    x = GRID[arm][int(i)]
    return dict(x) if kind == 'full' else x | dict(outer_steps=size.outer_steps//2, pretrain_prompts=x.get('pretrain_prompts', size.pretrain_prompts)//2)

def is_shipped(arm: str, i: int) -> bool:
    "Is this the setting that `arm` ships with?"
    kind, changed = find_arm(arm)
    return make_options('lab', kind.Options, **changed | GRID[arm][i]) == make_options('lab', kind.Options, **changed)

def equal_calls(size: Profile, n_noises: int | None = None, # N_s
                num_steps: int = 2, outer_steps: int | None = None # n, K; None takes the profile's
               ) -> dict: # overrides
    "Prompts before the rounds and in each that cost what a two-step run of the profile costs, as near as whole numbers allow."
    n, k = n_noises or size.n_noises, outer_steps or size.outer_steps
    labels = 2*size.n_noises/(n*num_steps)
    each = max(1, round(size.outer_steps*size.collect_prompts*labels/k))
    first = round((size.pretrain_prompts+size.outer_steps*size.collect_prompts)*labels)-k*each
    return dict(outer_steps=k, pretrain_prompts=max(each, first), collect_prompts=each, n_noises=n)

N_S = (1, 2, 4, 6, 8, 16)

K_PAIRS = ((1, 3), (4, 12), (2, 2), (2, 12)) # K1, K2: finer and coarser rounds; fewer and more surrogate updates

def settings(profile_name: str, num_steps: int = 2 # that 'equal-calls' stands for
            ) -> dict[str, dict]: # overrides by name
    "The overrides that the name of a setting stands for."
    size = profile(profile_name)
    noises = {f'ns-{n}': dict(equal_calls(size, n), groups=max(2, round(Options.groups*size.n_noises/n))) for n in N_S}
    rounds = {f'k-{k1}-{k2}': dict(equal_calls(size, outer_steps=max(1, size.outer_steps*size.generator_steps//k1)), generator_steps=k1, surrogate_steps=k2) for k1, k2 in K_PAIRS}
    switches = {'s-form-b': dict(s_form='b'), 'buffer-512': dict(buffer=512), 'buffer-2048': dict(buffer=2048), 'half-encoder': dict(backbone='unet'), 'pairs-within': dict(pairs='within'), 'pairs-prompts': dict(pairs='prompts'), 'lr-1e-4': dict(lr=1e-4)}
    return noises | rounds | switches | {'equal-calls': equal_calls(size, num_steps=num_steps)}

FURTHER = ('relation', 'count', 'compressibility', 'incompressibility', 'my_reward:two_aims', 'my_reward:free_margin')

BINDING = 'attribute_binding'

PLAN = dict( # target: (arm, reward, number of steps, setting) of runs with 3 seeds, or 5 if they are in CROSSED; `base` has one, `lcm_continued` all
    ablations=[(arm, BINDING, 2, 'default') for arm in ARMS if arm.startswith('lasro-')]
              +[('lasro', BINDING, 2, s) for s in ('s-form-b', *(f'k-{k1}-{k2}' for k1, k2 in K_PAIRS), 'buffer-512', 'buffer-2048', 'half-encoder', 'pairs-within', 'pairs-prompts')]+[('lcm_continued', 'none', 2, 'lr-1e-4')],
    questions=[('lasro', BINDING, 2, f'ns-{n}') for n in N_S if n != Options.n_noises]
              +[run for n in (1, 3, 4) for run in (('base', 'none', n, 'default'), ('lcm_continued', 'none', n, 'default'), ('lasro', BINDING, n, 'equal-calls'))],
    rewards=[(arm, r, 2, 'default') for r in FURTHER for arm in ('base', 'lcm_continued', 'lasro', 'gors_lcm', 'rlcm-dropped')
             if arm not in ('base', 'lcm_continued') or r in ('relation', 'count') or arm == 'base' and r not in SCORED])

CROSSED = [(arm, BINDING, 2, 'default') for arm in ('lasro-second-only', 'lasro-no-clip')] # whose interval of the difference held 0 with three seeds

CROSSED += [('lasro', BINDING, 2, s) for s in ('s-form-b', 'k-1-3', 'k-2-12', 'buffer-512', 'buffer-2048', 'pairs-within', 'pairs-prompts', *(f'ns-{n}' for n in N_S if n != Options.n_noises))]+[('lasro', BINDING, 1, 'equal-calls')]

CROSSED += [('gors_lcm', 'relation', 2, 'default'), ('rlcm-dropped', 'relation', 2, 'default'), ('gors_lcm', 'incompressibility', 2, 'default'), ('gors_lcm', 'my_reward:two_aims', 2, 'default')]
