"""`eval.py toy --loss`: its plan, its table, and its sentences. The commands in it are replaced."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import eval as evaluation
from evaluation import own_row
from support.cli import run_command
from support.errors import UserError

LOSS = "losses.py:sdd_loss"


def evaluate(*words):
    try:
        args = evaluation.parse([str(word) for word in words])
    except SystemExit as e:
        return e.code
    return run_command(evaluation.evaluate, args)


def row(model, **figures):
    return dict(model=model, erased=["star"], method="sdd", paper={}, figures=figures)


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Files of stored rows: an original and two methods."""
    rows = [
        row("original", named=[200, 200], caption=[200, 200]),
        row("good", named=[2, 200], caption=[198, 200]),
        row("bad", named=[150, 200], caption=[100, 200]),
    ]
    for table in ("one", "three"):
        file = tmp_path / f"{table}.json"
        file.write_text(json.dumps({"tables": {table: rows}}), encoding="utf-8")
    monkeypatch.setattr(own_row, "STORED", tmp_path)


@pytest.fixture
def commands(monkeypatch):
    """Replaces the commands by files like theirs; the list of what was called."""
    called = []

    def command(*words):
        words = [str(word) for word in words]
        called.append(words)
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        if words[0] == "train.py":
            (out / "erased.safetensors").write_bytes(bytes(2_000_000))
            # It was stopped after 80 iterations, and has the time of the rest.
            timed = {"args": {"iters": 160}, "training": {"iterations": 80, "seconds": 46}}
            (out / "run.json").write_text(json.dumps(timed), encoding="utf-8")
        else:
            found = row("sdd_loss", named=[5, 60], caption=[58, 60])
            points = [dict(step=0, hits=0, n=24), dict(step=160, hits=24, n=24)]
            content = dict(rows=[row("original"), found], points=points, chance=points[:1])
            content["detected"] = True
            (out / "results.json").write_text(json.dumps(content), encoding="utf-8")

    monkeypatch.setattr(own_row, "command", command)
    return called


