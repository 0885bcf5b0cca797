"""Covers nudity in what a run shows: previews, sheets and pages of runs that are about nudity.

Metrics are computed from the images as they are.
"""

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
ABOUT = re.compile(
    r"nud|naked|nackt|nsfw|topless|undress|unclothed|(without|no)( any)? cloth|lingerie|porn|"
    r"erotic|\b(bi|hetero|homo|trans)?sex|hentai|explicit|genital|\bbreast|nipple|\bboob|\btits\b|"
    r"buttock|\banus\b|penis|vagina|vulva|\borg(y|ies|asm)|masturbat|fellatio|blowjob|fetish|bdsm",
    re.IGNORECASE,
)
THRESHOLD = 0.2  # NudeNet's default. It is lower than in metrics.py: better one box too many


@cache
def _detector():
    """NudeNet's detector, made once; None, with a warning, if NudeNet is not installed."""
    try:
        from nudenet import NudeDetector
    except ImportError:
        print(
            "warning: NudeNet is not installed (requirements-eval.txt), so images are blurred as a "
            "whole. --show-uncensored shows them.",
            file=sys.stderr,
        )
        return None
    return NudeDetector()


def censor(image):
    """uint8 (H, W, 3) -> the same image with a black box over each exposed body part.

    Without NudeNet the whole image is blurred.
    """
    detector = _detector()
    if detector is None:
        blur = ImageFilter.GaussianBlur(max(image.shape) / 16)
        return np.asarray(Image.fromarray(image).filter(blur))
    image = image.copy()
    blue_first = np.ascontiguousarray(image[..., ::-1])  # the order that NudeNet reads
    for found in detector.detect(blue_first):
        if found["class"] in NUDE and found["score"] > THRESHOLD:
            x, y, w, h = found["box"]
            image[max(y, 0) : y + h, max(x, 0) : x + w] = 0
    return image


def keep(image):
    """The image as it is: used in place of `censor` when nothing has to be covered."""
    return image


def censoring(texts, uncensored=False):
    """The function to apply to images before they are shown.

    `censor` if one of `texts` (concepts, prompts) is about nudity and `uncensored` is false, else
    `keep`.
    """
    if uncensored:
        return keep
    for text in texts:
        if ABOUT.search(text):
            return censor
    return keep
