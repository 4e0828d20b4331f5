"""Times whole lab runs of seed 0, each alone on the machine, in a process of its own: `python bench/alone.py ARM REWARD [ARM REWARD ...]`.

The lab batch puts runs side by side, so its seconds are longer than a user's. For each pair this writes results/lab/bench/alone-ARM-REWARD.json: what loading, training and evaluation took,
and the seconds of training at each logged step, which tab_efficiency and tab_cost read. The run itself is thrown away. OMP_NUM_THREADS sets the threads, all cores by default.
"""
import subprocess, sys, tempfile, time
from pathlib import Path


def one(arm: str, reward: str) -> dict:
    import lasro.baselines # its arms # noqa: F401
    from lasro.core import profile
    from lasro.finetune import evaluate_run, finetune, rendered_data
    from lasro.models import load_pipeline, load_teacher
    from lasro.shapes import prompts
    marks = [time.perf_counter()]
    pipe, teacher, texts = load_pipeline(), load_teacher(), prompts('train', profile('lab').train_prompts)
    data = rendered_data(pipe, texts)
    marks.append(time.perf_counter())
    def judge(run):
        marks.append(time.perf_counter())
        evaluate_run(run, profile('lab'), 'default', 'test')
    with tempfile.TemporaryDirectory() as folder:
        run = finetune(pipe, reward, texts, 2, Path(folder)/'run', arm, teacher, data, 0, 'lab', judge)
    marks.append(time.perf_counter())
    load_s, train_s, evaluation_s = (round(b-a, 2) for a, b in zip(marks, marks[1:]))
    steps = run.metrics.dropna(subset='probe_reward')[['step', 'reward_calls', 'wall_s']].round(3).to_dict('list') if 'probe_reward' in run.metrics else {}
    spent = {k: run.record[k] for k in ('environment', 'parameters', 'reward_calls', 'forward_equivalents', 'wall_s', 'peak_mb')}
    return dict(arm=arm, reward=run.record['reward'], load_s=load_s, train_s=train_s, evaluation_s=evaluation_s, steps=steps) | spent


def main(pairs: list[str]):
    for arm, reward in zip(pairs[::2], pairs[1::2]):
        subprocess.run([sys.executable, __file__, '--one', arm, reward], check=True)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--one']:
        from lasro.core import results_dir, save_json
        found = one(*sys.argv[2:])
        save_json(found, results_dir('lab')/'bench'/f"alone-{found['arm']}-{found['reward']}.json")
        print(f"{found['arm']} {found['reward']}: training {found['train_s']} s, evaluation {found['evaluation_s']} s, on {found['environment']['device']}")
    elif len(sys.argv) < 3 or len(sys.argv) % 2 == 0: sys.exit(__doc__)
    else: main(sys.argv[1:])
