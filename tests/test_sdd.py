"""Algorithm 1 and the other training methods, compared with a plain loop on diffusers' classes.

`Plain` is that loop, written out. `compare` runs it next to `sdd.sdd` from equal weights and
asserts that z_t, the loss, every gradient, the updated weights and the average agree. The planted
mistakes below show that each of these comparisons can fail.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import (
    TEXT,
    UNETS,
    padded_tokens,
    pair,
    randn,
    randomise,
    relative,
    their_scheduler,
    unet_twin,
)
from torch import nn
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

import ablation
import ema
import guidance
import losses
import presets
import sdd
from scheduler import DDIM
from unet import UNet

TINY = UNETS["2 heads, plain first"]
D = TINY["cross_attention_dim"]
S_S, ALTERNATIVE = 1.5, randn(1, 77, D, seed=4)
IMAGES, ANCHORS, TARGETS = (
    randn(7, 4, 16, 12, seed=8),
    randn(2, 77, D, seed=9),
    randn(2, 77, D, seed=10),
)  # Ablating's: 2 prompts
KEPT, FOUND = randn(3, 77, D, seed=11), randn(3, 77, D, seed=12)  # --keep; an adversary's words
T, ITERS, WARMUP, LR, M, S_G = (
    5,
    6,
    2,
    0.01,
    0.9,
    3.0,
)  # lr 0, ½, 1, … of 0.01: weights move by far more than they round
CASE = dict(
    B=2,
    K=3,
    roles="paper",
    preserve=0.0,
    kept=None,
    adversary=None,
    prior=0.0,
    clip=0.002,
    latents="teacher",
    schedule="cosine",
    scale=1.0,
    trained="xattn",
    quantile=0.0,
    lr=LR,
    loss=losses.sdd_loss,
    plain="sdd",
)  # clip: gradients here have norms of 0.002 to 0.1


@pytest.fixture(autouse=True)
def no_gradients():
    """Replaces the fixture of conftest: these tests train. One thread is faster for tiny nets."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    TRAINED[0] = "xattn"
    yield
    torch.set_num_threads(threads)


def close(what, a, b, tolerance):
    assert torch.equal(a, b) or relative(a, b) <= tolerance, (
        f"{what} is off by {relative(a, b):.1e}"
    )


TRAINED = ["xattn"]  # the case's key of TRAIN_PARAMS


def attn2(module):
    """The trained tensors (SDD: attn2), sorted by name: the same order for both classes."""
    return {
        name: p
        for name, p in sorted(module.named_parameters())
        if presets.TRAIN_PARAMS[TRAINED[0]](name)
    }


def flat(module):
    return torch.cat([p.detach().flatten() for p in attn2(module).values()])


def three_models():
    """student, teacher, original. Only attn2 differs, as in the middle of a run."""
    original = randomise(UNet(**TINY), 0).requires_grad_(False)
    student = ema.copy_trained(original, attn2(original))
    teacher = ema.copy_trained(student, attn2(student))
    for seed, module in ((1, student), (2, teacher)):
        for i, p in enumerate(attn2(module).values()):
            p.data += 0.3 * p.std() * randn(*p.shape, seed=100 * seed + i)
    for p in attn2(student).values():
        p.requires_grad_(True)
    return student, teacher, original


def embeddings(K):
    """concepts (K, 77, D), joined and c_0 (1, 77, D); with one concept, joining changes nothing."""
    concepts, joined, c_0 = randn(K + 2, 77, D, seed=3).split([K, 1, 1])
    return concepts, (concepts if K == 1 else joined), c_0


class WatchedAdamW(torch.optim.AdamW):
    """Keeps the gradients that each step was taken with: sdd() clears them before it yields."""

    def step(self, closure=None):
        self.grads = [p.grad.clone() for p in self.param_groups[0]["params"]]
        return super().step(closure)


class Ours:
    """A run of sdd.sdd on the tiny UNet; `z_t` is what the loss was last called with."""

    def __init__(self, case, start=0):
        self.student, self.teacher, self.original = three_models()
        self.optimizer = WatchedAdamW(attn2(self.student).values(), lr=1.0, weight_decay=0.01)
        self.generator = torch.Generator().manual_seed(7)

        def watched(**x):
            self.z_t = x["z_t"]
            return case["loss"](**x, erase_scale=S_S, quantile=case["quantile"])

        concepts, joined, c_0 = embeddings(case["K"])
        teacher, noised_anchors = None, None
        if case["latents"] == "anchor":
            noised_anchors = ablation.noised_anchors(
                IMAGES,
                [0, 1],
                lambda which: TARGETS[which],
                ANCHORS,
                DDIM(T),
                case["B"],
                self.generator,
            )
        else:
            teacher = getattr(self, case["latents"])
        self.run = sdd.sdd(
            self.student,
            teacher,
            self.original,
            self.optimizer,
            list(attn2(self.teacher).values()),
            DDIM(T),
            c_0,
            concepts,
            joined,
            (case["B"], 4, 16, 12),
            self.generator,
            loss=watched,
            s_g=S_G,
            m=M,
            iters=ITERS,
            start=start,
            lr=case["lr"],
            lr_schedule=case["schedule"],
            warmup=WARMUP,
            max_grad_norm=case["clip"],
            roles=case["roles"],
            c_a=ALTERNATIVE,
            preserve=case["preserve"],
            kept=case["kept"],
            prior=case["prior"],
            adversary=case["adversary"],
            noised_anchors=noised_anchors,
            scaler=torch.amp.GradScaler(
                "cpu", init_scale=case["scale"], enabled=case["scale"] != 1
            ),
        )


