"""Makes a text-to-image model forget a concept.

    python train.py --model toy --concept star      minutes on a CPU: a toy model
    python train.py --concept nudity                Stable Diffusion 1.4, on a CUDA GPU

The output folder receives erased.safetensors (the trained tensors, for generate.py --patch and for
diffusers), index.html (a page about the run), before_after.png, film.webp, film.png, previews/,
log.csv, run.json and a checkpoint. `python train.py --resume --out FOLDER` continues a run.
"""

import support.openmp

import json
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import ablation
import closed_form
import ema
import losses
import presets
import weights
from adversaries import Adversary
from clip_text import TOKEN_EMBEDDING
from pipeline import encode_prompts, latent_shape, make_scheduler
from presets import CLOSED, FLAGS, METHODS, PRESETS, RECIPES, TRAIN_PARAMS, check_prompts, settle
from report.page import Reporter, require_tensorboard
from report.previews import Previews, preview_kinds, preview_seeds
from sdd import Prompts, adamw_step, learning_rates, sdd
from support import cli, runs
from support.errors import UserError
from support.fast import InferenceUNet, checkpoint_blocks, graphed
from support.files import atomic_write, checksum, lock_folder, numbered_folder
from support.own_loss import loss_file, own_loss
from toy import worlds

# These may change with --resume.
FREE = ("gradient_checkpointing", "show_uncensored", "preview_every", "device", "model")
# gap: mean |e(c_s) − e(c_0)|². drift: mean |e(c_0) − e°(c_0)|². flat: the share of preview images
# of nearly one colour, a sign of a broken model. See report/previews.py.
LOG_COLUMNS = (
    *("iteration", "loss", "lr", "grad_norm", "k", "concept"),
    *("gap_student", "drift_student", "gap_teacher", "drift_teacher", "flat"),
)


