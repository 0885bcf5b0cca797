"""workflow/: every planned command exists, Snakemake plans and continues them, and the page."""

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
from PIL import Image

import attack
import eval as evaluation
import presets
import train
from evaluation import attacks, columns, tables
from support.statistics import ORIGINAL
from workflow import page, plan

ROOT = Path(__file__).parent.parent
needs_snakemake = pytest.mark.skipif(
    not (find_spec("snakemake") and find_spec("matplotlib")),
    reason="needs Snakemake: pip install -r requirements-extra.txt",
)
# A study with one training of 2 iterations and one attack of 20 steps: follows plan.py's lines.
TINY = """

SHORT = ["--iters", "2", "--warmup", "0", "--steps", "1", "--batch-size", "1"]
SDD = Row("sdd", ("star",), SHORT)
STUDIES["one"].rows[:] = [SDD]
STUDIES["quick"] = Study("one", "One concept", [SDD], ["sega"], {"word": ["sdd"]},
                         {"word": (0, 1, 20)}, limit=2, samples=2, seeds=(2,))
EVERY = 2

import evaluation.study
evaluation.study.STEPS = 1
"""


# ---------------------------------------------------------------------------------------- the plan
def trainings():
    """(table, slug, seed) of every training."""
    files = {file for study in plan.STUDIES for file in plan.trainings(study)}
    return [(table, row, int(seed)) for *_, table, row, seed, _ in (f.split("/") for f in files)]


def test_every_command_exists():
    for table, row, seed in trainings():
        words = plan.training(table, row, seed)
        settings = json.loads(plan.settings(words))
        assert settings["seed"] == seed and "out" not in settings
        assert train.parse(words).out == Path(plan.run_folder(table, row, seed))
    for study in plan.STUDIES:
        for table in plan.table_names(study):
            args = evaluation.parse(plan.measurement(study, table))
            evaluation.check_flags(args)
            assert args.patch, table
        for file in plan.page_inputs(study):
            if "/attacks/" in file:
                *_, table, row, name = file.removesuffix(".json").split("/")
                kind, seed = name.split("-")
                args = attack.parse(plan.attack(study, table, row, kind, int(seed)))
                assert args.seed == int(seed) and (args.patch == "none") == (row == ORIGINAL)
                if args.patch != "none":
                    assert args.patch in plan.trainings(study), args.patch
                    args.patch = "none"  # the file is not there yet
                attack.settle(args)


def test_the_plan_fits_together():
    for study in plan.STUDIES.values():
        names = [row.name for row in study.rows]
        assert len({plan.slug(name) for name in names}) == len(names)
        assert {row for rows in study.attacks.values() for row in rows} <= {ORIGINAL, *names}
        trained = {row.name for row in plan.STUDIES[study.table].rows}
        assert set(names) <= trained
        assert not study.curve_limit or set(plan.CURVE_ROWS) <= trained
        assert attacks.COUNTED_AFTER["word"] in study.at["word"]
    assert attacks.COUNTED_AFTER["word"] <= plan.LAST_STEP
    assert attacks.COUNTED_AFTER["relearn"] in plan.AT["relearn"]
    assert set(page.CURVES) <= {ORIGINAL, *(row.name for row in plan.ONE)}
    known = {column.key for column in columns.COMEBACK}
    assert {*columns.HALVES, *page.COSTS} < known
    assert columns.all_columns("toy", [], "toy")[-len(known) :] == columns.COMEBACK


def test_a_new_number_of_a_preset_changes_the_settings_of_its_rows_only(monkeypatch):
    def settings():
        return {row: plan.settings(plan.training("one", row, 2)) for row in ("sdd", "esd-x")}

    before = settings()
    method = presets.METHODS["esd-x"]
    changed = method._replace(toy=method.toy | {"lr": 1e-4})
    monkeypatch.setitem(presets.METHODS, "esd-x", changed)
    after = settings()
    assert after["sdd"] == before["sdd"] and after["esd-x"] != before["esd-x"]


