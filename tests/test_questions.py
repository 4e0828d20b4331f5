"13_questions over made-up runs: its tables, verdicts and claims; and the runs behind them for real, at smoke size."
import json
from itertools import product

import numpy as np, pandas as pd
import pytest, torch
from conftest import ROOT
from test_comparison import draw, fake

from lasro.baselines import FURTHER, PLAN, reward_calls, settings
from lasro.core import ASSETS, profile, results_dir, run_dir, save_json
from lasro.exploration import Labelled, ReplayBuffer
from lasro.finetune import make_options, run_arm
from lasro.models import load_pipeline, load_teacher

BINDING, NAMES = 'attribute_binding', ('relation', 'free_margin')
TYPES = ('image_reward', BINDING, 'jackpot')
HELD_ASIDE, N_SEEDS = 'a claim of another notebook', 3


def fake_value():
    "A committed record of the value function: by Bradley-Terry the surrogate knows the value of image_reward exactly, of attribute_binding nothing, of the jackpot only the order within a prompt."
    rng, rows = np.random.default_rng(0), []
    for name in TYPES:
        v, offset = rng.uniform(size=(16, 8)), rng.normal(0, 3, (16, 1))
        known = dict(zip(TYPES, (2*v+1, rng.uniform(size=v.shape), v+offset)))[name]
        for p, k in product(range(16), range(8)):
            rows.append(dict(reward=name, prompt=p, noise=k, r_z1=rng.uniform(), value=v[p, k], value_se=.01) | {f'bradley_terry_{s}': known[p, k] for s in range(3)} | {f'regression_{s}': rng.uniform() for s in range(3)})
    folder = results_dir('lab')/'questions'
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(folder/'value.csv', index=False)
    save_json(dict(roll_outs=256), folder/'value.json')


def fake_runs():
    fake('base', 'none', 0)
    for seed in range(N_SEEDS):
        fake('lcm_continued', 'none', seed)
        fake('pso', BINDING, seed)
        for arm in ('lasro', 'lasro-frozen', 'lasro-second-only'): fake(arm, BINDING, seed)
    for arm, reward, n, setting in PLAN['questions']:
        for seed in range(1 if arm == 'base' else N_SEEDS): fake(arm, reward, seed, setting, overrides=settings('lab', n).get(setting), num_steps=n)
    for arm, reward, n, setting in PLAN['rewards']:
        name = reward.split(':')[-1]
        for seed in range(1 if arm == 'base' else N_SEEDS) if name in NAMES else (): fake(arm, name, seed)


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    "Tables over runs of everything, and over none: two folders."
    full, empty = (tmp_path_factory.mktemp(name) for name in ('full', 'empty'))
    for results in full, empty:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('LASRO_RESULTS', str(results))
            fake_value()
            if results == full: fake_runs()
    processes = [draw(full, full/'out'), draw(empty, empty/'out', '13_questions')]
    for process in processes: assert process.communicate(timeout=600)[1] is not None and process.returncode == 0
    (full/'out'/'tables'/'claims_analysis.csv').write_text(f'claim,statistic,ci_low,ci_high,n,verdict,notebook\n{HELD_ASIDE},0.5,0.4,0.6,64,holds,11_analysis\n')
    last = draw(full, full/'out', '13_questions')
    err = last.communicate(timeout=600)[1]
    assert last.returncode == 0, err
    return full/'out', empty/'out'


def table(folder, name): return pd.read_csv(folder/'tables'/f'{name}.csv')


def words(folder) -> str:
    "What 13_questions says in Markdown."
    outputs = [o for c in json.loads((folder/'13.ipynb').read_text())['cells'] for o in c.get('outputs', [])]
    return '\n'.join(''.join(o.get('data', {}).get('text/markdown', '')) for o in outputs)


