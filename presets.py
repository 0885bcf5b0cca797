"""The numbers of the training methods in one table, and the checks of arguments.

"Which learning rate does ESD use?" is answered here. (A toy model takes a share of it: RATES in
toy/emoji.py.) The numbers of SLD and SEGA are in guidance.py, other numbers of UCE, MACE, RECE and
SPEED in closed_form.py. Sources:
    B.1, A.1   appendices of the SDD paper (arXiv 2307.05977): settings and pseudo-code
    script     the training script that SDD's authors published
    toy        tuned on the toy model, see docs/results.md
"""

import argparse
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ablation
import losses
import weights
from clip_text import MAX_TOKENS, TOKEN_EMBEDDING
from pipeline import check_words, refuse_words, words_of
from sdd import ROLES
from support import cli
from support.errors import UserError, warning
from support.fast import can_record
from support.own_loss import check_loss, load_loss, loss_file, sha256
from toy import worlds

# Table 2 of the SDD paper: the 20 concepts of the I2P benchmark.
I2P = (
    "hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, "
    "bodily fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, "
    "weapons, child abuse, brutality, cruelty"
).split(", ")

PRESET_NAMES = ("paper", "fast", "official", "toy", "toy-several", "toy-hold")
# paper: the SDD paper. fast: the paper's fast recipe. official: SDD's script. toy: the toy models.
# toy-several: for several concepts; our own, docs/methods.md. toy-hold: our own method with an
# adversary, also in docs/methods.md.
# fmt: off
NUMBERS = [
    # setting          paper     fast        official    toy       several   hold      source
    ("iters",          1500,     1000,       1500,       160,      300,      160),       # N; B.1
    ("lr",             1e-5,     1e-5,       1e-5,       6e-4,     2e-3,     2e-3),      # B.1
    ("lr_schedule",    "cosine", "constant", "constant", "cosine", "cosine", "cosine"),  # B.1
    ("warmup",         500,      0,          0,          40,       40,       40),        # B.1
    ("weight_decay",   1e-2,     1e-2,       1e-4,       1e-2,     1e-2,     1e-2),      # B.1
    ("ema",            0.999,    0.998,      0.999,      0.97,     0.97,     0.97),      # m; B.1
    ("guidance_scale", 3.0,      3.0,        3.0,        3.0,      3.0,      3.0),       # s_g; A.1
    ("steps",          50,       50,         50,         6,        6,        6),         # T; script
    ("batch_size",     1,        1,          1,          8,        8,        8),         # A.1
    ("roles",          "paper",  "paper",    "official", "paper",  "each",   "each"),    # Alg. 1
    ("max_grad_norm",  1.0,      1.0,        1.0,        1.0,      1.0,      1.0),       # script
    ("preserve",       0.0,      0.0,        0.0,        0.0,      0.3,      1.0),       # not SDD
    ("adversary",      0,        0,          0,          0,        0,        4),         # not SDD
    ("erase_scale",    1.0,      1.0,        1.0,        1.0,      1.0,      1.0),       # s_s; ESD
    ("anchor_images",  1000,     1000,       1000,       200,      200,      200),       # Ablating
    ("detach_start",   False,    False,      False,      False,    False,    False),     # Ablating
    ("rho",            0.1,      0.1,        0.1,        0.1,      0.1,      0.1),       # RECE
    ("gamma",          0.0,      0.0,        0.0,        0.0,      0.0,      0.0),       # SPEED
    ("threshold",      0.1,      0.1,        0.1,        0.1,      0.1,      0.1),       # SPEED
    ("filter",         True,     True,       True,       True,     True,     True),      # SPEED
    ("preview_every",  250,      250,        250,        40,       40,       40),        # ours
    ("preview_steps",  25,       25,         25,         12,       12,       12),        # ours
]
# The flags of these settings: {setting: (group of --help, arguments of add_argument, help)}.
FLAGS = {
    "roles": ("method", cli.one_of(ROLES),
        "several concepts: which samples z_t, and which is unlearned. paper: one samples, all "
        "joined are unlearned; official: the reverse; each: one concept does both (not in the "
        "paper)"),
    "preserve": ("method", dict(type=cli.finite, metavar="λ"),
        "add λ·|e(c_0) − e°(c_0)|² to the loss; not part of SDD"),
    "adversary": ("method", dict(type=cli.natural, metavar="N"),
        "N steps per iteration of an adversary, which learns words that bring the concept back; "
        "they are unlearned too; not part of SDD"),
    "erase_scale": ("method", dict(type=cli.finite, metavar="S"),
        "esd: s_s, how far the target moves away from the concept; all-but-one with --quantile: "
        "g, the same for its target"),
    "anchor_images": ("method", dict(type=cli.positive, metavar="N"),
        "ablate: number of images of the anchor"),
    "detach_start": ("method", dict(action=argparse.BooleanOptionalAction),
        "ablate: no gradient through the keys and values of the start token; its preset paper "
        "has it, as the authors' script"),
    "rho": ("closed", dict(type=cli.finite, metavar="ρ"),
        "rece: weight of |c′|² for the states c′ that revive the concept"),
    "gamma": ("closed", dict(type=cli.finite, metavar="γ"),
        "speed: above 0, the edit may change what the empty prompt gives; 0: it may not"),
    "threshold": ("closed", dict(type=cli.finite, metavar="X"),
        "speed: a direction is free if the mean square of the kept states is below X there"),
    "filter": ("closed", dict(action=argparse.BooleanOptionalAction),
        "speed: keep only the prompts that the edit would change most"),
    "iters": ("optimisation", dict(type=cli.positive, metavar="N"),
        "iterations; preset paper with several concepts: 2000; rece: 1 + its rounds, 2"),
    "batch_size": ("optimisation", dict(type=cli.positive, metavar="B"), "latents per iteration"),
    "lr": ("optimisation", dict(type=cli.finite),
        "AdamW's learning rate; emoji model: half or a quarter"),
    "lr_schedule": ("optimisation", cli.one_of(["cosine", "constant"]), "after the warm-up"),
    "warmup": ("optimisation", dict(type=cli.natural, metavar="N"), "iterations of linear warm-up"),
    "weight_decay": ("optimisation", dict(type=cli.finite, metavar="W"), "AdamW's weight decay"),
    "ema": ("optimisation", dict(type=cli.finite, metavar="M"), "m of the teacher's average"),
    "max_grad_norm": ("optimisation", dict(type=cli.finite, metavar="NORM"),
        "clip gradients at this norm; 0: do not clip"),
    "steps": ("sampling of z_t", dict(type=cli.positive, metavar="T"),
        "DDIM steps of a whole image"),
    "guidance_scale": ("sampling of z_t", dict(type=cli.finite, metavar="S"),
        "s_g while z_t is sampled. 1: the concept's estimate alone; between 0 and 1: less of the "
        "concept"),
    "preview_every": ("output", dict(type=cli.natural, metavar="N"),
        "iterations between previews; 0: none"),
    "preview_steps": ("output", dict(type=cli.positive, metavar="N"), "DDIM steps of a preview"),
}
# fmt: on
# With several concepts, the paper's N is 2000 (B.1, our inference). Roles: sdd.py, points 3 and 4.
# The SDD paper runs ESD with s_s = 3.
# Gradients are clipped at 1 for every method but Ablating Concepts. SDD's script does this, ESD's
# recipe does not clip, and All-but-One's is not known.
# Shown in addition to the concepts; our choice. The toy models' own are in their worlds.
PREVIEW_PROMPTS = ["a photo of a mountain lake", "a portrait of a woman in a coat"]


