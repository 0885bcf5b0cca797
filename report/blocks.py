"""A page as data, which page.html.j2 draws; and the files that a page reads.

A page is a dict with its heading, subtitle, intro (blocks) and sections (id, title, blocks). A
section without blocks is left out. A block is a dict, and its first key says what it is:

    text      a paragraph; style: soft (in grey)
    code      a command or a program, and its name; it scrolls in its own box
    table     rows of cells; style: a class of page.css; label, head; scrolls
    sheet     a wide image and its title; scrolls
    pairs     a card per prompt: {prompt, kind, images: {caption: image}}
    film      a frame per preview: {done, pairs}
    charts    see charts.py
    details   blocks that are folded below a summary

A cell is a text, an image, or {text, mark, bar} with the mark "better" or "worse", and the low
end, the share and the high end of an interval, in per cent. In a head it can be
{text, lines, about}: smaller lines below the text, and what the pointer shows.
"""

import base64
import io
from pathlib import Path

import PIL.Image

ROOT = Path(__file__).parent.parent  # the project's folder
SDD = ("SDD", "2307.05977")  # the paper, and its number on arXiv


def in_words(value):
    """A setting's value as text."""
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        return ", ".join(str(x) for x in value)
    return str(value)


def made(results, settings, *more):
    """The last section of every page. more: further blocks below the command."""
    blocks = [{"code": results["command"], "name": "Command"}] if results else []
    blocks += more
    for heading, values in (("All settings", settings), ("Versions", results.get("versions"))):
        if values:
            rows = [[key.replace("_", " "), in_words(value)] for key, value in values.items()]
            table = {"table": rows, "style": "settings", "label": heading}
            blocks.append({"details": [table], "summary": heading})
    return "made", "How it was made", blocks


def path_from_project(path):
    """The path as a user types it in the project's folder."""
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()


def read_image(file, alt, side):
    """{alt, source} of an image within `side` pixels. source is the image as text for <img src>.

    {alt, problem} if the file is missing or cannot be read.
    """
    try:
        image = PIL.Image.open(file).convert("RGB")
    except FileNotFoundError:
        return {"alt": alt, "problem": "missing"}
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError and others
        return {"alt": alt, "problem": f"{file.parent.name}/{file.name} cannot be read"}
    image.thumbnail((side, side))
    kind = "PNG" if max(image.size) <= 128 else "JPEG"  # JPEG takes a tenth of the bytes
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"alt": alt, "source": f"data:image/{kind.lower()};base64,{data}"}
