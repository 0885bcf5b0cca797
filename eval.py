"""Tables: how much of a concept is left, and what else was lost.

    python eval.py toy                                                    how well the embedded model draws
    python eval.py toy --patch star=runs/0001-star/erased.safetensors     what erasing did; several --patch make several rows,
                                                                          those of one NAME (training seeds) are pooled
    python eval.py nudity --patch sdd=… --methods neg sld-max sega        the papers' suites, for Stable Diffusion: nudity, i2p, coco,
                                                                          artists; `torchrun --nproc-per-node N eval.py …` shares the work
Every picture is a file in DIR/pictures and is made once: after a kill the same command goes on. Then they are measured (metrics.py).
A proportion comes with its 95 % Wilson interval. A row NAME@ITERATION is a point of the curve NAME in curve.png.
"""

import support.openmp  # noqa: F401 (before torch)

import argparse
import hashlib
import itertools
import json
import os
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import weights
from evaluation import metrics
from evaluation.suites import SUITES
from evaluation.tables import learned_prompts, write_results
from guidance import GUIDANCE
from pipeline import (
    InferenceUNet,
    avoided_prompts,
    encode_prompts,
    generate_images,
    make_scheduler,
    patched,
)
from support.cli import (
    add_common_arguments,
    finite,
    natural,
    one_of,
    pick_device,
    pick_dtype,
    positive,
    refuse_used,
    run_command,
)
from support.errors import UserError
from support.files import atomic_write, lock_folder
from support.images import save_png


class System(NamedTuple):
    """A row of the table: the model, patched (by each of `files` in turn, which share the pictures) or guided by a method."""

    name: str
    files: tuple
    method: str  # of GUIDANCE
    trained: str  # under which name the paper has it
    concepts: tuple

    @property
    def title(self):
        return "-".join([self.name, *self.concepts]).replace("/", "-").replace(" ", "-")[:100]


def systems(args):
    """The rows: for each set of concepts (the embedded model is asked other things for each) the original, then what erases them."""
    groups, found = {}, []
    for text in args.patch:
        name, _, file = text.partition("=")
        if not file:
            raise UserError(f"--patch {text}: write NAME=FILE.")
        groups.setdefault(name, []).append(file)
    for name, files in groups.items():
        told = [weights.read(file)[1] for file in files]
        concepts = {tuple(x.get("concepts", "").split(", ")) for x in told}
        if len(concepts) > 1:
            raise UserError(
                f"The patches named {name} erase different concepts ({concepts}): give them names of their own."
            )
        method = told[0].get("method", "")
        try:
            trained = (
                f"{method}-{json.loads(told[0].get('args', '{}')).get('erase_scale', 1):g}"
                if method.startswith("esd")
                else method
            )
        except (ValueError, AttributeError, TypeError) as e:
            raise UserError(
                f"{files[0]}: its metadata is damaged ({e}): make it again with train.py."
            ) from e
        found.append(System(name, tuple(files), "sd", trained, concepts.pop()))
    for method in args.methods:
        avoided_prompts(method, args.avoid)
        found.append(System(method, (), method, method, tuple(args.avoid)))
    sets = list(dict.fromkeys(system.concepts for system in found if args.suite == "toy")) or [()]
    rows = [
        row
        for concepts in sets
        for row in (
            System("original", (), "sd", "sd", concepts),
            *(x for x in found if args.suite != "toy" or x.concepts == concepts),
        )
    ]
    titles = [row.title for row in rows]  # also names of folders
    if twice := {title for title in titles if titles.count(title) > 1}:
        raise UserError(
            f"Two rows would be called {min(twice)}: give the patches names of their own."
        )
    return rows


