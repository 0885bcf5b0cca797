"""Makes a text-to-image model forget a concept.

    python train.py --model toy --concept star      minutes on a CPU: a toy model
    python train.py --concept nudity                Stable Diffusion 1.4, on a CUDA GPU

The output folder receives erased.safetensors (the trained tensors, for generate.py --patch and for
diffusers), index.html (a page about the run), before_after.png, film.webp, film.png, previews/,
log.csv, run.json and a checkpoint. `python train.py --resume --out FOLDER` continues a run.
"""

import support.openmp  # noqa: F401 (before torch)

import csv
import datetime
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import ablation
import closed_form
import ema
import weights
from adversaries import Adversary
from clip_text import MAX_TOKENS, TOKEN_EMBEDDING, tokenize
from pipeline import InferenceUNet, check_words, encode_prompts, make_scheduler
from presets import METHODS, PRESETS, TRAIN_PARAMS, settle
from report.page import Reporter, require_tensorboard
from report.previews import Previews, preview_kinds, preview_seeds
from sdd import ROLES, Iteration, sdd
from support.cli import (
    Parser,
    add_common_arguments,
    finite,
    memory_is_full,
    natural,
    not_empty,
    one_of,
    pick_device,
    pick_dtype,
    positive,
    refuse_used,
    run_command,
)
from support.cuda_graph import GraphedLoss, can_record
from support.errors import UserError
from support.files import atomic_write, checksum, lock_folder, numbered_folder, write_text
from support.own_loss import OwnLossError, call_loss, load_loss, loss_file, sha256
from unet import ResnetBlock, Transformer

VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}
OWN_LOSS = "own_loss.py"  # the run's copy of --loss FILE
# These may change with --resume.
FREE = ("gradient_checkpointing", "show_uncensored", "preview_every", "device")
# gap: mean |e(c_s) − e(c_0)|². drift: mean |e(c_0) − e°(c_0)|². flat: the share of preview images
# of nearly one colour, a sign of a broken model. See report/previews.py.
LOG_COLUMNS = (
    *("iteration", "loss", "lr", "grad_norm", "k", "concept"),
    *("gap_student", "drift_student", "gap_teacher", "drift_teacher", "flat"),
)


