"Recomputes every committed table from the committed runs in a temporary folder and compares, cell by cell. Exit 1 if one differs."
import csv, logging, sys, tempfile
from pathlib import Path

from items import expanded
from run import run

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-6 # relative


def number(text: str) -> float | None: # None where `text` is no number
    try: return float(text)
    except ValueError: return None


def same(a: str, b: str) -> bool:
    "Are two cells equal, as text or within the tolerance?"
    x, y = number(a), number(b)
    return a == b or x is not None and y is not None and abs(x-y) <= TOLERANCE*max(abs(x), abs(y), 1e-6)


def compare(committed: Path, recomputed: Path) -> str: # what differs, or ''
    "The first difference of two csv files."
    if not recomputed.exists(): return 'is not recomputed by any notebook of workflow/items.py'
    a, b = (list(csv.reader(p.open(newline=''))) for p in (committed, recomputed))
    if len(a) != len(b): return f'has {len(a)-1} rows, recomputed {len(b)-1}'
    if a[0] != b[0]: return f"has columns {','.join(a[0])}, recomputed {','.join(b[0])}"
    for i, (old, new) in enumerate(zip(a[1:], b[1:]), 2):
        for name, x, y in zip(a[0], old, new):
            if not same(x, y): return f'line {i}, {name}: {x!r}, recomputed {y!r}'
        if len(old) != len(new): return f'line {i} has {len(old)} cells, recomputed {len(new)}'
    return ''


def main():
    logging.basicConfig(level=logging.ERROR)
    tables = sorted((ROOT/'results'/'lab'/'tables').glob('*.csv'))
    if not tables: sys.exit('results/lab/tables holds no table: run make reproduce PROFILE=lab')
    with tempfile.TemporaryDirectory() as d:
        made_by = {nb for item, nb, _ in expanded() if (ROOT/'results'/'lab'/'tables'/f'{item}.csv').exists()}
        for notebook in sorted(made_by): run(ROOT/'nbs'/f'{notebook}.ipynb', Path(d)/f'{notebook}.ipynb', dict(PROFILE='lab', OUT=d))
        found = {t.name: compare(t, Path(d)/'tables'/t.name) for t in tables}
        made = sorted(p.name for p in (Path(d)/'tables').glob('*.csv') if p.name not in found)
    for name, difference in found.items(): print(f"{name}: {difference or 'same'}")
    for name in made: print(f'{name}: recomputed, but not committed')
    sys.exit(bool(made) or any(found.values()))


if __name__ == '__main__': main()
