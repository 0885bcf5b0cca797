"""workflow/: every planned command exists, Snakemake plans and continues them, and the page."""

import ast
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import attack
import eval as evaluation
import train
from evaluation import attacks, columns, tables
from support.statistics import counted
from workflow import page, plan

ROOT = Path(__file__).parent.parent
needs_snakemake = pytest.mark.skipif(
    not (find_spec("snakemake") and find_spec("matplotlib")),
    reason="needs Snakemake: pip install -r requirements-workflow.txt",
)
# A study with one training of 2 iterations and one attack of 20 steps: follows plan.py's lines.
TINY = """

SHORT = ["--iters", "2", "--warmup", "0", "--steps", "1", "--batch-size", "1"]
SDD = Row("sdd", ("star",), SHORT)
QUICK = Table("One concept", [SDD], ["sega"], {"sdd": ["word"]})
STUDIES["one"].tables["one"].rows[:] = [SDD]
STUDIES["quick"] = Study((2,), 2, 0, 2, {"word": (0, 1, 20)}, {"one": QUICK})
STEPS, EVERY = 1, 2
"""


# ---------------------------------------------------------------------------------------- the plan
def planned_trainings():
    """(table, slug, seed) of every training."""
    found = set()
    for study in plan.STUDIES:
        for patch in plan.trainings(study):
            table, row, seed = patch.split("/")[-4:-1]
            found.add((table, row, int(seed)))
    return sorted(found)


def planned_attacks():
    """(study, table, slug, kind, seed) of every attack."""
    found = []
    for study in plan.STUDIES:
        for file in plan.page_inputs(study):
            if "/attacks/" in file:
                *_, table, row, name = file.removesuffix(".json").split("/")
                kind, seed = name.split("-")
                found.append((study, table, row, kind, int(seed)))
    return found


def test_every_training_exists():
    for table, row, seed in planned_trainings():
        words = plan.training(table, row, seed)
        settings = json.loads(plan.settings(words))
        assert settings["seed"] == seed and "out" not in settings
        assert train.parse(words).out == Path(plan.run_folder(table, row, seed))


def test_every_attack_exists():
    for study, table, row, kind, seed in planned_attacks():
        args = attack.parse(plan.attack(study, table, row, kind, seed))
        assert args.seed == seed and (args.patch == "none") == (row == "original")
        if args.patch != "none":
            assert args.patch in plan.trainings(study), args.patch
            args.patch = "none"  # the file is not there yet
        attack.settle(args)


def test_every_table_exists():
    for study in plan.STUDIES:
        for table in plan.table_names(study):
            args = evaluation.parse(plan.measurement(study, table))
            evaluation.check_flags(args)
            assert args.patch, table


def test_a_new_number_of_a_preset_changes_the_settings_of_its_rows_only(monkeypatch):
    import presets

    def settings():
        return {row: plan.settings(plan.training("one", row, 2)) for row in ("sdd", "esd-x")}

    before = settings()
    method = presets.METHODS["esd-x"]
    changed = method._replace(toy=method.toy | {"lr": 1e-4})
    monkeypatch.setitem(presets.METHODS, "esd-x", changed)
    after = settings()
    assert after["sdd"] == before["sdd"] and after["esd-x"] != before["esd-x"]


def test_the_plan_fits_together():
    for study in plan.STUDIES.values():
        assert study.curve_table in plan.TABLES
        for table in study.tables.values():
            names = [row.name for row in table.rows]
            assert len({plan.slug(name) for name in names}) == len(names)
            assert table.attacks.keys() <= {plan.ORIGINAL, *names}
        assert (
            attacks.COUNTED_AFTER["word"] in study.at["word"]
            and attacks.COUNTED_AFTER["word"] <= plan.LAST_STEP
        )
    assert attacks.COUNTED_AFTER["relearn"] in plan.AT["relearn"]
    one = {row.name for row in plan.STUDIES["one"].tables["one"].rows}
    assert {row.name for row in plan.STUDIES["quick"].tables["one"].rows} < one
    assert {"sdd", "esd-x"} <= one and set(page.CURVES) <= one | {plan.ORIGINAL}


