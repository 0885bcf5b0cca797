"""Generates images from text.

    python generate.py "a red star on sand" --model toy
    python generate.py "a red star" "a moon" --patch runs/0001-star/erased.safetensors none

The output folder receives one PNG per image, prompts.jsonl (prompt and seed of each file) and
grid.png (side by side, at most 12 images per prompt and patch). Image n of a prompt starts from
noise of its own, seeded with seed + n on the CPU. So a seed means the same noise at any batch size
and on any device, and the same image but for rounding.
"""

import support.openmp  # noqa: F401 (before torch)

import json
import sys
from pathlib import Path

import weights
from guidance import GUIDANCE
from pipeline import (
    added_word,
    avoided_prompts,
    check_warmup,
    encode_prompts,
    images,
    make_scheduler,
    patched,
)
from scheduler import SAMPLERS
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
from support.files import lock_folder, numbered_folder, write_text
from support.images import grid, save_png
from support.nudity import censoring

LONGEST_LABEL = 40  # characters of a prompt in grid.png
COLUMNS = 12  # images of a prompt in grid.png, per patch: more do not fit a screen, and need memory


# ------------------------------------------------------------------------------------- arguments
def parse(argv=None):
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("prompts and model")
    group.add_argument("prompts", nargs="+", metavar="PROMPT", help="what the images should show")
    group.add_argument(
        "--model",
        metavar="MODEL",
        help=f"{', '.join(weights.TOYS)}, a hub id, or a folder in diffusers' layout (default: the "
        f"patch's model, else {weights.DEFAULT_MODEL})",
    )
    group.add_argument(
        "--patch",
        type=not_empty,
        nargs="+",
        default=[],
        metavar="FILE",
        help="one or more erased.safetensors of train.py, or the word none, side by side",
    )
    group.add_argument(
        "--word",
        type=not_empty,
        metavar="FILE",
        help="one more word for the prompts, from a word.safetensors of attack.py or another "
        "textual-inversion file; the prompts write it as the file does, for example <star>",
    )
    group.add_argument(
        "--negative-prompt",
        default="",
        metavar="TEXT",
        help="used instead of the empty prompt (default: empty)",
    )

    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--scheduler", **one_of(SAMPLERS), help="sampler (default: the one in the model's config)"
    )
    group.add_argument(
        "--steps",
        type=positive,
        default=50,
        metavar="N",
        help="denoising steps (default: %(default)s)",
    )
    group.add_argument(
        "--guidance-scale",
        type=finite,
        default=7.5,
        metavar="S",
        help="how strongly the prompt guides; 1: no guidance (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=natural,
        default=0,
        metavar="N",
        help="seed of a prompt's first image (default: %(default)s)",
    )
    group.add_argument(
        "--num-images",
        type=positive,
        default=1,
        metavar="N",
        help="images per prompt (default: %(default)s)",
    )
    group.add_argument(
        "--resolution",
        type=positive,
        metavar="PIXELS",
        help="height and width (default: what the model was trained for; toy: 64, SD 1.4: 512)",
    )
    group.add_argument(
        "--batch-size",
        type=positive,
        default=4,
        metavar="B",
        help="images at once (default: %(default)s)",
    )

    group = parser.add_argument_group("guidance away from a concept, without training")
    group.add_argument(
        "--method",
        **one_of(GUIDANCE),
        default="sd",
        help="how to move away from --avoid; sd: not at all (default: %(default)s)",
    )
    group.add_argument(
        "--avoid",
        nargs="+",
        default=[],
        metavar="CONCEPT",
        help="what to move away from; sega handles several one by one",
    )
    group.add_argument(
        "--guidance-warmup",
        type=natural,
        metavar="N",
        help="sld, sega: evaluations before the method acts (default: its paper's, for 50 steps)",
    )

    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", type=Path, metavar="DIR", help="output folder (default: a new one in images/)"
    )
    add_common_arguments(parser)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------ the command
def generate(args):
    check_arguments(args)
    patches = patches_by_name(args.patch)
    model_name = weights.choose_model(args.model, [file for file in patches.values() if file])
    if args.out is None:
        args.out = numbered_folder("images", args.prompts[0])
    with lock_folder(args.out):
        refuse_used(args.out)
        write_images(args, model_name, patches)


def check_arguments(args):
    """Rejects arguments that cannot work together, before anything is loaded."""
    avoided_prompts(args.method, args.avoid)
    if args.method == "neg" and args.negative_prompt:
        raise UserError(
            "--method neg uses --avoid in place of --negative-prompt: give only one of them."
        )
    unused = args.method == "neg" or (args.method == "sd" and args.negative_prompt)
    if args.guidance_scale == 1 and unused:
        flag = "--avoid" if args.method == "neg" else "--negative-prompt"
        raise UserError(f"{flag} has no effect with --guidance-scale 1: use another scale.")


