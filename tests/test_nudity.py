"""What is about nudity is counted and covered; several patches side by side in one sheet."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from common import SD_WORDS, SHORT, pictures, run, write_model_folder
from PIL import Image

import weights
from evaluation import attacks, metrics
from support import nudity
from support.errors import UserError
from support.nudity import NUDE
from toy import shapes, suite

NOISE = np.random.default_rng(0).integers(0, 255, (64, 48, 3), "uint8")


@pytest.fixture(autouse=True)
def fresh():
    """Each test makes its own detector."""
    nudity.detector.cache_clear(), nudity.installed.cache_clear()
    yield
    nudity.detector.cache_clear(), nudity.installed.cache_clear()


def detected(monkeypatch, *boxes):
    """NudeNet finds these (class, score, box) in every image. Returns the images that it gets."""
    import nudenet

    asked, found = [], [dict(zip(("class", "score", "box"), box)) for box in boxes]
    detect = lambda self, image: asked.append(image) or found  # noqa: E731
    monkeypatch.setattr(nudenet.NudeDetector, "detect", detect)
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
    asked = detected(
        monkeypatch,
        (NUDE[0], 0.3, [10, 20, 8, 16]),
        (NUDE[1], 0.1, [0, 0, 9, 9]),
        ("FACE_FEMALE", 0.9, [30, 40, 9, 9]),
        (NUDE[2], 0.9, [-5, 60, 9, 9]),
    )
    expected = NOISE.copy()
    expected[20:36, 10:18] = 0
    expected[60:, 0:4] = 0
    assert np.array_equal(nudity.censor(NOISE), expected) and NOISE[20:36, 10:18].any()
    assert np.array_equal(asked[0], NOISE[..., ::-1])  # NudeNet reads blue first


@pytest.mark.parametrize(
    "name, score, hits",
    [
        ("FEMALE_BREAST_EXPOSED", 0.8, 1),
        ("FEMALE_BREAST_COVERED", 0.9, 0),
        ("ANUS_EXPOSED", 0.7, 0),
    ],
)
def test_an_image_with_a_clear_box_is_counted(name, score, hits, monkeypatch, tmp_path):
    import nudenet

    assert set(NUDE) <= set(nudenet.nudenet.__dict__["__labels"])
    detected(monkeypatch, (name, score, [0, 0, 9, 9]))
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    assert metrics.nude([tmp_path / "a.png"] * 2) == (2 * hits, 2)
    assert attacks.make_detector("some/model", "Nudity")([NOISE]) == [bool(hits)]


def test_the_real_detector_reads_our_images(monkeypatch):
    assert np.array_equal(nudity.censor(NOISE), NOISE)  # it sees nothing in noise
    output, expected = np.zeros((1, 4 + 18, 2), "float32"), NOISE.copy()
    # A network that sees one, in its 320 x 320 pixels: middle and size
    output[0, :4, 0], output[0, 4 + 3, 0] = (100, 160, 50, 80), 0.9
    session = SimpleNamespace(run=lambda *_: [output])
    monkeypatch.setattr(nudity.detector(), "onnx_session", session)
    expected[24:40, 15:25] = 0
    assert np.array_equal(nudity.censor(NOISE), expected)


def test_without_nudenet_images_are_blurred_and_not_counted(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    shown = [nudity.censor(NOISE), nudity.censor(NOISE)]
    assert shown[0].std() < NOISE.std() / 4
    assert capsys.readouterr().err.count("--show-uncensored") == 1  # one warning
    large = NOISE.repeat(8, 0).repeat(8, 1)  # as coarse: nothing can be made out at any size
    assert nudity.censor(large).std() < large.std() / 4
    assert attacks.make_detector("some/model", "Nudity") is None
    assert "requirements-extra.txt" in capsys.readouterr().err


def test_detectors_of_other_concepts():
    detect = attacks.make_detector("toy", "star")
    images = list(suite.drawings(shapes, [{"shape": "star"}, {"shape": "circle"}]))
    assert detect(images) == [True, False]
    with pytest.raises(UserError, match="does not see 'weapons'"):
        attacks.make_detector("toy", "weapons")
    assert attacks.make_detector("some/model", "weapons") is None


# ---------------------------------------------------------------------------------- in commands
@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return write_model_folder(tmp_path_factory.mktemp("model") / "sd", words=SD_WORDS)


def cells(sheet, columns):
    """The images of a sheet of images.grid: the rightmost columns, 32 pixels, enlarged to 128."""
    sheet = np.asarray(Image.open(sheet))
    height, width = sheet.shape[:2]
    found = []
    for y in range(4 + (height - 4) % 132, height, 132):
        for x in range(width - 132 * columns, width, 132):
            found.append(sheet[y : y + 128 : 4, x : x + 128 : 4])
    return found


@pytest.mark.parametrize(
    "concept, prompts", [("nudity", "'a woman' blood"), ("blood", "'a woman' nudity")]
)
def test_training_previews_of_nudity_are_covered(concept, prompts, sd, tmp_path, monkeypatch):
    """All images of a run: previews, film, before and after. Training does not depend on it."""
    monkeypatch.setitem(sys.modules, "nudenet", None)
    line = f"{SHORT} --model {sd} --concept {concept} --preset toy --preview {prompts}"
    assert run(line, tmp_path / "covered") == 0
    assert run(f"{line} --show-uncensored", tmp_path / "shown") == 0
    both = [tmp_path / name for name in ("covered", "shown")]
    a, b = (weights.read(folder / "erased.safetensors")[0] for folder in both)
    assert all((a[name] == b[name]).all() for name in a)
    files = [f"{i:06d}/{model}-1.png" for i in (0, 3, 6) for model in ("student", "teacher")]
    for file in ("original-0.png", *files):
        covered, shown = (np.asarray(Image.open(folder / "previews" / file)) for folder in both)
        assert np.array_equal(covered, nudity.censor(shown))
    sheets = [("film.png", 3, 6), ("before_after.png", 2, 4)]
    sheets += [(f"previews/{i:06d}.png", 3, 6) for i in (0, 3, 6)]
    for file, columns, n in sheets:
        covered, shown = (cells(folder / file, columns) for folder in both)
        assert len(covered) == len(shown) == n, file
        for a, b in zip(covered, shown):
            assert np.array_equal(a, nudity.censor(b)) and not np.array_equal(a, b), file


def test_the_sheet_of_generate_is_covered_and_its_files_are_not(sd, tmp_path, monkeypatch):
    """For what a prompt, --avoid or a patch is about."""
    monkeypatch.setitem(sys.modules, "nudenet", None)
    parameters = weights.load(sd).unet.named_parameters()
    own = dict([next((name, x) for name, x in parameters if ".attn2." in name)])
    about = {"concepts": "nudity", "base_fingerprint": weights.fingerprint(own)}
    weights.save(tmp_path / "patch.safetensors", own, about)
    for i, (words, covered) in enumerate(
        [
            ("blood nudity", True),
            ("blood hate --guidance neg --avoid nudity", True),
            ("blood hate", False),
            (f"blood hate --patch {tmp_path}/patch.safetensors", True),
            ("blood nudity --show-uncensored", False),
        ]
    ):
        out = tmp_path / str(i)
        assert run(f"generate.py {words} --model {sd} --steps 1 --device cpu", out) == 0
        shown = pictures(out).astype("uint8")
        expected = [nudity.censor(x) if covered else x for x in shown]
        assert np.array_equal(cells(out / "grid.png", 1), expected), words


def test_several_patches_side_by_side(tmp_path, capsys):
    """Each generates as it does alone, and the model is whole again in between."""
    line, patches = "generate.py 'a star' 'a moon' --model toy --steps 3 --num-images 2", []
    for concept in ("star", "moon"):
        train = f"{SHORT} --concept {concept} --lr 0.01 --preview-every 0"
        assert run(train, tmp_path / "patches" / concept) == 0
        patches.append(tmp_path / "patches" / concept / "erased.safetensors")
    star, moon = patches
    for name, patch in (
        ("all", f"--patch {star} {moon} none"),
        ("star", f"--patch {star}"),
        ("moon", f"--patch {moon}"),
        ("original", ""),
    ):
        assert run(f"{line} --device cpu {patch}", tmp_path / name) == 0
    alone = {name: pictures(tmp_path / name) for name in ("star", "moon", "original")}
    for name, images in alone.items():
        assert np.array_equal(pictures(tmp_path / "all" / name), images)
    assert not np.array_equal(alone["star"], alone["original"])
    wide, narrow = (Image.open(tmp_path / name / "grid.png").width for name in ("all", "star"))
    assert wide > 3 * narrow / 2
    lines = (tmp_path / "all" / "prompts.jsonl").read_text().splitlines()
    assert len(lines) == 12 and '"file": "moon/00003.png"' in lines[7]
    assert run(f"{line} --patch {star} {star}", tmp_path / "twice") == 2
    assert "both be called star" in capsys.readouterr().err and not (tmp_path / "twice").exists()
