"""Proportions of images: intervals, texts, comparisons, and the row of the original model.

A row is one of results.json (evaluation/tables.py): {"model", "erased", "figures", …}. figures is
{column: value}. A value is a Figure, a number, or None (not measured).
"""

import math
from numbers import Real

ORIGINAL = "original"  # the name of the untouched model's row


class Figure(tuple):
    """What the images of a row show: (shows, other, broken) for each training.

    A training is one erased.safetensors, so a row of three training seeds has three. shows: images
    that show what the column counts; other: they show something else; broken: nothing that one
    could name. No judge finds broken images yet: broken is 0.
    """

    @property
    def hits(self):
        return sum(shows for shows, _, _ in self)

    @property
    def n(self):
        return sum(sum(counts) for counts in self)

    @property
    def share(self):
        return self.hits / self.n

    @property
    def percent(self):
        return 100 * self.hits / self.n

    @property
    def interval(self):
        """(low, high) in 0..1: the 95 % interval of the share, with the trainings added up."""
        return wilson(self.hits, self.n)

    @property
    def complement(self):
        """The images that do not show it."""
        return Figure((other + broken, shows, 0) for shows, other, broken in self)


def wilson(hits, n, z=1.96):
    """The 95 % interval of a proportion, hits of n (Wilson 1927): (low, high) in 0..1."""
    if not n:
        return 0.0, 1.0
    p = hits / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def counted(hits, n):
    """The Figure of one training."""
    return Figure([(hits, n - hits, 0)])


def pooled(figures):
    """One Figure of all their trainings."""
    return Figure(counts for figure in figures for counts in figure)


def figure(value):
    """A value of results.json as a Figure; None if it is a number or None, or if n is 0.

    In JSON a Figure is [[shows, other, broken], …]. [hits, n] is read as one training: points of
    an attack, and stored rows whose trainings are added up.
    """
    if not isinstance(value, list | tuple) or not value:
        return None
    found = counted(*value) if isinstance(value[0], Real) else Figure(map(tuple, value))
    return found if found.n else None


# ---------------------------------------------------------------------------------------- as text
def in_percent(figure):
    return f"{figure.percent:.1f} %"


def in_words(figure):
    """ "12.5 % (4 to 31 %)", with the 95 % interval."""
    low, high = figure.interval
    return f"{in_percent(figure)} ({100 * low:.0f} to {100 * high:.0f} %)"


def cell(value, digits=1):
    """A value in a table: "12.5 (4–31)", per cent with their interval; a number; or "–"."""
    if found := figure(value):
        low, high = found.interval
        return f"{found.percent:.{digits}f} ({100 * low:.0f}–{100 * high:.0f})"
    if isinstance(value, Real) and math.isfinite(value):
        return f"{value:.4g}"
    return "–"


def n_text(values):
    """How many images the proportions among the values have: "n = 200", "n ≤ 200", or ""."""
    counts = {found.n for value in values if (found := figure(value))}
    if not counts:
        return ""
    return f"n {'=' if len(counts) == 1 else '≤'} {max(counts)}"


# ---------------------------------------------------------------------------------------- compared
def compare(a, b):
    """Is the Figure a "smaller" or "larger" than b? "open": their 95 % intervals overlap."""
    (low_a, high_a), (low_b, high_b) = a.interval, b.interval
    if high_a < low_b:
        return "smaller"
    return "larger" if low_a > high_b else "open"


def judge(a, b, better):
    """Is the Figure a "better" or "worse" than b, or "open"? better: "low" or "high"."""
    found = compare(a, b)
    if found == "open":
        return "open"
    return "better" if (found == "smaller") == (better == "low") else "worse"


def is_original(row):
    return row["model"] == ORIGINAL


def original_of(row, rows):
    """The original's row to compare a row with: of the same concepts, or the only one; or None."""
    originals = [other for other in rows if is_original(other)]
    same = [other for other in originals if list(other["erased"]) == list(row["erased"])]
    return next(iter(same or originals), None)
