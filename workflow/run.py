"""Run one notebook as `lasro run` does, with this folder on its path, so that a reward may be named as my_reward:free_margin:
python workflow/run.py NOTEBOOK OUT [-p NAME VALUE]..."""
import os
import sys
from pathlib import Path

from lasro.command import main

if __name__ == '__main__':
    here = str(Path(__file__).parent)
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [here, os.environ.get('PYTHONPATH')]))
    main(['run', *sys.argv[1:]])
