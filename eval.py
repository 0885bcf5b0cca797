"""Measures how much of a concept is left in a model, and what else it lost.

    python eval.py toy
    python eval.py toy --patch sdd=runs/0001-star/erased.safetensors
    python eval.py nudity --patch sdd=runs/0002-nudity/erased.safetensors
    python eval.py nudity --methods neg sld-max sega --avoid nudity sexual

The first command measures the toy model itself. Each --patch NAME=FILE adds a row to the table;
patches with the same NAME (training seeds) are pooled into one row. A row NAME@ITERATION is a point
of the curve NAME in curve.png. The suites nudity, i2p, coco and artists are the papers'.

Each image is a file in DIR/images and is generated once: after a stop, the same command with the
same --out continues. The images are then measured (evaluation/metrics.py). A proportion is shown
with its 95 % Wilson interval. `torchrun --nproc-per-node N eval.py …` divides the work among N
GPUs.
"""

import support.openmp  # noqa: F401 (before torch)

import hashlib
import itertools
import json
import os
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import CLIPConfig

import weights
from evaluation import metrics
from evaluation.rows import choose_model, patch_files, read_rows, turns
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
)
from support.cli import (
    Parser,
    add_common_arguments,
    finite,
    natural,
    not_empty,
    one_of,
    pick_device,
    pick_dtype,
    positive,
    refuse_used,
    run_command,
)
from support.errors import UserError
from support.files import checksum, lock_folder, numbered_folder, used_files, write_text
from support.images import save_png

SUITE_FLAGS = {  # flag: the suites that use it
    "template": ("artists",),
    "prompts": ("coco", "i2p"),
    "real": ("coco",),
    "q16": ("i2p",),
    "loss": ("toy",),
}
LOSS_FLAGS = ("suite", "loss", "seeds", "train_flags", "limit", "out")  # what --loss uses
# Arguments that may change when a command is repeated. all_concepts follows from the others.
# --prompts is compared by its contents. The device, the batch size and the threads change the
# images only by rounding; a smaller batch helps if the memory is full.
MEASURING = (
    "out",
    "all_concepts",
    "q16",
    "real",
    "clip",
    "prompts",
    "device",
    "batch_size",
    "threads",
    "show_uncensored",
)


