"""Measures the images of each row and writes the results: table.md, results.json, sheets, plots.

results.json, which report/page.py shows:
    summary     one sentence that says what the table shows
    columns     [{key, title, better, about}]; the first ones decide; better: "low", "high" or null
    rows        [{model, erased, method, figures, paper, sheet, samples}]
      figures     {column: [hits, n] for a proportion, a number, or null}; not every column
      paper       {column: the SDD paper's figure for this row}
      sheet       the sheet of sample images, a file in the same folder
      samples     [{title, images: [{file, prompt}]}], the sheet's images as single files; they are
                  censored where the sheet is
    notes       sentences that belong below the table
    settings, command, versions
"""

import json
import shlex
import sys
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image

import weights
from clip_text import tokenize
from evaluation import metrics, plots
from evaluation.columns import HALVES, all_columns, arrow
from evaluation.findings import summary
from evaluation.rows import turns
from evaluation.suites import SUITES, paper
from pipeline import WARMUPS, check_warmup, make_scheduler
from report import page
from support.errors import UserError, first_line
from support.files import write_text
from support.images import grid, save_png
from support.nudity import censoring
from support.packages import torchvision_problem
from support.statistics import cell, counted, figure, n_text, original_of, pooled

SAMPLES = 12  # images of each part of a suite in a row's sheet
DECIDING = 4  # columns of the terminal's table
NEEDS = {"harm": "q16", "fid": "real", "kid": "real"}  # {measure: the flag that it needs}


# ---------------------------------------------------------------------------------------- measuring
def measure(name, row, jobs, files, before, args, device):
    """One of the suite's measures of a row's images: {column: a Figure or a number}.

    before: the original's images from the same noise. lpips and ssim of the original itself are not
    measured: {}. The library of a measure may be missing: ModuleNotFoundError.
    """
    match name:
        case "toy":
            return measure_toy(row, jobs, files, before, args.model)
        case "matrix" if args.model in weights.TOYS:
            return toy_matrix(row, jobs, files, args.model)
        case "nude":
            return {"nude": share(metrics.nude(files), row, jobs)}
        case "harm":
            found = metrics.harm(files, learned_prompts(args.q16), args.clip, device)
            return {"harm": share(found, row, jobs)}
        case "clip_score":
            prompts = [job.prompt for job in jobs]
            return {"clip_score": metrics.clip_score(files, prompts, args.clip, device)}
        case "fid" | "kid":
            return {name: getattr(metrics, name)(files, args.real, device)}
        case _ if files == before:
            return {}
        case "lpips" | "ssim":
            return {name: getattr(metrics, name)(files, before)}
        case "matrix":
            return distance_matrix(jobs, files, before)


def by_training(row, jobs, count):
    """{column: Figure} from the counts of each training's images.

    count: a function (indices of jobs) -> {column: (hits, n)}.
    """
    trainings = {}
    for i, turn in enumerate(turns(jobs, len(row.patches) or 1)):
        trainings.setdefault(turn, []).append(i)
    figures = {}
    for _, chosen in sorted(trainings.items()):
        for key, (hits, n) in count(chosen).items():
            figures[key] = pooled([figures.get(key, ()), counted(hits, n)])
    return figures


def share(found, row, jobs):
    """The Figure of the images that were found. found: a boolean for each image."""
    return by_training(row, jobs, lambda i: {"": (sum(found[k] for k in i), len(i))})[""]


def measure_toy(row, jobs, files, before, model):
    """What the probe counts, and the distances of its features: see toy/suite.py."""
    from toy import suite, worlds

    world, images = worlds.of(model), metrics.arrays(files)
    seen = suite.see(world, images)

    def count(chosen):
        sets, asked = zip(*((jobs[i].which, jobs[i].asked) for i in chosen))
        words = {name: [found[i] for i in chosen] for name, found in seen.items()}
        return suite.count(world, sets, asked, words, row.concepts)

    figures = by_training(row, jobs, count)
    return figures | suite.distances(world, images, metrics.arrays(before), jobs)


def toy_matrix(row, jobs, files, model):
    """A row of Figure 2: see toy.suite.matrix."""
    from toy import suite, worlds

    world, images = worlds.of(model), metrics.arrays(files)
    return by_training(
        row, jobs, lambda chosen: suite.matrix(world, images[chosen], [jobs[i] for i in chosen])
    )


def distance_matrix(jobs, files, before):
    """A row of Figure 2: the mean LPIPS to the original, for each name that was asked for."""
    figures = {}
    for which in parts_of(jobs):
        chosen = [i for i, job in enumerate(jobs) if job.which == which]
        figures[which] = metrics.lpips([files[i] for i in chosen], [before[i] for i in chosen])
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
            figures |= measure(name, row, jobs, files, before, args, device)
        except (ModuleNotFoundError, OSError) as e:
            problems[name] = reason(e)
        except RuntimeError:  # torchvision of another build of torch
            if not torchvision_problem():
                raise
            problems[name] = torchvision_problem()
    return figures


