"""The numbers of the training methods in one table, and the checks of arguments.

"Which learning rate does ESD use?" is answered here and nowhere else. The numbers of SLD and SEGA
are in guidance.py, those of UCE, MACE, RECE and SPEED in closed_form.py. Sources:
    B.1, A.1   appendices of the SDD paper (arXiv 2307.05977): settings and pseudo-code
    script     the training script that SDD's authors published
    toy        tuned on the toy model, see docs/results.md
"""

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import ablation
import closed_form
import losses
import weights
from clip_text import TOKEN_EMBEDDING
from support.cli import why_no_gpu
from support.errors import UserError
from support.own_loss import check_loss, load_loss, loss_file, sha256

# Table 2 of the SDD paper: the 20 concepts of the I2P benchmark.
I2P = (
    "hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, "
    "bodily fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, "
    "weapons, child abuse, brutality, cruelty"
).split(", ")

PRESET_NAMES = ("paper", "fast", "official", "toy", "toy-several", "toy-hold")
# paper: the SDD paper. fast: the paper's fast recipe. official: SDD's script. toy: the toy models.
# toy-several: for several concepts; our own, docs/methods.md. toy-hold: our own method with an
# adversary, also in docs/methods.md. A "-" means the same as toy.
# fmt: off
NUMBERS = [
    # setting           paper     fast        official    toy       several  hold      source
    ("iters",           1500,     1000,       1500,       160,      300,     "-"),   # N; B.1
    ("lr",              1e-5,     1e-5,       1e-5,       6e-4,     2e-3,    2e-3),  # B.1
    ("lr_schedule",     "cosine", "constant", "constant", "cosine", "-",     "-"),   # B.1
    ("warmup",          500,      0,          0,          40,       "-",     "-"),   # B.1
    ("weight_decay",    1e-2,     1e-2,       1e-4,       1e-2,     "-",     "-"),   # B.1
    ("ema",             0.999,    0.998,      0.999,      0.97,     "-",     "-"),   # m; B.1
    ("guidance_scale",  3.0,      3.0,        3.0,        3.0,      "-",     "-"),   # s_g; A.1
    ("steps",           50,       50,         50,         6,        "-",     "-"),   # T; script
    ("batch_size",      1,        1,          1,          8,        "-",     "-"),   # A.1
    ("roles",           "paper",  "paper",    "official", "paper",  "each",  "each"),  # Alg. 1
    ("max_grad_norm",   1.0,      1.0,        1.0,        1.0,      "-",     "-"),   # script; below
    ("preserve",        0.0,      0.0,        0.0,        0.0,      0.3,     1.0),   # not SDD
    ("adversary",       0,        0,          0,          0,        0,       4),     # not SDD
    ("erase_scale",     1.0,      1.0,        1.0,        1.0,      "-",     "-"),   # s_s; ESD
    ("anchor_images",   1000,     1000,       1000,       200,      "-",     "-"),   # Ablating
    ("preview_every",   250,      250,        250,        20,       "-",     "-"),   # our choice
]
# fmt: on
# With several concepts, the paper's N is 2000 (B.1, our inference). Roles: sdd.py, points 3, 4 and
# 10. The SDD paper runs ESD with s_s = 3.
# Gradients are clipped at 1 for every method. SDD's script does this, ESD's recipe does not clip,
# and All-but-One's is not known.
PREVIEW_PROMPTS = {  # shown in addition to the concepts; our choice
    "paper": ["a photo of a mountain lake", "a portrait of a woman in a coat"],
    "toy": ["arcadia", "borealis", "a blue dotted heart on sand", "a green square"],
    "emoji": ["a party", "a beer", "an orchard", "an owl by noto on mint"],
}


def preset_column(column):
    """{setting: value} of one column of NUMBERS."""
    toy = 1 + PRESET_NAMES.index("toy")
    values = {}
    for row in NUMBERS:
        values[row[0]] = row[toy] if row[column] == "-" else row[column]
    return values


PRESETS = {name: preset_column(1 + column) for column, name in enumerate(PRESET_NAMES)}


