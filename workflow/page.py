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
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from evaluation import plots
from evaluation.attacks import attack_figures, cost
from evaluation.columns import COMEBACK, Column
from evaluation.tables import markdown
from support import statistics
from support.cli import Parser, one_of, positive, run_command
from support.files import write_text
from toy import worlds
from workflow import plan

MODEL_NAMES = {"toy": "toy model", "emoji": "emoji model"}
TUNING = {  # {model: how the settings were found}
    "toy": """Every training method was tuned on the star, with training seed 777 and 60 images per
figure from prompts and noise of seed 777. Nothing of that is reported here. We tried four learning
rates and one other choice (ESD: s_s = 3; Ablating: all tensors; All-but-One: λ = 0.3), then one or
two values beyond, because for most methods the best value was at the end of the range. We kept the
settings that left the least of the star, named and implied, without loss elsewhere. SDD's preset is
the best of six (batch, learning rate, length and steps), its λ the better of two. sdd + adversary
is the best of four (2 or 4 steps of the adversary, λ = 0.3 or 1, words or sentences to keep). The
methods that only guide have their papers' presets, except for the warm-up: those are for 50 steps,
and here are 12. We tried 2, 1 and 0, and 0 left the least of the star.""",
    "emoji": """The settings are those that were found on the shapes, with a share of their learning
rates. Each training method but sdd + adversary was tuned on alcohol, with training seed 777 and 60
images per figure from prompts and noise of seed 777. These are only here. Per cent of the named
alcohol that is left / of the other captions that are right:

| method | whole rate | half | quarter | chosen |
|---|---|---|---|---|
| sdd | 0 / 28 | 5 / 75 | 48 / 90 | half |
| esd-x | 0 / 72 | 0 / 77 | 7 / 82 | half |
| esd-u | 3 / 58 | 3 / 70 | 7 / 77 | half |
| ablate | 35 / 18 | 25 / 62 | 5 / 82 | quarter |
| ablate-noise | 0 / 88 | 0 / 97 | 0 / 95 | half |
| all-but-one | 5 / 80 | 5 / 88 | 15 / 88 | half |

For SDD, half the rate with T = 12 or with a batch of 16 gave the same within the intervals. SDD
with --preserve 0.3 gave 10 / 88 at the rate 6e-4 and 8 / 85 at 1.2e-3.""",
}
MATRIX_TUNING = {  # {model: how the settings of Figure 2 were found}
    "toy": "SDD has settings that were tuned for a texture, ESD-x has the star's. UCE's anchor is "
    "plain.",
    "emoji": """The settings were tuned for noto, with training seed 777 and 60 images from prompts
and noise of seed 777. They asked for noto and blob. Per cent of the images that show noto, which
was erased / blob / all other words:

| sdd | | esd-x | |
|---|---|---|---|
| lr 3e-4 | 78 / 68 / 100 | lr 4e-4 | 88 / 100 / 100 |
| lr 6e-4 (chosen) | 62 / 75 / 98 | lr 8e-4 | 69 / 96 / 100 |
| lr 1.2e-3 | 53 / 4 / 25 | lr 1.6e-3 | 47 / 100 / 100 |
| lr 6e-4, T = 12 | 69 / 61 / 95 | lr 3.2e-3 (chosen) | 28 / 82 / 100 |
| lr 9e-4, T = 12 | 78 / 29 / 75 | lr 8e-4, 320 iterations | 69 / 96 / 98 |
| lr 4e-4, 320 iterations | 34 / 50 / 53 | | |
| lr 6e-4, 240 iterations | 31 / 25 / 45 | | |
| lr 6e-4, 320 iterations | 0 / 86 / 45 | | |
| lr 6e-4, 320 iterations, --preserve 0.3 | 94 / 93 / 100 | | |

UCE left 97 % of noto with the templates of presets.py, which are for things, and 56 % with those of
plan.py.""",
}
# Columns; a world without kinds has no members.
CHOICE = ("named", "members", "implied", "caption", "word_half", "word", "seconds")
COSTS = ("seconds", "megabytes")
UNLEARN_CANVAS = [  # of Figure 2
    Column("gone", "erased name is gone (UA)", "high"),
    Column("near", "near names right (IRA)", "high"),
    Column("other", "other names right (IRA)", "high"),
    Column("rest", "other words right (CRA)", "high"),
]
CURVES = (plan.ORIGINAL, "sdd", "esd-x", "uce", plan.OURS)  # rows of comeback.png
FILMS = ("sdd", "esd-x")  # rows


