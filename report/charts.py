"""Line charts as shapes of SVG. Figures have their intervals."""

import math

import numpy as np

from support.statistics import Figure, in_words

LEFT, RIGHT, TOP, BOTTOM = 60, 390, 20, 190  # the plot area of a line chart of 400 × 220 units
LEGEND = 125  # units for the name of the first line
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

    shapes = []
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
        if has_intervals:
            abouts = [f"{unit} {x}: {in_words(y)}" for x, y in line]
            low, high = zip(*(((x, y.interval[0]), (x, y.interval[1])) for x, y in line))
            shapes.append(shape("polygon", f"band {style}", points=path([*low, *high[::-1]])))
            line = [(x, y.share) for x, y in line]
        shapes.append(shape("polyline", style, points=path(line)))
        for point, about in zip(line, abouts):
            x, y = place(*point)
            shapes.append(shape("circle", style, about=about, cx=x, cy=y, r=3))
    return {"title": title, "caption": caption, "shapes": shapes}