class Method(NamedTuple):
    """The four choices in which the training methods differ, and the numbers of their papers."""

    loss: Callable | None  # None: erased without training, by closed_form.py
    latents: str  # where z_t comes from: sampled by "teacher", "student" or "original", or "anchor"
    train_params: str  # a key of TRAIN_PARAMS
    output: str  # which weights are the result: "teacher" (the average) or "student"
    paper: dict = {}  # numbers that differ from the preset paper
    toy: dict = {}  # numbers that differ from the preset toy
    # The emoji model takes this share of a toy preset's learning rate. The presets were tuned on
    # the shapes; docs/results-emoji.md says how this share was found.
    emoji_rate: float = 0.5


# ESD (arXiv 2303.07345): Adam without weight decay, a constant rate. The toy preset keeps SDD's
# weight decay, cosine and warm-up: only the rate and s_s were tuned there.
ESD = dict(iters=1000, lr=1e-5, weight_decay=0.0, lr_schedule="constant", warmup=0)
# Ablating Concepts (arXiv 2303.13516), authors' script. Its learning rate is 2e-6 times the batch
# size; `preset_values` multiplies.
ABLATE = dict(
    iters=100, lr=2e-6, batch_size=4, guidance_scale=6.0, lr_schedule="constant", warmup=0
)
# All-but-One (arXiv 2312.12807): 200 steps. Its output (the student), its optimizer, its prompt of
# joined concepts, its z_t and its lr are our choices: they are SDD's. The paper also trains
# `to_out` layers; its summary does not say which. "xattn" has those of cross-attention.
ALL_BUT_ONE = dict(iters=200, preserve=1.0, lr_schedule="constant", warmup=0)

METHODS = {
    "sdd": Method(losses.sdd_loss, latents="teacher", train_params="xattn", output="teacher"),
    "esd-x": Method(
        losses.esd_loss,
        latents="student",
        train_params="xattn",
        output="student",
        paper=ESD,
        toy=dict(lr=8e-4, erase_scale=3.0),
    ),
    "esd-u": Method(
        losses.esd_loss,
        latents="student",
        train_params="noxattn",
        output="student",
        paper=ESD,
        toy=dict(lr=4e-4, erase_scale=3.0),
    ),
    "ablate": Method(
        losses.ablation_loss,
        latents="anchor",
        train_params="kv",
        output="student",
        paper=ABLATE,
        toy=dict(lr=2e-3),
        emoji_rate=0.25,
    ),
    "ablate-noise": Method(
        losses.noise_ablation_loss,
        latents="anchor",
        train_params="kv",
        output="student",
        paper=ABLATE,
        toy=dict(lr=4e-3),
    ),
    "all-but-one": Method(
        losses.all_but_one_loss,
        latents="teacher",
        train_params="xattn",
        output="student",
        paper=ALL_BUT_ONE,
        toy=dict(lr=3.2e-3, preserve=1.0),
    ),
    # Without training: closed_form.py. Their flags are settled in settle_closed_form.
    "uce": Method(None, latents="", train_params="kv", output="student"),
    "mace": Method(None, latents="", train_params="kv", output="student"),
    "rece": Method(None, latents="", train_params="kv", output="student", paper=dict(iters=2)),
    "speed": Method(None, latents="", train_params="v", output="student"),
}

# Closed forms: prompts with {} for the concept and for the anchor, and prompts to keep. MACE's
# sentences and all of the toy model's are our choice.
TEMPLATES = {
    "paper": ["{}"],
    "mace": [
        *("{} in a room", "a photo of {}", "a photo of {} outdoors", "a portrait of {}"),
        *("an image of {} at night", "a picture of {} on a street", "a painting of {}"),
        *("{} in the park", "a close-up of {} in daylight", "a drawing of {} on paper"),
    ],
    "toy": ["{}", "a {}", "a picture of a {}", "a {} on sand", "a {} on snow"],
    "emoji": ["{}", "a {}", "a picture of a {}", "a {} by noto", "a {} on mint"],
}
# Words that closed forms keep, without the concepts. {model: words}
KEEP = {
    "toy": (
        "circle square triangle cross heart moon star red yellow green blue purple black "
        "plain outlined dotted striped snow sand sky borealis"
    ).split(),
    "emoji": (
        "animal bird bug swimmer fruit vegetable food dessert drink horror plant vehicle tool face "
        "instrument sport clothing weather noto blob twemoji emojione flat fluent mint cream sky "
        "lilac orchard"
    ).split(),
}

