"""Attacks in both directions: what is still there is found, and what is gone is not.

`gone`: a patch with zeros in all keys and values, so that no prompt reaches the image.
"""

import html
import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from common import SCHEDULER, SD_WORDS, randn, run, write_model_folder
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

import adversaries
import attack
import weights
from adversaries import NoisyDDIM, Tokens, Word, project_to_simplex, whole_words
from evaluation import attacks
from pipeline import check_words, encode_prompts, with_word
from presets import TRAIN_PARAMS
from scheduler import DDIM
from support.errors import UserError
from toy import shapes, suite

STAR = "attack.py --model toy --concept Star --device cpu"
NONE = f"{STAR} --patch none"
TINY = "--samples 2 --num-images 3 --steps 2 --batch-size 2"


def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def zero_patch(file, model_name, concepts="star"):
    model = weights.load(model_name)
    own = {n: p for n, p in model.unet.named_parameters() if TRAIN_PARAMS["kv"](n)}
    about = {"model": str(model_name), "concepts": concepts}
    about["base_fingerprint"] = weights.fingerprint(own)
    weights.save(file, {name: torch.zeros_like(p) for name, p in own.items()}, about)
    return file


@pytest.fixture(scope="module")
def gone(tmp_path_factory):
    return zero_patch(tmp_path_factory.mktemp("gone") / "gone.safetensors", "toy")


# ------------------------------------------------------------------------------ both directions
def attacked(out, words, patch="none"):
    """The share of images that show the concept, at the first and at the last measurement."""
    assert run(f"{STAR} --patch {patch} {words}", out) == 0
    points = results(out)["points"]
    return [point["hits"] / point["n"] for point in (points[0], points[-1])]


FEW = "--num-images 8 --samples 6 --steps 6 --batch-size 4"
WORD = f"--kind word --lr 0.1 {FEW}"
TOKENS = f"--kind tokens --words 2 --lr 0.03 {FEW}"
RELEARN = "--kind relearn --at 0 10 --samples 6 --steps 6"
NOISE = "--kind noise --samples 6 --steps 5"


@pytest.mark.parametrize("words", [WORD, f"{TOKENS} --prompt shape"])
def test_a_word_finds_what_is_there(words, tmp_path):
    before, after = attacked(tmp_path / "o", f"{words} --at 0 50")
    assert before <= 0.25 and after >= 0.75
    if "tokens" in words:
        prompt = results(tmp_path / "o")["points"][-1]["prompt"]
        assert "star" in prompt or "arcadia" in prompt  # arcadia implies the star


@pytest.mark.parametrize("words", [f"{WORD} --init star", f"{TOKENS} --prompt star"])
def test_a_word_does_not_find_what_is_gone(words, gone, tmp_path):
    """Not even an attack that begins with the right word, which is enough where it is there."""
    words = f"{words} --num-images 2"
    before, _ = attacked(tmp_path / "untouched", f"{words} --at 0")
    assert before >= 0.75
    before, after = attacked(tmp_path / "gone", f"{words} --at 0 5", gone)
    assert before <= 0.25 and after <= 0.25


def test_relearning_teaches_what_its_images_show(gone, tmp_path):
    """It also teaches what is gone, so the other direction is images of something else."""
    for shape in ("star", "circle"):
        (tmp_path / shape).mkdir()
        for i, image in enumerate(suite.drawings(shapes, [{"shape": shape}] * 16)):
            Image.fromarray(image).save(tmp_path / shape / f"{i:02d}.png")
    before, after = attacked(tmp_path / "a", f"{RELEARN} --images {tmp_path}/star", gone)
    assert before <= 0.25 and after >= 0.75
    _, after = attacked(tmp_path / "b", f"{RELEARN} --images {tmp_path}/circle", gone)
    assert after <= 0.25


