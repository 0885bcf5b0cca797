"""Mistakes in a loss of the user's own: one sentence each, and the corrected command runs."""

import pytest
import torch
from test_commands import SHORT, run

import train
import weights

GOOD = """
import torch
import torch.nn.functional as F


def loss(e, z_t, t, c_s, c_0, **_):
    with torch.no_grad():
        target = e(z_t, t, c_0)
    return F.l1_loss(e(z_t, t, c_s), target)
"""
RESULT = "F.l1_loss(e(z_t, t, c_s), target)"
MISTAKES = {  # name: (text in GOOD, what replaces it, what the sentence says)
    "a vector": (RESULT, f"{RESULT[:-1]}, reduction='none')", "a tensor of shape (2, 4, 8, 8)"),
    "a float": (RESULT, f"{RESULT}.item()", "returns a float"),
    "nothing": (f"return {RESULT}", RESULT, "returns a NoneType"),
    "a detached result": (RESULT, f"{RESULT}.detach()", "has no gradient"),
    "an unknown argument": ("c_0, **_", "c_0, c_x, **_", "asks for 'c_x'"),
    "the noise, which SDD does not have": ("c_0, **_", "c_0, n, **_", "asks for 'n'"),
    "no **_": (", **_", "", "must end with **_"),
    "an exception": ("    with torch", "    1 / 0\n    with torch", "ZeroDivisionError"),
    "a file with an error": ("import torch\n", "import torhc\n", "cannot be imported"),
}
STAR = ["--model", "toy", "--concept", "star", *SHORT, "--preview-every", "0", "--device", "cpu"]


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found_before_the_run(name, tmp_path, capsys):
    before, after, said = MISTAKES[name]
    assert before in GOOD
    file, out = tmp_path / "my_loss.py", tmp_path / "run"
    file.write_text(GOOD.replace(before, after, 1))
    assert run(train, *STAR, "--loss", f"{file}:loss", "--out", out) == 2
    error = capsys.readouterr().err
    first = next(line for line in error.splitlines() if line.startswith("error: "))
    assert said in first and f"{file}:loss" in first
    assert not out.exists()
    if name == "an exception":  # a traceback of the user's own code helps
        assert "Traceback" in error and "my_loss.py" in error


def test_an_exception_in_the_run_leaves_a_free_folder(tmp_path, capsys):
    """A loss that fails only with the run's real shapes: the corrected command runs as it is."""
    file, out = tmp_path / "my_loss.py", tmp_path / "run"
    command = [*STAR, "--loss", f"{file}:loss", "--out", out]
    file.write_text(GOOD.replace("    with torch", "    assert z_t.shape[-1] == 8\n    with torch"))
    assert run(train, *command) == 2
    assert "AssertionError" in capsys.readouterr().err and not out.exists()
    file.write_text(GOOD)
    assert run(train, *command) == 0


def test_a_run_keeps_its_own_copy(tmp_path, capsys):
    """--resume uses the copy in the folder: the user's file may change or disappear."""
    file, out, whole = tmp_path / "my_loss.py", tmp_path / "run", tmp_path / "whole"
    file.write_text(GOOD)
    assert run(train, *STAR, "--loss", f"{file}:loss", "--out", whole) == 0
    interrupted = GOOD.replace("    with torch", "    fail_once(z_t)\n    with torch") + FAIL_ONCE
    file.write_text(interrupted)
    assert run(train, *STAR, "--loss", f"{file}:loss", "--out", out) == 130
    file.unlink()
    assert run(train, "--resume", "--out", out) == 0
    a, b = (weights.read(folder / "erased.safetensors")[0] for folder in (out, whole))
    assert all(torch.equal(a[name], b[name]) for name in b)
    capsys.readouterr()
    (out / train.OWN_LOSS).write_text(GOOD)
    assert run(train, "--resume", "--out", out) == 2
    assert "own_loss.py has changed" in capsys.readouterr().err


FAIL_ONCE = """

calls = []


def fail_once(z_t):
    \"\"\"Ctrl-C in the third iteration of the first process.\"\"\"
    import os
    import signal
    from pathlib import Path

    calls.append(1)
    mark = Path(__file__).with_name("interrupted")
    if len(calls) == 3 and not mark.exists() and z_t.shape[-1] > 8:
        mark.touch()
        os.kill(os.getpid(), signal.SIGINT)
"""


def test_flags_next_to_resume_are_rejected(tmp_path, capsys):
    out = tmp_path / "run"
    assert run(train, *STAR, "--out", out) == 0
    capsys.readouterr()
    assert run(train, "--resume", "--iters", 300, "--out", out) == 2
    assert "--iters has no effect" in capsys.readouterr().err
    assert run(train, "--resume", "--method", "sdd", "--seed", 0, "--out", out) == 2
    assert "--method, --seed has no effect" in capsys.readouterr().err


def test_a_preset_skips_preview_prompts_that_the_model_does_not_know(tmp_path, capsys):
    words = "--model toy --concept star --preset paper --iters 1 --warmup 0 --steps 2".split()
    more = "--preview-every 1 --preview-steps 1 --device cpu".split()
    assert run(train, *words, *more, "--out", tmp_path / "run") == 0
    assert "'a photo of a mountain lake' is skipped" in capsys.readouterr().err


def test_training_the_anchors_own_word_is_a_warning(tmp_path, capsys):
    words = "--model toy --method ablate --train-params embedding --anchor star".split()
    words += ["--concept", "red star", *SHORT, "--preview-every", "0", "--anchor-images", "2"]
    assert run(train, *words, "--device", "cpu", "--out", tmp_path / "run") == 0
    assert "the anchor's own word 'star'" in capsys.readouterr().err
