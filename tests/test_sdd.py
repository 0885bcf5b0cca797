"""Algorithm 1 and the other training methods, next to a plain loop on diffusers' classes.

`compare` is that loop, written out. It runs next to `sdd.sdd`, from equal weights, and asserts
after each step that the two agree: on the random draws, z_t, the loss, every gradient, the updated
weights and the average. CASES are the trainings. MISTAKES are mistakes that are easy to make in
such a loop; `plant` changes the source of our code. Each must make a comparison fail.
"""

import copy
import functools
import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from common import (
    SCHEDULES,
    TEXT,
    UNETS,
    padded_tokens,
    pair,
    plant,
    randn,
    randomise,
    relative,
    their_scheduler,
    unet_twin,
)

import ablation
import adversaries
import ema
import losses
import presets
import sdd
import weights
from clip_text import TOKEN_EMBEDDING
from scheduler import DDIM
from unet import UNet

TINY = UNETS["2 heads, plain first"]
D = TINY["cross_attention_dim"]
LATENT = (4, 8, 12)
T = 4  # DDIM steps
ITERS, WARMUP = 5, 1  # the learning rate is 0, then the case's, then less
S_G, M = 3.0, 0.9
ANCHOR = randn(1, 77, D, seed=4)
# Ablating Concepts: 7 images of 2 prompts with the anchor, and the prompts with the concept
IMAGES, ANCHORS, TARGETS = randn(7, *LATENT, seed=8), randn(2, 77, D, seed=9), randn(2, 77, D)
KEPT, FOUND = randn(3, 77, D, seed=11), randn(3, 77, D, seed=12)  # --keep; an adversary's words


class Case(NamedTuple):
    """A training. The defaults are SDD with a batch of 2 and 3 concepts."""

    B: int = 2
    K: int = 3
    loss: str = "sdd_loss"  # a function of losses.py
    latents: str = "teacher"  # who samples z_t; "anchor": noised images of the anchor
    trained: str = "xattn"  # a key of presets.TRAIN_PARAMS
    roles: str = "paper"
    erase_scale: float = 1.5
    quantile: float = 0.0
    prior: float = 0.0
    preserve: float = 0.0
    kept: torch.Tensor | None = None
    adversary: torch.Tensor | None = None
    schedule: str = "cosine"
    lr: float = 0.01  # large: weights move by far more than they round
    clip: float = 0.002  # gradients here have norms of 0.002 to 0.1
    scale: float = 1.0  # of GradScaler; 1: none


ABLATE = Case(B=3, K=2, latents="anchor", lr=0.001)
CASES = {
    "sdd": Case(),
    "one concept": Case(B=1, K=1, preserve=0.5, clip=0.0),
    "official": Case(B=1, roles="official", schedule="constant"),
    "scaled gradients": Case(clip=0.0, scale=1024.0),
    "adversary": Case(B=3, roles="each", adversary=FOUND, preserve=0.5, kept=KEPT),
    "esd-x": Case(loss="esd_loss", latents="student"),
    "esd-u": Case(B=1, loss="esd_loss", latents="original", trained="noxattn", preserve=0.5),
    "ablate": ABLATE._replace(loss="ablation_loss", trained="full", prior=0.7, preserve=0.5),
    "ablate-noise": ABLATE._replace(loss="noise_ablation_loss", trained="kv", clip=1.0),
    "all-but-one": Case(loss="all_but_one_loss", preserve=1.0),
    "quantile": Case(K=1, loss="all_but_one_loss", quantile=0.8, roles="official"),
}


@pytest.fixture(autouse=True)
def no_gradients():
    """Replaces the fixture of conftest: these tests train. One thread is faster for tiny nets."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------- what both sides start from
def trained(module, key="xattn"):
    """{name: trained tensor}, sorted: the same order for our UNet and for diffusers'."""
    parameters = sorted(module.named_parameters())
    return {name: p for name, p in parameters if presets.TRAIN_PARAMS[key](name)}


def three_models(key):
    """student, teacher, original. Only trained tensors differ, as in the middle of a run."""
    original = randomise(UNet(**TINY), 0).requires_grad_(False)
    student = ema.copy_trained(original, trained(original, key))
    teacher = ema.copy_trained(student, trained(student, key))
    for seed, module in ((100, student), (200, teacher)):
        for i, p in enumerate(trained(module, key).values()):
            p.data += 0.3 * p.std() * randn(*p.shape, seed=seed + i)
    for p in trained(student, key).values():
        p.requires_grad_()
    return student, teacher, original