def test_noise_finds_what_is_there_and_only_chance_in_what_is_gone(gone, tmp_path, monkeypatch):
    assert len(attack.ETAS) * len(attack.SCALES) == 24
    monkeypatch.setattr(attack, "ETAS", (1.0, 1.85))
    monkeypatch.setattr(attack, "SCALES", (1.04,))
    _, after = attacked(tmp_path / "untouched", NOISE)
    assert after == 1
    _, after = attacked(tmp_path / "gone", NOISE, gone)
    assert 0 < after < 1
    points, chance = (results(tmp_path / "gone")[key] for key in ("points", "chance"))
    # No prompt reaches the image.
    assert [point["found"] for point in points] == [point["found"] for point in chance]


# ------------------------------------------------------------------------------------------- page
def write_attack(folder, kind="word", detected=True, finished=True, hits=(0, 3, 6), concept="star"):
    """The files that attack.py leaves, with hits of 8 images per measurement."""
    folder.mkdir()
    settings = {"model": "toy", "concept": concept, "patch": "runs/0001-star/erased.safetensors"}
    settings |= {"name": "0001-star", "kind": kind, "prompt": concept, "at": [0, 40, 80]}
    (folder / "attack.json").write_text(json.dumps(settings))
    found = attacks.Results(folder, settings, detected, lambda image: image)
    images = [np.full((64, 64, 3), 30 * i, "uint8") for i in range(8)]
    for i, n in enumerate(hits):
        if kind == "noise":
            found.chance.append(dict(step=i + 1, hits=i, n=8))
            step, more = i + 1, dict(eta=1.17, scale=1.02)
        else:
            found.chance = [dict(step=0, hits=1, n=8)]
            step, more = 40 * i, dict(loss=0.25 if i else None, prompt=f"<{concept}>")
        found.add(step, images, [j < n for j in range(8)], **more)
    if finished:
        found.finish()
    return folder