# ------------------------------------------------------------------------------------- arguments
def parse(argv=None):
    def default(key):
        paper, toy = PRESETS["paper"][key], PRESETS["toy"][key]
        return f"default: {paper}" if paper == toy else f"default: {paper}; toy model: {toy}"

    parser = Parser(description=__doc__)
    # fmt: off
    add = parser.add_argument_group("concept and model").add_argument
    add("--concept", nargs="+", metavar="CONCEPT",
        help="what to forget; i2p means the paper's 20 harmful concepts")
    add("--model", default=weights.DEFAULT_MODEL,
        help=f"{', '.join(weights.TOYS)}, a hub id, or a folder in diffusers' layout (default: "
        "%(default)s)")
    add("--seed", type=natural, default=0, help="of the random numbers (default: %(default)s)")

    add = parser.add_argument_group("method").add_argument
    add("--method", **one_of(METHODS), default="sdd",
        help="docs/methods.md describes each (default: %(default)s)")
    add("--preset", **one_of(PRESETS),
        help="defaults of the flags below (default: paper; toy for the toy models). The defaults "
             "shown here are SDD's; METHODS in presets.py has those of other methods")
    add("--loss", type=not_empty, metavar="FILE:FUNCTION",
        help="your own loss instead of the method's (see losses.py)")
    add("--train-params", **one_of(TRAIN_PARAMS),
        help="xattn: cross-attention; kv: its keys and values; v: its values; noxattn: all but "
             "it, the time embedding and conv_out; full: the whole UNet; embedding: the concept's "
             "words (default: the method's; sdd: xattn)")
    add("--latents", **one_of(["teacher", "student", "original"]),
        help="which model samples z_t (default: the method's; sdd: teacher)")
    add("--roles", **one_of(ROLES),
        help="several concepts: which samples z_t, and which is unlearned. paper: one samples, all "
             "joined are unlearned; official: the reverse; each: one concept does both (not in the "
             f"paper) ({default('roles')})")
    add("--preserve", type=finite, metavar="λ",
        help=f"add λ·|e(c_0) − e°(c_0)|² to the loss; not part of SDD ({default('preserve')})")
    add("--keep", nargs="+", metavar="PROMPT",
        help="prompts, or a file with one per line, that --preserve holds too (default: none). "
             "Methods without training: prompts whose keys and values stay (toy model: its words)")
    add("--adversary", type=natural, metavar="N",
        help="N steps per iteration of an adversary, which learns words that bring the concept "
             f"back; they are unlearned too; not part of SDD ({default('adversary')})")
    add("--erase-scale", type=finite, metavar="S",
        help="esd: s_s, how far the target moves away from the concept; all-but-one with "
             f"--quantile: g, the same for its target ({default('erase_scale')})")
    add("--quantile", type=finite, default=0.0, metavar="Q",
        help="all-but-one: use the erasing signal above this quantile, for example 0.9, instead "
             "of the anchor (default: off)")
    add("--anchor", nargs="+", default=[], metavar="WORD",
        help="what to show instead. ablate, uce, mace, rece, speed: one word for all concepts, or "
             "one per concept; all-but-one: one word")
    add("--anchor-prompts", type=Path, metavar="FILE",
        help="ablate: one prompt per line; without --anchor the concept is a style (the shapes "
             "model has no words for this)")
    add("--anchor-images", type=positive, metavar="N",
        help=f"ablate: number of images of the anchor ({default('anchor_images')})")
    add("--prior", type=finite, default=0.0, metavar="λ",
        help="ablate: add λ·|e(anchor) − n|² to the loss (authors' script: 1; default: 0)")
    add("--detach-start", action="store_true",
        help="ablate: no gradient through the keys and values of the start token")

    add = parser.add_argument_group("methods without training: uce, mace, rece, speed").add_argument
    add("--template", nargs="+", metavar="TEXT",
        help="prompts with {} for the concept and the anchor (default: the word alone; mace and "
        "the toy models: several, see presets.py)")
    add("--states", **one_of(["last", "all"]),
        help="uce: use the last word of a prompt, or all 77 tokens (default: last; toy: all)")
    add("--ridge", type=finite, metavar="λ",
        help="weight of |W − W°|² (default: uce 0.5; rece 0.5, then 0.1; speed 1; mace 1000, or "
        "nearly 0 with --keep)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--iters", type=positive, metavar="N",
        help=f"iterations ({default('iters')}; preset paper with several concepts: 2000; rece: 1 + "
        "its rounds, 2)")
    add("--batch-size", type=positive, metavar="B",
        help=f"latents per iteration ({default('batch_size')})")
    add("--lr", type=finite,
        help=f"AdamW's learning rate ({default('lr')}; emoji model: half or a quarter)")
    add("--lr-schedule", **one_of(["cosine", "constant"]), help=default("lr_schedule"))
    add("--warmup", type=natural, metavar="N",
        help=f"iterations of linear warm-up ({default('warmup')})")
    add("--weight-decay", type=finite, metavar="W", help=default("weight_decay"))
    add("--ema", type=finite, metavar="M", help=f"m of the teacher's average ({default('ema')})")
    add("--max-grad-norm", type=finite, metavar="NORM",
        help=f"clip gradients at this norm; 0: do not clip ({default('max_grad_norm')})")
    add("--gradient-checkpointing", action="store_true",
        help="less memory, more time: compute each block again in the backward pass")
    add("--compile", action="store_true",
        help="CUDA: compile the UNet that samples z_t (torch.compile): a wait at the start, then "
             "faster iterations")
    add("--deterministic", action="store_true",
        help="CUDA: the same bits in every run, by slower kernels (on a CPU the toy models "
             "always give them)")

    add = parser.add_argument_group("sampling of z_t").add_argument
    add("--steps", type=positive, metavar="T",
        help=f"DDIM steps of a whole image ({default('steps')})")
    add("--guidance-scale", type=finite, metavar="S",
        help="s_g while z_t is sampled. 1: the concept's estimate alone; between 0 and 1: less of "
             f"the concept ({default('guidance_scale')})")

    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="DIR", help="output folder (default: a new one in runs/)")
    add("--resume", action="store_true",
        help="continue the run in --out, with its own arguments. These may change: "
             f"{', '.join('--' + key.replace('_', '-') for key in FREE)}")
    add("--save-every", type=natural, default=100, metavar="N",
        help="iterations between checkpoints; 0: only at the end (default: %(default)s)")
    add("--export-every", type=natural, default=0, metavar="N",
        help="iterations between patches of student and teacher in exports/ (default: none)")
    add("--preview", nargs="+", metavar="PROMPT",
        help="preview prompts (default: the concepts and a few others)")
    add("--preview-every", type=natural, metavar="N",
        help=f"iterations between previews; 0: none ({default('preview_every')})")
    add("--preview-steps", type=positive, default=25, metavar="N", help="default: %(default)s")
    add("--preview-guidance-scale", type=finite, default=7.5, metavar="S",
        help="default: %(default)s")
    add("--report-to", **one_of(["tensorboard"]),
        help="also write TensorBoard events into the folder tensorboard/ of the output")
    # fmt: on
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    args.given = parser.given(argv)
    return args


