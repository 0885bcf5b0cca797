"""`eval.py toy --loss`: its plan, its table, and its sentences. The commands in it are replaced."""

import asyncio
import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

import attack
import eval as evaluation
import presets
import train
from evaluation import own_row
from support.cli import run_command

LOSS = "losses.py:sdd_loss"


def evaluate(words, out):
    """The exit status of `eval.py WORDS --out OUT`."""
    try:
        args = evaluation.parse([*shlex.split(words), "--out", str(out)])
    except SystemExit as e:
        return e.code
    return run_command(evaluation.evaluate, args)


def row(model, **figures):
    return dict(model=model, erased=["star"], method="sdd", paper={}, figures=figures)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Replaces the stored rows, and the commands by files like theirs; the list of the commands."""
    rows = [
        row("original", named=[200, 200], caption=[200, 200]),
        row("good", named=[2, 200], caption=[198, 200]),
        row("bad", named=[150, 200], caption=[100, 200]),
    ]
    for table in ("one", "three"):
        file = tmp_path / f"{table}.json"
        file.write_text(json.dumps({"tables": {table: rows}}), encoding="utf-8")
    monkeypatch.setattr(own_row, "STORED", tmp_path)
    called = []

    async def command(*words):
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


def test_the_row_stands_among_the_stored_rows(commands, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(f"toy --loss {LOSS} --seeds 2 --train-flags '--lr 1e-3'", out) == 0
    text = (out / "table.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    one, three = text.split("## ")[1:]
    rows = [line.split(" | ")[0].strip("| ") for line in one.splitlines() if "|" in line][2:]
    assert rows == ["original", "good", "bad", "sdd_loss"] and "sdd_loss" in three
    assert "concept named: better than bad; worse than good; open against 0" in one
    assert "other captions right: better than bad; worse than none; open against 1" in one
    mine = one.split("| sdd_loss |")[1].splitlines()[0]
    assert "| 80 |" in mine and mine.endswith(" 92 |")  # steps to half of the images; seconds
    kinds = []
    for script, *words in commands:  # they are commands that exist
        match script:
            case "train.py":
                settings = presets.settle(train.parse(words))
                several = "red" in settings["concept"]
                assert settings["lr"] == 1e-3 and settings["iters"] == (300 if several else 160)
            case "attack.py":
                kinds.append(attack.parse(words).kind)
            case "eval.py":
                evaluation.check_flags(evaluation.parse(words))
    assert sorted(kinds) == ["relearn", "relearn", "word", "word"] and len(commands) == 10


def test_a_second_call_repeats_nothing_and_another_comparison_is_refused(
    commands, tmp_path, capsys
):
    assert evaluate(f"toy --loss {LOSS}", tmp_path / "out") == 0
    commands.clear()
    assert evaluate(f"toy --loss {LOSS}", tmp_path / "out") == 0
    assert {words[0] for words in commands} == {"attack.py"}  # which continues, and ends at once
    assert evaluate(f"toy --loss {LOSS} --limit 20", tmp_path / "out") == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself SIGTERM there")
@pytest.mark.parametrize(
    "how, status, said", [("fail", 2, "This command failed"), ("stop", 130, "stopped: ")]
)
def test_a_stop_or_a_failure_ends_the_other_commands(
    how, status, said, tmp_path, monkeypatch, capsys
):
    """SIGTERM reaches only this process, and a command can take minutes."""
    write_id = "import os, time; open(__file__ + '.id', 'w').write(str(os.getpid()))"
    (tmp_path / "sleep.py").write_text(f"{write_id}; time.sleep(100)")
    (tmp_path / "fail.py").write_text("import sys; sys.exit('why')")
    monkeypatch.setattr(own_row, "ROOT", tmp_path)
    file = tmp_path / "sleep.py.id"

    async def both():
        asleep = asyncio.create_task(own_row.command("sleep.py"))
        while not file.exists() or not file.read_text():
            await asyncio.sleep(0.01)
        if how == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.gather(asleep, own_row.command("fail.py"))

    assert run_command(lambda args: asyncio.run(both()), None) == status
    assert said in capsys.readouterr().err
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
