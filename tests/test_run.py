"A run as the batch starts it: by papermill, from any folder; and as a user watches it."
import csv
import json
import subprocess
import sys
from functools import partial

import pytest
from conftest import PROMPTS, ROOT, python, redness

from lasro.plan import RunSpec

NOTEBOOK = ROOT/'nbs'/'experiments'/'run.ipynb'
ASKED = dict(PROFILE='smoke', ARM='lasro', REWARD='attribute_binding', SEED=3)


def start(folder, **parameters) -> subprocess.CompletedProcess:
    "Run workflow/run.py in a folder that is not the repository, with results below it."
    args = [x for name, value in parameters.items() for x in ('-p', name, value)]
    command = ROOT/'workflow'/'run.py', NOTEBOOK, folder/'out.ipynb', *args
    return python(*command, cwd=folder, LASRO_RESULTS=str(folder/'results'))


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
    "A smoke run of lasro: (the folder of the run, the folder it was started in, what it printed)."
    folder = tmp_path_factory.mktemp('elsewhere')
    found = start(folder, **ASKED)
    assert found.returncode == 0, found.stderr[-2000:]
    runs = folder/'results'/'smoke'/'runs'
    return runs/'lasro'/'attribute_binding'/'steps-2'/'default'/'seed-3', folder, found.stdout


def test_a_misspelt_parameter_is_refused(tmp_path):
    found = start(tmp_path, PROFIL='quick')
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1] == 'run.ipynb has no parameter PROFIL: did you mean PROFILE?'
    assert not (tmp_path/'out.ipynb').exists()


@pytest.mark.parametrize('name, value', dict(PROFILE='smokey', ARM='larso', REWARD='beauty').items())
def test_unknown_names_get_one_line_and_leave_nothing(tmp_path, name, value):
    found = start(tmp_path, **ASKED | {name: value})
    line = found.stderr.strip().splitlines()[-1]
    assert found.returncode == 1 and value in line and line.startswith('run.ipynb: ')
    assert not [p for p in (tmp_path/'results').rglob('*') if p.is_file()]


SNAKEMAKE = ['-m', 'snakemake', '-n', '-s', ROOT/'workflow'/'Snakefile', '--cores', '1', '--nolock', '--config']


def test_an_unknown_profile_stops_the_batch_in_one_line():
    found = python(*SNAKEMAKE, 'profile=smokey')
    assert found.returncode and "unknown profile 'smokey'" in found.stdout+found.stderr


def test_the_batch_plans_every_run_of_the_plan():
    "From nothing: nine jobs or more, one for each run of the profile."
    from lasro.plan import main_runs
    found = python(*SNAKEMAKE, 'profile=smoke', LASRO_RESULTS='results/none')
    assert found.returncode == 0, found.stderr[-2000:]
    text = found.stdout+found.stderr
    for spec in main_runs('smoke'): assert f'run_{spec.arm}'.replace('-', '_') in text


def test_the_record_shows_what_was_asked(finished):
    run, _, _ = finished
    record = json.loads((run/'run.json').read_text())
    assert {k: record[k.lower()] for k in ASKED} == ASKED
    assert record['reward_calls'] > 0 and record['forward_equivalents'] > 0 and record['wall_s'] > 0
    assert record['split'] == 'validation' and record['world'] == 'shapes' and record['inputs']


def test_a_run_is_whole(finished):
    run, _, _ = finished
    names = 'run.json', 'metrics.csv', 'eval.csv.gz', 'fid_stats.npz', 'grid.png'
    for name in names: assert (run/name).exists(), name
    rows = list(csv.DictReader((run/'metrics.csv').open()))
    assert rows and {'step', 'reward_calls', 'wall_s', 'reward', 'grad_norm', 'rank_correlation'} <= set(rows[0])
    assert not [p.name for p in run.iterdir() if p.name.startswith('.')], 'temporary files were left'


def test_a_finished_run_is_skipped(finished):
    run, folder, _ = finished
    before = {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file()}
    assert start(folder, **ASKED).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file()} == before


def test_the_log_is_quiet(finished):
    assert len(finished[2].splitlines()) < 20 and 'Warning' not in finished[2]


def test_a_run_can_be_watched(pipe, tmp_path):
    "Files are there after the first round, and tensorboard has curves and pictures."
    from lasro.finetuning import finetune
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    seen = []

    def watched(images, prompts, metadata):
        seen.append({p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*') if p.is_file()})
        return redness(images, prompts, metadata)
    options = dict(log_with='tensorboard', snapshot_every=1, lora_rank=2, probe_prompts=4)
    finetune(pipe, watched, PROMPTS, tmp_path, profile='smoke', **options)
    first = 'grid.png', 'lora/pytorch_lora_weights.safetensors'
    after_first = {'metrics.csv', 'snapshots/best.json', *[f'snapshots/step-00000/{name}' for name in first]}
    assert any(after_first <= files for files in seen)
    events = EventAccumulator(str(next(tmp_path.rglob('events.out.*')).parent))
    events.Reload()
    tags = events.Tags()
    assert 'probe_reward' in tags['scalars'] and len(events.Scalars('reward')) == 3
    assert 'samples' in tags['images']


def test_the_readme_trains_with_your_own_reward(tmp_path, monkeypatch):
    import lasro.finetuning
    small = partial(lasro.finetuning.finetune, profile='smoke', outer_steps=1)
    monkeypatch.setattr(lasro.finetuning, 'finetune', small)
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT/'nbs'/'index.ipynb').read_text())['cells']
    exec('\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code'), {})
    written = {p.name for p in (tmp_path/'my-run').rglob('*')}
    assert {'run.json', 'metrics.csv', 'pytorch_lora_weights.safetensors'} <= written


def test_plan_names_folders_that_do_not_collide():
    a, b = RunSpec('lasro', 'my_reward:two_aims'), RunSpec('lasro', 'image_reward')
    assert a.folder('lab') != b.folder('lab') and 'two_aims' in str(a.folder('lab'))


CELLS = [('0.30000001', '0.3', True), ('0.31', '0.3', False), ('lasro', 'base', False),
         ('', 'nan', False), ('', '', True)]


@pytest.mark.parametrize('a, b, expected', CELLS)
def test_verify_compares_cells(a, b, expected, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/'workflow'))
    from verify import same
    assert same(a, b) == expected
