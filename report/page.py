"""A page about a training run or an evaluation: index.html in its folder, pictures inside, which needs no server and no network.

    python -m report.page runs/0001-star        makes the page of a run, or of a folder of eval.py, again

It reads only what lies in the folder (run.json, log.csv, previews/, before_after.png; eval.json, results.json, table.md, sheets,
plots), so it can be made while the run goes on, after a kill, and long after. What is missing or damaged is said on the page.
"""

import argparse
import base64
import csv
import datetime
import functools
import io
import json
import math
import shlex
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from support.errors import UserError
from support.files import atomic_write

FRAMES = 40  # of the film at most: 40 × 6 prompts × 2 JPEGs of 256 pixels a side are some 5 MB
POINTS = 400  # of a curve at most: the plot is about as many pixels wide
TOP, PAD = 22, 4  # pixels, images.grid's: the line of column names, and the rim of each picture
CURVES = {
    "Loss": {"loss": "loss"},
    "Learning rate": {"lr": "learning rate"},
    "Gap: concept to empty prompt": {"gap_student": "student", "gap_teacher": "teacher"},
    "Drift of the empty prompt": {"drift_student": "student", "drift_teacher": "teacher"},
}
FIGURES = [key for curve in CURVES.values() for key in curve]  # columns of log.csv


# ------------------------------------------------------------------------------------------------ pictures
def opened(file, missing):
    """The picture in a file as RGB; None if there is no such file, or none that can be read, which is then told in `missing`."""
    try:
        return Image.open(file).convert("RGB")
    except FileNotFoundError:
        return None
    except (
        Exception
    ) as e:  # pillow's decoders raise whatever they like: OSError, SyntaxError, ValueError, …
        missing.append(f"{file.name} cannot be read ({type(e).__name__}).")
        return None