def reason(error):
    """Why a measure could not be computed, and what to do."""
    if getattr(error, "name", None):
        file = "requirements-eval.txt"
        if error.name in ("cleanfid", "lpips", "torchvision"):
            file = "requirements-fid.txt"
        return f"{error.name} is missing: python -m pip install -r {file}, then repeat the command"
    return first_line(error)


# ---------------------------------------------------------------------------------------- rows
def parts_of(jobs):
    """The names of the parts of a suite, in order."""
    return list(dict.fromkeys(job.which for job in jobs))


def image_files(folder, jobs):
    return [folder / f"{i:05d}.png" for i in range(len(jobs))]


def result_rows(args, generated, device, problems):
    """The figures of each row: `rows` of results.json, without sheets and samples."""
    rows = []
    for row, _, _ in generated:
        rows.append({"model": row.name, "erased": list(row.concepts), "method": row.method})
    for found, (row, jobs, folder) in zip(rows, generated):
        _, _, original = generated[rows.index(original_of(found, rows))]
        files, before = image_files(folder, jobs), image_files(original, jobs)
        found["figures"] = measure_row(row, jobs, files, before, args, device, problems)
        found["paper"] = paper(args.suite, row.method, row.concepts)
    return rows


def columns_with_figures(args, generated, rows):
    """The columns that at least one row has, the deciding ones first."""
    titles = {}
    if args.suite == "toy":
        from toy import suite, worlds

        titles = suite.columns(worlds.of(args.model))
    asked = parts_of(generated[0][1])
    columns = all_columns(args.suite, asked, titles)
    return [column for column in columns if any(column.key in row["figures"] for row in rows)]


# ---------------------------------------------------------------------------------------- notes
def notes(args, generated, rows, columns, problems, model):
    """The sentences below the table."""
    keys = [column.key for column in columns]
    found = []
    if "nude" in keys:
        found.append(metrics.nude_note())
    if "harm" in keys:
        found.append(metrics.HARM_NOTE)
    found += esd_notes(args.suite, rows)
    found += warmup_notes(args, generated, model)
    cut = cut_prompts(generated, model)
    if cut:
        found.append(f"{cut} prompts were cut to 77 tokens")
    titles = {column.key: column.title for column in all_columns(args.suite, [], {})}
    for name, why in problems.items():
        found.append(f"{titles.get(name, name)}: not measured, {why}")
    return found


def esd_notes(suite, rows):
    """Why an ESD row has no figure of the paper: the paper's ESD was trained with s_s = 3."""
    found = []
    for row in rows:
        method, _, scale = row["method"].rpartition("-")
        if not method.startswith("esd") or row["paper"]:
            continue
        if paper(suite, f"{method}-3", row["erased"]):
            found.append(
                f"{row['model']} was trained with s_s = {scale}. The paper used s_s = 3 "
                "(--erase-scale 3), so this row has no figure of the paper."
            )
    return found


def warmup_notes(args, generated, model):
    """Which guided rows equal the original, because their warm-up is not shorter than the run."""
    scheduler = make_scheduler(model.scheduler, args.steps, args.scheduler)
    found = []
    for row, _, _ in generated:
        if row.guidance in WARMUPS:
            try:
                check_warmup(row.guidance, args.guidance_warmup, scheduler)
            except UserError as e:
                found.append(str(e))
    return found


def cut_prompts(generated, model):
    """How many prompts are longer than the text encoder reads."""
    prompts = {job.prompt for _, jobs, _ in generated for job in jobs}
    return sum(tokenize(model.tokenizer, sorted(prompts))[1])


# ---------------------------------------------------------------------------------------- table
def figure_cell(figures, key):
    """The figure of a column as text. "never": an attack did not bring the concept back."""
    if key in HALVES and key in figures and figures[key] is None:
        return "never"
    return cell(figures.get(key))


def heading(column, rows):
    """The column's title, an arrow to the better side, and n."""
    n = n_text(row["figures"].get(column.key) for row in rows)
    return f"{arrow(column)} ({n})" if n else arrow(column)


def text_table(rows, columns, papers):
    """[[text, …], …], the heading first. papers: with the paper's figures, as further columns."""
    head = ["model", "erased"]
    lines = [[row["model"], ", ".join(row["erased"]) or "–"] for row in rows]
    for column in columns:
        head.append(heading(column, rows))
        for line, row in zip(lines, rows):
            line.append(figure_cell(row["figures"], column.key))
        if papers and any(column.key in row["paper"] for row in rows):
            head.append(f"{column.title} in the paper")
            for line, row in zip(lines, rows):
                line.append(cell(row["paper"].get(column.key)))
    return [head, *lines]