def embeddings(K):
    """c_0 (1, 77, D), concepts (K, 77, D), joined (1, 77, D). One concept is its own joined."""
    concepts, joined, c_0 = randn(K + 2, 77, D, seed=3).split([K, 1, 1])
    return c_0, concepts, (concepts if K == 1 else joined)


@functools.cache
def twins():
    """Three of diffusers' UNets, made once. `compare` fills them."""
    return [unet_twin(**TINY) for _ in range(3)]


def flat(tensors):
    return torch.cat([p.detach().flatten() for p in tensors.values()])


def close(what, a, b, tolerance):
    if not torch.equal(a, b):  # two steps of 0 are equal, but have no relative error
        error = relative(a, b)
        assert error <= tolerance, f"{what} is off by {error:.1e}"


# ---------------------------------------------------------------------- sdd.sdd
class Ours:
    """`iterations` is sdd.sdd with a case. z_t and grads are those of its last iteration."""

    def __init__(self, case, start=0):
        self.case = case
        self.student, self.teacher, self.original = three_models(case.trained)
        self.theta = trained(self.student, case.trained)
        self.theta_ema = trained(self.teacher, case.trained)
        self.optimizer = torch.optim.AdamW(self.theta.values(), lr=1.0, weight_decay=0.01)
        self.optimizer.register_step_pre_hook(self.keep_gradients)
        self.generator = torch.Generator().manual_seed(7)
        c_0, concepts, joined = embeddings(case.K)
        scaler = torch.amp.GradScaler("cpu", init_scale=case.scale, enabled=case.scale != 1)
        self.iterations = sdd.sdd(
            self.student,
            {"teacher": self.teacher, "student": self.student}.get(case.latents, self.original),
            self.original,
            self.optimizer,
            list(self.theta_ema.values()),
            DDIM(T),
            sdd.Prompts(c_0, concepts, joined, ANCHOR),
            (case.B, *LATENT),
            self.generator,
            rates=sdd.learning_rates(ITERS, case.lr, WARMUP, case.schedule, start),
            loss=self.loss,
            terms=self.terms(),
            latents=self.noised_images() if case.latents == "anchor" else None,
            s_g=S_G,
            m=M,
            roles=case.roles,
            step=functools.partial(sdd.adamw_step, max_grad_norm=case.clip, scaler=scaler),
        )

    def loss(self, **batch):
        self.z_t, case = batch["z_t"], self.case
        loss = getattr(losses, case.loss)
        return loss(**batch, erase_scale=case.erase_scale, quantile=case.quantile)

    def terms(self):
        case, terms = self.case, []
        if case.adversary is not None:  # it finds the same words each time: see test_adversary.py
            terms.append(
                adversaries.Adversary.term(lambda z_t, **_: case.adversary[: len(z_t)], self.loss)
            )
        if case.preserve:
            terms.append(losses.preservation_term(case.preserve, case.kept, self.generator))
        if case.prior:
            terms.append(lambda **batch: case.prior * losses.prior_loss(**batch))
        return terms

    def noised_images(self):
        return ablation.noised_anchors(
            *(IMAGES, [0, 1], lambda which: TARGETS[which], ANCHORS),
            *(DDIM(T), self.case.B, self.generator),
        )

    def keep_gradients(self, *_):
        """At each step, because sdd clears the gradients before it yields."""
        self.grads = [p.grad.clone() for p in self.theta.values()]


