"""Mistakes in a loss of the user's own: one sentence each."""

import pytest
from common import SHORT, differences, run, stopped

from support.own_loss import call_loss

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
    "a vector": (RESULT, f"{RESULT[:-1]}, reduction='none')", "a Tensor of shape (2, 4, 8, 8)"),
    "a float": (RESULT, f"{RESULT}.item()", "returns a float"),
    "nothing": (f"return {RESULT}", RESULT, "returns a NoneType"),
    "a detached result": (RESULT, f"{RESULT}.detach()", "has no gradient"),
    "an unknown argument": ("c_0, **_", "c_0, c_x, **_", "argument: 'c_x'"),
    "the noise, which SDD does not have": ("c_0, **_", "c_0, n, **_", "argument: 'n'"),
    "no **_": (", **_", "", "must end with **_"),
    "an exception": ("    with torch", "    1 / 0\n    with torch", "ZeroDivisionError"),
    "a file with an error": ("import torch\n", "import torhc\n", "cannot be imported"),
}
STAR = f"{SHORT} --concept star --preview-every 0"


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found_before_the_run(name, tmp_path, capsys):
    before, after, said = MISTAKES[name]
    assert before in GOOD
    file, out = tmp_path / "my_loss.py", tmp_path / "run"
    file.write_text(GOOD.replace(before, after, 1))
    assert run(f"{STAR} --loss {file}:loss", out) == 2
    error = capsys.readouterr().err
    first = next(line for line in error.splitlines() if line.startswith("error: "))
    assert said in first and f"{file}:loss" in first
    assert not out.exists()
    if name == "an exception":  # a traceback of the user's own code helps
        assert "Traceback" in error and "my_loss.py" in error


def test_an_exception_in_the_run(tmp_path, capsys):
    """A loss that fails only with the run's real shapes. The folder stays."""
    file, out = tmp_path / "my_loss.py", tmp_path / "run"
    file.write_text(GOOD.replace("    with torch", "    assert z_t.shape[-1] == 8\n    with torch"))
    assert run(f"{STAR} --loss {file}:loss", out) == 2
    error = capsys.readouterr().err
    assert "AssertionError" in error and "my_loss.py" in error and (out / "own_loss.py").exists()
    assert run(f"{STAR} --loss {file}:loss", out) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_full_memory_is_not_a_mistake_of_the_loss():
    def full(**_):
        raise MemoryError

    with pytest.raises(MemoryError):
        call_loss(full, "my.py:full")


def test_a_run_keeps_its_own_copy(tmp_path, capsys):
    """--resume uses the copy in the folder: the user's file may change or disappear."""
    file, out, whole = tmp_path / "my_loss.py", tmp_path / "run", tmp_path / "whole"
    file.write_text(GOOD)
    assert run(f"{STAR} --loss {file}:loss", whole) == 0
    with stopped("Ctrl-C", "ema.update", 3):
        assert run(f"{STAR} --loss {file}:loss", out) == 130
    file.unlink()
    assert run("train.py --resume", out) == 0
    assert differences(out, whole) == []
    capsys.readouterr()
    (out / "own_loss.py").write_text(GOOD + "\n")
    assert run("train.py --resume", out) == 2
    assert "own_loss.py has changed" in capsys.readouterr().err
