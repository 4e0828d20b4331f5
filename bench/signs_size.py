"""Which size should a picture of a sign have? What the recognisers read, on renders and on reconstructions, and what a UNet costs.

python bench/signs_size.py [UPDATES] prints one row for each size. An autoencoder of the shapes world's form is trained for UPDATES (default 400) on each."""
import sys
import tempfile
import time
from pathlib import Path

import torch

from lasro.core import generator, randn
from lasro.models import Conditioning, predict_noise
from lasro.worlds.distill import fit, vae_loss
from lasro.worlds.networks import build_unet, build_vae
from lasro.worlds.signs import render_signs, sample_signs, sign_captions
from lasro.worlds.signs_rewards import crnn, ink_match, ocr

SIZES = (32, 32), (40, 40), (48, 48), (24, 64), (32, 64), (64, 64)
N = 256


def reconstruct(images, size, updates):
    "Train an autoencoder for a short time and return what it makes of pictures."
    torch.manual_seed(1)
    vae = build_vae()
    latents = size[0]//4, size[1]//4
    def loss(step, average):
        signs = sample_signs(32, generator(0, 'size', step))
        return vae_loss(vae, render_signs(signs, size), randn(32, 4, *latents, generator=generator(0, 'noise', step)))
    with tempfile.TemporaryDirectory() as d: vae = fit(vae, loss, updates, 2e-3, Path(d)/'vae.safetensors', ema=.99)
    with torch.no_grad(): return (vae.decode(vae.encode(2*images-1).latent_dist.mode()).sample/2+.5).clamp(0, 1)


@torch.no_grad()
def seconds(unet, size, n=64):
    "Return the CPU seconds of one forward pass, the least of five."
    cond = Conditioning(torch.zeros(n, 28, 112), torch.zeros(n, 64))
    x = torch.randn(n, 4, size[0]//4, size[1]//4)
    found = []
    for _ in range(5):
        start = time.process_time()
        predict_noise(unet, x, 500, cond)
        found.append(time.process_time()-start)
    return min(found)


def main(updates=400):
    torch.set_num_threads(1)
    rewards = ocr(), crnn(), ink_match()
    signs = sample_signs(N, generator(0, 'size'))
    texts = sign_captions(signs, generator(0, 'size words'))
    unet = build_unet()
    base = seconds(unet, (32, 32))
    print('size, UNet, pictures; of each of ocr, crnn, ink_match: mean, strict')
    for size in SIZES:
        images = render_signs(signs, size)
        cost = f'{seconds(unet, size)/base:.2f}'
        sets = dict(renders=images)
        if size[0]*size[1] <= 48*48: sets['reconstructions'] = reconstruct(images, size, updates)
        for name, pictures in sets.items():
            found = [reward(pictures, texts) for reward in rewards]
            values = [f"{values.mean():.3f} {info['strict'].mean():.3f}" for values, info in found]
            print('x'.join(map(str, size)), cost, name, *values, sep=', ', flush=True)


if __name__ == '__main__': main(*map(int, sys.argv[1:]))