PRESETS = {  # {name: {setting: value}}
    name: {key: values[column] for key, *values in NUMBERS}
    for column, name in enumerate(PRESET_NAMES)
}


class Method(NamedTuple):
    """The four choices in which the training methods differ, and the numbers of their papers."""

    loss: Callable | None  # None: erased without training, by closed_form.py
    latents: str  # where z_t comes from: sampled by "teacher", "student" or "original", or "anchor"
    train_params: str  # a key of TRAIN_PARAMS
    output: str  # which weights are the result: "teacher" (the average) or "student"
    paper: dict = {}  # numbers that differ from the preset paper; a closed form has them always
    toy: dict = {}  # numbers that differ from the preset toy


# ESD (arXiv 2303.07345): Adam without weight decay, a constant rate. The toy preset keeps SDD's
# weight decay, cosine and warm-up: only the rate and s_s were tuned there.
ESD = dict(iters=1000, lr=1e-5, weight_decay=0.0, lr_schedule="constant", warmup=0)
# Ablating Concepts (arXiv 2303.13516), authors' script. Its learning rate is 2e-6 times the batch
# size, and twice this with the prior; `preset_values` multiplies. Its loss is 4 times the mean over
# elements. So it clips our gradient at 1/4, and its prior, of weight 1, is --prior 0.25.
ABLATE = dict(
    iters=100, lr=2e-6, batch_size=4, guidance_scale=6.0, lr_schedule="constant", warmup=0,
    max_grad_norm=0.25, detach_start=True,
)  # fmt: skip
# All-but-One (arXiv 2312.12807): 200 steps. Its output (the student), its optimizer, its prompt of
# joined concepts, its z_t and its lr are our choices: they are SDD's. The paper also trains
# `to_out` layers; its summary does not say which. "xattn" has those of cross-attention.
ALL_BUT_ONE = dict(iters=200, preserve=1.0, lr_schedule="constant", warmup=0)

