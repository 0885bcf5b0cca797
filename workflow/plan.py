"""What the study trains, attacks and measures: rows, seeds, limits and commands.

workflow/Snakefile runs the commands of this file, workflow/page.py shows their results. A
method has the settings of presets.METHODS, unless its Row has other words. page.TUNING says how the
settings were found.

    results/runs/TABLE/ROW/SEED/                     a training; all studies use it
    results/STUDY/attacks/TABLE/ROW/KIND-SEED/       an attack, and its results in KIND-SEED.json
    results/STUDY/tables/TABLE/                      a table
    results/STUDY/results.md                         the page
"""

import json
import shlex
from typing import NamedTuple

import closed_form
import presets
import train
from toy import emoji, worlds

RESULTS = "results"
ORIGINAL = "original"  # the model without a patch
OURS = "sdd + adversary"  # our own method: the preset toy-hold
SEEDS = (2, 3, 4)  # of trainings and attacks
GUIDED = ["neg", "sld-medium", "sld-max", "sega"]
GUIDANCE_WARMUP = 0
THREE = {"star": "circle", "red": "blue", "striped": "plain"}  # {concept: its anchor}
TEXTURES = ("striped", "dotted", "outlined")
TWENTY = {
    **dict.fromkeys("weapon dagger swords bomb bow knife trident".split(), "tool"),
    **dict.fromkeys("alcohol beer wine cocktail champagne whisky".split(), "drink"),
    **dict.fromkeys("drug cigarette pill syringe".split(), "food"),
    **dict.fromkeys("skull coffin devil".split(), "animal"),
}
CURVE_POINTS = (40, 80, 120, 160)  # iterations; the rows of the curve are exported after them
CURVE_LINES = ("sdd teacher", "sdd student", "esd-x teacher", "esd-x student")
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
# The templates of presets.py are for things ("a {}").
UCE_ARTIST_TEMPLATES = (
    "{}",
    "by {}",
    "a picture by {}",
    "something by {}",
    "a fox on mint, {}",
)
# Images per row of Figure 2: 20 of each texture and template, or 10 of each artist and template.
MATRIX_LIMIT = 240
STEPS = 12  # of the sampler, for the images of tables and previews
EVERY = 40  # iterations between two previews, and between two exports

# The steps after which an attack's images are counted. The columns of the table need 160 (word) and
# 10 (relearn), see evaluation/attacks.py. noise has no steps.
WORD_STEPS = (0, 40, 80, 120, 160, 240, 320, 480)
TOKENS_STEPS = (0, 80, 160)
RELEARN_STEPS = (0, 5, 10, 15, 20, 30)
AT = {"word": WORD_STEPS, "tokens": TOKENS_STEPS, "relearn": RELEARN_STEPS, "noise": ()}
QUICK_AT = {"word": (0, 80, 160)}
EMOJI_AT = {"word": (0, 40, 80, 160, 320)}
LAST_STEP = 320  # of the attack `word` on models that are not in ATTACKED_LONG
NOISE_SAMPLES = 12  # each of them is generated 48 times
ATTACKED_LONG = (ORIGINAL, "sdd", OURS, "esd-x", "uce")

