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
"""
import math
from typing import NamedTuple

import torch

import ema
from guidance import cfg, sample
from losses import preservation


class Iteration(NamedTuple):
    i: int
    loss: float
    lr: float
    grad_norm: float  # before clipping
    k: int  # denoising steps that z_t has behind it
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


def sdd(student, teacher, original, optimizer, scheduler, concepts, joined, c_0, shape, generator, *, loss, latents="teacher",
        roles="paper", start=0, iters=1500, lr=1e-5, lr_schedule="cosine", warmup=500, ema_decay=0.999,
        guidance_scale=3.0, preserve=0.0, max_grad_norm=1.0, loss_scale=1.0):
    """Runs iterations `start` .. `iters` − 1 and yields an Iteration after each; the models change in place.

    student, teacher, original: UNets that share every tensor the optimizer does not hold (`ema.twin`). concepts (K, 77, D),
    joined and c_0 (1, 77, D): prompt embeddings. shape: of the latents, (B, 4, h, w). generator: a CPU generator, the only
    source of randomness. `latents` names the model that draws z_t. `loss_scale`: for gradients in float16.
    """
    theta = [p for group in optimizer.param_groups for p in group["params"]]
    name_of = {id(p): name for name, p in student.named_parameters()}
    theta_ema = [teacher.get_parameter(name_of[id(p)]) for p in theta]
    painter = {"teacher": teacher, "student": student, "original": original}[latents]
    device, B = c_0.device, shape[0]
    c_0 = c_0.expand(B, -1, -1)
    for i in range(start, iters):
        z_T = torch.randn(shape, generator=generator).to(device)
        k, t, j = draw(roles, scheduler, len(concepts), i, generator)
        one, every = concepts[j:j + 1].expand(B, -1, -1), joined.expand(B, -1, -1)
        c_p, c_s = (every, one) if roles == "official" else (one, every)
        with torch.no_grad():
            z_t = sample(cfg(painter, c_0, c_p, guidance_scale), scheduler, z_T, k)
        value = loss(student, original, z_t, t, c_s, c_0)
        if preserve:
            value = value + preserve * preservation(student, original, z_t, t, c_0)
        (loss_scale * value).backward()
        torch._foreach_div_([p.grad for p in theta], loss_scale)
        grad_norm = torch.nn.utils.clip_grad_norm_(theta, max_grad_norm or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(i, warmup, iters, lr_schedule)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(theta_ema, theta, ema_decay)
        yield Iteration(i, value.item(), group["lr"], grad_norm.item(), k, j)