class Plain:
    """The same training, written out: three full UNets and DDIM of diffusers, torch's AdamW."""

    def __init__(self, case):
        self.case = case
        self.student, self.teacher, self.original = (unet_twin(**TINY) for _ in range(3))
        self.optimizer = torch.optim.AdamW(
            attn2(self.student).values(), lr=case["lr"], weight_decay=0.01
        )
        self.schedule = (
            get_cosine_schedule_with_warmup(self.optimizer, WARMUP, ITERS)
            if case["schedule"] == "cosine"
            else get_constant_schedule_with_warmup(self.optimizer, WARMUP)
        )
        self.ddim = their_scheduler("ddim", T)
        self.generator = torch.Generator().manual_seed(
            7
        )  # the same seed, never copied from the other side

    def copy_from(self, ours):
        """Copies weights and optimizer state, so that both sides start each iteration equal."""
        for mine, other in zip(self.models(), (ours.student, ours.teacher, ours.original)):
            mine.load_state_dict(other.state_dict())
        for p, other in zip(attn2(self.student).values(), attn2(ours.student).values()):
            if other in ours.optimizer.state:
                self.optimizer.state[p] = copy.deepcopy(ours.optimizer.state[other])

    def models(self):
        return self.student, self.teacher, self.original

    def draw(self, i):
        case, levels = self.case, [*self.ddim.timesteps.tolist(), 0]
        z = torch.randn(case["B"], 4, 16, 12, generator=self.generator)
        if case["roles"] == "official":
            k = torch.randint(0, T, (), generator=self.generator).item()
            t = torch.randint(
                1000 - 200 * (k + 1), 1000 - 200 * k, (), generator=self.generator
            ).item()
            return z, k, t, i % case["K"]
        k = torch.randint(1, T + 1, (), generator=self.generator).item()
        return z, k, levels[k], torch.randint(0, case["K"], (), generator=self.generator).item()

    def noised(self):
        """Ablating Concepts' z_t: noised images. Returns what `sampled` does, with c_a and n."""
        B, g = self.case["B"], self.generator
        which, t = torch.randint(0, 7, (B,), generator=g), torch.randint(0, 1000, (B,), generator=g)
        n = torch.randn(B, 4, 16, 12, generator=g)
        prompts = [picture % 2 for picture in which.tolist()]
        return (
            self.ddim.add_noise(IMAGES[which], n, t),
            None,
            t,
            prompts[0],
            TARGETS[prompts],
            ANCHORS[prompts],
            n,
        )

    def sampled(self, i):
        case, B = self.case, self.case["B"]
        z, k, t, j = self.draw(i)
        concepts, joined, c_0 = (c.repeat_interleave(B, 0) for c in embeddings(case["K"]))
        one = concepts[j * B : (j + 1) * B]
        c_p, c_s = {"paper": (one, joined), "official": (joined, one), "each": (one, one)}[
            case["roles"]
        ]
        painter = getattr(self, case["latents"])
        with torch.no_grad():
            for level in self.ddim.timesteps[:k]:
                e_0, e_p = painter(z, level, c_0).sample, painter(z, level, c_p).sample
                z = self.ddim.step(e_0 + S_G * (e_p - e_0), level, z).prev_sample
        return z, k, t, j, c_s, ALTERNATIVE.repeat_interleave(B, 0), None

    def iteration(self, i):
        """Computes the gradients. Returns z_t, k, j, the loss and the norm before clipping."""
        case, c_0 = self.case, embeddings(self.case["K"])[2].repeat_interleave(self.case["B"], 0)
        z, k, t, j, c_s, c_a, n = self.noised() if case["latents"] == "anchor" else self.sampled(i)

        def e(c):
            return self.student(z, t, c).sample

        def o(c):
            return self.original(z, t, c).sample.detach()

        def squared(c_s):
            return (PLAIN[case["plain"]](e, o, c_s, c_0, c_a, n) ** 2).mean()

        loss = squared(c_s)
        if case["adversary"]:
            loss = loss + squared(FOUND[: case["B"]])
        if case["preserve"]:
            c_k = self.kept(c_0)
            loss = loss + case["preserve"] * ((e(c_k) - o(c_k)) ** 2).mean()
        if case["prior"]:
            loss = loss + case["prior"] * ((e(c_a) - n) ** 2).mean()
        self.student.zero_grad()
        loss.backward()
        grads = [p.grad for p in attn2(self.student).values()]
        norm = (
            torch.cat([g.flatten() for g in grads]).double().norm()
        )  # in float32 a sum of a million squares is off by 7e-5
        for g in grads:
            g.mul_(min(1.0, case["clip"] / (norm.item() + 1e-6)) if case["clip"] else 1.0)
        return z, k, j, loss, norm

    def kept(self, c_0):
        """The prompts that the preservation term holds: one of KEPT or the empty one, each half."""
        if self.case["kept"] is None:
            return c_0
        numbers = torch.randint(2 * len(KEPT), (self.case["B"],), generator=self.generator)
        prompts = [KEPT[i] if i < len(KEPT) else c_0[0] for i in numbers.tolist()]
        return torch.stack(prompts)

    def update(self, grads):
        """AdamW, the moving average and the schedule, from given gradients. Returns the lr."""
        lr = self.optimizer.param_groups[0]["lr"]
        for p, g in zip(attn2(self.student).values(), grads):
            p.grad = g
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for a, b in zip(attn2(self.teacher).values(), attn2(self.student).values()):
                a.copy_(M * a + (1 - M) * b)
        return lr


