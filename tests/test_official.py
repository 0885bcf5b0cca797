"""The methods next to what their authors' codes compute, written again from the equations.

The right-hand sides are a few lines of numpy or of plain torch. They call no function of the code
under test (but SPEED's k-means, which starts from random states in its authors' code). The closed
forms run at the sizes of Stable Diffusion 1.4: in the toy models no to_v has fewer rows than
columns.
"""

import copy
import shlex
from argparse import Namespace

import numpy as np
import pytest
import torch
from common import UNETS, pair, randn, relative, their_scheduler

import ablation
import closed_form
import losses
import presets
import sdd
import train
import weights
from adversaries import Tokens
from scheduler import DDIM
from toy.pretrain import write_tokenizer

D = 768
SIZES = {"up.attn2.to_v": 320, "mid.attn2.to_k": 1280}  # rows of W, each with 768 columns
WORDS = "a photo of grumpy cat dog red bird art".split()


def settle(words, device="--device cpu --preview-every 0"):
    """The settings of `python train.py` with these flags, for Stable Diffusion 1.4."""
    return Namespace(**presets.settle(train.parse(shlex.split(f"{words} {device}"))))


# ---------------------------------------------------------------------- closed forms
@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    write_tokenizer(folder, WORDS)
    return weights.load_tokenizer(folder)


def text_states(prompt):
    """Random states (77, D) of a prompt. The start token's are those of all prompts.

    One prompt has small states: their mean square is between SPEED's thresholds, 1e-4 and 0.1.
    """
    states = np.random.default_rng([1, *prompt.encode()]).standard_normal((77, D))
    if prompt == "red bird":
        states *= 0.03
    states[0] = np.random.default_rng(0).standard_normal(D)
    return states


def last_state(prompt):
    """Every word is one token, and the start token is at 0."""
    return text_states(prompt)[[len(prompt.split())]]


@pytest.fixture
def model(tokenizer, monkeypatch):
    def encode(model, prompts):
        states = [torch.from_numpy(text_states(prompt)) for prompt in prompts]
        return torch.stack(states) if states else torch.zeros(0, 77, D, dtype=torch.float64)

    monkeypatch.setattr(closed_form, "encode", encode)
    return Namespace(tokenizer=tokenizer)


def original_weights():
    rng = np.random.default_rng(5)
    return {name: rng.standard_normal((rows, D)) / D**0.5 for name, rows in SIZES.items()}


def edited(model, words):
    """The weights after all rounds of `python train.py` with these flags."""
    a = settle(words)
    original = {name: torch.from_numpy(W) for name, W in original_weights().items()}
    theta, theta_ema = ({name: W.clone() for name, W in original.items()} for _ in range(2))
    unet = Namespace(named_parameters=lambda: original.items())
    list(closed_form.rounds(a, theta, theta_ema, unet, closed_form.states_of(model, a)))
    return theta


def check(found, expected):
    for name, W_0 in original_weights().items():
        error = np.linalg.norm(found[name].numpy() - expected[name])
        assert error < 1e-4 * np.linalg.norm(expected[name] - W_0), name


def normal_equations(W, pairs, kept, ridge):
    """(λ W + Σ W a cᵀ + Σ s W p pᵀ) (λ I + Σ c cᵀ + Σ s p pᵀ)⁻¹"""
    left, right = ridge * W, ridge * np.eye(D)
    for weight, c, a in [(1, c, a) for c, a in pairs] + [(s, p, p) for s, p in kept]:
        left = left + weight * W @ a.T @ c
        right = right + weight * c.T @ c
    return left @ np.linalg.inv(right)


def test_mace_counts_padding_from_the_end_of_each_prompt(model):
    """start a photo of grumpy cat end (7 tokens), start a photo of dog end (6)."""
    long, short, positions = "a photo of grumpy cat", "a photo of dog", torch.arange(77)[None]
    for order in (1, -1):
        pairs = closed_form.shared_states(
            model, *([[long], [short]][::order]), positions, positions
        )
        found = list(zip(*[states.tolist() for states in pairs][::order]))
        # (6, 5) is the end of text; the padding is (7, 6) (8, 7) … (76, 75)
        assert found == [(0, 0), (1, 1), (2, 2), (3, 3)] + [(i + 1, i) for i in range(5, 76)]


