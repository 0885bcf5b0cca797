"""The denoising loop, and how noise estimates are combined in it.

An estimate is a function (z, t, i) -> e: latents (B, 4, H, W) at timestep t, the i-th evaluation of the loop. Notation as
in the papers: e_0 for the empty prompt, e_p for the prompt, e_n for a negative one.
"""
import torch


def sample(estimate, scheduler, z, k=None):
    """Takes z from levels[0] to levels[k] of the scheduler, in k evaluations; all the way where k is not given."""
    for i, t in enumerate(scheduler.levels[:-1][:k]):
        z = scheduler.step(z, estimate(z, t, i), i)
    return z


def cfg(unet, c_0, c_p, s):
    """Classifier-free guidance (Ho & Salimans 2022): e_0 + s (e_p − e_0), both in one batch.

    c_0, c_p: (B, 77, D) or (1, 77, D). With the embedding of a negative prompt in the place of c_0 this is NEG. A scale of 1
    asks for e_p alone.
    """
    def estimate(z, t, i=0):
        if s == 1:
            return unet(z, t, c_p.expand(len(z), -1, -1))
        context = torch.cat([c_0.expand(len(z), -1, -1), c_p.expand(len(z), -1, -1)])
        e_0, e_p = unet(torch.cat([z, z]), t, context).chunk(2)
        return e_0 + s * (e_p - e_0)

    return estimate
