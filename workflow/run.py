"Run one notebook by papermill: python workflow/run.py NOTEBOOK OUT [-p NAME VALUE]...; a name that the notebook does not know is refused."
import argparse, difflib, os, sys, warnings
from pathlib import Path

import papermill
from papermill.cli import _resolve_type
from papermill.exceptions import PapermillExecutionError


def check_parameters(notebook: Path, # a runnable notebook
                     names # of the parameters that shall be set
                    ):
    "Raise a `ValueError` in one line for the first name that is no parameter of `notebook`; papermill itself would only warn."
    known = list(papermill.inspect_notebook(str(notebook)))
    for name in names:
        if name in known: continue
        near = difflib.get_close_matches(name.upper(), known, 1)
        hint = f'did you mean {near[0]}?' if near else f"it has {', '.join(known) or 'none'}"
        raise ValueError(f'{notebook.name} has no parameter {name}: {hint}')


def run(notebook: Path, out: Path, # where the executed copy goes
        parameters: dict):
    "Execute `notebook` with `parameters`; whatever goes wrong becomes one line."
    if not notebook.exists(): raise FileNotFoundError(f'there is no notebook {notebook}')
    check_parameters(notebook, parameters)
    out.parent.mkdir(parents=True, exist_ok=True)
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get('PYTHONPATH')])) # a reward may be named as my_reward:free_margin
    papermill.execute_notebook(str(notebook), str(out), parameters, kernel_name='python3', progress_bar=False, stdout_file=Printed(out.stem), stderr_file=Printed(out.stem))


class Printed:
    "Passes on what a notebook prints, each line with the notebook's name before it; what its cells show stays in the executed copy."
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
    try: run(args.notebook, args.out, {name: _resolve_type(value) for name, value in args.parameters})
    except PapermillExecutionError as e: sys.exit(f'{args.notebook.name}: {e.ename}: {e.evalue.partition(chr(10))[0]} (whole trace in {args.out})')
    except (ValueError, OSError) as e: sys.exit(str(e))


if __name__ == '__main__': main()