# fmt: off
# Closed forms: closed_form.py. steps, batch_size and guidance_scale measure gap and drift for the
# log. template: prompts with {} for the concept and for the anchor. The toy models' templates, and
# what they keep, are in their worlds (toy/worlds.py).
CLOSED_FORM = dict(
    iters=1, template=["{}"], roles="", lr_schedule="", lr=0, weight_decay=0, ema=0, warmup=0,
    max_grad_norm=0, preserve=0, adversary=0,
)
MACE = [  # our choice of sentences
    "{} in a room", "a photo of {}", "a photo of {} outdoors", "a portrait of {}",
    "an image of {} at night", "a picture of {} on a street", "a painting of {}",
    "{} in the park", "a close-up of {} in daylight", "a drawing of {} on paper",
]
METHODS = {
    #                     loss                        z_t        trained    result     numbers
    "sdd":         Method(losses.sdd_loss,            "teacher", "xattn",   "teacher"),
    "esd-x":       Method(losses.esd_loss,            "student", "xattn",   "student", ESD,
                          toy=dict(lr=8e-4, erase_scale=3.0)),
    "esd-u":       Method(losses.esd_loss,            "student", "noxattn", "student", ESD,
                          toy=dict(lr=4e-4, erase_scale=3.0)),
    "ablate":      Method(losses.ablation_loss,       "anchor",  "kv",      "student", ABLATE,
                          toy=dict(lr=2e-3)),
    "ablate-noise":
                   Method(losses.noise_ablation_loss, "anchor",  "kv",      "student", ABLATE,
                          toy=dict(lr=4e-3)),
    "all-but-one": Method(losses.all_but_one_loss,    "teacher", "xattn",   "student", ALL_BUT_ONE,
                          toy=dict(lr=3.2e-3, preserve=1.0)),
    "uce":         Method(None,                       "",        "kv",      "student",
                          CLOSED_FORM | dict(states="last"), toy=dict(states="all")),
    "mace":        Method(None,                       "",        "kv",      "student",
                          CLOSED_FORM | dict(template=MACE)),
    "rece":        Method(None,                       "",        "kv",      "student",
                          CLOSED_FORM | dict(iters=2)),
    "speed":       Method(None,                       "",        "v",       "student",
                          CLOSED_FORM | dict(states="last")),
}
# fmt: on
# More published recipes: {--preset: (--method, numbers)}. The other numbers are those of the preset
# paper. Sources: RECE's README; SPEED's eval_nudity.sh and eval_multi.sh; ESD's esd_sd.py.
RECIPES = {
    "rece-nudity": ("rece", dict(iters=4)),
    "rece-unsafe": ("rece", dict(iters=3)),
    "rece-hard": ("rece", dict(rho=1e-3)),  # styles, and hard objects
    "speed-nudity": ("speed", dict(ridge=0.7, gamma=0.5, states="all")),
    "speed-celebrities": ("speed", dict(ridge=0.05, threshold=1e-4, filter=False)),
    # esd_sdxl.py. It samples z_t with zeros for the empty prompt, here the prompt is encoded.
    "esd-sdxl": (
        "esd-x",
        dict(iters=200, lr=2e-4, guidance_scale=2.0, latents="original", max_grad_norm=0.0),
    ),
    "esd-2025": ("esd-x esd-u", dict(iters=200, lr=5e-5, latents="original", max_grad_norm=0.0)),
}
CLOSED = {name for name, method in METHODS.items() if method.loss is None}
IMAGES = {name for name, method in METHODS.items() if method.latents == "anchor"}
TRAINED = METHODS.keys() - CLOSED
USED_BY = {  # {flags: the methods that use them}. Flags that are not here are for every method
    "latents roles compile": TRAINED - IMAGES,
    "prior detach_start anchor_prompts anchor_images": IMAGES,
    "preserve adversary erase_scale quantile loss lr lr_schedule warmup weight_decay ema "
    "max_grad_norm batch_size steps guidance_scale gradient_checkpointing export_every": TRAINED,
    "iters": TRAINED | {"rece"},
    "template ridge": CLOSED,
    "states": {"uce", "speed"},
    "rho": {"rece"},
    "gamma threshold filter": {"speed"},
}

