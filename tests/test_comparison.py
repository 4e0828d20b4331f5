"12_comparison over made-up runs of every arm: what its tables say, what they say where something is missing, and the plan behind them."
import json, os, subprocess, sys, zlib

import numpy as np, pandas as pd
import pytest, torch
from conftest import ROOT
from scipy.stats import ttest_1samp

from lasro.baselines import FINALISTS, GRID, PLAN, settings, tuning
from lasro.core import results_dir, run_dir, save_csv, save_json
from lasro.evaluation import EvalResult, moments, reference_features, write_eval
from lasro.finetune import find_arm, make_options

REWARDS = ('image_reward', 'attribute_binding', 'text_alignment')
COLUMNS = (*REWARDS, 'attribute_binding_strict', 'clip_score', 'compressibility')
GAINS = dict(base=0, lcm_continued=.005, lasro=.4, pso=-.01, **{'rlcm': .02, 'rlcm-dropped': .04, 'diffusion_dpo': .06, 'reward_guided': .3}) # of the reward that is trained on
EVERYWHERE = [arm for arm in GAINS if arm not in ('base', 'lcm_continued')]
GAINS |= {'lasro-frozen': -.1, 'lasro-second-only': .2}
ONE_REWARD = dict(gors_lcm='text_alignment', direct='image_reward')
PROMPTS = 24
TRL = dict(batch=64, num_steps=2, trl='0.23.1', n=40, lasro_ms=70., trl_ms=100., ratio=.7, ratio_q25=.65, ratio_q75=.75, floor=.6, floor_q25=.58, floor_q75=.62) # what bench/rlcm_trl.py leaves
GPU_ROW = dict(row='generator-lcm-ssd-1b-1024-plain', what='generator', model='lcm-ssd-1b', resolution=1024, variant='plain', device='a GPU', batch=4, ms=900., ms_q25=890., ms_q75=910., images_per_s=4.4, peak_gb=21., flop_use=.45) # and bench/sdxl.py