# ---------------------------------------------------------------------- the plain loop
def compare(case, ours=None):
    """The training of `case` with diffusers' UNet and DDIM, next to `ours`. Returns Iterations.

    AdamW divides by the size of a gradient, and so makes roundings large. Therefore both sides take
    their step with the gradients of sdd.sdd, after they were compared.
    """
    ours = ours or Ours(case)
    student, teacher, original = twins()
    student.load_state_dict(ours.student.state_dict())
    teacher.load_state_dict(ours.teacher.state_dict())
    original.load_state_dict(ours.original.state_dict())
    theta, theta_ema = trained(student, case.trained), trained(teacher, case.trained)
    optimizer = torch.optim.AdamW(theta.values(), lr=case.lr, weight_decay=0.01)
    schedule = SCHEDULES[case.schedule](optimizer, WARMUP, ITERS)
    ddim = their_scheduler("ddim", T)
    generator = torch.Generator().manual_seed(7)
    c_0, concepts, joined = embeddings(case.K)
    c_0 = c_0.repeat(case.B, 1, 1)
    iterations = []
    for i in range(3):
        before = [flat(x) for x in (ours.theta, theta, ours.theta_ema, theta_ema)]
        it = next(ours.iterations)
        iterations.append(it)

        # z_T ~ N(0, I),  k ~ U{1..T},  c_p ~ U{concepts};  z_t ← k denoising steps with θ*
        if case.latents == "anchor":
            z_t, t, n, j, c_s, c_a = noised(case.B, ddim, generator)
            k = None
        else:
            z_t = torch.randn(case.B, *LATENT, generator=generator)
            k, t, j = draw(case, i, ddim, generator)
            concept = concepts[j : j + 1]
            c_p, c_s = {
                "paper": (concept, joined),
                "official": (joined, concept),
                "each": (concept, concept),
            }[case.roles]
            c_p, c_s, c_a = (c.repeat(case.B, 1, 1) for c in (c_p, c_s, ANCHOR))
            n = None
            sampler = {"teacher": teacher, "student": student}.get(case.latents, original)
            with torch.no_grad():
                for time in ddim.timesteps[:k]:
                    e_0 = sampler(z_t, time, c_0).sample
                    e_p = sampler(z_t, time, c_p).sample
                    z_t = ddim.step(e_0 + S_G * (e_p - e_0), time, z_t).prev_sample
        assert (it.i, it.k, it.j) == (i, k, j), "another draw"
        close("z_t", ours.z_t, z_t, 1e-5)  # 4 guided steps in another batch size

        # L = ‖ε_θ(z_t, t, c_s) − sg ε_θ(z_t, t, c_0)‖², and what other methods add to it
        def e(c, z=z_t, t=t):
            return student(z, t, c).sample

        def o(c, z=z_t, t=t):
            return original(z, t, c).sample.detach()

        L = (difference(case, e, o, c_s, c_0, c_a, n) ** 2).mean()
        if case.adversary is not None:
            L = L + (difference(case, e, o, FOUND[: case.B], c_0, c_a, n) ** 2).mean()
        if case.preserve:
            c_k = c_0 if case.kept is None else draw_kept(c_0, generator)
            L = L + case.preserve * ((e(c_k) - o(c_k)) ** 2).mean()
        if case.prior:
            L = L + case.prior * ((e(c_a) - n) ** 2).mean()
        close("loss", torch.tensor(it.loss), L.detach(), 1e-4)  # a small difference: 8e-6 measured

        # every gradient, clipped
        student.zero_grad()
        L.backward()
        # In float64: in float32 a sum of a million squares is off by 7e-5.
        norm = torch.cat([p.grad.flatten() for p in theta.values()]).double().norm()
        close("grad_norm", torch.tensor(it.grad_norm), norm, 1e-4)
        clip = min(1.0, case.clip / (norm.item() + 1e-6)) if case.clip else 1.0
        for (name, p), grad in zip(theta.items(), ours.grads, strict=True):
            close(f"gradient of {name}", grad, clip * p.grad, 1e-4)  # 2e-5 measured

        # θ ← AdamW step on L
        lr = optimizer.param_groups[0]["lr"]
        assert abs(it.lr - lr) <= 1e-15, "lr"
        for p, grad in zip(theta.values(), ours.grads):
            p.grad = grad
        optimizer.step()
        schedule.step()

        # θ* ← m θ* + (1 − m) θ
        with torch.no_grad():
            for average, p in zip(theta_ema.values(), theta.values()):
                average.copy_(M * average + (1 - M) * p)
        after = [flat(x) for x in (ours.theta, theta, ours.theta_ema, theta_ema)]
        change = [b - a for a, b in zip(before, after)]
        close("the student's step", change[0], change[1], 1e-5)  # 2e-6 measured
        close("the teacher's step", change[2], change[3], 1e-5)
    return iterations


