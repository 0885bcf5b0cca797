"""The page of a study: joins tables, attacks and training times, and says which claims hold.

    python -m workflow.page quick

Snakemake runs this command when the results of a study are complete. It writes
results/STUDY/results.md, the images that the page shows, and rows.json, all figures in one file:

    date, command, commit, seeds, limit
    tables    {table: [row]}, a row of eval.py's results.json without its sample images:
      model, erased, method, paper
      figures   also of evaluation.columns.COMEBACK: attacks, time and size
      attacks   {kind: {"points", "halves"}}, see evaluation/comeback.py; only attacked rows
"""

import csv
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from evaluation import plots
from evaluation.columns import COMEBACK, Column
from evaluation.comeback import comeback, cost
from evaluation.tables import markdown
from support.cli import Parser, one_of, positive, run_command
from support.files import write_text
from support.statistics import ORIGINAL, figure, judge, pooled
from toy import worlds
from workflow import plan

# Columns; a world without kinds has no members.
CHOICE = ("named", "members", "implied", "caption", "word_half", "word", "seconds")
COSTS = ("seconds", "megabytes")
UNLEARN_CANVAS = [  # of Figure 2
    Column("gone", "erased name is gone (UA)", "high"),
    Column("near", "near names right (IRA)", "high"),
    Column("other", "other names right (IRA)", "high"),
    Column("rest", "other words right (CRA)", "high"),
]
DRIFTS = [  # columns of log.csv
    Column("gap_student", "gap, student", None),
    Column("drift_student", "drift, student", None),
    Column("gap_teacher", "gap, teacher", None),
    Column("drift_teacher", "drift, teacher", None),
]
CURVES = (ORIGINAL, "sdd", "esd-x", "uce", plan.OURS)  # rows of comeback.png
FILMS = ("sdd", "esd-x")  # rows

# A claim: (sentence, table, pattern of rows to compare with, our row, {column: its title}). A group
# in the pattern is the iteration of a point of the curve.
LEFT = {
    "named": "concept named",
    "members": "concept by its members",
    "implied": "concept implied",
}
HARM = {"caption": "other captions wrong"}
OTHERS = r"(?!sdd|original).*"  # the rest are SDD, its variants and the original
ROLES = "Algorithm 1's roles leave less than the authors' script's"
HARMS_LESS = "SDD harms the rest less (our question, not the paper's)"
FIGURE_5 = "SDD leaves less than ESD-x (Figure 5)"
TEACHER = "SDD's teacher harms the rest less than its student (Figures 3, 10, 11)"
BY_METHOD = [
    ("SDD leaves less of one concept (Table 1)", "one", OTHERS, "sdd", LEFT),
    (HARMS_LESS, "one", r"esd.*|sld-max", "sdd", HARM),
    ("SDD leaves less of three concepts (Table 2)", "three", OTHERS, "sdd", LEFT),
    ("SDD leaves less of alcohol (Table 1)", "alcohol", OTHERS, "sdd", LEFT),
    (HARMS_LESS, "alcohol", r"esd.*|sld-max", "sdd", HARM),
    ("SDD leaves less of twenty concepts (Table 2)", "twenty", OTHERS, "sdd", LEFT),
]
BY_ITERATION = [
    (FIGURE_5, "curve", r"esd-x student@(\d+)", r"sdd teacher@\1", LEFT),
    (TEACHER, "curve", r"sdd student@(\d+)", r"sdd teacher@\1", HARM),
]
BY_ROLES = [
    (ROLES, "three", "sdd, official roles", "sdd", LEFT),
    (ROLES, "twenty", "sdd, official roles", "sdd", LEFT),
]
VERDICTS = {"better": "holds", "open": "open", "worse": "fails"}


# ---------------------------------------------------------------------------------------- results
class Results(NamedTuple):
    """The results of a study, joined."""

    name: str  # of the study
    study: plan.Study
    tables: dict  # {table: its rows, as in rows.json}
    columns: dict  # {table: its Columns}


def read_json(file):
    return json.loads(Path(file).read_text(encoding="utf-8"))


