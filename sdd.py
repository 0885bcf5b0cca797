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
T is not DDPM's 1000: the sampler visits 50 of the timesteps, 981, 961, .. 1. z_T is at 981.
For example, k = 2 steps lead from 981 over 961 to t = 941. All 50 steps lead to t = 0.

The function `sdd` below is the loop of this listing. train.py and minimal.py make θ* and c_s before
it, and save θ* after it. The other methods that train are variations of the loop (presets.METHODS):
another loss, another model that samples z_t, or noised images as z_t.

Why each line is there:

- The aim: after training, the model answers the concept's prompt as it answers the empty prompt.
- So the target is the student's own estimate for the empty prompt. Nobody has to collect images.
- sg: no gradient goes through the target. Otherwise the step would also pull the estimate for the
  empty prompt towards the concept, and the loss would become small, too.
- k is random, so the student forgets at every stage of sampling, also at the early ones, which
  decide what an image shows. One denoising step (DDIM) removes a part of the estimated noise.
- The teacher samples z_t. The student forgets first, and would then train on latents that do not
  show the concept. The average follows slowly, so it makes the concept for longer.
- The average is also the result: it varies less than a single student, and the target moves less.
- Guidance (s_g = 3): without it, z_t would show the concept less clearly.
- c_p is one concept: z_t shows one of them. c_s joins all: the loss unlearns this one prompt.
- Only cross-attention is trained. It is where the prompt enters, and all other tensors stay equal.

Where this file differs from the paper, or where the paper's sources differ from each other
(docs/methods.md has the numbers that the paper leaves open, and our own additions):

1. The loss is a mean over elements. Eq. 12 prints a squared norm, which is a sum.
2. We draw the number of denoising steps k ~ U{1..T}. The paper has no k: it draws a step index
   t ~ U{0..T−1}, and k = T − t. Its pseudo-code (A.1) evaluates the loss at a timestep that is one
   step too noisy. We use the timestep of z_t.
3. c_p: Algorithm 1 and section 3.3 sample with one random concept. Pseudo-code A.1 takes the
   concepts in turn. B.1 says that z_t is sampled "with all 20 concepts". We follow Algorithm 1.
4. c_s: Algorithm 1, section 3.3 and A.1 unlearn all concepts, joined. Only the authors' script
   unlearns one concept in turn, and samples z_t with all of them joined. `roles="official"`
   follows the script. Its loss then uses a random timestep near that of z_t. The script's k = 0
   runs all T steps by mistake. Here k = 0 means no step. `roles="each"` is our own: one random
   concept does both (c_p = c_s).
5. In A.1 the moving average is assigned to a local variable and has no effect. We average the
   trained tensors. All other tensors never change.
6. Gradients are clipped at norm 1, as in the authors' script. The paper does not mention clipping.
"""

import math
from typing import NamedTuple

import torch

import ema
import losses
from guidance import cfg, sample

ROLES = ("paper", "official", "each")  # see points 3 and 4
MAX_LOSS = 1e5  # estimates have variance near 1, so a working model's loss is of order 1 or less


class Prompts(NamedTuple):
    """Embeddings of a training's prompts, as pipeline.encode_prompts gives them."""

    c_0: torch.Tensor  # the empty prompt, (1, 77, D)
    concepts: torch.Tensor  # each concept, (K, 77, D)
    joined: torch.Tensor  # all concepts in one prompt, (1, 77, D)
    c_a: torch.Tensor | None = None  # what to show instead, (1, 77, D); None: the empty prompt


class Iteration(NamedTuple):
    i: int
    loss: float  # with all added terms
    lr: float
    grad_norm: float  # before clipping
    k: int | None  # number of denoising steps that led to z_t; None for a noised image
    j: int  # index of the concept. For noised images: the first latent's concept


