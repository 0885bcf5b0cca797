"""The denoising loop, and how it combines noise estimates.

An estimator is a function (z, t, i) -> e. z: latents (B, 4, h, w); t: their timestep; e: its
estimate of the noise in z, (B, 4, h, w). i counts the evaluations of the UNet: 0, 1, .. It is also
the index into scheduler.timesteps (PNDM lists one timestep twice).

Notation, as in the papers: e_0, e_p and e_S are the UNet's estimates for the empty prompt, the
prompt and the prompt to avoid. One evaluation computes all of them in one batch. Their embeddings
are c_0, c_p and c_S. (c_S is to avoid while sampling. The c_s of losses.py is to unlearn.)
"""

from functools import partial

import torch


def sample(estimator, scheduler, z, k=None):
    """Denoises latents z from scheduler.timesteps[0] to timesteps[k], in k evaluations.

    Without k, denoises z to the end.
    """
    if k is None:
        k = scheduler.evaluations
    for i, t in enumerate(scheduler.timesteps[:k]):
        e = estimator(z, t, i)
        z = scheduler.step(z, e, i)
    return z


def evaluate(unet, z, t, *prompts):
    """The noise estimates for several prompts, in one batch: one tensor (B, 4, h, w) per prompt.

    prompts: embeddings, (1, 77, D) for one that all latents share, or (B, 77, D).
    """
    n, B = len(prompts), len(z)
    context = torch.cat([c.expand(B, -1, -1) for c in prompts])  # (n·B, 77, D)
    e = unet(torch.cat([z] * n), t, context)  # (n·B, 4, h, w)
    return e.chunk(n)


