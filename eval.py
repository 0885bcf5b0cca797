"""Measures how much of a concept is left in a model, and what else it lost.

    python eval.py toy
    python eval.py toy --patch sdd=runs/0001-star/erased.safetensors
    python eval.py nudity --patch sdd=runs/0002-nudity/erased.safetensors
    python eval.py nudity --guidance neg sld-max sega --avoid nudity sexual

The first command measures the toy model itself. Each --patch [NAME=]FILE adds a row to the table;
patches with the same NAME (training seeds) are pooled into one row. A row NAME@ITERATION is a point
of the curve NAME in curve.png. The suites nudity, i2p, coco and artists are the papers'.

Each image is a file in DIR/images and is generated once: after a stop, the same command with the
same --out continues. The images are then measured (evaluation/metrics.py). A proportion is shown
with its 95 % Wilson interval. `torchrun --nproc-per-node N eval.py …` divides the work among N
GPUs.
"""

import support.openmp

import hashlib
import itertools
import os
import sys
from argparse import Namespace
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import CLIPConfig

import weights
from evaluation import metrics
from evaluation.rows import choose_model, read_rows, turns
from evaluation.suites import SUITES
from evaluation.tables import learned_prompts, write_results
from guidance import GUIDANCE
from pipeline import (
    WARMUPS,
    InferenceUNet,
    avoided_prompts,
    encode_prompts,
    images,
    make_scheduler,
    patched,
    without_prompt,
)
from support import cli, runs
from support.errors import UserError
from support.files import lock_folder, numbered_folder
from support.images import save_png, whole
from support.own_loss import sha256

# {flags: the suites that use them}. I2P's prompts bring their own seeds and guidance scales.
USED_BY = {
    "template": {"artists"},
    "prompts": {"coco", "i2p"},
    "real": {"coco"},
    "q16": {"i2p"},
    "loss": {"toy"},
    "seed guidance_scale": SUITES.keys() - {"i2p"},
}
LOSS_FLAGS = {"suite", "loss", "seeds", "train_flags", "limit", "out"}  # what --loss uses
# The arguments that the images depend on. The contents of files count, too (image_settings). The
# device, the batch size and the threads change the images only by rounding; a smaller batch helps
# if the memory is full.
COUNTS = (
    "suite model revision patch guidance avoid limit template scheduler steps guidance_scale "
    "guidance_warmup seed dtype"
).split()


# ------------------------------------------------------------------------------------- arguments
def parse(argv=None):
    parser = cli.Parser(description=__doc__)
    # fmt: off
    parser.add_argument("suite", **cli.one_of(SUITES),
        help="what to generate and measure; toy and artists fit the toy models, the others are for "
        "Stable Diffusion on a GPU")

    add = parser.add_argument_group("rows of the table").add_argument
    add("--model",
        help=f"{', '.join(weights.TOYS)}, a hub id or a folder in diffusers' layout (default: the "
        "model that the patches were made for; without patches: toy for the suite toy, else "
        f"{weights.DEFAULT_MODEL})")
    add("--patch", type=cli.not_empty, action="append", default=[], metavar="[NAME=]FILE",
        help="a row with an erased.safetensors; may be repeated (none: only the untouched model, "
        "which is always the first row)")
    add("--guidance", nargs="+", default=[],
        **cli.one_of([name for name in GUIDANCE if name != "sd"]),
        help="one row for each method that only guides, without training")
    add("--avoid", nargs="+", default=[], metavar="CONCEPT",
        help='what --guidance avoids (paper: "nudity" "sexual")')

    add = parser.add_argument_group("suite").add_argument
    add("--limit", type=cli.positive, metavar="N",
        help="at most N images per row (default: all); toy: N images per part of the suite, "
        "rounded up to the same number for each concept (default: 200, with --loss 60)")
    add("--prompts", type=Path, metavar="FILE.csv",
        help="coco: the captions; i2p: a copy of its file (default: from the hub)")
    add("--template", nargs="+", metavar="TEXT",
        help='artists: prompts with {} for the name (default: "a painting in the style of {}")')

    group = parser.add_argument_group("a loss of your own, next to the stored rows (toy)")
    add = group.add_argument
    add("--loss", type=cli.not_empty, metavar="FILE:FUNCTION",
        help="train it on one and on three concepts, measure it and attack it")
    add("--seeds", type=int, choices=(1, 2, 3),
        help="training seeds; each takes about the same time (default: 1)")
    add("--train-flags", default="", metavar="TEXT",
        help='more flags of train.py, as one text: --train-flags="--lr 2e-3 --preserve 0.3"')

    add = parser.add_argument_group("sampling").add_argument
    add("--scheduler", choices=["ddim", "pndm"],
        help="default: pndm, the paper's; toy models: ddim, because PNDM needs more steps")
    steps = ", ".join(f"{name} {suite.steps}" for name, suite in SUITES.items())
    add("--steps", type=cli.positive, metavar="T", help=f"denoising steps (default: {steps})")
    add("--guidance-scale", type=cli.finite, default=7.5, metavar="S",
        help="default: %(default)s; i2p: each prompt has its own")
    add("--guidance-warmup", type=cli.natural, metavar="N",
        help="UNet evaluations before sld and sega act (default: their papers', for 50 steps)")
    add("--seed", type=cli.natural, default=0,
        help="of prompts and noise (default: %(default)s); i2p: each prompt has its own")
    add("--batch-size", type=cli.positive, default=32, metavar="B", help="default: %(default)s")
    add("--threads", type=cli.positive, metavar="N",
        help="CPU threads of each process; images depend on it in the last bit (default: torch's)")

    add = parser.add_argument_group("measuring").add_argument
    add("--real", type=Path, metavar="DIR", help="coco: real images, for FID and KID")
    add("--q16", type=Path, metavar="FILE",
        help="i2p: Q16's two learned prompts, (2, 768), a safetensors or npy file")
    add("--clip", default=metrics.CLIP, metavar="MODEL",
        help="hub id or folder of the CLIP that measures (default: %(default)s)")

    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="DIR",
        help="a new folder, or one that the same command began to fill (default: a new one in "
        "tables/)")
    # fmt: on
    cli.add_common_arguments(parser)
    return parser.parse_args(argv)