# ---------------------------------------------------------------------------------------- a run
class Models(NamedTuple):
    """Three models that share every tensor that is not trained."""

    student: weights.Model  # ε_θ
    teacher: weights.Model  # ε_θ*
    original: weights.Model  # ε_θ°
    theta: dict  # θ: {name: parameter}, float32
    theta_ema: dict  # θ*: the teacher's tensors, in the same order


class Prompts(NamedTuple):
    """Embeddings of the run's prompts, each (n, 77, D)."""

    c_0: torch.Tensor  # the empty prompt, n = 1
    joined: torch.Tensor  # all concepts joined, n = 1
    concepts: torch.Tensor  # n = K
    kept: torch.Tensor  # --keep
    previews: torch.Tensor
    anchors: torch.Tensor  # the anchor's prompts; without Ablating Concepts: --anchor, n = 1
    targets: torch.Tensor  # Ablating Concepts: the anchor's prompts with the concept in its place


class Run:
    """What an iteration needs and what a checkpoint holds.

    settings: what presets.settle returns. model: use this one instead of loading settings["model"].
    """

    def __init__(self, out, settings, model=None):
        self.out, self.settings = out, settings
        self.device = pick_device(settings["device"])
        self.dtype = pick_dtype(settings["dtype"], self.device, training=True)
        if settings["deterministic"]:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
            torch.use_deterministic_algorithms(True)

        model = model or weights.load(settings["model"], settings["revision"])
        check_concepts_fit(model, settings["concept"])
        self.scheduler = make_scheduler(model.scheduler, settings["steps"], "ddim")
        self.preview_scheduler = make_scheduler(model.scheduler, settings["preview_steps"], "ddim")
        side = model.resolution // model.vae.factor
        self.shape = (settings["batch_size"], 4, side, side)
        self.trains_text = settings["train_params"] == "embedding"
        self.pairs = prompt_pairs(settings)
        self.models, self.fingerprint = make_models(model, settings, self.device, self.dtype)
        self.prompts = encode_all(self.models.student, settings, self.pairs)
        if settings["method"] in closed_form.METHODS:
            self.states = closed_form.gather_states(
                self.models.student,
                settings["method"],
                template_pairs(settings),
                settings["keep"],
                settings["states"],
            )
        self.generator = torch.Generator("cpu").manual_seed(settings["seed"])
        self.adversary = self.make_adversary()
        if self.trains_text:
            model = self.models.student
            mask_embedding_gradient(model.tokenizer, self.models.theta, settings["concept"])
        else:  # the prompts never change: free the text encoder
            self.models = without_text_encoder(self.models)

        self.optimizer = make_optimizer(self.models.theta, settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.noised_anchors = None  # Ablating Concepts' source of z_t
        self.done = 0  # iterations
        # True while an iteration changes θ, the moments and θ*: then a part of them is new.
        self.half_new = False
        self.optimizer.register_step_pre_hook(lambda *_: setattr(self, "half_new", True))
        # after the last complete iteration:
        self.generator_state = self.generator.get_state()
        self.words = self.adversary.words.clone() if self.adversary else None

    def iterations(self, start=0):
        """Algorithm 1 with this run's settings: yields an Iteration after each iteration."""
        a, models = self.settings, self.models
        if a["method"] in closed_form.METHODS:
            yield from self.closed_form_rounds(start)
            return
        noised_anchors = None
        sampling_unet = None
        if a["latents"] == "anchor":
            noised_anchors = self.noised_anchors or self.make_noised_anchors()
        else:
            source = getattr(models, a["latents"])
            sampling_unet = InferenceUNet(source.unet, self.device, self.dtype, a["compile"])
            if a["compile"] and start < a["iters"]:
                print("compiling the UNet that samples z_t: about a minute")
        iterations = sdd(
            models.student.unet,
            sampling_unet,
            models.original.unet,
            self.optimizer,
            list(models.theta_ema.values()),
            self.scheduler,
            self.prompts.c_0,
            self.prompts.concepts,
            self.prompts.joined,
            self.shape,
            self.generator,
            loss=self.loss(),
            s_g=a["guidance_scale"],
            m=a["ema"],
            iters=a["iters"],
            start=start,
            lr=a["lr"],
            lr_schedule=a["lr_schedule"],
            warmup=a["warmup"],
            max_grad_norm=a["max_grad_norm"],
            roles=a["roles"],
            c_a=self.prompts.anchors,
            preserve=a["preserve"],
            kept=self.prompts.kept,
            prior=a["prior"],
            adversary=self.adversary,
            noised_anchors=noised_anchors,
            scaler=self.scaler,
        )
        for iteration in iterations:
            self.done, self.generator_state = iteration.i + 1, self.generator.get_state()
            self.half_new = False
            if self.adversary:
                self.words.copy_(self.adversary.words)
            yield iteration
            if sampling_unet is not None:
                sampling_unet.sync()  # copy the new weights before the next z_t

    @torch.no_grad()
    def closed_form_rounds(self, start):
        """Methods without training: one Iteration per round; writes the result to θ and θ*."""
        a, models = self.settings, self.models
        parameters = dict(models.original.unet.named_parameters())
        original = {name: parameters[name] for name in models.theta}
        for i in range(start, a["iters"]):
            edited = closed_form.edit(
                a["method"], i, models.theta, original, self.states, a["ridge"], a["seed"]
            )
            left = closed_form.residual(edited, original, self.states)
            self.half_new = True
            for name, W in edited.items():
                models.theta[name].copy_(W)
                models.theta_ema[name].copy_(W)
            self.done, self.half_new = i + 1, False
            yield Iteration(i, loss=left, lr=0.0, grad_norm=0.0, k=None, j=0)

    def loss(self):
        """The method's loss, or the run's copy of the user's own."""
        a = self.settings
        loss = METHODS[a["method"]].loss
        if a["loss"]:
            own_copy = self.out / OWN_LOSS
            file = own_copy if own_copy.exists() else None
            loss = partial(call_loss, load_loss(a["loss"], file), a["loss"])
        loss = partial(loss, erase_scale=a["erase_scale"], quantile=a["quantile"])
        if self.uses_graphs():
            return GraphedLoss(loss, list(self.models.theta.values()))
        return loss

    def uses_graphs(self):
        """Whether the loss and its gradient can be a CUDA graph. They cannot in these cases:

        - the user's own loss: it may read values from the GPU;
        - the embedding is trained: its gradient goes through the prompts;
        - most of the UNet is trained: the graph keeps a gradient of its own, of the same size;
        - float16: the loss must be multiplied before its gradient is computed (GradScaler).
        """
        a = self.settings
        few = a["train_params"] in ("xattn", "kv", "v")
        return can_record(self.device) and few and not a["loss"] and self.dtype != torch.float16

    def make_adversary(self):
        """--adversary: it keeps the text encoder, which the other methods free. None without it."""
        a = self.settings
        if not a["adversary"]:
            return None
        return Adversary(
            self.models.student, a["concept"], a["batch_size"], a["adversary"], self.generator
        )

    def make_noised_anchors(self):
        """Ablating Concepts: generates the anchor's images (or reads them) and noises them."""
        a, models, prompts = self.settings, self.models, self.prompts
        z_0 = ablation.generate_anchors(
            self.out / "anchors.safetensors",
            models.original,
            InferenceUNet(models.original.unet, self.device, self.dtype),
            prompts.c_0,
            prompts.anchors,
            self.scheduler,
            a["anchor_images"],
            a["guidance_scale"],
            a["seed"],
        )
        if a["detach_start"]:
            ablation.detach_start(models.student.unet)
        texts = [pair.target for pair in self.pairs]
        tokens = tokenize(models.student.tokenizer, texts)[0].to(self.device)

        def embed_targets(which):
            if self.trains_text:  # the embedding changes in each iteration
                return models.student.text_encoder(tokens[which])
            return prompts.targets[which]

        return ablation.noised_anchors(
            z_0,
            [pair.concept for pair in self.pairs],
            embed_targets,
            prompts.anchors,
            self.scheduler,
            a["batch_size"],
            self.generator,
        )

    # ------------------------------------------------------------------------------ checkpoints
    def checkpoint_groups(self):
        groups = {
            "student": self.models.theta,
            "teacher": self.models.theta_ema,
            "generator": {"state": self.generator_state},
        }
        if self.adversary:
            groups["adversary"] = {"words": self.words}
        return groups

    def save(self):
        """Writes the run as it was after its last complete iteration."""
        metadata = {"iterations": str(self.done), "base_fingerprint": self.fingerprint}
        if self.scaler.is_enabled():
            metadata["scaler"] = json.dumps(self.scaler.state_dict())
        weights.save_checkpoint(
            self.out / "checkpoint.safetensors", self.checkpoint_groups(), self.optimizer, metadata
        )

    def restore(self):
        """Reads the checkpoint, if there is one, and removes rows of log.csv that are newer."""
        file, log = self.out / "checkpoint.safetensors", self.out / "log.csv"
        if file.exists():
            # fills θ, θ*, self.generator_state and self.words in place
            metadata = weights.load_checkpoint(file, self.checkpoint_groups(), self.optimizer)
            if metadata.get("base_fingerprint", self.fingerprint) != self.fingerprint:
                raise UserError(
                    f"The weights of {self.settings['model']} have changed since the run in "
                    f"{self.out} began, so it cannot continue: restore them, or start a new run."
                )
            self.done = int(metadata["iterations"])
            self.generator.set_state(self.generator_state)
            if self.adversary:
                self.adversary.words.copy_(self.words)
            if self.scaler.is_enabled() and "scaler" in metadata:
                self.scaler.load_state_dict(json.loads(metadata["scaler"]))
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        rows = [row for row in text.splitlines(keepends=True) if row.endswith("\n")]  # whole lines
        write_text(log, "".join(rows[: self.done + 1]))  # + 1: header

    def export(self, file, which):
        """Writes a patch: the trained tensors of "student" or "teacher", with their metadata."""
        tensors = {"teacher": self.models.theta_ema, "student": self.models.theta}[which]
        metadata = {
            "model": self.settings["model"],
            "concepts": ", ".join(self.settings["concept"]),
            "method": self.settings["method"],
            "base_fingerprint": self.fingerprint,
            "args": json.dumps(self.settings),
            "versions": json.dumps(VERSIONS),
            "sha256": checksum(tensors),
        }
        weights.save(self.out / file, tensors, metadata)


def check_concepts_fit(model, concepts):
    for text in [*concepts, ", ".join(concepts)]:
        if len(model.tokenizer(text, verbose=False).input_ids) > MAX_TOKENS:
            raise UserError(
                "Each concept, and all concepts joined, must fit into 77 tokens; this text does "
                f"not: {text[:60]!r}…"
            )


def skip_unknown_previews(model, prompts):
    """The preset's preview prompts without those that a small vocabulary does not know."""
    known = []
    for prompt in prompts:
        try:
            check_words(model, [prompt])
            known.append(prompt)
        except UserError:
            print(
                f"warning: the preview prompt {prompt!r} is skipped: the model does not know it.",
                file=sys.stderr,
            )
    return known


def make_models(model, settings, device, dtype):
    """Models, on `device`, with frozen tensors in `dtype`; and the fingerprint of θ as loaded."""
    parts = (model.unet, model.text_encoder)
    trained = TRAIN_PARAMS[settings["train_params"]]
    theta = {name: p for part in parts for name, p in part.named_parameters() if trained(name)}
    fingerprint = weights.fingerprint(theta)
    for name, p in model.unet.named_parameters():
        # CUDA's autocast computes norms in float32 and would cast their weights each time.
        keep_float32 = name in theta or (device.type == "cuda" and "norm" in name)
        p.data = p.data.to(device, torch.float32 if keep_float32 else dtype)
    if device.type != "mps":  # faster on a CPU and on an H100 (docs/benchmarks.md)
        model.unet.to(memory_format=torch.channels_last)
    model.text_encoder.to(device)
    if settings["preview_every"]:  # only previews decode latents
        model.vae.to(device)

    def copy():
        unet, text_encoder = (
            ema.copy_trained(part, [name for name, _ in part.named_parameters() if name in theta])
            for part in parts
        )
        return model._replace(unet=unet, text_encoder=text_encoder)

    teacher, original = copy(), copy()
    if settings["gradient_checkpointing"]:
        checkpoint_blocks(model.unet)
    averages = dict(teacher.unet.named_parameters()) | dict(teacher.text_encoder.named_parameters())
    theta = {name: p.requires_grad_() for name, p in theta.items()}
    theta_ema = {name: averages[name] for name in theta}
    print(
        f"training {len(theta)} tensors, {sum(p.numel() for p in theta.values()):,} parameters, on "
        f"{device} (frozen tensors: {str(dtype).removeprefix('torch.')})"
    )
    return Models(model, teacher, original, theta, theta_ema), fingerprint


def checkpoint_blocks(unet):
    """Keeps only each block's input for the backward pass, and computes the rest again there."""
    for block in unet.modules():
        if isinstance(block, (ResnetBlock, Transformer)):
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )


def without_text_encoder(models):
    student, teacher, original = (model._replace(text_encoder=None) for model in models[:3])
    return models._replace(student=student, teacher=teacher, original=original)


def prompt_pairs(settings):
    """Ablating Concepts' pairs of prompts; none for the other methods."""
    if settings["latents"] != "anchor":
        return []
    return ablation.prompt_pairs(
        settings["concept"], settings["anchor"], settings["anchor_prompts"]
    )


def template_pairs(settings):
    """Methods without training: (prompt with the concept, the same prompt with the anchor)."""
    concepts, anchors = settings["concept"], settings["anchor"] or [""]
    pairs = []
    for j, concept in enumerate(concepts):
        anchor = anchors[j % len(anchors)]
        for template in settings["template"]:
            pairs.append((template.replace("{}", concept), template.replace("{}", anchor).strip()))
    return pairs


def encode_all(model, settings, pairs):
    """All prompts of a run as Prompts, encoded once, because they never change."""
    anchors = [pair.anchor for pair in pairs] or [", ".join(settings["anchor"])]
    groups = [
        [""],
        [", ".join(settings["concept"])],
        settings["concept"],
        settings["keep"],
        settings["preview"],
        anchors,
        [pair.target for pair in pairs],
    ]
    embeddings = encode_prompts(model, [text for group in groups for text in group])
    return Prompts(*embeddings.split([len(group) for group in groups]))