def signal(o, c_s, c_0, quantile):
    """All-but-One's erasing signal: where the guidance is strong in its sample and channel."""
    guidance = o(c_s) - o(c_0)
    strong = torch.zeros_like(guidance)
    for b, c in itertools.product(*map(range, guidance.shape[:2])):
        size = guidance[b, c].abs()
        strong[b, c] = (size >= np.quantile(size.numpy(), quantile)).float()
    return -S_S * strong * guidance


PLAIN = {  # the difference that each loss squares, from METHODS' papers
    "sdd": lambda e, o, c_s, c_0, c_a, n: e(c_s) - e(c_0).detach(),
    "esd": lambda e, o, c_s, c_0, c_a, n: e(c_s) - (1 + S_S) * o(c_0) + S_S * o(c_s),
    "ablate": lambda e, o, c_s, c_0, c_a, n: e(c_s) - e(c_a).detach(),
    "ablate-noise": lambda e, o, c_s, c_0, c_a, n: e(c_s) - n,
    "all-but-one": lambda e, o, c_s, c_0, c_a, n: (e(c_s) - e(c_0)) - (o(c_a) - o(c_0)),
    "all-but-one's signal": lambda e, o, c_s, c_0, c_a, n: (
        (e(c_s) - e(c_0)) - signal(o, c_s, c_0, 0.8)
    ),
}


def found_words(e, e_original, z_t, t, c_s, i, j, **_):
    """An adversary that finds the same states each time (test_adversary.py has the real one)."""
    return FOUND[: len(z_t)]


def compare(case, mistake=None):
    """Runs both sides and asserts that they agree. `mistake`: what ours gets wrong.

    Returns the Iterations.
    """
    TRAINED[0] = case["trained"]
    ours, plain, report = Ours(case | (mistake or {})), Plain(case), []
    for i in range(5):
        plain.copy_from(ours)
        before = {which: flat(getattr(ours, which)) for which in ("student", "teacher")}
        it = next(ours.run)
        z_t, k, j, loss, norm = plain.iteration(i)
        assert (it.i, it.k, it.j) == (i, k, j), "another draw"
        close(
            "z_t", ours.z_t, z_t, 1e-5
        )  # up to 5 guided steps in float32, a batch of 2B against two of B: 1e-6 was measured
        close(
            "loss", torch.tensor(it.loss), loss.detach(), 1e-4
        )  # a small difference of two UNet passes on it: 8e-6
        close("grad_norm", torch.tensor(it.grad_norm), norm, 1e-4)
        for (name, p), grad in zip(attn2(plain.student).items(), ours.optimizer.grads):
            close(f"gradient of {name}", grad, p.grad, 1e-4)  # and through the way back: 2e-5
        lr = plain.update(ours.optimizer.grads)
        assert abs(it.lr - lr) <= 1e-15, "lr"  # of 0.01, in float64
        for (name, p), q in zip(attn2(plain.student).items(), attn2(ours.student).values()):
            for key, value in plain.optimizer.state[p].items():
                assert torch.equal(value, ours.optimizer.state[q][key]), (
                    f"{key} of {name}"
                )  # equal gradients: bit for bit
        for which, then in before.items():
            mine, theirs = (flat(getattr(side, which)) - then for side in (ours, plain))
            close(
                f"the {which}'s step", mine, theirs, 1e-5
            )  # weights round at 1e-8, a step is 1e-3 and more: 2e-6
        report.append(it)
    return report


