"""Which size should a picture of a sign have? What the rewards read, on renders and on reconstructions, and what a UNet costs.

`python bench/signs_size.py [UPDATES]` prints rows of: size, latent channels, UNet cost relative to shapes, pictures, and of each
of ocr, crnn and ink_match the mean and the share that is strictly right. For each candidate, the autoencoder of the shapes world
is fine-tuned on signs for UPDATES (default 800); new channels start at random."""
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from lasro.core import generator, randn
from lasro.models import Conditioning, load_pipeline, predict_noise
from lasro.worlds.distill import fit, vae_loss
from lasro.worlds.networks import build_unet
from lasro.worlds.signs import render_signs, sample_signs, sign_captions
from lasro.worlds.signs_rewards import crnn, ink_match, ocr

RENDERED = (32, 32), (40, 40), (48, 48), (64, 64), (24, 64), (32, 64)
RECONSTRUCTED = ((32, 32), 4), ((32, 32), 8), ((40, 40), 4), ((48, 48), 4)
N = 256


def widen(old: nn.Module, dim: int, times: int) -> nn.Module:
    "Repeat a convolution's input (dim=1) or output channels with random weights beside the old ones."
    new = nn.Conv2d(old.in_channels*(times if dim else 1), old.out_channels*(1 if dim else times), old.kernel_size, padding=old.padding)
    with torch.no_grad():
        new.weight.mul_(.3)[:old.out_channels, :old.in_channels] = old.weight
        new.bias[:old.out_channels] = old.bias
    return new


def autoencoder(channels):
    "Return the shapes world's autoencoder, with more latent channels if asked for. Its means come first, then its log variances."
    vae = load_pipeline('shapes').vae.train().requires_grad_(True)
    if channels == 4: return vae
    k = channels//4
    for part, name, dim in ((vae.encoder, 'conv_out', 0), (vae.decoder, 'conv_in', 1)):
        setattr(part, name, widen(getattr(part, name), dim, k))
    vae.quant_conv = nn.Conv2d(2*channels, 2*channels, 1)
    vae.post_quant_conv = nn.Conv2d(channels, channels, 1)
    for conv in (vae.quant_conv, vae.post_quant_conv): nn.init.dirac_(conv.weight)
    return vae


@torch.no_grad()
def reconstruct(vae, images): return (vae.decode(vae.encode(2*images-1).latent_dist.mode()).sample/2+.5).clamp(0, 1)


def finetune(vae, size, channels, updates):
    "Train an autoencoder on signs and return its average."
    latents = channels, size[0]//4, size[1]//4
    def loss(step, average):
        signs = sample_signs(16, generator(0, 'size', step))
        return vae_loss(vae, render_signs(signs, size), randn(16, *latents, generator=generator(0, 'noise', step)))
    with tempfile.TemporaryDirectory() as d: return fit(vae, loss, updates, 1e-3, Path(d)/'vae.safetensors', ema=.99)


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


def main(updates=800):
    torch.set_num_threads(1)
    rewards = ocr(), crnn(), ink_match()
    signs = sample_signs(N, generator(0, 'size'))
    texts = sign_captions(signs, generator(0, 'size words'))
    unet = build_unet()
    base = seconds(unet, (32, 32))
    def row(size, channels, name, pictures):
        found = [reward(pictures, texts) for reward in rewards]
        values = [f"{values.mean():.3f} {info['strict'].mean():.3f}" for values, info in found]
        print('x'.join(map(str, size)), channels, f'{seconds(unet, size)/base:.2f}', name, *values, sep=', ', flush=True)
    for size in RENDERED: row(size, '', 'renders', render_signs(signs, size))
    for size, channels in RECONSTRUCTED:
        images = render_signs(signs, size)
        vae = autoencoder(channels)
        if channels == 4: row(size, channels, 'before', reconstruct(vae, images))
        row(size, channels, 'after', reconstruct(finetune(vae, size, channels, updates), images))


if __name__ == '__main__': main(*map(int, sys.argv[1:]))
