"""Ablating Concepts' training data (arXiv 2303.13516): images of the anchor, noised.

The frozen model generates images of what to show instead (the anchor), once. Training noises them
and pairs them with the concept's prompt. The losses are in losses.py.

Where this file differs from the authors' script:

1. We keep and noise the sampler's latents. The script writes PNG files and encodes them with the
   VAE, which would only blur them.
2. The prior term uses the same images and noise as the loss, not a second batch.
3. --anchor-images is 1000, as in the paper, but the prompts are the user's (--anchor-prompts). The
   default is the anchor alone. The authors took prompts from a chat model (objects) and from an
   image search (styles).
"""

import re
from typing import NamedTuple

import torch

from pipeline import generate_latents
from support.errors import UserError
from weights import read, save

KEPT = 64  # images between two writes: whole batches, so a stopped run generates the same images


class Pair(NamedTuple):
    """A prompt that shows the anchor, and the same prompt for the concept."""

    concept: int  # index of the concept
    anchor: str
    target: str


def check_number(concepts, anchors):
    if len(anchors) not in (0, 1, len(concepts)):
        raise UserError(
            f"--anchor takes one word for all concepts or one for each of the {len(concepts)}, not "
            f"{len(anchors)}."
        )


def prompt_pairs(concepts, anchors, lines):
    """Pairs for every line of --anchor-prompts (or for the anchor alone) and every concept.

    With an anchor, its word is replaced by the concept. Without one, the concept is a style: it is
    named at the end of a line and at the beginning in turn, as in the paper.
    """
    check_number(concepts, anchors)
    if not all(anchor.strip() for anchor in anchors):
        raise UserError("--anchor is empty: give one or more words that the model should show.")
    if not (anchors or lines):
        raise UserError(
            "Ablating Concepts needs to know what to show instead: use --anchor WORD (for example "
            "circle on the toy model, cat for grumpy cat), or --anchor-prompts FILE for a style."
        )
    pairs = []
    for number in range(max(1, len(lines))):
        for j, concept in enumerate(concepts):
            anchor = anchors[j % len(anchors)] if anchors else None
            line = lines[number] if lines else anchor
            pairs.append(Pair(j, line, replace_anchor(line, anchor, concept, number)))
    return pairs


def replace_anchor(line, anchor, concept, number):
    """The prompt for the concept, from a prompt that shows the anchor."""
    if anchor is None:
        if number % 2 == 0:
            return f"{line}, in the style of {concept}"
        return f"in {concept}'s style, {line}"
    word = rf"(?<!\w){re.escape(anchor)}(?!\w)"  # unlike \b, this also finds "c++"
    if not re.search(word, line):
        raise UserError(
            f"The anchor {anchor!r} is not in the prompt {line!r}, so it cannot be replaced by "
            f"{concept!r}."
        )
    return re.sub(word, lambda _: concept, line)


def generate_anchors(file, model, unet, c_0, c_a, scheduler, n, guidance_scale, seed):
    """Latents z_0 (n, 4, h, w) of the anchor's images; image i shows prompt i mod len(c_a).

    Latents that `file` already holds are not generated again.
    """
    settings = {"n": str(n), "seed": str(seed), "prompts": str(len(c_a))}
    z_0, metadata = torch.empty(0), settings
    if file.exists():
        tensors, metadata = read(file)
        z_0 = tensors.get("z_0")
    if metadata != settings or z_0 is None:
        raise UserError(f"{file} holds other images than this run needs: choose a new folder.")
    z_0 = z_0.to(c_0.device)
    while len(z_0) < n:
        which = torch.arange(len(z_0), min(len(z_0) + KEPT, n))
        more = generate_latents(
            model,
            unet,
            c_0,
            c_a[which.to(c_a.device) % len(c_a)],
            (seed + which).tolist(),
            scheduler,
            guidance_scale,
            bar=f"anchor images, {len(z_0)} of {n} kept",
        )
        z_0 = torch.cat([z_0, *more])
        save(file, {"z_0": z_0}, settings)
    return z_0


def noised_anchors(z_0, concept_of, embed_targets, c_a, scheduler, batch_size, generator):
    """A function that returns (batch, k, j) as `sdd.sdd` needs it.

    k is None; j is the index of the first latent's concept. It picks images, their timesteps and
    the noise, in this order. concept_of: the index of each prompt's concept. embed_targets: indices
    of prompts -> embeddings (B, 77, D), which may carry gradients. c_a (P, 77, D): the anchor's
    prompts.
    """

    def sample_batch():
        which = torch.randint(len(z_0), (batch_size,), generator=generator)
        t = torch.randint(len(scheduler.alphas_cumprod), (batch_size,), generator=generator)
        n = torch.randn((batch_size, *z_0.shape[1:]), generator=generator).to(z_0.device)
        which, t = which.to(z_0.device), t.to(z_0.device)
        prompts = which % len(c_a)
        z_t = scheduler.add_noise(z_0[which], n, t)
        batch = dict(z_t=z_t, t=t, n=n, c_s=embed_targets(prompts), c_a=c_a[prompts])
        return batch, None, concept_of[prompts[0].item()]

    return sample_batch


def detach_start(unet):
    """No gradient through the keys and values of the start token, which all prompts share.

    This is an option of the authors' script.
    """

    def detach_first(module, inputs, y):
        return torch.cat([y[:, :1].detach(), y[:, 1:]], dim=1)

    for name, module in unet.named_modules():
        if name.endswith((".attn2.to_k", ".attn2.to_v")):
            module.register_forward_hook(detach_first)
