"""Run one notebook by papermill: python workflow/run.py NOTEBOOK OUT [-p NAME VALUE]...

A name that the notebook does not know is refused.
"""
import argparse
import difflib
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import papermill
from papermill.cli import _resolve_type
from papermill.exceptions import PapermillExecutionError


def check_parameters(notebook: Path, names):
    "Raise ValueError for the first name that is no parameter of `notebook`; papermill itself would only warn."
    known = list(papermill.inspect_notebook(str(notebook)))
    for name in names:
        if name in known: continue
        near = difflib.get_close_matches(name.upper(), known, 1)
        hint = f'did you mean {near[0]}?' if near else f"it has {', '.join(known) or 'none'}"
        raise ValueError(f'{notebook.name} has no parameter {name}: {hint}')


def run(notebook: Path, out: Path, parameters: dict):
    "Execute `notebook` with `parameters` and keep the executed copy at `out`."
    if not notebook.exists():
        raise FileNotFoundError(f'there is no notebook {notebook}')
    check_parameters(notebook, parameters)
    out.parent.mkdir(parents=True, exist_ok=True)
    here = str(Path(__file__).parent) # a reward may be named as my_reward:free_margin
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [here, os.environ.get('PYTHONPATH')]))
    os.environ['PYTHONWARNINGS'] = 'ignore'
    printed = Printed(out.stem)
    with tempfile.TemporaryDirectory() as settings:
        os.environ['IPYTHONDIR'] = quiet_kernel(Path(settings))
        papermill.execute_notebook(str(notebook), str(out), parameters, kernel_name='python3', progress_bar=False,
                                   stdout_file=printed, stderr_file=printed)


def quiet_kernel(folder: Path) -> str:
    "Write settings with which the kernel logs errors only, and return their folder."
    profile = folder/'profile_default'
    profile.mkdir(parents=True)
    (profile/'ipython_kernel_config.py').write_text('c.IPKernelApp.log_level = 40\n')
    return str(folder)


class Printed:
    "Passes on what a notebook prints, each line with the notebook's name before it."
    def __init__(self, name: str): self.name = name
    def flush(self): pass
    def write(self, text: str):
        for line in filter(str.strip, text.splitlines()): print(f'{self.name}: {line.rstrip()}', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('notebook', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('-p', nargs=2, action='append', default=[], metavar=('NAME', 'VALUE'), dest='parameters')
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    logging.getLogger('traitlets').setLevel(logging.ERROR)
    try: run(args.notebook, args.out, {name: _resolve_type(value) for name, value in args.parameters})
    except PapermillExecutionError as e:
        sys.exit(f'{args.notebook.name}: {e.ename}: {e.evalue.partition(chr(10))[0]} (whole trace in {args.out})')
    except (ValueError, OSError) as e: sys.exit(str(e))


if __name__ == '__main__': main()