def test_mace_with_prompts_of_different_lengths(model):
    found = edited(model, "--method mace --concept 'grumpy cat' --anchor dog --template 'a {} art'")
    c, a = text_states("a grumpy cat art"), text_states("a dog art")
    pairs = [(c[:2], a[:2]), (c[4:77], a[3:76])]  # start, a; art, end of text and padding
    check(found, {k: normal_equations(W, pairs, [], 1000) for k, W in original_weights().items()})


def rece(concepts, anchors, kept, rho, rounds):
    """RECE: train_uce.py, then so many rounds of train.py, which keeps "" once per concept."""
    pairs, weight = [], round(max(0.1, 1 / (1 + len(kept))), 3)
    for concept, anchor in zip(concepts, anchors):
        i, j = len(concept.split()), len(anchor.split())
        n = 77 - max(i, j)
        pairs.append((text_states(concept)[i : i + n], text_states(anchor)[j : j + n]))
    kept = [(weight, text_states(prompt)) for prompt in ["", *kept]]
    W_0 = original_weights()
    W = {name: normal_equations(W, pairs, kept, 0.5) for name, W in W_0.items()}
    for _ in range(rounds):
        B = rho * np.eye(D) + sum(V.T @ V for V in W.values())
        revive = np.linalg.inv(B) @ sum(W[name].T @ W_0[name] for name in W)
        pairs = [
            (text_states(concept) @ revive.T, text_states(anchor))
            for concept, anchor in zip(concepts, anchors)
        ]
        kept = [(0.1, text_states(""))] * len(concepts)
        W = {name: normal_equations(V, pairs, kept, 0.1) for name, V in W.items()}
    return W


def test_rece_starts_from_its_own_uce(model):
    """The states from the last word on; the empty prompt, from the start token on."""
    found = edited(model, "--method rece --concept 'grumpy cat' --iters 1")
    check(found, rece(["grumpy cat"], [""], [], 0, 0))
    assert len(closed_form.states_of(model, settle("--method rece --concept dog"))[0].concept) == 76


def test_rece_shares_its_weight_between_kept_prompts(model):
    words = "--concept 'grumpy cat' dog --anchor cat 'red bird' --keep art 'a photo' --iters 1"
    expected = rece(["grumpy cat", "dog"], ["cat", "red bird"], ["art", "a photo"], 0, 0)
    check(edited(model, f"--method rece {words}"), expected)


@pytest.mark.parametrize(
    "preset, rho, rounds",
    [("paper", 0.1, 1), ("rece-nudity", 0.1, 3), ("rece-unsafe", 0.1, 2), ("rece-hard", 1e-3, 1)],
)
def test_rece_with_its_published_numbers(model, preset, rho, rounds):
    found = edited(model, f"--method rece --concept 'grumpy cat' dog --preset {preset}")
    check(found, rece(["grumpy cat", "dog"], ["", ""], [], rho, rounds))


def test_speed_varies_along_what_w_reads_least():
    """W = [[2, 0, 0], [0, 1, 0]] reads e1 and e2, and e2 less. It does not read e3."""
    W = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).double()
    varied = closed_form.vary(torch.zeros(1, 3).double(), W, 2, torch.Generator().manual_seed(4))
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert torch.allclose(varied[:, 1], noise[:, 1])
    assert varied[:, [0, 2]].abs().max() < 1e-12


