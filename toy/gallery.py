"""A grid of images that a toy model generates: one row per word, one column per other word.

    python -m toy.gallery emoji gallery.png     rows: the artists, columns: twelve things
    python -m toy.gallery shapes gallery.png    rows: the colours, columns: the shapes

With --patch FILE, the erased model makes the images. All images begin from the noise of one seed.
"""

import support.openmp

import sys
from pathlib import Path

import numpy as np
import torch

import weights
from pipeline import InferenceUNet, encode_prompts, generate_images, make_scheduler, patched
from support.cli import Parser, natural, not_empty, one_of, run_command
from support.images import grid, save_png
from toy import worlds

STEPS, SCALE = 25, 7.5  # of DDIM


def prompts(world):
    """[[prompt, …] for each row]: what the grid asks for."""
    rng = np.random.default_rng(0)
    rows, columns = world.GALLERY
    return [
        [world.sentence({columns[0]: column, rows[0]: row}, rng) for column in columns[1]]
        for row in rows[1]
    ]


@torch.no_grad()
def gallery(args):
    world = worlds.WORLDS[args.world]
    rows, columns = world.GALLERY
    model = weights.load(next(name for name, of in worlds.MODELS.items() if of is world))
    asked = [text for row in prompts(world) for text in row]
    with patched(model, args.patch):
        images = list(
            generate_images(
                model,
                InferenceUNet(model.unet, torch.device("cpu"), torch.float32),
                encode_prompts(model, [""]),
                encode_prompts(model, asked),
                [args.seed] * len(asked),
                make_scheduler(model.scheduler, STEPS, "ddim"),
                SCALE,
                torch.float32,
                batch_size=len(columns[1]),
            )
        )
    width = len(columns[1])
    sheet = [images[i : i + width] for i in range(0, len(images), width)]
    save_png(grid(sheet, rows[1], columns[1]), args.file, model=model.name, seed=args.seed)
    print(f"{len(images)} images: {args.file}")


def parse(argv=None):
    parser = Parser(prog="python -m toy.gallery", description=__doc__)
    parser.add_argument("world", **one_of(sorted(worlds.WORLDS)))
    parser.add_argument("file", type=Path, metavar="FILE.png")
    parser.add_argument("--patch", type=not_empty, metavar="FILE", help="an erased.safetensors")
    parser.add_argument("--seed", type=natural, default=0, help="of the noise (default: 0)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(gallery, parse()))