@pytest.mark.parametrize(
    "case",
    [
        dict(B=1, K=1),
        dict(B=2, K=3),
        dict(B=1, K=3, preserve=0.5, clip=0.0),
        dict(B=2, K=1, preserve=0.5),
        dict(B=1, K=3, roles="official", schedule="constant"),
        dict(B=2, K=3, roles="official", clip=0.0, preserve=0.5),
        dict(B=2, K=1, roles="official", clip=1.0),
        dict(B=1, K=3, roles="each"),
        dict(B=2, K=3, clip=0.0, scale=1024.0),
        dict(B=3, K=3, preserve=0.5, kept=KEPT),
        dict(B=2, K=3, roles="each", adversary=found_words, preserve=0.5, kept=KEPT),
        dict(B=1, K=3, latents="student"),
        dict(B=1, K=3, latents="original"),
        dict(B=2, K=3, loss=losses.esd_loss, plain="esd", latents="student"),
        dict(
            B=1,
            K=1,
            loss=losses.esd_loss,
            plain="esd",
            latents="original",
            trained="noxattn",
            preserve=0.5,
        ),
        dict(B=2, K=2, loss=losses.ablation_loss, plain="ablate", latents="anchor", trained="kv"),
        dict(
            B=3,
            K=2,
            loss=losses.ablation_loss,
            plain="ablate",
            latents="anchor",
            trained="full",
            prior=0.7,
            preserve=0.5,
            lr=0.001,
        ),
        dict(
            B=2,
            K=2,
            loss=losses.noise_ablation_loss,
            plain="ablate-noise",
            latents="anchor",
            trained="kv",
            clip=1.0,
        ),
        dict(B=2, K=3, loss=losses.all_but_one_loss, plain="all-but-one", preserve=1.0),
        dict(
            B=2,
            K=1,
            loss=losses.all_but_one_loss,
            plain="all-but-one's signal",
            quantile=0.8,
            roles="official",
        ),
    ],
    ids=lambda case: "-".join(
        key if key in ("kept", "adversary") else f"{key}={value}"
        for key, value in case.items()
        if key != "loss"
    ),
)
def test_iterations_against_a_plain_loop(case):
    case = CASE | case
    report = compare(case)
    if case["clip"] == CASE["clip"]:
        assert any(it.grad_norm > case["clip"] for it in report), (
            "no gradient was clipped: this case shows nothing"
        )


# Planted mistakes. A mistake is a change of the case, or a function that plants it and returns one.
# Each must fail the comparison that is named next to it. Without a mistake the same run passes
# (test_iterations_against_a_plain_loop).


def one_timestep_too_noisy(patch):
    def random_timestep(roles, scheduler, *rest):
        k, t, j = right(roles, scheduler, *rest)
        return k, scheduler.timesteps[k - 1], j

    right = sdd.random_timestep
    patch.setattr(sdd, "random_timestep", random_timestep)


def k_from_0(patch):
    def random_timestep(roles, scheduler, *rest):
        k, t, j = right(roles, scheduler, *rest)
        return k - 1, scheduler.timesteps[k - 1], j

    right = sdd.random_timestep
    patch.setattr(sdd, "random_timestep", random_timestep)


def concept_before_k(patch):
    def random_timestep(roles, scheduler, K, i, generator):
        j = int(torch.randint(K, (), generator=generator))
        k = int(torch.randint(1, T + 1, (), generator=generator))
        return k, scheduler.timesteps[k], j

    patch.setattr(sdd, "random_timestep", random_timestep)


def guided_from_e_p(patch):
    def cfg(unet, c_0, c_p, s):
        def estimate(z, t, i):
            e_0, e_p = unet(z, t, c_0), unet(z, t, c_p)
            return e_p + s * (e_p - e_0)

        return estimate

    patch.setattr(sdd, "cfg", cfg)


def prompts_swapped(patch):
    """z_t from all concepts joined, the loss on the one that was drawn."""

    def cfg(unet, c_0, c_p, s):
        drawn.append(c_p)
        return guidance.cfg(unet, c_0, embeddings(3)[1], s)

    drawn = []
    patch.setattr(sdd, "cfg", cfg)
    return dict(loss=lambda **x: losses.sdd_loss(**x | dict(c_s=drawn[-1].expand(2, -1, -1))))


def lr_shifted(by):
    def plant(patch):
        right = sdd.lr_factor
        patch.setattr(sdd, "lr_factor", lambda i, *rest: right(max(i + by, 0), *rest))

    return plant


