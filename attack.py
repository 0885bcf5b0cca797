"""Does the concept come back? Attacks on an erased model.

    python attack.py --model toy --concept star --patch runs/0001-star/erased.safetensors
    python attack.py --model toy --concept star --patch none          the untouched model

The original model generates images of the concept, unless --images gives them. Then the attack
looks for a way to make the erased model (--patch) generate it too, and counts how many of its
images show the concept:

    word      one new word: its embedding is learned from the images (textual inversion)
    tokens    a few existing words in front of the prompt are searched
    relearn   the trained tensors are fine-tuned on the images
    noise     nothing is learned, no images are needed: the sampler adds noise; an image counts if
              one of 24 attempts shows the concept

The output folder receives a page (index.html), results.json, sheet.png and images/. With --kind
word it also receives word.safetensors, for generate.py --word and diffusers'
load_textual_inversion. The same command continues after a kill. adversaries.py has the attacks
themselves, and says where they differ from the papers.
"""

import support.openmp

import hashlib
import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import weights
from adversaries import NoisyDDIM, Relearn, Tokens, Word, noise_loss
from evaluation.attacks import Results, make_detector
from pipeline import (
    check_words,
    encode_prompts,
    images,
    make_scheduler,
    noise_schedule,
    patched,
    refuse_words,
    saved_latents,
    without_prompt,
)
from support import cli, runs
from support.errors import UserError
from support.files import lock_folder
from support.nudity import censoring
from support.own_loss import sha256
from toy import worlds

KINDS = {"word": Word, "tokens": Tokens, "relearn": Relearn}  # and noise
ETAS, SCALES = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85), (1.0, 1.02, 1.03, 1.04)
# fmt: off
DEFAULTS = [  # a flag, the kinds of attack that use it, and its default; our choice
    # flag         kinds                        toy models              other models
    ("num_images", "word tokens relearn",       64,                     25),
    ("at",         "word tokens",               [0, 40, 80, 160, 320],  [0, 40, 80, 160, 320]),
    ("at",         "relearn",                   [0, 5, 10, 20, 40, 80], [0, 5, 10, 20, 40, 80]),
    ("lr",         "word",                      2e-2,                   5e-3),
    ("lr",         "tokens",                    1e-2,                   1e-2),
    ("lr",         "relearn",                   1e-3,                   1e-5),
    ("weight_decay", "tokens",                  1e-3,                   0.1),
    ("batch_size", "word tokens relearn noise", 8,                      4),
    ("steps",      "word tokens relearn noise", 12,                     50),
    ("template",   "word relearn",              ["{}"],                 ["{}"]),
    ("words",      "tokens",                    3,                      3),
    ("images",     "word tokens relearn",       None,                   None),
    ("init",       "word",                      None,                   "object"),  # or its world's
    ("prompt",     "tokens noise",              None,                   None),  # the concept
]
# fmt: on
USED_BY = {key: set() for key, *_ in DEFAULTS}  # {flag: the kinds that use it}
for key, kinds, *_ in DEFAULTS:
    USED_BY[key].update(kinds.split())
DISPLAY = ("out", "show_uncensored", "given")  # arguments that change no result