# ---------------------------------------------------------------------------------------- arguments
def parse(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument(
        "suite",
        **one_of(SUITES),
        help="what to generate and measure; toy and artists fit the toy models, the others are for "
        "Stable Diffusion on a GPU",
    )

    group = parser.add_argument_group("rows of the table")
    group.add_argument(
        "--model",
        help=f"{', '.join(weights.TOYS)}, a hub id or a folder in diffusers' layout (default: the "
        "model that the patches were made for; without patches: toy for the suite toy, else "
        f"{weights.DEFAULT_MODEL})",
    )
    group.add_argument(
        "--patch",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a row with an erased.safetensors; may be repeated",
    )
    group.add_argument(
        "--methods",
        nargs="+",
        default=[],
        **one_of([method for method in GUIDANCE if method != "sd"]),
        help="one row for each method that only guides, without training",
    )
    group.add_argument(
        "--avoid",
        nargs="+",
        default=[],
        metavar="CONCEPT",
        help='what --methods avoid (paper: "nudity" "sexual")',
    )

    group = parser.add_argument_group("suite")
    group.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="at most N images per row (default: all); toy: N images per part of the suite, "
        "rounded up to the same number for each concept (default: 200, with --loss 60)",
    )
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.csv",
        help="coco: the captions; i2p: a copy of its file (default: from the hub)",
    )
    group.add_argument(
        "--template",
        nargs="+",
        metavar="TEXT",
        help='artists: prompts with {} for the name (default: "a painting in the style of {}")',
    )

    group = parser.add_argument_group("a loss of your own, next to the stored rows (toy)")
    group.add_argument(
        "--loss",
        type=not_empty,
        metavar="FILE:FUNCTION",
        help="train it on one and on three concepts, measure it and attack it",
    )
    group.add_argument(
        "--seeds",
        type=positive,
        metavar="N",
        help="training seeds, 1 to 3; each takes about the same time (default: 1)",
    )
    group.add_argument(
        "--train-flags",
        default="",
        metavar="TEXT",
        help='more flags of train.py, as one text: --train-flags="--lr 2e-3 --preserve 0.3"',
    )

    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--scheduler",
        choices=["ddim", "pndm"],
        help="default: pndm, the paper's; toy models: ddim, because PNDM needs more steps",
    )
    steps = ", ".join(f"{name} {suite.steps}" for name, suite in SUITES.items())
    group.add_argument(
        "--steps", type=positive, metavar="T", help=f"denoising steps (default: {steps})"
    )
    group.add_argument(
        "--guidance-scale", type=finite, default=7.5, metavar="S", help="default: %(default)s"
    )
    group.add_argument(
        "--guidance-warmup",
        type=natural,
        metavar="N",
        help="UNet evaluations before sld and sega act (default: their papers', for 50 steps)",
    )
    group.add_argument(
        "--seed", type=natural, default=0, help="of prompts and noise (default: %(default)s)"
    )
    group.add_argument(
        "--batch-size", type=positive, default=32, metavar="B", help="default: %(default)s"
    )
    group.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="CPU threads of each process; images depend on it in the last bit (default: torch's)",
    )

    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--real", type=Path, metavar="DIR", help="coco: real images, for FID and KID"
    )
    group.add_argument(
        "--q16",
        type=Path,
        metavar="FILE",
        help="i2p: Q16's two learned prompts, (2, 768), a safetensors or npy file",
    )
    group.add_argument(
        "--clip",
        default=metrics.CLIP,
        metavar="MODEL",
        help="hub id or folder of the CLIP that measures (default: %(default)s)",
    )

    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="a new folder, or one that the same command began to fill (default: a new one in "
        "tables/)",
    )
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    args.steps = args.steps or SUITES[args.suite].steps
    return args


def check_flags(args):
    """Refuses flags that have no effect with the other arguments."""
    for flag, suites in SUITE_FLAGS.items():
        if getattr(args, flag) and args.suite not in suites:
            raise UserError(
                f"--{flag} has no effect in the suite {args.suite}: remove it. It is for "
                f"{' and '.join(suites)}."
            )
    if args.clip != metrics.CLIP and args.suite != "coco" and not args.q16:
        raise UserError("--clip has no effect without --q16 or the suite coco: remove it.")
    if args.suite == "i2p":
        defaults = vars(parse(["i2p"]))
        for flag in ("seed", "guidance_scale"):
            if getattr(args, flag) != defaults[flag]:
                raise UserError(
                    f"--{flag.replace('_', '-')} has no effect in the suite i2p, whose prompts "
                    "bring their own: remove it."
                )
    if (args.seeds or args.train_flags) and not args.loss:
        raise UserError("--seeds and --train-flags have no effect without --loss: add it.")
    if args.loss:
        check_loss_flags(args)
    if args.seeds and args.seeds > 3:
        raise UserError(f"--seeds {args.seeds} is out of range (1 to 3).")
    if args.avoid and not args.methods:
        raise UserError("--avoid has no effect without --methods: add --methods or remove it.")
    warms_up = any(method in WARMUPS for method in args.methods)
    if args.guidance_warmup is not None and not warms_up:
        raise UserError("--guidance-warmup has no effect without --methods sld-… or sega.")


def check_loss_flags(args):
    """Refuses flags that --loss does not use: it measures as the stored rows were measured."""
    defaults = vars(parse(["toy"]))
    for key, value in vars(args).items():
        if key not in LOSS_FLAGS and value != defaults[key]:
            flag = key.replace("_", "-")
            raise UserError(f"--{flag} has no effect with --loss: remove it.")


def choose_out(args, processes):
    """--out; without it a new numbered folder in tables/."""
    if args.out:
        return args.out
    if processes > 1:  # each process would choose its own
        raise UserError("Several processes share one folder: name it with --out.")
    name = args.loss.rpartition(":")[2] if args.loss else args.suite
    return numbered_folder("tables", name)


