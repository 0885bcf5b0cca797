"""The content of an evaluation's page: the table, dot charts, plots and sample images.

evaluation/tables.py describes results.json, which this file reads. Files of older versions have no
"columns", "paper" and "samples": their columns are named by their keys, in the order of the file,
and the sheets are shown instead of single images.
"""

from report.charts import dot_chart, wilson
from report.inputs import (
    data_uri,
    number,
    read_data_uri,
    read_dict,
    read_image,
    read_json,
    read_list,
)
from support.statistics import figure

CHARTS = 4  # dot charts, of the columns that decide
SAMPLES = 6  # images of each part of a suite
SAMPLE_SIDE = 192  # pixels of a sample image, at most
SHEET_SIDE = 1280  # and of a plot or a sheet
PLOTS = ("curve", "matrix")
ARROWS = {"low": "↓ lower is better", "high": "↑ higher is better"}


def evaluation_content(folder):
    """What evaluation.html.j2 shows of the evaluation in a folder: {name: value}."""
    problems = []
    results = read_json(folder / "results.json", problems)
    settings = read_dict(results, "settings") or read_json(folder / "eval.json", problems)
    rows = [row for row in read_list(results, "rows") if isinstance(row, dict)]
    columns = read_columns(results, rows)
    if not rows:
        problems.append("There is no table yet. Run the command of this evaluation again.")
    several = len({erased(row) for row in rows}) > 1
    return {
        "suite": settings.get("suite", folder.name),
        "summary": results.get("summary"),
        "settings": settings,
        "head": [column_head(column, rows) for column in columns],
        "several": several,
        "rows": [table_row(row, rows, columns) for row in rows],
        "charts": dot_charts(rows, columns, several),
        "notes": read_list(results, "notes"),
        "samples": sample_tables(folder, rows, several, problems),
        "sheets": sheets(folder, rows, problems),
        "command": results.get("command"),
        "versions": read_dict(results, "versions"),
        "problems": problems,
    }


# -------------------------------------------------------------------------------------- table
def read_columns(results, rows):
    """[{key, title, better, about}] of the columns that a row has, the deciding ones first."""
    keys = list(dict.fromkeys(key for row in rows for key in read_dict(row, "figures")))
    given = [c for c in read_list(results, "columns") if isinstance(c, dict) and "key" in c]
    columns = given or [{"key": key, "title": key.replace("_", " ")} for key in keys]
    defaults = {"better": None, "about": ""}
    return [defaults | column for column in columns if column["key"] in keys]


def proportion(value):
    """(hits, n) if the figure is a proportion with n > 0, else None."""
    found = figure(value)
    return (found.hits, found.n) if found else None


def erased(row):
    """The concepts of a row in one text."""
    return ", ".join(str(concept) for concept in read_list(row, "erased"))


def name_of(row, several):
    """The row's name; with its concepts if the rows erase different ones."""
    name = str(row.get("model", "?"))
    return f"{name} ({erased(row)})" if several and erased(row) else name


def is_original(row):
    return row.get("model") == "original"


def original_of(row, rows):
    """The original's row to compare with: of the same concepts, or the only one."""
    originals = [other for other in rows if is_original(other)]
    same = [other for other in originals if erased(other) == erased(row)]
    return next(iter(same or originals), None)


def column_head(column, rows):
    """{title, arrow, n, about, paper} of a column."""
    values = [proportion(read_dict(row, "figures").get(column["key"])) for row in rows]
    counts = {value[1] for value in values if value}
    sign = "=" if len(counts) == 1 else "≤"
    return {
        "title": column["title"],
        "arrow": ARROWS.get(column["better"], ""),
        "n": f"n {sign} {max(counts)}" if counts else "",
        "about": column["about"],
        "paper": any(column["key"] in read_dict(row, "paper") for row in rows),
    }


def table_row(row, rows, columns):
    """{name, erased, cells: [{text, mark, paper}]}; the mark is "better", "worse" or ""."""
    before = original_of(row, rows)
    cells = []
    for column in columns:
        value = read_dict(row, "figures").get(column["key"])
        then = read_dict(before, "figures").get(column["key"]) if before else None
        mark = "" if is_original(row) else compare(value, then, column["better"])
        paper = number(read_dict(row, "paper").get(column["key"]))
        cells.append(
            {
                "text": cell(value),
                "mark": mark,
                "paper": "–" if paper is None else f"{paper:.4g}",
            }
        )
    return {"name": str(row.get("model", "?")), "erased": erased(row) or "–", "cells": cells}


def cell(value):
    """A figure as text: a number, or "–", or "12.0 (7–20)", per cent with their 95 % interval."""
    if hits_n := proportion(value):
        hits, n = hits_n
        low, high = wilson(hits, n)
        return f"{100 * hits / n:.1f} ({100 * low:.0f}–{100 * high:.0f})"
    value = number(value)
    return "–" if value is None else f"{value:.4g}"


def compare(value, original, better):
    """ "better" or "worse" than the original if the two 95 % intervals do not overlap, else ""."""
    value, original = proportion(value), proportion(original)
    if not value or not original or better not in ARROWS:
        return ""
    (low, high), (low_before, high_before) = wilson(*value), wilson(*original)
    if high < low_before:
        return "better" if better == "low" else "worse"
    if low > high_before:
        return "better" if better == "high" else "worse"
    return ""


# -------------------------------------------------------------------------------------- charts
def dot_charts(rows, columns, several):
    """A dot chart for each of the first columns that are proportions in at least two rows."""
    charts = []
    for column in columns:
        dots = []
        for row in rows:
            if value := proportion(read_dict(row, "figures").get(column["key"])):
                dots.append((name_of(row, several), value, is_original(row)))
        if len(dots) >= 2:
            chart = dot_chart(column["title"], dots)
            charts.append(chart | {"arrow": ARROWS.get(column["better"], "")})
    return charts[:CHARTS]


# -------------------------------------------------------------------------------------- images
def sample_tables(folder, rows, several, problems):
    """[{title, prompts, rows: [{name, images}]}]: a table per part of the suite.

    Rows with the same prompts share a table.
    """
    tables = {}
    for row in rows:
        for part in read_list(row, "samples"):
            if not isinstance(part, dict):
                continue
            images = [image for image in read_list(part, "images") if isinstance(image, dict)]
            images = images[:SAMPLES]
            prompts = tuple(str(image.get("prompt", "")) for image in images)
            key = str(part.get("title", "")), prompts
            files = [folder / str(image.get("file", "")) for image in images]
            uris = [read_data_uri(file, SAMPLE_SIDE, problems) for file in files]
            tables.setdefault(key, []).append({"name": name_of(row, several), "images": uris})
    return [
        {"title": title, "prompts": prompts, "rows": found}
        for (title, prompts), found in tables.items()
    ]


def sheets(folder, rows, problems):
    """[(name, data URI)] of the plots; without single images also of the sheets."""
    has_samples = any(read_list(row, "samples") for row in rows)
    plots, others = [], []
    for file in sorted(folder.glob("*.png")):
        if file.stem in PLOTS:
            plots.append(file)
        elif not has_samples:
            others.append(file)
    others.sort(key=lambda file: not file.stem.startswith("original"))
    found = []
    for file in plots + others:
        image, _ = read_image(file, problems)
        if image:
            found.append((file.stem, data_uri(image, SHEET_SIDE)))
    return found
