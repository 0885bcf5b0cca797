"""Ablating Concepts' pictures (arXiv 2303.13516): what to show instead, drawn once by the frozen model, kept, and noised in training.

Where this departs from the authors' script:
1. What is kept and noised are the sampler's latents; theirs go through PNG files and the VAE's encoder, which here would only blur.
2. The prior term uses the same pictures and noise as the loss, not a second batch.
3. The number of pictures (--anchor-images) stays 1000 as in the paper; the prompts are the user's (--anchor-prompts), by default the
   anchor alone. Theirs came from a chat model (objects) and from a picture search (styles).
"""
import re

import torch

from generate import draw_latents
from weights import UserError, read, save

KEPT = 64  # pictures between two writes: whole batches, so that one that is stopped draws the same as one that is not


def prompt_pairs(concepts, anchors, lines):
    """[(concept's index, the anchor's prompt, the same for the concept)]: `lines` with the anchor's word replaced by the concept; where
    there is no anchor the concept is a style, and is said at the end or at the beginning in turn, as in the paper."""
    if len(anchors) not in (0, 1, len(concepts)):
        raise UserError(f"--anchor takes one word for all concepts or one for each of the {len(concepts)}, not {len(anchors)}.")
    if not (anchors or lines):
        raise UserError("Ablating needs to know what to show instead: --anchor cat, or --anchor-prompts FILE for a style.")
    pairs = []
    for n in range(max(1, len(lines))):
        for j, concept in enumerate(concepts):
            anchor = anchors[j % len(anchors)] if anchors else None
            line = lines[n] if lines else anchor
            if anchor is None:
                asked = f"{line}, in the style of {concept}" if n % 2 == 0 else f"in {concept}'s style, {line}"
            elif not re.search(rf"\b{re.escape(anchor)}\b", line):
                raise UserError(f"The anchor {anchor!r} is not in the prompt {line!r}, so nothing in it can be replaced by {concept!r}.")
            else:
                asked = re.sub(rf"\b{re.escape(anchor)}\b", lambda _: concept, line)
            pairs.append((j, line, asked))
    return pairs


def make(file, model, painter, c_0, c_a, scheduler, n, guidance_scale, seed):
    """z_0 (n, 4, h, w) of n pictures by `painter`, the i-th of prompt i mod len(c_a); what `file` already holds is not drawn again."""
    settings = {"n": str(n), "seed": str(seed), "prompts": str(len(c_a))}
    tensors, metadata = read(file) if file.exists() else ({"z_0": torch.empty(0)}, settings)
    if metadata != settings or "z_0" not in tensors:
        raise UserError(f"{file} holds other pictures than this run needs: choose a new folder.")
    z_0 = tensors["z_0"].to(c_0.device)
    while len(z_0) < n:
        which = torch.arange(len(z_0), min(len(z_0) + KEPT, n))
        more = draw_latents(model, painter, c_0, c_a[which.to(c_a.device) % len(c_a)], (seed + which).tolist(), scheduler, guidance_scale,
                            bar=f"anchors, {len(z_0)} of {n} kept")
        z_0 = torch.cat([z_0, *more])
        save(file, {"z_0": z_0}, settings)
    return z_0


def noised(z_0, concept_of, c_s, c_a, scheduler, batch_size, generator):
    """As `sdd.half_drawn`: picks pictures, their timesteps and the noise, in this order. concept_of: the concept's index of each
    prompt; c_s: a function from prompts' indices to their embeddings (it may carry gradients); c_a (P, 77, D)."""
    def latents(i):
        which = torch.randint(len(z_0), (batch_size,), generator=generator)
        t = torch.randint(len(scheduler.alphas_cumprod), (batch_size,), generator=generator).to(z_0.device)
        n = torch.randn((batch_size, *z_0.shape[1:]), generator=generator).to(z_0.device)
        prompts = which.to(z_0.device) % len(c_a)
        z_t = scheduler.add_noise(z_0[which.to(z_0.device)], n, t)
        return dict(z_t=z_t, t=t, n=n, c_s=c_s(prompts), c_a=c_a[prompts]), None, concept_of[prompts[0].item()]

    return latents


def detach_start(unet):
    """No gradient through the keys and values of the start token, which every prompt shares (the authors' option)."""
    for name, module in unet.named_modules():
        if name.endswith((".attn2.to_k", ".attn2.to_v")):
            module.register_forward_hook(lambda _, __, y: torch.cat([y[:, :1].detach(), y[:, 1:]], dim=1))