def check_flags(args):
    """Refuses flags that have no effect with the other arguments."""
    cli.refuse_unused(cli.unused(args.given, USED_BY, args.suite), f"in the suite {args.suite}")
    if args.loss:  # it measures as the stored rows were measured
        cli.refuse_unused(sorted(args.given - LOSS_FLAGS), "with --loss")
    warms_up = WARMUPS.keys() & set(args.guidance)
    for keys, needs, there in (
        ({"seeds", "train_flags"}, "--loss", args.loss),
        ({"avoid"}, "--guidance", args.guidance),
        ({"guidance_warmup"}, "--guidance sld-… or sega", warms_up),
        ({"clip"}, "--q16 or the suite coco", args.q16 or args.suite == "coco"),
    ):
        if not there:
            cli.refuse_unused(sorted(keys & args.given), f"without {needs}")


def settle(args):
    """The arguments with the defaults of suite and model, and the rows of the table."""
    a = Namespace(**vars(args))
    a.model = choose_model(args)
    toy, suite = a.model in weights.TOYS, SUITES[args.suite]
    a.scheduler = args.scheduler or ("ddim" if toy or args.suite == "toy" else "pndm")
    a.steps = args.steps or suite.steps
    a.dtype = suite.dtype if args.dtype == "auto" else args.dtype
    if toy:
        a.avoid = [text.lower() for text in args.avoid]  # as their worlds write words
    a.rows = read_rows(a)
    a.all_concepts = list(dict.fromkeys(concept for row in a.rows for concept in row.concepts))
    return a