def draw(case, i, ddim, generator):
    """k, the timestep of the loss, and the index of the concept."""
    if case.roles == "official":
        k = torch.randint(0, T, (), generator=generator).item()
        high = 1000 - 250 * k
        t = torch.randint(high - 250, high, (), generator=generator).item()
        return k, t, i % case.K
    k = torch.randint(1, T + 1, (), generator=generator).item()
    j = torch.randint(0, case.K, (), generator=generator).item()
    return k, [*ddim.timesteps.tolist(), 0][k], j


def noised(B, ddim, generator):
    """Ablating Concepts' z_t: noised images."""
    which = torch.randint(0, 7, (B,), generator=generator)
    t = torch.randint(0, 1000, (B,), generator=generator)
    n = torch.randn(B, *LATENT, generator=generator)
    prompts = [image % 2 for image in which.tolist()]
    z_t = ddim.add_noise(IMAGES[which], n, t)
    return z_t, t, n, prompts[0], TARGETS[prompts], ANCHORS[prompts]


def draw_kept(c_0, generator):
    """For each latent one of the prompts to keep, or the empty prompt with probability 1/2."""
    numbers = torch.randint(2 * len(KEPT), (len(c_0),), generator=generator)
    return torch.stack([KEPT[i] if i < len(KEPT) else c_0[0] for i in numbers.tolist()])


def difference(case, e, o, c_s, c_0, c_a, n):
    """What a method squares, as its paper writes it. e: the student; o: the original."""
    if case.loss == "sdd_loss":
        return e(c_s) - e(c_0).detach()
    if case.loss == "esd_loss":
        return e(c_s) - (o(c_0) - case.erase_scale * (o(c_s) - o(c_0)))
    if case.loss == "ablation_loss":
        return e(c_s) - e(c_a).detach()
    if case.loss == "noise_ablation_loss":
        return e(c_s) - n
    if case.quantile:
        return (e(c_s) - e(c_0)) - signal(case, o(c_s) - o(c_0))
    return (e(c_s) - e(c_0)) - (o(c_a) - o(c_0))


def signal(case, guidance):
    """All-but-One: away from the guidance, where it is strong in its sample and channel."""
    strong = torch.zeros_like(guidance)
    for b, channel in itertools.product(range(len(guidance)), range(4)):
        size = guidance[b, channel].abs()
        strong[b, channel] = (size >= np.quantile(size.numpy(), case.quantile)).float()
    return -case.erase_scale * strong * guidance


@pytest.mark.parametrize("name", CASES)
def test_iterations_against_a_plain_loop(name):
    case = CASES[name]
    iterations = compare(case)
    if case.clip == Case().clip:
        assert any(it.grad_norm > case.clip for it in iterations), "no gradient was clipped"


# ---------------------------------------------------------------------- planted mistakes
K = "k = int(torch.randint(1, T + 1, (), generator=generator))"
J = "j = int(torch.randint(K, (), generator=generator))"
NO_GRAD, WITH_GRAD = "with torch.no_grad():", "with torch.enable_grad():"
E_0, E_S = "e_0 = e_original(z_t, t, c_0)", "e_s = e_original(z_t, t, c_s)"


def lines(target, estimate):
    """The last lines of SDD's and Ablating's losses."""
    estimate = f"return mean_squared_error(e(z_t, t, {estimate}), target)"
    return f"target = e(z_t, t, {target})\n    {estimate}"


