"""When the machine does not cooperate.

Two commands in one folder, signals, a full disk. The user gets one sentence and exit status 2 (130
after a signal), and nothing is lost. How trainings continue: test_resume.py. A hub that cannot be
reached: test_weights.py. Also: images that show overfitting.
"""

import os
import runpy
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import ROOT, run, stopped

from report import previews
from support import files

DRAW = "generate.py 'a star' 'a moon' --model toy --steps 1 --batch-size 1"
TABLE = "eval.py toy --limit 1 --steps 1"
STAR = "train.py --model toy --concept star --iters 1 --warmup 0 --steps 1 --preview-every 0"


def last(capsys):
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


# -------------------------------------------------------------------------------------- two at once
HOLD = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from support import cli, files
with files.lock_folder(pathlib.Path(sys.argv[2])):
    print(1, flush=True)
    time.sleep(99)
"""


def test_one_folder_is_used_by_one_command_at_a_time(tmp_path, capsys):
    """The second command is refused. After kill -9 of the first one, the folder is free again."""
    out = tmp_path / "o"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(ROOT), str(out)], stdout=subprocess.PIPE
    )
    first.stdout.readline()
    for line in (STAR, DRAW, TABLE):
        assert run(line, out) == 2
        assert "Another command uses" in last(capsys)
    first.kill()
    first.wait()
    assert (out / files.LOCK).exists()  # left behind, but not locked: the folder is still unused
    assert run(DRAW, out) == 0
    assert (out / "grid.png").exists() and not (out / files.LOCK).exists()


def test_two_exports_to_one_place(tmp_path, capsys):
    line = "tools.convert --model toy --format diffusers"
    with files.lock_folder(tmp_path / ".o-unfinished"):
        assert run(line, tmp_path / "o") == 2 and "Another command" in last(capsys)
    assert run(line, tmp_path / "o") == 0
    assert [file.name for file in tmp_path.iterdir()] == ["o"]


def test_numbered_folders(tmp_path):
    assert files.numbered_folder(tmp_path, "a b") == tmp_path / "0001-a-b"
    for name in ("0003-x", "9999-y", "10000-z", "notes", "99-z", "20261130-a"):
        (tmp_path / name).mkdir()
    long = files.numbered_folder(tmp_path, "Vincent van Gogh: " * 9).name
    assert long.startswith("10001-Vincent-van-Gogh-Vincent") and len(long) == 46


def test_temporary_files_of_a_killed_command_are_removed(tmp_path):
    """`train.py --out runs` must not disturb a training in runs/0001-star."""
    for name in (".writing-novel", f"{files.WRITING}123"):
        (tmp_path / "runs" / "0001-star" / "previews" / name).mkdir(parents=True)
        (tmp_path / "runs" / "0001-star" / "previews" / name / "chapter").touch()
    (tmp_path / "runs" / "0001-star" / files.LOCK).touch()  # as a command has it, or a killed one
    with files.lock_folder(tmp_path / "runs"):
        pass
    assert len(list(tmp_path.rglob("chapter"))) == 2
    with files.lock_folder(tmp_path / "runs" / "0001-star"):
        pass
    names = sorted(file.name for file in tmp_path.rglob("*"))
    assert names == [".writing-novel", "0001-star", "chapter", "previews", "runs"]


# ------------------------------------------------------------------------------------------ signals
@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize(
    "line, said, goes_on",
    [
        (STAR, "to continue: python train.py --resume --out", "1 iterations in"),
        (TABLE, "to continue, repeat the command with --out", "open this page in a browser"),
        (DRAW, "files that are written stay", None),
        (
            "tools.convert --model toy --format diffusers",
            "stopped: nothing has been written.",
            "model card",
        ),
    ],
)
def test_a_signal_is_one_sentence(line, said, goes_on, how, tmp_path, monkeypatch, capsys):
    """The signal arrives when the second file gets its name. The sentence is the command's own."""

    def ends(line):
        script, *words = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [script, *words, "--out", str(tmp_path / "o")])
        with torch.enable_grad(), pytest.raises(SystemExit) as end:
            if script == "tools.convert":
                monkeypatch.delitem(sys.modules, script, raising=False)  # it is imported again
                runpy.run_module(script, run_name="__main__")
            else:
                runpy.run_path(str(ROOT / script), run_name="__main__")
        return end.value.code

    with stopped(how, "os.replace", 2):
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        assert ends(line) == 130 and said in last(capsys)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert not list(tmp_path.rglob(".writing*")) and not list(tmp_path.glob(".*"))
    if goes_on:
        assert ends("train.py --resume" if line == STAR else line) == 0
        assert goes_on in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- disk
@pytest.mark.parametrize("line", [DRAW, TABLE, "tools.convert --model toy --format diffusers"])
def test_a_full_disk_is_one_sentence(line, tmp_path, capsys):
    with stopped("full disk", "os.replace", 2):
        assert run(line, tmp_path / "o") == 2
    assert "No space left" in last(capsys)
    assert not list(tmp_path.rglob(".writing*"))


# -------------------------------------------------------------------------------------- overfitting
def test_flat_images_are_counted_and_warned_of_once(capsys):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (64, 64, 3), np.uint8)
    noise = rng.integers(0, 5, (64, 64, 3), np.uint8)
    red = np.full((64, 64, 3), (200, 3, 3), np.uint8) + noise  # one colour, a little noise
    varied = red.copy()
    varied[..., 2] = image[..., 2]  # in one channel
    assert previews.share_of_flat([image, red, red, varied]) == 0.5
    shown = previews.Previews(None, None, [None] * 3, None, None, None)
    shown.before = [image, red]
    shown.warn_if_flat(0.5, 3)
    assert not capsys.readouterr().err  # the original has as many
    shown.warn_if_flat(0.75, 4)
    assert "after 4 iterations 75 %" in capsys.readouterr().err
    shown.warn_if_flat(1.0, 5)
    assert not capsys.readouterr().err
