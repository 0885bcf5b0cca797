"""What the study trains, attacks and measures: rows, seeds, limits and commands.

workflow/Snakefile runs the commands of this file, workflow/page.py shows their results. A method
has the settings of presets.METHODS, unless its Row has other words. docs/results.md and
docs/results-emoji.md say how the settings were found.

    results/runs/TABLE/ROW/SEED/                     a training; all studies use it
    results/STUDY/attacks/TABLE/ROW/KIND-SEED/       an attack, and its results in KIND-SEED.json
    results/STUDY/tables/TABLE/                      a table
    results/STUDY/results.md                         the page
"""

import ast
import hashlib
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import presets
import train
from evaluation.study import (
    AT,
    EVERY,
    LAST_STEP,
    LONGER,
    SEEDS,
    THREE,
    attack_words,
    eval_words,
    train_words,
)
from support.statistics import ORIGINAL
from toy import emoji, worlds

ROOT = Path(__file__).parent.parent
RESULTS = "results"
OURS = "sdd + adversary"  # our own method: the preset toy-hold
GUIDED = ("neg", "sld-medium", "sld-max", "sega")
TWENTY = {  # {concept: its anchor}
    **dict.fromkeys("weapon dagger swords bomb bow knife trident".split(), "tool"),
    **dict.fromkeys("alcohol beer wine cocktail champagne whisky".split(), "drink"),
    **dict.fromkeys("drug cigarette pill syringe".split(), "food"),
    **dict.fromkeys("skull coffin devil".split(), "animal"),
}
CURVE_POINTS = (40, 80, 120, 160)  # iterations; the rows of the curve are exported after them
CURVE_ROWS = ("sdd", "esd-x")  # with their teachers and students
TEXTURE_TEMPLATES = (
    "a {} circle",
    "a blue {} square on sand",
    "a {} triangle on snow",
    "something {}",
)
ARTIST_TEMPLATES = (
    "a bear by {}",
    "a picture of a pizza by {} on mint",
    "an owl on cream, {}",
    "{}, guitar, sky",
)
# The templates of toy/emoji.py are for things ("a {}").
UCE_ARTIST_TEMPLATES = ("{}", "by {}", "a picture by {}", "something by {}", "a fox on mint, {}")
# Images per row of Figure 2: 20 of each texture and template, or 10 of each artist and template.
MATRIX_LIMIT = 240
ATTACKED_LONG = (ORIGINAL, "sdd", OURS, "esd-x", "uce")  # with more attacks and more steps
NOISE_SAMPLES = 12  # each of them is generated 48 times

# A change of this code repeats the trainings, the attacks or the page, see `code`. The numbers of
# presets.py are not here: `settings` has them, so a new number repeats only the trainings that use
# it.
SAMPLING = "unet.py clip_text.py vae.py weights.py pipeline.py scheduler.py guidance.py".split()
METHODS = "sdd.py losses.py ema.py ablation.py adversaries.py closed_form.py".split()
TRAINING_CODE = ["train.py", *METHODS, *SAMPLING]
ATTACK_CODE = ["attack.py", "adversaries.py", *SAMPLING]
PAGE_CODE = ["workflow/page.py", "evaluation/attacks.py", "evaluation/columns.py"]
PAGE_CODE += ["evaluation/tables.py", "support/statistics.py"]


# ---------------------------------------------------------------------------------------- rows
class Row(NamedTuple):
    """A row of a table that has a patch."""

    name: str
    concepts: tuple  # what it forgets
    words: list  # further arguments of train.py

    @property
    def closed(self):
        """Is it a closed form? Those have no training loop and are made once, with one seed."""
        return not presets.CLOSED.isdisjoint(self.words)


def rows_of(anchors, lr="2e-3"):
    """The rows of a table of one concept (Table 1), or of several at once (Table 2).

    anchors: {concept: its anchor}. lr: of SDD with --preserve.
    """
    anchor = ["--anchor", *anchors.values()]
    preserve = ["--preserve", "0.3", "--lr", lr]
    both, one, several = (1, 2), (1,), (2,)  # the tables that have the row
    # fmt: off
    trained = [
        ("sdd",                  both,    []),
        ("sdd + preserve",       one,     preserve),
        ("sdd, official roles",  several, ["--roles", "official"]),
        ("sdd, each + preserve", several, ["--roles", "each", *preserve]),
        (OURS,                   both,    ["--preset", "toy-hold"]),
        ("esd-x",                both,    ["--method", "esd-x"]),
        ("esd-u",                one,     ["--method", "esd-u"]),
        ("ablate",               both,    ["--method", "ablate", *anchor]),
        ("ablate-noise",         one,     ["--method", "ablate-noise", *anchor]),
        ("all-but-one",          both,    ["--method", "all-but-one"]),
    ]
    # fmt: on
    table, longer = (1, []) if len(anchors) == 1 else (2, LONGER)
    words = {name: [*more, *longer] for name, tables, more in trained if table in tables}
    for method in presets.METHODS:
        if method in presets.CLOSED:
            words[method] = ["--method", method, *anchor]
    return [Row(name, tuple(anchors), more) for name, more in words.items()]