def cfg(unet, c_0, c_p, s):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): e_0 + s (e_p − e_0).

    c_0, c_p: embeddings of the empty prompt and of the prompt, (1, 77, D) or (B, 77, D).
    s > 1 goes beyond e_p: the image follows the prompt more closely.
    s = 1 is e_p alone, so only e_p is computed.
    0 < s < 1 lies between the two: the image follows the prompt less than without guidance.
    s = 0 ignores the prompt. s < 0 steers away from it.
    """

    def estimator(z, t, i=0):  # only SLD and SEGA use i
        if s == 1:
            return evaluate(unet, z, t, c_p)[0]
        e_0, e_p = evaluate(unet, z, t, c_0, c_p)
        return e_0 + s * (e_p - e_0)

    return estimator


# Safe Latent Diffusion (SLD; Schramowski et al. 2022, arXiv 2211.05105), table 1.
# delta (δ): evaluations before it acts. s_S: scale. threshold (λ). s_m, beta_m (β_m): momentum.
# diffusers has s_S = 20 for "weak". The paper, which we follow, has 200.
# fmt: off
SLD = {
    "weak":   dict(delta=15, s_S=200,  threshold=0.0,   s_m=0.0, beta_m=0.0),
    "medium": dict(delta=10, s_S=1000, threshold=0.01,  s_m=0.3, beta_m=0.4),
    "strong": dict(delta=7,  s_S=2000, threshold=0.025, s_m=0.5, beta_m=0.7),
    "max":    dict(delta=0,  s_S=5000, threshold=1.0,   s_m=0.5, beta_m=0.7),
}
# fmt: on


def sld_step(e_0, e_p, e_S, s, i, nu, *, delta, s_S, threshold, s_m, beta_m):
    """One evaluation of SLD. Returns the estimate and the momentum ν for the next evaluation.

    μ in 0..1 says how strongly each element is moved away from e_S. It is 0 where e_p is above e_S
    by at least the threshold. γ is the whole correction, with momentum.

    Eq. 8 of the SDD paper differs: it prints max(1, |D|) and scales D before it compares D with the
    threshold. Then μ would be at least 1 wherever SLD acts. We follow the code of SLD's authors.
    """
    D = e_p - e_S
    mu = torch.where(D >= threshold, 0.0, (s_S * D.abs()).clamp(max=1))
    gamma = mu * (e_S - e_0) + s_m * nu
    nu = beta_m * nu + (1 - beta_m) * gamma  # also during the warm-up
    if i < delta:
        gamma = 0
    return e_0 + s * (e_p - e_0 - gamma), nu


class SLDGuidance:
    """The estimator of SLD. It keeps the momentum from call to call."""

    def __init__(self, unet, c_0, c_p, c_S, s, **constants):
        self.unet = unet
        self.prompts = (c_0, c_p, c_S)
        self.s = s
        self.constants = constants
        self.nu = 0.0

    def __call__(self, z, t, i):
        e_0, e_p, e_S = evaluate(self.unet, z, t, *self.prompts)
        e, self.nu = sld_step(e_0, e_p, e_S, self.s, i, self.nu, **self.constants)
        return e


SEGA_WARMUP = 10  # evaluations before SEGA acts, by its paper


def sega_step(
    e_0, e_p, e_edits, s, i, nu, warmup=SEGA_WARMUP, s_e=5.0, quantile=0.9, s_m=0.1, beta_m=0.4
):
    """One evaluation of SEGA (Brack et al. 2023, arXiv 2301.12247), away from each concept.

    e_edits (K, B, 4, h, w): the estimates of K concepts. warmup: the evaluations before it acts.
    Returns the estimate and the momentum ν.

    The guided estimate moves away from each concept by s_e (e_edit − e_0). Per image and channel,
    only elements whose size is at least the quantile count (0.9: the largest tenth).
    """
    g = -s_e * (e_edits - e_0)  # (K, B, 4, h, w): away from each concept
    limit = g.abs().float().flatten(3).quantile(quantile, dim=3)  # per concept, image and channel
    limit = limit[..., None, None]  # (K, B, 4, 1, 1)
    g = torch.where(g.abs() >= limit, g, 0.0)
    gamma = g.sum(0) + s_m * nu  # (B, 4, h, w)
    nu = beta_m * nu + (1 - beta_m) * gamma  # also during the warm-up
    if i < warmup:
        gamma = 0
    return e_0 + s * (e_p - e_0) + gamma, nu


class SEGAGuidance:
    """The estimator of SEGA. It keeps the momentum from call to call."""

    def __init__(self, unet, c_0, c_p, concepts, s, warmup):
        self.unet = unet
        self.prompts = (c_0, c_p, *concepts.split(1))
        self.s = s
        self.warmup = warmup
        self.nu = 0.0

    def __call__(self, z, t, i):
        e_0, e_p, *e_edits = evaluate(self.unet, z, t, *self.prompts)
        e_edits = torch.stack(e_edits)
        e, self.nu = sega_step(e_0, e_p, e_edits, self.s, i, self.nu, self.warmup)
        return e


# The methods of `generate.py --guidance`, as functions with the same arguments:
#     c_0 (1, 77, D)    the empty prompt (or the negative prompt)
#     c_p (B, 77, D)    the prompts
#     c_S (1, 77, D)    what to avoid; (K, 77, D) for SEGA, which avoids K concepts one by one
#     s                 the guidance scale
#     warmup            evaluations before SLD and SEGA act; None: the paper's number, for 50 steps
# Each returns an estimator. Make a new one for each batch of images: SLD and SEGA have momentum.


def sd(unet, c_0, c_p, c_S, s, warmup):
    """Stable Diffusion as it is: classifier-free guidance. Ignores c_S and warmup."""
    return cfg(unet, c_0, c_p, s)


def neg(unet, c_0, c_p, c_S, s, warmup):
    """Negative prompt: e_S + s (e_p − e_S). c_S replaces the empty prompt. Ignores warmup."""
    return cfg(unet, c_S, c_p, s)


def sld(unet, c_0, c_p, c_S, s, warmup, strength):
    """Safe Latent Diffusion with the constants of one row of SLD."""
    constants = dict(SLD[strength])
    if warmup is not None:
        constants["delta"] = warmup
    return SLDGuidance(unet, c_0, c_p, c_S, s, **constants)


def sega(unet, c_0, c_p, c_S, s, warmup):
    """SEGA: avoids each row of c_S."""
    return SEGAGuidance(unet, c_0, c_p, c_S, s, SEGA_WARMUP if warmup is None else warmup)


GUIDANCE = {
    "sd": sd,
    "neg": neg,
    "sld-weak": partial(sld, strength="weak"),
    "sld-medium": partial(sld, strength="medium"),
    "sld-strong": partial(sld, strength="strong"),
    "sld-max": partial(sld, strength="max"),
    "sega": sega,
}