# ---------------------------------------------------------------------------------------- results
class Results(NamedTuple):
    """The results of a study, joined."""

    name: str  # of the study
    tables: dict  # {table: its rows, as in rows.json}
    columns: dict  # {table: its Columns}

    @property
    def study(self):
        return plan.STUDIES[self.name]

    @property
    def model(self):
        return plan.model_of(self.name, plan.table_names(self.name)[0])

    @property
    def folder(self):
        return Path(plan.RESULTS) / self.name


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
    for table in plan.STUDIES[name].tables:
        join(name, table, tables[table])
    return Results(name, tables, columns)


def join(study, table, rows):
    """Adds the figures of attacks and costs to the rows of a table."""
    attacks, patches = plan.attacks(study, table), plan.patches(study, table)
    for row in rows:
        model = row["model"]
        if model in attacks:
            contents = {}
            for kind, files in attacks[model].items():
                contents[kind] = [read_json(file) for file in files]
            figures, row["attacks"] = attack_figures(contents)
            row["figures"] |= figures
        if model in patches:
            row["figures"] |= cost([Path(file) for file in patches[model]])


def added_columns(rows, costs):
    """The columns of attacks, or those of costs, that at least one row has."""
    found = []
    for column in COMEBACK:
        if (column.key in COSTS) == costs and any(column.key in row["figures"] for row in rows):
            found.append(column)
    return found


# ---------------------------------------------------------------------------------------- claims
def verdict(a, b):
    """Is the proportion a below b? "holds", "fails" (a is above) or "open": the intervals overlap.

    a, b: Figures. The intervals are Wilson's, 95 %.
    """
    return {"smaller": "holds", "larger": "fails", "open": "open"}[statistics.compare(a, b)]


class Comparison(NamedTuple):
    """One cell of a grid: does `claim` hold against `against`?"""

    claim: str
    against: str  # the column
    verdict: str


def compare(claim, against, a, b, keys):
    """The comparisons of the figures a and b of two rows, one for each key that both have.

    keys: columns where less is better, and "wrong" for the captions that are not right.
    """
    found = []
    for key in keys:
        ours, theirs = figure(a, key), figure(b, key)
        if ours and theirs:
            text = f"{claim}: {KEYS[key]}"
            found.append(Comparison(text, against, verdict(ours, theirs)))
    return found


CLAIMED = {  # {table: what SDD should leave less of}
    "one": "one concept (Table 1)",
    "three": "three concepts (Table 2)",
    "alcohol": "alcohol (Table 1)",
    "twenty": "twenty concepts (Table 2)",
}
KEYS = {
    "named": "concept named",
    "members": "concept by its members",
    "implied": "concept implied",
    "wrong": "other captions wrong",
}
TARGET = ("named", "members", "implied")


def figure(figures, key):
    """The Figure of a row, or None. "wrong" counts the captions that are not right."""
    if key == "wrong":
        found = statistics.figure(figures.get("caption"))
        return found and found.complement
    return statistics.figure(figures.get(key))


def figures_of(tables, name):
    """{model: figures} of a table; empty without the table."""
    return {row["model"]: row["figures"] for row in tables.get(name, [])}


def is_other_paper(row):
    """Is a row another paper's method? The rest are SDD, its variants and the original."""
    return row != plan.ORIGINAL and not row.startswith("sdd")


def claims_by_method(tables):
    """The comparisons of SDD with each other paper's method."""
    found = []
    for table, what in CLAIMED.items():
        figures = figures_of(tables, table)
        for other in filter(is_other_paper, figures):
            claim = f"SDD leaves less of {what}"
            found += compare(claim, other, figures["sdd"], figures[other], TARGET)
        for other in figures:
            if table in ("one", "alcohol") and other.startswith(("esd", "sld-max")):
                claim = "SDD harms the rest less (our question, not the paper's)"
                found += compare(claim, other, figures["sdd"], figures[other], ["wrong"])
    return found