# ------------------------------------------------------------------------------------- arguments
def parse(argv=None):
    parser = cli.Parser(description=__doc__)
    # fmt: off
    add = parser.add_argument_group("concept and model").add_argument
    add("--concept", nargs="+", metavar="CONCEPT",
        help="what to forget; i2p means the paper's 20 harmful concepts")
    add("--model", default=weights.DEFAULT_MODEL,
        help=f"{', '.join(weights.TOYS)}, a hub id, or a folder in diffusers' layout (default: "
        "%(default)s)")
    add("--seed", type=cli.natural, default=0, help="of the random numbers (default: %(default)s)")

    groups = {"method": parser.add_argument_group("method")}
    add = groups["method"].add_argument
    add("--method", **cli.one_of(METHODS), default="sdd",
        help="docs/methods.md describes each (default: %(default)s)")
    add("--preset", **cli.one_of([*PRESETS, *RECIPES]),
        help="defaults of the numbers (default: paper; toy for the toy models; SDD's are untested "
             "on Stable Diffusion XL). The defaults "
             "shown here are SDD's; METHODS and RECIPES in presets.py have those of other methods")
    add("--loss", type=cli.not_empty, metavar="FILE:FUNCTION",
        help="your own loss instead of the method's (see losses.py)")
    add("--train-params", **cli.one_of(TRAIN_PARAMS),
        help="xattn: cross-attention; kv: its keys and values; v: its values; noxattn: all but "
             "it, the time embedding and conv_out; full: the whole UNet; embedding: the concept's "
             "words (default: the method's; sdd: xattn)")
    add("--latents", **cli.one_of(["teacher", "student", "original"]),
        help="which model samples z_t (default: the method's; sdd: teacher)")
    add("--keep", nargs="+", metavar="PROMPT",
        help="prompts, or a file with one per line, that --preserve holds too (default: none). "
             "Methods without training: prompts whose keys and values stay (toy model: its words)")
    add("--quantile", type=cli.finite, default=0.0, metavar="Q",
        help="all-but-one: use the erasing signal above this quantile, for example 0.9, instead "
             "of the anchor (default: off)")
    add("--anchor", nargs="+", default=[], metavar="WORD",
        help="what to show instead. ablate, uce, mace, rece, speed: one word for all concepts, or "
             "one per concept; all-but-one: one word")
    add("--anchor-prompts", type=Path, metavar="FILE",
        help="ablate: one prompt per line; without --anchor the concept is a style (the shapes "
             "model has no words for this)")
    add("--prior", type=cli.finite, default=0.0, metavar="λ",
        help="ablate: add λ·|e(anchor) − n|² to the loss (authors' script: 0.25, because its "
             "own 1 is added to 4 times our loss; default: 0)")

    groups["closed"] = parser.add_argument_group("methods without training: uce, mace, rece, speed")
    add = groups["closed"].add_argument
    add("--template", nargs="+", metavar="TEXT",
        help="prompts with {} for the concept and the anchor (default: the word alone; mace and "
        "the toy models: several, see presets.py)")
    add("--states", **cli.one_of(["last", "all"]),
        help="uce, speed: use the last word of a prompt, or all tokens (default: last; uce on the "
        "toy models: all)")
    add("--ridge", type=cli.finite, metavar="λ",
        help="weight of |W − W°|² (default: uce 0.5; rece 0.5, then 0.1; speed 1; mace 1000, or "
        "nearly 0 with --keep)")

    groups["optimisation"] = parser.add_argument_group("optimisation")
    add = groups["optimisation"].add_argument
    add("--gradient-checkpointing", action="store_true",
        help="less memory, more time: compute each block again in the backward pass")
    add("--compile", action="store_true",
        help="CUDA: compile the UNet that samples z_t (torch.compile): a wait at the start, then "
             "faster iterations")
    add("--deterministic", action="store_true",
        help="CUDA: the same bits in every run, by slower kernels (on a CPU the toy models "
             "always give them)")

    groups["sampling of z_t"] = parser.add_argument_group("sampling of z_t")

    groups["output"] = parser.add_argument_group("output")
    add = groups["output"].add_argument
    add("--out", type=Path, metavar="DIR", help="output folder (default: a new one in runs/)")
    add("--resume", action="store_true",
        help="continue the run in --out, with its own arguments. These may change: "
             f"{', '.join(cli.flag(key) for key in FREE)}")
    add("--save-every", type=cli.natural, default=100, metavar="N",
        help="iterations between checkpoints; 0: only at the end (default: %(default)s)")
    add("--export-every", type=cli.natural, default=0, metavar="N",
        help="iterations between patches of student and teacher in exports/ (default: none)")
    add("--preview", nargs="+", metavar="PROMPT",
        help="preview prompts (default: the concepts and a few others)")
    add("--preview-guidance-scale", type=cli.finite, default=7.5, metavar="S",
        help="default: %(default)s")
    add("--report-to", **cli.one_of(["tensorboard"]),
        help="also write TensorBoard events into the folder tensorboard/ of the output")
    # fmt: on
    for key, (group, options, text) in FLAGS.items():
        paper, toy = PRESETS["paper"][key], PRESETS["toy"][key]
        default = f"{paper}" if paper == toy else f"{paper}; toy model: {toy}"
        groups[group].add_argument(cli.flag(key), help=f"{text} (default: {default})", **options)
    cli.add_common_arguments(parser)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------ the command
