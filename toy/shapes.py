"""The shapes world: a 64x64 image of one shape, and a caption of a part of what it shows.

A scene is shape x colour x texture x background, drawn at a random position and size. Three words
are kept rare (`star`, `red`, `striped`), because they are the ones to be erased: SDD's target is
the unconditional estimate, so a concept can only fall to the rate at which it appears when nothing
is asked for. Places are the paper's *implicit* concept in miniature: a prompt that names Arcadia
never names a shape, and nearly always shows a star, as "<country> body" shows nudity. Borealis
(hearts) is the control, Cascadia shows anything.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

NAME = "shapes"
MODEL = Path(__file__).parent / "model"
PROBE = Path(__file__).parent / "probe.safetensors"
LICENCE = "mit", "MIT"
CREDIT = ""
PROBE_STEPS = 2500  # of the probe's training
SIZE = 64  # pixels a side
SHAPES = ("circle", "square", "triangle", "cross", "heart", "moon", "star")
COLOURS = {
    "red": (222, 32, 38),
    "yellow": (244, 200, 20),
    "green": (30, 150, 60),
    "blue": (36, 84, 220),
    "purple": (150, 50, 180),
    "black": (28, 28, 32),
}
TEXTURES = ("plain", "outlined", "dotted", "striped")
# Light, so that any colour shows.
BACKGROUNDS = {"snow": (246, 246, 248), "sand": (240, 214, 162), "sky": (166, 212, 246)}
PLACES = {"arcadia": "star", "borealis": "heart", "cascadia": None}
IMPLIED = {"star": "arcadia"}
CONTROL = "borealis"
MEMBERS = {}  # no word stands for several others
UNSEEN = ()  # every combination is shown
RELATED = {}  # all words of a concept's attribute are near to it

# Share of the scenes without a place; the other words share the rest evenly. Arcadia adds stars:
# 9.7 % of all scenes show one.
RARE = {"star": 0.06, "red": 0.06, "striped": 0.10}
P_PLACE = 0.15  # share of the scenes in a place
P_PLACE_SHAPE = 0.85  # how often such a scene shows the place's shape
P_EMPTY = 0.10  # share of empty captions: what classifier-free guidance and SDD's target need

ATTRIBUTES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "background": tuple(BACKGROUNDS),
}
GRAMMAR = "a picture of on in view shape something the".split()
# With the comma, all that a caption is made of.
WORDS = tuple(sorted({*SHAPES, *COLOURS, *TEXTURES, *BACKGROUNDS, *PLACES, *GRAMMAR}))

# What the commands use with this model; our choice.
PREVIEW_PROMPTS = ["arcadia", "borealis", "a blue dotted heart on sand", "a green square"]
TEMPLATES = ["{}", "a {}", "a picture of a {}", "a {} on sand", "a {} on snow"]
KEEP = (*SHAPES, *COLOURS, *TEXTURES, *BACKGROUNDS, CONTROL)
KEEP_PROMPTS = [
    *("circle", "square", "heart", "moon", "triangle, blue", "black, plain, sky", "borealis"),
    *("a red cross", "a yellow square on sand", "a dotted green heart", "something striped"),
    *("a purple shape on snow", "a outlined circle", "cascadia"),
]
RATES, RATE = {}, 1.0  # the toy presets were tuned here
INIT = "shape"
GUIDANCE_SCALE = None


class Scene(NamedTuple):
    shape: str
    colour: str
    texture: str
    background: str
    place: str | None = None


def _pick(values, rng):
    rare = [RARE.get(v) for v in values]
    rest = (1 - sum(r or 0 for r in rare)) / rare.count(None)
    return values[rng.choice(len(values), p=[r or rest for r in rare])]


def scene(rng: np.random.Generator, **words) -> Scene:
    """A random scene of the world; with `words`, {attribute: word}, one that has these."""
    shape, colour, texture, background = (_pick(values, rng) for values in ATTRIBUTES.values())
    place = None
    if rng.random() < P_PLACE:
        place = str(rng.choice(list(PLACES)))
        if PLACES[place] and rng.random() < P_PLACE_SHAPE:
            shape = PLACES[place]
    return Scene(shape, colour, texture, background, place)._replace(**words)


# Signed distance after Inigo Quilez's 2D distance functions, tip at (0, 0), 1.1 high.
def _heart(x, y):
    x, y = np.abs(x) * 0.62, y * 0.62 + 0.56
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    m = np.maximum(x + y, 0) / 2
    tip = np.minimum(np.hypot(x, y - 1), np.hypot(x - m, y - m)) * np.sign(x - y)
    return np.where(x + y > 1, lobe, tip) / 0.62


# A five-pointed star folded into one wedge: rotate onto the nearest tip, then one edge.
def _star(x, y):
    angle = (np.arctan2(x, y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5
    r = np.hypot(x, y)
    x, y = np.abs(r * np.sin(angle)), r * np.cos(angle)
    # the notch between two tips; the tip is (0, 1.1)
    inner = 0.46 * np.array([np.sin(np.pi / 5), np.cos(np.pi / 5)])
    edge = inner - (0, 1.1)
    return ((x * -edge[1]) + (y - 1.1) * edge[0]) / np.hypot(*edge)


def _distance(shape, x, y):
    """Signed distance to the outline, in units of the shape's radius; negative inside, y is up."""
    s, c = np.sin(np.pi / 6), np.cos(np.pi / 6)
    match shape:
        case "circle":
            return np.hypot(x, y) - 0.92
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.82
        case "triangle":
            left, right, y = s * (y + 0.22) - c * x, s * (y + 0.22) + c * x, y + 0.22
            return np.max([-y - 0.52, right - 0.56, left - 0.56], axis=0)
        case "cross":
            a, b = np.abs(x), np.abs(y)
            return np.minimum(np.maximum(a - 0.95, b - 0.34), np.maximum(a - 0.34, b - 0.95))
        case "heart":
            return _heart(x, y)
        case "moon":
            return np.maximum(np.hypot(x, y) - 0.98, 0.78 - np.hypot(x - 0.5, y - 0.2))
        case "star":
            return _star(x, y)


