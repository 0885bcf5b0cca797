"""Renders the atlas of the emoji world from the packages of the Iconify project.

    for set in noto noto-v1 twemoji emojione fluent-emoji-flat fluent-emoji; do
        npm pack @iconify-json/$set
    done
    pip install resvg_py
    python -m toy.atlas FOLDER        # the folder with the six .tgz files

Writes `toy/emoji_atlas/`: one sheet of tiles per artist, and index.json with the icon of each tile.
The atlas is committed, so nothing else needs these packages. NOTICE has their licences.
"""

import io
import json
import sys
import tarfile
from pathlib import Path

from PIL import Image

from support.cli import Parser, run_command
from support.errors import UserError
from toy.emoji import ARTISTS, ATLAS, COLUMNS, THINGS, TILE

SOURCES = dict(
    noto="noto",
    blob="noto-v1",
    twemoji="twemoji",
    emojione="emojione",
    flat="fluent-emoji-flat",
    fluent="fluent-emoji",
)
# thing:icon, where the icon's name in the sets is not our word.
ICONS = """
    cat:cat-face dog:dog-face tiger:tiger-face cow:cow-face pig:pig-face monkey:monkey-face
    rabbit:rabbit-face chick:front-facing-baby-chick bee:honeybee ladybug:lady-beetle
    fish:tropical-fish whale:spouting-whale apple:red-apple orange:tangerine cherry:cherries
    corn:ear-of-corn burger:hamburger fries:french-fries hotdog:hot-dog cheese:cheese-wedge
    donut:doughnut cake:birthday-cake icecream:soft-ice-cream coffee:hot-beverage
    tea:teacup-without-handle milk:glass-of-milk bottle:baby-bottle beer:beer-mug wine:wine-glass
    cocktail:cocktail-glass champagne:bottle-with-popping-cork whisky:tumbler-glass
    punch:tropical-drink swords:crossed-swords bow:bow-and-arrow knife:kitchen-knife
    trident:trident-emblem pumpkin:jack-o-lantern clover:four-leaf-clover maple:maple-leaf
    palm:palm-tree pine:evergreen-tree car:automobile truck:delivery-truck train:locomotive
    lock:locked bulb:light-bulb shades:smiling-face-with-sunglasses
    crush:smiling-face-with-heart-eyes tears:loudly-crying-face scream:face-screaming-in-fear
    devil:smiling-face-with-horns cowboy:cowboy-hat-face nausea:nauseated-face rage:pouting-face
    piano:musical-keyboard football:soccer-ball shirt:t-shirt hat:top-hat shoe:running-shoe
    moon:crescent-moon umbrella:umbrella-with-rain-drops
"""
ICONS = dict(pair.split(":") for pair in ICONS.split())


def read(package):
    """The icons of a package (.tgz), as its icons.json has them, and its version."""
    with tarfile.open(package) as tar:
        icons, about = (
            json.load(tar.extractfile(f"package/{name}.json")) for name in ("icons", "package")
        )
    return icons, about["version"]


def render(icons, name):
    """The icon as an RGBA image of TILE x TILE pixels."""
    import resvg_py  # only this script needs it

    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=TILE, height=TILE))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def main(folder):
    ATLAS.mkdir(exist_ok=True)
    index = {"tile": TILE, "columns": COLUMNS, "things": {t: ICONS.get(t, t) for t in THINGS}}
    index["artists"] = {}
    for artist in ARTISTS:
        package = f"iconify-json-{SOURCES[artist]}"
        packages = list(folder.glob(f"{package}-[0-9]*.tgz"))
        if len(packages) != 1:
            raise UserError(
                f"{folder} has {len(packages)} files {package}-….tgz instead of one: make it with "
                "the commands that --help shows."
            )
        icons, version = read(packages[0])
        rows = -(-len(THINGS) // COLUMNS)
        sheet = Image.new("RGBA", (COLUMNS * TILE, rows * TILE))
        for i, icon in enumerate(index["things"].values()):
            sheet.paste(render(icons, icon), (i % COLUMNS * TILE, i // COLUMNS * TILE))
        file = ATLAS / f"{artist}.webp"
        sheet.save(file, quality=90, method=6)
        index["artists"][artist] = f"@iconify-json/{SOURCES[artist]} {version}"
        print(f"{file}: {len(THINGS)} tiles, {file.stat().st_size / 1e6:.2f} MB")
    (ATLAS / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = Parser(prog="python -m toy.atlas", description=__doc__)
    parser.add_argument("folder", type=Path, help="it has the six .tgz files")
    sys.exit(run_command(lambda args: main(args.folder), parser.parse_args()))