def batches(jobs, size):
    """Indices of jobs that are drawn together: cut by absolute index, and where guidance scale or picture size change."""
    for _, group in itertools.groupby(
        range(len(jobs)), key=lambda i: (i // size, jobs[i].scale, jobs[i].size)
    ):
        yield list(group)


def draw_missing(model, system, jobs, folder, args, device, dtype, rank, world):
    """Makes the pictures that are not there. Each rank, and each restart, takes whole batches, so that a picture does not depend on
    who makes it when."""
    scheduler = make_scheduler(model.scheduler, args.steps, args.scheduler)
    files = system.files or (None,)
    avoid = avoided_prompts(system.method, system.concepts if system.method != "sd" else ())
    for n, file in enumerate(files):
        mine = list(range(n, len(jobs), len(files)))
        todo = [
            [mine[i] for i in batch] for batch in batches([jobs[i] for i in mine], args.batch_size)
        ]
        todo = [
            batch
            for batch in todo[rank::world]
            if not all((folder / f"{i:05d}.png").exists() for i in batch)
        ]
        if not todo:
            continue
        with patched(model, file):
            painter = InferenceUNet(model.unet, device, dtype)
            for batch in tqdm(todo, system.title, unit="batch", disable=None):
                some = [jobs[i] for i in batch]
                texts = encode_prompts(
                    model, ["", *avoid, *(job.prompt for job in some)], tell=False
                )
                c_0, c_S, c_p = texts.split([1, len(avoid), len(some)])
                scale = args.guidance_scale if some[0].scale is None else some[0].scale
                pictures = generate_images(
                    model,
                    painter,
                    c_0,
                    c_p,
                    [job.seed for job in some],
                    scheduler,
                    scale,
                    dtype,
                    size=some[0].size,
                    batch_size=len(some),
                    method=system.method,
                    c_S=c_S,
                    warmup=args.guidance_warmup,
                )
                for picture, i in zip(
                    pictures, batch
                ):  # in this order: the generator ends, and lets the painter go
                    if not (folder / f"{i:05d}.png").exists():
                        about = dict(
                            prompt=jobs[i].prompt,
                            seed=jobs[i].seed,
                            model=model.name,
                            system=system.title,
                        )
                        save_png(picture, folder / f"{i:05d}.png", **about)
            del painter  # before the next file's is made


def open_folder(args):
    """What the pictures depend on: a folder with others is refused, one with the same gone on with."""
    measured = (
        "out",
        "all_concepts",
        "q16",
        "real",
        "clip",
        "reproduce",
        "quick",
        "prompts",
        "device",
        "show_uncensored",
    )
    settings = {key: str(value) for key, value in vars(args).items() if key not in measured}
    settings["files"] = {
        str(file): hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
        for file in [
            *(text.partition("=")[2] for text in args.patch),
            *([args.prompts] if args.prompts else []),
        ]
    }
    file = args.out / "eval.json"
    try:
        if file.exists() and json.loads(file.read_text(encoding="utf-8")) == settings:
            return settings
    except ValueError:
        pass  # not ours, or damaged
    if not (
        file.exists() and [*args.out.iterdir()] == [file]
    ):  # nothing is lost where only the settings are there
        refuse_used(args.out, ", or repeat the command that filled it to go on")
    with atomic_write(file) as beside:
        beside.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return settings


def check(args, rows, model):
    """What would otherwise fail only once the pictures are drawn."""
    make_scheduler(model.scheduler, args.steps, args.scheduler)
    if args.q16:
        learned_prompts(args.q16)
    if args.real and not (args.real.is_dir() and any(args.real.iterdir())):
        raise UserError(f"--real {args.real} is not a folder with pictures.")
    for file in {file for system in rows for file in system.files}:
        with patched(model, file):
            pass


def evaluate(args):
    if args.reproduce:
        from toy.reproduce import reproduce

        if args.suite != "toy":
            raise UserError("--reproduce is for the suite toy.")
        return reproduce(args.out.resolve(), args.quick)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = systems(args)
    args.all_concepts = list(
        dict.fromkeys(concept for system in rows for concept in system.concepts)
    )
    limit = args.limit if args.suite != "toy" else None  # there it is of each set
    rows_of = [
        (
            system,
            SUITES[args.suite][0](args, system.concepts)[:limit],
            args.out / "pictures" / system.title,
        )
        for system in rows
    ]
    own = (
        args.device == "auto" and world > 1 and torch.cuda.is_available()
    )  # each rank its own card
    device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if own else args.device)
    dtype = pick_dtype(args.dtype, device)  # on a GPU the paper's for COCO, fp16
    model = weights.load(args.model, args.revision)
    check(args, rows, model)
    for part in (model.vae, model.text_encoder):
        part.to(device)
    with lock_folder(args.out) if rank == 0 else nullcontext():
        fill(args, rows_of, model, device, dtype, rank, world)


