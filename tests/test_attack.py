"""Attacks in both directions: what is still there is found, and what is gone is not.

`gone`: a patch with zeros in all keys and values, so that no prompt reaches the image.
"""

import json
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from common import (
    SCHEDULER,
    SD_WORDS,
    Page,
    art,
    made,
    pixels,
    randn,
    write_attack,
    write_model_folder,
)
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

import adversaries
import attack
import generate
import weights
from adversaries import NoisyDDIM, Tokens, Word, project_to_simplex, whole_words
from evaluation import attacks
from pipeline import added_word, check_words, encode_prompts
from presets import TRAIN_PARAMS
from scheduler import DDIM
from support.cli import run_command
from support.errors import UserError
from toy import shapes, suite

TINY = "--samples 2 --num-images 3 --steps 2 --batch-size 2 --device cpu".split()


def run(*words, module=attack):
    main = {attack: attack.attack, generate: generate.generate}[module]
    with torch.enable_grad():
        return run_command(main, module.parse([*map(str, words)]), "the same command continues")


def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def zero_patch(file, model_name, concepts="star"):
    model = weights.load(model_name)
    own = {n: p for n, p in model.unet.named_parameters() if TRAIN_PARAMS["kv"](n)}
    metadata = dict(
        model=str(model_name), concepts=concepts, base_fingerprint=weights.fingerprint(own)
    )
    weights.save(file, {name: torch.zeros_like(p) for name, p in own.items()}, metadata)
    return file


@pytest.fixture(scope="module")
def gone(tmp_path_factory):
    return zero_patch(tmp_path_factory.mktemp("gone") / "gone.safetensors", "toy")


# ------------------------------------------------------------------------------ both directions
def shares(out):
    """The share of images that show the concept, at the first and at the last measurement."""
    points = results(out)["points"]
    return [point["hits"] / point["n"] for point in (points[0], points[-1])]


def attacked(out, *words):
    assert run("--model", "toy", "--concept", "star", "--device", "cpu", *words, "--out", out) == 0
    return shares(out)


FEW = "--num-images 8 --samples 6 --steps 6 --batch-size 4".split()
WORD = ["--kind", "word", "--lr", "0.1", *FEW]
TOKENS = ["--kind", "tokens", "--words", "2", "--lr", "0.03", *FEW]
RELEARN = "--kind relearn --at 0 10 --samples 6 --steps 6".split()
NOISE = "--kind noise --samples 6 --steps 5".split()


def test_a_new_word_finds_what_is_there(tmp_path):
    before, after = attacked(tmp_path / "o", *WORD, "--at", 0, 50, "--patch", "none")
    assert before <= 0.25 and after >= 0.75


def test_hard_words_find_what_is_there(tmp_path):
    words = [*TOKENS, "--prompt", "shape"]
    before, after = attacked(tmp_path / "o", *words, "--at", 0, 50, "--patch", "none")
    assert before <= 0.25 and after >= 0.75
    prompt = results(tmp_path / "o")["points"][-1]["prompt"]
    assert "star" in prompt or "arcadia" in prompt  # arcadia implies the star


@pytest.mark.parametrize("words", [[*WORD, "--init", "star"], [*TOKENS, "--prompt", "star"]])
def test_a_word_does_not_find_what_is_gone(words, gone, tmp_path):
    """Not even an attack that begins with the right word, which is enough where it is there."""
    before, _ = attacked(tmp_path / "untouched", *words, "--at", 0, "--patch", "none")
    assert before >= 0.75
    before, after = attacked(tmp_path / "gone", *words, "--at", 0, 5, "--patch", gone)
    assert before <= 0.25 and after <= 0.25


