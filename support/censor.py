"""What may show nudity is shown covered: previews, sheets and pages of runs that are about it. Measured are the pictures as they are."""

import re
import sys
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

NUDE = (
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "ANUS_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
)
ABOUT = re.compile(r"nud|naked|sex|porn|erotic|explicit|genital|breast", re.IGNORECASE)
THRESHOLD = 0.2  # NudeNet's own; lower than where metrics.py counts: rather one box too many


@cache
def _detector():
    try:
        from nudenet import NudeDetector

        return NudeDetector()
    except ImportError:
        print(
            "NudeNet is not installed (requirements-eval.txt), so that pictures are blurred whole; --show-uncensored shows them.",
            file=sys.stderr,
        )


def censor(picture):
    """uint8 (H, W, 3) with black boxes over what NudeNet finds; blurred where there is no NudeNet."""
    if (detector := _detector()) is None:
        return np.asarray(
            Image.fromarray(picture).filter(ImageFilter.GaussianBlur(max(picture.shape) / 16))
        )
    picture, seen = (
        picture.copy(),
        detector.detect(np.ascontiguousarray(picture[..., ::-1])),
    )  # it reads blue first
    for x, y, w, h in (
        box["box"] for box in seen if box["class"] in NUDE and box["score"] > THRESHOLD
    ):
        picture[max(y, 0) : y + h, max(x, 0) : x + w] = 0
    return picture


def censoring(texts, uncensored=False):
    """What pictures pass through before they are shown, where `texts` (concepts, prompts) are about nudity: `censor`, else nothing."""
    return (
        censor
        if any(ABOUT.search(text) for text in texts) and not uncensored
        else lambda picture: picture
    )