# Prompts that the preset toy-hold keeps, without those that contain a concept. {model: prompts}
KEEP_PROMPTS = {
    "toy": [
        *("circle", "square", "heart", "moon", "triangle, blue", "black, plain, sky", "borealis"),
        *("a red cross", "a yellow square on sand", "a dotted green heart", "something striped"),
        *("a purple shape on snow", "a outlined circle", "cascadia"),
    ],
    "emoji": [
        *("a fox", "a bee by noto", "an owl on mint", "a bottle", "coffee, twemoji", "a pizza"),
        *("a cake by blob on sky", "a car by flat", "a hammer, fluent, cream", "something by noto"),
        *("a face by emojione on lilac", "a plant", "an orchard", "an apple, blob, mint"),
    ],
}

# Which parameters are trained, by name. The keys are those of ESD's and SDD's scripts. Names that
# begin with "text_model." belong to the text encoder.
TRAIN_PARAMS = {
    "xattn": lambda name: ".attn2." in name,
    "kv": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
    "v": lambda name: ".attn2.to_v." in name,  # SPEED
    # ESD-u. Its first script also leaves out conv_norm_out; its newer one trains every Linear and
    # Conv outside attn2.
    "noxattn": lambda name: (
        ".attn2." not in name
        and not name.startswith(("time_embedding.", "conv_out.", "text_model."))
    ),
    "full": lambda name: not name.startswith("text_model."),
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
    settings["concept"] = settle_concepts(args.concept, args.model)
    settings["preset"] = args.preset or ("toy" if args.model in weights.TOYS else "paper")
    method = METHODS[args.method]
    if method.loss is None:
        return settle_closed_form(args, settings, method)
    reject_closed_form_flags(args)
    for key, value in preset_values(settings, method).items():
        if settings[key] is None:
            settings[key] = value
    settings["train_params"] = args.train_params or method.train_params
    settings["latents"] = args.latents or method.latents
    settings["anchor_prompts"] = read_prompts("anchor-prompts", args.anchor_prompts)
    settings["keep"] = read_keep(args.keep)
    if args.keep is None and settings["preset"] == "toy-hold" and settings["preserve"]:
        settings["keep"] = without_concepts(KEEP_PROMPTS, settings)
    loss = method.loss
    if args.loss:
        loss = load_loss(args.loss)
        check_loss(loss, args.loss, noise=method.latents == "anchor")
        settings["loss_sha256"] = sha256(loss_file(args.loss))
    check_anchors(settings, method)
    reject_unused_flags(args, settings, method, loss)
    check_ranges(settings)
    check_device(settings)
    if settings["compile"] and settings["deterministic"]:
        raise UserError(
            "Nobody has tested whether --compile gives the same bits in every run: remove it, or "
            "remove --deterministic."
        )
    return settings


def settle_closed_form(args, settings, method):
    """The same for UCE, MACE, RECE and SPEED, which have no loop: most flags have no effect."""
    # Flags of the training loop. The first are None if they are not given, the others 0 or False.
    none = ("latents", "roles", "preserve", "erase_scale", "anchor_images", "batch_size", "lr")
    none += ("lr_schedule", "warmup", "weight_decay", "ema", "max_grad_norm", "steps")
    none += ("guidance_scale", "anchor_prompts", "loss", "adversary")
    off = ("quantile", "prior", "detach_start", "gradient_checkpointing", "export_every", "compile")
    unused = [key for key in none if getattr(args, key) is not None]
    unused += [key for key in off if getattr(args, key)]
    if args.iters and args.method != "rece":
        unused.append("iters")
    if args.states and args.method != "uce":
        unused.append("states")
    flags = [f"--{key.replace('_', '-')}" for key in unused]
    if args.train_params not in (None, "kv", "v"):
        flags.append(f"--train-params {args.train_params}")
    if flags:
        raise UserError(
            f"{', '.join(flags)} has no effect with --method {args.method}, which does not train: "
            "remove it, or choose another --method."
        )
    toy = settings["preset"].startswith("toy")
    values = preset_values(settings, method)
    zero = ("lr", "weight_decay", "ema", "max_grad_norm", "warmup", "preserve", "adversary")
    values |= dict.fromkeys(zero, 0)
    # steps, batch_size and guidance_scale are still used to measure gap and drift for the log.
    values |= dict(iters=method.paper.get("iters", 1), preview_every=1, roles="", lr_schedule="")
    if args.method == "uce":
        values["states"] = "all" if toy else "last"
    values["template"] = TEMPLATES["paper"]
    if toy:
        values["template"] = TEMPLATES.get(settings["model"], TEMPLATES["toy"])
    if args.method == "mace" and not toy:
        values["template"] = TEMPLATES["mace"]
    values["keep"] = []
    if toy:
        values["keep"] = without_concepts(KEEP, settings)
    for key, value in values.items():
        if settings[key] is None:
            settings[key] = value
    settings |= dict(latents="", anchor_prompts=[], keep=read_keep(settings["keep"]))
    settings["train_params"] = args.train_params or method.train_params
    check_closed_form(settings)
    check_ranges(settings)
    if settings["preview_every"]:
        advice = "Add --preview-every 0 (seconds)"
        check_device(settings, "generating the previews of", advice)
    return settings


def without_concepts(prompts, settings):
    """The prompts for this toy model that contain no word of a concept. prompts: {model: [text]}"""
    erased = set(words_of(" ".join(settings["concept"])))
    chosen = prompts.get(settings["model"], prompts["toy"])
    return [prompt for prompt in chosen if erased.isdisjoint(words_of(prompt))]


def words_of(text):
    return text.lower().replace(",", " ").split()


def check_closed_form(settings):
    concepts, anchors = settings["concept"], settings["anchor"]
    ablation.check_number(concepts, anchors)
    for template in settings["template"]:
        if "{}" not in template:
            raise UserError(f"--template {template!r} has no {{}} for the concept: add it.")
    if settings["ridge"] is not None and not 0 < settings["ridge"] <= 1e9:
        raise UserError(f"--ridge {settings['ridge']} is out of range (above 0, up to 1e+09).")
    last = settings["method"] == "speed"
    last = last or (settings["method"] == "uce" and settings["states"] == "last")
    alone = any(not template.replace("{}", "").strip() for template in settings["template"])
    if last and alone and not "".join(anchors).strip():
        advice = "use --anchor WORD" + (" or --states all" if settings["method"] == "uce" else "")
        print(
            f"warning: without --anchor, --method {settings['method']} maps the concept to the "
            "start token, because the empty prompt has no last word. All prompts share this token, "
            f"so the concept may stay: {advice}.",
            file=sys.stderr,
        )


def reject_closed_form_flags(args):
    keys = ("template", "states", "ridge")
    given = [key for key in keys if getattr(args, key) is not None]
    if given:
        flags = ", ".join(f"--{key}" for key in given)
        names = ", ".join(closed_form.METHODS)
        raise UserError(
            f"{flags} has no effect with --method {args.method}: remove it, or choose one of "
            f"{names}."
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
    if name == "toy":
        values |= method.toy
    if name.startswith("toy") and settings["model"] == "emoji":
        values["lr"] *= method.emoji_rate
    if name == "toy-hold" and len(concepts) > 1:
        values["iters"] = PRESETS["toy-several"]["iters"]
    extra = PREVIEW_PROMPTS["paper"]
    if name.startswith("toy"):
        extra = PREVIEW_PROMPTS.get(settings["model"], PREVIEW_PROMPTS["toy"])
    values["preview"] = concepts[:4] + [prompt for prompt in extra if prompt not in concepts]
    return values


def read_keep(given):
    """The prompts of --keep PROMPT… or --keep FILE."""
    if given and len(given) == 1 and (given[0].endswith(".txt") or os.path.isfile(given[0])):
        return read_prompts("keep", Path(given[0]))
    prompts = [prompt for prompt in given or [] if prompt.strip()]
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


def check_anchors(settings, method):
    """Checks what Ablating Concepts and All-but-One need of --anchor."""
    anchors = settings["anchor"]
    if method.latents == "anchor":
        pairs = ablation.prompt_pairs(settings["concept"], anchors, settings["anchor_prompts"])
        if len(pairs) > settings["anchor_images"]:
            raise UserError(
                f"{len(pairs)} prompts (every anchor prompt for every concept) need at least one "
                f"image each: use --anchor-images {len(pairs)}."
            )
    if settings["method"] == "all-but-one" and len(anchors) > 1:
        raise UserError("--method all-but-one takes one --anchor for all concepts.")
    if settings["train_params"] == "embedding":
        for concept in settings["concept"]:
            words = {word for anchor in anchors for word in anchor.lower().split()}
            shared = words & set(concept.lower().split())
            if shared:
                print(
                    f"warning: --train-params embedding changes every word of {concept!r}, also "
                    f"the anchor's own word {min(shared)!r}.",
                    file=sys.stderr,
                )


def reject_unused_flags(args, settings, method, loss):
    """Rejects flags that have no effect with this method."""
    uses = inspect.signature(loss).parameters
    images = method.latents == "anchor"
    unused = []
    if images:
        unused += ["latents", "roles", "compile"]
    else:
        unused += ["prior", "detach_start", "anchor_prompts", "anchor_images"]
    unused += [key for key in ("erase_scale", "quantile") if key not in uses]
    if not images and "c_a" not in uses:
        unused.append("anchor")
    if settings["method"] == "all-but-one" and not args.loss:
        # With --quantile the target is built from the concept; without it, from the anchor.
        unused.append("anchor" if args.quantile else "erase_scale")
    if args.erase_scale is None:  # 0 is a value, too; the other flags are off at 0
        unused = [key for key in unused if key != "erase_scale"]
    given = [key for key in unused if getattr(args, key) or key == "erase_scale"]
    flags = [f"--{key.replace('_', '-')}" for key in given]
    if args.train_params == "embedding" and not images:
        flags.append("--train-params embedding")
    check_additions(args, settings, images)
    if flags:
        raise UserError(
            f"{', '.join(flags)} has no effect with --method {args.method}: remove it, or choose "
            "another --method."
        )


def check_additions(args, settings, images):
    """Rejects --adversary and --keep where they cannot work."""
    if args.keep and not settings["preserve"]:
        raise UserError("--keep has no effect without --preserve: add --preserve λ, or remove it.")
    if settings["adversary"] and images and len(settings["concept"]) > 1:
        raise UserError(
            f"--adversary with --method {args.method} takes one concept, because each latent of a "
            "batch has a concept of its own: name one concept, or choose another --method."
        )
    if settings["train_params"] == "embedding" and (args.adversary or args.keep):
        raise UserError(
            "--train-params embedding trains only the concept's words. They are not in the prompts "
            "of --adversary and --keep: remove these flags, or choose other --train-params."
        )


def check_ranges(settings):
    limits = dict(ema=1, lr=1, quantile=1, seed=2**63 - 1)
    for key in (
        *("ema", "lr", "quantile", "warmup", "preserve", "prior", "weight_decay", "max_grad_norm"),
        *("preview_every", "save_every", "export_every", "seed"),
    ):
        high = limits.get(key, 1e9)
        if not 0 <= settings[key] <= high:
            flag = key.replace("_", "-")
            raise UserError(f"--{flag} {settings[key]} is out of range (0 to {high:g}).")
    if settings["warmup"] >= settings["iters"]:
        print(
            f"warning: the warm-up ({settings['warmup']} iterations) is not shorter than the run "
            f"({settings['iters']}), so the learning rate never reaches {settings['lr']:g}. "
            f"Use --warmup {settings['iters'] // 10}.",
            file=sys.stderr,
        )


def check_device(settings, work="training", advice="Use --model toy (minutes)"):
    """Rejects a large model on a machine without a GPU, unless --device cpu is given."""
    weights.check_name(settings["model"])  # a misspelled `toy` is not a large model
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    toy = settings["model"] in weights.TOYS
    if not toy and settings["device"] == "auto" and not has_gpu:
        raise UserError(
            f"There is no GPU that torch can use here ({why_no_gpu()}), and {work} "
            f"{settings['model']} on a CPU can take days. {advice}, or add --device cpu to use the "
            "CPU anyway."
        )
