"""Plots: curve.png (training iterations), matrix.png (suite artists), comeback.png (attacks)."""

import math
import textwrap

from evaluation.columns import REST
from evaluation.findings import curve_finding, is_proportion, matrix_finding, quoted
from report.charts import wilson
from support.files import atomic_write


def plot(rows, columns, suite, folder):
    """Writes the plots that the rows allow. ModuleNotFoundError without matplotlib.

    curve.png: at least one row is named NAME@ITERATION. matrix.png: the suite artists.
    """
    if suite == "artists":
        if any(row["figures"] for row in rows):
            names = [column.key for column in columns if column != REST]
            save(matrix(rows, names), folder / "matrix.png")
        return
    points = curve_points(rows)
    if points:
        save(curve(points, columns), folder / "curve.png")


def save(figure, file):
    with atomic_write(file) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight")


def new_figure(width, height):
    """(figure, axes). matplotlib is imported here, because most tables need no plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def wrapped(text):
    return textwrap.fill(text, 70)


# ---------------------------------------------------------------------------------------- a curve
def curve_points(rows):
    """Rows named NAME@ITERATION -> [(name, iteration, row), …] in the order of the table."""
    points = []
    for row in rows:
        name, _, iteration = row["model"].rpartition("@")
        if name and iteration.isdigit():
            points.append((name, int(iteration), row))
    return points


def shared_column(points, columns):
    """The first column that every point has: proportions everywhere, or numbers everywhere."""
    for column in columns:
        values = [row["figures"].get(column.key) for *_, row in points]
        numbers = all(isinstance(value, int | float) for value in values)
        if numbers or all(is_proportion(value) for value in values):
            return column
    return None


def curve_lines(points, column):
    """{name: [(iteration, figure), …]}, each line by iteration."""
    lines = {}
    for name, iteration, row in points:
        lines.setdefault(name, []).append((iteration, row["figures"][column.key]))
    return {name: sorted(line, key=lambda point: point[0]) for name, line in lines.items()}


def curve(points, columns):
    """The first column that every point has, over iterations, one line per name.

    A band is the 95 % Wilson interval.
    """
    figure, axes = new_figure(7, 4.5)
    column = shared_column(points, columns)
    if column is None:
        axes.set_title("The points have no column in common.")
        return figure
    concepts = list(dict.fromkeys(name for *_, row in points for name in row["erased"]))
    lines = curve_lines(points, column)
    for name, line in lines.items():
        draw_line(axes, name, line)
    axes.set_xlabel("training iteration")
    axes.set_ylabel(
        curve_label(column, concepts, [value for l in lines.values() for _, value in l])
    )
    axes.set_title(wrapped(curve_finding(lines, column, concepts)), fontsize=10)
    axes.legend()
    return figure


def curve_label(column, concepts, values):
    """What the vertical axis shows: the column, the concept, the unit and n."""
    label = f"{column.title}: {quoted(concepts)}"
    if not is_proportion(values[0]):
        return label
    return f"{label}\n% of images, {count_text([n for _, n in values])}, 95 % intervals"


def count_text(counts):
    """n = 100, or n = 80 to 100."""
    low, high = min(counts), max(counts)
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def draw_line(axes, name, line):
    """One line. line: [(iteration or step, figure), …]; proportions get their 95 % intervals."""
    iterations = [iteration for iteration, _ in line]
    values = [value for _, value in line]
    if not all(is_proportion(value) for value in values):
        axes.plot(iterations, values, marker="o", label=name)
        return
    intervals = [wilson(*value) for value in values]
    shares = [100 * hits / n for hits, n in values]
    (drawn,) = axes.plot(iterations, shares, marker="o", label=name)
    axes.fill_between(
        iterations,
        [100 * low for low, _ in intervals],
        [100 * high for _, high in intervals],
        color=drawn.get_color(),
        alpha=0.15,
        linewidth=0,
    )
    axes.set_ylim(-2, 102)


# ---------------------------------------------------------------------------------------- a matrix
def matrix(rows, asked):
    """Figure 2: one row per model, one column per name that is asked for."""
    rows = [row for row in rows if row["figures"]]
    figure, axes = new_figure(2.5 + 1.3 * len(asked), 1.5 + 0.45 * len(rows))
    values = [[row["figures"][name] for name in asked] for row in rows]
    proportions = is_proportion(values[0][0])
    heights = [[height(value) for value in line] for line in values]
    limits = {"vmin": 0, "vmax": 100} if proportions else {}
    image = axes.imshow(heights, aspect="auto", cmap="cividis", **limits)
    middle = sum(image.get_clim()) / 2
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            colour = "white" if heights[i][j] < middle else "black"
            axes.text(j, i, cell_text(value), ha="center", va="center", color=colour, fontsize=8)
    separate_methods(axes, rows)
    figure.colorbar(image, label=matrix_label([value for line in values for value in line]))
    axes.set_xlabel("name in the prompt")
    axes.set_xticks(range(len(asked)), asked, rotation=30, ha="right")
    axes.set_ylabel("model")
    axes.set_yticks(range(len(rows)), [row_label(row) for row in rows])
    axes.set_title(wrapped(matrix_finding(rows)), fontsize=10)
    return figure


def separate_methods(axes, rows):
    """A line between rows of different methods."""
    for i in range(1, len(rows)):
        if rows[i]["method"] != rows[i - 1]["method"]:
            axes.axhline(i - 0.5, color="white", linewidth=3)


def row_label(row):
    if row["model"] == "original":
        return "original"
    return f"{row['model']} (erased: {', '.join(row['erased'])})"


def height(value):
    if is_proportion(value):
        return 100 * value[0] / value[1]
    return math.nan if isinstance(value, tuple | list) else value


def cell_text(value):
    if not is_proportion(value):
        return f"{value:.2f}" if isinstance(value, float) else "–"
    low, high = wilson(*value)
    return f"{height(value):.0f} ({100 * low:.0f}–{100 * high:.0f})"


def matrix_label(values):
    if is_proportion(values[0]):
        return (
            f"% of images that show the name\n{count_text([n for _, n in values])}, 95 % intervals"
        )
    return "LPIPS to the original"


# ------------------------------------------------------------------------------ curves of attacks
def comeback(curves, file):
    """Saves a plot: the share of images that show the concept, over the steps of an attack.

    curves: {name: [{"step", "hits", "n"}]}. The bands are 95 % Wilson intervals.
    """
    figure, axes = new_figure(7, 4.5)
    for name, points in curves.items():
        line = [(point["step"], (point["hits"], point["n"])) for point in points]
        draw_line(axes, name, line)
    axes.axhline(50, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="steps of the attack", ylabel="images that show the concept (%)")
    axes.legend()
    save(figure, file)
