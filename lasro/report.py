"""Transitional: split by definition."""
from IPython.display import Image as display_image
from PIL import Image
from collections import namedtuple
from functools import cache
from pathlib import Path
from scipy import stats
import gzip
import io
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from .statistics import Estimate, crossed_mean, paired_difference, t_interval
from .evaluation import EvalResult, fid
from .core import atomic_path, load_json, profile, results_dir

def read_file(path: Path, reader):
    "`reader(path)`; an `OSError` in one line if the file is missing or damaged."
    path = Path(path)
    if not path.exists(): raise FileNotFoundError(f'{path} is missing: run it again')
    try: return reader(path)
    except Exception as e: raise OSError(f'{path} is damaged: {str(e).splitlines()[0] if str(e) else type(e).__name__}') from None

def read_scores(path: Path) -> pd.DataFrame:
    "An eval.csv.gz."
    return pd.read_csv(io.BytesIO(gzip.decompress(path.read_bytes())))

def read_run(folder: Path) -> tuple[dict, pd.DataFrame]: # run.json and the scores
    "The record and the scores of one finished run."
    return read_file(Path(folder)/'run.json', load_json), read_file(Path(folder)/'eval.csv.gz', read_scores)

def read_fidelity(folder: Path # of a run
                 ) -> pd.DataFrame: # rows num_steps, split; columns fid, kid, diversity, n
    "FID, KID and diversity of one run. FID and KID need all pictures and stand in the rows of split 'all'."
    stats = read_file(Path(folder)/'fid_stats.npz', lambda path: dict(np.load(path, allow_pickle=False)))
    rows = []
    for s in sorted(int(k.removeprefix('n_')) for k in stats if k.startswith('n_')):
        d, half = stats[f'diversity_{s}'], len(stats[f'diversity_{s}'])//2
        rows.append(dict(num_steps=s, split='all', fid=fid(stats[f'mean_{s}'], stats[f'cov_{s}']), kid=float(stats[f'kid_{s}']), diversity=float(d.mean()), n=int(stats[f'n_{s}'])))
        rows += [dict(num_steps=s, split=split, diversity=float(part.mean())) for split, part in (('seen', d[:half]), ('held_out', d[half:]))]
    return pd.DataFrame(rows)

Run = namedtuple('Run', 'folder record scores')

def read_runs(profile: str, **filters # fields of run.json, e.g. arm='lasro', num_steps=2
             ) -> list[Run]: # by folder name
    "All finished runs of a profile whose record has the values of `filters`."
    folders = sorted(p.parent for p in (results_dir(profile)/'runs').glob('*/*/steps-*/*/seed-*/run.json'))
    records = [(f, read_file(f/'run.json', load_json)) for f in folders]
    return [Run(f, r, read_file(f/'eval.csv.gz', read_scores)) for f, r in records if all(r.get(k) == v for k, v in filters.items())]

ANY_SEED = 'any' # the one row of an arm that has no training seeds

def score_table(runs: list[Run], # of one arm, one for each seed
                reward: str, # a column of the scores
                num_steps: int = 2, split: str = 'all' # 'seen', 'held_out' or 'all'
               ) -> pd.DataFrame: # a row a seed, a column a prompt
    "Mean over noises of every seed and prompt; `base` has one row, named `ANY_SEED`."
    rows = {}
    for run in runs:
        s = run.scores[run.scores.num_steps == num_steps]
        seed = ANY_SEED if run.record['arm'] == 'base' else run.record['seed']
        rows[seed] = (s if split == 'all' else s[s.split == split]).groupby('prompt')[reward].mean()
    return pd.DataFrame(rows).T.sort_index()

def pair(a: pd.DataFrame, b: pd.DataFrame # two score tables
        ) -> tuple[np.ndarray, np.ndarray]: # what `paired_difference` takes
    "The rows of the seeds that both tables have; the row of an arm without seeds is paired with each of the other's."
    seeds = a.index if ANY_SEED in b.index else b.index if ANY_SEED in a.index else a.index.intersection(b.index)
    return tuple(t.loc[[ANY_SEED]*len(seeds)].to_numpy() if ANY_SEED in t.index else t.loc[seeds].to_numpy() for t in (a, b))

def cell(x) -> str:
    "A value as it stands in a Markdown table."
    if isinstance(x, (str, bool)): return str(x)
    if pd.isna(x): return ''
    if float(x).is_integer() or abs(x) >= 100: return f'{x:.0f}'
    return f'{x:.1g}' if abs(x) < .0005 else f'{x:.3f}'

def markdown(table: pd.DataFrame) -> str:
    "A table as Markdown, rounded for reading."
    lines = [table.columns, ['---']*len(table.columns), *([cell(x) for x in row] for row in table.itertuples(index=False))]
    return '\n'.join('| '+' | '.join(line)+' |' for line in lines)+'\n'

def write_text(text: str, path: Path):
    "Write a text file, atomically."
    with atomic_path(path) as tmp: tmp.write_text(text)