def page_of(folder):
    """(the page's text, its source)."""
    source = (folder / "index.html").read_text(encoding="utf-8")
    text = re.sub(r"<(style|script).*?</\1>", "", source, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", text)).split()), source


BACK = "The concept is back in half of the images: "
PAGES = [  # (how the attack went, its finding, what the page also says, bands of its chart)
    ({}, f"{BACK}after 53 steps. By chance (empty prompt): 1 of 8.",
     "40 3 of 8: 37.5 % (14 to 69 %) 0.25 <star>", 1),
    ({"kind": "noise"}, f"{BACK}after 2 attempts. By chance (empty prompt): 2 of 8.",
     "3 6 of 8: 75.0 % (41 to 93 %) 2 of 8: 25.0 % (7 to 59 %) η = 1.17, times 1.02", 2),
    ({"detected": False, "hits": (0, 0), "concept": "weapons"},
     "Nothing is counted, because no detector for 'weapons' was there: look at the images.",
     "40 0.25 <weapons>", 0),
    ({"hits": (0, 1)}, f"{BACK}never.", "Finished.", 1),
    ({"hits": (0, 1), "finished": False}, f"{BACK}not yet.", "Not finished.", 1),
    ({"hits": (0, 8), "finished": False}, f"{BACK}after 20 steps.", "Not finished.", 1),
]  # fmt: skip


@pytest.mark.parametrize("how, finding, shown, bands", PAGES)
def test_the_page_and_the_terminal_say_what_was_found(how, finding, shown, bands, tmp_path, capsys):
    text, source = page_of(write_attack(tmp_path / "o", **how))
    assert finding in text and shown in text and shlex.join(["python", *sys.argv]) in text
    assert source.count("<polygon") == bands
    assert source.count("<img") == len(how.get("hits", (0, 3, 6)))
    out = capsys.readouterr().out
    if how.get("finished", True):
        assert finding in out and f"in a browser: {tmp_path / 'o' / 'index.html'}" in out
        assert ("step    40: 3 of 8 images" in out) == (not how)


# ------------------------------------------------------------ stop, resume: also test_resume.py
@pytest.mark.parametrize("kind", ["word", "relearn"])
def test_a_diverged_attack_is_not_a_result(kind, tmp_path, capsys, monkeypatch):
    """Images of NaN are black. They would look as if the concept never came back."""
    loss = attack.noise_loss
    monkeypatch.setattr(attack, "noise_loss", lambda *words: loss(*words) * float("nan"))
    assert run(f"{NONE} --kind {kind} {TINY} --at 0 2", tmp_path / "o") == 2
    assert "diverged before step 2" in capsys.readouterr().err
    assert [point["step"] for point in results(tmp_path / "o")["points"]] == [0]
    assert not results(tmp_path / "o")["finished"]


def test_chance_is_measured_on_the_model_before_the_attack(tmp_path, monkeypatch):
    """Also if the attack was stopped before the first step in --at."""
    line, order = f"{NONE} --kind relearn {TINY} --at 2", []
    for name in ("restore", "measure", "train_step"):
        original = getattr(attack.Attack, name)

        def noted(*arguments, original=original, name=name, **named):
            order.append(name)
            if order.count("train_step") == 2 and name == "train_step":
                raise KeyboardInterrupt
            return original(*arguments, **named)

        monkeypatch.setattr(attack.Attack, name, noted)
    assert run(line, tmp_path / "o") == 130 and run(line, tmp_path / "o") == 0
    first = ["measure", "restore", "train_step", "train_step"]
    assert order == [*first, *first, "measure"]


def test_a_result_that_cannot_be_continued_is_one_sentence(tmp_path, capsys):
    line, out = f"{NONE} {TINY} --at 0", tmp_path / "o"
    assert run(line, out) == 0
    other = results(out) | {"detected": False}  # as if NudeNet had been installed since
    for text, said in (
        ("{", "results.json cannot be read"),
        (json.dumps(other), "measured without a detector"),
    ):
        (out / "results.json").write_text(text)
        assert run(line, out) == 2
        assert said in capsys.readouterr().err


def test_templates_and_what_the_patch_erased_decide_about_covering(tmp_path, monkeypatch):
    shown = []

    def stop(texts, uncensored):
        shown.extend(texts)
        raise KeyboardInterrupt

    monkeypatch.setattr(attack, "censoring", stop)
    patch = zero_patch(tmp_path / "p.safetensors", "toy", concepts="nudity")
    assert run(f"{STAR} --patch {patch} --template 'a red {{}}'", tmp_path / "o") == 130
    assert {"a red ", "nudity"} <= set(shown)


# ---------------------------------------------------------------------- a model folder, and images
def test_attack_on_a_model_folder(tmp_path, monkeypatch, capsys):
    """SD 1.4's layout, tiny: nudity is decided by NudeNet, and the images are censored."""
    monkeypatch.setattr(attack, "ETAS", (1.0,))
    folder, shown = write_model_folder(tmp_path / "tiny", SD_WORDS), []
    line = f"attack.py --model {folder} --device cpu"
    words = f"--concept nudity --patch none --init woman {TINY} --at 0 2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.nudity.censor", lambda image: shown.append(1) or image)
        assert run(f"{line} {words}", tmp_path / "o") == 0
    assert results(tmp_path / "o")["detected"] and len(shown) == 4
    found, _ = weights.read(tmp_path / "o" / "word.safetensors")
    assert found["<nudity>"].shape == (1, 40)
    line += f" --concept weapons --patch {zero_patch(tmp_path / 'p.safetensors', folder)}"
    for kind in ("tokens", "relearn", "noise"):
        few = "--samples 2 --steps 2 --batch-size 2" if kind == "noise" else f"{TINY} --at 0 1"
        assert run(f"{line} --kind {kind} {few}", tmp_path / kind) == 0
        assert "no detector for 'weapons' was there" in capsys.readouterr().out


