"""Safe self-distillation (SDD), Algorithm 1 of arXiv 2307.05977.

    θ* ← θ                                                     the EMA teacher starts as the student
    c_s ← all concepts, joined with ", "
    repeat N times:
        z_T ~ N(0, I),  k ~ U{1..T},  c_p ~ U{concepts}
        z_t ← k denoising steps from z_T with θ*, guided towards c_p    t: the timestep of z_t
        θ   ← AdamW step on ‖ε_θ(z_t, t, c_s) − sg ε_θ(z_t, t, c_0)‖²      c_0: the empty prompt
        θ*  ← m θ* + (1 − m) θ
    return θ*

N = iters (1500), T = sampling steps (50), timesteps t in 0..999, m = 0.999, sg: no gradient.
T is not DDPM's 1000: the sampler visits 50 of the timesteps, 981, 961, .. 1. z_T is at 981, and
k = 1 .. 50 steps lead to t = 961, .. 1, 0.

The function `sdd` below is the loop of this listing. train.py makes θ* and c_s before it
(make_models, encode_all) and saves θ* after it (Run.export). The other methods are variations of
the loop (presets.METHODS): another loss, another model that samples z_t, or noised images as z_t.

Where this file differs from the paper, or where the paper's sources differ from each other:

1. The loss is a mean over elements. Eq. 12 prints a squared norm, which is a sum.
2. We draw the number of denoising steps k ~ U{1..T}. The paper has no k: it draws a step index
   t ~ U{0..T−1}, and k = T − t. Its pseudo-code (A.1) evaluates the loss at a timestep that is one
   step too noisy. We use the timestep of z_t.
3. c_p: Algorithm 1 and section 3.3 sample with one random concept. Pseudo-code A.1 takes the
   concepts in turn. B.1 says that z_t is sampled "with all 20 concepts". We follow Algorithm 1.
4. c_s: Algorithm 1, section 3.3 and A.1 unlearn all concepts, joined. Only the authors' script
   unlearns one concept in turn, and samples z_t with all of them joined. `roles="official"`
   follows the script. Its loss then uses a random timestep near that of z_t. The script's k = 0
   runs all T steps by mistake. Here k = 0 means no step.
5. In A.1 the moving average is assigned to a local variable and has no effect. We average the
   trained tensors. All other tensors never change.
6. Gradients are clipped at norm 1, as in the authors' script. The paper does not mention clipping.
7. T = 50 comes from the authors' script. The paper does not give T.
8. A batch (--batch-size) shares one k and one concept. The paper's batch size is 1.
9. B.1 says "1500 or 2000" iterations. We infer that 2000 is for several concepts.
10. `roles="each"` is our own: one random concept both samples z_t and is unlearned (c_p = c_s), a
    new one in each iteration. Neither the paper nor the script does this.
11. An `adversary` is not part of SDD. It learns a word that brings back what was unlearned, and the
    same loss then unlearns this word too (adversaries.py).
12. `preserve` and `kept` are not part of SDD. They hold the estimates of the empty prompt, and of
    other prompts, where the original model has them (losses.preservation_loss).
"""

import math
from typing import NamedTuple

import torch

import ema
import losses
from guidance import cfg, sample

ROLES = ("paper", "official", "each")  # see points 3, 4 and 10
MAX_LOSS = 1e5  # estimates have variance near 1, so a working model's loss is of order 1 or less


class Iteration(NamedTuple):
    i: int
    loss: float  # with all added terms
    lr: float
    grad_norm: float  # before clipping
    k: int | None  # number of denoising steps that led to z_t; None for a noised image
    j: int  # index of the concept; with noised images, of the first one's


