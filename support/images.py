"""Images as files and sheets: PNG files with text, and grids with labels."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from support.files import atomic_write

PAD = 4  # pixels between the images of a sheet
SMALLEST = 128  # smaller images are enlarged to about this height
HEADER = 22  # height of one line of the columns' names
LINE = 17  # and of each further line


def grid(rows, labels=(), columns=()):
    """A PIL image that shows rows of images, with a label left of each row and above each column.

    rows: lists of uint8 arrays (H, W, 3), all of the same size. A label that is wider than its
    column continues on the next line.
    """
    H, W, _ = rows[0][0].shape
    zoom = max(1, SMALLEST // H)
    H, W = H * zoom, W * zoom
    font = ImageFont.load_default(14)
    left = 0
    if labels:
        left = int(max(font.getlength(label) for label in labels)) + 2 * PAD
    columns = [wrap(text, font, W) for text in columns]
    lines = max((text.count("\n") + 1 for text in columns), default=0)
    top = HEADER + LINE * (lines - 1) if columns else 0

    width = left + max(len(row) for row in rows) * (W + PAD) + PAD
    height = top + len(rows) * (H + PAD) + PAD
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for j, text in enumerate(columns):
        x = left + PAD + j * (W + PAD)
        pen.text((x + W / 2, top / 2 + 2), text, "black", font, anchor="mm", align="center")
    for i, row in enumerate(rows):
        y = top + PAD + i * (H + PAD)
        if i < len(labels):
            pen.text((PAD, y + H / 2), labels[i], "black", font, anchor="lm")
        for j, image in enumerate(row):
            x = left + PAD + j * (W + PAD)
            enlarged = Image.fromarray(image).resize((W, H), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (x, y))
    return sheet


def wrap(text, font, width):
    """The text with line breaks between words, so that each line fits into `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def whole(file):
    """Whether an image file is there and can be read to its end."""
    try:
        Image.open(file).load()
    except (OSError, SyntaxError, ValueError):  # of Pillow's decoders
        return False
    return True


def save_png(image, file, **text):
    """Writes an array (H, W, 3) or a PIL image, with `text` in the PNG's text chunks."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    with atomic_write(file) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)
