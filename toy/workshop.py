"""Helper functions and checks of workshop.ipynb, so that its cells show only what is taught.

Nearly all of them use the toy model of shapes. If the environment variable WORKSHOP_SHORT is set,
every training and every sampler is cut to a few steps: the tests do this, and the results mean
nothing then.
"""

import support.openmp

import contextlib
import io
import os
import sys
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from einops import rearrange
from IPython.display import display
from tqdm import tqdm

import ema
import losses
import pipeline
import sdd
import weights
from guidance import cfg, sample
from pipeline import encode_prompts, initial_noise, make_scheduler
from presets import PRESETS, TRAIN_PARAMS
from report import previews
from support.images import grid
from toy import shapes, suite
from toy.worlds import prompts

SHORT = bool(os.environ.get("WORKSHOP_SHORT"))
TOY = PRESETS["toy"]  # the numbers of `python train.py --model toy`
GUIDANCE_SCALE = 7.5  # of finished images; z_t is sampled with TOY["guidance_scale"]
IMAGE_STEPS = 4 if SHORT else 12
plt.rcParams["figure.dpi"] = 80  # small plots keep the notebook small

# Progress bars go to stdout, because Jupyter shows stderr in red, and disappear at the end.
progress = partial(tqdm, file=sys.stdout, mininterval=0.5, leave=False)


# ----------------------------------------------------------------------------- images of the model
def load_model(name="toy"):
    """A toy model. Its folder is not printed, because it differs from laptop to laptop."""
    with contextlib.redirect_stdout(io.StringIO()):
        return weights.load(name)


def words(model):
    """All words of two letters or more that the toy model knows, sorted."""
    return sorted(pipeline.known_words(model.tokenizer) - {"a"})


def image_scheduler(model):
    """The DDIM sampler of finished images."""
    return make_scheduler(model.scheduler, IMAGE_STEPS, "ddim")


def generate(model, unet, prompts, n=12, first=0):
    """Images, uint8 (n, 64, 64, 3): n of one prompt, or one for each of n prompts.

    Image i always starts from noise first + i.
    """
    n = min(n, 2) if SHORT else n
    c_0, c_p = encode_prompts(model, "", prompts)
    how = dict(scheduler=image_scheduler(model), guidance_scale=GUIDANCE_SCALE)
    seeds = range(first, first + n)
    c_p = c_p.expand(n, -1, -1)
    return np.stack(list(pipeline.images(model, c_p, seeds, unet=unet, negative=c_0, **how)))


