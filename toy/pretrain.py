"""Trains the embedded model from nothing: autoencoder, text encoder, UNet, with the project's own modules.

    python -m toy.pretrain              all three stages, then toy/model/ is written; hours on two CPU cores
    python -m toy.pretrain unet         one stage, from where its checkpoint in runs/pretrain/ stands

Every step's data depends on (stage, step) alone and the state is saved every few minutes, so a run that is cut short
continues as if it had not been. Deliberate choices, against Stable Diffusion's own training:
1. Latents are scaled to standard deviation 0.5, not 1. A 16x16 latent shows its mean through more noise than a 64x64
   one: at t = 981 (√ᾱ = 0.076) it would still be legible, and the model would read the background there instead of in the prompt.
2. The loss is weighted by min(SNR, 5) / SNR (Hang et al. 2023, arXiv 2303.09556): converges in fewer steps.
3. The text encoder first learns to name a picture's attributes from its caption, a minute's stand-in for CLIP's
   contrastive training; from there it goes on with the UNet.
"""
import argparse
import copy
import csv
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import weights
from clip_text import CLIPText, tokenize
from scheduler import DDIM
from toy import draw, probe
from unet import UNet
from vae import VAE

MODEL, RUNS = Path(__file__).parent / "model", Path("runs/pretrain")
VAE_CONFIG = dict(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=[16, 32, 64],
                  layers_per_block=1, norm_num_groups=8)
TEXT_CONFIG = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2)
UNET_CONFIG = dict(
    in_channels=4, out_channels=4, block_out_channels=[32, 64, 128, 128], layers_per_block=2, attention_head_dim=2,
    cross_attention_dim=64, norm_num_groups=8,  # attention at 16x16 places would cost 40 % of a step (0.66 s for 0.40)
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"])
LATENT_STD = 0.5
STEPS = {"vae": 2400, "text": 1500, "unet": 10000}


def fit(stage, module, loss, groups, steps, save=None, average=0.998, warmup=200, save_every=250):
    """Minimises loss(step) over `groups` (AdamW, one cosine) and leaves the weights' moving average in `module`.

    Continues from RUNS/<stage>.safetensors, which is written every `save_every` steps; a curve goes to <stage>.csv.
    """
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(i / steps, 1))) + 1e-3))
    averaged = copy.deepcopy(module)
    start, file = 0, RUNS / f"{stage}.safetensors"
    if file.exists():
        start = weights.load_training(file, module, averaged, optimizer)
        for _ in range(start):
            schedule.step()
    began, losses = time.time(), []
    for step in range(start, steps):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(module.parameters()), 1 - min(average, (step + 1) / (step + 10)))
        losses.append(value.item())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            weights.save_training(file, module, averaged, optimizer, step + 1)
            seconds = (time.time() - began) / len(losses)
            with open(RUNS / f"{stage}.csv", "a", newline="") as f:
                csv.writer(f).writerow([step + 1, f"{np.mean(losses[-save_every:]):.5f}", f"{seconds:.3f}"])
            print(f"{stage} {step + 1}/{steps}: loss {np.mean(losses[-save_every:]):.4f}, {seconds:.2f} s a step", flush=True)
    module.load_state_dict(averaged.state_dict())


def train_vae(size=32, lr=2e-3):
    """L1 and a perceptual distance on the probe's feature maps; a light KL term keeps the latents smooth."""
    torch.manual_seed(0)
    vae, eye = VAE(**VAE_CONFIG, scaling_factor=1.0), probe.load()

    def loss(step):
        rng, generator = np.random.default_rng([1, step]), torch.Generator().manual_seed(step)
        x = probe.to_tensor(draw.batch(rng, size)[1])
        mean, logvar = vae.moments(x)
        z = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator)
        y = vae.decode(z)
        seen = sum((a - b).abs().mean() for a, b in zip(eye.maps(y)[:3], eye.maps(x)[:3]))
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return 2 * (y - x).abs().mean() + 0.5 * seen + 1e-3 * kl

    fit("vae", vae, loss, [dict(params=vae.parameters(), lr=lr)], STEPS["vae"])
    return vae