def speed(pairs, kept, beta, gamma, threshold, filtered):
    """SPEED: pairs of states (c, a) of each prompt; kept: states (m, D)."""
    T = sum(c.T @ c for c, _ in pairs) / len(pairs)
    A = sum(a.T @ c for c, a in pairs) / len(pairs)
    empty, identity = text_states(""), np.eye(D)
    centres = closed_form.cluster_centres(torch.from_numpy(empty[1:]), 3).numpy()
    K = np.concatenate([empty[:1], centres]).T
    generator, result = torch.Generator().manual_seed(0), {}
    for name, W in original_weights().items():
        first = W @ (A - T) @ np.linalg.inv(identity + T)
        change = np.linalg.norm(kept @ first.T, axis=1)
        r = kept[change > change.mean()] if filtered else kept
        # The eigenvector of W Wᵀ with the smallest value above 0 gives the last direction W reads.
        values, vectors = np.linalg.eigh(W @ W.T)
        read = vectors[:, values > 1e-9][:, 0] @ W
        read /= np.linalg.norm(read)
        noise = torch.randn(10 * len(r), D, generator=generator, dtype=torch.float64).numpy()
        variants = np.concatenate([r] * 10) + noise @ np.outer(read, read)
        change = np.linalg.norm(variants @ first.T, axis=1)
        r = np.concatenate([r, variants[change > change.mean()]])
        U, S, _ = np.linalg.svd(r.T @ r / len(r))
        P = U[:, S < threshold] @ U[:, S < threshold].T
        M = np.linalg.inv(T @ P + beta * identity)
        inner = np.linalg.inv(K.T @ P @ M @ K + gamma * np.eye(4))
        step = W @ (A - T) @ P @ (identity - M @ K @ inner @ K.T @ P) @ M
        result[name] = W + step
    return result


LAST, KEPT = (last_state("grumpy cat"), last_state("art")), ["bird", "a photo", "red bird"]
ALL = (text_states("grumpy cat")[1:], text_states("")[1:])  # without --keep: the 76 of ""


# fmt: off
@pytest.mark.parametrize("preset, pair, kept, numbers", [
    ("paper",             LAST, KEPT, (1.0, 0.0, 0.1, True)),
    ("speed-nudity",      ALL,  [],   (0.7, 0.5, 0.1, True)),
    ("speed-celebrities", LAST, KEPT, (0.05, 0.0, 1e-4, False)),
])
# fmt: on
def test_speed_with_its_published_numbers(model, preset, pair, kept, numbers):
    words = "--anchor art --keep bird 'a photo' 'red bird'" if kept else ""
    found = edited(model, f"--method speed --preset {preset} --concept 'grumpy cat' {words}")
    kept = np.concatenate([last_state(prompt) for prompt in kept] or [ALL[1]])
    check(found, speed([pair], kept, *numbers))


