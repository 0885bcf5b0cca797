"""What a page reads from a folder. A missing or damaged file never stops the page.

`problems` is a list of sentences for the page; a file that cannot be read adds one.
"""

import base64
import csv
import io
import json
import math

from PIL import Image


def read_json(file, problems):
    """A JSON file's object; {} if the file is missing or cannot be read."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError):
        problems.append(f"{file.name} cannot be read.")
        return {}


def read_dict(content, key):
    """content[key] if it is an object, else {}."""
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def read_list(content, key):
    """content[key] if it is a list, else []."""
    value = content.get(key)
    return value if isinstance(value, list) else []


def read_log(file, columns):
    """The rows of log.csv: {column: number or None}. Leaves out lines without an iteration."""
    rows = []
    try:
        with open(file, newline="", encoding="utf-8", errors="replace") as f:
            for row in csv.DictReader(f):
                rows.append({key: number(row.get(key)) for key in ("iteration", *columns)})
    except (OSError, csv.Error):
        return []
    return [row for row in rows if row["iteration"] is not None]


def number(text):
    """A finite float, or None."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def read_image(file, problems):
    """(the image as RGB, its text {key: value}); (None, {}) if it is missing or cannot be read."""
    try:
        image = Image.open(file)
        text = dict(getattr(image, "text", {}))
        return image.convert("RGB"), text
    except FileNotFoundError:
        return None, {}
    except Exception as e:  # Pillow's decoders raise OSError, SyntaxError, ValueError and others
        problems.append(f"{file.parent.name}/{file.name} cannot be read ({type(e).__name__}).")
        return None, {}


def data_uri(image, side):
    """The image within `side` pixels as text for <img src>: small ones as PNG, others as JPEG."""
    image = image.copy()
    image.thumbnail((side, side))
    kind = "PNG" if max(image.size) <= 128 else "JPEG"  # JPEG takes a tenth of the bytes
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_data_uri(file, side, problems):
    """The image in a file as text for <img src>; None if it is missing or cannot be read."""
    image, _ = read_image(file, problems)
    return data_uri(image, side) if image else None