def matrix_rows(methods, concepts):
    """The rows of Figure 2: each method erases each concept. methods: {row: words of train.py}."""
    return [
        Row(f"{name} {concept}", (concept,), more)
        for name, more in methods.items()
        for concept in concepts
    ]


ONE = rows_of({"star": "circle"})
ALCOHOL = rows_of({"alcohol": "drink"}, lr="1e-3")
TEXTURE_METHODS = {
    "sdd": ["--steps", "12", "--lr", "4.4e-4"],  # tuned for textures
    "esd-x": ["--method", "esd-x"],
    "uce": ["--method", "uce", "--anchor", "plain"],
}
ARTIST_METHODS = {  # tuned for noto
    "sdd": ["--lr", "6e-4"],
    "esd-x": ["--method", "esd-x", "--lr", "3.2e-3"],
    "uce": ["--method", "uce", "--template", *UCE_ARTIST_TEMPLATES],
}


# ---------------------------------------------------------------------------------------- studies
class Study(NamedTuple):
    """What `snakemake STUDY` makes: one page with a table, a curve, or both."""

    table: str  # the folder of its trainings, and of its table
    title: str = ""  # of the table
    rows: list = []  # of the table; none: the study has only a curve
    guided: tuple = ()  # methods that only guide; they avoid the concepts of the rows
    attacks: dict = {}  # {kind of attack: the rows that it attacks}; it looks for the first concept
    at: dict = AT
    model: str = "toy"  # --model
    templates: tuple = ()  # of the prompts of Figure 2: who is erased x who is asked for
    limit: int = 200  # images per figure
    curve_limit: int = 0  # the same for the curve; 0: no curve
    samples: int = 24  # images of an attack after each of its steps
    seeds: tuple = SEEDS  # of trainings and attacks


# `snakemake STUDY` makes one of them, `snakemake` all but the quick one.
STUDIES = {
    "one": Study(
        table="one",
        title="One concept (the paper's Table 1)",
        rows=ONE,
        guided=GUIDED,
        attacks={
            "word": [ORIGINAL, *(row.name for row in ONE)],
            "tokens": ATTACKED_LONG,
            "relearn": ATTACKED_LONG,
            "noise": [ORIGINAL, OURS],
        },
    ),
    "curve": Study(table="one", limit=100, curve_limit=100),
    "three": Study(
        table="three",
        title="Three concepts at once (Table 2)",
        rows=rows_of(THREE),
        guided=GUIDED,
        attacks={"word": ["sdd, each + preserve", "esd-x", "uce", OURS]},
    ),
    "textures": Study(
        table="textures",
        title="Artists (Figure 2): textures in their place",
        rows=matrix_rows(TEXTURE_METHODS, ("striped", "dotted", "outlined")),
        templates=TEXTURE_TEMPLATES,
        limit=MATRIX_LIMIT,
    ),
    "alcohol": Study(
        table="alcohol",
        title="Alcohol (the paper's Table 1: nudity)",
        rows=ALCOHOL,
        guided=GUIDED,
        attacks={"word": [ORIGINAL, *(row.name for row in ALCOHOL)]},
        at={"word": (0, 40, 80, 160, 320)},
        model="emoji",
        curve_limit=60,
    ),
    "twenty": Study(
        table="twenty",
        title="Twenty concepts at once (the paper's Table 2: I2P)",
        rows=rows_of(TWENTY, lr="1e-3"),
        guided=GUIDED,
        model="emoji",
    ),
    "artists": Study(
        table="artists",
        title="Artists (Figure 2)",
        rows=matrix_rows(ARTIST_METHODS, emoji.ARTISTS),
        model="emoji",
        templates=ARTIST_TEMPLATES,
        limit=MATRIX_LIMIT,
    ),
    "quick": Study(
        table="one",
        title="One concept (the paper's Table 1)",
        rows=[row for row in ONE if row.name in ("sdd", "sdd + preserve", "esd-x", "uce")],
        guided=("neg", "sld-max", "sega"),
        attacks={"word": [ORIGINAL, "sdd", "esd-x", "uce"]},
        at={"word": (0, 80, 160)},
        limit=40,
        samples=12,
        seeds=SEEDS[:1],
    ),
}
MAIN = [name for name in STUDIES if name != "quick"]


# ---------------------------------------------------------------------------------------- files
def slug(name):
    return name.replace(" ", "").replace(",", "-")


def find_row(table, name):
    """The Row of a table, found by its name or its slug."""
    return next(row for row in STUDIES[table].rows if slug(row.name) == slug(name))


def model_files(study):
    files = sorted(worlds.of(STUDIES[study].model).MODEL.glob("*/*.safetensors"))
    return [file.relative_to(ROOT).as_posix() for file in files]


def probe_files(study):
    """What says what an image shows."""
    return [f"toy/{worlds.of(STUDIES[study].model).PROBE.name}", "toy/probe.py"]