def make_optimizer(theta, settings):
    decay = settings["weight_decay"]
    if TOKEN_EMBEDDING in theta:
        decay = 0.0  # it would shrink the rows of words that are not trained
    return torch.optim.AdamW(theta.values(), settings["lr"], betas=(0.9, 0.999), weight_decay=decay)


def mask_embedding_gradient(tokenizer, theta, concepts):
    """--train-params embedding: only the rows of the concepts' tokens get a gradient."""
    weight = theta[TOKEN_EMBEDDING]
    rows = torch.zeros(len(weight), 1, device=weight.device)
    for concept in concepts:
        rows[tokenizer(concept, add_special_tokens=False).input_ids] = 1
    weight.register_hook(lambda grad: grad * rows)


# ------------------------------------------------------------------------------------- the loop
@contextmanager
def deferred_interrupts():
    """Collects Ctrl-C and SIGTERM in a list, so that the current iteration can end first."""
    received = []
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def open_log(file):
    """A csv.DictWriter that appends to log.csv, line by line."""
    with open(file, "a", buffering=1, newline="", encoding="utf-8") as f:
        log = csv.DictWriter(f, LOG_COLUMNS, lineterminator="\n")
        if not f.tell():
            log.writeheader()
        yield log


def due(done, every):
    return every > 0 and done % every == 0