def test_a_comment_repeats_nothing_and_code_does(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "ROOT", tmp_path)

    def code(text):
        (tmp_path / "a.py").write_text(text, encoding="utf-8")
        return plan.code(["a.py"])

    before = code('"""A."""\nx = 1\n')
    assert code('"""B."""\n\n# why\nx = (1)\n') == before != code('"""A."""\nx = 2\n')
    assert all((ROOT / file).exists() for file in plan.TRAINING_CODE + plan.ATTACK_CODE)


def test_a_closed_form_is_trained_once_and_attacked_with_each_seed():
    assert [seed for *row, seed in trainings() if row == ["one", "uce"]] == [2]
    found = {plan.patch_file("one", "uce", seed) for seed in (2, 3, 4)}
    assert found == {"results/runs/one/uce/2/erased.safetensors"}
    assert plan.patch_file("one", "sdd", 3) == "results/runs/one/sdd/3/erased.safetensors"
    assert plan.patch_file("one", ORIGINAL, 3) is None


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


def start(folder, words):
    """`snakemake WORDS…` in a folder, as a process."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / ".cache")}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    command = [sys.executable, "-m", "snakemake", *words.split()]
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def snakemake(folder, words):
    """The output of a `snakemake` that succeeds."""
    process = start(folder, words)
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


def counts(folder, words):
    """{rule: number of jobs} of a dry run."""
    output = snakemake(folder, f"-n {words}")
    if "Nothing to be done" in output:
        return {}
    table = output.split("Job stats:")[1]
    found = dict(re.findall(r"^(\w+) +(\d+)$", table, re.M))
    del found["total"]
    return {rule: int(number) for rule, number in found.items()}


@needs_snakemake
def test_snakemake_plans_the_studies(tmp_path):
    folder = project(tmp_path / "p")
    quick = counts(folder, "quick")
    assert quick == {"train": 4, "attack": 4, "measure": 1, "page": 1, "quick": 1}
    studies = ("one", "curve", "three", "textures")
    trainings = (8 * 3 + 4) + (7 * 3 + 4) + (2 * 3 * 3 + 3)  # one, three, textures
    attacks = 13 * 3 + 5 * 3 * 2 + 2 * 3 + 4 * 3  # one: word; tokens, relearn; noise. three: word
    found = counts(folder, " ".join(studies))
    shapes = {"train": trainings, "attack": attacks, "measure": 4, "page": 4}
    assert found == shapes | dict.fromkeys(studies, 1)
    trainings = (8 * 3 + 4) + (7 * 3 + 4) + (2 * 6 * 3 + 6)  # alcohol, twenty, artists
    emoji = {"train": trainings, "attack": 13 * 3, "measure": 4, "page": 3}  # alcohol: word
    found = counts(folder, "")
    assert found == {"all": 1} | {rule: shapes[rule] + n for rule, n in emoji.items()}
    assert not (folder / plan.RESULTS).exists()


def test_the_targets_in_the_documents_exist():
    files = [ROOT / "workflow/Snakefile", ROOT / "README.md", *ROOT.glob("docs/*.md")]
    lines = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        lines += re.findall(r"^ *(snakemake [^\n]*?)(?:  .*)?$", text, re.M)
        lines += re.findall(r"`(snakemake [^`\n]+)`", text)
    words = {word for line in lines for word in line.split()[1:] if word.isalpha()}
    assert words <= {"slurm", *plan.STUDIES} and len(lines) >= 4


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
    words = "--cores 2 quick"
    snakemake(undisturbed, words)
    stop(start(stopped, words), stopped, signal.SIGINT)
    shutil.rmtree(stopped / "results/quick/attacks")
    stop(start(stopped, words), stopped, signal.SIGKILL)
    snakemake(stopped, "--unlock")
    snakemake(stopped, words)
    assert rows(stopped) == rows(undisturbed)
    sdd = next(row for row in rows(stopped) if row["model"] == "sdd")
    assert [point["step"] for point in sdd["attacks"]["word"]["points"]] == [0, 1, 20]
    text = (stopped / "results/quick/results.md").read_text(encoding="utf-8")
    assert "`snakemake --cores 2 quick`" in text and "all commands add up to" in text
    for name in re.findall(r"\]\((\S+)\)", text):
        assert (stopped / "results/quick" / name).exists(), name

    assert counts(stopped, "quick") == {}
    everything = {"train": 1, "attack": 1, "measure": 1, "page": 1, "quick": 1}
    change(stopped, "presets.py", "lr=8e-4, erase_scale=3.0", "lr=9e-4, erase_scale=3.0")  # ESD's
    assert counts(stopped, "quick") == {}
    change(stopped, "adversaries.py", 'f"<{settings', 'f"<new-{settings')
    assert counts(stopped, "quick") == everything
    snakemake(stopped, words)  # the same patch, so only its end tells that the attack is old
    file = stopped / "results/quick/attacks/one/sdd/word-2.json"
    assert json.loads(file.read_text(encoding="utf-8"))["points"][0]["prompt"] == "<new-star>"
    with open(stopped / "workflow/plan.py", "a", encoding="utf-8") as f:
        f.write('SDD.words[:] = [*SHORT, "--lr", "1e-2"]\n')  # another patch
    snakemake(stopped, words)
    assert rows(stopped) != rows(undisturbed)
    assert counts(stopped, "quick") == {}


# ---------------------------------------------------------------------------------------- attacks
def result(*points, chance=((0, 0),), detected=True):
    """The content of an attack's results.json; points, chance: (step, hits of 4)."""

    def listed(some):
        return [{"step": step, "hits": hits, "n": 4, "found": []} for step, hits in some]

    return {"detected": detected, "points": listed(points), "chance": listed(chance)}


