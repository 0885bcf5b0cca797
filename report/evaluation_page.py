"""The page of an evaluation: the table with a bar per figure, sample images and plots.

evaluation/tables.py describes results.json, which this file reads.
"""

from report.blocks import SDD, made, read_image
from support.runs import read_json
from support.statistics import cell, figure, is_original, judge, n_text, original_of

SAMPLES = 6  # images of each part of a suite
SAMPLE_SIDE = 192  # pixels of a sample image, at most
PLOT_SIDE = 1280  # and of a plot
PLOTS = ("curve", "matrix")
ARROWS = {"low": "↓ lower is better", "high": "↑ higher is better", None: ""}
NO_TABLE = "There is no table yet. Run the command of this evaluation again."
LEGEND = (
    "A figure with brackets is a percentage with its 95\N{NO-BREAK SPACE}% Wilson interval. "
    "The bar below it goes from 0 to 100\N{NO-BREAK SPACE}%: the blue part is the interval, the "
    "line in it the figure. “better” and “worse” compare with the original model, where the two "
    "intervals do not overlap."
)


def evaluation_page(folder):
    """The page of the evaluation in a folder; see blocks.py."""
    settings, results = read_json(folder / "eval.json"), read_json(folder / "results.json")
    sections = []
    if results:
        rows, columns = results["rows"], results["columns"]
        several = len({erased(row) for row in rows}) > 1
        names = [f"{row['model']} ({erased(row)})" if several else row["model"] for row in rows]
        sections = [
            ("table", "Table", table(rows, columns, several, results["notes"])),
            ("samples", "Sample images", samples(folder, rows, names)),
            ("plots", "Plots", plots(folder)),
        ]
    return {
        "heading": f"Evaluation: {settings['suite']}",
        "subtitle": results.get("summary") or "",
        "intro": [] if results else [{"text": NO_TABLE}],
        "sections": [*sections, made(results, settings)],
        "model": settings["model"],
        "paper": SDD,
    }


def erased(row):
    return ", ".join(row["erased"]) or "–"


def table(rows, columns, several, notes):
    """A line per row. The paper's figures stand in columns of their own."""
    shown = [("model", [row["model"] for row in rows])]
    if several:
        shown.append(("erased", [erased(row) for row in rows]))
    for column in columns:
        key, title = column["key"], column["title"]
        below = [ARROWS[column["better"]], n_text(row["figures"].get(key) for row in rows)]
        head = {"text": title, "lines": list(filter(None, below)), "about": column["about"]}
        shown.append((head, [figure_cell(row, rows, column) for row in rows]))
        if any(key in row["paper"] for row in rows):
            shown.append((f"{title} in the paper", [cell(row["paper"].get(key)) for row in rows]))
    head, cells = zip(*shown)
    blocks = [{"table": list(zip(*cells)), "head": head, "style": "measured", "label": "Table"}]
    if not several and rows[-1]["erased"]:
        blocks.append({"text": f"Erased: {erased(rows[-1])}.", "style": "soft"})
    return [*blocks, {"text": LEGEND, "style": "soft"}, *({"text": note} for note in notes)]


def figure_cell(row, rows, column):
    """A figure, marked as better or worse than the original where the intervals do not overlap."""
    key, better = column["key"], column["better"]
    value, original = row["figures"].get(key), original_of(row, rows)
    now, then = figure(value), original and figure(original["figures"].get(key))
    found = {"text": cell(value), "mark": ""}
    if now:
        found["bar"] = [
            f"{100 * share:.1f}%" for share in (now.interval[0], now.share, now.interval[1])
        ]
    if now and then and better and not is_original(row):
        found["mark"] = judge(now, then, better).replace("open", "")
    return found


def samples(folder, rows, names):
    """A table of images for each part of the suite; rows with the same prompts share it."""
    parts = {}
    for row, name in zip(rows, names):
        for part in row["samples"]:
            line, prompts = [name], []
            for image in part["images"][:SAMPLES]:
                alt = f"{name}: {image['prompt'] or 'empty prompt'}"
                line.append(read_image(folder / image["file"], alt, SAMPLE_SIDE))
                prompts.append(image["prompt"] or "(empty prompt)")
            parts.setdefault((part["title"] or "Prompts", *prompts), []).append(line)
    blocks = [{"text": "Each column is one prompt with the same noise for every model."}]
    for (title, *prompts), lines in parts.items():
        block = {"table": lines, "head": ["model", *prompts], "style": "samples", "title": title}
        blocks.append(block | {"label": f"Images: {title}"})
    return blocks


def plots(folder):
    files = [folder / f"{name}.png" for name in PLOTS]
    return [
        {"sheet": read_image(file, f"plot: {file.stem}", PLOT_SIDE), "title": file.stem}
        for file in files
        if file.exists()
    ]
