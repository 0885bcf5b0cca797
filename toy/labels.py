"""Generated images of the toy worlds with labels: what a judge of images has to get right.

    python -m toy.labels shapes      or emoji: what the probe says about them

toy/labels/ has 422 images of each world, by sound models and by models that training broke, and
half-denoised ones. They were labelled by eye, in random order, without the name of the model. A
label is the word of the thing that the image shows (emoji: "alcohol" or "other"), "nothing" if one
cannot name it, or "unsure". Images with even numbers are for the making of a judge. Those with odd
numbers are only for its final figures.
"""

import support.openmp

import csv
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from support.cli import Parser, one_of, run_command
from support.statistics import counted, in_words
from toy import suite, worlds

FOLDER = Path(__file__).parent / "labels"
COLUMNS = 20  # images in a row of the sheet


def load(world):
    """Images, uint8 (422, 64, 64, 3), and for each {"label", "model", "prompt", "seed"}."""
    with open(FOLDER / f"{world.NAME}.csv", encoding="utf-8", newline="") as f:
        about = list(csv.DictReader(f))
    sheet = np.asarray(Image.open(FOLDER / f"{world.NAME}.webp").convert("RGB"))
    rows = [np.split(row, COLUMNS, axis=1) for row in np.split(sheet, len(sheet) // world.SIZE)]
    return np.stack(sum(rows, []))[: len(about)], about


def main(args):
    world = worlds.WORLDS[args.world]
    images, about = load(world)
    images, labels = images[1::2], [row["label"] for row in about[1::2]]
    seen = [set(words) for words in zip(*suite.see(world, images).values())]
    named = {label for label in labels if label not in ("nothing", "unsure")}
    right = [
        label in words if label != "other" else named.isdisjoint(words)
        for label, words in zip(labels, seen)
        if label in named
    ]
    print(f"{len(labels)} images for final figures: {dict(Counter(labels).most_common())}")
    print(f"a thing, and the probe is right: {in_words(counted(sum(right), len(right)))}")
    nothing = [words for label, words in zip(labels, seen) if label == "nothing"]
    for word in sorted(named - {"other"}):
        hits = counted(sum(word in words for words in nothing), len(nothing))
        print(f"nothing, and the probe sees {word}: {in_words(hits)}")


if __name__ == "__main__":
    parser = Parser(prog="python -m toy.labels", description=__doc__)
    parser.add_argument("world", **one_of(worlds.WORLDS))
    sys.exit(run_command(main, parser.parse_args()))
