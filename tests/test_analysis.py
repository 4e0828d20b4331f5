"The analysis: a sample's gradient does not depend on its batch, and the smallest size leaves no records."
import os, subprocess, sys

import pandas as pd, torch
from conftest import ROOT

from lasro.analysis import analysis_task, visit
from lasro.models import decode, load_teacher
from lasro.sampling import sample
from lasro.shapes import prompts

FIGURES = ('fig_diversity', 'fig_degeneracy', 'fig_smoothness', 'fig_gradients')


def redness(images, prompts, metadata): return images[:, 0].mean((1, 2))-images[:, 1:].mean((1, 2, 3))
redness.differentiable = True


def test_the_gradient_of_a_sample_is_the_one_it_has_alone(pipe):
    task, grads = analysis_task(pipe, redness, prompts('train', 4), load_teacher(), rank=2)
    prompt, noise, injected = visit(task, 4, 3, 1, 'test')
    def values(rows):
        z = sample(task.pipe.unet, task.cond[prompt[rows]], noise[rows], injected[:, rows], 4).final
        return task.reward(decode(task.pipe.vae, z), [task.texts[i] for i in prompt[rows].tolist()])[0]
    together = grads(values(torch.arange(3)))
    assert together.shape == (3, 4, grads.size)
    for i in range(3):
        alone = torch.cat([w.flatten() for w in torch.autograd.grad(values(torch.tensor([i])).sum(), grads.weights)])
        grads.forget()
        assert (together[i].sum(0)-alone).abs().max() < 1e-3*alone.abs().max()


def test_the_smallest_size_draws_everything_and_leaves_no_records(tmp_path):
    command = [sys.executable, ROOT/'workflow'/'run.py', ROOT/'nbs'/'11_analysis.ipynb', tmp_path/'out.ipynb', '-p', 'PROFILE', 'smoke', '-p', 'OUT', tmp_path/'drawn']
    done = subprocess.run(list(map(str, command)), env={**os.environ, 'LASRO_RESULTS': str(tmp_path/'results')}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path/'results').exists()
    for name in FIGURES:
        assert {'mean', 'ci_low', 'ci_high', 'n'} <= set(pd.read_csv(tmp_path/'drawn'/'tables'/f'{name}.csv'))
        assert all((tmp_path/'drawn'/'figures'/f'{name}.{ext}').stat().st_size for ext in ('png', 'svg'))
    claims = pd.read_csv(tmp_path/'drawn'/'tables'/'claims_analysis.csv')
    assert {'claim', 'statistic', 'ci_low', 'ci_high', 'n', 'verdict', 'notebook'} <= set(claims) and set(claims.verdict) <= {'holds', 'fails', 'undecided'}