def test_the_figures_of_attacks():
    first, second = result((0, 0), (80, 1), (160, 3)), result((0, 0), (80, 0), (160, 1))
    figures, found = attacks.attack_figures({"word": [first, second]})
    assert figures == {"word_half": 160.0, "word": ((3, 1, 0), (1, 3, 0))}
    assert found["word"]["halves"] == [120.0, None]
    points = [{"step": 0, "hits": 0}, {"step": 80, "hits": 1}, {"step": 160, "hits": 4}]
    assert found["word"]["points"] == [point | {"n": 8} for point in points]
    # Steps that one of the attacks lacks are left out. 25 %, then 75 %.
    series = [result((0, 0), (5, 2), (160, 4)), result((0, 2), (5, 4))]
    assert attacks.attack_figures({"word": series})[0] == {"word_half": 2.5}
    assert attacks.attack_figures({"word": [result((0, 0), detected=False)]}) == ({}, {})
    others = {
        "tokens": [result((0, 0), (40, 2), (320, 3))],
        "relearn": [result((0, 0), (10, 1), (80, 1))],
        "noise": [result((1, 1), (24, 3), chance=[(1, 0), (24, 2)])],
    }
    assert attacks.attack_figures(others)[0] == {
        "tokens": ((3, 1, 0),),
        "relearn_half": None,
        "relearn": ((1, 3, 0),),
        "noise": ((3, 1, 0),),
        "noise_chance": ((2, 2, 0),),
    }


def test_a_concept_that_never_came_back():
    """The table says "never" where the attack was made, and has a dash where it was not."""
    chosen = [column for column in columns.COMEBACK if column.key == "word_half"]
    some = [row("a", word_half=None), row("b"), row("c", word_half=80.0)]
    cells = [line.split(" | ")[-1] for line in tables.markdown(some, chosen).splitlines()[2:]]
    assert cells == ["never |", "–\N{WORD JOINER} |", "80 |"]
    assert tables.terminal_table(some, chosen).splitlines()[1].endswith("never")


# ---------------------------------------------------------------------------------------- the page
def row(model, **figures):
    return {"model": model, "erased": ["star"], "figures": figures, "paper": {}}


def test_the_stored_rows_give_the_verdicts_of_the_documents():
    stored = {}
    for table in ("one", "three"):
        stored |= page.read_json(ROOT / f"evaluation/toy_rows/{table}.json")["tables"]
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    counts, _, head, _, *lines = page.grid(page.compared(stored, page.BY_METHOD)).splitlines()
    assert counts in text and head in text and len(lines) == 5
    assert all(line in text for line in lines)
    roles = page.compared(stored, page.BY_ROLES)
    assert list(roles.values()) == ["fails", "fails"]
    assert {against for _, against in roles} == {"sdd, official roles"}