def claims_by_iteration(tables):
    """The comparisons of Figures 3, 5, 10 and 11; none without the curve."""
    curve = figures_of(tables, "curve")
    found = []
    if not curve:
        return []
    for i in plan.CURVE_POINTS:
        teacher, student = curve[f"sdd teacher@{i}"], curve[f"sdd student@{i}"]
        esd, against = curve[f"esd-x student@{i}"], f"{i}\N{NO-BREAK SPACE}iterations"
        found += compare("SDD leaves less than ESD-x (Figure 5)", against, teacher, esd, TARGET)
        claim = "SDD's teacher harms the rest less than its student (Figures 3, 10, 11)"
        found += compare(claim, against, teacher, student, ["wrong"])
    return found


def claims_by_roles(tables):
    """The comparison of Algorithm 1's roles with the authors' script; none without the table."""
    found = []
    for table in ("three", "twenty"):
        figures = figures_of(tables, table)
        if figures:
            claim = "Algorithm 1's roles leave less than the authors' script's"
            official = "sdd, official roles"
            found += compare(claim, official, figures["sdd"], figures[official], TARGET)
    return found


def grid(comparisons):
    """Markdown: one line per claim, one column per method (or iteration)."""
    columns = list(dict.fromkeys(one.against for one in comparisons))
    cells = {}
    for one in comparisons:
        cells.setdefault(one.claim, {})[one.against] = one.verdict
    text = "| claim | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|\n"
    for claim, verdicts in cells.items():
        found = [verdicts.get(column, "–") for column in columns]
        text += f"| {claim} | " + " | ".join(found) + " |\n"
    return text


def count_verdicts(comparisons):
    """One sentence: how many of the comparisons hold."""
    counts = [
        sum(one.verdict == name for one in comparisons) for name in ("holds", "open", "fails")
    ]
    return (
        f"Of {len(comparisons)} comparisons {counts[0]} hold, {counts[1]} are open and {counts[2]} "
        "fail.\n"
    )


# ---------------------------------------------------------------------------------------- texts
def introduction(results, cores):
    """The head of the page: how it was made."""
    study = results.study
    seeds = ", ".join(map(str, study.seeds))
    limits = f"Up to {study.limit} images per figure"
    if study.curve_limit:
        limits += f" ({study.curve_limit} in the curve)"
    facts = [f"`{command(results.name, cores)}`", f"{datetime.date.today()}", platform.machine()]
    facts += [f"{os.cpu_count()} cores", f"torch {torch.__version__}"]
    if git_commit():
        facts.append(f"commit {git_commit()}")
    text = f"# The papers' claims on the {MODEL_NAMES[results.model]}\n\n{', '.join(facts)}. "
    seconds = total_seconds(results.name)
    if seconds is not None:
        text += f"The times of all commands add up to {duration(seconds)}. "
    text += f"Training seeds: {seeds}, pooled. "
    closed = any(row.closed for table in study.tables.values() for row in table.rows)
    if closed and len(study.seeds) > 1:
        first = study.seeds[0]
        text += f"The closed forms (UCE, MACE, RECE, SPEED) were made with seed {first} only. "
    text += (
        f"{limits}; percentages by the probe with 95 % Wilson intervals. ↓: less is better, ↑: "
        "more is better.\n"
    )
    return f"{text}\n{TUNING[results.model]}\n"


def command(study, cores):
    """The command that makes a study. cores: None if it is not known."""
    flag = "" if cores is None else f"--cores {cores} "
    return f"snakemake {flag}{study}"


