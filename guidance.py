"""The denoising loop, and how noise estimates are combined in it.

An estimate is a function (z, t, i) -> e: latents (B, 4, H, W) at timestep t, the i-th evaluation of the loop, i = 0, 1, …
(PNDM visits one level twice, and both count). Notation as in the papers: e_0 for the empty prompt, e_p for the prompt,
e_S for what is to be avoided. All of a step's estimates are made in one batch.
"""

from functools import partial

import torch


def sample(estimate, scheduler, z, k=None):
    """Takes z from levels[0] to levels[k] of the scheduler, in k evaluations; all the way where k is not given."""
    for i, t in enumerate(scheduler.timesteps[:-1][:k]):
        z = scheduler.step(z, estimate(z, t, i), i)
    return z


def evaluate(unet, z, t, *prompts):
    """The estimates for several prompts, each (B, 77, D) or (1, 77, D), in one batch."""
    context = torch.cat(
        torch.broadcast_tensors(*prompts)
    )  # one row for each prompt, if each is the same for all of z
    return unet(torch.cat([z] * len(prompts)), t, context).chunk(len(prompts))


def cfg(unet, c_0, c_p, s):
    """Classifier-free guidance (Ho & Salimans 2022): e_0 + s (e_p − e_0).

    c_0, c_p: (B, 77, D) or (1, 77, D). With the embedding of a negative prompt in the place of c_0 this is NEG. A scale of 1
    asks for e_p alone.
    """

    def estimate(z, t, i=0):
        if s == 1:
            return evaluate(unet, z, t, c_p)[0]
        e_0, e_p = evaluate(unet, z, t, c_0, c_p)
        return e_0 + s * (e_p - e_0)

    return estimate


# Safe latent diffusion (Schramowski et al. 2022, arXiv 2211.05105, table 1): δ, s_S, λ, s_m, β_m. diffusers ships weak with 20
# for 200. The SDD paper's eq. 8 prints max(1, |D|) and scales D before it meets λ: then the scale would be 1 or more everywhere
# and the threshold next to nothing; this is the method's own paper's.
SLD = {
    "weak": (15, 200, 0.0, 0.0, 0.0),
    "medium": (10, 1000, 0.01, 0.3, 0.4),
    "strong": (7, 2000, 0.025, 0.5, 0.7),
    "max": (0, 5000, 1.0, 0.5, 0.7),
}


def sld_step(e_0, e_p, e_S, s, i, nu, strength, warmup=None):
    """One step of SLD: the estimate, and the momentum ν that goes into the next (at first 0). `warmup` takes the place of δ."""
    delta, s_S, threshold, s_m, beta_m = SLD[strength]
    delta = delta if warmup is None else warmup
    D = e_p - e_S
    mu = torch.where(D >= threshold, 0.0, (s_S * D.abs()).clamp(max=1))
    gamma = mu * (e_S - e_0) + s_m * nu
    nu = beta_m * nu + (1 - beta_m) * gamma  # during the warm-up too
    return e_0 + s * (e_p - e_0 - (gamma if i >= delta else 0)), nu


def sld(unet, c_0, c_p, c_S, s, warmup, strength):
    nu = 0.0

    def estimate(z, t, i):
        nonlocal nu
        e, nu = sld_step(*evaluate(unet, z, t, c_0, c_p, c_S), s, i, nu, strength, warmup)
        return e

    return estimate


def sega_step(e_0, e_p, edits, s, i, nu, warmup=(10,), s_e=5.0, quantile=0.9, s_m=0.1, beta=0.4):
    """One step of SEGA (Brack et al. 2023, arXiv 2301.12247) away from each of the `edits`, (K, B, 4, H, W): the estimate, and
    the momentum ν. Only the strongest tenth of a concept's direction counts, channel by channel. `warmup`: one for each
    concept or one for all; as long as some wait, the others act without momentum, weighted to a mean."""
    g = -s_e * (edits - e_0)
    g = torch.where(
        g.abs() >= g.abs().float().flatten(3).quantile(quantile, dim=3)[..., None, None], g, 0.0
    )
    gamma = g.sum(0) + s_m * nu
    nu = beta * nu + (1 - beta) * gamma  # of all concepts, from the first step on
    warm = torch.tensor([i >= w for w in warmup]).expand(
        len(g)
    )  # on the CPU: a GPU would be waited for
    if not warm.all():
        gamma = g[warm].mean(0) if warm.any() else 0.0
    return e_0 + s * (e_p - e_0) + gamma, nu


def sega(unet, c_0, c_p, concepts, s, warmup):
    """concepts: (K, 77, D), each of them avoided on its own."""
    nu = 0.0

    def estimate(z, t, i):
        nonlocal nu
        e_0, e_p, *edits = evaluate(unet, z, t, c_0, c_p, *concepts.split(1))
        e, nu = sega_step(
            e_0, e_p, torch.stack(edits), s, i, nu, (10 if warmup is None else warmup,)
        )
        return e

    return estimate


# name: (unet, c_0, c_p, c_S, s, warmup) -> the estimate of one batch. c_S (1, 77, D), SEGA's (K, 77, D), is avoided, from the
# warmup-th evaluation on (None: the method's own, which is meant for 50 steps).
GUIDANCE = {
    "sd": lambda unet, c_0, c_p, c_S, s, warmup: cfg(unet, c_0, c_p, s),
    "neg": lambda unet, c_0, c_p, c_S, s, warmup: cfg(unet, c_S, c_p, s),
    **{f"sld-{strength}": partial(sld, strength=strength) for strength in SLD},
    "sega": sega,
}