def check_arguments(args, rows, model):
    """Refuses what would fail only after the images are generated."""
    make_scheduler(model.scheduler, args.steps, args.scheduler)
    if args.q16:
        check_width(args)
    if args.real and not (args.real.is_dir() and any(args.real.iterdir())):
        raise UserError(f"--real {args.real} is not a folder with images.")
    for file in {file for row in rows for file in row.patches}:
        with patched(model, file):
            pass


def check_width(args):
    """UserError if Q16's learned prompts are not as wide as CLIP's embeddings."""
    width = learned_prompts(args.q16).shape[1]
    try:
        wanted = CLIPConfig.from_pretrained(args.clip).projection_dim
    except OSError:
        return  # the measure says later that it has no CLIP
    if width != wanted:
        raise UserError(
            f"--q16 {args.q16} holds prompts of {width} numbers, and {args.clip} has {wanted}: use "
            "the --clip that they were learned for."
        )


# ---------------------------------------------------------------------------------------- folder
def image_settings(args, work, model):
    """What the images depend on: arguments, the contents of files, the weights, the prompts."""
    settings = {key: str(value) for key, value in vars(args).items() if key not in MEASURING}
    jobs = [[(job.prompt, job.seed, job.scale, job.size) for job in jobs] for _, jobs, _ in work]
    settings["jobs"] = hashlib.sha256(repr(jobs).encode()).hexdigest()[:16]
    for part in ("unet", "vae", "text_encoder"):
        settings[part] = checksum(getattr(model, part).state_dict())[:16]
    files = [file for group in patch_files(args.patch).values() for file in group]
    if args.prompts:
        files.append(args.prompts)
    settings["files"] = {
        str(file): hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for file in files
    }
    return settings


def open_folder(args, work, model):
    """Writes eval.json and returns its settings. UserError if the folder holds other images."""
    settings = image_settings(args, work, model)
    file = args.out / "eval.json"
    if read_settings(file) == settings:
        return settings
    only_settings = file.exists() and used_files(args.out) == [file]
    if not only_settings:  # else nothing is lost
        refuse_used(args.out, ", or repeat the command that filled it to continue")
    write_text(file, json.dumps(settings, indent=1))
    return settings


