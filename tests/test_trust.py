"""When the machine does not cooperate.

Two commands in one folder, signals, a full or read-only disk, no home folder, a clock that jumps, a
hub that fails in the middle of a download. The user gets one sentence and exit status 2 (130
after a signal), and nothing is lost. Also: images that show overfitting.
"""

import errno
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from test_commands import ROOT, command, run

import eval as evaluation
import generate
import train
import weights
from report import previews
from support import cli, files
from support.cli import run_command
from support.errors import UserError
from tools import convert

STAR = (
    "--model toy --concept star --preview star --iters 4 --warmup 2 --steps 1 --batch-size 1 "
    "--save-every 1 --preview-every 2 "
    "--preview-steps 1 --device cpu"
).split()


def last(capsys):
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "o"
    assert run(train, *STAR, "--out", out) == 0
    return out


def same(a, b):
    assert (a / "log.csv").read_bytes() == (b / "log.csv").read_bytes() and (
        a / "film.png"
    ).read_bytes() == (b / "film.png").read_bytes()
    for name in ("erased.safetensors", "checkpoint.safetensors"):
        assert (
            weights.read(a / name)[1] == weights.read(b / name)[1]
        )  # the tensors' digest among it


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
    drawing = ["a star", "--model", "toy", "--steps", 1]
    for module, words in ((train, STAR), (generate, drawing)):
        assert run(module, *words, "--out", out) == 2
        assert "Another command uses" in last(capsys)
    args = evaluation.parse(["toy", "--limit", "1", "--out", str(out)])
    assert run_command(evaluation.evaluate, args) == 2 and "Another command" in last(capsys)
    first.kill()
    first.wait()
    assert (out / files.LOCK).exists()  # left behind, but not locked: the folder is still unused
    assert run(generate, *drawing, "--out", out) == 0
    assert sorted(file.name for file in out.iterdir()) == ["00000.png", "grid.png", "prompts.jsonl"]


def test_a_folder_with_only_a_lock_is_unused(tmp_path):
    (tmp_path / files.LOCK).touch()
    assert files.used_files(tmp_path) == []
    cli.refuse_used(tmp_path)
    (tmp_path / "image.png").touch()
    with pytest.raises(UserError, match="is not empty"):
        cli.refuse_used(tmp_path)


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "o").touch()
    with pytest.raises(UserError, match="is a file"), files.lock_folder(tmp_path / "o"):
        pass