def test_the_row_stands_among_the_stored_rows(stored, commands, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate("toy", "--loss", LOSS, "--train-flags", "--lr 1e-3", "--out", out) == 0
    text = (out / "table.md").read_text(encoding="utf-8")
    one, three = text.split("## ")[1:]
    assert [line.split(" | ")[0].strip("| ") for line in one.splitlines() if "|" in line][2:] == [
        *("original", "good", "bad", "sdd_loss")
    ]
    assert "concept named: better than bad; worse than good; open against 0" in one
    assert one.split("| sdd_loss |")[1].splitlines()[0].endswith(" 92 |")  # seconds of training
    assert "other captions right: better than bad; worse than none; open against 1" in one
    assert "80" in one  # steps until half of the images, between 0 and 160
    assert "sdd_loss" in three
    assert text in capsys.readouterr().out
    trainings = [words for words in commands if words[0] == "train.py"]
    assert len(trainings) == 2 and all("1e-3" in words for words in trainings)
    assert any("red" in words and "300" in words for words in trainings)
    assert {words[words.index("--kind") + 1] for words in commands if words[0] == "attack.py"} == {
        *("word", "relearn")
    }


def test_the_planned_commands_are_commands_that_exist(stored, commands, tmp_path):
    import attack
    import presets
    import train

    out = tmp_path / "out"
    assert evaluate("toy", "--loss", LOSS, "--seeds", 2, "--out", out) == 0
    assert sum(words[0] == "train.py" for words in commands) == 4
    for words in commands:
        match words[0]:
            case "train.py":
                presets.settle(train.parse(words[1:]))
            case "attack.py":
                attack.parse(words[1:])
            case "eval.py":
                evaluation.check_flags(evaluation.parse(words[1:]))


def test_the_numbers_are_those_of_the_stored_rows():
    """evaluation/ may not import workflow/, so some numbers stand in both."""
    from workflow import plan

    assert own_row.SEEDS == plan.SEEDS
    assert own_row.CONCEPTS == {"one": ["star"], "three": [*plan.THREE]}
    assert own_row.SAMPLING[:2] == ["--steps", plan.STEPS]
    assert own_row.PREVIEWS == ["--preview-every", plan.EVERY, "--preview-steps", plan.STEPS]
    word = [step for step in plan.WORD_STEPS if step <= plan.LAST_STEP]
    steps = {kind: [int(step) for step in flags[1:]] for kind, flags in own_row.ATTACKS.items()}
    assert steps == {"word": word, "relearn": [*plan.RELEARN_STEPS]}
    row = plan.find_row("three", "sdd")
    assert row.words == own_row.LONGER["three"]


def test_the_previews_are_those_of_the_stored_rows(stored, commands, tmp_path):
    """Previews take time, and the tables compare the seconds of training."""
    from workflow import plan

    assert evaluate("toy", "--loss", LOSS, "--out", tmp_path / "out") == 0
    mine = next(words for words in commands if words[0] == "train.py" and "red" in words)
    theirs = plan.training("three", "sdd", 2)
    for flag in ("--preview", "--preview-every", "--preview-steps", "--seed", "--iters"):
        assert mine[mine.index(flag) + 1] == theirs[theirs.index(flag) + 1]
        assert mine[mine.index(flag) + 2].startswith("--")  # one value


def test_a_second_call_trains_and_measures_nothing_again(stored, commands, tmp_path):
    out = tmp_path / "out"
    assert evaluate("toy", "--loss", LOSS, "--out", out) == 0
    commands.clear()
    assert evaluate("toy", "--loss", LOSS, "--out", out) == 0
    assert {words[0] for words in commands} == {"attack.py"}  # which continues, and ends at once


def test_a_folder_of_another_comparison_is_refused(stored, commands, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate("toy", "--loss", LOSS, "--out", out) == 0
    assert evaluate("toy", "--loss", LOSS, "--limit", 20, "--out", out) == 2
    assert "holds another comparison" in capsys.readouterr().err


def test_a_stop_ends_the_commands(tmp_path, monkeypatch):
    """SIGTERM reaches only this process, and a command can take minutes."""
    (tmp_path / "sleep.py").write_text("import time\ntime.sleep(100)\n")
    monkeypatch.setattr(own_row, "ROOT", tmp_path)
    monkeypatch.setattr(own_row, "stopped", threading.Event())
    with ThreadPoolExecutor(1) as pool:
        asleep = pool.submit(own_row.command, "sleep.py")
        while not own_row.running and not asleep.done():
            time.sleep(0.01)
        own_row.stop_commands()
        with pytest.raises(UserError, match="This command failed"):
            asleep.result(timeout=50)
    assert not own_row.running
    with pytest.raises(UserError, match="was stopped"):
        own_row.command("sleep.py")


@pytest.mark.parametrize(
    "words, said",
    [
        (["toy", "--seeds", "2"], "have no effect without --loss"),
        (["toy", "--loss", LOSS, "--seeds", "4"], "--seeds 4 is out of range (1 to 3)"),
        (["toy", "--loss", LOSS, "--patch", "a=b"], "--patch has no effect with --loss"),
        (["toy", "--loss", LOSS, "--guidance", "neg"], "--guidance has no effect with --loss"),
        (["toy", "--loss", LOSS, "--model", "emoji"], "--model has no effect with --loss"),
        (["toy", "--loss", LOSS, "--guidance-scale", "3"], "--guidance-scale has no effect"),
        (["toy", "--loss", LOSS, "--show-uncensored"], "--show-uncensored has no effect"),
        (["nudity", "--loss", LOSS], "--loss has no effect in the suite nudity"),
        (["toy", "--loss", LOSS, "--train-flags", "--anchor 'a"], "cannot be read"),
        (["toy", "--loss", LOSS, "--train-flags=--lr 1 --seed=9"], "has --seed"),
        (["toy", "--loss", "losses.py:nothing"], "does not name a function"),
        (["toy", "--loss", "losses.py:noise_ablation_loss"], "asks for 'n'"),
    ],
)
def test_bad_arguments(words, said, stored, tmp_path, capsys):
    assert evaluate(*words, "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.json"))