def read_settings(file):
    """The settings in eval.json; None if there are none, or none that can be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


# ---------------------------------------------------------------------------------------- images
def batches(jobs, size):
    """Lists of indices of jobs that are generated together.

    They are cut at multiples of `size`, and where the guidance scale or the image size changes.
    """

    def key(i):
        return i // size, jobs[i].scale, jobs[i].size

    for _, group in itertools.groupby(range(len(jobs)), key=key):
        yield list(group)


def missing_batches(jobs, folder, n, patches, args, process):
    """The batches that this process generates with patch n of `patches`: lists of indices of jobs.

    Each process and each restart generates whole batches, so that an image does not depend on who
    generates it when.
    """
    rank, processes = process
    mine = [i for i, turn in enumerate(turns(jobs, patches)) if turn == n]
    found = [[mine[i] for i in b] for b in batches([jobs[i] for i in mine], args.batch_size)]
    missing = []
    for batch in found[rank::processes]:
        if not all((folder / f"{i:05d}.png").exists() for i in batch):
            missing.append(batch)
    return missing


def generate_missing(model, row, jobs, folder, args, device, dtype, process, label):
    """Generates the images of a row that are not in its folder yet."""
    patches = row.patches or (None,)
    todo = []
    for n, patch in enumerate(patches):
        missing = missing_batches(jobs, folder, n, len(patches), args, process)
        if missing:
            todo.append((patch, missing))
    total = sum(len(batch) for _, missing in todo for batch in missing)
    with tqdm(total=total, desc=label, unit="image", disable=None) as bar:
        for patch, missing in todo:
            with patched(model, patch):
                unet = InferenceUNet(model.unet, device, dtype)
                for batch in missing:
                    generate_batch(model, unet, row, jobs, batch, folder, args, dtype)
                    bar.update(len(batch))
                del unet  # before the next patch's copy is made


def generate_batch(model, unet, row, jobs, batch, folder, args, dtype):
    """Generates the images `batch`, indices of jobs, and saves those that are not there yet."""
    some = [jobs[i] for i in batch]
    avoided = avoided_prompts(row.guidance, row.concepts if row.guidance != "sd" else ())
    prompts = [job.prompt for job in some]
    c_0, c_S, c_p = encode_prompts(model, "", avoided, prompts, warn=False)
    made = images(
        model,
        c_p,
        [job.seed for job in some],
        unet=unet,
        negative=c_0,
        avoid=c_S,
        scheduler=make_scheduler(model.scheduler, args.steps, args.scheduler),
        guidance_scale=args.guidance_scale if some[0].scale is None else some[0].scale,
        guidance=row.guidance,
        warmup=args.guidance_warmup,
        size=some[0].size,
        batch_size=len(some),
        dtype=dtype,
    )
    for image, i in zip(made, batch):
        file = folder / f"{i:05d}.png"
        if not file.exists():
            about = {
                "prompt": jobs[i].prompt,
                "seed": jobs[i].seed,
                "model": model.name,
                "row": row.title,
            }
            save_png(image, file, **about)


# ---------------------------------------------------------------------------------------- command
def evaluate(args):
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_flags(args)
    args.out = choose_out(args, processes)
    if args.loss:
        from evaluation.own_row import own_row

        return own_row(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.model = choose_model(args)
    args.scheduler = args.scheduler or choose_scheduler(args)
    if args.model in weights.TOYS:
        args.avoid = [text.lower() for text in args.avoid]  # as their worlds write words
    rows = read_rows(args)
    args.all_concepts = list(dict.fromkeys(concept for row in rows for concept in row.concepts))
    work = [(row, jobs_of(row, args), args.out / "images" / row.title) for row in rows]
    device = choose_device(args.device, processes)
    dtype = choose_dtype(args, device)
    model = weights.load(args.model, args.revision)
    check_arguments(args, rows, model)
    model.vae.to(device)
    model.text_encoder.to(device)
    with lock_folder(args.out) if rank == 0 else nullcontext():
        generate_and_measure(args, work, model, device, dtype, (rank, processes))


def jobs_of(row, args):
    """The images that a row generates. In the suite toy, --limit counts per part of the suite."""
    jobs = SUITES[args.suite].jobs(args, row.concepts)
    return jobs if args.suite == "toy" else jobs[: args.limit]


def choose_scheduler(args):
    """The default of --scheduler."""
    return "ddim" if args.suite == "toy" or args.model in weights.TOYS else "pndm"


def choose_device(name, processes):
    """--device; under torchrun, `auto` gives each process its own GPU."""
    if name == "auto" and processes > 1 and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return pick_device(name)


def choose_dtype(args, device):
    """--dtype; `auto` is the suite's, if the paper names one, else fp16 on CUDA, as for COCO."""
    return pick_dtype(SUITES[args.suite].dtype if args.dtype == "auto" else args.dtype, device)


def generate_and_measure(args, work, model, device, dtype, process):
    """Generates the images together with the other processes; then the first process measures.

    work: [(row, its jobs, the folder of its images)]. process: (rank, number of processes).
    """
    rank, processes = process
    settings = open_folder(args, work, model) if rank == 0 else None
    if processes > 1:  # the others wait here until the first has checked the folder
        timeout = timedelta(days=30)  # the slowest process may take long
        torch.distributed.init_process_group("gloo", timeout=timeout)
    for number, (row, jobs, folder) in enumerate(work, 1):
        label = f"row {number} of {len(work)}: {row.title}"
        generate_missing(model, row, jobs, folder, args, device, dtype, process, label)
    if processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0:
        write_results(args, work, settings, model, device)


if __name__ == "__main__":
    sys.exit(run_command(evaluate, parse(), "to continue, repeat the command with --out {out}"))