def test_numbered_folders(tmp_path):
    assert files.numbered_folder(tmp_path / "runs", "a b") == tmp_path / "runs" / "0001-a-b"
    for name in ("0003-x", "0012-y", "notes", "99-z"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    long = files.numbered_folder(tmp_path / "runs", "Vincent van Gogh: " * 9).name
    assert long.startswith("0013-Vincent-van-Gogh-Vincent") and len(long) == 45
    for name in ("9999-x", "10000-y", "1234x-z"):
        (tmp_path / "runs" / name).mkdir()
    assert files.numbered_folder(tmp_path / "runs", "a").name == "10001-a"


def test_only_our_own_temporary_folders_are_removed(tmp_path):
    for name in (".writing-novel", ".writing-123"):
        (tmp_path / "deep" / name).mkdir(parents=True)
        (tmp_path / "deep" / name / "chapter").touch()
    with files.lock_folder(tmp_path):
        pass
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [".writing-novel"]


@pytest.mark.skipif(os.name == "nt", reason="permissions of Unix")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_weights_have_the_permissions_of_other_files(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        weights.save(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_two_exports_to_one_place(tmp_path, capsys):
    args = convert.parse(["--model", "toy", "--format", "diffusers", "--out", str(tmp_path / "o")])
    with files.lock_folder(tmp_path / ".o-unfinished"):
        assert run_command(convert.convert, args) == 2 and "Another command" in last(capsys)
    assert run_command(convert.convert, args) == 0 and [
        file.name for file in tmp_path.iterdir()
    ] == ["o"]


def test_temporary_files_are_removed_and_the_users_files_stay(tmp_path):
    (tmp_path / "deep" / f"{files.WRITING}1").mkdir(parents=True)
    (tmp_path / "deep" / f"{files.WRITING}1" / "half.png").touch()
    (tmp_path / "mine.tmp.png").touch()
    with files.lock_folder(tmp_path):
        names = sorted(file.name for file in tmp_path.rglob("*"))
        assert names == [files.LOCK, "deep", "mine.tmp.png"]


def test_temporary_files_of_a_command_in_a_folder_below_stay(tmp_path):
    """`train.py --out runs` must not disturb a training in runs/0001-star."""
    below = tmp_path / "0001-star"
    with files.lock_folder(below):
        (below / "previews" / f"{files.WRITING}1").mkdir(parents=True)
        with files.lock_folder(tmp_path):
            assert (below / "previews" / f"{files.WRITING}1").exists()
    with files.lock_folder(below):  # its own next command removes them
        assert not (below / "previews" / f"{files.WRITING}1").exists()


def test_a_file_system_without_locks_keeps_nothing_out(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    asked = []

    def flock(*words):
        asked.append(words)
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.lock_folder(tmp_path), files.lock_folder(tmp_path):
        (tmp_path / "image").touch()
    assert len(asked) >= 2 and [file.name for file in tmp_path.iterdir()] == ["image"]


# ------------------------------------------------------------------------------------------ signals
@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "name, words, when, status, said, goes_on",
    [
        ("train", STAR, 2, 130, "to continue: python train.py --resume --out", "4 iterations in"),
        (
            "train",
            [*STAR, "--save-every", "0"],
            "previews/000002.png",
            130,
            "stopped: 2 of 4 iterations are saved. To continue: python train.py",
            "2 iterations in",
        ),
        (
            "eval",
            ["toy", "--limit", "1", "--steps", "1"],
            2,
            130,
            "to continue, repeat the command with --out",
            "open this page in a browser",
        ),
        (
            "generate",
            ["a star", "a moon", "--model", "toy", "--steps", "1", "--batch-size", "1"],
            2,
            130,
            "files that are written stay",
            None,
        ),
        (
            "convert",
            ["--model", "toy", "--format", "diffusers"],
            2,
            130,
            "run the same command again",
            "model card",
        ),
    ],
    ids=["train", "train, in an iteration", "eval", "generate", "convert"],
)
def test_a_signal_is_one_sentence(
    name, words, when, status, said, goes_on, number, tmp_path, monkeypatch, capsys
):
    """The signal arrives before the file `when` is written: its name, or 2 for the second file.

    The sentence is the command's own.
    """

    def ends(*words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words, "--out", str(tmp_path / "o")])
        with torch.enable_grad(), pytest.raises(SystemExit) as end:
            if name == "convert":
                runpy.run_module("tools.convert", run_name="__main__")
            else:
                runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        return end.value.code

    written, atomic_write = [], files.atomic_write

    def counted(file):
        written.append(file)
        if len(written) == when or str(file).endswith(str(when)):
            signal.raise_signal(number)
        return atomic_write(file)

    for module in [*sys.modules.values()]:  # each has imported the function by its name
        if getattr(module, "atomic_write", None) is atomic_write:
            monkeypatch.setattr(module, "atomic_write", counted)
    if name == "convert":
        monkeypatch.delitem(sys.modules, "tools.convert")  # run_module imports it again
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert ends(*words) == status and said in last(capsys)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert not list(tmp_path.rglob(".writing*")) and not list(tmp_path.glob(".*"))
    if goes_on:
        assert (
            ends(*(["--resume"] if name == "train" else words)) == 0
            and goes_on in capsys.readouterr().out
        )


# -------------------------------------------------------------------------------------------- disks
def test_full_disk_at_random_writes(whole, tmp_path, monkeypatch, capsys):
    """The run gets further each time. In the end it equals a run without interruption."""
    rng, replace, room = random.Random(0), os.replace, [0]

    def full(*names):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(*names)

    monkeypatch.setattr(os, "replace", full)
    out, statuses, kept = tmp_path / "o", [], []
    while not statuses or statuses[-1]:
        room[0] = rng.randrange(1, 9) if len(statuses) < 6 else 99
        statuses.append(
            run(train, *(["--resume"] if (out / "run.json").exists() else STAR), "--out", out)
        )
        assert statuses[-1] == 0 or statuses[-1] == 2 and "No space left" in last(capsys)
        kept.append((out / "checkpoint.safetensors").exists())
        assert not list(tmp_path.rglob(".writing*"))
    assert len(statuses) > 3 and kept[-3]  # it went on from a checkpoint, and failed again
    same(whole, out)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(os, "geteuid") or os.geteuid() != 0,
    reason="mounts a small disk, as root",
)
def test_a_small_and_a_read_only_disk(whole, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("cannot mount here")
    try:
        assert run(train, *STAR, "--out", disk / "o") == 2
        assert "No space left" in (said := last(capsys)) or "os error 28" in said or "space" in said
        subprocess.run(["mount", "-o", "remount,size=99m", disk], check=True)
        assert run(train, "--resume", "--out", disk / "o") == 0
        same(whole, disk / "o")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for words in (["--resume", "--out", disk / "o"], [*STAR, "--out", disk / "new"]):
            assert run(train, *words) == 2 and "Read-only" in last(capsys)
        assert run(
            generate, "star", "--model", "toy", "--steps", 1, "--out", disk / "p"
        ) == 2 and "Read-only" in last(capsys)
        args = convert.parse(["--model", "toy", "--format", "diffusers", "--out", str(disk / "m")])
        assert run_command(convert.convert, args) == 2 and "Read-only" in last(capsys)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train.csv.DictWriter, "writerow", fail)
    assert run(train, *STAR, "--out", tmp_path / "o") == 2 and "No space left" in last(capsys)


# --------------------------------------------------------------------------------- home, clock, hub
@pytest.mark.skipif(os.name == "nt", reason="homes of Unix")
@pytest.mark.parametrize("home", [None, "/dev/null/home"])  # which not even root can make
def test_without_a_home(home, tmp_path):
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("HOME", "HF_HOME", "XDG_CACHE_HOME")
    } | ({"HOME": home} if home else {})
    status, _, error = command(
        "generate.py", "a star", "--model", "toy", "--steps", 1, "--out", tmp_path / "o", env=env
    )
    assert status == 0, error