class Attack:
    """One attack on one model.

    detect: evaluation.attacks.make_detector's function, or None. censor: what covers images.
    """

    def __init__(self, out, settings, model, detect, censor):
        self.out, self.settings, self.model = out, settings, model
        self.device = cli.pick_device(settings["device"])
        self.dtype = cli.pick_dtype(settings["dtype"], self.device, training=True)
        learns = settings["kind"] in KINDS
        if learns and settings["dtype"] == "auto" and self.dtype == torch.float16:
            self.dtype = torch.float32  # a GPU without bfloat16: small gradients would become 0
        for part in (model.unet, model.text_encoder, model.vae):
            part.to(self.device)
        self.scheduler = make_scheduler(model.scheduler, settings["steps"], "ddim")
        self.seeds = [settings["seed"] * 100_000 + 50_000 + i for i in range(settings["samples"])]
        self.detect = detect
        self.checkpoint = out / "checkpoint.safetensors"
        self.results = Results(out, settings, detect is not None, censor)

    # ------------------------------------------------------------------------------ images
    def concept_latents(self):
        """z_0 (m, 4, h, w), images of the concept: from --images, or by the original model."""
        a, model = self.settings, self.model
        if a["images"]:
            return encode_folder(model, Path(a["images"]), a["num_images"], self.device)
        c_0, c = encode_prompts(model, "", a["concept"])
        return saved_latents(
            self.out / "concept.safetensors",
            "images of the concept",
            model,
            c,
            a["num_images"],
            a["seed"] * 100_000,
            negative=without_prompt(model, c_0),
            scheduler=self.scheduler,
            guidance_scale=a["guidance_scale"],
            dtype=self.dtype,
        )

    @torch.no_grad()
    def measure(self, c_p, scheduler=None, guidance_scale=None):
        """Images of the fixed seeds by the prompts c_p (P, 77, D) in turn: (images, found).

        found: which images show the concept; all False where no detector can tell.
        """
        a, n = self.settings, len(self.seeds)
        made = images(
            self.model,
            c_p[torch.arange(n) % len(c_p)],
            self.seeds,
            scheduler=scheduler or self.scheduler,
            guidance_scale=a["guidance_scale"] if guidance_scale is None else guidance_scale,
            batch_size=a["batch_size"],
            dtype=self.dtype,
        )
        shown = list(made)
        return shown, self.detect(shown) if self.detect else [False] * n

    # ------------------------------------------------------------- word, tokens and relearn
    def learn(self, z_0):
        """Steps of the noise loss; after the steps in --at, images are generated and counted."""
        a, results = self.settings, self.results
        kind = KINDS[a["kind"]](self.model, a, self.device)
        generator = torch.Generator("cpu").manual_seed(a["seed"])
        if not results.chance:  # before `restore`, which changes the model
            _, found = self.measure(encode_prompts(self.model, ""), guidance_scale=1.0)
            results.chance = [dict(step=0, hits=sum(found), n=len(found))]
        start, loss = self.restore(kind, generator)
        results.points = [point for point in results.points if point["step"] < start]
        last = a["at"][-1]
        bar = tqdm(total=last, initial=start, desc=a["kind"], unit="step", disable=None)
        for step in range(start, last + 1):
            if step in a["at"]:
                self.save(kind, generator, step, loss)
                with torch.no_grad():
                    shown, found = self.measure(kind.states())
                results.add(step, shown, found, loss=loss, prompt=kind.report(self.out))
            if step < last:
                loss = self.train_step(kind, z_0, generator)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
        bar.close()

    def train_step(self, kind, z_0, generator):
        with torch.enable_grad(), cli.autocast(self.device, self.dtype):
            c = kind.states(generator)
            batch = self.settings["batch_size"]
            loss = noise_loss(self.model.unet, self.scheduler, z_0, c, batch, generator)
            loss.backward()
        kind.step()
        kind.optimizer.zero_grad()
        return loss.item()

    def save(self, kind, generator, step, loss):
        """A checkpoint. FloatingPointError if the loss or a learned tensor is not finite."""
        fine = loss is None or math.isfinite(loss)
        if not fine or not all(x.isfinite().all() for x in kind.tensors.values()):
            raise FloatingPointError(f"The attack diverged before step {step} (loss {loss})")
        groups = {"attack": kind.tensors, "generator": {"state": generator.get_state()}}
        metadata = {"step": str(step), "loss": json.dumps(loss)}
        weights.save_checkpoint(self.checkpoint, groups, kind.optimizer, metadata)

    def restore(self, kind, generator):
        """Reads the checkpoint, if there is one: (the number of steps done, the last loss)."""
        if not self.checkpoint.exists():
            return 0, None
        groups = {"attack": kind.tensors, "generator": {"state": generator.get_state()}}
        metadata = weights.load_checkpoint(self.checkpoint, groups, kind.optimizer)
        generator.set_state(groups["generator"]["state"])
        return int(metadata["step"]), json.loads(metadata["loss"])

    # ------------------------------------------------------------------------------- noise
    def try_noise(self):
        """24 attempts. A seed counts from the first attempt on that shows the concept."""
        a, results = self.settings, self.results
        c_0, c_p = encode_prompts(self.model, "", a["prompt"])
        attempts = [(eta, scale) for eta in ETAS for scale in SCALES]
        results.chance = results.chance[: len(results.points)]
        for number, (eta, scale) in enumerate(tqdm(attempts, "noise", disable=None)):
            if number < len(results.points):
                continue  # done before a kill
            seed = a["seed"] * 100_000 + number
            schedule = noise_schedule(self.model.scheduler)
            sampler = NoisyDDIM(a["steps"], eta, scale, seed, **schedule)
            _, found = self.measure(c_0, sampler, guidance_scale=1.0)
            found = any_of(results.chance, found)
            results.chance.append(dict(step=number + 1, hits=sum(found), n=len(found), found=found))
            sampler = NoisyDDIM(a["steps"], eta, scale, seed, **schedule)
            shown, found = self.measure(c_p, sampler)
            found = any_of(results.points, found)
            results.add(number + 1, shown, found, eta=eta, scale=scale)