def code(files):
    """A hash of Python files that ignores comments, docstrings and layout."""
    text = ""
    for file in files:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = None  # a docstring
        text += ast.unparse(tree)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_folder(table, row, seed):
    return f"{RESULTS}/runs/{table}/{slug(row)}/{seed}"


def patch_file(table, name, seed):
    """The patch of a row and a seed; None for the original. A closed form has one for all seeds."""
    if name == ORIGINAL:
        return None
    row = find_row(table, name)
    return f"{run_folder(table, row.name, SEEDS[0] if row.closed else seed)}/erased.safetensors"


def table_folder(study, table):
    return f"{RESULTS}/{study}/tables/{table}"


def attack_folder(study, table, row, kind, seed):
    return f"{RESULTS}/{study}/attacks/{table}/{slug(row)}/{kind}-{seed}"


def benchmark_file(path):
    """Where Snakemake writes the seconds that the command for `path` took."""
    return f"{RESULTS}/seconds/{path.removeprefix(f'{RESULTS}/')}.tsv"


def patches(study):
    """{row: its patches, one per training seed} of the table of a study."""
    one, found = STUDIES[study], {}
    for row in one.rows:
        files = (patch_file(one.table, row.name, seed) for seed in one.seeds)
        found[row.name] = list(dict.fromkeys(files))
    return found


def attacks(study):
    """{row: {kind: the results of its attacks, one per seed}} of a study."""
    one, found = STUDIES[study], {}
    for kind, rows in one.attacks.items():
        for row in rows:
            folders = [attack_folder(study, one.table, row, kind, seed) for seed in one.seeds]
            found.setdefault(row, {})[kind] = [f"{folder}.json" for folder in folders]
    return found


def table_names(study):
    """The table of a study and its curve: those that it has."""
    table = [STUDIES[study].table] if STUDIES[study].rows else []
    return [*table, "curve"] if STUDIES[study].curve_limit else table


def curve_patches(study):
    """[(row of the curve, its patch)]: exports of its trainings."""
    found = []
    for row, who, iteration in itertools.product(CURVE_ROWS, ("teacher", "student"), CURVE_POINTS):
        for seed in STUDIES[study].seeds:
            exports = f"{run_folder(STUDIES[study].table, row, seed)}/exports"
            file = f"{exports}/{who}-{iteration:06d}.safetensors"
            found.append((f"{row} {who}@{iteration}", file))
    return found


def table_inputs(study, table):
    """The patches that a table measures. The exports of the curve's trainings lie next to them."""
    if table != "curve":
        return [file for files in patches(study).values() for file in files]
    trained, seeds = STUDIES[study].table, STUDIES[study].seeds
    return [patch_file(trained, row, seed) for row in CURVE_ROWS for seed in seeds]


def page_inputs(study):
    """The results that the page shows: tables and attacks."""
    found = [f"{table_folder(study, table)}/results.json" for table in table_names(study)]
    for kinds in attacks(study).values():
        found += [file for files in kinds.values() for file in files]
    return found


def trainings(study):
    """The patches that a study trains."""
    files = (file for table in table_names(study) for file in table_inputs(study, table))
    return list(dict.fromkeys(files))


# ---------------------------------------------------------------------------------------- commands
def training(table, name, seed):
    row = find_row(table, name)
    more = [] if row.closed else ["--preview-every", EVERY, "--export-every", EVERY]
    out = run_folder(table, row.name, seed)
    return train_words(STUDIES[table].model, row.concepts, [*row.words, *more], seed, out)


def settings(words):
    """All settings of a training as JSON: its words, and the presets' numbers for the rest."""
    return json.dumps(presets.settle(train.parse(words)), sort_keys=True, default=str)


def attack(study, table, name, kind, seed):
    one = STUDIES[study]
    steps = one.at[kind]
    if slug(name) not in map(slug, ATTACKED_LONG):
        steps = [step for step in steps if step <= LAST_STEP]
    more = ["--at", *steps] if steps else []
    more += ["--samples", NOISE_SAMPLES if kind == "noise" else one.samples]
    patch = patch_file(table, name, seed) or "none"
    out = attack_folder(study, table, name, kind, seed)
    return attack_words(one.model, one.rows[0].concepts[0], kind, patch, seed, more, out)


def measurement(study, table):
    one = STUDIES[study]
    measured = [(name, file) for name, files in patches(study).items() for file in files]
    words = ["toy", "--limit", one.limit]
    if one.templates:
        words = ["artists", "--limit", one.limit, "--template", *one.templates]
    if table == "curve":
        words, measured = ["toy", "--limit", one.curve_limit], curve_patches(study)
    for name, file in measured:
        words += ["--patch", f"{name}={file}"]
    if one.guided and table != "curve":
        words += ["--guidance", *one.guided, "--avoid", *one.rows[0].concepts]
        words += ["--guidance-warmup", 0]
    return eval_words(words, one.model, table_folder(study, table))
