"""The training targets side by side, and the table of what else sets the methods apart.

A loss takes (e, e_original, z_t, t, c_s, c_0) and returns a scalar: `e` is the student ε_θ(z, t, c), `e_original` the frozen
model ε_θ° it started from; z_t (B, 4, H, W) are latents at timestep t; c_s is the prompt to be unlearned and c_0 the
empty one, both (B, 77, D). This is the place for your own: write the function, add a row to METHODS.
"""
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F


def sdd_loss(e, e_original, z_t, t, c_s, c_0):
    """Safe self-distillation (arXiv 2307.05977, eq. 12): ‖ε_θ(z_t, t, c_s) − sg ε_θ(z_t, t, c_0)‖², the mean over elements."""
    with torch.no_grad():
        target = e(z_t, t, c_0)
    return F.mse_loss(e(z_t, t, c_s).float(), target.float())


def preservation(e, e_original, z_t, t, c_0):
    """‖ε_θ(z_t, t, c_0) − sg ε_θ°(z_t, t, c_0)‖²: All-but-One's second term (arXiv 2312.12807), no part of SDD. It holds the
    unconditional estimate in place, which is SDD's own moving target."""
    with torch.no_grad():
        target = e_original(z_t, t, c_0)
    return F.mse_loss(e(z_t, t, c_0).float(), target.float())


class Method(NamedTuple):
    loss: Callable
    latents: str  # whose pictures z_t are taken from: "teacher", "student" or "original"
    train_params: str  # a key of TRAIN_PARAMS
    output: str  # whose weights are the result


METHODS = {
    "sdd": Method(sdd_loss, latents="teacher", train_params="xattn", output="teacher"),
}

TRAIN_PARAMS = {  # name of a UNet parameter -> is it trained? (the names of ESD's and SDD's scripts)
    "xattn": lambda name: ".attn2." in name,
    "kv": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
    "noxattn": lambda name: ".attn2." not in name and not name.startswith(("time_embedding.", "conv_out.")),
    "full": lambda name: True,
}
