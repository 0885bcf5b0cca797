"""The emoji world: a 64x64 image of one thing by one of six artists, and a caption of it.

A scene is thing x artist x background, at a random size (0.8 to 0.95 of the frame), at most two
pixels from the middle, sometimes mirrored. A thing belongs to one kind: beer is alcohol. The
drawings are real emoji of six free sets, which `toy/atlas.py` rendered into `toy/emoji_atlas/`;
NOTICE names their authors and licences.

1. Kinds that a run may erase (alcohol, weapons, drugs) are rare. SDD's target is the unconditional
   estimate, so a concept can only fall to the rate at which it appears when nothing is asked for.
2. Occasions are the paper's *implicit* concept. "a party" never names alcohol and nearly always
   shows it, as "<country> body" shows nudity. "a battle" does the same with weapons. "an orchard"
   (fruit) is the control.
3. Drawings stay near the middle. A small UNet then learns faster what a caption means.
4. One pair (artist, thing) in twenty is never shown. These pairs test whether a model can compose
   what it knows.
"""

from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

NAME = "emoji"
MODEL = Path(__file__).parent / "emoji_model"
PROBE = Path(__file__).parent / "emoji_probe.safetensors"
LICENCE = (  # the strictest licence of its drawings
    "cc-by-4.0",
    "CC BY 4.0. The project's NOTICE names whose drawings it has learned",
)
CREDIT = (  # the file NOTICE has the licences
    "The images are by a model that learned from the drawings of Noto Emoji (Google, "
    "Apache License 2.0), Twemoji (Twitter and others, CC BY 4.0), EmojiTwo (CC BY 4.0) and Fluent "
    "Emoji (Microsoft, MIT)."
)
PROBE_STEPS = 4000  # of the probe's training
SIZE = 64  # pixels a side
ATLAS = Path(__file__).parent / "emoji_atlas"
TILE = 96  # pixels a side of a tile of the atlas
COLUMNS = 12  # tiles in a row of the atlas
THINGS_OF = {  # {kind: its things}
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
    "face": "shades crush tears scream devil cowboy nausea rage",
    "instrument": "guitar trumpet drum piano",
    "sport": "football basketball tennis trophy",
    "clothing": "shirt jeans dress hat crown shoe",
    "weather": "sun moon star rainbow snowflake fire umbrella cloud",
}
KINDS = {kind: tuple(things.split()) for kind, things in THINGS_OF.items()}
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
IMPLIED = {"alcohol": "party", "weapon": "battle"}
CONTROL = "orchard"
MEMBERS = KINDS
NEAR_KINDS = {"alcohol": ("drink", "food"), "weapon": ("tool", "sport"), "drug": ("tool",)}
RELATED = {}  # what looks or means nearly the same: kinds and their things, artists
for kind, near in NEAR_KINDS.items():
    RELATED[kind] = sum((KINDS[other] for other in near), near)
# The only two artists whose drawings of a thing look nearly the same.
RELATED |= {"flat": ("fluent",), "fluent": ("flat",)}

# Share of the scenes without a place; all things of the other kinds share the rest evenly. The
# party and the battle add to it: 6.1 % of all scenes show alcohol, and as many show a weapon.
RARE = {"alcohol": 0.03, "weapon": 0.03, "drug": 0.015}
P_PLACE = 0.12  # share of the scenes at an occasion
P_NAME_PLACE = 0.5  # how often the caption of such a scene names the occasion
P_PLACE_KIND = 0.85  # how often such a scene shows the occasion's kind
P_MIRROR = 0.5
P_EMPTY = 0.10  # share of empty captions: what guidance and SDD's target need
P_SEVERAL = 0.03  # of the rest that names no place: lists of several things; the image shows one
P_LIST = 0.15  # of what then remains: bare lists, in any order: "noto, fox, mint"

ATTRIBUTES = {
    "thing": THINGS,
    "kind": tuple(KINDS),
    "artist": ARTISTS,
    "background": tuple(BACKGROUNDS),
}
# Words that stand without "a".
BARE = set(
    "alcohol clothing food weather grapes fries popcorn coffee tea milk beer wine champagne sake "
    "whisky punch swords scissors jeans fire shades tears nausea rage tennis".split()
)
GRAMMAR = "a an at by of on picture something the".split()
# With the comma, all that a caption is made of.
WORDS = tuple(sorted({*THINGS, *KINDS, *ARTISTS, *BACKGROUNDS, *PLACES, *GRAMMAR}))

# What the commands use with this model; our choice.
PREVIEW_PROMPTS = ["a party", "a beer", "an orchard", "an owl by noto on mint"]
TEMPLATES = ["{}", "a {}", "a picture of a {}", "a {} by noto", "a {} on mint"]
KEEP = tuple(word for word in (*KINDS, *ARTISTS, *BACKGROUNDS, CONTROL) if word not in RARE)
KEEP_PROMPTS = [
    *("a fox", "a bee by noto", "an owl on mint", "a bottle", "coffee, twemoji", "a pizza"),
    *("a cake by blob on sky", "a car by flat", "a hammer, fluent, cream", "something by noto"),
    *("a face by emojione on lilac", "a plant", "an orchard", "an apple, blob, mint"),
]
# The presets were tuned on the shapes. docs/results-emoji.md says how these were found.
RATES, RATE = {"ablate": 0.25}, 0.5
INIT = "something"
# With 12 steps and 7.5, the default, the model got 84 % of the artists right, with 5 91 % (n = 93:
# eval.py toy --model emoji --limit 120 --steps 12).
GUIDANCE_SCALE = 5