# What is wrong; the case; the comparison that must fail; and the mistake. It is our module with
# {text in its source: the mistake}, or other settings for our side of the case.
# fmt: off
MISTAKES = [
    ("the loss is one timestep too noisy, as in pseudo-code A.1", "sdd", "loss",
        sdd, {"return k, scheduler.timesteps[k], j": "return k, scheduler.timesteps[k - 1], j"}),
    ("k in 0..T-1", "sdd", "another draw", sdd, {K: K.replace("1, T + 1", "0, T")}),
    ("concept drawn before k", "sdd", "another draw", sdd, {f"{K}\n    {J}": f"{J}\n    {K}"}),
    ("guidance from e_p", "sdd", "z_t",
        sdd, {"cfg(teacher, c_0, c_p, s_g)": "cfg(teacher, c_p, c_0, -s_g)"}),
    ("c_p and c_s swapped", "sdd", "z_t",
        sdd, {"return concept, joined": "return joined, concept"}),
    ("roles of another choice", "sdd", "loss", Case, {"roles": "each"}),
    ("the student samples z_t", "sdd", "z_t", sdd, {"cfg(teacher, ": "cfg(student, "}),
    ("the original samples z_t", "sdd", "z_t", sdd, {"cfg(teacher, ": "cfg(original, "}),
    ("target from the original", "sdd", "loss",
        losses, {"target = e(z_t, t, c_0)": "target = _['e_original'](z_t, t, c_0)"}),
    ("target from c_s", "sdd", "loss", losses, {lines("c_0", "c_s"): lines("c_s", "c_s")}),
    ("target and estimate swapped", "sdd", "grad_norm",
        losses, {lines("c_0", "c_s"): lines("c_s", "c_0")}),
    ("gradient through the target", "sdd", "grad_norm",
        losses, {f"{NO_GRAD}\n        target = e(z_t, t, c_0)":
                 f"{WITH_GRAD}\n        target = e(z_t, t, c_0)"}),
    ("sum for mean", "sdd", "loss", losses, {"b.float())": "b.float(), reduction='sum')"}),
    ("preservation", "sdd", "loss", Case, {"preserve": 0.01}),
    ("lr one iteration late", "sdd", "lr", sdd, {"* lr_factor(i,": "* lr_factor(max(i - 1, 0),"}),
    ("lr one iteration early", "sdd", "lr", sdd, {"* lr_factor(i,": "* lr_factor(i + 1,"}),
    ("not clipped", "sdd", "gradient of", sdd, {"max_grad_norm or math.inf": "math.inf"}),
    ("gradients never unscaled", "scaled gradients", "grad_norm",
        sdd, {"scaler.unscale_(optimizer)": "pass"}),
    ("gradients not cleared", "sdd", "grad_norm", sdd, {"optimizer.zero_grad()": "pass"}),
    ("teacher never moves", "sdd", "the teacher's step",
        sdd, {"ema.update(theta_ema, theta, m)": "pass"}),
    ("EMA weights swapped", "sdd", "the teacher's step", ema, {"lerp_(p, 1 - m)": "lerp_(p, m)"}),

    ("the adversary's words are forgotten", "adversary", "loss", Case, {"adversary": None}),
    ("the concept for the adversary's words", "adversary", "loss",
        adversaries, {" | dict(c_s=self(**batch, i=i, j=j))": ""}),
    ("only the empty prompt is kept", "adversary", "loss", Case, {"kept": None}),
    ("other prompts are kept", "adversary", "loss", Case, {"kept": -KEPT}),

    ("ESD: scale counted from 1", "esd-x", "loss",
        losses, {"erase_scale * (e_s": "(erase_scale - 1) * (e_s"}),
    ("ESD: towards the concept", "esd-x", "loss",
        losses, {"e_0 - erase_scale": "e_0 + erase_scale"}),
    ("ESD: the student's own estimates", "esd-x", "loss",
        losses, {f"{E_0}\n        {E_S}": "e_0, e_s = e(z_t, t, c_0), e(z_t, t, c_s)"}),
    ("ESD: the teacher samples z_t", "esd-x", "z_t", Case, {"latents": "teacher"}),

    ("Ablating: prompts swapped", "ablate", "grad_norm",
        losses, {lines("c_a", "c_s"): lines("c_s", "c_a")}),
    ("Ablating: the empty prompt for the anchor", "ablate", "loss",
        losses, {lines("c_a", "c_s"): lines("_['c_0']", "c_s")}),
    ("Ablating: no prior", "ablate", "loss", Case, {"prior": 0.0}),

    ("All-but-One: no second term", "all-but-one", "loss", Case, {"preserve": 0.0}),
    ("All-but-One: SDD's first term", "all-but-one", "loss", Case, {"loss": "sdd_loss"}),
    ("All-but-One: no gradient through e(c_0)", "all-but-one", "grad_norm",
        losses, {"- e(z_t, t, c_0), target)": "- e(z_t, t, c_0).detach(), target)"}),
    ("All-but-One: another quantile", "quantile", "loss", Case, {"quantile": 0.7}),
    ("All-but-One: signal towards", "quantile", "loss",
        losses, {"-erase_scale * torch.where": "erase_scale * torch.where"}),
]
# fmt: on