def test_a_closed_form_is_trained_once_and_attacked_with_each_seed():
    assert [seed for table, row, seed in planned_trainings() if (table, row) == ("one", "uce")] == [
        2
    ]
    found = {plan.attacked_patch("one", "uce", seed) for seed in (2, 3, 4)}
    assert found == {"results/runs/one/uce/2/erased.safetensors"}
    assert plan.attacked_patch("one", "sdd", 3) == "results/runs/one/sdd/3/erased.safetensors"
    assert plan.attacked_patch("one", "original", 3) is None


# ---------------------------------------------------------------------------------------- Snakemake
def project(folder, more=""):
    """A copy of the project in `folder`, with links to the folders that no test changes.

    more: lines that are added to plan.py.
    """
    folder.mkdir()
    for file in ROOT.glob("*.py"):  # Python looks for modules next to a link's target
        shutil.copy(file, folder)
    for name in ("evaluation", "report", "support", "toy"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "workflow", folder / "workflow")
    with open(folder / "workflow/plan.py", "a", encoding="utf-8") as f:
        f.write(more)
    return folder


def change(folder, name, before, after):
    """Changes a file of a copy of the project."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.count(before) == 1
    (folder / name).write_text(text.replace(before, after), encoding="utf-8")


def start(folder, *words):
    """`snakemake WORDS…` in a folder, as a process."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / ".cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "snakemake", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def snakemake(folder, *words):
    """The output of a `snakemake` that succeeds."""
    process = start(folder, *words)
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


def counts(output):
    """{rule: number of jobs} of a dry run."""
    if "Nothing to be done" in output:
        return {}
    table = output.split("Job stats:")[1]
    found = dict(re.findall(r"^(\w+) +(\d+)$", table, re.M))
    del found["total"]
    return {rule: int(number) for rule, number in found.items()}


@needs_snakemake
def test_snakemake_plans_the_studies(tmp_path):
    folder = project(tmp_path / "p")
    quick = counts(snakemake(folder, "-n", "quick"))
    assert quick == {"train": 4, "attack": 4, "measure": 1, "page": 1, "quick": 1}
    studies = ("one", "curve", "three", "textures")
    trainings = (8 * 3 + 4) + (7 * 3 + 4) + (2 * 3 * 3 + 3)  # one, three, textures
    attacks = 13 * 3 + 5 * 3 * 2 + 2 * 3 + 4 * 3  # one: word; tokens, relearn; noise. three: word
    found = counts(snakemake(folder, "-n", *studies))
    shapes = {"train": trainings, "attack": attacks, "measure": 4, "page": 4}
    assert found == shapes | dict.fromkeys(studies, 1)
    trainings = (8 * 3 + 4) + (7 * 3 + 4) + (2 * 6 * 3 + 6)  # alcohol, twenty, artists
    emoji = {"train": trainings, "attack": 13 * 3, "measure": 4, "page": 3}  # alcohol: word
    found = counts(snakemake(folder, "-n"))
    assert found == {"all": 1} | {rule: shapes[rule] + n for rule, n in emoji.items()}
    assert not (folder / plan.RESULTS).exists()


@pytest.mark.parametrize(
    "first, second, status, left",
    [
        ("true", "true", 0, "old"),  # it continued in the folder
        ("echo stopped >&2; false", "true", 1, "old"),  # any other error stays
        ("echo 'DIR is not empty: choose another' >&2; false", "true", 0, ""),
        ("echo 'DIR is not empty: choose another' >&2; false", "false", 1, ""),
    ],
)
def test_a_refused_folder_is_made_again(first, second, status, left, tmp_path):
    """The shell text of the rules, with a command that fails or not in its first and second run."""
    tree = ast.parse(
        (ROOT / "workflow/Snakefile").read_text(encoding="utf-8").split("localrules:")[0]
    )
    (function,) = [node for node in tree.body if getattr(node, "name", "") == "again_if_used"]
    names = {}
    exec(compile(ast.Module([function], []), "Snakefile", "exec"), names)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").touch()
    command = tmp_path / "command.sh"
    again = f"if [ -e {tmp_path}/ran ]; then {second}; else touch {tmp_path}/ran; {first}; fi"
    command.write_text(again, encoding="utf-8")
    text = names["again_if_used"](f"bash {command}", folder).format()  # "{{" becomes "{"
    line = f"set -euo pipefail; {text}; touch {tmp_path}/finished"
    assert subprocess.run(["bash", "-c", line], capture_output=True).returncode == status
    assert (tmp_path / "finished").exists() == (status == 0)
    assert [file.name for file in folder.glob("*")] == ([left] if left else [])