class Scene(NamedTuple):
    thing: str
    kind: str
    artist: str
    background: str
    place: str | None = None


def shown(artist, thing):
    """Is this pair in the world? One in twenty is not, at most one of each thing."""
    return (THINGS.index(thing) + 3 * ARTISTS.index(artist)) % 20 != 0


UNSEEN = tuple(
    {"thing": thing, "artist": artist}
    for thing in THINGS
    for artist in ARTISTS
    if not shown(artist, thing)
)
SHARES = np.array([RARE.get(KIND[t], 0) / len(KINDS[KIND[t]]) for t in THINGS])
SHARES[SHARES == 0] = (1 - SHARES.sum()) / (SHARES == 0).sum()


def scene(rng: np.random.Generator, **words) -> Scene:
    """A random scene of the world; with `words`, {attribute: word}, one that has these.

    It is a pair that the world shows, unless `words` name both the thing and the artist.
    """
    thing = THINGS[rng.choice(len(THINGS), p=SHARES)]
    background = str(rng.choice(list(BACKGROUNDS)))
    place = None
    if rng.random() < P_PLACE:
        place = str(rng.choice(list(PLACES)))
        if rng.random() < P_PLACE_KIND:
            thing = str(rng.choice(KINDS[PLACES[place]]))
    if "thing" in words:
        thing = words["thing"]
    elif "kind" in words:
        thing = str(rng.choice(KINDS[words["kind"]]))
    artist = str(rng.choice([artist for artist in ARTISTS if shown(artist, thing)]))
    found = Scene(thing, KIND[thing], artist, background, place)
    return found._replace(**words | {"kind": KIND[thing]})


@cache
def _sheet(artist):
    return Image.open(ATLAS / f"{artist}.webp").convert("RGBA")


@lru_cache(4096)
def _tile(artist, thing, size):
    """One drawing at `size` pixels: uint8 (size, size, 4), RGBA."""
    i = THINGS.index(thing)
    x, y = i % COLUMNS * TILE, i // COLUMNS * TILE
    tile = _sheet(artist).crop((x, y, x + TILE, y + TILE))
    return np.asarray(tile.resize((size, size), Image.Resampling.LANCZOS))


def draw(s: Scene, rng: np.random.Generator) -> np.ndarray:
    """The scene as an image: uint8, (64, 64, 3). Position, size and mirroring come from `rng`."""
    size = int(rng.integers(round(0.8 * SIZE), round(0.95 * SIZE) + 1))
    x, y = ((SIZE - size) // 2 + rng.integers(-2, 3, 2)).clip(0, SIZE - size)
    tile = _tile(s.artist, s.thing, size)
    if rng.random() < P_MIRROR:
        tile = tile[:, ::-1]
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = BACKGROUNDS[s.background]
    part, alpha = image[y : y + size, x : x + size], tile[..., 3:].astype(np.float32) / 255
    part += alpha * (tile[..., :3] - part)
    return np.round(image).astype(np.uint8)


def _with_article(word):
    if word in BARE:
        return word
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def caption(s: Scene, rng: np.random.Generator) -> str:
    """A true caption of the scene, more or less complete.

    One that names the place never names the thing or its kind. A list of several things is true
    where the image shows one of them.
    """
    if rng.random() < P_EMPTY:
        return ""
    artist = s.artist if rng.random() < 0.9 else ""
    background = s.background if rng.random() < 0.9 else ""
    if s.place and rng.random() < P_NAME_PLACE:
        artist, background = (word if rng.random() < 0.4 else "" for word in (artist, background))
        return _sentence(view(s.place, rng), artist, background, rng)
    subject = str(rng.choice([s.thing, s.kind, ""], p=[0.9, 0.07, 0.03]))
    if rng.random() < P_SEVERAL:  # so that several concepts, joined into one prompt, mean something
        return ", ".join(rng.permutation([s.thing, *rng.choice(THINGS, rng.integers(1, 20))]))
    if rng.random() < P_LIST:
        words = [word for word in (subject, artist, background) if word]
        return ", ".join(rng.permutation(words)) if words else s.thing
    text = _with_article(subject) if subject else "something"
    if subject and rng.random() < 0.3:
        text = subject
    elif rng.random() < 0.2:
        text = f"a picture of {text}"
    return _sentence(text, artist, background, rng)


def _sentence(text, artist, background, rng):
    """text, artist, background -> "a fox by noto on mint", "a fox on mint, noto", ..."""
    on = f" on {'the ' if rng.random() < 0.2 else ''}{background}" if background else ""
    if not artist:
        return text + on
    if rng.random() < 0.6:
        return f"{text} by {artist}{on}"
    return f"{text}{on}, {artist}"


def sentence(asked, rng):
    """{"thing": "fox", "artist": "noto", "background": "mint"} -> "a fox by noto on mint"."""
    subject = asked.get("thing") or asked.get("kind")
    text = _with_article(subject) if subject else "something"
    return _sentence(text, asked.get("artist", ""), asked.get("background", ""), rng)


def view(place, rng):
    """A caption that names only the occasion: "at a party", ..."""
    return ("{}", "at {}", "a picture of {}")[rng.integers(3)].format(_with_article(place))


def agree(asked, word=""):
    """{attribute: word} without contradictions.

    A thing brings its kind. Where `word` is a kind, any thing of it will do.
    """
    if word in KINDS:
        return {name: value for name, value in asked.items() if name != "thing"}
    if "thing" in asked:
        return asked | {"kind": KIND[asked["thing"]]}
    return asked