def patches_by_name(files):
    """{name of a column and folder: patch}, where the patch is None for the model as it is."""
    patches = {}
    for file in files or ["none"]:
        name = "original" if file == "none" else weights.name_of_patch(file)
        if name in patches:
            raise UserError(
                f"Two patches would both be called {name}: rename a file or its folder."
            )
        patches[name] = None if file == "none" else file
    return patches


def write_images(args, model_name, patches):
    """Generates each patch's images, and writes them with grid.png and prompts.jsonl."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model = weights.load(model_name, args.revision)
    check_resolution(args.resolution, model)
    scheduler = make_scheduler(model.scheduler, args.steps, args.scheduler)
    check_warmup(args.method, args.guidance_warmup, scheduler)
    concepts = erased_concepts(model, patches)
    for part in (model.vae, model.text_encoder):
        part.to(device)
    censor = censoring([*args.prompts, *args.avoid, *concepts.values()], args.show_uncensored)

    rows = [[] for _ in args.prompts]  # of grid.png: one per prompt
    lines = []  # of prompts.jsonl
    for name, patch in patches.items():
        folder = Path(name) if len(patches) > 1 else Path()
        text = png_text(args, model, patch, concepts[name])
        made = generate_all(model, patch, name, args, scheduler, dtype)
        for number, (prompt, seed, image) in enumerate(made):
            file = folder / f"{number:05d}.png"
            save_png(image, args.out / file, prompt=prompt, seed=seed, **text)
            lines.append({"file": file.as_posix(), "prompt": prompt, "seed": seed})
            if number % args.num_images < COLUMNS:
                rows[number // args.num_images].append(censor(image))

    write_json_lines(args.out / "prompts.jsonl", lines)
    save_png(make_grid(rows, args, patches), args.out / "grid.png")
    shown = "" if args.num_images <= COLUMNS else f"the first {COLUMNS} of each prompt "
    print(f"{len(lines)} images in {args.out}, {shown}side by side in {args.out / 'grid.png'}")


def check_resolution(resolution, model):
    factor = model.vae.factor
    if resolution and resolution % factor:
        raise UserError(f"--resolution {resolution} must be a multiple of {factor} for this model.")


def erased_concepts(model, patches):
    """{name: the concepts in the patch's metadata}. Finds bad patches before the first image."""
    concepts = {}
    for name, patch in patches.items():
        with patched(model, patch) as metadata:
            concepts[name] = metadata.get("concepts", "")
    return concepts


def png_text(args, model, patch, concepts):
    """What each PNG says about its origin, in addition to prompt and seed."""
    text = {"model": model.name, "patch": f"{patch} ({concepts})" if patch else "none"}
    if args.avoid:
        text |= {"method": args.method, "avoid": "; ".join(args.avoid)}
    return text


def generate_all(model, patch, name, args, scheduler, dtype):
    """Yields (prompt, seed, image) for each prompt and each of its seeds, with a patch or None."""
    avoid = avoided_prompts(args.method, args.avoid)
    prompts, seeds = [], []
    for prompt in args.prompts:
        for n in range(args.num_images):
            prompts.append(prompt)
            seeds.append(args.seed + n)
    with patched(model, patch), added_word(model, args.word) as word:
        read = " ".join([*args.prompts, *args.avoid, args.negative_prompt])
        if word and word.lower() not in read.lower():
            raise UserError(
                f"No prompt contains the word {word!r} of {args.word}: write it into one."
            )
        c_0, c_p, c_S = encode_prompts(model, args.negative_prompt, args.prompts, avoid)
        made = images(
            model,
            c_p.repeat_interleave(args.num_images, 0),
            seeds,
            negative=c_0,
            avoid=c_S,
            scheduler=scheduler,
            guidance_scale=args.guidance_scale,
            guidance=args.method,
            warmup=args.guidance_warmup,
            size=args.resolution,
            batch_size=args.batch_size,
            dtype=dtype,
            bar=name,
        )
        yield from zip(prompts, seeds, made)


def make_grid(rows, args, patches):
    """grid.png: one row per prompt; with several patches, a column's name is its patch's."""
    labels = []
    for prompt in args.prompts:
        short = prompt[: LONGEST_LABEL - 1] + "…"
        labels.append(prompt if len(prompt) <= LONGEST_LABEL else short)
    columns = []
    if len(patches) > 1:
        for name in patches:
            columns += [name] * min(args.num_images, COLUMNS)
    return grid(rows, labels, columns)


def write_json_lines(file, records):
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_text(file, "".join(lines))


if __name__ == "__main__":
    sys.exit(run_command(generate, parse()))
