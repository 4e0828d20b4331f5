"""Two rewards of one's own, as a user would write them.

A run names them by import path: `my_reward:two_aims` or `my_reward:free_margin`.

workflow/run.py puts this folder on the path of the notebook that it starts.
"""
import numpy as np

from lasro.rewards import Reward, load_reward

BINDING, TASTE = load_reward('attribute_binding'), load_reward('image_reward')


def binding_and_taste(images, prompts, metadata=None):
    "The things that the prompt names, in a picture that pleases: attribute_binding plus half of image_reward."
    return BINDING(images, prompts)[0]+.5*TASTE(images, prompts)[0]


def even_margin(images, prompts, metadata=None):
    "A plain margin: minus the mean distance of the outer two rings of pixels from their median colour."
    scores = []
    for x in images.detach().cpu().numpy(): # (3, H, W); numpy knows no gradient
        ring = np.ones(x.shape[1:], bool)
        ring[2:-2, 2:-2] = False
        scores.append(-float(np.abs(x[:, ring]-np.median(x[:, ring], axis=1, keepdims=True)).mean()))
    return scores


two_aims = Reward('two_aims', binding_and_taste, held_out='clip_score')
free_margin = Reward('free_margin', even_margin, (-1, 0), held_out='attribute_binding')