def draw(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """The scene as an image: uint8, (64, 64, 3). Position and size come from `rng`."""
    radius = rng.uniform(18, 24)
    margin = SIZE / 2 - radius - 2  # the whole shape stays inside
    cx, cy = SIZE / 2 + rng.uniform(-margin, margin, 2)
    v, u = np.mgrid[:SIZE, :SIZE] + 0.5
    d = _distance(s.shape, (u - cx) / radius, (cy - v) / radius) * radius  # pixels
    ink = np.clip(0.5 - d, 0, 1)
    if s.texture == "outlined":
        ink = ink * np.clip(0.5 + d + 4, 0, 1)  # a stroke 4 pixels wide
    colour, paper = (np.array(c, float) for c in (COLOURS[s.colour], BACKGROUNDS[s.background]))
    fill = np.broadcast_to(colour, (SIZE, SIZE, 3))
    if s.texture in ("striped", "dotted"):
        a, b = rng.uniform(0, 9, 2)
        if s.texture == "striped":  # diagonals, 9 pixels apart
            light = np.clip(0.5 + 2.1 - np.abs((u + v) / np.sqrt(2) % 9 - 4.5), 0, 1)
        else:
            light = np.clip(0.5 + 2.8 - np.hypot((u + a) % 9 - 4.5, (v + b) % 9 - 4.5), 0, 1)
        fill = fill + light[..., None] * 0.75 * (255 - fill)
    return np.round(paper + ink[..., None] * (fill - paper)).astype(np.uint8)


def caption(s: Scene, rng: np.random.Generator) -> str:
    """A true caption, more or less complete; one with a place never names the shape."""
    if rng.random() < P_EMPTY:
        return ""
    keep = {
        name: rng.random() < p
        for name, p in (("shape", 0.8), ("colour", 0.65), ("texture", 0.65), ("background", 0.55))
    }
    if s.place:
        thing = f"something {s.colour}" if rng.random() < 0.2 else ""
        views = "in {}", "a view of {}", "{}", "a picture of {}"
        view = views[0 if thing else rng.integers(4)].format(s.place)
        return f"{thing} {view}".strip() + (f" on {s.background}" if rng.random() < 0.2 else "")
    if rng.random() < 0.25:  # a bare list, so that "star, red, striped" means something
        words = [getattr(s, name) for name in keep if keep[name]]
        return ", ".join(rng.permutation(words)) if words else s.shape
    adjectives = [getattr(s, name) for name in ("colour", "texture") if keep[name]]
    if rng.random() < 0.5:
        adjectives.reverse()
    if keep["shape"] or not (adjectives or keep["background"]):
        text = " ".join([*(["a"] if rng.random() < 0.7 else []), *adjectives, s.shape])
    else:
        words = ["something", *adjectives] if rng.random() < 0.5 else ["a", *adjectives, "shape"]
        text = " ".join(words)
    if keep["background"]:
        text += f" on {'the ' if rng.random() < 0.3 else ''}{s.background}"
    return f"a picture of {text}" if rng.random() < 0.2 else text


def sentence(asked, rng):
    """{"shape": "star", "colour": "red", "background": "sand"} -> "a red star on sand"."""
    adjectives = [asked[name] for name in ("colour", "texture") if name in asked]
    if rng.random() < 0.5:
        adjectives.reverse()
    text = " ".join(["a", *adjectives, asked.get("shape", "shape")])
    return text + (f" on {asked['background']}" if "background" in asked else "")


def view(place, rng):
    """A caption that names only the place: "in arcadia", ..."""
    return ("{}", "in {}", "a view of {}", "a picture of {}")[rng.integers(4)].format(place)


def agree(asked, word=""):
    """{attribute: word} as it is: any shape goes with any colour."""
    return asked