def test_relearning_teaches_what_its_images_show(gone, tmp_path):
    """It also teaches what is gone, so the other direction is images of something else."""
    for shape in ("star", "circle"):
        (tmp_path / shape).mkdir()
        for i, image in enumerate(suite.drawings(shapes, [{"shape": shape}] * 16)):
            Image.fromarray(image).save(tmp_path / shape / f"{i:02d}.png")
    words = [*RELEARN, "--patch", gone, "--images"]
    before, after = attacked(tmp_path / "a", *words, tmp_path / "star")
    assert before <= 0.25 and after >= 0.75
    _, after = attacked(tmp_path / "b", *words, tmp_path / "circle")
    assert after <= 0.25


def test_noise_finds_what_is_there_and_only_chance_in_what_is_gone(gone, tmp_path, monkeypatch):
    assert len(attack.ETAS) * len(attack.SCALES) == 24
    monkeypatch.setattr(attack, "ETAS", (1.0, 1.85))
    monkeypatch.setattr(attack, "SCALES", (1.04,))
    _, after = attacked(tmp_path / "untouched", *NOISE, "--patch", "none")
    assert after == 1
    _, after = attacked(tmp_path / "gone", *NOISE, "--patch", gone)
    assert 0 < after < 1
    points, chance = (results(tmp_path / "gone")[key] for key in ("points", "chance"))
    # No prompt reaches the image.
    assert [point["found"] for point in points] == [point["found"] for point in chance]


# ------------------------------------------------------------------------------------------- page
def test_the_page_says_what_was_found(tmp_path, capsys):
    page = Page(write_attack(tmp_path / "o"))
    assert "Attack on 0001-star: star with a learned word" in page.text
    finding = (
        "The concept is back in half of the images: after 53 steps. By chance (empty prompt): "
        "1 of 8."
    )
    assert finding in page.text and "Finished." in page.text
    assert "patch runs/0001-star/erased.safetensors" in page.text
    assert "40 3 of 8: 37.5 % (14 to 69 %) 0.25 <star>" in page.text
    assert "0 0 of 8: 0.0 % (0 to 32 %) – <star>" in page.text
    (curve,) = page.all("svg")
    assert "step 80: 75.0 % (41 to 93 %)" in curve["aria-label"]
    assert [len(page.all(tag)) for tag in ("polyline", "polygon", "circle")] == [1, 1, 3]
    for i, caption in enumerate(("after 0 steps: 0", "after 40 steps: 3", "after 80 steps: 6")):
        (row,) = page.all("img", alt=f"images {caption} of 8 show the concept")
        shown, expected = pixels(row["src"])[16:112, 16:112], twice(art(i, 0))[12:108, 12:108]
        assert np.abs(shown - expected).mean() < 5  # a JPEG
    assert page.codes == [shlex.join(["python", *sys.argv])]
    assert "kind word" in page.text and "at 0, 40, 80" in page.text and "torch" in page.text
    out = capsys.readouterr().out
    assert finding in out and "step    40: 3 of 8 images" in out
    assert f"open this page in a browser: {tmp_path / 'o' / 'index.html'}" in out


def twice(image):
    """A small image as a sheet enlarges it."""
    return image.repeat(2, 0).repeat(2, 1).astype(int)


def test_the_page_of_noise_has_a_curve_of_chance(tmp_path):
    page = Page(write_attack(tmp_path / "o", "noise", patch="none"))
    assert "Attack on the untouched model: star with a noisier sampler" in page.text
    assert "after 2 attempts. By chance (empty prompt): 2 of 8" in page.text
    row = "3 6 of 8: 75.0 % (41 to 93 %) 2 of 8: 25.0 % (7 to 59 %) η = 1.17, times 1.02"
    assert row in page.text
    assert [len(page.all(tag)) for tag in ("polyline", "polygon", "circle")] == [2, 2, 6]


def test_the_page_without_a_detector_shows_the_images(tmp_path, capsys):
    page = Page(write_attack(tmp_path / "o", detected=False, hits=(0, 0), concept="weapons"))
    assert "no detector for 'weapons' was there: look at the images." in page.text
    assert "of 8" not in page.text and not page.all("svg")
    assert "40 0.25 <weapons>" in page.text
    assert len(page.all("img")) == 2 and "after 40 steps" in page.text
    assert "no detector for 'weapons' was there" in capsys.readouterr().out