def git_commit():
    """The commit of the checkout, with "-dirty" if files differ from it; None without git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def duration(seconds):
    """The seconds in words."""
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def total_seconds(study):
    """The sum of the times of all commands, as Snakemake measured them; None if one is missing."""
    folders = [str(Path(patch).parent) for patch in plan.trainings(study)]
    for file in plan.page_inputs(study):  # an attack is KIND-SEED.json, a table results.json
        path = Path(file)
        folders.append(str(path.parent if path.name == "results.json" else path.with_suffix("")))
    seconds = 0.0
    for folder in folders:
        try:
            with open(plan.benchmark_file(folder), newline="", encoding="utf-8") as f:
                seconds += float(next(csv.DictReader(f, delimiter="\t"))["s"])
        except FileNotFoundError:
            return None
    return seconds


def choice_text(results):
    """The table that helps to choose a method: what is left, what is kept, what comes back."""
    table = next(iter(results.study.tables))
    rows = results.tables[table]
    columns = {column.key: column for column in [*results.columns[table], *COMEBACK]}
    return (
        "\n## Which method should I use?\n\nWhat is left of the concepts, what stays of the rest, "
        "how long a learned word has to search until the concept is back, and how long training "
        "takes:"
        f"\n\n{markdown(rows, [columns[key] for key in CHOICE if key in columns])}"
    )


def table_text(results, table):
    """The table that eval.py made, with the costs of training."""
    rows = results.tables[table]
    return markdown(rows, [*results.columns[table], *added_columns(rows, costs=True)])


def comeback_text(results):
    """What the attacks bring back: the plot, and a table for each table with attacks."""
    if not any(row.get("attacks") for rows in results.tables.values() for row in rows):
        return ""
    text = (
        "\n## Does the concept come back?\n\nEach attack tries to bring the concept back; "
        "`python attack.py --help` says how. Its seeds are pooled.\n\n"
        + image("comeback", "how many images show the concept, over the steps of the attack `word`")
    )
    for table, rows in results.tables.items():
        attacked = [row for row in rows if row.get("attacks")]
        if attacked:
            title = results.study.tables[table].title
            text += f"{title}:\n\n{markdown(attacked, added_columns(attacked, costs=False))}\n"
    return text.rstrip("\n") + "\n"


def claims_text(tables):
    """The grids of the papers' claims."""
    text = (
        "\n## What holds\n\nA claim holds or fails if the two 95 % intervals do not overlap. It is "
        "open if they do. The figures are in the tables above and below.\n"
    )
    for comparisons in (
        claims_by_method(tables),
        claims_by_iteration(tables),
        claims_by_roles(tables),
    ):
        if comparisons:
            text += f"\n{count_verdicts(comparisons)}\n{grid(comparisons)}"
    return text


def matrix_text(results):
    """Figure 2."""
    (name,) = results.tables
    text = (
        f"\n## {results.study.tables[name].title}\n\nHow many of the images show the name in the "
        "prompt. "
    )
    text += MATRIX_TUNING[results.model]
    text += "\n\n" + image("matrix", "the share of images that show a name, by model and by prompt")
    text += table_text(results, name)
    text += (
        "\nThe same for each method, over all erased names. The measures are UnlearnCanvas's "
        "(arXiv 2402.11846): unlearning accuracy (UA), in-domain retain accuracy (IRA) and "
        "cross-domain retain accuracy (CRA).\n\n"
    )
    related = worlds.of(results.model).RELATED
    return text + markdown(unlearn_canvas(results.tables[name], related), UNLEARN_CANVAS)


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
            value = statistics.figure(value)
            if name in row["erased"]:
                key, value = "gone", value.complement
            elif name == "rest":
                key = "rest"
            else:
                near = any(name in related.get(erased, ()) for erased in row["erased"])
                key = "near" if near else "other"
            one["figures"][key] = statistics.pooled([one["figures"].get(key, ()), value])
    return list(found.values())


def iterations_text(results):
    """The curve, and films of two trainings."""
    text = "\n## Student, teacher and iterations (Figures 3, 5, 10, 11)\n\n"
    text += image("curve", "how much of the concept is left after 40, 80, 120 and 160 iterations")
    text += f"Seed {results.study.seeds[0]}:\n\n"
    for row in FILMS:
        text += image(f"film_{row}", f"images of {row}'s student and teacher over the iterations")
    return text + table_text(results, "curve")