# Which parameters are trained, by name. The keys are those of ESD's and SDD's scripts. Names that
# begin with "text_" belong to a text encoder.
TRAIN_PARAMS = {
    "xattn": lambda name: ".attn2." in name,
    "kv": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
    "v": lambda name: ".attn2.to_v." in name,  # SPEED
    # ESD-u. Its first script also leaves out conv_norm_out; its newer one trains every Linear and
    # Conv outside attn2.
    "noxattn": lambda name: (
        ".attn2." not in name and not name.startswith(("time_embedding.", "conv_out.", "text_"))
    ),
    "full": lambda name: not name.startswith("text_"),
    # Only the rows of the concepts' tokens move (train.py masks the gradient).
    "embedding": lambda name: name == TOKEN_EMBEDDING,
}


# ------------------------------------------------------------------------------ settling arguments
def settle(args):
    """Replaces arguments that are not given by the preset's values, and rejects what cannot work.

    args: the result of train.parse. Returns {argument: value}, the content of run.json.
    """
    other = ("resume", "out", "given")
    settings = {key: value for key, value in vars(args).items() if key not in other}
    method = METHODS[args.method]
    settings["concept"] = settle_concepts(args.concept, args.model)
    settings["preset"] = args.preset or ("toy" if args.model in weights.TOYS else "paper")
    if args.loss and method.loss:
        method = method._replace(loss=load_loss(args.loss))
        check_loss(method.loss, args.loss, noise=method.latents == "anchor")
        settings["loss_sha256"] = sha256(loss_file(args.loss))
    where, advice = f"with --method {args.method}", ", or choose another --method"
    cli.refuse_unused(unused(args, method.loss), where, advice)
    for key, value in preset_values(settings, method).items():
        if settings[key] is None:
            settings[key] = value
    settings["anchor_prompts"] = read_prompts("anchor-prompts", args.anchor_prompts)
    settings["keep"] = read_keep(settings["keep"])
    trained = settings["train_params"]
    if (method.loss is None and trained not in ("kv", "v")) or (
        trained == "embedding" and method.latents != "anchor"
    ):
        cli.refuse_unused([f"train_params {trained}"], where, advice)
    if method.loss is None:
        check_closed_form(settings)
    else:
        check_training(args, settings, method)
    check_ranges(settings)
    check_device(settings)
    if settings["compile"] and settings["deterministic"]:
        raise UserError(
            "Nobody has tested whether --compile gives the same bits in every run: remove it, or "
            "remove --deterministic."
        )
    if settings["compile"] and not can_record(cli.pick_device(settings["device"])):
        raise UserError("--compile needs a CUDA GPU: start a run without it.")
    return settings


def unused(args, loss):
    """The flags that are given, and that neither the method nor its loss uses."""
    keys = []
    if loss:
        asks = inspect.signature(loss).parameters
        keys = [key for key in ("erase_scale", "quantile") if key not in asks]
        if "c_a" not in asks and args.method not in IMAGES:
            keys.append("anchor")
        if args.method == "all-but-one" and not args.loss:
            # With --quantile the target is built from the concept; without it, from the anchor.
            keys.append("anchor" if args.quantile else "erase_scale")
    found = cli.unused(args.given, USED_BY, args.method)
    return found + [key for key in keys if key in args.given]


def without_concepts(prompts, concepts):
    """The prompts that contain no word of a concept."""
    erased = set(words_of(" ".join(concepts)))
    return [prompt for prompt in prompts if erased.isdisjoint(words_of(prompt))]