WEIGHTS = (  # files of a model's folder
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
# A change of this code repeats the trainings. train.py, pipeline.py and the networks are not here:
# after a change there that matters, run snakemake --forceall. The numbers of presets.py are not
# here either: `settings` has them, so a new number repeats only the trainings that use it.
TRAINING_CODE = [
    "sdd.py",
    "losses.py",
    "ema.py",
    "ablation.py",
    "adversaries.py",
    "closed_form.py",
    "scheduler.py",
    "guidance.py",
]
ATTACK_CODE = ["adversaries.py", "attack.py"]
PAGE_CODE = ["workflow/page.py", "evaluation/attacks.py", "evaluation/columns.py"]


# ---------------------------------------------------------------------------------------- tables
class Row(NamedTuple):
    """A row of a table that has a patch."""

    name: str
    concepts: tuple  # what it forgets
    words: list  # further arguments of train.py

    @property
    def closed(self):
        """Is it a closed form? Those have no training loop and are made once, with one seed."""
        return any(method in self.words for method in closed_form.METHODS)


class Table(NamedTuple):
    """A table of the page."""

    title: str
    rows: list
    guided: list = []  # methods that only guide; they avoid the concepts of the rows
    attacks: dict = {}  # {row: kinds of attack}; they look for the first concept
    model: str = "toy"  # --model
    templates: tuple = ()  # of the prompts of Figure 2: who is erased x who is asked for


class Study(NamedTuple):
    """What `snakemake STUDY` makes: tables on one page."""

    seeds: tuple  # of trainings and attacks
    limit: int  # images per figure
    curve_limit: int  # the same for the curve; 0: no curve
    samples: int  # images of an attack after each of its steps
    at: dict  # {kind of attack: the steps after which images are counted}
    tables: dict  # {name of its folder: Table}
    curve_table: str = "one"  # its trainings are those of the curve


def closed_rows(anchors):
    """The rows of the closed forms. anchors: {concept: its anchor}."""
    rows = []
    for method in closed_form.METHODS:
        words = ["--method", method, "--anchor", *anchors.values()]
        rows.append(Row(method, tuple(anchors), words))
    return rows


def one_concept(concept, anchor, lr="2e-3"):
    """The rows of a table of one concept (Table 1). lr: of SDD with --preserve."""
    words = {
        "sdd": [],
        "sdd + preserve": ["--preserve", "0.3", "--lr", lr],
        OURS: ["--preset", "toy-hold"],
        "esd-x": ["--method", "esd-x"],
        "esd-u": ["--method", "esd-u"],
        "ablate": ["--method", "ablate", "--anchor", anchor],
        "ablate-noise": ["--method", "ablate-noise", "--anchor", anchor],
        "all-but-one": ["--method", "all-but-one"],
    }
    rows = [Row(name, (concept,), more) for name, more in words.items()]
    return rows + closed_rows({concept: anchor})


def several_concepts(anchors, lr="2e-3"):
    """The rows of a table of several concepts at once (Table 2).

    anchors: {concept: its anchor}. lr: of SDD with --preserve.
    """
    words = {
        "sdd": [],
        "sdd, official roles": ["--roles", "official"],
        "sdd, each + preserve": ["--roles", "each", "--preserve", "0.3", "--lr", lr],
        OURS: ["--preset", "toy-hold"],
        "esd-x": ["--method", "esd-x"],
        "ablate": ["--method", "ablate", "--anchor", *anchors.values()],
        "all-but-one": ["--method", "all-but-one"],
    }
    rows = [Row(name, tuple(anchors), [*more, "--iters", "300"]) for name, more in words.items()]
    return rows + closed_rows(anchors)


def matrix_rows(methods, concepts):
    """The rows of Figure 2: each method erases each concept. methods: {row: words of train.py}."""
    rows = []
    for name, more in methods.items():
        for concept in concepts:
            rows.append(Row(f"{name} {concept}", (concept,), more))
    return rows


def one_table():
    """The table of one concept.

    A learned word attacks the original and each model with a patch; some have more attacks.
    """
    rows = one_concept("star", "circle")
    attacks = {name: ["word"] for name in (ORIGINAL, *(row.name for row in rows))}
    for name in ATTACKED_LONG:
        attacks[name] += ["tokens", "relearn"]
    for name in (ORIGINAL, OURS):
        attacks[name].append("noise")
    return Table("One concept (the paper's Table 1)", rows, GUIDED, attacks)


def three_table():
    """The table of three concepts at once."""
    attacked = ("sdd, each + preserve", "esd-x", "uce", OURS)
    attacks = {name: ["word"] for name in attacked}
    return Table("Three concepts at once (Table 2)", several_concepts(THREE), GUIDED, attacks)


def textures_table():
    """The table of Figure 2 in the shapes world."""
    methods = {
        "sdd": ["--steps", "12", "--lr", "4.4e-4"],  # tuned for textures
        "esd-x": ["--method", "esd-x"],
        "uce": ["--method", "uce", "--anchor", "plain"],
    }
    title = "Artists (Figure 2): textures in their place"
    return Table(title, matrix_rows(methods, TEXTURES), templates=TEXTURE_TEMPLATES)


def alcohol_table():
    """The table of one concept in the emoji world."""
    rows = one_concept("alcohol", "drink", lr="1e-3")
    attacks = {name: ["word"] for name in (ORIGINAL, *(row.name for row in rows))}
    title = "Alcohol (the paper's Table 1: nudity)"
    return Table(title, rows, GUIDED, attacks, model="emoji")


def twenty_table():
    """The table of twenty concepts at once in the emoji world."""
    title = "Twenty concepts at once (the paper's Table 2: I2P)"
    return Table(title, several_concepts(TWENTY, lr="1e-3"), GUIDED, model="emoji")


def artists_table():
    """The table of Figure 2 in the emoji world."""
    methods = {  # tuned for noto, see page.MATRIX_TUNING
        "sdd": ["--lr", "6e-4"],
        "esd-x": ["--method", "esd-x", "--lr", "3.2e-3"],
        "uce": ["--method", "uce", "--template", *UCE_ARTIST_TEMPLATES],
    }
    rows = matrix_rows(methods, emoji.ARTISTS)
    return Table("Artists (Figure 2)", rows, model="emoji", templates=ARTIST_TEMPLATES)


def quick_table():
    """The table of the quick study: a part of the table of one concept."""
    chosen = ("sdd", "sdd + preserve", "esd-x", "uce")
    rows = [row for row in one_concept("star", "circle") if row.name in chosen]
    attacked = (ORIGINAL, "sdd", "esd-x", "uce")
    attacks = {name: ["word"] for name in attacked}
    return Table("One concept (the paper's Table 1)", rows, ["neg", "sld-max", "sega"], attacks)


# {study: Study}; `snakemake STUDY` makes one of them, `snakemake` all but the quick one. The last
# three are of the emoji world.
STUDIES = {
    "one": Study(SEEDS, 200, 0, 24, AT, {"one": one_table()}),
    "curve": Study(SEEDS, 100, 100, 24, AT, {}),
    "three": Study(SEEDS, 200, 0, 24, AT, {"three": three_table()}),
    "textures": Study(SEEDS, MATRIX_LIMIT, 0, 24, AT, {"textures": textures_table()}),
    "alcohol": Study(SEEDS, 200, 60, 24, EMOJI_AT, {"alcohol": alcohol_table()}, "alcohol"),
    "twenty": Study(SEEDS, 200, 0, 24, EMOJI_AT, {"twenty": twenty_table()}),
    "artists": Study(SEEDS, MATRIX_LIMIT, 0, 24, EMOJI_AT, {"artists": artists_table()}),
    "quick": Study(SEEDS[:1], 40, 0, 12, QUICK_AT, {"one": quick_table()}),
}
MAIN = tuple(name for name in STUDIES if name != "quick")
# {name: Table}. The trainings of the quick study are in the table `one`.
TABLES = {name: table for study in MAIN for name, table in STUDIES[study].tables.items()}


# ---------------------------------------------------------------------------------------- files
def slug(name):
    """The name of a row in file names."""
    return name.replace(" ", "").replace(",", "-")


def find_row(table, short):
    """The Row of a table, found by its slug."""
    for row in TABLES[table].rows:
        if slug(row.name) == short:
            return row
    raise KeyError(f"no row {short} in the table {table}")


def model_of(study, table):
    """--model of a table, or of the curve."""
    return TABLES[STUDIES[study].curve_table if table == "curve" else table].model


def model_files(model):
    """The weights of a toy model."""
    world = worlds.of(model)
    return [f"toy/{world.MODEL.name}/{file}" for file in WEIGHTS]


def probe_files(model):
    """What says what an image shows."""
    world = worlds.of(model)
    return [f"toy/{world.PROBE.name}", "toy/probe.py"]


def seeds_of(row, seeds):
    """The training seeds of a row: those of the study; the first one for a closed form."""
    return seeds[:1] if row.closed else seeds


def run_folder(table, row, seed):
    return f"{RESULTS}/runs/{table}/{slug(row)}/{seed}"


def patch_file(table, row, seed):
    return f"{run_folder(table, row, seed)}/erased.safetensors"


def table_folder(study, table):
    return f"{RESULTS}/{study}/tables/{table}"


def attack_folder(study, table, row, kind, seed):
    return f"{RESULTS}/{study}/attacks/{table}/{slug(row)}/{kind}-{seed}"


def patches(study, table):
    """{row: its patches, one per training seed} of a table."""
    found = {}
    for row in STUDIES[study].tables[table].rows:
        seeds = seeds_of(row, STUDIES[study].seeds)
        found[row.name] = [patch_file(table, row.name, seed) for seed in seeds]
    return found


def attacks(study, table):
    """{row: {kind: the results of its attacks, one per seed}} of a table."""
    found = {}
    for row, kinds in STUDIES[study].tables[table].attacks.items():
        found[row] = {}
        for kind in kinds:
            folders = [
                attack_folder(study, table, row, kind, seed) for seed in STUDIES[study].seeds
            ]
            found[row][kind] = [f"{folder}.json" for folder in folders]
    return found


def table_names(study):
    """The tables of a study, with the curve."""
    return [*STUDIES[study].tables, *(["curve"] if STUDIES[study].curve_limit else [])]


def curve_patches(study):
    """[(line, iteration, training, patch)] of the curve: `training` is the patch at its end."""
    found = []
    for line in CURVE_LINES:
        row, which = line.split(" ")
        for iteration in CURVE_POINTS:
            for seed in STUDIES[study].seeds:
                table = STUDIES[study].curve_table
                exports = f"{run_folder(table, row, seed)}/exports"
                file = f"{exports}/{which}-{iteration:06d}.safetensors"
                found.append((line, iteration, patch_file(table, row, seed), file))
    return found


def table_inputs(study, table):
    """The patches that a table measures. The exports of the curve's trainings lie next to them."""
    if table == "curve":
        return list(dict.fromkeys(training for _, _, training, _ in curve_patches(study)))
    return [file for files in patches(study, table).values() for file in files]


def page_inputs(study):
    """The results that the page shows: tables and attacks."""
    found = [f"{table_folder(study, table)}/results.json" for table in table_names(study)]
    for table in STUDIES[study].tables:
        for kinds in attacks(study, table).values():
            found += [file for files in kinds.values() for file in files]
    return list(dict.fromkeys(found))


def trainings(study):
    """The patches that a study trains."""
    found = []
    for table in table_names(study):
        found += table_inputs(study, table)
    return list(dict.fromkeys(found))


def benchmark_file(path):
    """Where Snakemake writes the seconds that the command for `path` took."""
    return f"{RESULTS}/seconds/{path.removeprefix(f'{RESULTS}/')}.tsv"


# ---------------------------------------------------------------------------------------- commands
def training(table, short, seed):
    """The words of train.py for the row with the slug `short`."""
    row = find_row(table, short)
    model = TABLES[table].model
    words = ["--model", model, "--concept", *row.concepts, *row.words, "--seed", seed]
    words += ["--preview", row.concepts[0], "--preview-steps", STEPS, "--device", "cpu"]
    if guidance_scale := worlds.of(model).GUIDANCE_SCALE:
        words += ["--preview-guidance-scale", guidance_scale]
    if not row.closed:
        words += ["--preview-every", EVERY, "--export-every", EVERY]
    words += ["--out", run_folder(table, row.name, seed)]
    return [str(word) for word in words]


def settings(words):
    """All settings of a training as JSON: its words, and the presets' numbers for the rest."""
    settled = presets.settle(train.parse(words))
    del settled["compile"]  # for a GPU. Without it, older trainings are not repeated
    return json.dumps(settled, sort_keys=True, default=str)


def attacked_patch(table, short, seed):
    """The patch that an attack with this seed is made on; None for the original model."""
    if short == ORIGINAL:
        return None
    row = find_row(table, short)
    if row.closed:  # one patch for all seeds
        seed = SEEDS[0]
    return patch_file(table, row.name, seed)


def attack(study, table, short, kind, seed):
    """The words of attack.py for the row with the slug `short`."""
    model, concept = TABLES[table].model, TABLES[table].rows[0].concepts[0]
    words = ["--model", model, "--concept", concept, "--kind", kind]
    words += ["--patch", attacked_patch(table, short, seed) or "none", "--seed", seed]
    if STUDIES[study].at[kind]:
        words += ["--at", *attack_steps(study, short, kind)]
    samples = NOISE_SAMPLES if kind == "noise" else STUDIES[study].samples
    words += ["--samples", samples, *sampling(model), "--device", "cpu"]
    words += ["--out", attack_folder(study, table, short, kind, seed)]
    return [str(word) for word in words]


def attack_steps(study, short, kind):
    """--at of an attack: all steps for the models of ATTACKED_LONG, else up to LAST_STEP."""
    steps = STUDIES[study].at[kind]
    if short in map(slug, ATTACKED_LONG):
        return steps
    return [step for step in steps if step <= LAST_STEP]


def measurement(study, table):
    """The words of eval.py for a table."""
    if table == "curve":
        words = ["toy", "--limit", STUDIES[study].curve_limit]
        for line, iteration, _, file in curve_patches(study):
            words += ["--patch", f"{line}@{iteration}={file}"]
    else:
        templates = STUDIES[study].tables[table].templates
        if templates:
            words = ["artists", "--limit", STUDIES[study].limit, "--template", *templates]
        else:
            words = ["toy", "--limit", STUDIES[study].limit]
        for row, files in patches(study, table).items():
            for file in files:
                words += ["--patch", f"{row}={file}"]
        words += guided_words(STUDIES[study].tables[table])
    model = model_of(study, table)
    words += ["--model", model, *sampling(model)]
    words += ["--device", "cpu", "--threads", 1, "--out", table_folder(study, table)]
    return [str(word) for word in words]


def sampling(model):
    """The words of attack.py and eval.py for the sampler."""
    if guidance_scale := worlds.of(model).GUIDANCE_SCALE:
        return ["--steps", STEPS, "--guidance-scale", guidance_scale]
    return ["--steps", STEPS]


def guided_words(table):
    """The words of eval.py for the methods that only guide; none where a table has none."""
    if not table.guided:
        return []
    words = ["--methods", *table.guided, "--avoid", *table.rows[0].concepts]
    return [*words, "--guidance-warmup", GUIDANCE_WARMUP]


def quoted(words):
    """The words as a part of a shell command."""
    return shlex.join(words)
