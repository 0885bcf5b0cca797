"""The training targets side by side, and the table of what else sets the methods apart.

A loss is called with keywords, takes those that it needs, swallows the rest with **_ and returns a scalar:
    e, e_original    the student ε_θ(z, t, c) and the frozen model ε_θ° it started from
    z_t, t           latents (B, 4, H, W) and their timestep, one for all or (B,)
    c_s, c_0, c_a    embeddings of what to unlearn, of the empty prompt, and of --anchor, what to show instead: (1, 77, D), one for all
                     latents, or (B, 77, D)
    n                the noise in z_t, where z_t is a noised picture
    erase_scale, quantile    --erase-scale and --quantile
This is the place for your own: write the function, add a row to METHODS; or leave it where it is and say --loss FILE:FUNCTION.
"""
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F


def squared(a, b):
    """The mean over elements, in float32."""
    return F.mse_loss(a.float(), b.float())


def sdd_loss(e, z_t, t, c_s, c_0, **_):
    """Safe self-distillation (arXiv 2307.05977, eq. 12): ‖ε_θ(z_t, t, c_s) − sg ε_θ(z_t, t, c_0)‖²."""
    with torch.no_grad():
        target = e(z_t, t, c_0)
    return squared(e(z_t, t, c_s), target)


def esd_loss(e, e_original, z_t, t, c_s, c_0, erase_scale, **_):
    """ESD (Gandikota et al. 2023, arXiv 2303.07345): the frozen model's estimate guided *away* from c_s, with s_s = erase_scale.
    s_s = 0 asks for ε_θ°(z_t, t, c_0), as in the SDD paper; ESD's newer script counts from 1."""
    with torch.no_grad():
        e_0, e_s = e_original(z_t, t, c_0), e_original(z_t, t, c_s)
    return squared(e(z_t, t, c_s), e_0 - erase_scale * (e_s - e_0))


def ablation_loss(e, z_t, t, c_s, c_a, **_):
    """Ablating Concepts, model-based (Kumari et al. 2023, arXiv 2303.13516): SDD's loss with the anchor prompt for the empty one,
    on noised pictures of the anchor for half-drawn ones of the concept. The target is the student's, as in the authors' script;
    the paper writes the pretrained model's."""
    with torch.no_grad():
        target = e(z_t, t, c_a)
    return squared(e(z_t, t, c_s), target)


def noise_ablation_loss(e, z_t, t, c_s, n, **_):
    """Ablating Concepts, noise-based: plain training on the anchor's pictures under the concept's prompt."""
    return squared(e(z_t, t, c_s), n)


def all_but_one_loss(e, e_original, z_t, t, c_s, c_0, c_a, erase_scale, quantile, **_):
    """All-but-One (arXiv 2312.12807): the student's *guidance* Δ(c_s) = ε(c_s) − ε(c_0) becomes the frozen model's for an
    alternative, Δ°(c_a); nothing where the anchor is empty. With a quantile, the erasing signal −g Δ°(c_s) where it is strong.

    Written from the paper's summary (there is no public code). Our own choices: γ1 = γ2 = 1; gradients through both of the
    student's estimates; g = erase_scale; the mask by |Δ°|, a channel at a time as in SEGA. The second term, λ ‖ε°(c_0) − ε(c_0)‖²,
    is `preservation`.
    """
    with torch.no_grad():
        e_0 = e_original(z_t, t, c_0)
        target = e_original(z_t, t, c_s if quantile else c_a) - e_0
        if quantile:
            limit = target.abs().float().flatten(2).quantile(quantile, dim=2)[..., None, None]
            target = -erase_scale * torch.where(target.abs() >= limit, target, 0.0)
    return squared(e(z_t, t, c_s) - e(z_t, t, c_0), target)


def preservation(e, e_original, z_t, t, c_0, **_):
    """‖ε_θ(z_t, t, c_0) − sg ε_θ°(z_t, t, c_0)‖²: All-but-One's second term, no part of SDD. It holds the unconditional estimate
    in place, which is SDD's own moving target."""
    with torch.no_grad():
        target = e_original(z_t, t, c_0)
    return squared(e(z_t, t, c_0), target)


def prior(e, z_t, t, c_a, n, **_):
    """Ablating's prior term: the anchor's prompt goes on to make the anchor's pictures."""
    return squared(e(z_t, t, c_a), n)


class Method(NamedTuple):
    loss: Callable
    latents: str  # z_t: half-drawn pictures of the concept by "teacher", "student" or "original"; or "anchor": noised pictures
    train_params: str  # a key of TRAIN_PARAMS
    output: str  # whose weights are the result: "teacher" (the average) or "student"
    paper: dict = {}  # its papers' numbers, where they are not SDD's (train.PAPER)
    toy: dict = {}  # the embedded model's, where they are not the toy preset's; how they were found: toy/reproduce.py


ESD = dict(iters=1000, weight_decay=0.0, lr_schedule="constant", warmup=0)  # arXiv 2303.07345; Adam
ABLATE = dict(iters=100, lr=8e-6, batch_size=4, guidance_scale=6.0, lr_schedule="constant", warmup=0)  # 2e-6 x batch; authors' script
METHODS = {
    "sdd": Method(sdd_loss, latents="teacher", train_params="xattn", output="teacher"),
    "esd-x": Method(esd_loss, latents="student", train_params="xattn", output="student", paper=ESD,
                    toy=dict(lr=8e-4, erase_scale=3.0)),
    "esd-u": Method(esd_loss, latents="student", train_params="noxattn", output="student", paper=ESD,
                    toy=dict(lr=4e-4, erase_scale=3.0)),
    "ablate": Method(ablation_loss, latents="anchor", train_params="kv", output="student", paper=ABLATE, toy=dict(lr=2e-3)),
    "ablate-noise": Method(noise_ablation_loss, latents="anchor", train_params="kv", output="student", paper=ABLATE, toy=dict(lr=4e-3)),
    "all-but-one": Method(all_but_one_loss, latents="teacher", train_params="xattn", output="student",
                          paper=dict(iters=200, preserve=1.0, lr_schedule="constant", warmup=0),  # z_t, lr: our choice, SDD's
                          toy=dict(lr=3.2e-3, preserve=1.0)),
}

TRAIN_PARAMS = {  # name of a parameter -> is it trained? (the names of ESD's and SDD's scripts; "text_model.": the text encoder)
    "xattn": lambda name: ".attn2." in name,
    "kv": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
    # ESD-u: its first script also leaves conv_norm_out out, its newer one trains every Linear and Conv outside attn2
    "noxattn": lambda name: ".attn2." not in name and not name.startswith(("time_embedding.", "conv_out.", "text_model.")),
    "full": lambda name: not name.startswith("text_model."),
    "embedding": lambda name: name == "text_model.embeddings.token_embedding.weight",  # the rows of the concepts' tokens
}
