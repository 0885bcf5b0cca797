"""One sentence that says what a table or a plot shows, computed from its figures."""

from evaluation.columns import REST
from support.statistics import compare, figure, in_percent, is_original, original_of, pooled


def quoted(concepts):
    return ", ".join(f"“{concept}”" for concept in concepts)


def joined(names):
    """["a", "b", "c"] -> "a, b and c"."""
    if len(names) < 2:
        return "".join(names)
    return ", ".join(names[:-1]) + " and " + names[-1]


def kind_of(column, rows):
    """What all rows have in a column: "proportion", "number", or None."""
    values = [row["figures"].get(column.key) for row in rows]
    if all(map(figure, values)):
        return "proportion"
    return "number" if all(isinstance(value, int | float) for value in values) else None


def first_column(columns, kind, rows, sides=("low", "high", None)):
    """The first column of a kind in all rows, with one of the better sides; None without one."""
    found = (column for column in columns if column.better in sides)
    return next((column for column in found if kind_of(column, rows) == kind), None)


def summary(suite, rows, columns):
    """One sentence about the rows of results.json; several sets of concepts: one part for each."""
    if suite == "artists":
        return matrix_finding(rows)
    groups = {}
    for row in rows:
        if not is_original(row):
            groups.setdefault(tuple(row["erased"]), []).append(row)
    column = first_column(columns, "proportion", rows)
    if column and not groups:
        value = figure(rows[0]["figures"][column.key])
        return f"The original model: {column.title} {in_percent(value)} of {value.n} images."
    found = (group_finding(some, columns, original_of(some[0], rows)) for some in groups.values())
    text = "; ".join(filter(None, found))
    return f"{text}." if text else ""


def group_finding(group, columns, before):
    """What is left of the concepts, and what stayed of the rest; before: the original's row."""
    rows = [before, *group]
    left = first_column(columns, "proportion", rows, ["low"])
    kept = first_column(columns, "proportion", rows, ["high"])
    if left is None:  # the original has no distance to itself
        for some in (rows, group):
            if column := first_column(columns, "number", some):
                return numbers_finding(some, column)
        return ""
    best, text = least_left(group, left, before)
    if kept:
        then, now = (figure(row["figures"][kept.key]) for row in (before, best))
        text += f", and {kept.title}: {in_percent(now)} (original {in_percent(then)})"
    return text


def least_left(group, column, before=None):
    """(the row with the lowest proportion, the sentence about it). before: the original's row."""

    def left(row):
        return figure(row["figures"][column.key])

    best = min(group, key=lambda row: left(row).share)
    lowest = left(best)
    text = f"{best['model']} leaves the least of {quoted(best['erased'])}: {in_percent(lowest)}"
    if len(group) == 1:
        text = f"{best['model']} leaves {in_percent(lowest)} of {quoted(best['erased'])}"
    text += f" of {lowest.n} images ({column.title}"
    if before:
        found = compare(lowest, left(before))
        text += f"; original {in_percent(left(before))}"
        if found == "open":
            return best, f"{text}), but its interval overlaps with the original's"
        if found == "larger":
            return best, f"{text}), more than the original"
    others = [row for row in group if row is not best]
    rivals = [row["model"] for row in others if compare(left(row), lowest) == "open"]
    overlap = f"; its interval overlaps with {joined(rivals)}" if rivals else ""
    return best, f"{text}){overlap}"


def numbers_finding(rows, column):
    named = [f"{row['model']} {row['figures'][column.key]:.4g}" for row in rows]
    return f"{column.title}: {joined(named)}"


def matrix_finding(rows):
    """Erased names against the other names, pooled over the rows of the suite artists."""
    erased, others = [], []
    for row in rows:
        for name, value in row["figures"].items():
            if not is_original(row) and name != REST.key:
                (erased if name in row["erased"] else others).append(value)
    if not erased or not others:
        return ""
    if figure(erased[0]):
        gone, kept = (pooled(map(figure, values)) for values in (erased, others))
        return (
            f"Asked for an erased name, {in_percent(gone)} of {gone.n} images show it; asked for "
            f"another name, {in_percent(kept)} of {kept.n} images do."
        )
    return (
        f"Mean LPIPS to the original: {sum(erased) / len(erased):.3f} where the name is erased, "
        f"{sum(others) / len(others):.3f} where it is not."
    )


def curve_finding(points, column):
    """Compares the lines of a plot at the last iteration that they share; "" if they share none.

    points: [(line, iteration, row), …].
    """
    lines = {}
    for name, iteration, row in points:
        lines.setdefault(name, {})[iteration] = row | {"model": name}
    shared = set.intersection(*map(set, lines.values()))
    if not shared:
        return ""
    rows = [line[max(shared)] for line in lines.values()]
    if kind_of(column, rows) == "proportion":
        text = least_left(rows, column)[1]
    else:
        text = numbers_finding(rows, column)
    return f"After {max(shared)} iterations, {text}."
