"""Images as files and sheets: PNG files with text, and grids with labels."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from support.files import atomic_write


def grid(rows, labels=(), columns=()):
    """A picture of pictures: rows of equally large arrays (H, W, 3), a label beside each row, one above each column."""
    H, W, _ = rows[0][0].shape
    zoom = max(1, 128 // H)
    H, W, pad, font = H * zoom, W * zoom, 4, ImageFont.load_default(14)
    left = int(max((font.getlength(label) for label in labels), default=0)) + (
        2 * pad if labels else 0
    )
    top = 22 if columns else 0
    sheet = Image.new(
        "RGB",
        (left + max(map(len, rows)) * (W + pad) + pad, top + len(rows) * (H + pad) + pad),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        y = top + pad + i * (H + pad)
        for j, picture in enumerate(row):
            x = left + pad + j * (W + pad)
            sheet.paste(Image.fromarray(picture).resize((W, H), Image.Resampling.NEAREST), (x, y))
            if i == 0 and j < len(columns):
                pen.text((x + W / 2, top / 2 + 2), columns[j], "black", font, anchor="mm")
        if i < len(labels):
            pen.text((pad, y + H / 2), labels[i], "black", font, anchor="lm")
    return sheet


def save_png(picture, file, **text):
    """An array (H, W, 3) or an image -> file, with `text` in the PNG's text chunks."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    with atomic_write(file) as beside:
        (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(
            beside, pnginfo=info
        )