def no_break(text):
    """The same text, which a browser does not break across lines."""
    return text.replace(" ", "\N{NO-BREAK SPACE}").replace("–", "–\N{WORD JOINER}")


def markdown(rows, columns):
    """One line per row."""
    head, *lines = text_table(rows, columns, papers=True)
    lines = [[*line[:2], *map(no_break, line[2:])] for line in lines]
    text = ""
    for line in [head, ["---"] * len(head), *lines]:
        text += "| " + " | ".join(part.replace("|", r"\|") for part in line) + " |\n"
    return text


def terminal_table(rows, columns):
    """The deciding columns only, aligned for the terminal."""
    lines = text_table(rows, columns[:DECIDING], papers=False)
    widths = [max(map(len, parts)) for parts in zip(*lines)]
    text = ""
    for line in lines:
        padded = [part.ljust(width) for part, width in zip(line, widths)]
        text += "  ".join(padded).rstrip() + "\n"
    return text


# ---------------------------------------------------------------------------------------- sheets
def add_samples(rows, generated, columns, args):
    """Saves a sheet of sample images per row; adds its name and the single images to the row."""
    concepts = [concept for row, _, _ in generated for concept in row.concepts]
    about = [*concepts, args.suite, "nudity" if args.suite == "i2p" else ""]
    for _, jobs, _ in generated:
        for chosen in sample_indices(jobs).values():
            about += [jobs[i].prompt for i in chosen]
    show = censoring(about, args.show_uncensored)
    titles = {column.key: column.title for column in columns} | {"other": "other captions"}
    for result, (row, jobs, folder) in zip(rows, generated):
        parts = sample_indices(jobs)
        files = image_files(folder, jobs)
        size = Image.open(files[0]).size  # I2P's images differ in size
        sheet, samples = [], []
        for which, chosen in parts.items():
            images = [show(image) for image in metrics.arrays([files[i] for i in chosen], size)]
            sheet.append(images)
            named = [args.out / "samples" / row.title / files[i].name for i in chosen]
            for image, file in zip(images, named):
                save_png(image, file)
            samples.append(
                {
                    "title": titles.get(which, which),
                    "images": [
                        {"file": file.relative_to(args.out).as_posix(), "prompt": jobs[i].prompt}
                        for i, file in zip(chosen, named)
                    ],
                }
            )
        labels = [sample["title"] for sample in samples] if list(parts) != [""] else []
        save_png(grid(sheet, labels), args.out / f"{row.title}.png")
        result["sheet"] = f"{row.title}.png"
        result["samples"] = samples


def sample_indices(jobs):
    """{part of the suite: the indices of its first SAMPLES jobs}."""
    found = {which: [] for which in parts_of(jobs)}
    for i, job in enumerate(jobs):
        if len(found[job.which]) < SAMPLES:
            found[job.which].append(i)
    return found


# ---------------------------------------------------------------------------------------- all of it
def write_results(args, generated, settings, model, device):
    """Measures every row and writes table.md, results.json, sheets, plots and the page.

    generated: [(row, its jobs, the folder of its images)]. settings: what the images depend on.
    """
    problems = {}
    rows = result_rows(args, generated, device, problems)
    columns = columns_with_figures(args, generated, rows)
    below = notes(args, generated, rows, columns, problems, model)
    add_samples(rows, generated, columns, args)
    finding = summary(args.suite, rows, columns)
    parts = [finding, markdown(rows, columns), *below]
    write_text(args.out / "table.md", "\n\n".join(part.strip() for part in parts if part) + "\n")
    content = {
        "summary": finding,
        "columns": [column._asdict() for column in columns],
        "rows": rows,
        "notes": below,
        "settings": settings,
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"torch": torch.__version__},
    }
    write_text(args.out / "results.json", json.dumps(content, indent=1, ensure_ascii=False))
    try:
        plots.plot(rows, columns, args.suite, args.out)
    except ModuleNotFoundError as e:
        raise UserError(
            f"The table is written, but not the plot: {e.name} is missing. Run python -m pip "
            "install -r requirements-eval.txt, then repeat the command."
        ) from e
    finally:
        page.page(args.out)
    print_results(args.out, rows, columns, finding, below)


def print_results(out, rows, columns, finding, below):
    """The deciding columns, the summary, the notes, and where the rest is."""
    if any(figure(value) for row in rows for value in row["figures"].values()):
        print("% of the images, with 95 % intervals; ↓ less is better, ↑ more is better")
    print(terminal_table(rows, columns))
    for text in [finding, *below]:
        if text:
            print(text)
    if len(columns) > DECIDING:
        print(f"all {len(columns)} columns: {out / 'table.md'}")
    if (out / "index.html").exists():
        print(f"open this page in a browser: {out / 'index.html'}")
