"""Plots: curve.png (rows NAME@ITERATION), matrix.png (suite artists), comeback.png (attacks)."""

import math
import textwrap

from evaluation.columns import REST
from evaluation.findings import curve_finding, kind_of, matrix_finding, quoted
from support.files import atomic_write
from support.statistics import cell, counted, figure, is_original, n_text


def plot(rows, columns, suite, folder):
    """Writes the plots that the rows allow. ModuleNotFoundError without matplotlib."""
    points = curve_points(rows)
    if suite == "artists" and columns:
        names = [column.key for column in columns if column != REST]
        save(matrix(rows, names), folder / "matrix.png")
    elif suite != "artists" and points:
        save(curve(points, columns), folder / "curve.png")


def save(drawing, file):
    with atomic_write(file) as temporary:
        drawing.savefig(temporary, dpi=120, bbox_inches="tight")


def new_drawing(width, height):
    """(matplotlib's figure, its axes). matplotlib is imported here: most tables need no plot."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height))
    return drawing, drawing.subplots()


def label(text, values):
    """A label with the unit. values: proportions, or numbers, which have no unit."""
    n = n_text(values)
    return f"{text}\n% of images, {n}, 95 % intervals" if n else text


# ---------------------------------------------------------------------------------------- a curve
def curve_points(rows):
    """Rows named NAME@ITERATION -> [(name, iteration, row), …] in the order of the table."""
    points = []
    for row in rows:
        name, _, iteration = row["model"].rpartition("@")
        if name and iteration.isdigit():
            points.append((name, int(iteration), row))
    return points


def curve(points, columns):
    """The first column that every point has, over iterations, one line per name."""
    drawing, axes = new_drawing(7, 4.5)
    rows = [row for *_, row in points]
    column = next((column for column in columns if kind_of(column, rows)), None)
    if column is None:
        axes.set_title("The points have no column in common.")
        return drawing
    lines = {}
    for name, iteration, row in points:
        lines.setdefault(name, []).append((iteration, row["figures"][column.key]))
    for name, line in lines.items():
        draw_line(axes, name, sorted(line, key=lambda point: point[0]))
    concepts = quoted(dict.fromkeys(concept for row in rows for concept in row["erased"]))
    values = [row["figures"][column.key] for row in rows]
    axes.set_xlabel("training iteration")
    axes.set_ylabel(label(f"{column.title}: {concepts}", values))
    axes.set_title(textwrap.fill(curve_finding(points, column), 70), fontsize=10)
    axes.legend()
    return drawing


def draw_line(axes, name, line):
    """line: [(iteration or step, value), …]. Proportions get a band, the 95 % Wilson interval."""
    steps = [step for step, _ in line]
    figures = [figure(value) for _, value in line]
    if not all(figures):
        axes.plot(steps, [value for _, value in line], marker="o", label=name)
        return
    (drawn,) = axes.plot(steps, [one.percent for one in figures], marker="o", label=name)
    low, high = ([100 * end for end in ends] for ends in zip(*(one.interval for one in figures)))
    axes.fill_between(steps, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    axes.set_ylim(-2, 102)


# ---------------------------------------------------------------------------------------- a matrix
def matrix(rows, asked):
    """Figure 2: one row per model, one column per name that is asked for."""
    rows = [row for row in rows if row["figures"]]
    drawing, axes = new_drawing(2.5 + 1.3 * len(asked), 1.5 + 0.45 * len(rows))
    labels = [row["model"] for row in rows]
    for i, row in enumerate(rows):
        if not is_original(row):
            labels[i] += f" (erased: {', '.join(row['erased'])})"
    values = [[row["figures"][name] for name in asked] for row in rows]
    shares = [[height(value) for value in line] for line in values]
    limits = {"vmin": 0, "vmax": 100} if figure(values[0][0]) else {}
    image = axes.imshow(shares, aspect="auto", cmap="cividis", **limits)
    middle = sum(image.get_clim()) / 2
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            colour = "white" if shares[i][j] < middle else "black"
            text = f"{value:.2f}" if isinstance(value, float) else cell(value, digits=0)
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    for i in range(1, len(rows)):
        if rows[i]["method"] != rows[i - 1]["method"]:
            axes.axhline(i - 0.5, color="white", linewidth=3)
    what = "images that show the name" if limits else "LPIPS to the original"
    drawing.colorbar(image, label=label(what, [value for line in values for value in line]))
    axes.set_xlabel("name in the prompt")
    axes.set_xticks(range(len(asked)), asked, rotation=30, ha="right")
    axes.set_ylabel("model")
    axes.set_yticks(range(len(rows)), labels)
    axes.set_title(textwrap.fill(matrix_finding(rows), 70), fontsize=10)
    return drawing


def height(value):
    if found := figure(value):
        return found.percent
    return math.nan if value is None else value


# ------------------------------------------------------------------------------ curves of attacks
def attack_curves(curves, file):
    """Saves a plot: the share of images that show the concept, over the steps of an attack.

    curves: {name: [{"step", "hits", "n"}]}.
    """
    drawing, axes = new_drawing(7, 4.5)
    for name, points in curves.items():
        line = [(point["step"], counted(point["hits"], point["n"])) for point in points]
        draw_line(axes, name, line)
    axes.axhline(50, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="steps of the attack", ylabel="images that show the concept (%)")
    axes.legend()
    save(drawing, file)
