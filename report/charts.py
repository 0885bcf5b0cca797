"""Charts as the numbers that the templates draw in SVG: lines, and dots with intervals."""

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


def interval_in_words(hits, n):
    """A proportion with its 95 % interval."""
    low, high = wilson(hits, n)
    return f"{100 * hits / n:.1f} % ({100 * low:.0f} to {100 * high:.0f} %)"


def ticks(low, high):
    """About five round numbers from low to high."""
    wanted = (high - low) / 4
    power = 10 ** math.floor(math.log10(wanted))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(step - wanted))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
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
    y_min = min(0.0, *(float(y) for _, y in points))
    y_max = max(0.0, *(float(y) for _, y in points))
    if y_min == y_max:
        y_max = 1.0
    strong = [name for name in series if name != faint]
    lines = []
    for name, line in means.items():
        style = "faint" if name == faint else f"line{strong.index(name)}"
        placed = place(line, x_max, y_max, y_min)
        dots = [(*placed[0].split(","), "")] if len(placed) == 1 else []
        line = {"name": name, "style": style, "points": " ".join(placed), "dots": dots}
        lines.append(line | {"band": None})
    grouped = f"; each point is the mean of {group} iterations" if group > 1 else ""
    return {
        "title": title,
        "lines": lines,
        "in_words": "; ".join(describe(name, line) for name, line in series.items()) + ".",
        "caption": f"By iteration, counted from 0{grouped}.",
        "x": [(place_x(x, x_max), f"{x:g}") for x in ticks(0, x_max)],
        "y": [(place_y(y, y_max, y_min), f"{y:.3g}") for y in ticks(y_min, y_max)],
    }


def share_chart(title, series, unit):
    """{name: [(x, hits, n)]} -> the same for shares from 0 to 100 %: lines with Wilson intervals.

    unit: what x counts, "step" or "attempt".
    """
    x_max = float(max(x for line in series.values() for x, _, _ in line)) or 1.0
    lines, in_words = [], []
    for i, (name, counts) in enumerate(series.items()):
        shares = [(x, hits / n) for x, hits, n in counts]
        lows = [(x, wilson(hits, n)[0]) for x, hits, n in counts]
        highs = [(x, wilson(hits, n)[1]) for x, hits, n in counts]
        texts = [f"{unit} {x}: {interval_in_words(hits, n)}" for x, hits, n in counts]
        placed = place(shares, x_max)
        lines.append(
            {
                "name": name,
                "style": f"line{i}",
                "points": " ".join(placed),
                "band": " ".join(place([*lows, *reversed(highs)], x_max)),
                "dots": [(*point.split(","), text) for point, text in zip(placed, texts)],
            }
        )
        in_words.append(f"{name}: {texts[0]}, {texts[-1]}" if len(texts) > 1 else texts[0])
    return {
        "title": title,
        "lines": lines,
        "in_words": "; ".join(in_words) + ".",
        "caption": f"By {unit}. The band is the 95\N{NO-BREAK SPACE}% Wilson interval.",
        "x": [(place_x(x, x_max), f"{x:g}") for x in ticks(0, x_max) if x == round(x)],
        "y": [(place_y(percent / 100, 1), f"{percent} %") for percent in (0, 25, 50, 75, 100)],
    }


def place_x(x, x_max):
    return LEFT + (RIGHT - LEFT) * x / x_max


def place_y(y, y_max, y_min=0.0):
    return BOTTOM - (BOTTOM - TOP) * (y - y_min) / (y_max - y_min)


def place(line, x_max, y_max=1.0, y_min=0.0):
    """[(x, y)] -> their places in a line chart, as SVG writes them: ["x,y"]."""
    return [f"{place_x(x, x_max):.1f},{place_y(y, y_max, y_min):.1f}" for x, y in line]


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

    def place_share(share):
        return f"{DOT_LEFT + (DOT_RIGHT - DOT_LEFT) * share:.1f}"

    dots, in_words = [], []
    for i, (name, (hits, n), is_original) in enumerate(rows):
        share, (low, high) = hits / n, wilson(hits, n)
        text = f"{name}: {interval_in_words(hits, n)}, n = {n}"
        short = name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"
        dots.append(
            {
                "name": short,
                "text": text,
                "y": DOT_TOP + DOT_ROW * (i + 0.5),
                "x": place_share(share),
                "low": place_share(low),
                "high": place_share(high),
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
        "x": [(place_share(percent / 100), f"{percent} %") for percent in (0, 25, 50, 75, 100)],
    }
