"""toy/reproduce.py: what it says of intervals, and the whole of it, cut short."""

import sys

import pytest
from test_commands import command

import eval as evaluation
import presets
from support.cli import run_command
from toy import reproduce


def test_verdict():
    assert (
        reproduce.verdict((0, 200), (100, 200)) == "holds"
        and reproduce.verdict((100, 200), (0, 200)) == "fails"
    )
    assert reproduce.verdict((10, 200), (14, 200)) == "open"


def test_the_plans_are_trainings_that_exist():
    import train

    for quick in (True, False):
        for _, _, rows, _, _ in reproduce.plan(quick):
            for concepts, words in rows.values():
                presets.settle(train.parse(["--model", "toy", "--concept", *concepts, *words]))


@pytest.mark.long
def test_quick_reproduction_cut_short(tmp_path, monkeypatch):
    """Every step of --quick with trainings of one sampling step and pictures of one: a page with all its sections."""
    right = reproduce.command
    short = {
        "train.py": ["--steps", "1", "--batch-size", "1"],
        "eval.py": ["--limit", "3", "--steps", "1"],
    }
    monkeypatch.setattr(reproduce, "command", lambda *words: right(*words, *short[words[0]]))
    reproduce.reproduce(tmp_path / "o", quick=True)
    text = (tmp_path / "o" / "REPRODUCTION.md").read_text(encoding="utf-8")
    assert all(
        row in text
        for row in (
            "| sdd |",
            "| esd-x |",
            "| sega |",
            "| sdd teacher@40 |",
            "| esd-x student@160 |",
        )
    )
    assert (
        text.count("\n## ") == 4
        and (tmp_path / "o" / "tables-1-40" / "curve" / "curve.png").exists()
    )
    assert (
        all(
            (tmp_path / "o" / name).exists()
            for name in ("docs/curve.png", "docs/film_sdd.png", "docs/film_esd-x.png")
        )
        and "](docs/curve.png)" in text
    )
    monkeypatch.setattr(reproduce, "command", None)  # nothing is left to be done
    reproduce.reproduce(tmp_path / "o", quick=True)


def test_what_its_end_needs_is_asked_for_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(reproduce, "command", None)
    assert (
        run_command(
            evaluation.evaluate,
            evaluation.parse(["toy", "--reproduce", "--quick", "--out", str(tmp_path / "o")]),
        )
        == 2
    )
    assert "pip install matplotlib" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_table_without_its_plot_is_made_again(tmp_path):
    for name, files in (
        ("one", ["results.json"]),
        ("curve", ["results.json", "curve.png"]),
        ("matrix", ["results.json", "matrix.png"]),
    ):
        for file in files:
            assert not reproduce.measured(tmp_path / name)
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).touch()
        assert reproduce.measured(tmp_path / name)


def test_it_is_a_command():
    assert "--reproduce" in command("eval.py", "--help")[1]