# ---------------------------------------------------------------------- Ablating Concepts
class DetachStart:
    """Attention for diffusers: the start token's key and value are constants."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        states, B = hidden_states, len(hidden_states)
        context = states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(states), attn.to_k(context), attn.to_v(context)
        if encoder_hidden_states is not None:
            k, v = (torch.cat([x[:, :1].detach(), x[:, 1:]], dim=1) for x in (k, v))
        q, k, v = (x.view(B, x.shape[1], attn.heads, -1).transpose(1, 2) for x in (q, k, v))
        weight = (q @ k.transpose(2, 3) * attn.scale).softmax(-1)
        out = (weight @ v).transpose(1, 2).reshape(states.shape)
        return attn.to_out[0](out)


TINY = UNETS["2 heads, plain first"]
IMAGES = randn(5, 4, 8, 8).double()
C_0, C_A, C_S = randn(3, 1, 77, TINY["cross_attention_dim"], seed=1).double().unbind()


def kv(unet):
    parameters = sorted(unet.named_parameters())
    return {name: p for name, p in parameters if presets.TRAIN_PARAMS["kv"](name)}


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("method", ["ablate", "ablate-noise"])
def test_ablating_is_the_authors_script(method, weight, tmp_path, monkeypatch):
    """One iteration with the preset paper, next to the script's loss, clipping and AdamW."""
    words = f"--method {method} --concept 'grumpy cat' --anchor cat --prior {weight / 4}"
    a = settle(words)
    unet, twin = pair("unet", **TINY)
    unet.conv_out.weight.data *= 10  # so that the gradients are clipped
    twin = copy.deepcopy(twin)  # it shared its tensors with `unet`
    for module in (unet, twin):
        module.double().requires_grad_(False)
        for p in kv(module).values():
            p.requires_grad_()
    twin.set_attn_processor(DetachStart())
    monkeypatch.setattr(ablation, "saved_latents", lambda *_, **__: IMAGES)
    encoded = Namespace(c_0=C_0, anchors=C_A, targets=C_S)
    generator, scheduler = torch.Generator().manual_seed(2), DDIM(4)
    student = Namespace(unet=unet, zeros=False)
    terms = [lambda **batch: a.prior * losses.prior_loss(**batch)] if a.prior else []
    optimizer, before, gradients = train.make_optimizer(kv(unet), a), {}, {}

    def note(*_):
        for name, p in kv(unet).items():
            before[name], gradients[name] = p.detach().clone(), p.grad.clone()

    optimizer.register_step_pre_hook(note)
    with torch.enable_grad():
        loop = sdd.sdd(
            *(unet, None, unet, optimizer, [p.clone() for p in kv(unet).values()], scheduler),
            *(sdd.Prompts(C_0, C_S, C_S, C_A), (a.batch_size, 4, 8, 8), generator),
            rates=sdd.learning_rates(a.iters, a.lr, a.warmup, a.lr_schedule),
            loss=presets.METHODS[method].loss,
            terms=terms,
            latents=ablation.noised_images(
                tmp_path, a, student, student, encoded, scheduler, generator, torch.float32
            ),
            step=lambda *args: sdd.adamw_step(*args, max_grad_norm=a.max_grad_norm),
        )
        next(loop)

        # the script: B images, their timesteps and noise
        again = torch.Generator().manual_seed(2)
        which, t = (torch.randint(n, (4,), generator=again) for n in (5, 1000))
        n = torch.randn(4, 4, 8, 8, generator=again)
        z_t = their_scheduler("ddim", 4).add_noise(IMAGES[which], n, t)
        e_s, e_a = (twin(z_t, t, c.expand(4, -1, -1)).sample for c in (C_S, C_A))
        target = e_a.detach() if method == "ablate" else n
        mask = torch.ones(4, 1, 8, 8)
        loss = (((e_s - target).square() * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))).mean()
        (loss + weight * (e_a - n).square().mean()).backward()
        theirs = kv(twin)
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        assert norm > 2
    # AdamW divides by the size of a gradient, so both take their step with the same one. Its eps is
    # 1e-8 in both codes. For our gradient it is 4 times as large: an error of 3e-4 in this step.
    for name, p in theirs.items():
        assert relative(4 * gradients[name], p.grad) < 1e-4, name
        p.grad = 4 * gradients[name]
    rate = 2e-6 * 4 * (2 if weight else 1)
    torch.optim.AdamW(theirs.values(), lr=rate, weight_decay=1e-2, eps=4e-8).step()
    for name, p in kv(unet).items():
        assert relative(p - before[name], theirs[name] - before[name]) < 1e-4, name


def test_numbers_of_presets():
    words = "--method ablate --concept 'grumpy cat' --anchor cat"
    assert settle(words).detach_start
    assert not settle(f"{words} --no-detach-start").detach_start
    assert not settle("--model toy --method ablate --concept star --anchor circle").detach_start
    esd = settle("--method esd-u --concept nudity --preset esd-2025")
    assert (esd.latents, esd.lr, esd.iters, esd.max_grad_norm) == ("original", 5e-5, 200, 0)


# ---------------------------------------------------------------------- searched words
def on_simplex(x):
    """A row minus the number for which what is above 0 sums to 1, found by bisection."""
    low = x.min() - 1
    for width in 2.0 ** -np.arange(60) * (x.max() - low):
        low += width * ((x - low - width).clip(0).sum() > 1)
    return (x - low).clip(0)


@pytest.mark.parametrize("decay", [0.1, 1e-3])
def test_searched_words_have_their_weight_decay_in_the_gradient(decay):
    """UnlearnDiffAtk: Adam, whose gradient is clipped to −1 .. 1 and then gets decay · x."""
    settings = dict(words=2, prompt="star", lr=0.01, weight_decay=decay)
    tokens = Tokens(weights.load("toy"), settings, "cpu")
    V = tokens.simplex.shape[1]
    x, m, v, rng = np.full((2, V), 1 / V), 0, 0, np.random.default_rng(0)
    for i in range(1, 21):
        gradient = 10 ** rng.uniform(-4, 1, (2, V)) * rng.choice([-1, 1], (2, V))
        tokens.one_hot = Namespace(grad=torch.from_numpy(gradient).float())
        tokens.step()
        g = gradient.clip(-1, 1) + decay * x
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = 0.01 * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.999**i)) + 1e-8)
        x = np.stack([on_simplex(row) for row in x - step])
    assert relative(tokens.simplex, torch.from_numpy(x)) < 1e-4