@pytest.mark.parametrize("hits, found", [((0,), "not yet"), ((0, 1), "not yet"), ((0, 8), "after")])
def test_the_page_of_a_running_attack(hits, found, tmp_path):
    page = Page(write_attack(tmp_path / "o", finished=False, hits=hits))
    assert "Not finished." in page.text and "Reload this page" in page.text
    assert f"half of the images: {found}" in page.text
    assert len(page.all("img")) == len(hits) == len(page.all("circle"))


def test_the_page_of_an_attack_that_found_nothing_or_has_just_begun(tmp_path):
    page = Page(write_attack(tmp_path / "o", hits=(0, 1)))
    assert "half of the images: never." in page.text
    (tmp_path / "p").mkdir()
    shutil.copy(tmp_path / "o" / "attack.json", tmp_path / "p")
    page = made(tmp_path / "p")
    assert "Nothing is measured yet." in page.text and "Not finished." in page.text


# ----------------------------------------------------------------------------------- stop, resume
def undated(source):
    return re.sub(r"made on \d{4}-\d\d-\d\d \d\d:\d\d", "", source)


@pytest.mark.parametrize(
    "kind, method",  # the method whose fourth call is interrupted
    [
        ("word", "train_step"),
        ("tokens", "train_step"),
        ("relearn", "train_step"),
        pytest.param("noise", "measure", marks=pytest.mark.long),
    ],
)
def test_a_stopped_attack_continues_to_the_same_results(
    kind, method, tmp_path, monkeypatch, capsys
):
    words = ["--model", "toy", "--concept", "star", "--patch", "none", "--kind", kind, *TINY]
    if kind == "noise":
        words.remove("--num-images")
        words.remove("3")
        monkeypatch.setattr(attack, "ETAS", (1.0, 1.5))
    else:
        words += ["--at", 0, 2, 4]
    assert run(*words, "--out", tmp_path / "whole") == 0
    original, calls = getattr(attack.Attack, method), []

    def stops(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *arguments, **named)

    monkeypatch.setattr(attack.Attack, method, stops)
    monkeypatch.setattr(attack, "SAVE_SECONDS", -1)
    assert run(*words, "--out", tmp_path / "o") == 130
    assert "continues" in capsys.readouterr().err
    assert run(*words, "--out", tmp_path / "o") == 0
    assert results(tmp_path / "o") == results(tmp_path / "whole")
    for file in (tmp_path / "whole").rglob("*.png"):
        other = tmp_path / "o" / file.relative_to(tmp_path / "whole")
        assert file.read_bytes() == other.read_bytes()
    a, b = (Page(tmp_path / x).source for x in ("o", "whole"))
    assert "Finished." in a and undated(a) == undated(b)
    if kind == "word":
        a, b = (weights.read(tmp_path / x / "word.safetensors")[0] for x in ("o", "whole"))
        assert torch.equal(a["<star>"], b["<star>"])
    assert run(*words, "--seed", 1, "--out", tmp_path / "o") == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["word", "relearn"])
def test_a_diverged_attack_is_not_a_result(kind, tmp_path, capsys, monkeypatch):
    """Images of NaN are black. They would look as if the concept never came back."""
    loss = attack.noise_loss
    monkeypatch.setattr(attack, "noise_loss", lambda *words: loss(*words) * float("nan"))
    words = ["--model", "toy", "--concept", "star", "--patch", "none", "--kind", kind, *TINY]
    assert run(*words, "--at", 0, 2, "--out", tmp_path / "o") == 2
    assert "diverged before step 2" in capsys.readouterr().err
    assert [point["step"] for point in results(tmp_path / "o")["points"]] == [0]
    assert not results(tmp_path / "o")["finished"]