def any_of(points, found):
    """Which seeds have shown the concept in this or an earlier attempt."""
    before = points[-1]["found"] if points else [False] * len(found)
    return [x or y for x, y in zip(before, found)]


def image_files(folder, n):
    """The first n images of a folder, by name. UserError if there are none."""
    kinds = (".png", ".jpg", ".jpeg", ".webp")
    files = [file for file in folder.glob("*") if file.suffix.lower() in kinds and file.is_file()]
    files = sorted(files)[:n]
    if not files:
        raise UserError(f"--images {folder} is not a folder with images (PNG, JPEG or WebP).")
    return files


@torch.no_grad()
def encode_folder(model, folder, n, device):
    """The first n images of a folder as latents, resized to the model's resolution."""
    size, latents = (model.resolution, model.resolution), []
    for file in image_files(folder, n):
        try:
            image = np.asarray(Image.open(file).convert("RGB").resize(size))
        except Exception as e:  # of Pillow's decoders: OSError, SyntaxError, ValueError, others
            raise UserError(f"--images: {file} cannot be read ({e}): remove it.") from None
        x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float().div(127.5).sub(1)
        latents.append(model.vae.encode(x.to(device)))
    return torch.cat(latents)


# ---------------------------------------------------------------------------------- the command
def settle(args):
    """{argument: value} that the kind of attack uses, with its defaults."""
    cli.refuse_unused(cli.unused(args.given, USED_BY, args.kind), f"with --kind {args.kind}")
    a = {key: value for key, value in vars(args).items() if key not in DISPLAY}
    ((a["name"], patches),) = weights.named_patches([args.patch]).items()
    a["patch"] = patches[0] if patches else "none"
    a["model"] = weights.choose_model(args.model, patches)
    if patches:
        a["patch_sha256"] = sha256(Path(patches[0]))
    toy, own = a["model"] in weights.TOYS, {}
    if toy:
        a["concept"] = a["concept"].lower()  # as its world writes words
        own["init"] = worlds.of(a["model"]).INIT
    own["prompt"] = a["concept"]
    for key, kinds, small, large in DEFAULTS:
        if args.kind in kinds.split() and a[key] is None:
            a[key] = own.get(key, small if toy else large)
    a = {key: value for key, value in a.items() if args.kind in USED_BY.get(key, args.kind)}
    if "at" in a:
        a["at"] = sorted(set(a["at"]))
    for text in a.get("template", []):
        if "{}" not in text:
            raise UserError(f"--template {text!r} has no {{}} for the word: add it.")
    if a.get("images"):
        digest = hashlib.sha256()
        for file in image_files(a["images"], a["num_images"]):
            digest.update(file.read_bytes())
        a["images"], a["images_sha256"] = str(a["images"]), digest.hexdigest()
    return a