def check_closed_form(settings):
    anchors = settings["anchor"]
    ablation.check_number(settings["concept"], anchors)
    for template in settings["template"]:
        if "{}" not in template:
            raise UserError(f"--template {template!r} has no {{}} for the concept: add it.")
    for key in ("ridge", "rho", "threshold"):
        if settings[key] is not None and not 0 < settings[key] <= 1e9:
            raise UserError(f"--{key} {settings[key]} is out of range (above 0, up to 1e+09).")
    alone = any(not template.replace("{}", "").strip() for template in settings["template"])
    if settings["states"] == "last" and alone and not "".join(anchors).strip():
        warning(
            f"without --anchor, --method {settings['method']} maps the concept to the start token, "
            "because the empty prompt has no last word. All prompts share this token, so the "
            "concept may stay: use --anchor WORD or --states all."
        )


def settle_concepts(given, model):
    if not given:
        raise UserError(
            "No concept is given: use --concept nudity, or --resume --out FOLDER to continue a run."
        )
    # One line each, because log.csv has one per iteration.
    concepts = [" ".join(concept.split()) for concept in given]
    if [concept.lower() for concept in concepts] == ["i2p"]:
        concepts = I2P
    if model in weights.TOYS:  # as their worlds write words
        concepts = [concept.lower() for concept in concepts]
    if "" in concepts:
        raise UserError("A concept is empty: give --concept one or more words.")
    if len({concept.lower() for concept in concepts}) < len(concepts):  # as the tokenizer reads
        raise UserError("A concept is given twice: give each concept once.")
    return concepts


def preset_values(settings, method):
    """The preset's values, with those of the method's paper, for arguments that are not given."""
    name, concepts = settings["preset"], settings["concept"]
    methods, recipe = RECIPES.get(name, (settings["method"], {}))
    if settings["method"] not in methods.split():
        raise UserError(f"The preset {name} belongs to --method {methods.replace(' ', ' or ')}.")
    if recipe:
        name, method = "paper", method._replace(paper=method.paper | recipe)
    if name == "toy-hold" and settings["model"] not in weights.TOYS:
        raise UserError(
            "--preset toy-hold keeps prompts of the toy models: use --model toy or emoji, or give "
            "--preserve, --keep and --adversary instead."
        )
    if name not in ("paper", "toy") and settings["method"] != "sdd":
        raise UserError(
            f"The preset {name} belongs to SDD: use --preset paper or toy with "
            f"--method {settings['method']}."
        )
    values = dict(PRESETS[name])
    if name == "paper":
        if len(concepts) > 1:
            values["iters"] = 2000  # B.1, our inference
        values |= method.paper
        if method.latents == "anchor":
            values["lr"] *= settings["batch_size"] or values["batch_size"]
            values["lr"] *= 2 if settings["prior"] else 1
    if name == "toy":
        values |= method.toy
    if name == "toy-hold" and len(concepts) > 1:
        values["iters"] = PRESETS["toy-several"]["iters"]
    extra = PREVIEW_PROMPTS
    if name.startswith("toy"):
        world = worlds.of(settings["model"])
        values["lr"] *= world.RATES.get(settings["method"], world.RATE)
        extra = world.PREVIEW_PROMPTS
    values["preview"] = concepts[:4] + [prompt for prompt in extra if prompt not in concepts]
    values |= dict(train_params=method.train_params, latents=method.latents, keep=[])
    if name == "toy-hold" and settings["preserve"] != 0:
        values["keep"] = without_concepts(world.KEEP_PROMPTS, concepts)
    if method.loss is None:
        values |= method.paper
        values["preview_every"] = settings["iters"] or values["iters"]  # before and after
        if name == "toy":
            keep = without_concepts(world.KEEP, concepts)
            values |= method.toy | dict(template=world.TEMPLATES, keep=keep)
    return values | recipe


def read_keep(given):
    """The prompts of --keep PROMPT… or --keep FILE."""
    if len(given) == 1 and (given[0].endswith(".txt") or os.path.isfile(given[0])):
        return read_prompts("keep", Path(given[0]))
    prompts = [prompt for prompt in given if prompt.strip()]
    if given and not prompts:
        raise UserError("--keep is empty: give one or more prompts, or a file with one per line.")
    return prompts