def test_n_s(drawn):
    t = table(drawn[0], 'tab_ns')
    rows = t[t.split == 'all'].set_index('n_s')
    assert list(rows.index) == [1, 2, 4, 6, 8, 16] and set(t.split) == {'held_out', 'all'} and (t.n_seeds == N_SEEDS).all()
    assert list(rows.pretrain_prompts) == [420, 210, 105, 70, 52, 36] and list(rows.collect_prompts) == [72, 36, 18, 12, 9, 4]
    assert {'ci_low', 'ci_high', 'fid', 'reward_calls', 'calls_to_half', 'calls_ci_low', 'updates_to_90', 'updates_ci_high'} <= set(t.columns)
    assert rows.diff_vs_default.isna().tolist() == [n == 6 for n in rows.index] and t[t.split == 'held_out'].updates_to_90.isna().all()
    assert float(rows.updates_to_90[6]) == 20 # the made-up lasro is at its end after 8 of 30 rounds, and is probed after every fifth
    headroom = pd.read_csv(ASSETS/'headroom.csv').query("split == 'seen' and reward == @BINDING").set_index(['model', 'num_steps'])['mean']
    first = pd.read_csv(drawn[0].parent/'lab'/'runs'/'lasro'/BINDING/'steps-2'/'default'/'seed-0'/'metrics.csv').dropna(subset='probe_reward')
    reached = first[first.probe_reward >= first.probe_reward.iloc[0]+(headroom['teacher'].iloc[0]-headroom['student', 2])/2]
    assert float(rows.calls_to_half[6]) == reached.reward_calls.iloc[0]


def test_steps(drawn):
    t = table(drawn[0], 'tab_steps')
    assert {(x.train_steps, x.eval_steps) for x in t.itertuples()} == {(n, k) for n in (1, 2, 3, 4) for k in {1, 2, n}}
    for n, rows in t[(t.train_steps == t.eval_steps) & (t.split == 'all')].groupby('train_steps'):
        rows = rows.set_index('arm')
        assert list(rows.index) == ['base', 'lcm_continued', 'lasro'] and np.isnan(rows.gain['base'])
        assert np.isclose(rows.gain['lasro'], rows['mean']['lasro']-rows['mean']['base']) and rows.gain_ci_low['lasro'] > 0 and rows.diff_lcm_ci_low['lasro'] > 0
        assert float(rows.updates_to_90['lasro']) == 20 and rows.updates_to_90[['base', 'lcm_continued']].isna().all() and rows.wall_s['lasro'] == 60
    assert '- 3 steps: above base by +' in words(drawn[0])


def test_value(drawn):
    t = table(drawn[0], 'fig_value')
    rows = t[t.quantity != 'point'].set_index(['reward', 'predictor', 'quantity'])
    assert {'ci_low', 'ci_high', 'n'} <= set(t.columns) and (t.quantity == 'point').sum() == 3*16*8 and (rows.n == 16).all()
    get = lambda name, quantity, by='bradley_terry': rows.loc[name, by].filter(like=quantity, axis=0).iloc[0]
    knows, blind, ordered = (get(name, 'share') for name in TYPES)
    assert knows['mean'] == knows.ci_low == 1 and blind.ci_high < .9 and ordered.ci_high < .9
    assert get(TYPES[2], 'rank correlation with V')['mean'] == 1 and get(TYPES[2], 'R2 with V')['mean'] < .5 < get(TYPES[0], 'R2 with V')['mean']
    assert abs(get(TYPES[1], 'rank correlation with V')['mean']) < .2
    # the affine fit and the bound by hand
    record = pd.read_csv(drawn[0].parent/'lab'/'questions'/'value.csv').query('reward == @TYPES[2]')
    a, b = np.polyfit(record.bradley_terry_0, record.value, 1)
    share = ((a*record.bradley_terry_0+b-record.value).abs() <= .1*np.ptp(record.value)).mean()
    assert np.isclose(ordered['mean'], share)
    title = (drawn[0]/'figures'/'fig_value.svg').read_text()
    assert 'within a tenth of the range for 1, not for 2, undecided for 0' in title