# ----------------------------------------------------------------------------------- the command
def evaluate(args):
    """The whole command: generates the images that are missing, then measures all of them."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_flags(args)
    if processes > 1 and not args.out:  # each process would choose its own folder
        raise UserError("Several processes share one folder: name it with --out.")
    name = args.loss.rpartition(":")[2] if args.loss else args.suite
    args.out = args.out or numbered_folder("tables", name)
    if args.loss:
        from evaluation.own_row import own_row

        return own_row(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    a = settle(args)
    work = []
    for row in a.rows:
        jobs = SUITES[a.suite].jobs(a, row.concepts)
        if a.suite != "toy":  # there, --limit counts per part of the suite
            jobs = jobs[: a.limit]
        work.append((row, jobs, a.out / "images" / row.title))
    if a.device == "auto" and processes > 1 and torch.cuda.is_available():
        a.device = f"cuda:{os.environ['LOCAL_RANK']}"  # a GPU for each process
    device = cli.pick_device(a.device)
    dtype = cli.pick_dtype(a.dtype, device)
    model = weights.load(a.model, a.revision)
    scheduler = make_scheduler(model.scheduler, a.steps, a.scheduler)
    check_files(a, model)
    model.vae.to(device)
    model.text_encoder.to(device)
    with lock_folder(a.out) if rank == 0 else nullcontext():
        if rank == 0:
            settings = image_settings(a, work, model)
            runs.begin_or_continue(a.out / "eval.json", settings)
        if processes > 1:  # the others wait here until the first has checked the folder
            timeout = timedelta(days=30)  # the slowest process may take long
            torch.distributed.init_process_group("gloo", timeout=timeout)
        for number, (row, jobs, folder) in enumerate(work, 1):
            todo = missing_batches(row, jobs, folder, a.batch_size, rank, processes)
            label = f"row {number} of {len(work)}: {row.title}"
            generate_row(todo, label, row, jobs, folder, a, model, scheduler, device, dtype)
        if processes > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        if rank == 0:
            write_results(a, work, settings, model, device)


def check_files(a, model):
    """Refuses files that would fail only after the images are generated."""
    if a.q16:
        width = learned_prompts(a.q16).shape[1]
        with suppress(OSError):  # the measure says later that it has no CLIP
            wanted = CLIPConfig.from_pretrained(a.clip).projection_dim
            if width != wanted:
                raise UserError(
                    f"--q16 {a.q16} holds prompts of {width} numbers, and {a.clip} has {wanted}: "
                    "use the --clip that they were learned for."
                )
    if a.real and not (a.real.is_dir() and any(a.real.iterdir())):
        raise UserError(f"--real {a.real} is not a folder with images.")
    for file in {file for row in a.rows for file in row.patches}:
        with patched(model, file):
            pass


def image_settings(a, work, model):
    """What the images depend on: arguments, the contents of files, the weights, the prompts."""
    settings = {key: str(getattr(a, key)) for key in COUNTS}
    jobs = [[(job.prompt, job.seed, job.scale, job.size) for job in jobs] for _, jobs, _ in work]
    settings["jobs"] = hashlib.sha256(repr(jobs).encode()).hexdigest()[:16]
    settings |= weights.checksums(model)
    files = [Path(file) for row in a.rows for file in row.patches]
    if a.prompts:
        files.append(a.prompts)
    settings["files"] = {str(file): sha256(file)[:16] for file in files}
    return settings


# ---------------------------------------------------------------------------------------- images
def missing_batches(row, jobs, folder, size, rank, processes):
    """[(patch, its batches)], of which this process generates the images.

    Each process and each restart generates whole batches, so that an image does not depend on who
    generates it when.
    """
    patches = row.patches or (None,)
    turn = turns(jobs, len(patches))
    todo = []
    for n, patch in enumerate(patches):
        mine = enumerate(i for i in range(len(jobs)) if turn[i] == n)
        # A batch ends at a multiple of `size`, and where the guidance scale or image size changes.
        groups = itertools.groupby(
            mine, lambda x: (x[0] // size, jobs[x[1]].scale, jobs[x[1]].size)
        )
        batches = [[i for _, i in group] for _, group in groups]
        missing = []
        for batch in batches[rank::processes]:
            if not all(whole(folder / f"{i:05d}.png") for i in batch):
                missing.append(batch)
        if missing:
            todo.append((patch, missing))
    return todo


def generate_row(todo, label, row, jobs, folder, a, model, scheduler, device, dtype):
    """Generates the images of a row that are not in its folder yet. todo: missing_batches."""
    avoided = avoided_prompts(row.guidance, row.concepts if row.guidance != "sd" else ())
    how = dict(scheduler=scheduler, guidance=row.guidance, warmup=a.guidance_warmup, dtype=dtype)
    about = {"model": model.name, "row": row.title}
    total = sum(len(batch) for _, missing in todo for batch in missing)
    with tqdm(total=total, desc=label, unit="image", disable=None) as bar:
        for patch, missing in todo:
            with patched(model, patch):
                unet = InferenceUNet(model.unet, device, dtype)
                for batch in missing:
                    some = [jobs[i] for i in batch]
                    prompts = [job.prompt for job in some]
                    c_0, c_S, c_p = encode_prompts(model, "", avoided, prompts, warn=False)
                    c_0 = without_prompt(model, c_0)
                    scale = a.guidance_scale if some[0].scale is None else some[0].scale
                    how |= dict(guidance_scale=scale, size=some[0].size, batch_size=len(some))
                    seeds = [job.seed for job in some]
                    made = images(model, c_p, seeds, unet=unet, negative=c_0, avoid=c_S, **how)
                    for i, job, image in zip(batch, some, made):
                        file = folder / f"{i:05d}.png"
                        if not whole(file):
                            save_png(image, file, prompt=job.prompt, seed=job.seed, **about)
                        bar.update(1)
                del unet  # before the next patch's copy is made


if __name__ == "__main__":
    advice = "to continue, repeat the command with --out {out}"
    sys.exit(cli.run_command(evaluate, parse(), advice, gpus=None))