def clipped_after_the_step(patch):  # or not at all: the step sees the same gradients
    patch.setattr(
        nn.utils,
        "clip_grad_norm_",
        lambda ps, limit: torch.cat([p.grad.flatten() for p in ps]).norm(),
    )


def never_unscaled(patch):
    def unscale_(self, optimizer):
        right(self, optimizer)
        for p in optimizer.param_groups[0]["params"]:
            p.grad.mul_(self.get_scale())

    right = torch.amp.GradScaler.unscale_
    patch.setattr(torch.amp.GradScaler, "unscale_", unscale_)
    return dict(scale=1024.0)


def gradients_pile_up(patch):
    patch.setattr(WatchedAdamW, "zero_grad", lambda self: None)


def teacher_never_moves(patch):
    patch.setattr(ema, "update", lambda teacher, student, m: None)


def average_swapped(patch):
    right = ema.update
    patch.setattr(ema, "update", lambda teacher, student, m: right(teacher, student, 1 - m))


def wrong(loss):
    return dict(
        loss=lambda e, e_original, z_t, t, c_s, c_0, **_: loss(
            lambda c: e(z_t, t, c), lambda c: e_original(z_t, t, c).detach(), c_s, c_0
        )
    )


MISTAKES = {  # name: (the comparison that turns red, the mistake)
    "loss one timestep too noisy": ("grad_norm", one_timestep_too_noisy),
    "k in 0..T-1": ("another draw", k_from_0),
    "concept drawn before k": ("another draw", concept_before_k),
    "guidance from e_p": ("z_t", guided_from_e_p),
    "c_p and c_s swapped": ("z_t", prompts_swapped),
    "the student samples z_t": ("z_t", dict(latents="student")),
    "the original samples z_t": ("z_t", dict(latents="original")),
    "target from the original": (
        "loss",
        wrong(lambda e, e_original, c_s, c_0: F.mse_loss(e(c_s), e_original(c_0))),
    ),
    "target from c_s": (
        "loss",
        wrong(lambda e, e_original, c_s, c_0: F.mse_loss(e(c_s), e(c_s).detach())),
    ),
    "target and estimate swapped": (
        "grad_norm",
        wrong(lambda e, e_original, c_s, c_0: F.mse_loss(e(c_0), e(c_s).detach())),
    ),
    "gradient through the target": (
        "grad_norm",
        wrong(lambda e, e_original, c_s, c_0: F.mse_loss(e(c_s), e(c_0))),
    ),
    "sum for mean": (
        "loss",
        wrong(lambda e, e_original, c_s, c_0: ((e(c_s) - e(c_0).detach()) ** 2).sum()),
    ),
    "preservation": ("loss", dict(preserve=0.01)),
    "roles of another choice": ("loss", dict(roles="each")),
    "lr one iteration late": ("lr", lr_shifted(-1)),
    "lr one iteration early": ("lr", lr_shifted(1)),
    "clipped after the step": ("gradient of", clipped_after_the_step),
    "gradients never unscaled": ("grad_norm", never_unscaled),
    "gradients not cleared": ("grad_norm", gradients_pile_up),
    "teacher never moves": ("the teacher's step", teacher_never_moves),
    "EMA weights swapped": ("the teacher's step", average_swapped),
}
ESD = dict(loss=losses.esd_loss, plain="esd", latents="student")
ABLATE = dict(
    K=2, loss=losses.ablation_loss, plain="ablate", latents="anchor", trained="kv", prior=0.7
)
ALL_BUT_ONE = dict(loss=losses.all_but_one_loss, plain="all-but-one", preserve=1.0)
SIGNAL = dict(loss=losses.all_but_one_loss, plain="all-but-one's signal", quantile=0.8)
ADVERSARY = dict(adversary=found_words)
KEEP = dict(B=3, preserve=0.5, kept=KEPT)
# The other methods: the case, the comparison that must fail, and the mistake.
OTHER_MISTAKES = {
    "ESD: scale counted from 1": (
        ESD,
        "loss",
        dict(loss=lambda erase_scale, **x: losses.esd_loss(erase_scale=erase_scale - 1, **x)),
    ),
    "ESD: towards the concept": (
        ESD,
        "loss",
        dict(loss=lambda erase_scale, **x: losses.esd_loss(erase_scale=-erase_scale, **x)),
    ),
    "ESD: the student's own estimates": (
        ESD,
        "loss",
        dict(loss=lambda e_original, e, **x: losses.esd_loss(e_original=e, e=e, **x)),
    ),
    "ESD: the teacher samples z_t": (ESD, "z_t", dict(latents="teacher")),
    "Ablating: prompts swapped": (
        ABLATE,
        "grad_norm",
        dict(loss=lambda c_s, c_a, **x: losses.ablation_loss(c_s=c_a, c_a=c_s, **x)),
    ),
    "Ablating: the empty prompt for the anchor": (
        ABLATE,
        "loss",
        dict(loss=lambda c_a, c_0, **x: losses.ablation_loss(c_a=c_0, **x)),
    ),
    "Ablating: no prior": (ABLATE, "loss", dict(prior=0.0)),
    "the adversary's words are forgotten": (ADVERSARY, "loss", dict(adversary=None)),
    "the adversary's words for the concept": (
        ADVERSARY,
        "loss",
        dict(adversary=lambda c_s, **_: c_s),
    ),
    "only the empty prompt is kept": (KEEP, "loss", dict(kept=None)),
    "other prompts are kept": (KEEP, "loss", dict(kept=-KEPT)),
    "All-but-One: no second term": (ALL_BUT_ONE, "loss", dict(preserve=0.0)),
    "All-but-One: SDD's first term": (ALL_BUT_ONE, "loss", dict(loss=losses.sdd_loss)),
    "All-but-One: target kept still": (
        ALL_BUT_ONE,
        "grad_norm",
        dict(
            loss=lambda e, z_t, t, c_0, **x: losses.all_but_one_loss(
                e=lambda z, t, c: e(z, t, c).detach() if c is c_0 else e(z, t, c),
                z_t=z_t,
                t=t,
                c_0=c_0,
                **x,
            )
        ),
    ),
    "All-but-One: another quantile": (SIGNAL, "loss", dict(quantile=0.7)),
    "All-but-One: signal towards": (
        SIGNAL,
        "loss",
        dict(loss=lambda erase_scale, **x: losses.all_but_one_loss(erase_scale=-erase_scale, **x)),
    ),
}


