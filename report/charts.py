"""Charts as shapes of SVG: lines, and a dot per row of a table. Figures have their intervals."""

import math

import numpy as np

from support.statistics import Figure, in_words

LEFT, RIGHT, TOP, BOTTOM = 60, 390, 20, 190  # the plot area of a line chart of 400 × 220 units
LEGEND = 125  # units for the name of the first line
DOT_LEFT, DOT_RIGHT = 150, 380  # the plot area of a dot chart that is 400 units wide
DOT_TOP, DOT_ROW = 8, 24
NAME_LENGTH = 20  # letters of a name that fit left of the dots
PERCENT = [(percent / 100, f"{percent} %") for percent in (0, 25, 50, 75, 100)]


def shape(tag, style=None, text="", about="", **places):
    """An element of SVG. text: of <text>; about: what the pointer shows."""
    places = {key: round(x, 1) if isinstance(x, float) else x for key, x in places.items()}
    return {"tag": tag, "attributes": {"class": style} | places, "text": text, "about": about}


def ticks(low, high):
    """About five round numbers from low to high."""
    wanted = (high - low) / 4
    power = 10 ** math.floor(math.log10(wanted))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(step - wanted))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def running_mean(line, window):
    """[(x, y)] -> [(x, mean of the last `window` values of y)]; of fewer at the beginning."""
    values = [y for _, y in line]
    return [(x, np.mean(values[max(0, i + 1 - window) : i + 1])) for i, (x, _) in enumerate(line)]


def line_chart(title, series, unit="iteration", faint=False):
    """Lines {name: [(x, y)]}. y: a number, or a Figure, drawn as its share with its interval.

    faint: the first line is drawn as a background of the others.
    """
    points = [point for line in series.values() for point in line]
    has_intervals = isinstance(points[0][1], Figure)
    if has_intervals:
        y_min, y_max, y_ticks = 0.0, 1.0, PERCENT
        caption = f"By {unit}. The band is the 95\N{NO-BREAK SPACE}% Wilson interval."
    else:
        y_s = [0.0, *(y for _, y in points)]
        y_min, y_max = min(y_s), max(y_s) if any(y_s) else 1.0
        y_ticks = [(y, f"{y:.3g}") for y in ticks(y_min, y_max)]
        caption = f"By {unit}, counted from 0."
    x_max = max(x for x, _ in points) or 1

    def place(x, y):
        height = (y - y_min) / (y_max - y_min)
        return LEFT + (RIGHT - LEFT) * x / x_max, BOTTOM - (BOTTOM - TOP) * height

    def path(points):
        return " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)

    shapes, described = [], []
    for number, name in y_ticks:
        _, y = place(0, number)
        shapes.append(shape("line", "axis", x1=LEFT, x2=RIGHT, y1=y, y2=y))
        shapes.append(shape("text", "end", name, x=LEFT - 6, y=y + 4))
    for number in ticks(0, x_max):
        if number == round(number):  # there are no parts of a step
            shapes.append(shape("text", text=f"{number:g}", x=place(number, 0)[0], y=BOTTOM + 18))
    styles = ["faint"] * faint + ["line0", "line1"]
    for i, (style, (name, line)) in enumerate(zip(styles, series.items())):
        if len(series) > 1:  # the legend, above the plot area
            x = LEFT + LEGEND * i
            shapes.append(shape("line", style, x1=x, x2=x + 20, y1=8, y2=8))
            shapes.append(shape("text", "start", name, x=x + 26, y=12))
        abouts = [""] if len(line) == 1 else []  # a line of one point is a circle
        words = "" if has_intervals else ends_and_range(line)
        if has_intervals:
            abouts = [f"{unit} {x}: {in_words(y)}" for x, y in line]
            words = ", ".join(dict.fromkeys([abouts[0], abouts[-1]]))
            low, high = zip(*(((x, y.interval[0]), (x, y.interval[1])) for x, y in line))
            shapes.append(shape("polygon", f"band {style}", points=path([*low, *high[::-1]])))
            line = [(x, y.share) for x, y in line]
        shapes.append(shape("polyline", style, points=path(line)))
        for point, about in zip(line, abouts):
            x, y = place(*point)
            shapes.append(shape("circle", style, about=about, cx=x, cy=y, r=3))
        described.append(f"{name}: {words}")
    chart = {"title": title, "height": 220, "shapes": shapes, "in_words": "; ".join(described)}
    return chart | {"caption": caption}


def ends_and_range(line):
    """A line of numbers in words, for readers who cannot see it."""
    (first, start), (last, end) = line[0], line[-1]
    numbers = [y for _, y in line]
    return (
        f"{start:.3g} at iteration {first:.0f}, {end:.3g} at iteration {last:.0f}, "
        f"between {min(numbers):.3g} and {max(numbers):.3g}"
    )


def dot_chart(title, arrow, rows):
    """[(name, Figure, is it the original's?)] as dots with intervals, from 0 to 100 %."""
    bottom, shapes, described = DOT_TOP + DOT_ROW * len(rows), [], []

    def place(share):
        return DOT_LEFT + (DOT_RIGHT - DOT_LEFT) * share

    for share, name in PERCENT:
        x = place(share)
        shapes.append(shape("line", "axis", x1=x, x2=x, y1=DOT_TOP, y2=bottom))
        shapes.append(shape("text", text=name, x=x, y=bottom + 16))
    for i, (name, figure, is_original) in enumerate(rows):
        y, (low, high) = DOT_TOP + DOT_ROW * (i + 0.5), figure.interval
        about = f"{name}: {in_words(figure)}, n = {figure.n}"
        short = name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"
        style = "original" if is_original else "line0"
        shapes += [
            shape("text", "end", short, about, x=DOT_LEFT - 8, y=y + 4),
            shape("line", style, about=about, x1=place(low), x2=place(high), y1=y, y2=y),
            shape("circle", f"dot {style}", about=about, cx=place(figure.share), cy=y, r=4),
        ]
        described.append(about)
    words = "; ".join(described)
    height = bottom + 24
    return {"title": title, "arrow": arrow, "height": height, "shapes": shapes, "in_words": words}