def main(args):
    """The whole command, from top to bottom: load, loop, save."""
    out, a = open_run(args)
    device = cli.pick_device(a.device)
    dtype = cli.pick_dtype(a.dtype, device, training=True)
    if a.report_to:
        require_tensorboard()
    if a.deterministic:
        cli.use_deterministic_algorithms()
    with lock_folder(out):
        if not args.resume:
            cli.refuse_used(out, "; or use --resume to continue the run in it")

        # ---- load: student, teacher and original share every tensor that is not trained
        model = weights.load(a.model, a.revision)
        check_prompts(model, a, args.resume or args.preview is not None)
        models, theta, theta_ema = three_models(model, a, device, dtype)
        student, teacher, original = models
        c = encode_all(student, a)
        scheduler = make_scheduler(model.scheduler, a.steps, "ddim")
        generator = torch.Generator("cpu").manual_seed(a.seed)
        optimizer = make_optimizer(theta, a)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

        # ---- the loss L, and the terms that are added to it
        loss, terms, adversary = METHODS[a.method].loss, [], None
        if a.loss:
            loss = own_loss(a.loss, out / runs.OWN_LOSS)
        if loss:
            loss = partial(loss, erase_scale=a.erase_scale, quantile=a.quantile)
            loss = graphed(loss, theta, a, device, dtype)
        if a.adversary:
            adversary = Adversary(student, a.concept, a.batch_size, a.adversary, generator)
            terms.append(adversary.term(loss))
        if a.preserve:
            terms.append(losses.preservation_term(a.preserve, c.kept, generator))
        if a.prior:
            terms.append(lambda **batch: a.prior * losses.prior_loss(**batch))
        if a.method in CLOSED:
            states = closed_form.states_of(student, a)
        if a.train_params == "embedding":
            ablation.mask_gradient(student.tokenizer, theta, a.concept)
        else:  # the prompts never change: free the text encoder
            models = [model._replace(text_encoder=None) for model in models]
            student, teacher, original = models
            del model

        # ---- write the run's settings, or continue where its checkpoint ends
        if not args.resume:
            write_run(out, a)
        state = State(out, a, theta, theta_ema, optimizer, scaler, generator, adversary)
        start, began = state.load(), time.monotonic()
        if args.resume and "model" in args.given:  # it has moved, and is the same
            runs.add(out / "run.json", args=vars(a))
        previews = Previews(out, a, models, c, device, dtype)
        reporter = Reporter(out, a.report_to, start)

        # ---- the loop: Algorithm 1, or the rounds of a closed form
        unet = latents = None
        if a.method in CLOSED:
            loop = closed_form.rounds(a, theta, theta_ema, original.unet, states, start)
        else:
            if a.latents == "anchor":
                latents = ablation.noised_images(
                    out, a, original, student, c, scheduler, generator, dtype
                )
            else:  # the model that samples z_t
                sampler = dict(teacher=teacher, student=student, original=original)[a.latents]
                unet = InferenceUNet(sampler.unet, device, dtype, a.compile)
            loop = sdd(
                student.unet,
                unet,
                original.unet,
                optimizer,
                list(theta_ema.values()),
                scheduler,
                Prompts(c.c_0, c.concepts, c.joined, c.anchors),
                (a.batch_size, *latent_shape(student)),
                generator,
                rates=learning_rates(a.iters, a.lr, a.warmup, a.lr_schedule, start),
                loss=loss,
                terms=terms,
                latents=latents,
                s_g=a.guidance_scale,
                m=a.ema,
                roles=a.roles,
                step=partial(adamw_step, max_grad_norm=a.max_grad_norm, scaler=scaler),
            )
        with cli.autocast(device, dtype):
            if a.preview_every and start == 0:
                previews.save(0)
                reporter.log_previews()
            bar = tqdm(loop, total=a.iters, initial=start, unit="it", smoothing=0, disable=None)
            with (
                bar,
                runs.deferred_interrupts() as stopped,
                runs.open_log(out / "log.csv", LOG_COLUMNS) as log,
            ):
                for it in bar:
                    done = it.i + 1
                    row = dict(iteration=it.i, loss=it.loss, lr=it.lr, grad_norm=it.grad_norm)
                    row |= dict(k=it.k, concept=a.concept[it.j])
                    if due(done, a.preview_every) or (a.preview_every and done == a.iters):
                        row |= previews.measure()
                        if done < a.iters:
                            row["flat"] = previews.save(done)
                    log.writerow(row)
                    reporter.log_row(row)
                    bar.set_postfix(runs.progress_figures(it, device), refresh=False)
                    if due(done, a.export_every):
                        state.export(f"exports/student-{done:06d}.safetensors", theta)
                        state.export(f"exports/teacher-{done:06d}.safetensors", theta_ema)
                    if stopped or done == a.iters or due(done, a.save_every):
                        state.save(done)
                    if stopped:
                        raise KeyboardInterrupt(
                            f"{done} of {a.iters} iterations are saved. To continue: "
                            f"python train.py --resume --out {out}"
                        )
                    if unet:
                        unet.sync()  # copy the new weights before the next z_t

            # ---- save the result, show it
            seconds = time.monotonic() - began
            output = METHODS[a.method].output
            state.export("erased.safetensors", theta_ema if output == "teacher" else theta)
            if start < a.iters:
                time_of = dict(iterations=a.iters - start, seconds=round(seconds))
                runs.add(out / "run.json", training=time_of)
            if a.preview_every:
                previews.finish(output)
        reporter.log_previews()
    print(
        f"{a.iters - start} iterations in {seconds:.0f} s, previews included. "
        f"Trained to forget: {', '.join(a.concept)}\n"
        f"weights: {out / 'erased.safetensors'}\n"
        f"open this page in a browser: {out / 'index.html'}"
    )