@needs_snakemake
def test_the_targets_in_the_documents_exist():
    files = [ROOT / "workflow/Snakefile", ROOT / "README.md", *ROOT.glob("docs/*.md")]
    lines = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        lines += re.findall(r"^ *(snakemake [^\n]*?)(?:  .*)?$", text, re.M)
        lines += re.findall(r"`(snakemake [^`\n]+)`", text)
    assert len(lines) >= 4
    for line in lines:
        words = line.split()[1:]
        targets = [word for word in words if word in ("all", *plan.STUDIES)]
        flags = [word for word in words if word.startswith("-")]
        values = [word for word in words if word.isdigit() or word == "slurm"]
        assert len(words) == len(targets + flags + values), line


def rows(folder):
    """The figures of rows.json without times, which differ between two runs."""
    content = json.loads((folder / "results/quick/rows.json").read_text(encoding="utf-8"))
    found = content["tables"]["one"]
    for row in found:
        assert "samples" not in row and "sheet" not in row
        assert (row["figures"].pop("seconds", None) is not None) == (row["model"] == "sdd")
    return found


def stop(process, folder, number):
    """Stops a `snakemake` and its commands between two points of its attack."""
    results = folder / "results/quick/attacks/one/sdd/word-2/results.json"
    deadline = time.monotonic() + 300
    while not (results.exists() and '"step": 1' in results.read_text(encoding="utf-8")):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.05)
    os.killpg(process.pid, number)
    process.communicate(timeout=100)
    assert process.returncode != 0
    assert not (folder / "results/quick/results.md").exists()


@needs_snakemake
@pytest.mark.long
def test_a_stopped_study_continues_to_the_same_rows(tmp_path):
    """Ctrl-C, then kill -9, each while it attacks; and what a change repeats."""
    undisturbed, stopped = project(tmp_path / "a", TINY), project(tmp_path / "b", TINY)
    words = ("--cores", "2", "quick")
    snakemake(undisturbed, *words)
    stop(start(stopped, *words), stopped, signal.SIGINT)
    shutil.rmtree(stopped / "results/quick/attacks")
    stop(start(stopped, *words), stopped, signal.SIGKILL)
    snakemake(stopped, "--unlock")
    snakemake(stopped, *words)
    assert rows(stopped) == rows(undisturbed)
    sdd = next(row for row in rows(stopped) if row["model"] == "sdd")
    assert [point["step"] for point in sdd["attacks"]["word"]["points"]] == [0, 1, 20]
    text = (stopped / "results/quick/results.md").read_text(encoding="utf-8")
    assert "`snakemake --cores 2 quick`" in text and "all commands add up to" in text
    for name in re.findall(r"\]\((\S+)\)", text):
        assert (stopped / "results/quick" / name).exists(), name

    assert counts(snakemake(stopped, "-n", "quick")) == {}
    everything = {"train": 1, "attack": 1, "measure": 1, "page": 1, "quick": 1}
    change(stopped, "presets.py", "lr=8e-4, erase_scale=3.0", "lr=9e-4, erase_scale=3.0")  # ESD's
    assert counts(snakemake(stopped, "-n", "quick")) == {}
    change(stopped, "adversaries.py", 'f"<{settings', 'f"<new-{settings')
    assert counts(snakemake(stopped, "-n", "quick")) == everything
    snakemake(stopped, *words)  # the same patch, so only its end tells that the attack is old
    file = stopped / "results/quick/attacks/one/sdd/word-2.json"
    assert json.loads(file.read_text(encoding="utf-8"))["points"][0]["prompt"] == "<new-star>"
    with open(stopped / "workflow/plan.py", "a", encoding="utf-8") as f:
        f.write('SDD.words[:] = [*SHORT, "--lr", "1e-2"]\n')  # another patch
    snakemake(stopped, *words)
    assert rows(stopped) != rows(undisturbed)
    assert counts(snakemake(stopped, "-n", "quick")) == {}


# ---------------------------------------------------------------------------------------- comeback
def result(points, chance=((0, 0, 4),), detected=True):
    """The content of an attack's results.json; points, chance: [(step, hits, n)]."""

    def listed(some):
        return [{"step": step, "hits": hits, "n": n, "found": []} for step, hits, n in some]

    return {"detected": detected, "points": listed(points), "chance": listed(chance)}