def test_claims_about_iterations_and_members():
    curve = []
    for i in (40, 80):
        curve.append(row(f"sdd teacher@{i}", named=[1, 100], caption=[90, 100]))
        curve.append(row(f"sdd student@{i}", named=[1, 100], caption=[10, 100]))
        curve.append(row(f"esd-x student@{i}", named=[0, 100], caption=[90, 100]))
    found = page.compared({"curve": curve}, page.BY_ITERATION)
    assert list(found.values()) == ["open", "open", "holds", "holds"]
    assert {against for _, against in found} == {"40\xa0iterations", "80\xa0iterations"}
    rows = [row("sdd", members=[[90, 10, 0]]), row("esd-x", members=[[4, 6, 0], [6, 84, 0]])]
    ((claim, against), verdict), *others = page.compared({"alcohol": rows}, page.BY_METHOD).items()
    assert "members" in claim and (against, verdict, others) == ("esd-x", "fails", [])


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


def write(file, text):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text, encoding="utf-8")


def write_results(study):
    """What the commands of a study would leave: the same figures in each row, and attacks."""
    one = plan.STUDIES[study]
    for table in plan.table_names(study):
        names = [ORIGINAL, *(row.name for row in one.rows)]
        if table == "curve":
            names = [name for name, _ in plan.curve_patches(study)]
        keys = ["noto", "rest"] if one.templates else ["named", "implied", "caption"]
        content = {
            "columns": [columns.Column(key, key, None)._asdict() for key in keys],
            "rows": [
                row(name, **dict.fromkeys(keys, [30, 40])) | {"sheet": "", "samples": []}
                for name in names
            ],
        }
        folder = plan.table_folder(study, table)
        write(f"{folder}/results.json", json.dumps(content))
        for plot in ("curve", "matrix"):
            Image.new("RGB", (8, 8)).save(f"{folder}/{plot}.png")
    for patch in plan.trainings(study):
        folder = Path(patch).parent
        write(folder / "run.json", '{"args": {"iters": 8}, "training": null}')
        drifts = "gap_student,drift_student,gap_teacher,drift_teacher"
        write(folder / "log.csv", f"{drifts}\n1,1,1,1\n0.5,0.001,0.25,2e-05\n,,,\n")
        write(patch, "x" * 1000)
        Image.new("RGB", (8, 8)).save(folder / "film.png")
    for file in plan.page_inputs(study):
        if "/attacks/" in file:
            write(file, json.dumps(result((0, 0), (160, 3))))


@pytest.mark.parametrize(
    "study, sections",
    [
        ("quick", ["Which method should I use?", "One concept (the paper's Table 1)"]),
        ("curve", ["What holds", "Student, teacher and iterations (Figures 3, 5, 10, 11)"]),
        ("alcohol", ["Does the concept come back?", "What holds", "Gap and drift"]),
        ("artists", ["Artists (Figure 2)"]),
    ],
)
def test_the_page_of_a_study(study, sections, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_results(study)
    page.write_page(page.parse([study, "--cores", "2"]))
    text = (tmp_path / "results" / study / "results.md").read_text(encoding="utf-8")
    text = text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{WORD JOINER}", "")
    assert f"`snakemake --cores 2 {study}`" in text and "75.0 (60–86)" in text
    assert "add up" not in text and "commit" not in text  # no times, and not a checkout
    assert [section for section in sections if f"\n## {section}\n" not in text] == []
    for name in re.findall(r"\]\((\S+)\)", text):
        assert (tmp_path / "results" / study / name).exists(), name
    if study == "quick":
        choice = text.split("## ")[1]
        titles = ["steps until a new word finds it", "found by a new word", "seconds of training"]
        assert [title for title in titles if title not in choice] == []
        assert "| uce | star | 75.0 (60–86) | 75.0 (60–86) | 75.0 (60–86) | 106.7 | 75.0" in choice
        assert "| sdd | star | 0.5 | 0.001 | 0.25 | 2e-05 | 75.0 (60–86) | 75.0 (60–86) |" in text
        assert "Training seeds: 2, pooled." in text