def test_further_rewards(drawn):
    t = table(drawn[0], 'tab_rewards')
    assert {'asks', 'held_out_reward', 'verdict', 'p_vs_base', 'n_seeds'} <= set(t.columns)
    rows = t[t.split == 'all'].set_index(['reward', 'arm'])
    assert list(rows.loc['relation'].index) == ['base', 'lcm_continued', 'lasro', 'gors_lcm', 'rlcm-dropped'] and list(rows.loc['free_margin'].index) == ['base', 'lasro', 'gors_lcm', 'rlcm-dropped']
    assert (rows.xs('lasro', level='arm').verdict == 'above base').all() and rows.loc[('relation', 'lcm_continued'), 'n_seeds'] == N_SEEDS
    assert rows.loc['relation'].fid.isna().all() and rows.loc['free_margin'].fid.notna().all()
    assert rows.loc[('relation', 'base'), 'held_out_reward'] == 'clip_score' and 'margin' in rows.loc[('free_margin', 'base'), 'asks']


def test_claims(drawn):
    t = table(drawn[0], 'tab_claims')
    assert list(t.columns) == ['claim', 'statistic', 'ci_low', 'ci_high', 'n', 'verdict', 'notebook'] and set(t.verdict) <= {'holds', 'fails', 'undecided'}
    assert t.iloc[0].claim == HELD_ASIDE and t.iloc[0].verdict == 'holds' and t.iloc[0].notebook == '11_analysis'
    ordered = t[t.claim.str.contains(' above |falls|rises')] # of a difference or a change
    by_interval = np.select([ordered.ci_low > 0, ordered.ci_high < 0], ['holds', 'fails'], 'undecided')
    assert len(ordered) == 3+2+2 and (ordered.verdict == by_interval).all() # base, lcm_continued, pso; frozen, second only; the two curves
    main = table(drawn[0], 'tab_main').query("arm == 'pso' and split == 'held_out' and num_steps == 2 and source == 'measured'").iloc[0]
    pso = t[t.claim.str.startswith('lasro is above pso')].iloc[0]
    assert np.isclose(pso.statistic, -float(main.diff_vs_lasro)) and np.isclose(pso.ci_low, -main.diff_lasro_ci_high) and pso.verdict == 'holds' and pso.n == N_SEEDS
    affine = t[t.claim.str.contains('affine')]
    assert list(affine.verdict) == ['holds', 'fails', 'fails'] and t.iloc[-1].verdict == 'undecided' and np.isnan(t.iloc[-1].statistic)
    assert '**How many noises a prompt?** Answered.' in words(drawn[0]) and '**Does it work for other rewards?** Answered in part, 2 of 6.' in words(drawn[0])


def test_without_runs_it_says_which_command_makes_them(drawn):
    said, made = words(drawn[1]), {p.name for p in (drawn[1]/'tables').iterdir()}
    assert made == {'fig_value.csv', 'tab_claims.csv', 'tab_claims.md', 'tab_claims_short.md'}
    for target in 'questions', 'rewards': assert f'Not run yet: `snakemake {target} ' in said
    assert set(table(drawn[1], 'tab_claims').notebook) == {'13_questions'} and 'without rows: claims_analysis, tab_backbones, tab_main, tab_ablations, fig_hacking' in said
    assert 'Not answered yet, no complete set of runs.' in said


@pytest.fixture(scope='module')
def models(): return load_pipeline(), load_teacher()


def smoke(models, tmp_path, monkeypatch, arm, reward, num_steps, setting):
    "One run for real: its folder, record, metrics and scores."
    monkeypatch.setenv('LASRO_RESULTS', str(tmp_path))
    folder, _ = run_arm(*models, arm, reward, 0, num_steps, 'smoke', setting, **settings('smoke', num_steps).get(setting, {}))
    return folder, json.loads((folder/'run.json').read_text()), pd.read_csv(folder/'metrics.csv'), pd.read_csv(folder/'eval.csv.gz')


