"""Safe self-distillation, Algorithm 1 of arXiv 2307.05977, as a generator that yields after every iteration.

    θ* ← θ                                                       the EMA teacher starts as the student
    repeat N times:
        z_T ~ N(0, I),  k ~ U{1..T},  c_p ~ U{concepts}
        z_t ← k denoising steps from z_T with θ*, guided towards c_p
        θ   ← AdamW step on ‖ε_θ(z_t, t, c_s) − sg ε_θ(z_t, t, c_0)‖²     c_s: all concepts, joined by ", "
        θ*  ← m θ* + (1 − m) θ
    return θ*

Where this departs from the paper, or the paper from itself:
1. Appendix B.1 says that latents are drawn "with all 20 concepts"; Algorithm 1 and section 3.3 draw one of them. So do we.
2. The appendix's pseudo-code evaluates the loss one level above the latent's own. Ours is at the level z_t really has.
3. Its moving average is assigned to a local name and has no effect. Ours is over the trained tensors, which are all that change.
4. Gradients are clipped at norm 1, as in the authors' script; the paper does not speak of it (`--max-grad-norm 0`: off).
5. T = 50 stands in the authors' script only.
6. A batch (--batch-size) shares one k and one concept. The paper's is 1.
`roles="official"` follows the authors' script instead: latents from all concepts joined, one concept in turn as c_s, and as
timestep any integer of the bin that holds the latent's level. Its k = 0 ran all 50 steps by mistake; here it takes none.
The other trainers are this loop with other choices (losses.METHODS): another loss, another painter, noised pictures for z_t.
"""
import math
from typing import NamedTuple

import torch

import ema
import losses
from guidance import cfg, sample


EXPLODED = 1e5  # estimates have variance 1, so that a mean squared error is about 1 at most; a sum over SD 1.4's latents 16,384


class Iteration(NamedTuple):
    i: int
    loss: float
    lr: float
    grad_norm: float  # before clipping
    k: int | None  # denoising steps that z_t has behind it; none where it is a noised picture
    j: int  # which concept


def lr_factor(i, warmup, iters, schedule):
    """What --lr is multiplied by at 0-based iteration i; as transformers' get_{cosine,constant}_schedule_with_warmup."""
    if i < warmup:
        return i / warmup
    return 0.5 * (1 + math.cos(math.pi * (i - warmup) / max(1, iters - warmup))) if schedule == "cosine" else 1.0


def draw(roles, scheduler, K, i, generator):
    """k, the loss's timestep t and the concept's index j for iteration i; random numbers are drawn in this order."""
    T = len(scheduler.levels) - 1  # DDIM's; PNDM visits one level twice
    if roles == "official":
        k = int(torch.randint(0, T, (), generator=generator))
        low = scheduler.levels[k] - 1
        return k, int(torch.randint(low, low + scheduler.stride, (), generator=generator)), i % K
    k = int(torch.randint(1, T + 1, (), generator=generator))
    return k, scheduler.levels[k], int(torch.randint(K, (), generator=generator))


def half_drawn(painter, scheduler, concepts, joined, c_0, shape, generator, roles="paper", guidance_scale=3.0, c_a=None):
    """Algorithm 1's z_t: a function of the iteration's number that returns what the loss takes, k and j.

    painter: the UNet that draws, the teacher in SDD. concepts (K, 77, D), joined and c_0 (1, 77, D): prompt embeddings. shape: of
    the latents, (B, 4, h, w). generator: a CPU generator, the only source of randomness. c_a (1, 77, D): the alternative's prompt.
    """
    def latents(i):
        z_T = torch.randn(shape, generator=generator).to(c_0.device)
        k, t, j = draw(roles, scheduler, len(concepts), i, generator)
        c_p, c_s = (joined, concepts[j:j + 1]) if roles == "official" else (concepts[j:j + 1], joined)
        with torch.no_grad():
            z_t = sample(cfg(painter, c_0, c_p, guidance_scale), scheduler, z_T, k)
        return dict(z_t=z_t, t=t, c_s=c_s, c_a=c_a), k, j

    return latents


def sdd(student, original, optimizer, theta_ema, latents, c_0, *, loss, start=0, iters=1500, lr=1e-5, lr_schedule="cosine", warmup=500,
        ema_decay=0.999, preserve=0.0, prior=0.0, max_grad_norm=1.0, loss_scale=1.0):
    """Runs iterations `start` .. `iters` − 1 and yields an Iteration after each; the models change in place.

    student, original: UNets that share every tensor the optimizer does not hold. theta_ema: the averages θ*, beside the optimizer's
    parameters θ, in their order. latents: `half_drawn`, or `anchors.noised` for Ablating Concepts. c_0 (1, 77, D): the empty
    prompt. loss: one of losses.METHODS. loss_scale: for gradients in float16. Raises FloatingPointError, before the step is taken,
    where the loss or its gradient is no number, or larger than EXPLODED.
    """
    theta = [p for group in optimizer.param_groups for p in group["params"]]
    for i in range(start, iters):
        x, k, j = latents(i)
        x |= dict(e=student, e_original=original, c_0=c_0)
        value = loss(**x)
        if preserve:
            value = value + preserve * losses.preservation(**x)
        if prior:
            value = value + prior * losses.prior(**x)
        (loss_scale * value).backward()
        torch._foreach_div_([p.grad for p in theta], loss_scale)
        grad_norm = torch.nn.utils.clip_grad_norm_(theta, max_grad_norm or math.inf)
        if not (math.isfinite(grad_norm) and value < EXPLODED):
            raise FloatingPointError(f"The loss is {value:.3g} in iteration {i}, its gradient's norm {grad_norm:.3g}: it has come apart")
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(i, warmup, iters, lr_schedule)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(theta_ema, theta, ema_decay)
        yield Iteration(i, value.item(), group["lr"], grad_norm.item(), k, j)