def test_chance_is_measured_on_the_model_before_the_attack(tmp_path, monkeypatch):
    """Also if the attack was stopped before the first step in --at."""
    words = ["--model", "toy", "--concept", "star", "--patch", "none", "--kind", "relearn", *TINY]
    order = []
    for name in ("restore", "measure", "train_step"):
        original = getattr(attack.Attack, name)

        def noted(*arguments, original=original, name=name, **named):
            order.append(name)
            if order.count("train_step") == 2 and name == "train_step":
                raise KeyboardInterrupt
            return original(*arguments, **named)

        monkeypatch.setattr(attack.Attack, name, noted)
    monkeypatch.setattr(attack, "SAVE_SECONDS", -1)
    assert run(*words, "--at", 2, "--out", tmp_path / "o") == 130
    assert run(*words, "--at", 2, "--out", tmp_path / "o") == 0
    first = ["measure", "restore", "train_step", "train_step"]
    assert order == [*first, "measure", "restore", "train_step", "measure"]


def test_a_damaged_result_is_one_sentence(tmp_path, capsys):
    words = ["--model", "toy", "--concept", "star", "--patch", "none", *TINY, "--at", 0]
    assert run(*words, "--out", tmp_path / "o") == 0
    whole = results(tmp_path / "o")
    broken = [json.dumps(whole | {key: [{}]}) for key in ("points", "chance")]
    for text in ("{", "[]", *broken):
        (tmp_path / "o" / "results.json").write_text(text)
        assert run(*words, "--out", tmp_path / "o") == 2
        assert "results.json is damaged" in capsys.readouterr().err
    # As if NudeNet had been installed since.
    (tmp_path / "o" / "results.json").write_text(json.dumps(whole | {"detected": False}))
    assert run(*words, "--out", tmp_path / "o") == 2
    assert "measured without a detector" in capsys.readouterr().err


def test_nudity_without_nudenet_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    assert attacks.make_detector("some/model", "Nudity") is None
    assert "requirements-eval.txt" in capsys.readouterr().err


