"""Charts as the numbers that the template draws in SVG: lines, and dots with intervals."""

import math

import numpy as np

POINTS = 400  # of a line at most: a chart is about as many pixels wide
LEFT, RIGHT, TOP, BOTTOM = 60, 390, 20, 190  # the plot area of a line chart of 400 × 220 units
DOT_LEFT, DOT_RIGHT = 150, 380  # the plot area of a dot chart that is 400 units wide
DOT_TOP, DOT_ROW = 8, 24
NAME_LENGTH = 20  # letters of a name that fit left of the dots


def wilson(hits, n, z=1.96):
    """The 95 % interval of a proportion, hits of n (Wilson 1927): (low, high) in 0..1."""
    if not n:
        return 0.0, 1.0
    p = hits / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def ticks(low, high):
    """About five round numbers from low to high."""
    wanted = (high - low) / 4
    power = 10 ** math.floor(math.log10(wanted))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(step - wanted))
    first, last = math.ceil(low / step), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def running_mean(line, window):
    """[(x, y)] -> [(x, mean of the last `window` values of y)]; of fewer at the beginning."""
    means = []
    for i, (x, _) in enumerate(line):
        values = [y for _, y in line[max(0, i + 1 - window) : i + 1]]
        means.append((x, sum(values) / len(values)))
    return means


def line_chart(title, series, faint=None):
    """{name: [(x, y)]} -> what the template draws: lines, ticks, and the chart in words.

    Long series are averaged in groups, so that a line has at most POINTS points. The series
    `faint` is drawn as a background of the others.
    """
    longest = max(len(line) for line in series.values())
    group = math.ceil(longest / POINTS)
    means = {name: group_means(line, group) for name, line in series.items()}
    points = [point for line in means.values() for point in line]
    x_max = float(max(x for x, _ in points)) or 1.0
    y_max = float(max(y for _, y in points)) or 1.0

    def place_x(x):
        return LEFT + (RIGHT - LEFT) * x / x_max

    def place_y(y):
        return BOTTOM - (BOTTOM - TOP) * max(y, 0) / y_max

    strong = [name for name in series if name != faint]
    lines = []
    for name, line in means.items():
        style = "faint" if name == faint else f"line{strong.index(name)}"
        placed = [f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in line]
        single = placed[0].split(",") if len(placed) == 1 else None
        lines.append({"name": name, "style": style, "points": " ".join(placed), "single": single})
    return {
        "title": title,
        "lines": lines,
        "in_words": "; ".join(describe(name, line) for name, line in series.items()) + ".",
        "group": group,
        "x": [(place_x(x), f"{x:g}") for x in ticks(0, x_max)],
        "y": [(place_y(y), f"{y:.3g}") for y in ticks(0, y_max)],
    }


def group_means(line, size):
    """The means of `size` points at a time."""
    return [np.mean(line[i : i + size], axis=0) for i in range(0, len(line), size)]


def describe(name, line):
    """A line in words, for readers who cannot see it."""
    (x_first, y_first), (x_last, y_last) = line[0], line[-1]
    low, high = min(y for _, y in line), max(y for _, y in line)
    return (
        f"{name}: {y_first:.3g} at iteration {x_first:.0f}, {y_last:.3g} at iteration "
        f"{x_last:.0f}, between {low:.3g} and {high:.3g}"
    )


def dot_chart(title, rows):
    """[(name, (hits, n), is_original)] -> what the template draws: a dot with its Wilson interval
    per row, on an axis from 0 to 100 %."""

    def place_x(share):
        return f"{DOT_LEFT + (DOT_RIGHT - DOT_LEFT) * share:.1f}"

    dots, in_words = [], []
    for i, (name, (hits, n), is_original) in enumerate(rows):
        share, (low, high) = hits / n, wilson(hits, n)
        text = f"{name}: {100 * share:.1f} % ({100 * low:.0f} to {100 * high:.0f} %), n = {n}"
        short = name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"
        dots.append(
            {
                "name": short,
                "text": text,
                "y": DOT_TOP + DOT_ROW * (i + 0.5),
                "x": place_x(share),
                "low": place_x(low),
                "high": place_x(high),
                "original": is_original,
            }
        )
        in_words.append(text)
    bottom = DOT_TOP + DOT_ROW * len(rows)
    return {
        "title": title,
        "dots": dots,
        "in_words": "; ".join(in_words) + ".",
        "top": DOT_TOP,
        "bottom": bottom,
        "height": bottom + 24,
        "x": [(place_x(percent / 100), f"{percent} %") for percent in (0, 25, 50, 75, 100)],
    }