@pytest.mark.parametrize("mistake", MISTAKES, ids=[name for name, *_ in MISTAKES])
def test_planted_mistakes_are_seen(mistake, monkeypatch):
    """Without the mistake, test_iterations_against_a_plain_loop has seen the same case pass."""
    _, case, comparison, where, changes = mistake
    right = wrong = CASES[case]
    if where is Case:
        wrong = right._replace(**changes)
    else:
        plant(monkeypatch, where, changes)
    with pytest.raises(AssertionError, match=f"^{comparison}"):
        compare(right, Ours(wrong))


# ---------------------------------------------------------------------- what is trained
@pytest.mark.parametrize("name", ["one concept", "esd-x", "all-but-one"])
def test_only_the_trained_tensors_get_a_gradient_and_change(name):
    ours, with_grad = Ours(CASES[name]), []
    models = (ours.student, ours.teacher, ours.original)
    before = [copy.deepcopy(module.state_dict()) for module in models]

    def note(*_):
        for module in models:
            names = {name for name, p in module.named_parameters() if p.grad is not None}
            with_grad.append(names)

    ours.optimizer.register_step_pre_hook(note)
    list(itertools.islice(ours.iterations, 2))
    assert with_grad == [set(ours.theta), set(), set()] * 2
    for module, old in zip(models, before):
        assert all(p.grad is None for p in module.parameters())
        new = module.state_dict()
        changed = {name for name in old if not torch.equal(new[name], old[name])}
        assert changed == (set() if module is ours.original else set(ours.theta))
    assert not torch.equal(flat(ours.theta), flat(ours.theta_ema))


def test_a_cut_run_continues_as_if_uncut():
    """Bit for bit: the same operations on the same numbers, wherever they lie in memory."""
    whole, first, then = Ours(Case()), Ours(Case()), Ours(Case(), start=3)
    iterations = list(whole.iterations)
    head = list(itertools.islice(first.iterations, 3))
    then.student.load_state_dict(first.student.state_dict())
    then.teacher.load_state_dict(first.teacher.state_dict())
    then.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    then.generator.set_state(first.generator.get_state())
    assert head + list(then.iterations) == iterations
    assert [it.i for it in iterations] == list(range(ITERS))
    assert torch.equal(flat(then.theta), flat(whole.theta))
    assert torch.equal(flat(then.theta_ema), flat(whole.theta_ema))


def test_start_token_detached():
    """--detach-start: no gradient through the first token. All other embeddings are 0 here."""
    unet = randomise(UNet(**TINY), 0)
    c = torch.zeros(1, 77, D)
    c[:, 0] = randn(D)
    for detach in (False, True):
        if detach:
            ablation.detach_start(unet)
        unet.zero_grad()
        unet(randn(1, 4, 8, 8), 500, c).square().sum().backward()
        for p in trained(unet, "kv").values():
            assert (p.grad.abs().max() == 0) == detach


def test_embedding_rows_get_transformers_gradient():
    """The gradient of the token embeddings, through UNet and text encoder, equals theirs."""
    ours, theirs = pair("unet", **TINY | dict(cross_attention_dim=TEXT["hidden_size"]))
    text, their_text = pair("text_encoder", **TEXT)
    tokens = padded_tokens(TEXT["vocab_size"])
    z, n = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    table = text.text_model.embeddings.token_embedding.weight.requires_grad_()
    their_table = their_text.get_input_embeddings().weight.requires_grad_()
    losses.noise_ablation_loss(ours, z, 500, text(tokens), n).backward()
    ((theirs(z, 500, their_text(tokens).last_hidden_state).sample - n) ** 2).mean().backward()
    close("gradient of the token embeddings", table.grad, their_table.grad, 1e-4)
    assert (table.grad.abs().sum(1) > 0).sum() > 20


def test_only_the_rows_of_the_concepts_words_get_a_gradient():
    """--train-params embedding. Each word of the toy models is one token."""
    tokenizer = weights.load_tokenizer(weights.TOY)
    table = torch.ones(len(tokenizer), 4, requires_grad=True)
    ablation.mask_gradient(tokenizer, {TOKEN_EMBEDDING: table}, ["red star", "moon"])
    table.sum().backward()
    rows = tokenizer.convert_tokens_to_ids(["red</w>", "star</w>", "moon</w>"])
    assert table.grad.sum(1).nonzero().flatten().tolist() == sorted(rows)