def data_uri(image, side):
    """The picture within `side` pixels: PNG if it is small, else JPEG, which is a tenth as large."""
    image = image.copy()
    image.thumbnail((side, side))
    kind, buffer = "PNG" if max(image.size) <= 128 else "JPEG", io.BytesIO()
    image.save(buffer, kind, quality=85, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def cells(sheet, rows, columns, side):
    """images.grid's sheet of square pictures -> their data URIs, `columns` a row; None if it is laid out otherwise."""
    size = (sheet.height - TOP - PAD) / rows - PAD if rows else 0
    left = sheet.width - PAD - columns * (size + PAD)
    if size < 1 or size != int(size) or left < 0:
        return None
    size, left = int(size), int(left)
    x, y = (
        [start + PAD + i * (size + PAD) for i in range(n)]
        for start, n in ((left, columns), (TOP, rows))
    )
    return [
        [data_uri(sheet.crop((x_j, y_i, x_j + size, y_i + size)), side) for x_j in x] for y_i in y
    ]


def preview_sheets(folder):
    """The files previews/000020.png, … by iteration; what a kill left half written is none of them."""
    return sorted(file for file in (folder / "previews").glob("*.png") if file.stem.isdigit())


def compared(folder, prompts, previews, missing):
    """What the slider shows: (what is after, [{prompt, before, after}]), from before_after.png or the newest preview."""
    newest = [
        (file, 3, f"the student after {int(file.stem)} iterations") for file in previews[::-1]
    ]
    for file, columns, after in [(folder / "before_after.png", 2, "the erased model"), *newest]:
        sheet = opened(file, missing)
        rows = cells(sheet, len(prompts), columns, 512) if sheet else None
        if rows:
            return after, [
                {"prompt": prompt, "before": row[0], "after": row[1]}
                for prompt, row in zip(prompts, rows)
            ]
    return None, []


def film(prompts, previews, missing):
    """[{done, pictures: [{prompt, student, teacher}], sheet}], a frame a preview; `sheet` is one that cannot be cut."""
    if len(previews) > FRAMES:
        previews = [previews[round(i * (len(previews) - 1) / (FRAMES - 1))] for i in range(FRAMES)]
    frames = []
    for file in previews:
        sheet = opened(file, missing)
        rows = cells(sheet, len(prompts), 3, 256) if sheet else None
        pictures = [
            {"prompt": prompt, "student": row[1], "teacher": row[2]}
            for prompt, row in zip(prompts, rows or [])
        ]
        whole = data_uri(sheet, 1280) if sheet and not rows else None
        frames.append({"done": int(file.stem), "pictures": pictures, "sheet": whole})
    return frames


# ------------------------------------------------------------------------------------------------ figures
def number(text):
    """A finite float, or None."""
    try:
        return x if math.isfinite(x := float(text)) else None
    except (TypeError, ValueError):
        return None


def logged(file):
    """The rows of log.csv as {column: number or None}; a line that is cut off or damaged is left out."""
    try:
        with open(file, newline="", encoding="utf-8", errors="replace") as f:
            rows = [
                {key: number(row.get(key)) for key in ("iteration", *FIGURES)}
                for row in csv.DictReader(f)
            ]
    except (OSError, csv.Error):
        return []
    return [row for row in rows if row["iteration"] is not None]


def ticks(low, high):
    """Some five round numbers from low to high."""
    raw = (high - low) / 4
    step = min(
        (m * 10 ** math.floor(math.log10(raw)) for m in (1, 2, 5, 10)),
        key=lambda step: abs(step - raw),
    )
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def chart(title, series):
    """What the template needs to draw {name: [(x, y)]} in 400 × 220 units: lines, ticks, and the same in words."""
    n = math.ceil(max(map(len, series.values())) / POINTS)
    means = {
        name: [np.mean(line[i : i + n], axis=0) for i in range(0, len(line), n)]
        for name, line in series.items()
    }
    last, top = (
        float(max(point[axis] for points in means.values() for point in points)) or 1.0
        for axis in (0, 1)
    )
    lines, said = [], []
    for name, line in series.items():
        drawn = [
            f"{60 + 330 * x / last:.1f},{190 - 170 * max(y, 0) / top:.1f}" for x, y in means[name]
        ]
        lines.append(
            {
                "name": name,
                "points": " ".join(drawn),
                "one": drawn[0].split(",") if len(drawn) == 1 else None,
            }
        )
        said.append(
            f"{name}: {line[0][1]:.3g} at iteration {line[0][0]:.0f}, {line[-1][1]:.3g} at iteration {line[-1][0]:.0f}, "
            f"between {min(y for _, y in line):.3g} and {max(y for _, y in line):.3g}"
        )
    x, y = (
        [(60 + 330 * x / last, f"{x:g}") for x in ticks(0, last)],
        [(190 - 170 * y / top, f"{y:.3g}") for y in ticks(0, top)],
    )
    return {
        "title": title,
        "lines": lines,
        "said": "; ".join(said) + ".",
        "averaged": n,
        "x": x,
        "y": y,
    }


def charts(rows):
    """A chart for each of CURVES that has figures."""
    for title, columns in CURVES.items():
        series = {
            name: [(row["iteration"], row[key]) for row in rows if row[key] is not None]
            for key, name in columns.items()
        }
        if any(series.values()):
            yield chart(title, {name: line for name, line in series.items() if line})


def some(rows):
    """The rows for a table: those at previews, which have all figures; of a run without previews 20, evenly."""
    found = [row for row in rows if row["gap_student"] is not None] or rows
    return (
        found
        if len(found) <= FRAMES
        else [found[round(i * (len(found) - 1) / 19)] for i in range(20)]
    )


# ------------------------------------------------------------------------------------------------ a page
def settings(file, missing):
    """A JSON file's object; empty if there is none, or none that can be read."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError):
        missing.append(f"{file.name} cannot be read.")
        return {}


def shown(value):
    """A setting in words."""
    return (
        (", ".join(map(str, value)) if isinstance(value, list) else str(value))
        if value not in (None, [])
        else "none"
    )


def of_run(folder):
    """What the template shows of a training run."""
    missing = []
    run = settings(folder / "run.json", missing)
    a, rows = run["args"] if isinstance(run.get("args"), dict) else {}, logged(folder / "log.csv")
    prompts = [str(prompt) for prompt in a.get("preview") or []]
    previews = preview_sheets(folder)
    after, pairs = compared(folder, prompts, previews, missing)
    frames, patch, model = (
        film(prompts, previews, missing),
        folder / "erased.safetensors",
        str(a.get("model")),
    )
    draw = ["python", "generate.py", *prompts[:1], "--model", model, "--patch", patch.as_posix()]
    seeds = run.get("preview_seeds") or [None]
    again = {
        "--seed": seeds[0],
        "--scheduler": "ddim",
        "--steps": a.get("preview_steps"),
        "--guidance-scale": a.get("preview_guidance_scale"),
    }
    draw += [
        word for flag, value in again.items() if value is not None for word in (flag, str(value))
    ]  # as the preview was drawn
    draw += ["--out", "pictures"]
    return {
        "title": f"Erasing {shown(a.get('concept'))}",
        "after": after,
        "pairs": pairs,
        "frames": frames,
        "args": a,
        "more": len(previews) - len(frames),
        "charts": list(charts(rows)),
        "columns": ["iteration", *FIGURES],
        "rows": some(rows),
        "done": int(rows[-1]["iteration"]) + 1 if rows else 0,
        "finished": patch.is_file(),
        "draw": shlex.join(draw),
        "base": "toy/model" if model == "toy" else model,
        "reads_text": a.get("train_params") == "embedding",
        "command": run.get("command"),
        "versions": run.get("versions"),
        "seeds": ", ".join(map(str, run.get("preview_seeds") or [])),
        "missing": list(dict.fromkeys(missing)),
    }


def of_evaluation(folder):
    """What the template shows of a folder of eval.py."""
    missing, table, notes = [], [], []
    results = settings(folder / "results.json", missing)
    a = (
        results["settings"]
        if isinstance(results.get("settings"), dict)
        else settings(folder / "eval.json", missing)
    )
    if (folder / "table.md").is_file():
        lines = (folder / "table.md").read_text(encoding="utf-8", errors="replace").splitlines()
        table = [
            line[2:-2].split(" | ")
            for line in lines
            if line.startswith("| ") and not line.startswith("| ---")
        ]
        notes = [line for line in lines if line and not line.startswith("|")]
    else:
        missing.append(
            "There is no table yet: repeat the command that began this evaluation, and it goes on."
        )
    order = lambda file: (
        file.stem not in ("curve", "matrix"),
        not file.stem.startswith("original"),
        file.stem,
    )  # noqa: E731
    files = sorted(
        (file for file in folder.glob("*.png") if not file.stem.endswith(".tmp")), key=order
    )
    sheets = [
        (file.stem, data_uri(image, 1280)) for file in files if (image := opened(file, missing))
    ]
    return {
        "title": f"Evaluation: {a.get('suite', folder.name)}",
        "table": table,
        "notes": notes,
        "sheets": sheets,
        "args": a,
        "command": results.get("command"),
        "versions": results.get("versions"),
        "missing": missing,
    }


def make(folder):
    """Writes folder/index.html, whole or not at all. UserError where there is no jinja2, or neither a run nor an evaluation."""
    folder = Path(folder)
    try:
        import jinja2
    except ImportError:
        raise UserError(
            "A page needs jinja2, which is not installed: pip install jinja2."
        ) from None
    run = (folder / "run.json").is_file()
    if not run and not (folder / "eval.json").is_file():
        raise UserError(
            f"{folder} holds neither a run of train.py (run.json) nor an evaluation of eval.py (eval.json)."
        )
    content = of_run(folder) if run else of_evaluation(folder)
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters["shown"] = shown
    text = (
        templates.get_template("page.html.j2").render(
            content, run=run, made=f"{datetime.datetime.now():%Y-%m-%d %H:%M}"
        )
        + "\n"
    )
    with atomic_write(folder / "index.html") as beside:
        beside.write_text(text, encoding="utf-8")


@functools.cache
def warn(text):
    """Says a thing once in a process."""
    print(f"warning: {text}", file=sys.stderr)


def page(folder):
    """`make`, but what goes wrong is a warning: hours of training are worth more than a page about them."""
    try:
        make(folder)
    except Exception as e:
        warn(f"no page was written: {e if type(e).__name__ == 'UserError' else repr(e)}")


# ------------------------------------------------------------------------------------------------ while a run goes on
def require_tensorboard():
    """TensorBoard's writer of events."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--report-to tensorboard needs TensorBoard: pip install tensorboard, or leave it out."
        ) from None
    return SummaryWriter


