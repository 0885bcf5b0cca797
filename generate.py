"""Generates images from text.

    python generate.py "a red star on sand" --model toy
    python generate.py "a red star" "a moon" --patch runs/0001-star/erased.safetensors none

The output folder receives one PNG per image, prompts.jsonl (prompt and seed of each file) and
grid.png (side by side, at most 12 images per prompt and patch). Image n of a prompt starts from
noise of its own, seeded with seed + n on the CPU. So a seed means the same noise at any batch size
and on any device, and the same image but for rounding.
"""

import support.openmp

import json
import sys
from pathlib import Path

import weights
from guidance import GUIDANCE
from pipeline import (
    avoided_prompts,
    check_warmup,
    encode_prompts,
    images,
    make_scheduler,
    patched,
    with_word,
    without_prompt,
)
from scheduler import SAMPLERS
from support import cli
from support.errors import UserError
from support.files import lock_folder, numbered_folder, write_text
from support.images import grid, save_png
from support.nudity import censoring

LONGEST_LABEL = 40  # characters of a prompt in grid.png
COLUMNS = 12  # images of a prompt in grid.png, per patch: more do not fit a screen, and need memory


# ------------------------------------------------------------------------------------- arguments
def parse(argv=None):
    parser = cli.Parser(description=__doc__)
    # fmt: off
    add = parser.add_argument_group("prompts and model").add_argument
    add("prompts", nargs="+", metavar="PROMPT", help="what the images should show")
    add("--model", metavar="MODEL",
        help=f"{', '.join(weights.TOYS)}, a hub id, or a folder in diffusers' layout (default: the "
        f"patch's model, else {weights.DEFAULT_MODEL})")
    add("--patch", type=cli.not_empty, nargs="+", action="extend", default=[],
        metavar="[NAME=]FILE",
        help="one or more erased.safetensors of train.py, or the word none for the untouched "
        "model, side by side")
    add("--word", type=cli.not_empty, metavar="FILE",
        help="one more word for the prompts, from a word.safetensors of attack.py or another "
        "textual-inversion file; the prompts write it as the file does, for example <star>")
    add("--negative-prompt", default="", metavar="TEXT",
        help="used instead of the empty prompt (default: empty)")

    add = parser.add_argument_group("sampling").add_argument
    add("--scheduler", **cli.one_of(SAMPLERS),
        help="sampler (default: the one in the model's config)")
    add("--steps", type=cli.positive, default=50, metavar="N",
        help="denoising steps (default: %(default)s)")
    add("--guidance-scale", type=cli.finite, default=7.5, metavar="S",
        help="how strongly the prompt guides; 1: no guidance (default: %(default)s)")
    add("--seed", type=cli.natural, default=0, metavar="N",
        help="seed of a prompt's first image (default: %(default)s)")
    add("--num-images", type=cli.positive, default=1, metavar="N",
        help="images per prompt (default: %(default)s)")
    add("--resolution", type=cli.positive, metavar="PIXELS",
        help="height and width (default: what the model was trained for; toy: 64, SD 1.4: 512)")
    add("--batch-size", type=cli.positive, default=4, metavar="B",
        help="images at once (default: %(default)s)")

    add = parser.add_argument_group("guidance away from a concept, without training").add_argument
    add("--guidance", **cli.one_of(GUIDANCE), default="sd",
        help="how to move away from --avoid; sd: not at all (default: %(default)s)")
    add("--avoid", nargs="+", default=[], metavar="CONCEPT",
        help="what to move away from; sega handles several one by one")
    add("--guidance-warmup", type=cli.natural, metavar="N",
        help="sld, sega: evaluations before the method acts (default: its paper's, for 50 steps)")

    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="DIR", help="output folder (default: a new one in images/)")
    # fmt: on
    cli.add_common_arguments(parser)
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------- the command
def generate(args):
    check_guidance(args)
    patches = one_file_each(args.patch)
    model_name = weights.choose_model(args.model, [file for file in patches.values() if file])
    args.out = args.out or numbered_folder("images", args.prompts[0])
    with lock_folder(args.out):
        cli.refuse_used(args.out)
        device = cli.pick_device(args.device)
        dtype = cli.pick_dtype(args.dtype, device)
        model = weights.load(model_name, args.revision, args.scheduler is None)
        scheduler = make_scheduler(model.scheduler, args.steps, args.scheduler)
        check_warmup(args.guidance, args.guidance_warmup, scheduler)
        concepts = {}  # of each patch; a bad patch ends the command before the first image
        for name, patch in patches.items():
            with patched(model, patch) as metadata:
                concepts[name] = metadata.get("concepts", "")
        censor = censoring([*args.prompts, *args.avoid, *concepts.values()], args.show_uncensored)
        model.vae.to(device)
        model.text_encoder.to(device)

        how = dict(scheduler=scheduler, dtype=dtype, size=args.resolution)
        how |= dict(guidance=args.guidance, warmup=args.guidance_warmup)
        how |= dict(guidance_scale=args.guidance_scale, batch_size=args.batch_size)
        rows = [[] for _ in args.prompts]  # of grid.png
        lines = []  # of prompts.jsonl
        for name, patch in patches.items():
            folder = Path(name) if len(patches) > 1 else Path()
            about = {
                "model": model.name,
                "patch": f"{patch} ({concepts[name]})" if patch else "none",
            }
            if args.avoid:
                about |= {"guidance": args.guidance, "avoid": "; ".join(args.avoid)}
            made = images_of(model, patch, name, args, how)
            for number, (prompt, seed, image) in enumerate(made):
                file = folder / f"{number:05d}.png"
                save_png(image, args.out / file, prompt=prompt, seed=seed, **about)
                lines.append({"file": file.as_posix(), "prompt": prompt, "seed": seed})
                if number % args.num_images < COLUMNS:
                    rows[number // args.num_images].append(censor(image))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(args.out / "prompts.jsonl", text)
        save_png(make_grid(rows, args, patches), args.out / "grid.png")
    shown = "" if args.num_images <= COLUMNS else f"the first {COLUMNS} of each prompt "
    print(f"{len(lines)} images in {args.out}, {shown}side by side in {args.out / 'grid.png'}")


def check_guidance(args):
    """Rejects arguments that cannot work together, before anything is loaded."""
    avoided_prompts(args.guidance, args.avoid)
    if args.guidance == "neg" and args.negative_prompt:
        raise UserError(
            "--guidance neg uses --avoid in place of --negative-prompt: give only one of them."
        )
    key = {"neg": "avoid", "sd": "negative_prompt"}.get(args.guidance)
    if args.guidance_scale == 1 and key and getattr(args, key):
        cli.refuse_unused([key], "with --guidance-scale 1", ", or use another scale")


def one_file_each(given):
    """--patch -> {name of a column and folder: file}; the file is None for the untouched model."""
    patches = {}
    for name, files in weights.named_patches(given or ["none"]).items():
        folder = name.replace("/", "-")
        if len(files) > 1 or folder in patches:
            raise UserError(
                f"Two patches would both be called {folder}: name one of them, --patch NAME=FILE."
            )
        patches[folder] = files[0] if files else None
    return patches


def images_of(model, patch, name, args, how):
    """Yields (prompt, seed, image) for each prompt and each of its seeds, with a patch or None.

    how: the arguments of `images` that all of them share.
    """
    avoid = avoided_prompts(args.guidance, args.avoid)
    jobs = [(prompt, args.seed + n) for prompt in args.prompts for n in range(args.num_images)]
    with patched(model, patch):
        model, word = with_word(model, args.word)
        read = " ".join([*args.prompts, *args.avoid, args.negative_prompt])
        if word and word.lower() not in read.lower():
            raise UserError(
                f"No prompt contains the word {word!r} of {args.word}: write it into one."
            )
        c_0, c_p, c_S = encode_prompts(model, args.negative_prompt, args.prompts, avoid)
        c_0 = c_0 if args.negative_prompt else without_prompt(model, c_0)
        c_p = c_p.repeat_interleave(args.num_images, 0)
        seeds = [seed for _, seed in jobs]
        made = images(model, c_p, seeds, negative=c_0, avoid=c_S, bar=name, **how)
        for job, image in zip(jobs, made):
            yield *job, image


def make_grid(rows, args, patches):
    """grid.png: one row per prompt; with several patches, a column's name is its patch's."""
    cut = LONGEST_LABEL - 1
    labels = [text if len(text) <= cut + 1 else f"{text[:cut]}…" for text in args.prompts]
    columns = []
    if len(patches) > 1:
        for name in patches:
            columns += [name] * min(args.num_images, COLUMNS)
    return grid(rows, labels, columns)


if __name__ == "__main__":
    sys.exit(cli.run_command(generate, parse()))
