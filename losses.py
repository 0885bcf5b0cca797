"""The training losses, next to each other. Add your own here, or pass `--loss FILE:FUNCTION`.

A loss is a function of keyword arguments that returns a scalar tensor. It takes the arguments that
it needs by name and ignores the rest with **_:

    e           the student ε_θ(z, t, c): a function that estimates the noise, (B, 4, h, w)
    e_original  the frozen model ε_θ° that the student started from
    z_t, t      latents (B, 4, h, w) and their timestep: one number, or a tensor (B,)
    c_s         embedding of what to unlearn: (1, 77, D), or (B, 77, D) with one per latent
    c_0         embedding of the empty prompt, (1, 77, D)
    c_a         embedding of --anchor, what to show instead: (1, 77, D) or (B, 77, D). Without
                --anchor it is the empty prompt's
    c_k         preservation_loss only: embeddings of the prompts to keep, (1, 77, D) or (B, 77, D)
    n           the noise in z_t, (B, 4, h, w). Only where z_t is a noised image (Ablating Concepts)
    erase_scale, quantile   the flags of these names

Here e and e_original are functions. Their values have an index: e_0 = e_original(z_t, t, c_0).
sg is the stop-gradient, here `torch.no_grad()`. Every ‖a − b‖² is a mean over elements.
"""

import torch
import torch.nn.functional as F


def mean_squared_error(a, b):
    """The mean over elements, in float32. The papers print a squared norm: a sum."""
    return F.mse_loss(a.float(), b.float())


def sdd_loss(e, z_t, t, c_s, c_0, **_):
    """SDD (arXiv 2307.05977, eq. 12): ‖ε_θ(z_t, t, c_s) − sg ε_θ(z_t, t, c_0)‖²."""
    with torch.no_grad():
        target = e(z_t, t, c_0)
    return mean_squared_error(e(z_t, t, c_s), target)


def esd_loss(e, e_original, z_t, t, c_s, c_0, erase_scale, **_):
    """ESD (arXiv 2303.07345): the target is guided *away* from c_s, with s_s = erase_scale.

    ‖ε_θ(c_s) − [ε_θ°(c_0) − s_s (ε_θ°(c_s) − ε_θ°(c_0))]‖²

    With s_s = 0 the target is ε_θ°(c_0), as in the SDD paper. In ESD's script of 2025, esd_sd.py,
    negative_guidance is s_s + 1.
    """
    with torch.no_grad():
        e_0 = e_original(z_t, t, c_0)
        e_s = e_original(z_t, t, c_s)
    return mean_squared_error(e(z_t, t, c_s), e_0 - erase_scale * (e_s - e_0))


def ablation_loss(e, z_t, t, c_s, c_a, **_):
    """Ablating Concepts, model-based (arXiv 2303.13516): ‖ε_θ(z_t, t, c_s) − sg ε_θ(z_t, t, c_a)‖².

    This is SDD's loss with two changes: the anchor's prompt replaces the empty prompt, and z_t is
    a noised image of the anchor. The target is the student's own estimate with a stop-gradient, as
    in the authors' script. The paper takes the original's estimate.
    """
    with torch.no_grad():
        target = e(z_t, t, c_a)
    return mean_squared_error(e(z_t, t, c_s), target)


def noise_ablation_loss(e, z_t, t, c_s, n, **_):
    """Ablating Concepts, noise-based: ‖ε_θ(z_t, t, c_s) − n‖².

    Ordinary training on images of the anchor, with the concept's prompt.
    """
    return mean_squared_error(e(z_t, t, c_s), n)


def all_but_one_loss(e, e_original, z_t, t, c_s, c_0, c_a, erase_scale, quantile, **_):
    """All-but-One (arXiv 2312.12807): the student's *guidance* follows the frozen model's.

    The guidance of a prompt is Δ(c) = ε(z_t, t, c) − ε(z_t, t, c_0).
    Without a quantile the loss is ‖Δ_θ(c_s) − Δ°(c_a)‖². With an empty anchor this target is 0.
    With a quantile q the target is −g Δ°(c_s) where |Δ°(c_s)| is at least its q-quantile, and 0
    elsewhere; g = erase_scale.

    There is no public code, so this follows the paper's summary. We chose: both weights of the
    paper, γ1 and γ2, are 1; gradients flow through both of the student's estimates; the quantile
    is taken per image and channel, as in SEGA. The paper's second term is `preservation_loss`.
    """
    with torch.no_grad():
        e_0 = e_original(z_t, t, c_0)
        if quantile:
            guidance = e_original(z_t, t, c_s) - e_0
            size = guidance.abs()
            limit = size.float().flatten(2).quantile(quantile, dim=2)  # (B, 4)
            limit = limit[..., None, None]  # (B, 4, 1, 1)
            target = -erase_scale * torch.where(size >= limit, guidance, 0.0)
        else:
            target = e_original(z_t, t, c_a) - e_0
    return mean_squared_error(e(z_t, t, c_s) - e(z_t, t, c_0), target)


def preservation_loss(e, e_original, z_t, t, c_k, **_):
    """`--preserve λ` adds λ ‖ε_θ(z_t, t, c_k) − sg ε_θ°(z_t, t, c_k)‖² to any loss.

    c_k is the empty prompt c_0, or with --keep also other prompts. The term holds the student's
    estimates for them in place. The estimate for c_0 is SDD's own target, which otherwise moves.
    The term comes from All-but-One, with prompts to keep from AdvUnlearn (arXiv 2405.15234). It is
    not part of SDD.
    """
    with torch.no_grad():
        target = e_original(z_t, t, c_k)
    return mean_squared_error(e(z_t, t, c_k), target)


def preservation_term(weight, kept, generator):
    """The term of `--preserve weight` for sdd.sdd. kept: embeddings (n, 77, D) of --keep."""

    def term(z_t, c_0, **batch):
        c_k = prompts_kept(c_0, kept, len(z_t), generator)
        return weight * preservation_loss(z_t=z_t, c_0=c_0, c_k=c_k, **batch)

    return term


def prompts_kept(c_0, kept, B, generator):
    """c_k, the prompts that `--preserve` holds: c_0; with `kept`, (B, 77, D), one per latent.

    Each of the B is the empty prompt with probability 1/2, and otherwise a random one of `kept`.
    """
    if kept is None or len(kept) == 0:
        return c_0
    n = len(kept)
    number = torch.randint(2 * n, (B,), generator=generator)
    prompts = torch.cat([kept, c_0])  # the numbers n .. 2n − 1 all mean c_0
    return prompts[number.clamp(max=n).to(c_0.device)]


def prior_loss(e, z_t, t, c_a, n, **_):
    """`--prior λ` adds λ ‖ε_θ(z_t, t, c_a) − n‖² (Ablating Concepts).

    The anchor's own prompt keeps producing images of the anchor.
    """
    return mean_squared_error(e(z_t, t, c_a), n)