def sdd(
    student,
    teacher,
    original,
    optimizer,
    theta_ema,
    scheduler,
    c_0,
    concepts,
    joined,
    shape,
    generator,
    *,
    loss=losses.sdd_loss,
    s_g=3.0,
    m=0.999,
    iters=1500,
    start=0,
    lr=1e-5,
    lr_schedule="cosine",
    warmup=500,
    max_grad_norm=1.0,
    roles="paper",
    c_a=None,
    preserve=0.0,
    kept=None,
    prior=0.0,
    adversary=None,
    noised_anchors=None,
    scaler=None,
):
    """Runs the iterations start .. iters − 1 and yields an Iteration after each of them.

    student, original: the UNets ε_θ and ε_θ°. They share every tensor that is not trained.
    teacher: the UNet that samples z_t; in SDD ε_θ*, whose trained tensors are theta_ema (θ*). If it
    holds copies of them (pipeline.InferenceUNet), call its sync() after each iteration (train.py).
    optimizer: holds the trained parameters θ; theta_ema has the same order. scheduler: a DDIM of T
    steps.
    c_0 (1, 77, D), concepts (K, 77, D), joined (1, 77, D), c_a (1, 77, D): embeddings of the empty
    prompt, of each concept, of all concepts joined, and of --anchor (noised_anchors has its own).
    shape: of z_t, (B, 4, h, w). generator: a CPU generator, the only source of random numbers.
    noised_anchors: Ablating Concepts' source of z_t (ablation.py), used instead of sampling.
    loss: a function of losses.py, with erase_scale and quantile set if it takes them.
    s_g: the guidance scale while z_t is sampled. m: of the average.
    iters, start: N, and the first iteration (after --resume). roles: one of ROLES.
    lr, lr_schedule, warmup: see lr_factor. max_grad_norm: 0 does not clip.
    preserve, prior: weights λ of two more terms of the loss (losses.py); 0 leaves them out.
    kept: embeddings (n, 77, D) of prompts that preserve holds in addition to c_0 (prompts_kept).
    adversary: an adversaries.Adversary; None leaves it out.
    scaler: a torch.amp.GradScaler for gradients in float16.
    B latents per iteration, K concepts, D = 768 for SD 1.4.
    Raises FloatingPointError before the step if the loss or its gradient has diverged.
    """
    theta = [p for group in optimizer.param_groups for p in group["params"]]
    # A disabled scaler passes the loss and the step through unchanged.
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for i in range(start, iters):
        if noised_anchors is None:
            # z_T ~ N(0, I),  k ~ U{1..T},  c_p ~ U{concepts};  z_t ← k denoising steps with θ*
            z_T = torch.randn(shape, generator=generator).to(c_0.device)
            k, t, j = random_timestep(roles, scheduler, len(concepts), i, generator)
            c_p, c_s = choose_prompts(roles, concepts[j : j + 1], joined)
            with torch.no_grad():
                z_t = sample(cfg(teacher, c_0, c_p, s_g), scheduler, z_T, k)
            batch = dict(z_t=z_t, t=t, c_s=c_s, c_a=c_a)
        else:
            batch, k, j = noised_anchors()

        # L = ‖ε_θ(z_t, t, c_s) − sg ε_θ(z_t, t, c_0)‖²: both estimates are in losses.sdd_loss.
        # The other terms are 0 in SDD: L + L(c_v) + preserve ‖…‖² + prior ‖…‖² (losses.py);
        # c_v: the adversary's words.
        batch |= dict(e=student, e_original=original, c_0=c_0)
        value = loss(**batch)
        if adversary is not None:
            c_v = adversary(**batch, i=i, j=j)
            value = value + loss(**batch | dict(c_s=c_v))
        if preserve:
            c_k = prompts_kept(c_0, kept, shape[0], generator)
            value = value + preserve * losses.preservation_loss(**batch, c_k=c_k)
        if prior:
            value = value + prior * losses.prior_loss(**batch)

        # θ ← AdamW step on L
        rate = lr * lr_factor(i, warmup, iters, lr_schedule)
        grad_norm = adamw_step(i, optimizer, theta, value, rate, max_grad_norm, scaler)

        # θ* ← m θ* + (1 − m) θ
        ema.update(theta_ema, theta, m)
        yield Iteration(i, value.item(), rate, grad_norm, k, j)


def adamw_step(i, optimizer, theta, value, rate, max_grad_norm, scaler):
    """One optimizer step on the loss `value`. Returns the gradient's norm before clipping."""
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    # A limit of infinity measures the norm and does not clip.
    grad_norm = torch.nn.utils.clip_grad_norm_(theta, max_grad_norm or math.inf).item()
    stop_if_diverged(i, value, grad_norm, scaler)
    for group in optimizer.param_groups:
        group["lr"] = rate
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return grad_norm


def random_timestep(roles, scheduler, K, i, generator):
    """(k, t, j): the number of steps, the timestep of the loss, the index of the concept.

    k is drawn first. "official" then draws t near the timestep of z_t, and takes the concepts in
    turn. The others take the timestep of z_t, and then draw j.
    """
    T = scheduler.evaluations  # training uses DDIM, which has one evaluation per step
    if roles == "official":
        k = int(torch.randint(0, T, (), generator=generator))
        # z_t is at low + 1; the script draws from low on. With steps_offset 0, z_t can be at 0.
        low = max(0, scheduler.timesteps[k] - 1)
        t = int(torch.randint(low, low + scheduler.stride, (), generator=generator))
        return k, t, i % K
    k = int(torch.randint(1, T + 1, (), generator=generator))
    j = int(torch.randint(K, (), generator=generator))
    return k, scheduler.timesteps[k], j


def choose_prompts(roles, concept, joined):
    """(c_p, c_s): which prompt samples z_t, and which one is unlearned. Points 3, 4 and 10."""
    if roles == "official":
        return joined, concept
    if roles == "each":
        return concept, concept
    if roles == "paper":
        return concept, joined
    raise ValueError(f"roles is {roles!r}, not one of {', '.join(ROLES)}")


def prompts_kept(c_0, kept, B, generator):
    """c_k, the prompts of the preservation loss: c_0; with `kept`, (B, 77, D), one per latent.

    Each of the B is the empty prompt with probability 1/2, and otherwise a random one of `kept`.
    """
    if kept is None or len(kept) == 0:
        return c_0
    n = len(kept)
    number = torch.randint(2 * n, (B,), generator=generator)
    prompts = torch.cat([kept, c_0])  # the numbers n .. 2n − 1 all mean c_0
    return prompts[number.clamp(max=n).to(c_0.device)]


def lr_factor(i, warmup, iters, schedule):
    """The factor on --lr at iteration i: linear warm-up, then a cosine to 0 or a constant.

    The same as get_cosine_schedule_with_warmup and get_constant_schedule_with_warmup of
    transformers.
    """
    if i < warmup:
        return i / warmup
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (i - warmup) / max(1, iters - warmup)))
    if schedule == "constant":
        return 1.0
    raise ValueError(f"the learning rate's schedule is {schedule!r}, not cosine or constant")


def stop_if_diverged(i, value, grad_norm, scaler):
    """Raises FloatingPointError if the loss is NaN or above MAX_LOSS, or the gradient not finite.

    With float16 an overflow is normal: GradScaler skips that step and halves its scale. It counts
    as divergence only when the scale has fallen below 1.
    """
    overflow_is_normal = scaler.is_enabled() and scaler.get_scale() >= 1
    finite = math.isfinite(grad_norm) or overflow_is_normal
    if not (finite and value < MAX_LOSS):  # NaN < MAX_LOSS is False
        raise FloatingPointError(
            f"Training diverged at iteration {i} (loss {value:.3g}, gradient norm {grad_norm:.3g})"
        )
