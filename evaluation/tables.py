"""Measures the images of each row and writes the results: table.md, results.json, sheets, plots.

results.json, which report/page.py shows:
    summary     one sentence that says what the table shows
    columns     [{key, title, better, about}]; the first ones decide; better: "low", "high" or null
    rows        [{model, erased, method, figures, paper, sheet, samples}]
      figures     {column: figure, a number, or null}; not every column. A figure is a proportion:
                  [[shows, other, broken], …], the images of each training (support/statistics.py)
      paper       {column: the SDD paper's figure for this row}
      sheet       the sheet of sample images, a file in the same folder
      samples     [{title, images: [{file, prompt}]}], the sheet's images as single files; they are
                  censored where the sheet is
    notes       sentences that belong below the table
    args, command, versions, date: see support/runs.py
"""

from importlib.metadata import version
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image

import weights
from clip_text import tokenize
from evaluation import metrics, plots
from evaluation.columns import HALVES, all_columns
from evaluation.findings import summary
from evaluation.rows import turns
from evaluation.suites import SUITES, paper
from pipeline import WARMUPS, check_warmup, make_scheduler
from report import page
from support import runs
from support.errors import UserError, first_line
from support.files import write_text
from support.images import grid, save_png
from support.nudity import censoring
from support.statistics import cell, counted, figure, n_text, original_of, pooled
from toy import suite, worlds

SAMPLES = 12  # images of each part of a suite in a row's sheet
DECIDING = 4  # columns of the terminal's table
ARROWS = {"low": " ↓", "high": " ↑", None: ""}  # to the better side
NEEDS = {"harm": "q16", "fid": "real", "kid": "real"}  # {measure: the flag that it needs}


# ---------------------------------------------------------------------------------------- measuring
def count(name, row, jobs, files, args, device):
    """What a measure counts in the images of one training: {column: (hits, n)}."""
    toy, world = args.model in weights.TOYS, worlds.of(args.model)
    if name == "nude":
        return {name: metrics.nude(files)}
    if name == "harm":
        return {name: metrics.harm(files, learned_prompts(args.q16), args.clip, device)}
    if name == "matrix" and toy:
        return suite.matrix(world, metrics.arrays(files), jobs)
    if name == "toy" and toy:
        sets, asked = [job.which for job in jobs], [job.asked for job in jobs]
        seen = suite.see(world, metrics.arrays(files))
        return suite.count(world, sets, asked, seen, row.concepts)
    return {}


def count_all(name, row, jobs, files, args, device):
    """The same for all images of a row: {column: Figure}."""
    trainings, figures = {}, {}
    for turn, job, file in zip(turns(jobs, len(row.patches) or 1), jobs, files):
        trainings.setdefault(turn, []).append((job, file))
    for _, images in sorted(trainings.items()):
        for key, (hits, n) in count(name, row, *zip(*images), args, device).items():
            figures[key] = pooled([figures.get(key, ()), counted(hits, n)])
    return figures


def distances(name, jobs, files, before, args, device):
    """The numbers of a measure: {column: number}. before: the original's images."""
    if name == "toy":
        arrays = (metrics.arrays(some) for some in (files, before))
        return suite.distances(worlds.of(args.model), *arrays, jobs)
    if name == "clip_score":
        prompts = [job.prompt for job in jobs]
        return {name: metrics.clip_score(files, prompts, args.clip, device)}
    if name in ("fid", "kid"):
        return {name: metrics.clean_fid(name, files, args.real, device)}
    if files == before:
        return {}  # the original has no distance to itself
    if name in ("lpips", "ssim"):
        return {name: getattr(metrics, name)(files, before)}
    figures = {}
    if name == "matrix" and args.model not in weights.TOYS:
        for which, part in parts_of(jobs).items():  # Figure 2: for each name that is asked for
            figures[which] = metrics.lpips([files[i] for i in part], [before[i] for i in part])
    return figures


def learned_prompts(file):
    """Q16's two learned prompts, (2, D), from a safetensors or npy file."""
    try:
        if file.suffix == ".npy":
            array = torch.from_numpy(np.load(file, allow_pickle=False))
        else:
            array = next(iter(weights.read(file)[0].values()), None)
    except (OSError, ValueError, EOFError, TypeError, BadZipFile) as e:
        raise UserError(f"--q16 {file} cannot be read ({e}).") from None
    if array is None or not array.is_floating_point() or array.dim() != 2 or len(array) != 2:
        raise UserError(f"--q16 {file} must contain one array of two rows, the learned prompts.")
    return array


