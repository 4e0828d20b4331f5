"""Recompute every committed table from the committed runs in a temporary folder and compare, cell by cell.

Exit 1 if one differs.
"""
import csv
import sys
import tempfile
from pathlib import Path

from lasro.command import run_notebook as run

from lasro.plan import ITEMS

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-6 # relative


def number(text: str) -> float | None: # None where `text` is no number
    try: return float(text)
    except ValueError: return None


def same(a: str, b: str) -> bool:
    "Are two cells equal, as text or within the tolerance?"
    if a == b: return True
    x, y = number(a), number(b)
    if x is None or y is None: return False
    return abs(x-y) <= TOLERANCE*max(abs(x), abs(y), 1e-6)


def compare(committed: Path, recomputed: Path) -> str: # what differs, or ''
    "Return the first difference of two csv files."
    if not recomputed.exists(): return 'is not recomputed by any page of lasro.plan.ITEMS'
    a, b = (list(csv.reader(p.open(newline=''))) for p in (committed, recomputed))
    if a[0] != b[0]: return f"has columns {','.join(a[0])}, recomputed {','.join(b[0])}"
    if len(a) != len(b): return f'has {len(a)-1} rows, recomputed {len(b)-1}'
    for i, (old, new) in enumerate(zip(a[1:], b[1:]), 2):
        for name, x, y in zip(a[0], old, new, strict=True):
            if not same(x, y): return f'line {i}, {name}: {x!r}, recomputed {y!r}'
    return ''


def main():
    committed = sorted((ROOT/'results'/'lab'/'tables').glob('*.csv'))
    pages = sorted({item.page for item in ITEMS if item.page})
    names = {item.name for item in ITEMS if item.page}
    tables = [t for t in committed if any(t.stem.startswith(name) for name in names)]
    if not tables: sys.exit('results/lab/tables holds no table: run make reproduce PROFILE=lab')
    with tempfile.TemporaryDirectory() as d:
        for page in pages: run(ROOT/'nbs'/'paper'/f'{page}.ipynb', Path(d)/f'{page}.ipynb', dict(PROFILE='lab', OUT=d))
        found = {t.name: compare(t, Path(d)/'tables'/t.name) for t in tables}
        extra = sorted(p.name for p in (Path(d)/'tables').glob('*.csv') if p.name not in found)
    for name, difference in found.items(): print(f"{name}: {difference or 'same'}")
    for name in extra: print(f'{name}: recomputed, but not committed')
    sys.exit(bool(extra) or any(found.values()))


if __name__ == '__main__': main()