def test_a_clock_that_jumps(whole, tmp_path, monkeypatch, capsys):
    rng = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: rng.uniform(-1e9, 1e10))
    assert run(train, *STAR, "--out", tmp_path / "o") == 0
    said = capsys.readouterr().out
    assert 0 <= int(re.search(r"iterations in (-?\d+) s", said)[1]) < 1000
    same(whole, tmp_path / "o")


def test_a_hub_that_goes_away_half_way_leaves_no_model_to_take_for_whole(
    tmp_path, monkeypatch, model_folder
):
    """Some files are there: the sentence is about the network; once all are, they do."""

    def fetched(*_, local_files_only=False, **__):
        if not local_files_only:
            raise ConnectionError("the hub went away")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    monkeypatch.setattr(
        huggingface_hub,
        "HfApi",
        lambda: SimpleNamespace(
            list_repo_files=lambda *_, **__: [
                file.relative_to(model_folder).as_posix()
                for file in model_folder.rglob("*")
                if file.is_file()
            ]
        ),
    )
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="the hub went away.*run the same command again"):
        weights.find("some/model")
    for part in ("unet", "vae", "text_encoder"):
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / f"{weights.NETWORKS[part][1]}.safetensors").touch()
    assert weights.find("some/model") == tmp_path


# -------------------------------------------------------------------------------------- overfitting
def test_flat_images_are_counted_and_warned_of_once(capsys):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (64, 64, 3), np.uint8)
    noise = rng.integers(0, 5, (64, 64, 3), np.uint8)
    red = np.full((64, 64, 3), (200, 3, 3), np.uint8) + noise  # one colour, a little noise
    varied = red.copy()
    varied[..., 2] = image[..., 2]  # in one channel
    assert previews.share_of_flat([image, red, red, varied]) == 0.5
    shown = previews.Previews(run=None)
    shown.before = [image, red]
    shown.warn_if_flat(0.5, 3)
    assert not capsys.readouterr().err  # the original has as many
    shown.warn_if_flat(0.75, 4)
    assert "after 4 iterations 75 %" in capsys.readouterr().err
    shown.warn_if_flat(1.0, 5)
    assert not capsys.readouterr().err