@torch.no_grad()
def decode(model, z):
    """Latents (B, 4, 16, 16) -> images, uint8 (B, 64, 64, 3)."""
    pixels = (model.vae.decode(z) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return (pixels * 255).round().byte().numpy()


def show(rows, labels=(), columns=()):
    """A sheet of images with labels. 128 colours keep the notebook small."""
    return grid(rows, labels, columns).quantize(128)


def heat(values):
    """Maps (B, h, w), each scaled to its own maximum, as coloured images, uint8 (B, 64, 64, 3)."""
    scaled = values / values.amax((1, 2), keepdim=True)
    colours = plt.get_cmap("viridis")(scaled.numpy())[..., :3]  # (B, h, w, 3)
    zoom = 64 // values.shape[1]
    return (255 * colours).astype("uint8").repeat(zoom, 1).repeat(zoom, 2)


def count(images, word):
    """The number of images in which the probe, a classifier of such images, sees `word`."""
    return sum(suite.shows(shapes, images, word))


def distance(a, b):
    """The Euclidean distance between two lists of tensors."""
    return sum((x - y).detach().square().sum() for x, y in zip(a, b)).sqrt().item()


def others_right(model, unet, n=24):
    """Generates n prompts without "star". Counts the images that show all that was asked for."""
    n = min(n, 2) if SHORT else n
    texts, asked = zip(*prompts(shapes, "other", ("star",), n, seed=5))
    seen = suite.see(shapes, generate(model, unet, list(texts), n, first=100))
    return suite.count(shapes, ["other"] * n, asked, seen, ())["caption"]


# -------------------------------------------------------------------------------- attention maps
def attention_maps(model, unet, prompt, seed=3):
    """An image of the prompt, and how much its positions attended to each token: (L, 8, 8).

    A hook on each cross-attention layer with 8 x 8 positions computes softmax(q kᵀ / √d) again
    from the layer's own weights. The maps are means over these layers, the steps and the heads.
    """
    maps = []

    def hook(attn2, inputs, output):
        x, context = inputs  # (B, positions, C), (B, L, D)
        if x.shape[1] != 64:
            return
        q, k = attn2.to_q(x), attn2.to_k(context)
        q, k = (rearrange(y, "b n (h d) -> b h n d", h=attn2.heads) for y in (q, k))
        attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # (B, h, positions, L)
        maps.append(attention[-1].mean(0))  # guidance puts the prompt last in the batch

    layers = [layer for name, layer in unet.named_modules() if name.endswith(".attn2")]
    hooks = [layer.register_forward_hook(hook) for layer in layers]
    [image] = generate(model, unet, prompt, 1, first=seed)
    for each in hooks:
        each.remove()
    return image, rearrange(torch.stack(maps).mean(0), "(h w) l -> l h w", h=8).detach()


def show_attention(model, unets, prompt, seed=3):
    """For each of {name: unet} a row: the image, a map for each token, the sum of all padding.

    The number above a map is its mean: this share of the attention goes to the token. The maps of
    one column share their colours.
    """
    tokens = ["start", *prompt.split(), "end"]
    rows = {}
    for name, unet in unets.items():
        image, maps = attention_maps(model, unet, prompt, seed)
        padding = maps[len(tokens) :].sum(0, keepdim=True)
        rows[name] = image, torch.cat([maps[: len(tokens)], padding])
    tokens.append("padding")
    highest = torch.stack([maps for _, maps in rows.values()]).amax((0, 2, 3))  # of each column
    size = (1.5 * len(tokens) + 1.5, 1.9 * len(rows))
    _, axes = plt.subplots(len(rows), len(tokens) + 1, figsize=size, squeeze=False)
    for row, (name, (image, maps)) in zip(axes, rows.items()):
        row[0].imshow(image)
        row[0].set_title(name)
        for ax, token, values, top in zip(row[1:], tokens, maps, highest):
            ax.imshow(values, vmin=0, vmax=top, cmap="viridis")
            ax.set_title(f"{token} ({values.mean():.2f})")
    for ax in axes.flat:
        ax.axis("off")
    plt.tight_layout()
    plt.show()


# --------------------------------------------------------------------------------------- training
def copies(model):
    """Student and teacher, and their trained tensors θ and θ*: those of cross-attention.

    All other tensors are shared with the original.
    """
    names = [name for name, _ in model.unet.named_parameters() if TRAIN_PARAMS["xattn"](name)]
    student = ema.copy_trained(model.unet, names)
    teacher = ema.copy_trained(model.unet, names)
    theta = [student.get_parameter(name).requires_grad_() for name in names]
    theta_ema = [teacher.get_parameter(name) for name in names]
    return student, teacher, theta, theta_ema


def forget(
    model,
    *concepts,
    iters=60,
    batch_size=4,
    lr=3e-3,
    preserve=0.0,
    c_a=None,
    seed=0,
    label="",
    watch=None,
    **how,
):
    """Trains with sdd.sdd and returns student and teacher. how: more of its arguments.

    watch(i, iters, student, teacher) is called after iteration i = 1, 2, …, iters.
    """
    iters = min(iters, 4) if SHORT else iters
    student, teacher, theta, theta_ema = copies(model)
    generator = torch.Generator().manual_seed(seed)
    c_0, c_s, joined = encode_prompts(model, "", list(concepts), ", ".join(concepts))
    terms = [losses.preservation_term(preserve, None, generator)] if preserve else []
    iterations = sdd.sdd(
        student,
        teacher,
        model.unet,
        torch.optim.AdamW(theta, lr, weight_decay=TOY["weight_decay"]),
        theta_ema,
        make_scheduler(model.scheduler, TOY["steps"], "ddim"),
        sdd.Prompts(c_0, c_s, joined, c_a),
        (batch_size, 4, 16, 16),
        generator,
        rates=sdd.learning_rates(iters, lr, warmup=iters // 4),
        terms=terms,
        **dict(s_g=TOY["guidance_scale"], m=TOY["ema"]) | how,
    )
    for it in progress(iterations, label or ", ".join(concepts), total=iters, unit="iteration"):
        if watch:
            watch(it.i + 1, iters, student, teacher)
    return student, teacher


@torch.no_grad()
def fixed_latents(model):
    """z_t (2, 4, 16, 16) and t: two partially denoised stars, the same for all networks."""
    scheduler = make_scheduler(model.scheduler, TOY["steps"], "ddim")
    c_0, c_s = encode_prompts(model, "", "star")
    z_T, k = initial_noise((4, 16, 16), [0, 1]), TOY["steps"] // 2
    z_t = sample(cfg(model.unet, c_0, c_s, TOY["guidance_scale"]), scheduler, z_T, k)
    return z_t, scheduler.timesteps[k]


@torch.no_grad()
def gap_and_drift(model, unet, z_t, t):
    """(gap, drift) at the same latents.

    gap: ‖ε(c_s) − ε(c_0)‖², what is left of the word "star". drift: ‖ε(c_0) − ε°(c_0)‖², how far
    the target moved away from the original's. Both are means over elements.
    """
    c_0, c_s = encode_prompts(model, "", "star")
    return previews.gap_and_drift(unet, z_t, t, c_s, c_0, model.unet(z_t, t, c_0))


class Film:
    """Watches a training: shows student and teacher while it runs, and plots curves afterwards."""

    def __init__(self, model, prompt, word):
        self.model, self.prompt, self.word = model, prompt, word
        self.frames = []  # (i, n images of the student, n images of the teacher)
        self.curve = []  # (i, (gap, drift) of the student, (gap, drift) of the teacher)
        self.latents = fixed_latents(model)
        self.display = display(display_id=True)

    def __call__(self, i, iters, student, teacher):
        if i % max(1, iters // 16) == 0:
            measured = [gap_and_drift(self.model, x, *self.latents) for x in (student, teacher)]
            self.curve.append((i, *measured))
        if i % max(1, iters // 8) == 0:
            images = [generate(self.model, unet, self.prompt, 8) for unet in (student, teacher)]
            self.frames.append((i, *images))
            self.display.update(self.sheet())

    def sheet(self):
        """The first image of each frame: the student above, the teacher below."""
        numbers, student, teacher = zip(*self.frames)
        rows = [[images[0] for images in row] for row in (student, teacher)]
        return show(rows, ["student", "teacher"], [str(i) for i in numbers])

    def plot(self):
        """Gap, drift, and the number of images that show the word, over the iterations."""
        _, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3))
        left.set_title("gap: what is left of the word")
        left.set_yscale("log")
        middle.set_title("drift: how far the target moved")
        n = len(self.frames[0][1])
        right.set_title(f'{self.word}s in {n} images of "{self.prompt}"')
        measured_at, *measured = zip(*self.curve)
        shown_at, *shown = zip(*self.frames)
        for name, values, sheets in zip(("student", "teacher"), measured, shown):
            gaps, drifts = zip(*values)
            left.plot(measured_at, gaps, label=name)
            middle.plot(measured_at, drifts, label=name)
            right.plot(shown_at, [count(sheet, self.word) for sheet in sheets], "o-", label=name)
        for ax in (left, middle, right):
            ax.set_xlabel("iteration")
            ax.legend()
        plt.tight_layout()
        plt.show()


# ----------------------------------------------------------------- checks: one sentence per answer
RIGHT = "Right!"


def sentence(name, wrong, solution):
    """RIGHT, or what is wrong. wrong(solution) calls the learner's function: a hint, or None."""
    try:
        hint = wrong(solution)
    except Exception as e:
        return f"Not yet: {name} stops with {type(e).__name__}: {e}"
    return f"Not yet: {hint}." if hint else RIGHT


def wrong_average(average):
    """What is wrong with my_average(theta_ema, theta, m), or None."""
    theta = [torch.full((2, 3), 2.0, requires_grad=True), torch.full((4,), 6.0, requires_grad=True)]
    theta_ema = [torch.full((2, 3), 10.0), torch.full((4,), 22.0)]
    # A copy of the list: new tensors in it are not the teacher's.
    average(list(theta_ema), theta, 0.75)
    if [p.mean().item() for p in theta] != [2.0, 6.0]:
        return "the student θ has changed. Only the teacher's θ* may change"
    if any(p.requires_grad for p in theta_ema):
        return (
            "θ* has become part of the gradient's computation. Write `with torch.no_grad():` "
            "around the loop"
        )
    values = tuple(p.mean().item() for p in theta_ema)
    return {
        (8.0, 18.0): None,
        (10.0, 22.0): "θ* has not changed. `average = …` only gives a new meaning to a name. "
        "Change the tensor in place, for example with average.lerp_(…) or average.copy_(…)",
        (4.0, 10.0): "m and 1 − m are exchanged, so the teacher jumps to the student",
        (2.0, 6.0): "θ* has become equal to θ. That is m = 0",
        (8.0, 22.0): "only the first tensor has changed. Do it for all of them",
    }.get(values, f"for θ* = 10, θ = 2 and m = 0.75 it gives {values[0]:g}, not 8")


def wrong_prompts(choose):
    """What is wrong with my_prompts(concepts, joined, j), or None."""
    concepts = torch.stack([torch.full((77, 64), float(number)) for number in (1, 2, 3)])
    joined = torch.full((1, 77, 64), 4.0)
    for j in (2, 1):
        hint = wrong_roles(choose(concepts, joined, j), concepts[j : j + 1], joined)
        if hint:
            return hint
    return None


def wrong_roles(result, concept, joined):
    """What is wrong with the result of my_prompts, or None."""
    if result is None:
        return "my_prompts returns nothing. End it with `return c_p, c_s`"
    if not (isinstance(result, tuple | list) and len(result) == 2):
        return "my_prompts must return two embeddings: `return c_p, c_s`"
    for name, c in zip(("c_p", "c_s"), result):
        if not isinstance(c, torch.Tensor):
            return f"{name} is not a tensor but a {type(c).__name__}"
        if c.shape != joined.shape:
            return (
                f"{name} has the shape {tuple(c.shape)}, but one prompt has the shape (1, 77, 64). "
                "A single concept is concepts[j : j + 1]"
            )
    c_p, c_s = result
    if c_p.equal(joined) and c_s.equal(concept):
        return (
            "these are the roles of the authors' script: all concepts sample z_t, one concept is "
            "unlearned. Algorithm 1 does the reverse"
        )
    if c_p.equal(concept) and c_s.equal(concept):
        return "c_s is one concept. Algorithm 1 unlearns all concepts, joined"
    if c_p.equal(joined):
        return "c_p is the joined prompt. Algorithm 1 samples z_t with one concept"
    if not c_p.equal(concept):
        return "c_p is not concept number j"
    if not c_s.equal(joined):
        return "c_s is not the joined prompt"
    return None


def wrong_loss(loss):
    """What is wrong with my_loss(e, e_original, z_t, t, c_s, c_0, c_a, **_), or None.

    It is called with two models of one weight each, and each mistake gives its own number. Right
    is (3 · 1 − 10 · 2)² = 289.
    """
    w = torch.tensor(3.0, requires_grad=True)
    w_original = torch.tensor(10.0, requires_grad=True)
    c_s, c_a, c_0, z_t = (torch.full((1, 77, 64), value) for value in (1.0, 2.0, 5.0, 0.0))
    try:
        value = loss(
            e=lambda z, t, c: w * c,
            e_original=lambda z, t, c: w_original * c,
            z_t=z_t,
            t=1,
            c_s=c_s,
            c_0=c_0,
            c_a=c_a,
            erase_scale=1.0,
            quantile=0.0,
        )
    except TypeError as e:
        if "unexpected keyword argument" in str(e):
            return "the arguments of my_loss must end with **_, for what it does not need"
        raise
    if value is None:
        return "my_loss returns nothing. End it with `return losses.mean_squared_error(…)`"
    if not isinstance(value, torch.Tensor):
        return f"my_loss returns a {type(value).__name__}. Return a tensor, without .item()"
    if value.dim() > 0:
        return (
            f"my_loss returns a tensor of shape {tuple(value.shape)}. It must return one number: "
            "use losses.mean_squared_error or .mean()"
        )
    if not value.requires_grad:
        return (
            "the loss has no gradient, so the student cannot learn from it. Only the target "
            "belongs under `with torch.no_grad():`. Compute e(z_t, t, c_s) and the loss below that "
            "block, without .detach()"
        )
    if not value.isfinite():
        return f"the loss is {value.item()}"
    number = round(value.item())
    if number == 289:
        value.backward()
        if w.grad is None or round(w.grad.item()) != -34:
            return "the value is right, but no gradient passes through the student's estimate"
        if w_original.grad is not None:
            return (
                "the value is right, but a gradient passes through the target. Compute the target "
                "under `with torch.no_grad():`"
            )
        return None
    return {
        144: "that is SDD's own loss. Its target is the student's estimate for the empty prompt",
        0: "estimate and target are the same",
        9: "the target comes from the student, e. Only the original does not move",
        2209: "the target is for the empty prompt, not for c_a",
        49: "the target is for c_s, not for c_a",
        196: "the student should be asked about c_s",
        100: "the estimate comes from the original. It should come from the student, e",
        289 * 77 * 64: "that is the sum over all elements. Use the mean",
    }.get(number, "estimate or target are not what they should be")


check_average = partial(sentence, "my_average", wrong_average)  # exercise 1
check_prompts = partial(sentence, "my_prompts", wrong_prompts)  # exercise 2
check_loss = partial(sentence, "my_loss", wrong_loss)  # exercise 3