def test_own_images(tmp_path, capsys):
    folder, out = tmp_path / "images", tmp_path / "o"
    folder.mkdir()
    star, circle = suite.drawings(shapes, [{"shape": "star"}, {"shape": "circle"}])
    Image.fromarray(star).resize((100, 80)).save(folder / "a.png")
    Image.fromarray(circle).save(folder / "b.jpg")
    line = f"{NONE} {TINY} --at 0 1 --images {folder}"
    assert run(line, out) == 0 and not (out / "concept.safetensors").exists()
    Image.fromarray(circle).save(folder / "a.png")
    assert run(line, out) == 2
    assert "is not empty" in capsys.readouterr().err  # other images, another attack
    (folder / "c.png").write_bytes(b"no image")
    assert run(line, tmp_path / "p") == 2
    assert "c.png cannot be read" in capsys.readouterr().err


# -------------------------------------------------------------------------------- the new word
def word_file(file, word="<star>", like="circle"):
    model = weights.load("toy")
    table = model.text_encoder.text_model.embeddings.token_embedding.weight
    row = table[model.tokenizer(like, add_special_tokens=False).input_ids]
    weights.save(file, {word: row})
    return file


def test_generate_with_a_word(tmp_path, capsys):
    """A word with the embedding of "circle" gives the image of "circle"; then it is gone again."""
    how = "--model toy --steps 2 --device cpu"
    word = f"{how} --word {word_file(tmp_path / 'word.safetensors')}"
    for name, line in (
        ("word", f"'a <star> on sand' {word}"),
        ("circle", f"'a circle on sand' {how}"),
        ("capitals", f"'a <STAR>' {word}"),
        ("negative", f"'a red circle' --negative-prompt '<star>' {word}"),
    ):
        assert run(f"generate.py {line}", tmp_path / name) == 0
    a, b = (np.asarray(Image.open(tmp_path / x / "00000.png")) for x in ("word", "circle"))
    assert np.array_equal(a, b)
    assert run(f"generate.py 'a circle' {word}", tmp_path / "o") == 2
    assert "No prompt contains the word '<star>'" in capsys.readouterr().err


def test_a_word_is_only_in_the_copy_and_must_fit(tmp_path):
    model, file = weights.load("toy"), tmp_path / "word.safetensors"
    for tensors, said in (
        ({"<a>": torch.zeros(1, 63)}, "does not hold one word of 64 numbers"),
        ({"emb_params": torch.zeros(8, 64)}, "8 vectors of 64 numbers"),
        ({"<a>": torch.zeros(64), "<b>": torch.zeros(64)}, "does not hold one word"),
        ({"star</w>": torch.zeros(64)}, "already has a word 'star</w>'"),
    ):
        weights.save(file, tensors)
        with pytest.raises(UserError, match=said):
            with_word(model, file)
    weights.save(file, {"emb_params": torch.zeros(1, 64)})  # of another program
    assert with_word(model, file)[1] == file.stem
    more, word = with_word(model, word_file(file))
    assert word == "<star>"
    star, circle = encode_prompts(more, "a <star> on sand", "a circle on sand")
    assert torch.equal(star, circle)
    with pytest.raises(UserError, match="does not know the word '<star>'"):
        encode_prompts(model, "a <star>")
    with pytest.raises(UserError, match="already has a word '<star>'"):
        with_word(more, file)


def test_diffusers_loads_the_word(tmp_path):
    model, file = weights.load("toy"), tmp_path / "word.safetensors"
    word = Word(model, dict(concept="star", init="shape", template=["{}"], lr=0.1), "cpu")
    with torch.no_grad():
        word.row += torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    assert word.report(tmp_path) == "<star>"
    pipeline = StableDiffusionPipeline.from_pretrained(weights.find("toy"))
    pipeline.load_textual_inversion(str(file))
    theirs, _ = pipeline.encode_prompt("a <star> on sand", "cpu", 1, False)
    model = weights.load("toy")
    more, _ = with_word(model, file)
    ours = encode_prompts(more, "a <star> on sand")
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - encode_prompts(model, "a shape on sand")).abs().max() > 0.01


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
    tokens = Tokens(model, dict(words=2, prompt="shape", lr=0.01, weight_decay=0.1), "cpu")
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
        expected = encode_prompts(model, " ".join([*picked, "shape"]))
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
