"""Measured pictures as tables and plots: table.md, results.json, sheets of samples, matrix.png and curve.png."""

import json
import shlex
import sys

import numpy as np
import torch
from PIL import Image

import weights
from clip_text import tokenize
from evaluation import metrics
from evaluation.suites import SUITES, paper
from report import page
from support.censor import censoring
from support.errors import UserError
from support.files import atomic_write
from support.images import grid, save_png

TITLES = {
    "nude": "%NUDE",
    "harm": "%HARM",
    "fid": "FID",
    "kid": "KID",
    "lpips": "LPIPS to the original",
    "ssim": "SSIM to the original",
    "clip_score": "CLIP score",
}


def measure(key, system, files, jobs, others, args, device):
    """{column: (hits, n) or a number}, one of the suite's measures of pictures; `others`: the original's, from the same noise."""
    if key == "toy":
        from toy import suite, worlds

        pairs = metrics.arrays(files), metrics.arrays(others)
        return suite.measure(worlds.of(args.model), *pairs, jobs, system.concepts)
    if key == "matrix":
        return figure_2(files, jobs, others, args.model)
    same, learned = files == others, args.q16 and learned_prompts(args.q16)
    given = {
        "nude": [],
        "harm": [learned, args.clip, device],
        "fid": [args.real, device],
        "kid": [args.real, device],
        "lpips": [others],
        "ssim": [others],
        "clip_score": [[job.prompt for job in jobs], args.clip, device],
    }[key]
    missing = {
        "harm": not args.q16,
        "fid": not args.real,
        "kid": not args.real,
        "lpips": same,
        "ssim": same,
    }
    return {} if missing.get(key) else {key: getattr(metrics, key)(files, *given)}


def figure_2(files, jobs, others, model):
    """A row of the matrix: of each artist's pictures the share that show what was asked for (embedded model), or how far they moved."""
    found = {}
    for which in dict.fromkeys(job.which for job in jobs):
        mine, before = zip(
            *((file, other) for file, other, job in zip(files, others, jobs) if job.which == which)
        )
        if model in weights.TOYS:
            from toy import suite, worlds

            found[which] = suite.shown(worlds.of(model), metrics.arrays(mine), which)
        elif files != others:
            found[which] = metrics.lpips(mine, before)
    return found


def learned_prompts(file):
    """Q16's two learned prompts, (2, D), from a safetensors or npy file."""
    try:
        if file.suffix == ".npy":
            array = torch.from_numpy(np.load(file, allow_pickle=False))
        else:
            array = next(iter(weights.read(file)[0].values()), None)
    except (OSError, ValueError) as e:
        raise UserError(f"--q16 {file} cannot be read ({e}).") from None
    if array is None or array.dim() != 2 or len(array) != 2:
        raise UserError(f"--q16 {file} should hold one array of two rows, the learned prompts.")
    return array


def cell(value):
    if not isinstance(value, (tuple, list)):
        return "–" if value is None else f"{value:.4g}"
    (hits, n), (low, high) = value, metrics.wilson(*value)
    return f"{100 * hits / n:.1f} ({100 * low:.0f}–{100 * high:.0f})" if n else "–"


def table(rows, titles, suite):
    """Markdown: a row a system; percentages with intervals, n in the header; the paper's figures in columns of their own."""
    columns = [key for key in titles if any(key in row["figures"] for row in rows)]
    known = [paper(suite, row["method"], row["erased"]) for row in rows]
    head, cells = (
        ["model", "erased"],
        [[row["model"], ", ".join(row["erased"]) or "–"] for row in rows],
    )
    for key in columns:
        values = [row["figures"].get(key) for row in rows]
        n = max((value[1] for value in values if isinstance(value, (tuple, list))), default=0)
        head.append(titles[key] + (f" (n ≤ {n})" if n else ""))
        for line, value in zip(cells, values):
            line.append(cell(value))
        if any(key in figures for figures in known):
            head.append(f"{titles[key]}, the paper's")
            for line, figures in zip(cells, known):
                line.append(f"{figures[key]:.4g}" if key in figures else "–")
    return "".join("| " + " | ".join(line) + " |\n" for line in [head, ["---"] * len(head), *cells])


