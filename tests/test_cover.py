"""What is about nudity is shown covered; and several patches side by side, whose sheet is one of the places."""
import sys

import numpy as np
import pytest
from PIL import Image

import cover
import generate
import train
import weights
from common import SD_WORDS, write_model_folder
from metrics import NUDE
from test_commands import SHORT, pictures, run

NOISE = np.random.default_rng(0).integers(0, 255, (64, 48, 3), "uint8")


@pytest.fixture(autouse=True)
def anew():
    cover._detector.cache_clear()
    yield
    cover._detector.cache_clear()


def found(monkeypatch, *boxes):
    import nudenet
    monkeypatch.setattr(nudenet.NudeDetector, "detect", lambda self, picture: [dict(zip(("class", "score", "box"), box)) for box in boxes])


@pytest.mark.parametrize("texts, covered", [(["nudity"], True), (["star", "a NUDE person"], True), (["sexual"], True), (["Van Gogh"], False), ([], False)])
def test_what_is_covered(texts, covered):
    assert (cover.covering(texts) is cover.cover) == covered
    assert cover.covering(texts, uncensored=True)(NOISE) is NOISE


def test_boxes_are_black_and_the_rest_as_it_was(monkeypatch):
    found(monkeypatch, (NUDE[0], 0.3, [10, 20, 8, 16]), (NUDE[1], 0.1, [0, 0, 9, 9]), ("FACE_FEMALE", 0.9, [30, 40, 9, 9]), (NUDE[2], 0.9, [-5, 60, 9, 9]))
    shown, expected = cover.cover(NOISE), NOISE.copy()
    expected[20:36, 10:18] = 0
    expected[60:, 0:4] = 0
    assert np.array_equal(shown, expected) and NOISE[20:36, 10:18].any()


def test_the_real_detector_reads_our_pictures():
    assert np.array_equal(cover.cover(NOISE), NOISE)  # it sees nothing in noise


def test_without_nudenet_all_is_blurred_and_that_is_said_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    shown = [cover.cover(NOISE), cover.cover(NOISE)]
    assert shown[0].std() < NOISE.std() / 4 and capsys.readouterr().err.count("--show-uncensored") == 1


def test_training_previews_of_nudity_are_covered(tmp_path, monkeypatch):
    """Every picture of the run: previews, film, before and after. What is trained does not depend on it."""
    monkeypatch.setitem(sys.modules, "nudenet", None)
    folder = write_model_folder(tmp_path / "sd", words=SD_WORDS)
    words = ["--model", folder, "--concept", "nudity", "--preset", "toy", *SHORT, "--device", "cpu", "--preview", "nudity"]
    assert run(train, *words, "--out", tmp_path / "covered") == 0
    assert run(train, *words, "--show-uncensored", "--out", tmp_path / "shown") == 0
    (a, _), (b, _) = (weights.read(tmp_path / name / "erased.safetensors") for name in ("covered", "shown"))
    assert all((a[name] == b[name]).all() for name in a)
    for file in ("film/000003.png", "film/000006.png"):
        covered, shown = (np.asarray(Image.open(tmp_path / name / file)).astype(float) for name in ("covered", "shown"))
        assert np.abs(np.diff(covered, axis=1)).mean() < np.abs(np.diff(shown, axis=1)).mean() / 3  # smooth


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    out = tmp_path_factory.mktemp("patches")
    for concept in ("star", "moon"):
        assert run(train, "--model", "toy", "--concept", concept, *SHORT[:8], "--lr", "0.01", "--preview-every", 0, "--out", out / concept) == 0
    return [out / concept / "erased.safetensors" for concept in ("star", "moon")]


def test_several_patches_side_by_side(patches, tmp_path, capsys):
    """Each draws as it does alone, and the model is whole again in between."""
    words = ["a star", "a moon", "--model", "toy", "--steps", 3, "--num-images", 2, "--device", "cpu"]
    assert run(generate, *words, "--patch", *patches, "none", "--out", tmp_path / "all") == 0
    for name, patch in zip(("star", "moon", "original"), ([patches[0]], [patches[1]], [])):
        assert run(generate, *words, *(["--patch", *patch] if patch else []), "--out", tmp_path / name) == 0
        assert np.array_equal(pictures(tmp_path / "all" / name), pictures(tmp_path / name))
    assert not np.array_equal(pictures(tmp_path / "star"), pictures(tmp_path / "original"))
    assert Image.open(tmp_path / "all" / "grid.png").width > 3 * Image.open(tmp_path / "star" / "grid.png").width / 2
    lines = (tmp_path / "all" / "prompts.jsonl").read_text().splitlines()
    assert len(lines) == 12 and '"file": "moon/00003.png"' in lines[7]
    assert run(generate, *words, "--patch", patches[0], patches[0], "--out", tmp_path / "twice") == 2
    assert "both be called star" in capsys.readouterr().err and not (tmp_path / "twice").exists()
