"""The page of a study: joins tables, attacks and training times, and says which claims hold.

    python -m workflow.page quick

Snakemake runs this command when the results of a study are complete. It writes
results/STUDY/results.md, the images that the page shows, and rows.json, all figures in one file:

    date, command, commit, seeds, limit
    tables    {table: [row]}, a row of eval.py's results.json without its sample images:
      model, erased, method, paper
      figures   also of evaluation.columns.COMEBACK: attacks, time and size
      attacks   {kind: {"points", "halves"}}, see evaluation/attacks.py; only attacked rows
"""

import csv
import datetime
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jinja2
import torch

from evaluation import plots
from evaluation.attacks import attack_figures, cost
from evaluation.columns import COMEBACK, Column
from evaluation.tables import columns_with_figures, markdown
from support.cli import Parser, one_of, positive, run_command
from support.files import write_text
from support.runs import read_json
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
    Column(f"{what}_{who}", f"{what}, {who}", None)
    for who in ("student", "teacher")
    for what in ("gap", "drift")
]
CURVES = (ORIGINAL, "sdd", "esd-x", "uce", plan.OURS)  # rows of comeback.png

# A claim: (sentence, table, pattern of rows to compare with, our row, {column: its title}). A group
# in the pattern is the iteration of a point of the curve.
LEFT = {"named": "concept named", "members": "concept by its members", "implied": "concept implied"}
HARM = {"caption": "other captions wrong"}
OTHERS = r"(?!sdd|original).*"  # the rest are SDD, its variants and the original
ROLES = "Algorithm 1's roles leave less than the authors' script's"
HARMS_LESS = "SDD harms the rest less (our question, not the paper's)"
FIGURE_5 = "SDD leaves less than ESD-x (Figure 5)"
TEACHER = "SDD's teacher harms the rest less than its student (Figures 3, 10, 11)"
BY_METHOD = [
    ("SDD leaves less of one concept (Table 1)", "one", OTHERS, "sdd", LEFT),
    (HARMS_LESS, "one", "esd.*|sld-max", "sdd", HARM),
    ("SDD leaves less of three concepts (Table 2)", "three", OTHERS, "sdd", LEFT),
    ("SDD leaves less of alcohol (Table 1)", "alcohol", OTHERS, "sdd", LEFT),
    (HARMS_LESS, "alcohol", "esd.*|sld-max", "sdd", HARM),
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
CLAIMS = (BY_METHOD, BY_ITERATION, BY_ROLES)
VERDICTS = {"better": "holds", "open": "open", "worse": "fails"}


# ---------------------------------------------------------------------------------------- results
def read_results(name):
    """({table: its rows, as in rows.json}, {table: its Columns}) of a study."""
    tables, columns = {}, {}
    for table in plan.table_names(name):
        content = read_json(Path(plan.table_folder(name, table)) / "results.json")
        columns[table] = [Column(**column) for column in content["columns"]]
        tables[table] = content["rows"]
        for row in tables[table]:
            del row["sheet"], row["samples"]
            if table != "curve":
                join(name, row)
    return tables, columns


def join(study, row):
    """Adds the figures of attacks and costs to a row of the table."""
    if kinds := plan.attacks(study).get(row["model"]):
        contents = {}
        for kind, files in kinds.items():
            contents[kind] = [read_json(Path(file)) for file in files]
        figures, row["attacks"] = attack_figures(contents)
        row["figures"] |= figures
    if patches := plan.patches(study).get(row["model"]):
        row["figures"] |= cost([Path(file) for file in patches])


# ---------------------------------------------------------------------------------------- claims
def compared(tables, claims):
    """{(sentence, column of the grid): "holds", "open" or "fails"} of a list of claims.

    A column is a method, or a point of the curve.
    """
    found = {}
    for sentence, table, theirs, ours, keys in claims:
        figures = {row["model"]: row["figures"] for row in tables.get(table, [])}
        for (key, title), row in itertools.product(keys.items(), figures):
            if match := re.fullmatch(theirs, row):
                a, b = (figure(figures[name].get(key)) for name in (match.expand(ours), row))
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


# ---------------------------------------------------------------------------------------- tables
def unlearn_canvas(rows, related):
    """A row per method, for UNLEARN_CANVAS. rows: of Figure 2, named METHOD or METHOD CONCEPT.

    related: {name: names that are near to it}.
    """
    found = {}
    for row in rows:
        method = row["model"].split(" ")[0]
        one = found.setdefault(method, {"model": method, "erased": [], "figures": {}, "paper": {}})
        one["erased"] += row["erased"]
        near = {name for erased in row["erased"] for name in related.get(erased, ())}
        for name, value in row["figures"].items():
            if name in COSTS:
                continue
            shown, key = figure(value), "other"
            if name in row["erased"]:
                shown, key = shown.complement, "gone"
            elif name == "rest":
                key = "rest"
            elif name in near:
                key = "near"
            one["figures"][key] = pooled([one["figures"].get(key, ()), shown])
    return list(found.values())


def with_drifts(row, patches):
    """A row with the gaps and drifts at the last preview of its trainings: means over the seeds."""
    last = []
    for patch in patches:
        with open(Path(patch).parent / "log.csv", newline="", encoding="utf-8") as f:
            last.append([line for line in csv.DictReader(f) if line["gap_student"]][-1])
    figures = dict(row["figures"])
    for column in DRIFTS:
        mean = sum(float(line[column.key]) for line in last) / len(last)
        figures[column.key] = float(f"{mean:.2g}")
    return row | {"figures": figures}


def tables_in_markdown(name, tables, columns):
    """{name: a table of the page}, as results.md.j2 names them."""
    study, found = plan.STUDIES[name], {}
    if study.curve_limit:
        found["curve"] = markdown(tables["curve"], columns["curve"])
    if not study.rows:
        return found
    rows, known = tables[study.table], columns[study.table]
    costs = [column for column in COMEBACK if column.key in COSTS]
    found["table"] = markdown(rows, [*known, *columns_with_figures(costs, rows)])
    if study.templates:
        canvas = unlearn_canvas(rows, worlds.of(study.model).RELATED)
        return found | {"canvas": markdown(canvas, UNLEARN_CANVAS)}
    by_key = {column.key: column for column in [*known, *COMEBACK]}
    found["choice"] = markdown(rows, [by_key[key] for key in CHOICE if key in by_key])
    if attacked := [row for row in rows if row.get("attacks")]:
        shown = [column for column in COMEBACK if column.key not in COSTS]
        found["comeback"] = markdown(attacked, columns_with_figures(shown, attacked))
    patches = plan.patches(name)
    trained = [with_drifts(row, patches[row["model"]]) for row in rows if row["model"] in patches]
    found["drifts"] = markdown(trained, [*DRIFTS, by_key["named"], by_key["caption"]])
    return found


# ---------------------------------------------------------------------------------------- all of it
def git_commit():
    """The commit of the checkout, with "-dirty" if files differ from it; None without git."""
    describe = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def total_time(study):
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
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def page_text(name, tables, columns, command, commit):
    study = plan.STUDIES[name]
    facts = [f"{datetime.date.today()}", platform.machine(), f"{os.cpu_count()} cores"]
    facts += [f"torch {torch.__version__}", *([f"commit {commit}"] if commit else [])]
    verdicts = [compared(tables, claims) for claims in CLAIMS]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, trim_blocks=True).get_template("results.md.j2")
    text = template.render(
        study=study,
        closed=any(row.closed for row in study.rows),
        command=command,
        facts=facts,
        time=total_time(name),
        grids=[grid(one) for one in verdicts if one],
        **tables_in_markdown(name, tables, columns),
    )
    return text.strip() + "\n"