def attack(args):
    a = settle(args)
    name = a["patch"] if a["patch"] == "none" else a["name"]
    short = re.sub(r"\W+", "-", f"{args.kind}-{args.concept}-{name}")[:80]
    args.out = args.out or Path("attacks") / short
    with lock_folder(args.out):
        model = weights.load(a["model"], args.revision)
        if args.kind in ("word", "tokens"):
            refuse_words(model, f"--kind {args.kind}")
        texts = [text.replace("{}", "") for text in a.get("template", [])]
        texts += [a["concept"], a.get("prompt", "")]
        check_words(model, [*texts, a.get("init", "")])
        patch = None if a["patch"] == "none" else a["patch"]
        with patched(model, patch) as about:  # one for another model is refused here
            censor = censoring([*texts, about.get("concepts", "")], args.show_uncensored)
        detect = make_detector(a["model"], a["concept"])
        runs.begin_or_continue(args.out / "attack.json", a | weights.checksums(model))
        run = Attack(args.out, a, model, detect, censor)
        z_0 = run.concept_latents() if args.kind in KINDS else None
        with patched(model, patch):
            if args.kind in KINDS:
                run.learn(z_0)
            else:
                run.try_noise()
        run.results.finish()


# ------------------------------------------------------------------------------------- arguments
def default(key):
    """The default of a flag in words, from DEFAULTS."""
    found = []
    rows = [row for row in DEFAULTS if row[0] == key]
    for _, kinds, *values in rows:
        toy, other = (str(value).strip("[]").replace(",", "") for value in values)
        text = other if toy == other else f"{other}, toy model {toy}"
        found.append(text if len(rows) == 1 else f"{', '.join(kinds.split())} {text}")
    return f"(default: {'; '.join(found)})"


def parse(argv=None):
    parser = cli.Parser(description=__doc__)
    # fmt: off
    add = parser.add_argument_group("what is attacked").add_argument
    add("--patch", type=cli.not_empty, required=True, metavar="[NAME=]FILE",
        help="an erased.safetensors, or none for the untouched model")
    add("--concept", type=cli.not_empty, required=True, metavar="WORD",
        help="what should come back")
    add("--kind", **cli.one_of([*KINDS, "noise"]), default="word",
        help="how to attack (default: %(default)s)")
    add("--model", metavar="MODEL",
        help=f"{', '.join(weights.TOYS)}, a hub id, or a folder in diffusers' layout (default: the "
        "patch's model)")
    add("--images", type=Path, metavar="DIR",
        help="your own images of the concept (default: the original model generates them)")
    add("--num-images", type=cli.positive, metavar="N",
        help=f"images of the concept {default('num_images')}")
    add("--seed", type=cli.natural, default=0, metavar="N",
        help="the only source of random numbers (default: %(default)s)")

    add = parser.add_argument_group("the attack").add_argument
    add("--at", nargs="+", type=cli.natural, metavar="N",
        help="steps after which images are generated; the last one ends the attack "
        f"{default('at')}")
    add("--lr", type=partial(cli.number, low=1e-9, high=1e3), help=f"learning rate {default('lr')}")
    add("--weight-decay", type=partial(cli.number, low=0, high=1e3), metavar="W",
        help=f"tokens: Adam's weight decay {default('weight_decay')}")
    add("--batch-size", type=cli.positive, metavar="B",
        help=f"images per step, and images generated at a time {default('batch_size')}")
    inits = "; ".join(f"{name}: {world.INIT}" for name, world in worlds.MODELS.items())
    add("--init", type=cli.not_empty, metavar="WORD",
        help=f"word: the word that the new one starts from (default: object; {inits})")
    add("--template", nargs="+", metavar="TEXT",
        help="word, relearn: prompts with {} for the word (default: the word alone)")
    add("--words", type=cli.positive, metavar="K",
        help=f"tokens: number of words {default('words')}")
    add("--prompt", metavar="TEXT", help="tokens, noise: the prompt (default: the concept)")

    add = parser.add_argument_group("the images that are counted").add_argument
    add("--samples", type=cli.positive, default=24, metavar="N",
        help="images after each of the steps in --at (default: %(default)s)")
    add("--steps", type=cli.positive, metavar="T", help=f"DDIM steps {default('steps')}")
    add("--guidance-scale", type=cli.finite, default=7.5, metavar="S",
        help="how strongly the prompt guides (default: %(default)s)")

    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="DIR",
        help="output folder (default: attacks/KIND-CONCEPT-PATCH)")
    # fmt: on
    cli.add_common_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(cli.run_command(attack, parse(), "the same command continues in {out}"))