def test_comeback_of_a_word():
    first = result([(0, 0, 4), (80, 1, 4), (160, 3, 4)])
    second = result([(0, 0, 4), (80, 0, 4), (160, 1, 4)])
    figures, found = attacks.attack_figures({"word": [first, second]})
    assert figures == {"word_half": 160.0, "word": ((3, 1, 0), (1, 3, 0))}
    assert found["word"]["halves"] == [120.0, None]
    assert found["word"]["points"] == [
        {"step": 0, "hits": 0, "n": 8},
        {"step": 80, "hits": 1, "n": 8},
        {"step": 160, "hits": 4, "n": 8},
    ]


def test_comeback_of_the_other_attacks():
    tokens = result([(0, 0, 4), (40, 2, 4), (320, 3, 4)])
    relearn = result([(0, 0, 4), (10, 1, 4), (80, 1, 4)])
    noise = result([(1, 1, 4), (24, 3, 4)], chance=[(1, 0, 4), (24, 2, 4)])
    figures, _ = attacks.attack_figures(
        {"tokens": [tokens], "relearn": [relearn], "noise": [noise]}
    )
    assert figures == {
        "tokens": ((3, 1, 0),),
        "relearn_half": None,
        "relearn": ((1, 3, 0),),
        "noise": ((3, 1, 0),),
        "noise_chance": ((2, 2, 0),),
    }


def test_steps_that_an_attack_lacks_are_left_out():
    long, short = result([(0, 0, 4), (5, 2, 4), (160, 4, 4)]), result([(0, 2, 4), (5, 4, 4)])
    figures, found = attacks.attack_figures({"word": [long, short]})
    assert [point["step"] for point in found["word"]["points"]] == [0, 5]
    assert figures == {"word_half": 2.5}  # 25 %, then 75 %; step 160 is not in both


def test_images_that_no_detector_saw_are_no_figures():
    assert attacks.attack_figures({"word": [result([(0, 0, 4)], detected=False)]}) == ({}, {})


def test_a_concept_that_never_came_back():
    """The table says "never" where the attack was made, and has a dash where it was not."""
    chosen = [column for column in columns.COMEBACK if column.key == "word_half"]
    some = [
        {"model": "a", "erased": [], "figures": {"word_half": None}, "paper": {}},
        {"model": "b", "erased": [], "figures": {}, "paper": {}},
        {"model": "c", "erased": [], "figures": {"word_half": 80.0}, "paper": {}},
    ]
    cells = [line.split(" | ")[-1] for line in tables.markdown(some, chosen).splitlines()[2:]]
    assert cells == ["never |", "–\N{WORD JOINER} |", "80 |"]
    assert tables.terminal_table(some, chosen).splitlines()[1].endswith("never")


def test_the_toys_tables_have_the_columns():
    found = columns.all_columns("toy", [], {"named": "x"})
    assert found[-len(columns.COMEBACK) :] == columns.COMEBACK
    assert set(columns.HALVES) < {column.key for column in columns.COMEBACK}
    assert set(page.COSTS) < {column.key for column in columns.COMEBACK}


# ---------------------------------------------------------------------------------------- the page
def row(model, **figures):
    return {"model": model, "erased": ["star"], "figures": figures, "paper": {}}


ONE = [
    row("original"),
    row("sdd", named=[1, 100], caption=[95, 100]),
    row("sdd + preserve", named=[1, 100], caption=[95, 100]),
    row("sdd + adversary", named=[1, 100], caption=[95, 100]),
    row("esd-x", named=[50, 100], caption=[95, 100]),
    row("neg", named=[0, 100], implied=[1, 100]),
]


def test_verdict():
    assert page.verdict(counted(0, 200), counted(100, 200)) == "holds"
    assert page.verdict(counted(100, 200), counted(0, 200)) == "fails"
    assert page.verdict(counted(10, 200), counted(14, 200)) == "open"