def scores(num_steps: int, gain: float, reward: str, rng) -> pd.DataFrame:
    "Two noises a prompt; every arm shares what the prompt and noise give."
    shared, k = np.random.default_rng(num_steps+100*(reward == 'relation')), np.arange(2*PROMPTS) # its prompts are others
    keys = dict(num_steps=num_steps, split=np.where(k % PROMPTS < PROMPTS//2, 'seen', 'held_out'), prompt=k % PROMPTS, noise=k//PROMPTS)
    columns = COLUMNS if reward in (*COLUMNS, 'none') else (*COLUMNS, reward)
    return pd.DataFrame(keys | {c: shared.normal(.5, .1, len(k))+(rng.normal(gain*(c == reward), .005)+rng.normal(0, .02, len(k)) if gain else 0) for c in columns})


def curve(arm: str, gain: float, rng) -> list[dict]:
    "30 rounds, every fifth with a probe; lasro rises soon, the others slowly. A surrogate's score rises, fastest when it is frozen."
    if arm in ('base', 'lcm_continued'): return [dict(step=2*k, reward_calls=0, wall_s=2.*k) for k in range(31)]
    rise = lambda k: gain*min(1, k/8 if arm == 'lasro' else k/30)
    rows = [dict(step=2*k, reward_calls=330*(k+1), wall_s=5.*k+5+rng.uniform(0, 1), probe_reward='' if k % 5 else .5+rise(k)+rng.normal(0, .002)) for k in range(31)]
    if not arm.startswith('lasro'): return rows
    speed, order = (.2, -.1) if arm == 'lasro-frozen' else (.05, .6)
    return [row | dict(surrogate=speed*k+rng.normal(0, .02) if k else '', rank_correlation=order+rng.normal(0, .01)) for k, row in enumerate(rows)]


def fake(arm: str, reward: str, seed: int, setting: str = 'default', split: str = 'test', overrides=None, num_steps: int = 2):
    "A run folder as 09_lasro and 10_baselines leave it."
    rng = np.random.default_rng(zlib.crc32(f'{arm} {reward} {seed} {setting} {num_steps}'.encode()))
    folder, gain = run_dir('lab', arm, reward, num_steps, seed, setting), GAINS.get(arm, .03)
    folder.mkdir(parents=True)
    feats = reference_features()*(1+.01*rng.standard_normal(48))
    results = {n: EvalResult(n, scores(n, gain, reward, rng), *moments(feats), .01, rng.uniform(.5, .6, PROMPTS).astype('f4'), 2048, torch.full((8, 3, 32, 32), .5)) for n in sorted({1, 2, num_steps})}
    write_eval(folder, results)
    save_csv(curve(arm, gain, rng), folder/'metrics.csv')
    none, options = arm in ('base', 'lcm_continued'), make_options('lab', find_arm(arm)[0].Options, **find_arm(arm)[1] | (overrides or {}))
    save_json(dict(arm=arm, reward=reward, num_steps=num_steps, setting=setting, split=split, seed=seed, profile='lab', parameters=vars(options), reward_calls=0 if none else 4128,
                   forward_equivalents=1e5, wall_s=60., evaluation_s=20., peak_mb=900., environment=dict(device='a device')), folder/'run.json')


def find_lr(arm: str) -> float: return make_options('lab', find_arm(arm)[0].Options, **find_arm(arm)[1]).lr


def time_alone(arm: str, reward: str, lr: float):
    "What bench/alone.py leaves: a second a step."
    record = json.loads((run_dir('lab', arm, reward, 2, 0)/'run.json').read_text())
    record['parameters']['lr'] = lr
    save_json(record | dict(evaluation_s=7., steps=dict(step=list(range(0, 61, 10)), wall_s=[float(k) for k in range(0, 61, 10)])), results_dir('lab')/'bench'/f'alone-{arm}-{reward}.json')


def draw(results, out, notebook='12_comparison') -> subprocess.Popen:
    "A drawing notebook as the batch starts it."
    command = [sys.executable, ROOT/'workflow'/'run.py', ROOT/'nbs'/f'{notebook}.ipynb', out/f'{notebook[:2]}.ipynb', '-p', 'PROFILE', 'lab', '-p', 'OUT', out]
    return subprocess.Popen(list(map(str, command)), env={**os.environ, 'LASRO_RESULTS': str(results)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    "Tables of every arm, and of the first three alone: two folders."
    folders = []
    for name in ('all', 'three'):
        results = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('LASRO_RESULTS', str(results))
            every = name == 'all'
            for reward in 'none', 'relation': fake('base', reward, 0) # the second is of other prompts
            for seed in range(3): fake('lcm_continued', 'none', seed)
            for seed in range(3): [fake(arm, r, seed) for arm in (EVERYWHERE if every else ['lasro']) for r in (REWARDS if every else REWARDS[1:2])]
            for arm, reward in ONE_REWARD.items() if every else (): [fake(arm, reward, seed) for seed in range(2)]
            for arm, r, _, setting in PLAN['ablations'] if every else (): [fake(arm, r, seed, setting, overrides=settings('lab').get(setting)) for seed in range(3)]
            for arm, tries in GRID.items() if every else ():
                for name in [f'tune-{i}' for i in range(len(tries))]+[f'full-{i}' for i in FINALISTS[arm]]: fake(arm, 'image_reward' if arm == 'direct' else 'attribute_binding', 0, name, 'validation', tuning(arm, name, 'lab'))
            if every:
                for arm in EVERYWHERE: time_alone(arm, 'attribute_binding', find_lr(arm))
                for arm in EVERYWHERE: time_alone(arm, 'text_alignment', .5 if arm == 'pso' else find_lr(arm)) # that of pso is of a setting that no run has
                save_json(TRL | dict(environment=dict(device='a device')), results_dir('lab')/'bench'/'rlcm_trl-cpu.json')
                save_json(GPU_ROW, results_dir('sdxl')/'bench'/f"{GPU_ROW['row']}.json")
        folders.append((draw(results, results/'out'), results/'out'))
    for process, _ in folders:
        err = process.communicate(timeout=300)[1]
        assert process.returncode == 0, err
    return [out/'tables' for _, out in folders]


def table(folder, name): return pd.read_csv(folder/f'{name}.csv')


def test_main_table(drawn):
    t = table(drawn[0], 'tab_main').query("source == 'measured'")
    rows = t[(t.split == 'held_out') & (t.num_steps == 2)].set_index(['reward', 'arm'])
    assert list(rows.loc['image_reward'].index) == ['base', 'lcm_continued', 'lasro', 'rlcm', 'rlcm-dropped', 'diffusion_dpo', 'pso', 'reward_guided', 'direct']
    assert list(rows.loc['text_alignment'].index[-2:]) == ['reward_guided', 'direct'] and 'gors_lcm' in rows.loc['text_alignment'].index
    for reward in REWARDS[1:]:
        row = rows.loc[reward, 'direct']
        assert row['mean'] == 'not defined' and 'gradient' in row.note and row.n_seeds == 0
    assert rows.loc[('image_reward', 'direct'), 'n_seeds'] == 2
    assert float(rows.loc[('attribute_binding', 'pso'), 'diff_lasro_ci_high']) < 0 < float(rows.loc[('attribute_binding', 'lasro'), 'diff_base_ci_low'])
    one = t[(t.num_steps == 1) & (t.arm == 'rlcm')]
    assert len(one) == 9 and one.note.str.contains('not defined for training at 1').all() and not t[t.num_steps == 2].note.str.contains('training at 1').any()


def test_p_is_corrected_over_the_arms_of_a_reward(drawn):
    runs = drawn[1].parents[1]/'lab'/'runs'
    def means(arm, reward, seeds=3): # (seeds, prompts) at two steps
        found = [pd.read_csv(runs/arm/reward/'steps-2'/'default'/f'seed-{s}'/'eval.csv.gz').query('num_steps == 2') for s in range(seeds)]
        return np.stack([x.groupby('prompt').attribute_binding.mean() for x in found])
    base, lcm, lasro = means('base', 'none', 1), means('lcm_continued', 'none'), means('lasro', 'attribute_binding')
    first, *rest = sorted((ttest_1samp((a-b).mean(1), 0).pvalue, *who) for a, b, *who in ((lcm, base, 'lcm_continued', 'base'), (lasro, base, 'lasro', 'base'), (lasro, lcm, 'lcm_continued', 'lasro')))
    t = table(drawn[1], 'tab_main').query("source == 'measured' and num_steps == 2 and split == 'all'").set_index('arm')
    assert np.isclose(t.loc[first[1], f'p_vs_{first[2]}'], 3*first[0]) # the least of three tests
    assert np.isclose(t.loc[rest[0][1], f'p_vs_{rest[0][2]}'], max(3*first[0], 2*rest[0][0]))


def test_more_distillation_alone(drawn):
    t = table(drawn[0], 'tab_converged')
    assert set(t.lr) == {4e-4, 1e-4} and set(t.reward) == set(REWARDS) and (t.ci_low <= t.diff_vs_base).all() and (t.diff_vs_base <= t.ci_high).all()
    assert set(table(drawn[1], 'tab_converged').setting) == {'default'} # where the other was not run


def test_efficiency(drawn):
    t = table(drawn[0], 'tab_efficiency')
    assert list(t.columns) == 'reward,arm,calls_to_half,calls_ci_low,calls_ci_high,seconds_to_half,seconds_ci_low,seconds_ci_high,n_seeds,note'.split(',')
    t = t.set_index(['reward', 'arm'])
    assert t.loc[('attribute_binding', 'pso'), 'calls_to_half'] == t.loc[('attribute_binding', 'pso'), 'seconds_to_half'] == 'never'
    assert t.loc[('attribute_binding', 'direct'), 'calls_to_half'] == 'not defined' and t.loc[('image_reward', 'direct'), 'n_seeds'] == 2
    lasro = t.loc[('attribute_binding', 'lasro')]
    assert lasro.calls_ci_low == lasro.calls_to_half == lasro.calls_ci_high and float(lasro.calls_to_half) % 330 == 0 and lasro.note.startswith('3 of 3 seeds')


def test_seconds_are_those_of_a_run_alone(drawn):
    t = table(drawn[0], 'tab_efficiency').set_index(['reward', 'arm'])
    for reward, alone in ('attribute_binding', True), ('text_alignment', False): # all arms alone, or none
        for arm in 'lasro', 'reward_guided':
            row = t.loc[(reward, arm)]
            assert row.note.endswith('a device, alone' if alone else 'a device')
            assert (float(row.seconds_to_half) == 2*(float(row.calls_to_half)/330-1)) == alone # a second a step
    costs = table(drawn[0], 'tab_cost').set_index(['arm', 'reward', 'device'])
    full = costs.loc[('lasro', 'none', 'a GPU')]
    assert full.note == 'generator of lcm-ssd-1b, random weights, 1024 px, plain' and (full.ms, full.peak_gb, full.flop_use) == (900, 21, .45)
    assert costs.loc[('lasro', 'attribute_binding', 'a device, alone'), 'evaluation_s'] == 7 and costs.loc[('lasro', 'attribute_binding', 'a device'), 'evaluation_s'] == 20
    assert ('lasro', 'text_alignment', 'a device, alone') in costs.index and ('pso', 'text_alignment', 'a device, alone') not in costs.index
    assert costs.loc[('rlcm', 'none', 'a device, alone'), ['ratio', 'ratio_q25', 'ratio_q75']].tolist() == [.7, .65, .75]


def test_the_ratio_is_told_from_the_table(drawn):
    t = table(drawn[0], 'tab_efficiency').query("reward == 'text_alignment'").set_index('arm').calls_to_half
    best = min((float(v), arm) for arm, v in t.items() if arm != 'lasro' and v not in ('never', 'not defined'))
    outputs = [o for c in json.loads((drawn[0].parent/'12.ipynb').read_text())['cells'] for o in c.get('outputs', [])]
    words = ''.join(''.join(o.get('data', {}).get('text/markdown', '')) for o in outputs)
    assert f"lasro needs {float(t.lasro):,.0f} reward calls, the best baseline, {best[1]}, {best[0]:,.0f}: a ratio of {float(t.lasro)/best[0]:.2f}" in words
    assert 'lasro is above every baseline. It is above rlcm by +' in words


def test_every_setting_that_was_tried_is_listed(drawn):
    t = table(drawn[0], 'tab_tuning')
    assert list(t.columns) == 'arm reward setting overrides mean ci_low ci_high reward_calls wall_s chosen'.split()
    for arm, tries in GRID.items():
        rows = t[t.arm == arm]
        assert [json.loads(o) for o in rows.overrides] == [*tries, *(tries[i] for i in FINALISTS[arm])] and rows.chosen.sum() == 2 # at half and at full length
    assert not (drawn[1]/'tab_tuning.csv').exists()


def test_ablations(drawn):
    t = table(drawn[0], 'tab_ablations')
    assert list(t.columns[:4]) == ['reward', 'arm', 'setting', 'overrides'] and list(zip(t.arm, t.setting)) == [('lasro', 'default')]+[(arm, setting) for arm, reward, _, setting in PLAN['ablations'] if reward != 'none']
    for row in t.iloc[1:].itertuples():
        changed = find_arm(row.arm)[1] | settings('lab').get(row.setting, {})
        assert json.loads(row.overrides) == {k: v for k, v in changed.items() if v != getattr(make_options('lab'), k)}
        assert row.verdict == {True: 'below lasro', False: 'above lasro'}[row.diff_lasro_ci_high < 0] if row.diff_lasro_ci_low*row.diff_lasro_ci_high > 0 else row.verdict == 'not told apart from lasro'
    frozen = t.set_index('arm').loc['lasro-frozen']
    assert frozen.verdict == 'below lasro' and frozen.n_seeds == 3 and frozen.alarms == 'rank 3 of 3' and np.isclose(frozen.rank_correlation, -.1, atol=.02)
    assert np.isclose(frozen.diff_vs_lasro, frozen['mean']-t['mean'][0]) and frozen.p_vs_lasro < .05
    assert not (drawn[1]/'tab_ablations.csv').exists()


def test_hacking(drawn):
    t = table(drawn[0], 'fig_hacking')
    assert set(t.arm) == {'lasro', 'lasro-frozen'} and (t.n == 3).all() and {'ci_low', 'ci_high'} <= set(t.columns)
    ends = t.groupby(['quantity', 'arm'])['mean'].last()
    assert ends["surrogate's own score", 'lasro-frozen'] > ends["surrogate's own score", 'lasro'] and ends['true reward', 'lasro-frozen'] < ends['true reward', 'lasro']
    title = (drawn[0].parent/'figures'/'fig_hacking.svg').read_text()
    assert 'own score rises' in title and 'the true reward falls' in title and 'below the online one by' in title
    assert not (drawn[1]/'fig_hacking.csv').exists()


def test_runs_of_further_rewards_are_not_compared_here(drawn):
    t = table(drawn[1], 'tab_main').query("arm == 'base' and num_steps == 2 and split == 'all'")
    scores = pd.read_csv(drawn[1].parents[1]/'lab'/'runs'/'base'/'none'/'steps-2'/'default'/'seed-0'/'eval.csv.gz').query('num_steps == 2')
    assert np.isclose(float(t['mean'].iloc[0]), scores.attribute_binding.mean())


def test_three_arms_alone(drawn):
    assert set(table(drawn[1], 'tab_main').query("source == 'measured'").arm) == {'base', 'lcm_continued', 'lasro'}
    assert list(table(drawn[1], 'tab_efficiency').arm) == ['lasro']
    assert (drawn[1].parent/'figures'/'fig_curves_attribute_binding.svg').exists()


def test_the_frozen_settings_are_the_best_that_were_tried():
    t = pd.read_csv(results_dir('lab')/'tables'/'tab_tuning.csv')
    full = t.setting.str.startswith('full')
    for arm, rows in t[~full].groupby('arm'):
        best = rows.nlargest(3, 'mean').setting
        assert len(rows) == len(GRID['lasro']) and {int(s.split('-')[1]) for s in best} == set(FINALISTS[arm]), f'{arm}: the three best tries are {sorted(best)}'
    best = t[full].loc[t[full].groupby('arm')['mean'].idxmax()]
    assert set(t.arm) == set(best.arm) == set(GRID) and (t[full].groupby('arm').size() == 3).all()
    assert best.chosen.all(), f'not the best of their finalists: {list(best.arm[~best.chosen])}'


def dry_run(target: str, cwd, *options) -> str:
    command = [sys.executable, '-m', 'snakemake', target, '-n', *options, '-s', ROOT/'workflow'/'Snakefile', '--cores', '1', '--nolock', '--config', 'profile=lab']
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, env={**os.environ, 'LASRO_RESULTS': str(cwd)})
    assert found.returncode == 0, found.stderr
    return found.stdout+found.stderr


@pytest.mark.parametrize('target, runs', [('baselines', 6*3*3+3+3*2), ('tuning', sum(map(len, (*GRID.values(), *FINALISTS.values())))), # six baselines have three rewards and three seeds, direct has one reward, the best of each reward two seeds more, as do those of CROSSED
                                          ('ablations', 3*(6+10)+5+2*9), ('questions', 5*5+3*(1+5+3)+2), ('rewards', 6*3*3+2*5+5+2*4)])
def test_the_plan_has_every_run(tmp_path, target, runs):
    assert ['run', str(runs)] in [line.split() for line in dry_run(target, tmp_path, '-q', 'rules').splitlines()]


def test_a_planned_run_gets_its_overrides_and_its_reward(tmp_path):
    commands = {line for target in ('questions', 'rewards') for line in dry_run(target, tmp_path, '-p').splitlines() if 'run.py' in line}
    one = [c for c in commands if '-p SETTING ns-1 ' in c]
    assert len(one) == 5 and all('"n_noises": 1' in c and '"pretrain_prompts": 420' in c and '-p SPLIT test' in c for c in one)
    three = [c for c in commands if '-p SETTING equal-calls ' in c and '-p NUM_STEPS 3 ' in c]
    assert len(three) == 3 and all('"pretrain_prompts": 47,' in c for c in three)
    own = [c for c in commands if '-p REWARD my_reward:free_margin ' in c]
    assert {c.split('-p ARM ')[1].split()[0] for c in own} == {'base', 'lasro', 'gors_lcm', 'rlcm-dropped'}
