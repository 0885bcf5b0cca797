"""toy/gallery.py: what its grid asks for, and its command."""

import numpy as np
import pytest
from PIL import Image
from test_commands import command

from toy import emoji, gallery, shapes


@pytest.mark.parametrize("world", [shapes, emoji])
def test_a_row_asks_for_one_word_and_a_column_for_another(world):
    (row_name, rows), (column_name, columns) = world.GALLERY
    assert set(rows) <= set(world.ATTRIBUTES[row_name])
    assert set(columns) <= set(world.ATTRIBUTES[column_name])
    found = gallery.prompts(world)
    assert len(found) == len(rows) and all(len(line) == len(columns) for line in found)
    for row, line in zip(rows, found):
        for column, prompt in zip(columns, line):
            assert {row, column} <= set(prompt.replace(",", "").split())
            assert set(prompt.replace(",", "").split()) <= set(world.WORDS)


def test_the_sheet(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "GALLERY", (("colour", ("red", "blue")), ("shape", ("star",))))
    monkeypatch.setattr(gallery, "STEPS", 2)
    gallery.gallery(gallery.parse(["shapes", str(tmp_path / "g.png")]))
    sheet = np.asarray(Image.open(tmp_path / "g.png"))
    assert sheet.shape[2] == 3 and sheet.std() > 0


def test_a_missing_patch_is_a_sentence(tmp_path):
    words = ["-m", "toy.gallery", "shapes", tmp_path / "g.png", "--patch", tmp_path / "no"]
    status, _, errors = command(*words)
    assert status == 2 and "Traceback" not in errors and str(tmp_path / "no") in errors
    assert not (tmp_path / "g.png").exists()