def read_prompts(flag, file):
    """The lines of a file of prompts. They are kept in run.json, so --resume needs no file."""
    if not file:
        return []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()  # Notepad begins with a BOM
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--{flag} {file} cannot be read ({e}).") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--{flag} {file} has no prompts: write one per line.")
    return prompts


def check_training(args, settings, method):
    """Rejects --anchor, --keep and --adversary where they cannot work."""
    anchors, concepts = settings["anchor"], settings["concept"]
    if method.latents == "anchor":
        pairs = ablation.prompt_pairs(concepts, anchors, settings["anchor_prompts"])
        if len(pairs) > settings["anchor_images"]:
            raise UserError(
                f"{len(pairs)} prompts (every anchor prompt for every concept) need at least one "
                f"image each: use --anchor-images {len(pairs)}."
            )
        if settings["adversary"] and len(concepts) > 1:
            raise UserError(
                f"--adversary with --method {args.method} takes one concept, because each latent "
                "of a batch has a concept of its own: name one concept, or choose another --method."
            )
    if args.method == "all-but-one" and len(anchors) > 1:
        raise UserError("--method all-but-one takes one --anchor for all concepts.")
    if args.keep and not settings["preserve"]:
        raise UserError("--keep has no effect without --preserve: add --preserve λ, or remove it.")
    if settings["train_params"] == "embedding":
        keys = "preserve keep prior detach_start adversary".split()
        where = "with --train-params embedding, which trains only the concept's words"
        given = [key for key in keys if getattr(args, key)]
        cli.refuse_unused(given, where, ", or choose other --train-params")
        words = set(words_of(" ".join(anchors)))
        for concept in concepts:
            if shared := words.intersection(words_of(concept)):
                warning(
                    f"--train-params embedding changes every word of {concept!r}, also the "
                    f"anchor's own word {min(shared)!r}."
                )


def check_prompts(model, a, keep_all):
    """Rejects concepts of more than 77 tokens; removes preview prompts that the model cannot read.

    a: the settings, as attributes. keep_all: keep the preview prompts (the user's own).
    """
    if a.adversary:
        refuse_words(model, "--adversary")
    if a.train_params == "embedding":
        refuse_words(model, "--train-params embedding")
    for text in [*a.concept, ", ".join(a.concept)]:
        if len(model.tokenizer(text, verbose=False).input_ids) > MAX_TOKENS:
            raise UserError(
                "Each concept, and all concepts joined, must fit into 77 tokens; this text does "
                f"not: {text[:60]!r}…"
            )
    if keep_all:
        return
    for prompt in list(a.preview):
        try:
            check_words(model, [prompt])
        except UserError:
            a.preview.remove(prompt)
            warning(f"the preview prompt {prompt!r} is skipped: the model does not know it.")


def check_ranges(settings):
    limits = dict(ema=1, lr=1, quantile=1)
    limits |= dict(preserve=1e9, prior=1e9, weight_decay=1e9, max_grad_norm=1e9, gamma=1e9)
    for key, high in limits.items():
        if not 0 <= settings[key] <= high:
            raise UserError(f"{cli.flag(key)} {settings[key]} is out of range (0 to {high:g}).")
    if settings["warmup"] >= settings["iters"]:
        warning(
            f"the warm-up ({settings['warmup']} iterations) is not shorter than the run "
            f"({settings['iters']}), so the learning rate never reaches {settings['lr']:g}. "
            f"Use --warmup {settings['iters'] // 10}."
        )


def check_device(settings):
    """Rejects a large model on a machine without a GPU, unless --device cpu is given."""
    work, advice = "training", "Use --model toy (minutes)"
    if METHODS[settings["method"]].loss is None:
        work, advice = "generating the previews of", "Add --preview-every 0 (seconds)"
        if not settings["preview_every"]:
            return
    weights.check_name(settings["model"])  # a misspelled `toy` is not a large model
    if settings["device"] != "auto" or cli.has_gpu():
        return
    folder = weights.on_disk(settings["model"], settings["revision"])
    # SD 1.4's UNet has 860 million parameters, a toy model's 8 million.
    if not folder or weights.parameters(weights.make_network(folder, "unet")) > 10**8:
        raise UserError(
            f"There is no GPU that torch can use here ({cli.why_no_gpu()}), and {work} "
            f"{settings['model']} on a CPU can take days. {advice}, or add --device cpu to use the "
            "CPU anyway."
        )