def iterate(run, previews, reporter):
    """Algorithm 1 (Run.iterations) with log, previews, patches and checkpoints around it."""
    a, start = run.settings, run.done
    if a["latents"] == "anchor":  # before interrupts are deferred, because it can take hours
        run.noised_anchors = run.make_noised_anchors()
    bar = tqdm(total=a["iters"], initial=start, unit="it", smoothing=0, disable=None)
    with bar, deferred_interrupts() as interrupts, open_log(run.out / "log.csv") as log:
        for it in run.iterations(start):
            done = it.i + 1
            row = {key: value for key, value in it._asdict().items() if key not in ("i", "j")}
            row |= dict(iteration=it.i, concept=a["concept"][it.j])
            try:
                if due(done, a["preview_every"]):
                    row |= previews.measure()
                    if done < a["iters"]:
                        row["flat"] = previews.save(done)
            finally:  # also if the memory is full: the iteration is done, and a checkpoint follows
                log.writerow(row)
            reporter.log_row(row)
            bar.set_postfix(progress_figures(it, run.device), refresh=False)
            bar.update()
            if due(done, a["export_every"]):
                for which in ("student", "teacher"):
                    run.export(f"exports/{which}-{done:06d}.safetensors", which)
            if interrupts or done == a["iters"] or due(done, a["save_every"]):
                run.save()
            if interrupts:
                raise KeyboardInterrupt(
                    f"{done} of {a['iters']} iterations are saved. To continue: "
                    f"python train.py --resume --out {run.out}"
                )


