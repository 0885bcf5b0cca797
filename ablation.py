"""Ablating Concepts' training data (arXiv 2303.13516): images of the anchor, noised.

The frozen model generates images of what to show instead (the anchor), once. Training noises them
and pairs them with the concept's prompt. The losses are in losses.py.

Where this file differs from the authors' script (the one for diffusers):

1. We keep and noise the sampler's latents (DDIM with --steps). The script takes 25 steps of
   DPM-Solver++, writes image files and encodes them with the VAE, which would only blur them.
2. The prior term uses the same images and noise as the loss, not a second batch.
3. --anchor-images is 1000, as in the paper, but the prompts are the user's (--anchor-prompts). The
   default is the anchor alone. The authors took prompts from a chat model (objects) and from an
   image search (styles).
4. The script flips images at random. It also scales those of objects and names the scale in the
   concept's prompt ("very small", "close up"). Its loss leaves out the outermost latents. Here it
   does not.
5. A style is named at the end of the prompt once in two times, in the script once in three.
6. The script's loss is 4 times the mean over elements, and its prior's is not. So its prior of
   weight 1 is `--prior 0.25`, and the preset paper clips gradients at 0.25, not at 1.
7. Only the preset paper detaches the start token (`detach_start`), as both of the authors' codes
   always do. The toy presets were tuned without it.
"""

import re
from typing import NamedTuple

import torch

from clip_text import TOKEN_EMBEDDING, tokenize
from pipeline import saved_latents, without_prompt
from support.errors import UserError


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


def pairs_of(a):
    """The Pairs of a run. a: its settings."""
    return prompt_pairs(a.concept, a.anchor, a.anchor_prompts)


def noised_images(out, a, original, student, c, scheduler, generator, dtype):
    """Ablating Concepts' source of z_t. Generates the anchor's images, if `out` has none yet.

    a: the run's settings. c: its embeddings, with c_0, anchors and targets (one per pair).
    Returns a function () -> (batch, k, j) for sdd.sdd.
    """
    pairs = pairs_of(a)
    z_0 = saved_latents(
        out / "anchors.safetensors",
        "anchor images",
        original,
        c.anchors,
        a.anchor_images,
        a.seed,
        negative=without_prompt(original, c.c_0),
        scheduler=scheduler,
        guidance_scale=a.guidance_scale,
        dtype=dtype,
    )
    if a.detach_start:
        detach_start(student.unet)

    def embed_targets(which):
        return c.targets[which]

    if a.train_params == "embedding":  # it changes in each iteration
        tokens, _ = tokenize(student.tokenizer, [pair.target for pair in pairs])
        tokens = tokens.to(z_0.device)

        def embed_targets(which):
            return student.text_encoder(tokens[which])

    concept_of = [pair.concept for pair in pairs]
    return noised_anchors(
        z_0, concept_of, embed_targets, c.anchors, scheduler, a.batch_size, generator
    )


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

    The authors' codes always do this. The preset paper does too.
    """

    def detach_first(module, inputs, y):
        return torch.cat([y[:, :1].detach(), y[:, 1:]], dim=1)

    for name, module in unet.named_modules():
        if name.endswith((".attn2.to_k", ".attn2.to_v")):
            module.register_forward_hook(detach_first)


def mask_gradient(tokenizer, theta, concepts):
    """--train-params embedding: only the rows of the concepts' tokens get a gradient."""
    weight = theta[TOKEN_EMBEDDING]
    rows = torch.zeros(len(weight), 1, device=weight.device)
    for concept in concepts:
        rows[tokenizer(concept, add_special_tokens=False).input_ids] = 1
    weight.register_hook(lambda grad: grad * rows)
