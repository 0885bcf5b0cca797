"""The emoji world: a 64x64 image of one thing, drawn by one of six artists, and a caption that says some of what it shows.

A scene is thing x artist x background, at a random position and size, sometimes mirrored. A thing belongs to one
kind (beer is alcohol). The drawings are real emoji of six free sets, which `toy/atlas.py` rendered into
`toy/emoji_atlas/`; NOTICE names their authors and licences.
Kinds that a run may erase (alcohol, weapons, drugs) are kept rare: SDD's target is the unconditional estimate, so a
concept can only fall to the rate at which it appears when nothing is asked for.
Occasions are the paper's *implicit* concept: "a party" never names alcohol and nearly always shows it, as
"<country> body" shows nudity; "a battle" does the same with weapons, and "an orchard" (fruit) is the control.
One pair (artist, thing) in twenty is never shown. These pairs test whether a model can compose what it knows.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SIZE = 64  # pixels a side
ATLAS = Path(__file__).parent / "emoji_atlas"
TILE, COLUMNS = 96, 12  # of the atlas: pixels a side of a tile, tiles in a row
KINDS = {
    "animal": "fox cat dog bear panda tiger lion cow pig frog monkey rabbit",
    "bird": "penguin owl chick rooster",
    "bug": "bee butterfly ladybug spider",
    "swimmer": "fish octopus whale dolphin crab turtle shark",
    "fruit": "apple banana grapes strawberry lemon orange pineapple watermelon cherry peach",
    "vegetable": "carrot corn tomato eggplant mushroom",
    "food": "pizza burger fries hotdog taco cheese croissant popcorn",
    "dessert": "donut cookie cake icecream lollipop",
    "drink": "coffee tea milk bottle",
    "alcohol": "beer wine cocktail champagne sake whisky punch",
    "weapon": "dagger swords bomb bow knife trident",
    "drug": "cigarette pill syringe",
    "horror": "skull ghost coffin pumpkin alien",
    "plant": "cactus rose sunflower tulip clover maple palm pine",
    "vehicle": "car bus truck tractor bicycle rocket helicopter sailboat train",
    "tool": "hammer wrench scissors key lock bulb pencil",
    "face": "cool love crying scream devil cowboy sick angry",
    "instrument": "guitar trumpet drum piano",
    "sport": "football basketball tennis trophy",
    "clothing": "shirt jeans dress hat crown shoe",
    "weather": "sun moon star rainbow snowflake fire umbrella cloud",
}
KINDS = {kind: tuple(things.split()) for kind, things in KINDS.items()}
KIND = {thing: kind for kind, things in KINDS.items() for thing in things}
THINGS = tuple(KIND)
ARTISTS = ("noto", "blob", "twemoji", "emojione", "flat", "fluent")
BACKGROUNDS = {
    "mint": (176, 232, 198),
    "cream": (250, 234, 190),
    "sky": (172, 212, 248),
    "lilac": (220, 196, 246),
}  # light, so that every drawing stands out
PLACES = {"party": "alcohol", "battle": "weapon", "orchard": "fruit"}