def progress_figures(it, device):
    figures = {"loss": f"{it.loss:.2e}", "lr": f"{it.lr:.1e}"}
    if device.type == "cuda":
        figures["GB"] = f"{torch.cuda.max_memory_reserved() / 1e9:.1f}"
    return figures


# ----------------------------------------------------------------------------------- the command
def train(args):
    out, settings = open_run(args)
    if settings["report_to"]:
        require_tensorboard()
    with lock_folder(out):
        if not args.resume:
            refuse_used(out, "; or use --resume to continue the run in it")
        try:
            train_in(out, settings, args)
        except KeyboardInterrupt:
            if not (out / "run.json").exists():
                empty_folder(out)
                raise KeyboardInterrupt("nothing has been written.") from None
            raise
        except OwnLossError as e:
            if args.resume or has_work(out):
                raise OwnLossError(
                    f"{e} Use a new folder (--out): {out} stays as it is.", details=e.details
                ) from None
            empty_folder(out)  # so that the corrected command finds a free folder
            raise


def has_work(folder):
    """Whether the folder holds an iteration, or what cost as much: images of the anchor."""
    log = folder / "log.csv"
    iterations = log.exists() and len(log.read_text(encoding="utf-8").splitlines()) > 1
    return iterations or (folder / "anchors.safetensors").exists()


def empty_folder(folder):
    for path in folder.iterdir():
        if path.name.startswith("."):  # the lock
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def open_run(args):
    """The output folder and the settled arguments; with --resume, those of the run in it."""
    if args.resume:
        return resumed_run(args)
    settings = settle(args)
    if args.out is None:
        args.out = numbered_folder("runs", "-".join(settings["concept"]))
    return args.out, settings


def resumed_run(args):
    if not args.out or not (args.out / "run.json").is_file():
        raise UserError(
            "--resume needs --out FOLDER with a run in it (a run.json). Runs without --out are in "
            "runs/."
        )
    try:
        settings = json.loads((args.out / "run.json").read_text(encoding="utf-8"))["args"]
        settings.setdefault("compile", False)  # a run of an older version
        if missing := vars(args).keys() - settings.keys() - {"resume", "out", "given"}:
            raise KeyError(min(missing))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{args.out / 'run.json'} is damaged or from another version ({e!r}), so the run "
            "cannot continue."
        ) from None
    advice = f"Use --resume --out {args.out} alone, or choose a new folder."
    for key in args.given & set(FREE):
        settings[key] = getattr(args, key)
    settings["show_uncensored"] = args.show_uncensored  # for the images that this command makes
    if args.concept:
        wanted = settle(args) | {key: settings[key] for key in FREE}
        if args.preview is None:  # prompts that the model does not know were skipped
            wanted["preview"] = settings["preview"]
        if wanted != settings:
            raise UserError(f"{args.out} holds a run with other arguments. {advice}")
    else:
        changed = args.given - {"resume", "out", *FREE}
        if changed:
            flags = ", ".join(f"--{key.replace('_', '-')}" for key in sorted(changed))
            raise UserError(f"A resumed run keeps its arguments: {flags} has no effect. {advice}")
    if settings["loss"] and sha256(args.out / OWN_LOSS) != settings["loss_sha256"]:
        raise UserError(
            f"{args.out / OWN_LOSS} has changed since the run began. Start a new run with "
            f"--loss {settings['loss']}, or restore the file."
        )
    return args.out, settings