@pytest.mark.parametrize('num_steps, setting', [(2, 'ns-1'), (1, 'equal-calls'), (3, 'equal-calls'), (4, 'equal-calls')])
def test_a_planned_run(models, tmp_path, monkeypatch, num_steps, setting):
    _, record, metrics, scores = smoke(models, tmp_path, monkeypatch, 'lasro', BINDING, num_steps, setting)
    options = make_options('smoke', **settings('smoke', num_steps)[setting])
    default = reward_calls(make_options('smoke'), 2, 64)
    assert record['reward_calls'] == reward_calls(options, num_steps, 64) and abs(record['reward_calls']-default) <= num_steps*options.n_noises
    assert set(scores.num_steps) == {1, 2, num_steps} and np.isfinite(scores[BINDING]).all()
    assert metrics.surrogate_loss.notna().all() and (metrics.surrogate_loss > 0).all() and np.isfinite(metrics.grad_norm.iloc[1:]).all()
    if setting == 'ns-1': assert metrics.rank_correlation.isna().all() # one sample a prompt has no order


@pytest.mark.parametrize('arm, reward', [('lasro', 'relation'), ('base', 'count'), ('base', 'my_reward:free_margin')])
def test_a_further_reward(models, tmp_path, monkeypatch, arm, reward):
    folder, record, _, scores = smoke(models, tmp_path, monkeypatch, arm, reward, 2, 'default')
    name = reward.split(':')[-1]
    assert record['reward'] == name and np.isfinite(scores[name]).all() and np.ptp(scores[name]) > 0
    assert folder == run_dir('smoke', arm, name, 2, 0)


def test_my_rewards():
    import my_reward
    even, split = torch.full((1, 3, 32, 32), .3), torch.full((1, 3, 32, 32), .3)
    split[..., :16] = .7
    inner = even.clone()
    inner[..., 8:24, 8:24] = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    scores = my_reward.free_margin(torch.cat([even, inner, split]), ['a red ring']*3)[0]
    assert scores[0] == scores[1] == 0 > scores[2]
    both = my_reward.two_aims(even, ['a red ring'])[0]
    assert torch.isclose(both, my_reward.BINDING(even, ['a red ring'])[0]+.5*my_reward.TASTE(even, ['a red ring'])[0])
    assert {path.split(':')[1] for path in FURTHER if ':' in path} == {my_reward.two_aims.name, my_reward.free_margin.name}


def single(seed: int, n: int = 12) -> Labelled:
    "One labelled latent of each of `n` prompts, after each of two steps."
    g = torch.Generator().manual_seed(seed)
    return Labelled(torch.zeros(2*n, 4, 8, 8), torch.rand(2*n, generator=g), torch.arange(n).repeat(2), torch.arange(2).repeat_interleave(n))


def test_single_samples_are_compared_across_prompts_and_visits():
    draw_from, g = ReplayBuffer(200), lambda: torch.Generator().manual_seed(0)
    draw_from.add(single(0))
    assert len(draw_from.draw(24, 2, g())[1]) == 0 # within prompts there is nothing yet
    rows, winners, losers = draw_from.draw(6, 1, g(), pairs='prompts')
    s = draw_from.samples
    assert len(rows) == 6 and len(winners) and (s.step[rows][winners] == s.step[rows][losers]).all() and (s.prompt[rows][winners] != s.prompt[rows][losers]).all()
    draw_from.add(single(1))
    rows, winners, losers = draw_from.draw(24, 2, g())
    s = draw_from.samples
    assert len(winners) and (s.prompt[rows][winners] == s.prompt[rows][losers]).all() and (s.rewards[rows][winners] > s.rewards[rows][losers]).all()