# ------------------------------------------------------------------------ a new run, or an old one
def open_run(args):
    """(output folder, its settings): settled arguments, or with --resume those of the run in it."""
    args.model = weights.absolute(args.model)
    if args.resume:
        settings = runs.resumed(args, FREE, settle)
        presets.check_device(settings)
        return args.out, Namespace(**settings)
    settings = settle(args)
    if args.out is None:
        args.out = numbered_folder("runs", "-".join(settings["concept"]))
    return args.out, Namespace(**settings)


def write_run(out, a):
    """Writes run.json, and the run's copy of a loss of the user's own."""
    if a.loss:
        with atomic_write(out / runs.OWN_LOSS) as temporary:
            temporary.write_bytes(loss_file(a.loss).read_bytes())
    settings = vars(a)
    world = worlds.of(a.model) if a.model in weights.TOYS else None
    content = runs.description(settings)
    content["preview_seeds"] = list(preview_seeds(settings))
    content["preview_kinds"] = preview_kinds(settings, world)
    runs.write_json(out / "run.json", content)


# ------------------------------------------------------------------------------------- the models
def three_models(model, a, device, dtype):
    """([student, teacher, original], θ, θ*) on `device`, with frozen tensors in `dtype`.

    θ and θ* are {name: parameter} in float32. The models share every tensor that is not trained.
    The student is `model` itself, so its tensors move. On CUDA, norms stay in float32.
    """
    parts = (model.unet, model.text_encoder)
    trained = TRAIN_PARAMS[a.train_params]
    theta = {name: p for part in parts for name, p in part.named_parameters() if trained(name)}
    for name, p in model.unet.named_parameters():
        # CUDA's autocast computes norms in float32 and would cast their weights each time.
        keep_float32 = name in theta or (device.type == "cuda" and "norm" in name)
        p.data = p.data.to(device, torch.float32 if keep_float32 else dtype)
    if device.type != "mps":  # faster on a CPU and on an H100 (docs/benchmarks.md)
        model.unet.to(memory_format=torch.channels_last)
    model.text_encoder.to(device)
    if a.preview_every:  # only previews decode latents
        model.vae.to(device)

    def copy():
        unet, text_encoder = (
            ema.copy_trained(part, [name for name, _ in part.named_parameters() if name in theta])
            for part in parts
        )
        return model._replace(unet=unet, text_encoder=text_encoder)

    teacher, original = copy(), copy()
    if a.gradient_checkpointing:
        checkpoint_blocks(model.unet)
    averages = dict(teacher.unet.named_parameters()) | dict(teacher.text_encoder.named_parameters())
    theta = {name: p.requires_grad_() for name, p in theta.items()}
    theta_ema = {name: averages[name] for name in theta}
    print(
        f"training {len(theta)} tensors, {sum(p.numel() for p in theta.values()):,} parameters, on "
        f"{device} (frozen tensors: {str(dtype).removeprefix('torch.')})"
    )
    return [model, teacher, original], theta, theta_ema