SEEN_TO_PASS = set()  # ids of cases


@pytest.mark.parametrize("name", OTHER_MISTAKES)
def test_planted_mistakes_in_the_other_trainers_are_seen(name):
    case, comparison, mistake = OTHER_MISTAKES[name]
    if id(case) not in SEEN_TO_PASS:
        compare(CASE | case)
        SEEN_TO_PASS.add(id(case))
    with pytest.raises(AssertionError, match=f"^{comparison}"):
        compare(CASE | case, mistake)


def test_start_token_detached():
    """--detach-start: no gradient through the first token. All other embeddings are 0 here."""
    unet = randomise(UNet(**TINY), 0)
    for p in unet.parameters():
        p.requires_grad_(True)
    c = torch.zeros(1, 77, D)
    c[:, 0] = randn(D)
    for detach in (False, True):
        if detach:
            ablation.detach_start(unet)
        unet.zero_grad()
        unet(randn(1, 4, 8, 8), 500, c).square().sum().backward()
        grads = [
            p.grad.abs().max()
            for name, p in unet.named_parameters()
            if presets.TRAIN_PARAMS["kv"](name)
        ]
        assert grads and all((g == 0) == detach for g in grads)


def test_embedding_rows_get_transformers_gradient():
    """The gradient of the token embeddings, through UNet and text encoder, equals theirs."""
    (ours, theirs), (text, their_text) = (
        pair("unet", **TINY | dict(cross_attention_dim=24)),
        pair("text_encoder", **TEXT),
    )
    tokens, z, target = (
        padded_tokens(TEXT["vocab_size"])[:2],
        randn(2, 4, 8, 8),
        randn(2, 4, 8, 8, seed=1),
    )
    a, b = (
        text.text_model.embeddings.token_embedding.weight,
        getattr(their_text, "text_model", their_text).embeddings.token_embedding.weight,
    )
    for p in (a, b):
        p.requires_grad_(True)
    losses.noise_ablation_loss(ours, z, 500, text(tokens), target).backward()
    ((theirs(z, 500, their_text(tokens).last_hidden_state).sample - target) ** 2).mean().backward()
    close("gradient of the token embeddings", a.grad, b.grad, 1e-4)
    assert (a.grad.abs().sum(1) > 0).sum() > 20


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistakes_are_seen(name, monkeypatch):
    comparison, mistake = MISTAKES[name]
    mistake = mistake(monkeypatch) if callable(mistake) else mistake
    with pytest.raises(AssertionError, match=f"^{comparison}"):
        compare(CASE, mistake)


# Random numbers