def measure_row(row, jobs, files, before, args, device, problems):
    """All figures of a row. Adds {measure: reason} to `problems` for each that is missing."""
    figures = {}
    for name in SUITES[args.suite].measures:
        needed = NEEDS.get(name)
        if needed and not getattr(args, needed):
            problems[name] = f"it needs --{needed}"
            continue
        try:
            figures |= count_all(name, row, jobs, files, args, device)
            figures |= distances(name, jobs, files, before, args, device)
        except (ModuleNotFoundError, OSError) as e:
            problems[name] = reason(e)
        except RuntimeError as e:
            if "torchvision::" not in str(e):
                raise
            problems[name] = (
                "torchvision is of another build than torch: install it again as the last lines of "
                "requirements-extra.txt say"
            )
    return figures


def reason(error):
    name = getattr(error, "name", None)
    if name is None:
        return first_line(error)
    how = "python -m pip install -r requirements-extra.txt"
    if name in ("cleanfid", "lpips", "torchvision"):
        how = "install it as the last lines of requirements-extra.txt say"
    return f"{name} is missing: {how}, then repeat the command"


# ---------------------------------------------------------------------------------------- rows
def parts_of(jobs):
    """{part of the suite: the indices of its jobs}, in order."""
    parts = {}
    for i, job in enumerate(jobs):
        parts.setdefault(job.which, []).append(i)
    return parts


def image_files(folder, jobs):
    return [folder / f"{i:05d}.png" for i in range(len(jobs))]


def result_rows(args, generated, device, problems):
    """The figures of each row: `rows` of results.json, without sheets and samples."""
    rows = []
    for row, jobs, folder in generated:
        found = {"model": row.name, "erased": list(row.concepts), "method": row.method}
        rows.append(found)
        _, _, original = generated[rows.index(original_of(found, rows))]  # it comes first
        files, before = image_files(folder, jobs), image_files(original, jobs)
        found["figures"] = measure_row(row, jobs, files, before, args, device, problems)
        found["paper"] = paper(args.suite, row.method, row.concepts)
    return rows


def columns_with_figures(columns, rows):
    return [column for column in columns if any(column.key in row["figures"] for row in rows)]


# ---------------------------------------------------------------------------------------- notes
def notes(args, generated, rows, columns, problems, model):
    keys = [column.key for column in columns]
    found = []
    if "nude" in keys:
        found.append(metrics.NUDE_NOTE.format(version("nudenet")))
    if "harm" in keys:
        found.append(metrics.HARM_NOTE)
    found += filter(None, (esd_note(args.suite, row) for row in rows))
    scheduler = make_scheduler(model.scheduler, args.steps, args.scheduler)
    for row, _, _ in generated:
        try:
            if row.guidance in WARMUPS:
                check_warmup(row.guidance, args.guidance_warmup, scheduler)
        except UserError as e:  # the row equals the original
            found.append(str(e))
    prompts = {job.prompt for _, jobs, _ in generated for job in jobs}
    if cut := sum(tokenize(model.tokenizer, sorted(prompts))[1]):
        found.append(f"{cut} prompts were cut to 77 tokens")
    titles = {column.key: column.title for column in all_columns(args.suite, [], args.model)}
    for name, why in problems.items():
        found.append(f"{titles.get(name, name)}: not measured, {why}")
    return found


def esd_note(suite_name, row):
    """Why an ESD row has no figure of the paper: the paper's ESD was trained with s_s = 3."""
    method, _, scale = row["method"].rpartition("-")
    known = method.startswith("esd") and paper(suite_name, f"{method}-3", row["erased"])
    if row["paper"] or not known:
        return ""
    return (
        f"{row['model']} was trained with s_s = {scale}. The paper used s_s = 3 (--erase-scale 3), "
        "so this row has no figure of the paper."
    )


# ---------------------------------------------------------------------------------------- table
def figure_cell(figures, key):
    """The figure of a column as text. "never": an attack did not bring the concept back."""
    if key in HALVES and key in figures and figures[key] is None:
        return "never"
    return cell(figures.get(key))