def train_in(out, settings, args):
    """The whole command, inside the locked output folder."""
    if settings["compile"] and not can_record(pick_device(settings["device"])):
        if not args.resume:
            raise UserError("--compile needs a CUDA GPU: start a run without it.")
        print("warning: --compile needs a CUDA GPU, so it is not used.", file=sys.stderr)
        settings["compile"] = False
    model = weights.load(settings["model"], settings["revision"])
    if not args.resume and args.preview is None:
        settings["preview"] = skip_unknown_previews(model, settings["preview"])
    run = Run(out, settings, model)  # rejects what this model cannot do, before a file is written
    if not args.resume:
        if settings["loss"]:
            with atomic_write(out / OWN_LOSS) as temporary:
                temporary.write_bytes(loss_file(settings["loss"]).read_bytes())
        write_run_json(out, settings)
    run.restore()
    start, began = run.done, time.monotonic()
    output = METHODS[settings["method"]].output
    previews = Previews(run)
    reporter = Reporter(out, settings["report_to"], start)
    memory_full = False
    # cache_enabled=False: a cast of a trained weight would be out of date after each step, and a
    # CUDA graph would read it for ever.
    with torch.autocast(
        run.device.type, run.dtype, enabled=run.dtype != torch.float32, cache_enabled=False
    ):
        try:
            if settings["preview_every"] and start == 0:
                previews.save(0)
                reporter.log_previews()
            iterate(run, previews, reporter)
        except FloatingPointError as e:
            kept = "There is no checkpoint yet"
            if (out / "checkpoint.safetensors").exists():
                kept = f"The last checkpoint is kept in {out}"
            raise UserError(
                f"{e}. {kept}. Start again in another folder with a smaller --lr, or with "
                "--dtype fp32."
            ) from None
        except (RuntimeError, MemoryError) as e:
            if not memory_is_full(e):
                raise
            memory_full = True
        if memory_full:  # after the block above, because `e` keeps the memory of the iteration
            run.optimizer.zero_grad()  # drop the unfinished iteration
            kept = f"{run.done} iterations are saved"
            if not run.half_new:
                run.save()
            elif (out / "checkpoint.safetensors").exists():
                kept = "the last checkpoint is kept"
            else:
                kept = "there is no checkpoint yet, so the run begins again"
            raise UserError(
                f"The memory is full; {kept}. To continue with less: "
                f"python train.py --resume --out {out} --gradient-checkpointing --preview-every 0. "
                "Or start again with a smaller --batch-size or --dtype bf16."
            )
        seconds = time.monotonic() - began
        if start < settings["iters"]:
            add_training_time(out, settings["iters"] - start, seconds)
        run.export("erased.safetensors", output)
        if settings["preview_every"]:
            try:
                previews.finish(output)
            except (RuntimeError, MemoryError) as e:
                if not memory_is_full(e):
                    raise
                reporter.log_previews()
                raise UserError(
                    f"The trained weights are saved in {out / 'erased.safetensors'}, but the "
                    "memory is too full for the last preview. When there is more memory, this "
                    f"makes it: python train.py --resume --out {out}"
                ) from None
    reporter.log_previews()
    print(
        f"{settings['iters'] - start} iterations in {seconds:.0f} s, previews included. "
        f"Trained to forget: {', '.join(settings['concept'])}\n"
        f"weights: {out / 'erased.safetensors'}\n"
        f"open this page in a browser: {out / 'index.html'}"
    )


def write_run_json(out, settings):
    content = {
        "args": settings,
        "versions": VERSIONS,
        "command": shlex.join(["python", *sys.argv]),
        "date": f"{datetime.date.today()}",
        "preview_seeds": list(preview_seeds(settings)),
        "preview_kinds": preview_kinds(settings, world_of(settings["model"])),
    }
    write_json(out / "run.json", content)


def world_of(model):
    """The module of a toy model's world (toy/worlds.py); None for other models."""
    if model not in weights.TOYS:
        return None
    from toy import worlds

    return worlds.of(model)


def add_training_time(out, iterations, seconds):
    """Adds to run.json how long the iterations of this process took; the page shows it."""
    file = out / "run.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["training"] = {"iterations": iterations, "seconds": round(seconds)}
    write_json(file, content)


def write_json(file, content):
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    advice = "to continue: python train.py --resume --out {out}"
    sys.exit(run_command(train, parse(), advice))