class Encoded(NamedTuple):
    """Embeddings of the run's prompts, each (n, 77, D). They never change, so it is done once."""

    c_0: torch.Tensor  # the empty prompt, n = 1
    joined: torch.Tensor  # all concepts joined, n = 1
    concepts: torch.Tensor  # n = K
    kept: torch.Tensor  # --keep
    previews: torch.Tensor
    anchors: torch.Tensor  # Ablating Concepts: the anchor's prompts; others: --anchor, n = 1
    targets: torch.Tensor  # Ablating Concepts: the anchor's prompts with the concept in its place


def encode_all(model, a):
    anchors, targets = [", ".join(a.anchor)], []
    if a.latents == "anchor":
        _, anchors, targets = zip(*ablation.pairs_of(a))
    texts = ("", ", ".join(a.concept), a.concept, a.keep, a.preview, anchors, targets)
    return Encoded(*encode_prompts(model, *texts))


def make_optimizer(theta, a):
    decay = a.weight_decay
    if TOKEN_EMBEDDING in theta:
        decay = 0.0  # it would shrink the rows of words that are not trained
    return torch.optim.AdamW(theta.values(), a.lr, betas=(0.9, 0.999), weight_decay=decay)


# ------------------------------------------------------------------------------ files of the loop
class State:
    """What a checkpoint holds: the run as it is between two iterations."""

    def __init__(self, out, a, theta, theta_ema, optimizer, scaler, generator, adversary):
        self.out, self.a = out, a
        self.optimizer, self.scaler, self.generator = optimizer, scaler, generator
        self.groups = {"student": theta, "teacher": theta_ema}
        if adversary:
            self.groups["adversary"] = {"words": adversary.words}
        self.fingerprint = weights.fingerprint(theta)  # of the model as it was loaded

    def save(self, done):
        groups = self.groups | {"generator": {"state": self.generator.get_state()}}
        metadata = {"iterations": str(done), "base_fingerprint": self.fingerprint}
        if self.scaler.is_enabled():
            metadata["scaler"] = json.dumps(self.scaler.state_dict())
        weights.save_checkpoint(
            self.out / "checkpoint.safetensors", groups, self.optimizer, metadata
        )

    def load(self):
        """Reads the checkpoint, if there is one, and removes rows of log.csv that are newer.

        Returns the number of iterations that are done.
        """
        file, done = self.out / "checkpoint.safetensors", 0
        if file.exists():
            groups = self.groups | {"generator": {"state": self.generator.get_state()}}
            metadata = weights.load_checkpoint(file, groups, self.optimizer)  # in place
            if metadata["base_fingerprint"] != self.fingerprint:
                raise UserError(
                    f"The weights of {self.a.model} have changed since the run in {self.out} "
                    "began, so it cannot continue: restore them, or start a new run."
                )
            done = int(metadata["iterations"])
            self.generator.set_state(groups["generator"]["state"])
            if self.scaler.is_enabled() and "scaler" in metadata:
                self.scaler.load_state_dict(json.loads(metadata["scaler"]))
        runs.cut_log(self.out / "log.csv", done)
        return done

    def export(self, file, tensors):
        """Writes a patch: the trained tensors, with what made them."""
        metadata = {
            "model": self.a.model,
            "concepts": ", ".join(self.a.concept),
            "method": self.a.method,
            "base_fingerprint": self.fingerprint,
            "args": json.dumps(vars(self.a)),
            "versions": json.dumps(runs.VERSIONS),
            "sha256": checksum(tensors),
        }
        weights.save(self.out / file, tensors, metadata)


def due(done, every):
    return every > 0 and done % every == 0


if __name__ == "__main__":
    advice = "to continue: python train.py --resume --out {out}"
    sys.exit(cli.run_command(main, parse(), advice))
