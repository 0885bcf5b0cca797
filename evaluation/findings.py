"""One sentence that says what a table or a plot shows, computed from its figures."""

from evaluation.columns import REST
from report.charts import wilson
from report.evaluation_page import proportion


def is_proportion(value):
    """Is a figure (hits, n) with n > 0? The other figures are numbers, or None."""
    return proportion(value) is not None


def percent(value):
    return f"{100 * value[0] / value[1]:.1f} %"


def overlap(a, b):
    """Do the 95 % intervals of two proportions (hits, n) overlap?"""
    (low_a, high_a), (low_b, high_b) = wilson(*a), wilson(*b)
    return low_a <= high_b and low_b <= high_a


def quoted(concepts):
    return ", ".join(f"“{concept}”" for concept in concepts)


def joined(names):
    """["a", "b", "c"] -> "a, b and c"."""
    if len(names) < 2:
        return "".join(names)
    return ", ".join(names[:-1]) + " and " + names[-1]


def summary(suite, rows, columns):
    """One sentence about the rows of results.json; several sets of concepts: one part for each."""
    if suite == "artists":
        return matrix_finding(rows)
    groups = {}
    for row in rows:
        if row["model"] != "original":
            groups.setdefault(tuple(row["erased"]), []).append(row)
    if not groups:
        return original_alone(rows[0], columns)
    parts = []
    for concepts, group in groups.items():
        before = first_original(rows, concepts)
        parts.append(group_finding(concepts, before, group, columns))
    parts = [part for part in parts if part]
    return "; ".join(parts) + "." if parts else ""


def first_original(rows, concepts):
    """The original's row with the same prompts: of the same concepts, or the only one."""
    originals = [row for row in rows if row["model"] == "original"]
    same = [row for row in originals if tuple(row["erased"]) == concepts]
    return (same or originals)[0]


def original_alone(row, columns):
    for column in columns:
        value = row["figures"].get(column.key)
        if is_proportion(value):
            return f"The original model: {column.title} {percent(value)} of {value[1]} images."
    return ""


def group_finding(concepts, before, group, columns):
    """What is left of the concepts, and what stayed of the rest. Has no full stop."""
    left = shared_proportion(before, group, columns, "low")
    kept = shared_proportion(before, group, columns, "high")
    if left is None:
        return numbers_finding(before, group, columns)
    best, text = least_left(concepts, before, group, left)
    if kept:
        then, now = before["figures"][kept.key], best["figures"][kept.key]
        text += f", and {kept.title}: {percent(now)} (original {percent(then)})"
    return text


def shared_proportion(before, group, columns, better):
    """The first column whose better side is `better` and that has a proportion in every row."""
    for column in columns:
        values = [row["figures"].get(column.key) for row in [before, *group]]
        if column.better == better and all(is_proportion(value) for value in values):
            return column
    return None


def least_left(concepts, before, group, column):
    """(the row with the lowest proportion, the sentence about it)."""

    def share(row):
        hits, n = row["figures"][column.key]
        return hits / n

    best = min(group, key=share)
    value, then = best["figures"][column.key], before["figures"][column.key]
    if len(group) == 1:
        text = f"{best['model']} leaves {percent(value)} of {quoted(concepts)}"
    else:
        text = f"{best['model']} leaves the least of {quoted(concepts)}: {percent(value)}"
    text += f" of {value[1]} images ({column.title}; original {percent(then)})"
    if overlap(value, then):
        return best, text + ", but its interval overlaps with the original's"
    if share(best) > share(before):
        return best, text + ", more than the original"
    rivals = []
    for row in group:
        if row is not best and overlap(row["figures"][column.key], value):
            rivals.append(row["model"])
    if rivals:
        text += f"; its interval overlaps with {joined(rivals)}"
    return best, text


def numbers_finding(before, group, columns):
    """For numbers: the first column that all rows have, or that all but the original have."""
    for with_original in (True, False):
        rows = [before, *group] if with_original else group
        for column in columns:
            values = [row["figures"].get(column.key) for row in rows]
            if all(isinstance(value, int | float) for value in values):
                named = [f"{row['model']} {value:.4g}" for row, value in zip(rows, values)]
                return f"{column.title}: {joined(named)}"
    return ""


def matrix_finding(rows):
    """Erased names against the other names, pooled over the rows of the suite artists."""
    erased, others = [], []
    for row in rows:
        for name, value in row["figures"].items():
            if row["model"] != "original" and name != REST.key:
                (erased if name in row["erased"] else others).append(value)
    if not erased or not others:
        return ""
    if is_proportion(erased[0]):
        return (
            f"Asked for an erased name, {pooled_text(erased)} show it; asked for another name, "
            f"{pooled_text(others)} do."
        )
    return (
        f"Mean LPIPS to the original: {sum(erased) / len(erased):.3f} where the name is erased, "
        f"{sum(others) / len(others):.3f} where it is not."
    )


def pooled_text(values):
    """Proportions added up, as text: "12.5 % of 200 images"."""
    hits, n = (sum(column) for column in zip(*values))
    return f"{percent((hits, n))} of {n} images"


def curve_finding(points, column, concepts):
    """Compares the lines of a plot at the last iteration that they share; "" if they share none.

    points: {line: [(iteration, figure), …]}.
    """
    shared = set.intersection(*({i for i, _ in line} for line in points.values()))
    if not shared:
        return ""
    last = max(shared)
    at_last = {name: dict(line)[last] for name, line in points.items()}
    if not all(is_proportion(value) for value in at_last.values()):
        named = [f"{name} {value:.4g}" for name, value in at_last.items() if value is not None]
        return f"After {last} iterations, {column.title}: {joined(named)}."
    first = min(at_last, key=lambda name: at_last[name][0] / at_last[name][1])
    value = at_last[first]
    text = f"After {last} iterations {first} shows {quoted(concepts)} in {percent(value)} of images"
    rivals = [name for name in at_last if name != first and overlap(at_last[name], value)]
    if len(at_last) == 1:
        return text + "."
    if rivals:
        return text + f", the lowest; its interval overlaps with {joined(rivals)}."
    return text + ", less than every other line."