def sdd(
    student,
    teacher,
    original,
    optimizer,
    theta_ema,
    scheduler,
    prompts,
    shape,
    generator,
    *,
    rates,
    loss=losses.sdd_loss,
    terms=(),
    latents=None,
    s_g=3.0,
    m=0.999,
    roles="paper",
    step=None,
):
    """Algorithm 1: yields an Iteration after each iteration.

    student, original: the UNets ε_θ and ε_θ°. They share every tensor that is not trained.
    teacher: the UNet that samples z_t; in SDD ε_θ*, whose trained tensors are theta_ema (θ*). If it
    holds copies of them (support.fast.InferenceUNet), call its sync() after each iteration.
    optimizer: holds the trained parameters θ, in the order of theta_ema.
    scheduler: a DDIM of T steps. prompts: Prompts. shape: of z_t, (B, 4, h, w).
    generator: a CPU generator, the only source of random numbers.
    rates: yields (iteration i, learning rate), for example learning_rates().
    loss: a function of losses.py. terms: functions of the same arguments, and of i and j. Their
    values are added to the loss, one after the other.
    latents: another source of z_t: a function () -> (arguments of the loss, k, j).
    s_g: the guidance scale while z_t is sampled. m: of the average. roles: one of ROLES.
    step: takes the optimizer's step on L (default: adamw_step).
    B latents per iteration, K concepts, D = 768 for SD 1.4.
    ValueError for latents or parameters that cannot be trained. FloatingPointError if the loss or
    its gradient has diverged.
    """
    theta = [p for group in optimizer.param_groups for p in group["params"]]
    check(theta, shape)
    step = step or adamw_step
    c_0, concepts, joined, c_a = prompts
    if c_a is None:
        c_a = c_0
    for i, lr in rates:
        # z_T ~ N(0, I),  k ~ U{1..T},  c_p ~ U{concepts};  z_t ← k denoising steps with θ*
        if latents is None:
            z_T = torch.randn(shape, generator=generator).to(c_0.device)
            k, t, j = random_timestep(roles, scheduler, len(concepts), i, generator)
            c_p, c_s = choose_prompts(roles, concepts[j : j + 1], joined)
            with torch.no_grad():
                z_t = sample(cfg(teacher, c_0, c_p, s_g), scheduler, z_T, k)
            batch = dict(z_t=z_t, t=t, c_s=c_s, c_a=c_a)
        else:
            batch, k, j = latents()

        # L = ‖ε_θ(z_t, t, c_s) − sg ε_θ(z_t, t, c_0)‖²: both estimates are in losses.sdd_loss
        batch |= dict(e=student, e_original=original, c_0=c_0)
        L = loss(**batch)
        for term in terms:  # none in SDD
            L = L + term(**batch, i=i, j=j)

        # θ ← AdamW step on L
        grad_norm = step(optimizer, L, lr, i)

        # θ* ← m θ* + (1 − m) θ
        ema.update(theta_ema, theta, m)
        yield Iteration(i, L.item(), lr, grad_norm, k, j)


def check(theta, shape):
    """ValueError for two mistakes that otherwise end deep inside a network."""
    if len(shape) != 4 or shape[1] != 4 or min(shape) < 1:
        raise ValueError(f"z_t cannot have the shape {tuple(shape)}: use (B, 4, h, w)")
    if not all(p.requires_grad for p in theta):
        raise ValueError("the optimizer has a tensor without a gradient: call requires_grad_()")


def adamw_step(optimizer, L, lr, i, *, max_grad_norm=1.0, scaler=None):
    """One optimizer step on the loss L. Returns the gradient's norm before clipping.

    i: the iteration, for the error's text. max_grad_norm: 0 does not clip. scaler: a
    torch.amp.GradScaler for gradients in float16.
    FloatingPointError, before the step, if the loss or its gradient has diverged.
    """
    theta = [p for group in optimizer.param_groups for p in group["params"]]
    # A disabled scaler passes the loss and the step through unchanged.
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(L).backward()
    if all(p.grad is None for p in theta):
        raise ValueError("no gradient reaches the optimizer's tensors: are they the student's?")
    scaler.unscale_(optimizer)
    # A limit of infinity measures the norm and does not clip.
    grad_norm = torch.nn.utils.clip_grad_norm_(theta, max_grad_norm or math.inf).item()
    stop_if_diverged(i, L, grad_norm, scaler)
    for group in optimizer.param_groups:
        group["lr"] = lr
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
    """(c_p, c_s): which prompt samples z_t, and which one is unlearned. Points 3 and 4."""
    if roles == "official":
        return joined, concept
    if roles == "each":
        return concept, concept
    if roles == "paper":
        return concept, joined
    raise ValueError(f"roles is {roles!r}, not one of {', '.join(ROLES)}")


def learning_rates(iters=1500, lr=1e-5, warmup=500, schedule="cosine", start=0):
    """Yields (i, learning rate) for the iterations i = start .. iters − 1; see lr_factor."""
    for i in range(start, iters):
        yield i, lr * lr_factor(i, warmup, iters, schedule)


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