def plot(rows, titles, suite, folder):
    """matrix.png for Figure 2's rows; curve.png where rows are named NAME@ITERATION."""

    def height(value):
        return 100 * value[0] / value[1] if isinstance(value, tuple) else value

    points = [(*row["model"].rpartition("@")[::2], row["figures"]) for row in rows]
    points = sorted(
        ((name, int(i), figures) for name, i, figures in points if name and i.isdigit()),
        key=lambda point: point[:2],
    )
    matrix = [row for row in rows if suite == "artists" and row["figures"]]
    if not (points or matrix):
        return
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    if matrix:
        asked = matrix[0]["asked"]
        image = axes.imshow(
            [[height(row["figures"][which]) for which in asked] for row in matrix], aspect="auto"
        )
        figure.colorbar(
            image,
            label="% shown"
            if isinstance(matrix[0]["figures"][asked[0]], tuple)
            else TITLES["lpips"],
        )
        axes.set(
            xlabel="asked for",
            yticks=range(len(matrix)),
            yticklabels=[row["model"] for row in matrix],
        )
        axes.set_xticks(range(len(asked)), asked, rotation=30, ha="right")
    else:
        key = next(key for key in titles if all(key in figures for *_, figures in points))
        for name in dict.fromkeys(name for name, *_ in points):
            axes.plot(
                *zip(*[(i, height(figures[key])) for other, i, figures in points if other == name]),
                marker="o",
                label=name,
            )
        axes.set(xlabel="iteration", ylabel=titles[key])
        axes.legend()
    with atomic_write(folder / ("matrix.png" if matrix else "curve.png")) as beside:
        figure.savefig(beside, dpi=120, bbox_inches="tight")


def write_results(args, rows_of, settings, model, device):
    """Measures every system, and writes table.md, results.json, sheets of sample pictures and plots."""
    keys, rows, titles, missing = SUITES[args.suite][1], [], dict(TITLES), {}
    if args.suite == "toy":
        from toy import suite, worlds

        titles = suite.columns(worlds.of(args.model)) | TITLES
    for system, jobs, folder in rows_of:
        files = [folder / f"{i:05d}.png" for i in range(len(jobs))]
        others = next(
            f
            for s, _, f in rows_of
            if s.name == "original" and (s.concepts == system.concepts or args.suite != "toy")
        )
        figures = {}
        for key in keys:
            try:
                figures |= measure(
                    key, system, files, jobs, [others / file.name for file in files], args, device
                )
            except (ModuleNotFoundError, OSError) as e:
                why = (
                    getattr(e, "name", None)
                    and f"{e.name} is missing: pip install -r requirements-eval.txt and repeat the command"
                )
                missing[key] = (
                    f"{titles.get(key, key)}: not measured, {why or (str(e).strip() or type(e).__name__).splitlines()[0]}"
                )
        asked = list(dict.fromkeys(job.which for job in jobs))
        titles |= {which: which for which in asked} if args.suite == "artists" else {}
        rows.append(
            {
                "model": system.name,
                "erased": system.concepts,
                "method": system.trained,
                "figures": figures,
                "asked": asked,
            }
        )
        sample = [
            [file for file, job in zip(files, jobs) if job.which == which][:12] for which in asked
        ]
        shown = censoring(
            [*args.all_concepts, args.suite, "nudity" if args.suite == "i2p" else ""],
            args.show_uncensored,
        )
        sheet = [
            [shown(picture) for picture in metrics.arrays(some, Image.open(files[0]).size)]
            for some in sample
        ]
        save_png(grid(sheet, asked if asked != [""] else ()), args.out / f"{system.title}.png")
    cut = sum(
        tokenize(model.tokenizer, sorted({job.prompt for _, jobs, _ in rows_of for job in jobs}))[1]
    )
    notes = [metrics.nude_note()] if "nude" in keys and "nude" not in missing else []
    notes += [f"{cut} prompts were cut to 77 tokens"] * bool(cut) + [*missing.values()]
    text = table(rows, titles, args.suite) + "".join(f"\n{note}\n" for note in notes)
    content = {
        "settings": settings,
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"torch": torch.__version__},
        "notes": notes,
        "rows": [{key: x for key, x in row.items() if key != "asked"} for row in rows],
    }
    for name, text_of in (
        ("table.md", text),
        ("results.json", json.dumps(content, indent=1, ensure_ascii=False)),
    ):
        with atomic_write(args.out / name) as beside:
            beside.write_text(text_of, encoding="utf-8")
    print(text)
    try:
        plot(rows, titles, args.suite, args.out)
    except ModuleNotFoundError as e:
        raise UserError(
            f"The table is written, but not the plot: {e.name} is missing; pip install -r requirements-eval.txt and repeat "
            "the command."
        ) from e
    finally:
        page.page(args.out)