class Line(nn.Module):
    """ε = w z: so cheap that a run of a thousand iterations takes a second."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, z, t, c):
        return self.w * z


def test_officials_timestep_is_one_of_the_schedule():
    """Also with steps_offset 0, where z_t can be at 0 and the script would draw from -1 on."""
    scheduler, generator = DDIM(5, steps_offset=0), torch.Generator().manual_seed(0)
    drawn = {sdd.random_timestep("official", scheduler, 1, 0, generator)[1] for _ in range(3000)}
    assert min(drawn) == 0 and max(drawn) == 998


@pytest.mark.parametrize("roles", ["paper", "official"])
def test_draw(roles, monkeypatch):
    """z_T, then k, then j (paper) or the timestep (official), all from one generator."""
    drawn, N, K = [], 1000, 3
    monkeypatch.setattr(sdd, "sample", lambda estimate, scheduler, z, k: drawn.append(z) or z)
    times, levels = [], DDIM(50).timesteps
    line, c = Line(), torch.zeros(K, 77, 1)
    run = list(
        sdd.sdd(
            line,
            line,
            line,
            torch.optim.AdamW([line.w]),
            [torch.ones(())],
            DDIM(50),
            c[:1],
            c,
            c[:1],
            (1, 4, 2, 2),
            torch.Generator().manual_seed(11),
            iters=N,
            roles=roles,
            loss=lambda e, z_t, t, c_s, **_: times.append(t) or e(z_t, t, c_s).mean(),
        )
    )
    g = torch.Generator().manual_seed(11)
    for it, z, t in zip(run, drawn, times, strict=True):
        assert torch.equal(z, torch.randn(1, 4, 2, 2, generator=g))
        if roles == "paper":
            assert it.k == torch.randint(1, 51, (), generator=g)
            assert it.j == torch.randint(K, (), generator=g)
            assert t == levels[it.k]
        else:
            assert it.k == torch.randint(0, 50, (), generator=g)
            assert t == torch.randint(980 - 20 * it.k, 1000 - 20 * it.k, (), generator=g)
            assert 980 - 20 * it.k <= levels[it.k] < 1000 - 20 * it.k and it.j == it.i % K
    assert len(run) == N and levels[50] == 0
    assert {it.k for it in run} == set(range(1, 51) if roles == "paper" else range(50))
    assert {it.j for it in run} == set(range(K))


@pytest.mark.parametrize(
    "warmup, iters", [(0, 10), (3, 10), (500, 1500), (10, 10), (12, 10), (0, 1)]
)
def test_lr_factor(warmup, iters):
    for schedule in ("cosine", "constant"):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        theirs = (
            get_cosine_schedule_with_warmup(optimizer, warmup, iters)
            if schedule == "cosine"
            else get_constant_schedule_with_warmup(optimizer, warmup)
        )
        for i in range(iters):
            # float64; 1e-15 of the peak is one rounding of the cosine's argument
            assert sdd.lr_factor(i, warmup, iters, schedule) == pytest.approx(
                theirs.get_last_lr()[0], abs=1e-15
            )
            optimizer.step()
            theirs.step()


# What is trained, and what is shared


def test_the_target_carries_no_gradient():
    """On ε = w c by hand: d/dw (w c_s − sg(w c_0))² = 2 (w c_s − w c_0) c_s."""
    w, z = torch.tensor(0.5, requires_grad=True), torch.zeros(1)
    c_s, c_0 = torch.tensor([[[2.0]]]), torch.tensor([[[3.0]]])
    losses.sdd_loss(lambda z, t, c: w * c, z, 0, c_s, c_0).backward()
    assert w.grad == 2 * (0.5 * 2 - 0.5 * 3) * 2
    w.grad = None
    original = torch.tensor(0.25, requires_grad=True)  # (w c_0 − sg(w° c_0))²
    losses.preservation_loss(
        lambda z, t, c: w * c, lambda z, t, c: original * c, z, 0, c_0
    ).backward()
    assert w.grad == 2 * (0.5 * 3 - 0.25 * 3) * 3 and original.grad is None


@pytest.mark.parametrize(
    "loss",
    [x.loss for x in presets.METHODS.values() if x.loss is not None and x.latents != "anchor"],
)
def test_gradient_reaches_the_trained_tensors_only(loss):
    ours, with_grad = Ours(CASE | dict(preserve=0.5, loss=loss)), []
    ours.optimizer.register_step_pre_hook(
        lambda *_: with_grad.append(
            [
                {name for name, p in module.named_parameters() if p.grad is not None}
                for module in (ours.student, ours.teacher, ours.original)
            ]
        )
    )
    list(itertools.islice(ours.run, 3))
    trained = attn2(ours.student)
    assert with_grad and all(names == [set(trained), set(), set()] for names in with_grad)
    assert {id(p) for p in ours.optimizer.state} == {id(p) for p in trained.values()}
    assert all(
        p.grad is None
        for module in (ours.student, ours.teacher, ours.original)
        for p in module.parameters()
    )


def test_only_the_trained_tensors_change():
    ours = Ours(CASE)
    before = [copy.deepcopy(m.state_dict()) for m in (ours.student, ours.teacher, ours.original)]
    assert len(list(ours.run)) == ITERS
    student, teacher, original = (
        m.state_dict() for m in (ours.student, ours.teacher, ours.original)
    )
    assert all(torch.equal(p, before[2][name]) for name, p in original.items())
    for name in student:
        if ".attn2." in name:  # each of the three has moved away, or stayed, on its own
            assert not torch.equal(student[name], before[0][name]) and not torch.equal(
                teacher[name], before[1][name]
            )
            assert not torch.equal(teacher[name], student[name])
        else:
            assert torch.equal(student[name], before[0][name]) and torch.equal(
                teacher[name], before[0][name]
            )


# SD 1.4's UNet has 16 transformers: 5 of width 320, 5 of 640, 6 of 1280. Each attn2 has to_q, to_k,
# to_v, to_out.0 and the bias of to_out.0.
@pytest.mark.parametrize(
    "key, tensors, parameters",
    [
        ("xattn", 80, 43_962_560),
        ("kv", 32, 2 * 768 * (5 * 320 + 5 * 640 + 6 * 1280)),
        ("full", 686, 859_520_964),
        (
            "noxattn",
            686 - 80 - 4 - 2,
            859_520_964 - 43_962_560 - 1280 * (320 + 1 + 1280 + 1) - 4 * (9 * 320 + 1),
        ),
    ],
)
def test_twin_copies_the_trained_tensors_only(key, tensors, parameters):
    with torch.device("meta"):
        unet = UNet()
    trained = {n for n, _ in unet.named_parameters() if presets.TRAIN_PARAMS[key](n)}
    assert (len(trained), sum(unet.get_parameter(n).numel() for n in trained)) == (
        tensors,
        parameters,
    )
    twin = ema.copy_trained(unet, trained)
    mine, theirs = dict(unet.named_parameters()), dict(twin.named_parameters())
    assert list(mine) == list(theirs)
    assert {n for n in mine if mine[n] is not theirs[n]} == trained
    assert {n for n in theirs if not theirs[n].requires_grad} == trained and all(
        p.requires_grad for p in mine.values()
    )


def test_twin_shares_memory():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.trained, self.norm = (
                nn.Linear(2, 2),
                nn.Linear(2, 2),
                nn.BatchNorm1d(2),
            )

    net = randomise(Net(), 3)
    twin = ema.copy_trained(net, ["trained.weight"])
    mine, theirs = net.state_dict(), twin.state_dict()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert {n for n in mine if mine[n].data_ptr() != theirs[n].data_ptr()} == {
        "trained.weight"
    }  # buffers are shared too


@pytest.mark.parametrize("m", [0.0, 0.25, 0.9, 0.999, 1.0])
def test_ema_arithmetic(m):
    a, b = ([randn(3, 4, seed=seed), randn(7, seed=seed)] for seed in (5, 6))
    old_a, old_b, places = [x.clone() for x in a], [x.clone() for x in b], [x.data_ptr() for x in a]
    ema.update(a, b, m)
    for new, x, y in zip(a, old_a, old_b):
        close(
            "the average", new, m * x + (1 - m) * y, 1e-6
        )  # a + (1 − m)(b − a): another order, two float32 roundings
        assert m != 1 or torch.equal(new, x)
        assert m != 0 or torch.equal(new, y)
    assert [x.data_ptr() for x in a] == places and all(torch.equal(x, y) for x, y in zip(b, old_b))


def test_a_cut_run_continues_as_if_uncut():
    """Bit for bit: the same operations on the same numbers, wherever they lie in memory."""
    whole = Ours(CASE)
    report = list(whole.run)
    first, n = Ours(CASE), 3
    head = list(itertools.islice(first.run, n))
    then = Ours(CASE, start=n)
    for mine, saved in ((then.student, first.student), (then.teacher, first.teacher)):
        mine.load_state_dict(saved.state_dict())
    then.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    then.generator.set_state(first.generator.get_state())
    assert head + list(then.run) == report and [it.i for it in report] == list(range(ITERS))
    for mine, other in ((then.student, whole.student), (then.teacher, whole.teacher)):
        assert all(
            torch.equal(p, q) for p, q in zip(mine.parameters(), other.parameters(), strict=True)
        )
    for p, q in zip(attn2(then.student).values(), attn2(whole.student).values()):
        assert all(
            torch.equal(v, whole.optimizer.state[q][key])
            for key, v in then.optimizer.state[p].items()
        )


def test_a_misspelled_choice_is_not_another_method():
    with pytest.raises(ValueError, match="offical.*official"):
        sdd.choose_prompts("offical", None, None)
    with pytest.raises(ValueError, match="cosin'"):
        sdd.lr_factor(800, 500, 1500, "cosin")