def text_table(rows, columns, papers):
    """[[text, …], …], the heading first. papers: with the paper's figures, as further columns."""
    table = [["model", *(row["model"] for row in rows)]]
    table.append(["erased", *(", ".join(row["erased"]) or "–" for row in rows)])
    for column in columns:
        n = n_text(row["figures"].get(column.key) for row in rows)
        title = column.title + ARROWS[column.better] + (f" ({n})" if n else "")
        table.append([title, *(figure_cell(row["figures"], column.key) for row in rows)])
        if papers and any(column.key in row["paper"] for row in rows):
            figures = [cell(row["paper"].get(column.key)) for row in rows]
            table.append([f"{column.title} in the paper", *figures])
    return list(zip(*table))


def markdown(rows, columns):
    head, *lines = text_table(rows, columns, papers=True)
    text, whole = "", str.maketrans({" ": "\N{NO-BREAK SPACE}", "–": "–\N{WORD JOINER}"})
    lines = [[*line[:2], *(part.translate(whole) for part in line[2:])] for line in lines]
    for line in [head, ["---"] * len(head), *lines]:
        text += "| " + " | ".join(part.replace("|", r"\|") for part in line) + " |\n"
    return text


def terminal_table(rows, columns):
    """The deciding columns only, aligned for the terminal."""
    lines = text_table(rows, columns[:DECIDING], papers=False)
    widths = [max(map(len, parts)) for parts in zip(*lines)]
    padded = [map(str.ljust, line, widths) for line in lines]
    return "".join("  ".join(parts).rstrip() + "\n" for parts in padded)


# ---------------------------------------------------------------------------------------- sheets
def add_samples(rows, generated, columns, args):
    """Saves a sheet of sample images per row; adds its name and the single images to the row."""
    about = [args.suite, "nudity" if args.suite == "i2p" else ""]
    for row, jobs, _ in generated:
        about += row.concepts
        about += [jobs[i].prompt for part in parts_of(jobs).values() for i in part[:SAMPLES]]
    show = censoring(about, args.show_uncensored)
    titles = {column.key: column.title for column in columns} | {"other": "other captions"}
    for result, (row, jobs, folder) in zip(rows, generated):
        files = image_files(folder, jobs)
        size = Image.open(files[0]).size  # I2P's images differ in size
        sheet, result["sheet"], result["samples"] = [], f"{row.title}.png", []
        for which, part in parts_of(jobs).items():
            images = metrics.arrays([files[i] for i in part[:SAMPLES]], size)
            sheet.append([show(image) for image in images])
            sample = {"title": titles.get(which, which), "images": []}
            for i, image in zip(part, sheet[-1]):
                name = f"samples/{row.title}/{files[i].name}"
                save_png(image, args.out / name)
                sample["images"].append({"file": name, "prompt": jobs[i].prompt})
            result["samples"].append(sample)
        labels = [sample["title"] for sample in result["samples"] if sample["title"]]
        save_png(grid(sheet, labels), args.out / result["sheet"])


# ---------------------------------------------------------------------------------------- all of it
def write_results(args, generated, settings, model, device):
    """Measures every row and writes table.md, results.json, sheets, plots and the page.

    generated: [(row, its jobs, the folder of its images)]. settings: what the images depend on.
    """
    problems = {}
    rows = result_rows(args, generated, device, problems)
    columns = all_columns(args.suite, parts_of(generated[0][1]), args.model)
    columns = columns_with_figures(columns, rows)
    below = notes(args, generated, rows, columns, problems, model)
    add_samples(rows, generated, columns, args)
    finding = summary(args.suite, rows, columns)
    texts = [finding, markdown(rows, columns).strip(), *below]
    write_text(args.out / "table.md", "\n\n".join(filter(None, texts)) + "\n")
    content = runs.description(settings) | {
        "summary": finding,
        "columns": [column._asdict() for column in columns],
        "rows": rows,
        "notes": below,
    }
    runs.write_json(args.out / "results.json", content)
    try:
        plots.plot(rows, columns, args.suite, args.out)
    except ModuleNotFoundError as e:
        raise UserError(
            f"The table is written, but not the plot: {e.name} is missing. Run python -m pip "
            "install -r requirements-extra.txt, then repeat the command."
        ) from e
    finally:
        page.page(args.out)
    if any(figure(value) for row in rows for value in row["figures"].values()):
        print("% of the images, with 95 % intervals; ↓ less is better, ↑ more is better")
    print(terminal_table(rows, columns))
    for text in filter(None, [finding, *below]):
        print(text)
    if len(columns) > DECIDING:
        print(f"all {len(columns)} columns: {args.out / 'table.md'}")
    if (args.out / "index.html").exists():
        print(f"open this page in a browser: {args.out / 'index.html'}")