class Reporter:
    """Keeps the page of a run up to date and, with to="tensorboard", writes events into folder/tensorboard. `start`:
    iterations that are done; TensorBoard hides what an earlier process wrote past them, as they are made again."""

    def __init__(self, folder, to=None, start=0):
        self.folder, self.told = (
            folder,
            {file for file in preview_sheets(folder) if int(file.stem) < start},
        )
        self.writer = (
            require_tensorboard()(folder / "tensorboard", purge_step=start) if to else None
        )

    def log_row(self, row):
        """After a row of log.csv, {column: value}."""
        figures = {key.replace("_", "/"): row[key] for key in FIGURES if key in row}
        self.events(
            lambda: [
                self.writer.add_scalar(key, value, row["iteration"])
                for key, value in figures.items()
            ]
        )
        if "gap_student" in row:
            self.log_previews()

    def log_previews(self):
        """After a preview, and at the end."""
        page(self.folder)
        for file in [file for file in preview_sheets(self.folder) if file not in self.told]:
            self.told.add(file)
            read = lambda: np.asarray(Image.open(file).convert("RGB"))  # noqa: B023, E731
            self.events(
                lambda: self.writer.add_image("previews", read(), int(file.stem), dataformats="HWC")
            )  # noqa: B023

    def events(self, write):
        try:
            if self.writer:
                write()
                self.writer.flush()
        except Exception as e:  # as with the page
            warn(f"TensorBoard's events end here: {e!r}")
            self.writer = None


def main(args):
    try:
        make(args.folder)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(f"{args.folder / 'index.html'} is written: open it in a browser")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="an --out of train.py or eval.py"
    )
    sys.exit(main(parser.parse_args()))
