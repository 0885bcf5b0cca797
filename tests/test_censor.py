"""What is about nudity is covered; several patches side by side in one sheet."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from common import SD_WORDS, write_model_folder
from PIL import Image
from test_commands import SHORT, pictures, run

import generate
import train
import weights
from support import nudity

NOISE = np.random.default_rng(0).integers(0, 255, (64, 48, 3), "uint8")


@pytest.fixture(autouse=True)
def without_detector():
    nudity.detector.cache_clear()
    yield
    nudity.detector.cache_clear()


def found(monkeypatch, *boxes):
    import nudenet

    asked = []
    monkeypatch.setattr(
        nudenet.NudeDetector,
        "detect",
        lambda self, picture: (
            asked.append(picture) or [dict(zip(("class", "score", "box"), box)) for box in boxes]
        ),
    )
    return asked


@pytest.mark.parametrize(
    "texts, covered",
    [
        (["nudity"], True),
        (["star", "a NUDE person"], True),
        (["sexual"], True),
        (["Van Gogh"], False),
        ([], False),
    ],
)
def test_what_is_covered(texts, covered):
    assert (nudity.censoring(texts) is nudity.censor) == covered
    assert nudity.censoring(texts, uncensored=True)(NOISE) is NOISE


def test_boxes_are_black_and_the_rest_is_unchanged(monkeypatch):
    asked = found(
        monkeypatch,
        (nudity.NUDE[0], 0.3, [10, 20, 8, 16]),
        (nudity.NUDE[1], 0.1, [0, 0, 9, 9]),
        ("FACE_FEMALE", 0.9, [30, 40, 9, 9]),
        (nudity.NUDE[2], 0.9, [-5, 60, 9, 9]),
    )
    shown, expected = nudity.censor(NOISE), NOISE.copy()
    expected[20:36, 10:18] = 0
    expected[60:, 0:4] = 0
    assert np.array_equal(shown, expected) and NOISE[20:36, 10:18].any()
    assert np.array_equal(asked[0], NOISE[..., ::-1])  # NudeNet reads blue first


def test_the_real_detector_reads_our_images(monkeypatch):
    assert np.array_equal(nudity.censor(NOISE), NOISE)  # it sees nothing in noise
    output, expected = (
        np.zeros((1, 4 + 18, 2), "float32"),
        NOISE.copy(),
    )  # a network that sees one, in its 320 x 320 pixels
    output[0, :4, 0], output[0, 4 + 3, 0] = (100, 160, 50, 80), 0.9  # middle and size
    monkeypatch.setattr(nudity.detector(), "onnx_session", SimpleNamespace(run=lambda *_: [output]))
    expected[24:40, 15:25] = 0
    assert np.array_equal(nudity.censor(NOISE), expected)


def test_without_nudenet_images_are_blurred_with_one_warning(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    shown = [nudity.censor(NOISE), nudity.censor(NOISE)]
    assert (
        shown[0].std() < NOISE.std() / 4 and capsys.readouterr().err.count("--show-uncensored") == 1
    )
    large = NOISE.repeat(8, 0).repeat(8, 1)  # as coarse: nothing can be made out at any size
    assert nudity.censor(large).std() < large.std() / 4


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("model") / "sd", words=SD_WORDS)


def cells(sheet, columns):
    """The images of a sheet of images.grid: the rightmost columns, 32 pixels, enlarged to 128."""
    sheet = np.asarray(Image.open(sheet))
    height, width = sheet.shape[:2]
    left, top = width - 132 * columns, 4 + (height - 4) % 132
    return [
        sheet[y : y + 128 : 4, x : x + 128 : 4]
        for y in range(top, height, 132)
        for x in range(left, width, 132)
    ]


@pytest.mark.parametrize(
    "concept, prompts", [("nudity", ["a woman", "blood"]), ("blood", ["a woman", "nudity"])]
)
def test_training_previews_of_nudity_are_covered(concept, prompts, sd, tmp_path, monkeypatch):
    """All images of a run: previews, film, before and after. Training does not depend on it."""
    monkeypatch.setitem(sys.modules, "nudenet", None)
    words = [
        "--model",
        sd,
        "--concept",
        concept,
        "--preset",
        "toy",
        *SHORT,
        "--device",
        "cpu",
        "--preview",
        *prompts,
    ]
    assert run(train, *words, "--out", tmp_path / "covered") == 0
    assert run(train, *words, "--show-uncensored", "--out", tmp_path / "shown") == 0
    (a, _), (b, _) = (
        weights.read(tmp_path / name / "erased.safetensors") for name in ("covered", "shown")
    )
    assert all((a[name] == b[name]).all() for name in a)
    files = [f"{i:06d}/{model}-1.png" for i in (0, 3, 6) for model in ("student", "teacher")]
    for file in ("original-0.png", *files):
        covered, shown = (
            np.asarray(Image.open(tmp_path / name / "previews" / file))
            for name in ("covered", "shown")
        )
        assert np.array_equal(covered, nudity.censor(shown))
    for file, columns, n in (
        ("film.png", 3, 6),
        ("before_after.png", 2, 4),
        *((f"previews/{i:06d}.png", 3, 6) for i in (0, 3, 6)),
    ):
        covered, shown = (cells(tmp_path / name / file, columns) for name in ("covered", "shown"))
        assert len(shown) == n and all(
            np.array_equal(a, nudity.censor(b)) for a, b in zip(covered, shown, strict=True)
        ), file
        assert not any(np.array_equal(a, b) for a, b in zip(covered, shown))


def test_the_sheet_of_generate_is_covered_and_its_files_are_not(sd, tmp_path, monkeypatch):
    """For what a prompt, --avoid or a patch is about."""
    monkeypatch.setitem(sys.modules, "nudenet", None)
    name, x = next(
        (name, x) for name, x in weights.load(sd).unet.named_parameters() if ".attn2." in name
    )
    weights.save(
        tmp_path / "patch.safetensors",
        {name: x},
        {"concepts": "nudity", "base_fingerprint": weights.fingerprint({name: x})},
    )
    for i, (words, covered) in enumerate(
        [
            (["blood", "nudity"], True),
            (["blood", "hate", "--method", "neg", "--avoid", "nudity"], True),
            (["blood", "hate"], False),
            (["blood", "hate", "--patch", tmp_path / "patch.safetensors"], True),
            (["blood", "nudity", "--show-uncensored"], False),
        ]
    ):
        assert (
            run(
                generate,
                *words,
                "--model",
                sd,
                "--steps",
                1,
                "--device",
                "cpu",
                "--out",
                tmp_path / str(i),
            )
            == 0
        )
        drawn = pictures(tmp_path / str(i)).astype("uint8")
        assert np.array_equal(
            cells(tmp_path / str(i) / "grid.png", 1),
            [nudity.censor(x) if covered else x for x in drawn],
        ), words


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    out = tmp_path_factory.mktemp("patches")
    for concept in ("star", "moon"):
        assert (
            run(
                train,
                "--model",
                "toy",
                "--concept",
                concept,
                *SHORT[:8],
                "--lr",
                "0.01",
                "--preview-every",
                0,
                "--out",
                out / concept,
            )
            == 0
        )
    return [out / concept / "erased.safetensors" for concept in ("star", "moon")]


def test_several_patches_side_by_side(patches, tmp_path, capsys):
    """Each draws as it does alone, and the model is whole again in between."""
    words = [
        "a star",
        "a moon",
        "--model",
        "toy",
        "--steps",
        3,
        "--num-images",
        2,
        "--device",
        "cpu",
    ]
    assert run(generate, *words, "--patch", *patches, "none", "--out", tmp_path / "all") == 0
    for name, patch in zip(("star", "moon", "original"), ([patches[0]], [patches[1]], [])):
        assert (
            run(generate, *words, *(["--patch", *patch] if patch else []), "--out", tmp_path / name)
            == 0
        )
        assert np.array_equal(pictures(tmp_path / "all" / name), pictures(tmp_path / name))
    assert not np.array_equal(pictures(tmp_path / "star"), pictures(tmp_path / "original"))
    assert (
        Image.open(tmp_path / "all" / "grid.png").width
        > 3 * Image.open(tmp_path / "star" / "grid.png").width / 2
    )
    lines = (tmp_path / "all" / "prompts.jsonl").read_text().splitlines()
    assert len(lines) == 12 and '"file": "moon/00003.png"' in lines[7]
    assert (
        run(generate, *words, "--patch", patches[0], patches[0], "--out", tmp_path / "twice") == 2
    )
    assert "both be called star" in capsys.readouterr().err and not (tmp_path / "twice").exists()
