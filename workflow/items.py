"Which notebook draws which table and figure: the one list."
REWARDS = ('image_reward', 'attribute_binding', 'text_alignment')

# item, notebook, what it says; {reward} stands for each main reward
ITEMS = (
    ('tab_main', '12_comparison', 'every arm, reward, split, 1 and 2 steps: means, intervals, differences, FID, diversity, cost'),
    ('tab_converged', '12_comparison', 'what more distillation alone does to the two-step student, at two learning rates'),
    ('tab_efficiency', '12_comparison', 'reward calls and seconds that each arm needs to win half of the head-room'),
    ('tab_tuning', '12_comparison', 'what each arm tried on validation prompts, and what it ships with'),
    ('fig_curves_{reward}', '12_comparison', 'true reward of every arm against reward calls and wall-clock; test reward, held-out reward and FID below'),
    ('fig_grid_{reward}', '12_comparison', 'the same prompts and noise before and after each arm'),
    ('tab_headroom_won', '12_comparison', 'how much of the way from the two-step student to its teacher LaSRO goes'),
    ('tab_cost', '12_comparison', 'wall-clock, memory, reward calls and generator passes'),
    ('tab_backbones', '07_surrogate', "four backbones of the surrogate: rank accuracy on seen and held-out prompts, on samples of the untouched and of a tuned model, time, memory"),
    ('fig_backbones', '07_surrogate', 'rank accuracy against the number of training pairs, and against the price'),
    ('fig_calibration', '07_surrogate', 'how sure the surrogate is of a pair against how often it is right'),
    ('fig_diversity', '11_analysis', 'what injected noise changes at 1, 2, 4 and 8 steps'),
    ('fig_degeneracy', '11_analysis', "what each step's likelihood is credited with, and its noise"),
    ('fig_smoothness', '11_analysis', 'how rough the way from noise to picture and reward is'),
    ('fig_gradients', '11_analysis', "each method's gradient against a known one, by reward calls"),
    ('claims_analysis', '11_analysis', 'the verdicts of the analysis'),
    ('tab_ablations', '12_comparison', 'LaSRO with one thing changed: which part does what'),
    ('fig_hacking', '12_comparison', 'a frozen surrogate against an online one: its own score and the true reward'),
    ('fig_exploration', '12_comparison', 'on- against off-policy exploration at equal reward calls'),
    ('tab_ns', '13_questions', 'N_s of 1, 2, 4, 6, 8, 16 at equal reward calls'),
    ('tab_steps', '13_questions', 'training and evaluation at 1, 2, 3 and 4 steps'),
    ('fig_value', '13_questions', 'the surrogate of z1 against the label of z1 and against its value, by reward and by loss'),
    ('tab_rewards', '13_questions', 'further rewards: relation, count, file size, a sum of two, a user\'s own'),
    ('tab_claims', '13_questions', 'each claim of the paper: statistic, interval, verdict, notebook'),
)


def expanded() -> list[tuple[str, str, str]]:
    "`ITEMS`, one row a file."
    return [(item.format(reward=r), notebook, says) for item, notebook, says in ITEMS for r in (REWARDS if '{reward}' in item else REWARDS[:1])]
