"Pairs from a file and votes, without a reward function, on the embedded model and on a small SDXL."
import pytest
import torch
from conftest import PROMPTS, without_clock

from lasro.core import generator
from lasro.finetuning import finetune
from lasro.models import encode_prompts, latent_shape
from lasro.pairs import PicturePairs, read_pairs, write_pairs
from lasro.sampling import draw_noise, generate
from lasro.votes import VoteSession, VoteWidget

SMALL = dict(profile='smoke', snapshot_every=0, probe_prompts=8)


def redder(images) -> int:
    red = images[:, 0].mean((1, 2))-images[:, 1:].mean((1, 2, 3))
    return int(red.argmax())


def red_pairs(pipe, n: int) -> PicturePairs:
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(n)]
    noise, injected = draw_noise(2*n, 2, generator(0, 'red pairs'), latent_shape(pipe))
    images = generate(pipe, encode_prompts(pipe, prompts*2), noise, injected)
    pairs = [images[[i, i+n]] for i in range(n)]
    best = [redder(two) for two in pairs]
    pictures = [torch.stack([two[b] for two, b in zip(pairs, order)])
                for order in (best, [1-b for b in best])]
    return PicturePairs(prompts, *[(x*255).round().byte() for x in pictures])


def test_pairs_from_a_folder_train_without_a_reward(pipe, tmp_path):
    write_pairs(red_pairs(pipe, 20), tmp_path/'pairs')
    pairs = read_pairs(tmp_path/'pairs', 32)
    run = finetune(pipe, None, PROMPTS, tmp_path/'run', 'lasro-pairs', preferences=pairs, **SMALL)
    assert run.record['reward'] == 'pairs' and run.record['reward_calls'] == 0
    assert run.record['reward_options'] == pairs.summary()
    assert run.metrics.pairs[0] == 18 and (tmp_path/'run'/'unet.safetensors').exists()
    assert 'probe_reward' not in run.metrics


def test_a_run_on_pairs_resumes_bit_for_bit(pipe, tmp_path, monkeypatch):
    import lasro.training as training
    pairs, checkpoint = red_pairs(pipe, 20), training.checkpoint
    sizes = SMALL | dict(outer_steps=10, arm='lasro-pairs', preferences=pairs)
    def interrupted(*args):
        checkpoint(*args)
        raise KeyboardInterrupt
    whole = finetune(pipe, None, PROMPTS, **sizes)
    with monkeypatch.context() as m:
        m.setattr(training, 'checkpoint', interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(pipe, None, PROMPTS, tmp_path/'run', **sizes)
    others = sizes | dict(preferences=red_pairs(pipe, 16))
    with pytest.raises(ValueError, match='reward_options was'):
        finetune(pipe, None, PROMPTS, tmp_path/'run', **others)
    resumed = finetune(pipe, None, PROMPTS, tmp_path/'run', **sizes)
    pair = zip(whole.pipe.unet.parameters(), resumed.pipe.unet.parameters())
    assert all(torch.equal(a, b) for a, b in pair)
    rows = [without_clock(r.metrics.to_dict('records')) for r in (whole, resumed)]
    assert rows[0] == rows[1]


def small_sdxl() -> tuple[dict, object]:
    "Arguments of a session with a small SDXL, and what keeps its files."
    from lasro.sdxl.config import make_config
    from lasro.sdxl.prepare import prepare
    ready = prepare(make_config(small=True, device='cpu', overrides=dict(outer_steps=2, pretrain_steps=2)))
    of_a_run = ('reward', 'held_out', 'out', 'force', 'arm', 'before_record', 'c1', 'pairs')
    return {name: v for name, v in ready.arguments.items() if name not in of_a_run}, ready


@pytest.fixture(params=['shapes', 'sdxl'])
def session(request, pipe):
    if request.param == 'shapes':
        yield VoteSession(pipe, PROMPTS, profile='smoke', lora_rank=4, outer_steps=2, pretrain_steps=2)
        return
    arguments, ready = small_sdxl()
    yield VoteSession(**arguments)


def test_votes_train_the_model(session, tmp_path):
    before = [p.detach().clone() for p in session.pipe.unet.parameters()]
    size = session.images.shape[-1]
    for _ in range(4): session.vote(redder(session.images))
    row = session.train()
    assert row['votes'] == 4 and row['grad_norm'] > 0
    moved = [not torch.equal(a, b) for a, b in zip(before, session.pipe.unet.parameters())]
    assert any(moved)
    session.vote(0)
    assert len(session.agreed) == 1 and len(session.arm.buffer.winners) == 5
    session.save(tmp_path)
    assert (tmp_path/'lora').is_dir() and len(read_pairs(tmp_path/'pairs', size)) == 5


def test_buttons_vote_and_train(session):
    pytest.importorskip('ipywidgets')
    widget = VoteWidget(session)
    first = widget.pictures[0].value
    widget.buttons['train'].click()
    assert 'there is no vote yet' in widget.status.value
    for name in ('left', 'right', 'neither', 'left'): widget.buttons[name].click()
    assert len(session.votes) == 3 and widget.pictures[0].value != first
    widget.buttons['train'].click()
    assert session.rounds == 1 and '3 votes' in widget.status.value
    assert '1 rounds trained' in widget.status.value and session.prompt in widget.prompt.value
