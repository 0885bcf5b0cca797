"""toy/reproduce.py: verdicts, grids, progress, and the whole of --quick, cut short."""

import re
import sys

import pytest
from test_commands import command

import eval as evaluation
import presets
from support.cli import run_command
from support.errors import UserError
from toy import reproduce


def test_verdict():
    assert reproduce.verdict((0, 200), (100, 200)) == "holds"
    assert reproduce.verdict((100, 200), (0, 200)) == "fails"
    assert reproduce.verdict((10, 200), (14, 200)) == "open"


def test_the_plans_are_trainings_that_exist():
    import train

    for quick in (True, False):
        for section in reproduce.plan(quick):
            for concepts, words in section.rows.values():
                presets.settle(train.parse(["--model", "toy", "--concept", *concepts, *words]))
    for words in reproduce.textures().values():
        presets.settle(train.parse(["--model", "toy", "--concept", "striped", *words]))


def test_the_plans_are_tables_that_exist(tmp_path):
    for quick in (True, False):
        study = reproduce.Study(tmp_path, quick, (2,), 40)
        jobs = reproduce.table_evaluations(study, reproduce.plan(quick))
        jobs += reproduce.matrix_jobs(study)[1]
        for job in jobs:
            words = [*job.words[1:], "--out", job.out]
            evaluation.check_flags(evaluation.parse([str(word) for word in words]))


def test_a_grid_has_one_line_per_claim_and_one_column_per_method():
    sdd, esd = {"named": [1, 100], "caption": [95, 100]}, {"named": [50, 100], "caption": [95, 100]}
    tables = {
        "one": [
            {"model": "original", "figures": {}},
            {"model": "sdd", "figures": sdd},
            {"model": "sdd + preserve", "figures": sdd},
            {"model": "esd-x", "figures": esd},
            {"model": "neg", "figures": {"named": [0, 100], "implied": [1, 100]}},
        ]
    }
    found = reproduce.claims_by_method(tables)
    lines = reproduce.grid(found).splitlines()
    assert lines[0] == "| claim | esd-x | neg |"
    assert lines[2:] == [
        "| SDD leaves less of one concept (Table 1): concept named | holds | open |",
        "| SDD harms the rest less (our question, not the paper's): other captions wrong "
        "| open | – |",
    ]
    assert reproduce.count_verdicts(found).startswith("Of 3 comparisons 1 hold, 2 are open")


def test_captions_are_compared_by_what_is_wrong():
    assert reproduce.figure({"caption": [95, 100]}, "wrong") == (5, 100)
    assert reproduce.figure({"named": [5, 100]}, "named") == (5, 100)
    assert reproduce.figure({}, "named") is None and reproduce.figure({}, "wrong") is None


def jobs(folder, names):
    return [reproduce.Job(name, folder / name, ["x.py"], folder / name) for name in names]


def test_each_finished_job_is_one_line(tmp_path, monkeypatch, capsys):
    """Its number of the total, its name, its seconds and the time left; a done job has no line."""
    monkeypatch.setattr(reproduce, "command", lambda *words: words[-1].touch())
    todo = jobs(tmp_path, "abc")
    todo[1].result.touch()
    progress = reproduce.Progress(len(reproduce.unfinished(todo)))
    reproduce.run_jobs(todo, 1, progress)
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"1 of 2: a, \d+ s; about \d+ s left", first)
    assert re.fullmatch(r"2 of 2: c, \d+ s; about 0 s left", second)


def test_the_first_error_stops_the_jobs_that_wait(tmp_path, monkeypatch):
    started = []

    def fail(*words):
        started.append(words)
        raise UserError("no")

    monkeypatch.setattr(reproduce, "command", fail)
    with pytest.raises(UserError):
        reproduce.run_jobs(jobs(tmp_path, "abcdefgh"), 1, reproduce.Progress(8))
    assert len(started) < 8


def test_a_stopped_training_is_continued(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(reproduce, "command", lambda *words: commands.append(words))
    job = reproduce.training(tmp_path / "one-sdd-2", ["star"], [], 2)
    reproduce.finish(job)
    (tmp_path / "one-sdd-2").mkdir()
    (tmp_path / "one-sdd-2" / "run.json").touch()
    reproduce.finish(job)
    assert "--resume" not in commands[0] and commands[0][-2:] == ("--out", job.out)
    assert commands[1] == ("train.py", "--resume", "--out", job.out)


def test_a_failed_command_is_named(capsys):
    with pytest.raises(UserError, match="Fix the cause") as error:
        reproduce.command("eval.py", "toys")
    assert "python eval.py toys" in str(error.value) and "toy" in error.value.details


@pytest.mark.long
def test_quick_reproduction_cut_short(tmp_path, monkeypatch, capsys):
    """Every step of --quick with short trainings and few images: a page with all its sections."""
    right = reproduce.command
    short = {
        "train.py": ["--steps", "1", "--batch-size", "1"],
        "eval.py": ["--limit", "3", "--steps", "1"],
    }
    monkeypatch.setattr(reproduce, "command", lambda *words: right(*words, *short[words[0]]))
    reproduce.reproduce(tmp_path / "o", quick=True)
    page = tmp_path / "o" / reproduce.PAGE
    text = page.read_text(encoding="utf-8")
    for row in ("sdd", "esd-x", "sega", "sdd teacher@40", "esd-x student@160"):
        assert f"| {row} |" in text
    assert text.count("\n## ") == 4 and "| claim | esd-x | neg |" in text
    assert (tmp_path / "o" / "tables-1-40" / "curve" / "curve.png").exists()
    for name in ("curve", "film_sdd", "film_esd-x"):
        assert (page.parent / f"{name}.png").exists() and f"]({name}.png)" in text
    assert "5 of 5: measure " in capsys.readouterr().out
    monkeypatch.setattr(reproduce, "command", None)  # nothing is left to do
    reproduce.reproduce(tmp_path / "o", quick=True)


def test_matplotlib_is_checked_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(reproduce, "command", None)
    words = ["toy", "--reproduce", "--quick", "--out", str(tmp_path / "o")]
    assert run_command(evaluation.evaluate, evaluation.parse(words)) == 2
    assert "pip install matplotlib" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_table_without_its_plot_is_made_again(tmp_path):
    study = reproduce.Study(tmp_path, True, (2,), 40)
    curve = reproduce.table_evaluations(study, reproduce.plan(True))[-1]
    _, (matrix,) = reproduce.matrix_jobs(study)
    for job, plot in ((curve, "curve.png"), (matrix, "matrix.png")):
        job.out.mkdir(parents=True)
        (job.out / "results.json").touch()
        assert reproduce.unfinished([job])
        (job.out / plot).touch()
        assert not reproduce.unfinished([job])


def test_it_is_a_command():
    assert "--reproduce" in command("eval.py", "--help")[1]