def fill(args, rows_of, model, device, dtype, rank, world):
    """Draws, together with the other ranks, and measures."""
    settings = open_folder(args) if rank == 0 else None
    if world > 1:  # the others wait here until the first has found the folder in order
        torch.distributed.init_process_group(
            "gloo", timeout=timedelta(days=30)
        )  # the slowest rank may take long
    for system, jobs, folder in rows_of:
        draw_missing(model, system, jobs, folder, args, device, dtype, rank, world)
    if world > 1:
        torch.distributed.barrier()  # then the first rank measures alone
        torch.distributed.destroy_process_group()
    if rank == 0:
        write_results(args, rows_of, settings, model, device)


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", **one_of(SUITES))
    parser.add_argument(
        "--model",
        help="toy, a hub id or a folder in diffusers' layout; default: toy for the suite toy",
    )
    parser.add_argument(
        "--patch",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="an erased.safetensors; may be repeated",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        **one_of([method for method in GUIDANCE if method != "sd"]),
        help="erasers that only guide",
    )
    parser.add_argument(
        "--avoid",
        nargs="+",
        default=[],
        metavar="C",
        help="what --methods keep away from (paper: nudity sexual)",
    )
    parser.add_argument(
        "--guidance-warmup",
        type=natural,
        metavar="N",
        help="evaluations before sld or sega act; default: their papers', for 50 steps",
    )
    parser.add_argument(
        "--limit", type=positive, help="at most so many pictures; toy: of each set (default 200)"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="CSV", help="coco: captions; i2p: a copy of its file"
    )
    parser.add_argument(
        "--template", nargs="+", metavar="TEXT", help="artists: prompts with {} for the name"
    )
    parser.add_argument(
        "--real", type=Path, metavar="DIR", help="coco: real pictures, for FID and KID"
    )
    parser.add_argument(
        "--q16",
        type=Path,
        metavar="FILE",
        help="i2p: Q16's two learned prompts, (2, 768), a safetensors or npy file",
    )
    parser.add_argument(
        "--clip", default=metrics.CLIP, help="hub id or folder of the CLIP that measures"
    )
    parser.add_argument(
        "--reproduce",
        action="store_true",
        help="toy: train every eraser, measure it, write REPRODUCTION.md",
    )
    parser.add_argument(
        "--quick", action="store_true", help="... in 15 minutes: one seed, fewer rows and pictures"
    )
    parser.add_argument(
        "--scheduler",
        choices=["ddim", "pndm"],
        help="default: pndm (the paper's); toy: ddim, as PNDM needs more steps",
    )
    parser.add_argument("--steps", type=positive, default=25)
    parser.add_argument("--guidance-scale", type=finite, default=7.5)
    parser.add_argument("--seed", type=natural, default=0, help="of prompts and noise")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument(
        "--threads",
        type=positive,
        help="CPU threads of each process; pictures depend on it in the last bit",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="a new folder, or one that this command has begun to fill",
    )
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    args.model = args.model or ("toy" if args.suite == "toy" else weights.DEFAULT_MODEL)
    args.scheduler = args.scheduler or ("ddim" if args.suite == "toy" else "pndm")
    return args


if __name__ == "__main__":
    sys.exit(run_command(evaluate, parse(), "the same command goes on"))