def test_a_grid_has_one_line_per_claim_and_one_column_per_method():
    found = page.claims_by_method({"one": ONE})
    lines = page.grid(found).splitlines()
    assert lines[0] == "| claim | esd-x | neg |"
    assert lines[2:] == [
        "| SDD leaves less of one concept (Table 1): concept named | holds | open |",
        "| SDD harms the rest less (our question, not the paper's): other captions wrong "
        "| open | – |",
    ]
    assert page.count_verdicts(found).startswith("Of 3 comparisons 1 hold, 2 are open")


def test_claims_by_roles_and_iteration():
    assert page.claims_by_roles({"one": ONE}) == page.claims_by_iteration({"one": ONE}) == []
    three = [row("sdd", named=[1, 100]), row("sdd, official roles", named=[60, 100])]
    (found,) = page.claims_by_roles({"three": three})
    assert found.verdict == "holds" and found.against == "sdd, official roles"
    curve = []
    for i in plan.CURVE_POINTS:
        curve.append(row(f"sdd teacher@{i}", named=[1, 100], caption=[90, 100]))
        curve.append(row(f"sdd student@{i}", named=[1, 100], caption=[10, 100]))
        curve.append(row(f"esd-x student@{i}", named=[0, 100], caption=[90, 100]))
    found = page.claims_by_iteration({"curve": curve})
    assert [one.verdict for one in found] == ["open", "holds"] * len(plan.CURVE_POINTS)


def test_the_members_of_a_kind_are_compared_too():
    rows = [row("sdd", members=[90, 100]), row("esd-x", members=[10, 100])]
    (found,) = page.claims_by_method({"alcohol": rows})
    assert found.verdict == "fails" and "members" in found.claim


def test_the_measures_of_unlearn_canvas():
    """Figure 2 of three names, of which b and c are near: hits in the cells, pooled by method."""
    rows = [
        row("original", a=[10, 10], b=[9, 10], c=[8, 10], rest=[30, 30]) | {"erased": []},
        row("sdd a", a=[1, 10], b=[2, 10], c=[3, 10], rest=[20, 30], seconds=5) | {"erased": ["a"]},
        row("sdd b", a=[7, 10], b=[4, 10], c=[5, 10], rest=[10, 30]) | {"erased": ["b"]},
    ]
    original, sdd = page.unlearn_canvas(rows, {"b": ("c",), "c": ("b",)})
    assert original["model"] == "original" and sdd["model"] == "sdd" and sdd["erased"] == ["a", "b"]

    def counts(row):
        return {key: (found.hits, found.n) for key, found in row["figures"].items()}

    assert counts(original) == {"other": (27, 30), "rest": (30, 30)}
    assert counts(sdd) == {
        "gone": (9 + 6, 20),  # a is right once, b four times
        "other": (2 + 3 + 7, 30),
        "near": (5, 10),  # c, where b was erased
        "rest": (30, 60),
    }


def test_captions_are_compared_by_what_is_wrong():
    assert page.figure({"caption": [95, 100]}, "wrong") == counted(5, 100)
    assert page.figure({"named": [5, 100]}, "named") == counted(5, 100)
    assert page.figure({}, "named") is None and page.figure({}, "wrong") is None


def test_which_method_should_i_use():
    """Its columns, in the order of the plan, with "never" and the seconds."""
    some = copy.deepcopy(ONE)
    some[1]["figures"] |= {"word_half": None, "word": (1, 72), "seconds": 99.0}
    toys = columns.all_columns("toy", [], {"named": "", "implied": "", "caption": ""})
    results = page.Results("quick", {"one": some}, {"one": toys})
    head, _, *lines = page.choice_text(results).strip().splitlines()[4:]
    titles = [re.sub(r"[ \N{NO-BREAK SPACE}]*[↓↑].*", "", title) for title in head.split(" | ")]
    assert titles[2:] == [
        "concept named",
        "concept implied",
        "other captions right",
        "steps until a new word finds it",
        "found by a new word",
        "seconds of training",
    ]
    assert [line.split(" | ")[0] for line in lines] == [f"| {one['model']}" for one in some]
    assert "| never |" in lines[1] and lines[1].endswith("| 99 |")


def test_the_time_is_left_out_if_a_part_is_not_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert page.total_seconds("quick") is None
    text = page.introduction(page.Results("quick", {}, {}), 2)
    assert "add up" not in text and "`snakemake --cores 2 quick`" in text and "seeds: 2," in text
    assert "commit" not in text  # not a checkout
    assert page.command("one", None) == "snakemake one"