def image(name, text):
    return f"![{text}]({name}.png)\n\n"


def end_of_training(study, table, row):
    """{column of log.csv: its mean over the seeds at the last preview}."""
    keys = ("gap_student", "drift_student", "gap_teacher", "drift_teacher")
    last = []
    for patch in plan.patches(study, table)[row]:
        with open(Path(patch).parent / "log.csv", newline="", encoding="utf-8") as f:
            last.append([line for line in csv.DictReader(f) if line["gap_student"]][-1])
    return {key: sum(float(line[key]) for line in last) / len(last) for key in keys}


def drifts_text(results):
    """Gap and drift at the end of each training, next to what the model forgot."""
    head = "model | erased | gap, student | drift, student | gap, teacher | drift, teacher"
    text = (
        "\n## Gap and drift\n\nThe gap is the mean of |e(c_s) − e(c_0)|², the drift the mean of "
        "|e(c_0) − e°(c_0)|², on fixed latents at the last preview. A closed form has no "
        "student and no teacher: its result counts as both.\n\n"
        f"| {head} | concept named ↓ | other captions right ↑ |\n" + "|---" * 8 + "|\n"
    )
    for table in results.study.tables:
        figures = figures_of(results.tables, table)
        for row in results.study.tables[table].rows:
            cells = [row.name, ", ".join(row.concepts)]
            for value in end_of_training(results.name, table, row.name).values():
                cells.append(f"{value:.2g}")
            for key in ("named", "caption"):
                cells.append(f"{statistics.figure(figures[row.name][key]).percent:.1f}")
            text += "| " + " | ".join(cells) + " |\n"
    return text


# ---------------------------------------------------------------------------------------- all of it
def page_text(results, cores):
    """The content of results.md."""
    text = introduction(results, cores)
    if any(table.templates for table in results.study.tables.values()):
        return text + matrix_text(results)
    if not results.study.tables:
        return text + claims_text(results.tables) + iterations_text(results)
    text += choice_text(results)
    for table in results.study.tables:
        text += f"\n## {results.study.tables[table].title}\n\n{table_text(results, table)}"
    text += comeback_text(results) + claims_text(results.tables)
    if "curve" in results.tables:
        text += iterations_text(results)
    return text + drifts_text(results)


def rows_json(results, cores):
    """The content of rows.json."""
    study = results.study
    return {
        "date": f"{datetime.date.today()}",
        "command": command(results.name, cores),
        "commit": git_commit(),
        "seeds": list(study.seeds),
        "limit": study.limit,
        "tables": results.tables,
    }


def write_images(results):
    """comeback.png, and copies of the plots and films that the page shows."""
    curves = {}
    for rows in results.tables.values():
        for row in rows:
            if row["model"] in CURVES and "word" in row.get("attacks", {}):
                curves[row["model"]] = row["attacks"]["word"]["points"]
    if curves:
        plots.attack_curves(curves, results.folder / "comeback.png")
    for table in results.tables:
        for plot in Path(plan.table_folder(results.name, table)).glob("*.png"):
            if plot.name in ("curve.png", "matrix.png"):
                shutil.copyfile(plot, results.folder / plot.name)
    if "curve" not in results.tables:
        return
    for row in FILMS:
        runs = plan.run_folder(results.study.curve_table, row, results.study.seeds[0])
        film = Path(runs) / "film.png"
        shutil.copyfile(film, results.folder / f"film_{row}.png")


def write_page(args):
    """The whole command."""
    results = read_results(args.study)
    write_images(results)
    content = json.dumps(rows_json(results, args.cores), indent=1, ensure_ascii=False)
    write_text(results.folder / "rows.json", content)
    write_text(results.folder / "results.md", page_text(results, args.cores))
    print(f"open this page: {results.folder / 'results.md'}")


def parse(argv=None):
    parser = Parser(prog="python -m workflow.page", description=__doc__)
    parser.add_argument("study", **one_of(list(plan.STUDIES)))
    parser.add_argument(
        "--cores",
        type=positive,
        help="how many commands ran at a time, for the page (default: not known)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(write_page, parse()))