def write_images(name, tables, folder):
    """comeback.png, and copies of the plots and films that the page shows."""
    study, curves, copies = plan.STUDIES[name], {}, {}
    for row in tables.get(study.table, []):
        if row["model"] in CURVES and "word" in row.get("attacks", {}):
            curves[row["model"]] = row["attacks"]["word"]["points"]
    if curves:
        plots.attack_curves(curves, folder / "comeback.png")
    if study.templates:
        copies["matrix"] = f"{plan.table_folder(name, study.table)}/matrix.png"
    if study.curve_limit:
        copies["curve"] = f"{plan.table_folder(name, 'curve')}/curve.png"
        for row in plan.CURVE_ROWS:
            copies[f"film_{row}"] = f"{plan.run_folder(study.table, row, study.seeds[0])}/film.png"
    for copy, file in copies.items():
        shutil.copyfile(file, folder / f"{copy}.png")


def write_page(args):
    name, study = args.study, plan.STUDIES[args.study]
    tables, columns = read_results(name)
    folder = Path(plan.RESULTS) / name
    write_images(name, tables, folder)
    cores = f"--cores {args.cores} " if args.cores else ""  # else: not known
    content = {
        "date": f"{datetime.date.today()}",
        "command": f"snakemake {cores}{name}",
        "commit": git_commit(),
        "seeds": study.seeds,
        "limit": study.limit,
        "tables": tables,
    }
    write_text(folder / "rows.json", json.dumps(content, indent=1, ensure_ascii=False))
    text = page_text(name, tables, columns, content["command"], content["commit"])
    write_text(folder / "results.md", text)
    print(f"open this page: {folder / 'results.md'}")


def parse(argv=None):
    parser = Parser(prog="python -m workflow.page", description=__doc__)
    parser.add_argument("study", **one_of(list(plan.STUDIES)))
    about = "how many commands ran at a time, for the page (default: not known)"
    parser.add_argument("--cores", type=positive, help=about)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(write_page, parse()))
