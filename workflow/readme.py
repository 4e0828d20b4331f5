"""Write README.md from nbs/index.ipynb: its text, its code, and for {{ file }} the file's content.

With --check it only says whether README.md is current.
"""
import re, sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]


def include(match: re.Match) -> str:
    "The content of the file named between double braces."
    path = ROOT/match[1]
    if not path.exists(): sys.exit(f'{match[1]} is missing: run make reproduce PROFILE=lab first')
    return path.read_text().strip()


def relink(text: str) -> str:
    "Links that start in nbs/ shall start at the root."
    def moved(m): return m[1]+(m[2][3:] if m[2].startswith('../') else f'nbs/{m[2]}')
    return re.sub(r'(\]\(|src=")(?!https?:|#|mailto:)([^)"]+)', moved, text)


def build() -> str:
    parts = []
    for cell in nbformat.read(ROOT/'nbs'/'index.ipynb', 4).cells:
        if re.match(r'#\|\s*hide', cell.source): continue
        source = re.sub(r'^#\|.*\n', '', cell.source, flags=re.M)
        if cell.cell_type == 'markdown': parts.append(re.sub(r'\{\{\s*(\S+)\s*\}\}', include, relink(source)))
        else: parts.append(f'```python\n{source}\n```')
    return '\n\n'.join(parts)+'\n'


if __name__ == '__main__':
    text, path = build(), ROOT/'README.md'
    if '--check' in sys.argv: sys.exit(0 if path.read_text() == text else 'README.md is stale: run make readme')
    path.write_text(text)