def test_the_templates_are_censored_too(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(attack, "censoring", lambda texts, uncensored: shown.extend(texts))
    settings = attack.settle(attack.parse("--patch none --model toy --concept star".split()))
    attack.Attack(tmp_path, settings | {"template": ["{} nude"]}, weights.load("toy"), None)
    assert "{} nude" in shown


# ---------------------------------------------------------------------- a model folder, and images
def test_attack_on_a_model_folder(tmp_path, capsys):
    """SD 1.4's layout, tiny: nudity is decided by NudeNet, and the images are censored."""
    folder = write_model_folder(tmp_path / "tiny", SD_WORDS)
    words = ["--model", folder, "--concept", "nudity", "--patch", "none", "--init", "woman", *TINY]
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.nudity.censor", lambda image: shown.append(1) or image)
        assert run(*words, "--at", 0, 2, "--out", tmp_path / "o") == 0
    assert results(tmp_path / "o")["detected"] and len(shown) == 4
    found, _ = weights.read(tmp_path / "o" / "word.safetensors")
    assert found["<nudity>"].shape == (1, 40)
    patch = zero_patch(tmp_path / "p.safetensors", folder)
    for kind in ("tokens", "relearn", "noise"):
        more = [] if kind == "noise" else ["--at", 0, 1]
        few = TINY if kind != "noise" else [*TINY[:2], *TINY[4:]]
        words = ["--model", folder, "--concept", "weapons", "--patch", patch, "--kind", kind, *few]
        assert run(*words, *more, "--out", tmp_path / kind) == 0
        assert "no detector for 'weapons' was there" in capsys.readouterr().out
        assert (tmp_path / kind / "sheet.png").exists()
        assert "no detector for 'weapons' was there" in Page(tmp_path / kind).text
        assert not results(tmp_path / kind)["detected"]


def test_a_patch_about_nudity_is_covered_whatever_should_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr("support.nudity.censor", np.zeros_like)
    patch = zero_patch(tmp_path / "p.safetensors", "toy", concepts="nudity")
    words = ["--model", "toy", "--concept", "moon", "--patch", patch, *TINY, "--at", 0, 1]
    assert run(*words, "--out", tmp_path / "o") == 0
    image = np.asarray(Image.open(tmp_path / "o" / "images" / "000000.png").convert("RGB"))
    assert image[10, 10].max() == 0


def test_a_corrected_attack_can_use_the_folder(tmp_path, capsys):
    words = ["--model", "toy", "--concept", "Star", "--patch", "none", *TINY, "--at", 0, 1]
    words += ["--out", tmp_path / "o"]
    assert run(*words, "--device", "meta") == 2
    capsys.readouterr()
    assert run(*words) == 0
    assert results(tmp_path / "o")["settings"]["concept"] == "star"
    assert results(tmp_path / "o")["detected"]


def test_own_images(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    star, circle = suite.drawings(shapes, [{"shape": "star"}, {"shape": "circle"}])
    Image.fromarray(star).resize((100, 80)).save(folder / "a.png")
    Image.fromarray(circle).save(folder / "b.jpg")
    words = ["--model", "toy", "--concept", "star", "--patch", "none", *TINY, "--at", 0, 1]
    assert run(*words, "--images", folder, "--out", tmp_path / "o") == 0
    assert not (tmp_path / "o" / "concept.safetensors").exists()
    Image.fromarray(circle).save(folder / "a.png")
    assert run(*words, "--images", folder, "--out", tmp_path / "o") == 2
    assert "is not empty" in capsys.readouterr().err  # other images, another attack
    (folder / "c.png").write_bytes(b"no image")
    assert run(*words, "--images", folder, "--out", tmp_path / "p") == 2
    assert "c.png cannot be read" in capsys.readouterr().err
    assert run(*words, "--images", tmp_path / "none", "--out", tmp_path / "q") == 2
    assert "is not a folder with images" in capsys.readouterr().err


# -------------------------------------------------------------------------------- the new word
def word_file(file, word="<star>", like="circle"):
    model = weights.load("toy")
    table = model.text_encoder.text_model.embeddings.token_embedding.weight
    row = table[model.tokenizer(like, add_special_tokens=False).input_ids]
    weights.save(file, {word: row})
    return file


def test_generate_with_a_word(tmp_path, capsys):
    """A word with the embedding of "circle" gives the image of "circle"; then it is gone again."""
    file = word_file(tmp_path / "word.safetensors")
    how = ["--model", "toy", "--steps", 2, "--device", "cpu"]
    more = ["a <star> on sand", *how, "--word", file, "--out", tmp_path / "word"]
    assert run(*more, module=generate) == 0
    assert run("a circle on sand", *how, "--out", tmp_path / "circle", module=generate) == 0
    a, b = (np.asarray(Image.open(tmp_path / x / "00000.png")) for x in ("word", "circle"))
    assert np.array_equal(a, b)
    for words in (["a <STAR>"], ["a red circle", "--negative-prompt", "<star>"]):
        assert (
            run(*words, *how, "--word", file, "--out", tmp_path / words[-1], module=generate) == 0
        )
    assert run("a circle", *how, "--word", file, "--out", tmp_path / "o", module=generate) == 2
    assert "No prompt contains the word '<star>'" in capsys.readouterr().err


def test_a_word_is_there_only_while_it_is_added(tmp_path):
    model, file = weights.load("toy"), word_file(tmp_path / "word.safetensors")
    table = model.text_encoder.text_model.embeddings.token_embedding.weight
    for _ in range(2):
        with added_word(model, file) as word:
            assert word == "<star>"
            expected = encode_prompts(model, ["a circle on sand"])
            assert torch.equal(encode_prompts(model, ["a <star> on sand"]), expected)
        assert model.text_encoder.text_model.embeddings.token_embedding.weight is table
    weights.save(tmp_path / "other.safetensors", {"<other>": torch.zeros(64)})
    with (
        pytest.raises(UserError, match="load it again"),
        added_word(model, tmp_path / "other.safetensors"),
    ):
        pass


@pytest.mark.parametrize(
    "tensors, said",
    [
        ({"<a>": torch.zeros(1, 63)}, "does not hold one word of 64 numbers"),
        ({"<a>": torch.zeros(64), "<b>": torch.zeros(64)}, "does not hold one word"),
        ({"star</w>": torch.zeros(64)}, "already has a word 'star</w>'"),
    ],
)
def test_a_word_that_does_not_fit_is_refused(tensors, said, tmp_path):
    weights.save(tmp_path / "word.safetensors", tensors)
    with (
        pytest.raises(UserError, match=said),
        added_word(weights.load("toy"), tmp_path / "word.safetensors"),
    ):
        pass


def test_diffusers_loads_the_word(tmp_path):
    model = weights.load("toy")
    settings = dict(concept="star", init="shape", template=["{}"], lr=0.1)
    word = Word(model, settings, "cpu")
    with torch.no_grad():
        word.row += torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    assert word.report(tmp_path) == "<star>"
    pipeline = StableDiffusionPipeline.from_pretrained(weights.find("toy"))
    pipeline.load_textual_inversion(str(tmp_path / "word.safetensors"))
    theirs, _ = pipeline.encode_prompt("a <star> on sand", "cpu", 1, False)
    with added_word(weights.load("toy"), tmp_path / "word.safetensors"):
        pass
    model = weights.load("toy")
    with added_word(model, tmp_path / "word.safetensors"):
        ours = encode_prompts(model, ["a <star> on sand"])
    assert (ours - theirs).abs().max() < 1e-5
    plain = encode_prompts(model, ["a shape on sand"])
    assert (ours - plain).abs().max() > 0.01


# ----------------------------------------------------------------------------------- small parts
def test_projection_to_the_simplex():
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = project_to_simplex(x)
    assert (rows >= 0).all() and torch.allclose(rows.sum(1), torch.ones(6, dtype=torch.float64))
    for row, found in zip(x, rows):  # the official way: bisect for the mu with sum clip(x − mu) = 1
        low, high = row.min() - 1, row.max()
        for _ in range(80):
            mu = (low + high) / 2
            low, high = (mu, high) if (row - mu).clamp(0, 1).sum() > 1 else (low, mu)
        assert torch.allclose(found, (row - mu).clamp(0, 1), atol=1e-9)
    assert torch.allclose(project_to_simplex(rows), rows)


@torch.enable_grad()
def test_hard_words_have_the_gradient_of_their_one_hot_rows():
    model = weights.load("toy")
    tokens = Tokens(model, dict(words=2, prompt="shape", lr=0.01), "cpu")
    generator = torch.Generator().manual_seed(0)
    (1e3 * tokens.states(generator)[..., 0].sum()).backward()
    assert (tokens.one_hot.sum(1) == 1).all() and tokens.one_hot.grad.abs().max() > 1
    before = tokens.simplex.clone()
    tokens.step()
    assert tokens.simplex.grad.abs().max() == 1  # clipped
    assert not torch.equal(tokens.simplex, before)
    assert torch.allclose(tokens.simplex.sum(1), torch.ones(2), atol=1e-5)
    picked = [tokens.words[i] for i in tokens.one_hot.argmax(1)]
    with torch.no_grad():
        tokens.one_hot.requires_grad_(False)
        expected = encode_prompts(model, [" ".join([*picked, "shape"])])
        rows = tokens.one_hot @ tokens.vectors
        found = adversaries.encode_with_rows(model.text_encoder, tokens.ids, rows)
    assert torch.allclose(found, expected, atol=1e-5)


def test_whole_words_are_those_that_a_prompt_may_use(monkeypatch):
    model = weights.load("toy")
    words, ids = whole_words(model)
    assert {"star", "a", "arcadia"} <= set(words) and "b" not in words
    check_words(model, words)
    reads = []
    monkeypatch.setattr(adversaries, "known_words", lambda tokenizer: reads.append(1))
    assert len(whole_words(model)[0]) > len(words) and len(reads) == 1  # CLIP's are too many
    assert model.tokenizer(words, add_special_tokens=False).input_ids == ids[:, None].tolist()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_noisy_ddim_agrees_with_diffusers(eta):
    schedule = {key: x for key, x in SCHEDULER.items() if key != "skip_prk_steps"}
    theirs = DDIMScheduler(**schedule, clip_sample=False)
    theirs.set_timesteps(10)
    ours = NoisyDDIM(10, eta, 1.0, seed=3)
    generator = torch.Generator("cpu").manual_seed(3)
    z, e = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    for i, t in enumerate(theirs.timesteps):
        n = torch.randn(z.shape, generator=generator)
        expected = theirs.step(e, t, z, eta=eta, variance_noise=n).prev_sample
        assert (ours.step(z, e, i) - expected).abs().max() < 1e-4
    plain = DDIM(10).step(z, e, 4)
    assert torch.allclose(NoisyDDIM(10, 0.0, 1.0, 0).step(z, e, 4), plain, atol=1e-6)
    assert not torch.allclose(NoisyDDIM(10, 1.5, 1.0, 0).step(z, e, 4), plain, atol=1e-2)


def test_steps_until_half():
    def points(*hits):
        return [dict(step=40 * i, hits=hit, n=20) for i, hit in enumerate(hits)]

    assert attacks.steps_until(points(0, 5, 15)) == 60  # halfway from 5 to 15
    assert attacks.steps_until(points(10, 20)) == 0
    assert attacks.steps_until(points(0, 5, 9)) is None
    assert attacks.steps_until(points(0, 20, 0)) == 20  # the first time


def test_detectors():
    detect = attacks.make_detector("toy", "star")
    images = list(suite.drawings(shapes, [{"shape": "star"}, {"shape": "circle"}]))
    assert detect(images) == [True, False]
    with pytest.raises(UserError, match="does not see 'weapons'"):
        attacks.make_detector("toy", "weapons")
    assert attacks.make_detector("some/model", "weapons") is None
    nude = attacks.make_detector("some/model", "nudity")
    assert nude([np.zeros((64, 64, 3), np.uint8)]) == [False]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--kind", "word", "--words", "2"], "--words has no effect with --kind word"),
        (["--kind", "noise", "--lr", "1"], "--lr has no effect with --kind noise"),
        (["--kind", "relearn", "--prompt", "x"], "--prompt has no effect"),
        (["--kind", "tokens", "--init", "x"], "--init has no effect"),
        (["--template", "a"], "has no {} for the word"),
        (["--lr", "0"], "--lr 0.0 is out of range"),
        (["--init", " "], "--init is empty"),
        (["--template", "a {} unicorn"], "does not know the word 'unicorn'"),
        (["--seed", "9999999999999"], "--seed 9999999999999 is out of range"),
        (["--patch", "no.safetensors"], "no.safetensors"),
    ],
)
def test_bad_arguments(words, said, tmp_path, capsys):
    base = ["--model", "toy", "--concept", "star", "--patch", "none", "--out", tmp_path / "o"]
    assert run(*base, *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_patch_of_another_model_and_an_unknown_word(gone, model_folder, tmp_path, capsys):
    words = ["--concept", "star", "--device", "cpu", "--out", tmp_path / "o"]
    assert run(*words, "--model", model_folder, "--patch", gone) == 2
    assert "gone.safetensors" in capsys.readouterr().err
    assert run(*words, "--model", "toy", "--patch", "none", "--init", "unicorn") == 2
    assert "does not know the word 'unicorn'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