def digits(x): return f'{x:.8g}' if isinstance(x, float) and not np.isnan(x) else x # a column of words and numbers is not formatted by pandas

def write_table(table: pd.DataFrame, out: Path, # the folder that holds tables/
                name: str, also_markdown: bool = False) -> pd.DataFrame: # `table`
    "Write a table as csv and, where asked, as Markdown."
    exact = table.apply(lambda column: column.map(digits) if column.dtype == object else column)
    write_text(exact.to_csv(index=False, float_format='%.8g', lineterminator='\n'), out/'tables'/f'{name}.csv')
    if also_markdown: write_text(markdown(table), out/'tables'/f'{name}.md')
    return table

STYLE = {'font.size': 13, 'axes.spines.top': False, 'axes.spines.right': False} # of all figures

def small(path: Path, width: int = 540, # pixels
          format: str = 'png' # 'jpeg' where the colours matter
         ):
    "A picture for the screen."
    picture, out = Image.open(path).convert('RGB'), io.BytesIO()
    picture = picture.resize((width, width*picture.height//picture.width), Image.LANCZOS)
    if format == 'png': picture = picture.quantize(48, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(out, format, optimize=True, quality=60)
    return display_image(out.getvalue(), format=format)

def save_figure(fig, out: Path, # the folder that holds figures/
                name: str, **options # of `small`
               ):
    "Write a figure as png and svg, and show it small."
    for ext, how in dict(png=dict(dpi=120), svg=dict(metadata={'Date': None})).items():
        with atomic_path(out/'figures'/f'{name}.{ext}') as tmp, plt.rc_context({'svg.hashsalt': 'lasro'}): fig.savefig(tmp, format=ext, **how)
    plt.close(fig)
    return small(out/'figures'/f'{name}.png', **options)

def headroom_rows(result: EvalResult, model: str, # 'student' or 'teacher'
                  num_steps: int) -> list[dict]: # one for each split and reward, and FID
    "Rows of tab_headroom from one evaluation."
    rows = []
    for split in ('seen', 'held_out', 'all'):
        s = result.scores if split == 'all' else result.scores[result.scores.split == split]
        for reward in [c for c in s if c not in ('num_steps', 'split', 'prompt', 'noise')]:
            means = s.groupby('prompt')[reward].mean().to_numpy()
            mean, lo, hi = crossed_mean(means)[:3]
            rows.append(dict(model=model, num_steps=num_steps, split=split, reward=reward, mean=mean, ci_low=lo, ci_high=hi, n=len(means)))
    return rows + [dict(model=model, num_steps=num_steps, split='all', reward='fid', mean=result.fid, ci_low=np.nan, ci_high=np.nan, n=result.n)]

def compare(found: list[Run], others: list[Run], reward: str, num_steps: int = 2, split: str = 'all') -> Estimate: # nan where they share no seed
    "The first arm minus the second, paired by seed and prompt."
    a, b = pair(score_table(found, reward, num_steps, split), score_table(others, reward, num_steps, split))
    return paired_difference(a, b) if len(a) else Estimate(np.nan)

fidelity_of = cache(read_fidelity)

def fidelity(found: list[Run], # of one arm
             num_steps: int, split: str) -> dict: # fid with its interval, kid, diversity
    "Means over seeds."
    rows = pd.concat([fidelity_of(r.folder) for r in found]).query('num_steps == @num_steps and split == @split')
    fid = t_interval(rows.fid)
    return dict(fid=fid.mean, fid_ci_low=fid.ci_low, fid_ci_high=fid.ci_high, kid=rows.kid.mean(), diversity=rows.diversity.mean())

COSTS = ['reward_calls', 'forward_equivalents', 'wall_s', 'peak_mb']

def cost(found: list[Run]) -> dict:
    "What a run of an arm has spent, mean over seeds."
    return {k: float(np.mean([r.record[k] for r in found])) for k in COSTS}

def summary(found: list[Run], # of one arm and setting
            reward: str, held_out: str | None, # columns of the scores
            num_steps: int = 2, split: str = 'all') -> dict:
    "Mean with its interval, seeds, held-out reward, fidelity and cost."
    scores = score_table(found, reward, num_steps, split).to_numpy()
    checked = score_table(found, held_out, num_steps, split).to_numpy().mean() if held_out else np.nan
    return dict(**crossed_mean(scores)._asdict(), n_seeds=len(scores), held_out=checked, **fidelity(found, num_steps, split), **cost(found))

def by_seed(found: list[Run], key: str # a column of metrics.csv
           ) -> pd.DataFrame: # a row a step at which all seeds have logged it, a column a seed
    "A curve of every seed."
    seeds = {r.record['seed']: read_file(r.folder/'metrics.csv', pd.read_csv).set_index('step') for r in found}
    return pd.DataFrame({seed: m[key] for seed, m in seeds.items() if key in m}).dropna()
