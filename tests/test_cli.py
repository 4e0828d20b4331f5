"A run as the batch starts it: by papermill, from any folder."
import csv, json, subprocess, sys
from functools import partial

import pytest
from conftest import ROOT, RUN_NOTEBOOK, start

ASKED = dict(PROFILE='smoke', ARM='lasro', REWARD='attribute_binding', SEED=3)


def test_a_misspelt_parameter_is_refused(tmp_path):
    found = subprocess.run([sys.executable, ROOT/'workflow'/'run.py', RUN_NOTEBOOK, tmp_path/'out.ipynb', '-p', 'PROFIL', 'quick'], capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1] == '09_lasro.ipynb has no parameter PROFIL: did you mean PROFILE?'
    assert not (tmp_path/'out.ipynb').exists()


def test_unknown_names_get_one_line_and_leave_nothing(tmp_path):
    wrong = dict(PROFILE='smokey', ARM='larso', REWARD='beauty')
    started = {}
    for name, value in wrong.items():
        (tmp_path/name).mkdir()
        started[name] = start(results=tmp_path/name/'results', cwd=tmp_path/name, **{**ASKED, name: value})
    for name, process in started.items():
        err = process.communicate(timeout=120)[1].strip().splitlines()[-1]
        assert process.returncode == 1, name
        assert wrong[name] in err and name.lower() in err.lower() and err.startswith('09_lasro.ipynb: '), err
        assert not [p for p in (tmp_path/name/'results').rglob('*') if p.is_file()]


def test_an_unknown_profile_stops_the_batch_in_one_line():
    snakemake = [sys.executable, '-m', 'snakemake', '-n', '-q', '-s', ROOT/'workflow'/'Snakefile', '--cores', '1', '--nolock', '--config', 'profile=smokey']
    found = subprocess.run(snakemake, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode and "unknown profile 'smokey'" in found.stdout+found.stderr


def test_the_record_shows_what_was_asked(finished):
    run, _, _ = finished
    record = json.loads((run/'run.json').read_text())
    assert {k: record[k.lower()] for k in ASKED} == ASKED
    assert record['reward_calls'] > 0 and record['forward_equivalents'] > 0 and record['wall_s'] > 0
    assert record['environment']['versions']['torch'] and record['inputs']


def test_a_run_is_whole_and_small(finished):
    run, _, _ = finished
    for name in ('run.json', 'metrics.csv', 'eval.csv.gz', 'fid_stats.npz', 'grid.png'): assert (run/name).exists(), name
    rows = list(csv.DictReader((run/'metrics.csv').open()))
    assert rows and {'step', 'reward_calls', 'wall_s', 'reward', 'grad_norm', 'rank_correlation'} <= set(rows[0])
    assert not [p.name for p in run.iterdir() if p.name.startswith('.')], 'temporary files were left'


def test_a_finished_run_is_skipped(finished):
    run, results, _ = finished
    before = {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file()}
    process = start(results=results, cwd=results.parent, **ASKED)
    assert process.communicate(timeout=120) and process.returncode == 0
    assert {p: p.stat().st_mtime_ns for p in run.rglob('*') if p.is_file()} == before


def test_the_log_is_quiet(finished): assert len(finished[2].splitlines()) < 100


def test_the_readme_trains_with_your_own_reward(tmp_path, monkeypatch):
    import lasro.finetune
    small = partial(lasro.finetune.finetune, profile='smoke', outer_steps=1)
    monkeypatch.setattr(lasro.finetune, 'finetune', small)
    monkeypatch.chdir(tmp_path)
    code = [''.join(c['source']) for c in json.loads((ROOT/'nbs'/'index.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    exec('\n'.join(code), {})
    assert {'run.json', 'metrics.csv', 'pytorch_lora_weights.safetensors'} <= {p.name for p in (tmp_path/'my-run').rglob('*')}


@pytest.mark.parametrize('a, b, expected', [('0.30000001', '0.3', True), ('0.31', '0.3', False), ('lasro', 'base', False), ('', 'nan', False), ('', '', True)])
def test_verify_compares_cells(a, b, expected):
    from verify import same
    assert same(a, b) == expected