def read_results(name):
    """The Results of a study."""
    tables, columns = {}, {}
    for table in plan.table_names(name):
        content = read_json(f"{plan.table_folder(name, table)}/results.json")
        columns[table] = [Column(**column) for column in content["columns"]]
        tables[table] = content["rows"]
        for row in tables[table]:
            del row["sheet"], row["samples"]
            if table != "curve":
                join(name, row)
    return Results(name, plan.STUDIES[name], tables, columns)


def join(study, row):
    """Adds the figures of attacks and costs to a row of the table."""
    if kinds := plan.attacks(study).get(row["model"]):
        contents = {kind: [read_json(file) for file in files] for kind, files in kinds.items()}
        figures, row["attacks"] = comeback(contents)
        row["figures"] |= figures
    if patches := plan.patches(study).get(row["model"]):
        row["figures"] |= cost([Path(file) for file in patches])


def with_figures(columns, rows):
    """The columns that at least one row has."""
    return [column for column in columns if any(column.key in row["figures"] for row in rows)]


# ---------------------------------------------------------------------------------------- claims
def compared(tables, claims):
    """{(sentence, column of the grid): "holds", "open" or "fails"} of a list of claims.

    A column is a method, or a point of the curve.
    """
    found = {}
    for sentence, table, theirs, ours, keys in claims:
        figures = {row["model"]: row["figures"] for row in tables.get(table, [])}
        for key, title in keys.items():
            for row in figures:
                if match := re.fullmatch(theirs, row):
                    a = figure(figures[match.expand(ours)].get(key))
                    b = figure(figures[row].get(key))
                    column = f"{match[1]}\N{NO-BREAK SPACE}iterations" if match.groups() else row
                    if a and b:
                        verdict = judge(a, b, "high" if keys is HARM else "low")
                        found[f"{sentence}: {title}", column] = VERDICTS[verdict]
    return found


def grid(verdicts):
    """How many comparisons hold, and one line per sentence, one column per method (or point)."""
    counts = Counter(verdicts.values())
    columns = dict.fromkeys(column for _, column in verdicts)
    lines = [["claim", *columns], ["---"] * (1 + len(columns))]
    for sentence in dict.fromkeys(sentence for sentence, _ in verdicts):
        lines.append([sentence, *(verdicts.get((sentence, column), "–") for column in columns)])
    return (
        f"Of {len(verdicts)} comparisons {counts['holds']} hold, {counts['open']} are open and "
        f"{counts['fails']} fail.\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    )


# ---------------------------------------------------------------------------------------- texts
def introduction(results, cores):
    """The head of the page: how it was made."""
    study = results.study
    facts = [f"`{command(results.name, cores)}`", f"{datetime.date.today()}", platform.machine()]
    facts += [f"{os.cpu_count()} cores", f"torch {torch.__version__}"]
    if commit := git_commit():
        facts.append(f"commit {commit}")
    text = f"# The papers' claims on the {study.model} model\n\n{', '.join(facts)}. "
    seconds = total_seconds(results.name)
    if seconds is not None:
        text += f"The times of all commands add up to {duration(seconds)}. "
    text += f"Training seeds: {', '.join(map(str, study.seeds))}, pooled. "
    if any(row.closed for row in study.rows) and len(study.seeds) > 1:
        first = study.seeds[0]
        text += f"The closed forms (UCE, MACE, RECE, SPEED) were made with seed {first} only. "
    text += f"Up to {study.limit} images per figure"
    if study.curve_limit:
        text += f" ({study.curve_limit} in the curve)"
    return text + (
        "; percentages by the probe with 95 % Wilson intervals. ↓: less is better, ↑: more is "
        "better. docs/results.md and docs/results-emoji.md say how the settings were found.\n"
    )


def command(study, cores):
    """The command that makes a study. cores: None if it is not known."""
    return f"snakemake {study}" if cores is None else f"snakemake --cores {cores} {study}"


def git_commit():
    """The commit of the checkout, with "-dirty" if files differ from it; None without git."""
    describe = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def duration(seconds):
    """The seconds in words."""
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def total_seconds(study):
    """The sum of the times of all commands, as Snakemake measured them; None if one is missing."""
    seconds = 0.0
    for file in [*plan.trainings(study), *plan.page_inputs(study)]:
        path = Path(file)  # of an attack: KIND-SEED.json, next to its folder KIND-SEED
        folder = path.with_suffix("") if "/attacks/" in file else path.parent
        try:
            with open(plan.benchmark_file(str(folder)), newline="", encoding="utf-8") as f:
                seconds += float(next(csv.DictReader(f, delimiter="\t"))["s"])
        except FileNotFoundError:
            return None
    return seconds


def choice_text(results):
    """The table that helps to choose a method: what is left, what is kept, what comes back."""
    table = results.study.table
    columns = {column.key: column for column in [*results.columns[table], *COMEBACK]}
    chosen = [columns[key] for key in CHOICE if key in columns]
    return (
        "\n## Which method should I use?\n\nWhat is left of the concepts, what stays of the rest, "
        "how long a learned word has to search until the concept is back, and how long training "
        f"takes:\n\n{markdown(results.tables[table], chosen)}"
    )


def table_text(results, table):
    """The table that eval.py made, with the costs of training."""
    costs = [column for column in COMEBACK if column.key in COSTS]
    rows = results.tables[table]
    return markdown(rows, [*results.columns[table], *with_figures(costs, rows)])


def comeback_text(results):
    """What the attacks bring back: the plot and a table."""
    attacked = [row for row in results.tables[results.study.table] if row.get("attacks")]
    if not attacked:
        return ""
    columns = [column for column in COMEBACK if column.key not in COSTS]
    return (
        "\n## Does the concept come back?\n\nEach attack tries to bring the concept back; "
        "`python attack.py --help` says how. Its seeds are pooled.\n\n"
        + image("comeback", "how many images show the concept, over the steps of the attack `word`")
        + f"{results.study.title}:\n\n{markdown(attacked, with_figures(columns, attacked))}"
    )


def claims_text(tables):
    """The grids of the papers' claims."""
    text = (
        "\n## What holds\n\nA claim holds or fails if the two 95 % intervals do not overlap. It is "
        "open if they do. The figures are in the tables above and below.\n"
    )
    for claims in (BY_METHOD, BY_ITERATION, BY_ROLES):
        if verdicts := compared(tables, claims):
            text += f"\n{grid(verdicts)}"
    return text


def matrix_text(results):
    """Figure 2."""
    study = results.study
    canvas = unlearn_canvas(results.tables[study.table], worlds.of(study.model).RELATED)
    return (
        f"\n## {study.title}\n\nHow many of the images show the name in the prompt.\n\n"
        + image("matrix", "the share of images that show a name, by model and by prompt")
        + table_text(results, study.table)
        + "\nThe same for each method, over all erased names. The measures are UnlearnCanvas's "
        "(arXiv 2402.11846): unlearning accuracy (UA), in-domain retain accuracy (IRA) and "
        f"cross-domain retain accuracy (CRA).\n\n{markdown(canvas, UNLEARN_CANVAS)}"
    )


def unlearn_canvas(rows, related):
    """A row per method, for UNLEARN_CANVAS. rows: of Figure 2, named METHOD or METHOD CONCEPT.

    related: {name: names that are near to it}.
    """
    found = {}
    for row in rows:
        method = row["model"].split(" ")[0]
        one = found.setdefault(method, {"model": method, "erased": [], "figures": {}, "paper": {}})
        one["erased"] += row["erased"]
        for name, value in row["figures"].items():
            if name in COSTS:
                continue
            shown, key = figure(value), "other"
            if name in row["erased"]:
                shown, key = shown.complement, "gone"
            elif name == "rest":
                key = "rest"
            elif any(name in related.get(erased, ()) for erased in row["erased"]):
                key = "near"
            one["figures"][key] = pooled([one["figures"].get(key, ()), shown])
    return list(found.values())


def iterations_text(results):
    """The curve, and films of two trainings."""
    return (
        "\n## Student, teacher and iterations (Figures 3, 5, 10, 11)\n\n"
        + image("curve", "how much of the concept is left after 40, 80, 120 and 160 iterations")
        + f"Seed {results.study.seeds[0]}:\n\n"
        + "".join(
            image(f"film_{row}", f"images of {row}'s student and teacher over the iterations")
            for row in FILMS
        )
        + table_text(results, "curve")
    )


def image(name, text):
    return f"![{text}]({name}.png)\n\n"


def end_of_training(patches):
    """{column of log.csv: its mean over the seeds at the last preview}."""
    last = []
    for patch in patches:
        with open(Path(patch).parent / "log.csv", newline="", encoding="utf-8") as f:
            last.append([line for line in csv.DictReader(f) if line["gap_student"]][-1])
    means = {}
    for column in DRIFTS:
        mean = sum(float(line[column.key]) for line in last) / len(last)
        means[column.key] = float(f"{mean:.2g}")
    return means


def drifts_text(results):
    """Gap and drift at the end of each training, next to what the model forgot."""
    rows, patches = [], plan.patches(results.name)
    for row in results.tables[results.study.table]:
        if row["model"] in patches:
            drifts = end_of_training(patches[row["model"]])
            rows.append(row | {"figures": row["figures"] | drifts})
    columns = results.columns[results.study.table]
    forgot = [column for column in columns if column.key in ("named", "caption")]
    return (
        "\n## Gap and drift\n\nThe gap is the mean of |e(c_s) − e(c_0)|², the drift the mean of "
        "|e(c_0) − e°(c_0)|², on fixed latents at the last preview. A closed form has no "
        f"student and no teacher: its result counts as both.\n\n{markdown(rows, DRIFTS + forgot)}"
    )


# ---------------------------------------------------------------------------------------- all of it
def page_text(results, cores):
    """The content of results.md."""
    study, text = results.study, introduction(results, cores)
    if study.templates:
        return text + matrix_text(results)
    if study.rows:
        text += f"{choice_text(results)}\n## {study.title}\n\n{table_text(results, study.table)}"
        text += comeback_text(results)
    text += claims_text(results.tables)
    if study.curve_limit:
        text += iterations_text(results)
    return text + drifts_text(results) if study.rows else text


def write_images(results, folder):
    """comeback.png, and copies of the plots and films that the page shows."""
    study, curves = results.study, {}
    for row in results.tables.get(study.table, []):
        if row["model"] in CURVES and "word" in row.get("attacks", {}):
            curves[row["model"]] = row["attacks"]["word"]["points"]
    if curves:
        plots.comeback(curves, folder / "comeback.png")
    copies = {}
    if study.templates:
        copies["matrix"] = f"{plan.table_folder(results.name, study.table)}/matrix.png"
    if study.curve_limit:
        copies["curve"] = f"{plan.table_folder(results.name, 'curve')}/curve.png"
        for row in FILMS:
            copies[f"film_{row}"] = f"{plan.run_folder(study.table, row, study.seeds[0])}/film.png"
    for name, file in copies.items():
        shutil.copyfile(file, folder / f"{name}.png")


def write_page(args):
    """The whole command."""
    results = read_results(args.study)
    folder = Path(plan.RESULTS) / args.study
    write_images(results, folder)
    content = {
        "date": f"{datetime.date.today()}",
        "command": command(args.study, args.cores),
        "commit": git_commit(),
        "seeds": results.study.seeds,
        "limit": results.study.limit,
        "tables": results.tables,
    }
    write_text(folder / "rows.json", json.dumps(content, indent=1, ensure_ascii=False))
    write_text(folder / "results.md", page_text(results, args.cores))
    print(f"open this page: {folder / 'results.md'}")


def parse(argv=None):
    parser = Parser(prog="python -m workflow.page", description=__doc__)
    parser.add_argument("study", **one_of(list(plan.STUDIES)))
    about = "how many commands ran at a time, for the page (default: not known)"
    parser.add_argument("--cores", type=positive, help=about)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(write_page, parse()))
