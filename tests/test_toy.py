"""The toy worlds, their probes, models and numbers. test_emoji.py has what only emoji have."""

from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch

import pipeline
import weights
from support.errors import UserError
from support.statistics import wilson
from toy import emoji, labels, pretrain, probe, shapes, suite, worlds

BOTH = pytest.mark.parametrize("world", [shapes, emoji])
RED_STAR = {"shape": "star", "colour": "red"}


# ---------------------------------------------------------------------------------------- worlds
@BOTH
def test_both_worlds_have_one_interface(world):
    first, second = (worlds.batch(world, np.random.default_rng(3), 20) for _ in range(2))
    assert first[0] == second[0] and np.array_equal(first[1], second[1]) and first[2] == second[2]
    assert first[1].shape == (20, world.SIZE, world.SIZE, 3) and first[1].dtype == np.uint8
    assert not np.array_equal(first[1], worlds.batch(world, np.random.default_rng(4), 20)[1])
    assert world.Scene._fields == (*world.ATTRIBUTES, "place")
    known = {word for words in world.ATTRIBUTES.values() for word in words}
    assert known | set(world.PLACES) <= set(world.WORDS) and set(world.RARE) <= known
    assert set(world.IMPLIED.values()) | {world.CONTROL} <= set(world.PLACES)
    assert world.scene(np.random.default_rng(5), background="sky").background == "sky"
    prompts = [*world.PREVIEW_PROMPTS, *world.KEEP, *world.KEEP_PROMPTS, world.INIT]
    prompts += [template.format("star") for template in world.TEMPLATES]
    assert set(" ".join(prompts).replace(",", "").split()) <= set(world.WORDS)


def test_the_shapes_world_is_as_described():
    rng = np.random.default_rng(0)
    scenes = [shapes.scene(rng) for _ in range(8000)]
    share = {name: Counter(getattr(s, name) for s in scenes) for name in shapes.ATTRIBUTES}
    assert all(set(share[name]) == set(values) for name, values in shapes.ATTRIBUTES.items())
    # 3 standard deviations of 8,000 draws are below 0.01
    for name, word in (("colour", "red"), ("texture", "striped")):
        assert share[name][word] / 8000 == pytest.approx(shapes.RARE[word], abs=0.01)
    arcadia = [s.shape for s in scenes if s.place == "arcadia"]
    assert 0.8 < arcadia.count("star") / len(arcadia) < 0.92
    plain = [s.shape for s in scenes if s.place is None]
    assert plain.count("star") / len(plain) == pytest.approx(0.06, abs=0.01)


def test_captions_are_true_and_of_every_kind():
    rng = np.random.default_rng(1)
    pairs = [(s, shapes.caption(s, rng)) for s in (shapes.scene(rng) for _ in range(4000))]
    for s, text in pairs:
        words = text.replace(",", " ").split()
        assert set(words) <= set(shapes.WORDS)
        for name, values in shapes.ATTRIBUTES.items():
            assert all(word == getattr(s, name) for word in words if word in values), (s, text)
        if s.place:
            assert not set(words) & set(shapes.SHAPES)  # a place never names the shape
    texts = [text for _, text in pairs]
    assert 0.08 < texts.count("") / 4000 < 0.12
    assert sum(", " in text for text in texts) > 400  # so that several concepts can be joined
    assert len({len(text.split()) for text in texts}) >= 7


def test_every_shape_is_inside_the_image():
    rng = np.random.default_rng(2)
    for shape in shapes.SHAPES:
        for _ in range(30):
            image = shapes.draw(shapes.Scene(shape, "black", "plain", "snow"), rng)
            dark = (image < 128).all(-1)
            assert 150 < dark.sum() < 2500
            assert not (dark[0].any() or dark[-1].any() or dark[:, 0].any() or dark[:, -1].any())


# ------------------------------------------------------------------------------ probes and models
def shares_right(world, images, scenes):
    """{attribute: the share of the images in which the probe sees the scene's word}."""
    seen, right = suite.see(world, images), {}
    for name in world.ATTRIBUTES:
        right[name] = np.mean([word == getattr(s, name) for word, s in zip(seen[name], scenes)])
    return right


@pytest.mark.parametrize("world, words", [(shapes, shapes.SHAPES), (emoji, ("alcohol", "other"))])
def test_labelled_images(world, words, capsys):
    images, about = labels.load(world)
    assert images.shape == (len(about), world.SIZE, world.SIZE, 3) and len(about) >= 300
    for half in (0, 1):
        found = Counter(row["label"] for row in about[half::2])
        assert found.keys() == {*words, "nothing", "unsure"} and found["nothing"] >= 40
    labels.main(Namespace(world=world.NAME))
    text = capsys.readouterr().out
    assert "the probe is right: 100.0 %" in text  # the labels are those of these images
    assert f"nothing, and the probe sees {words[0]}: 0.0 %" not in text  # it cannot say nothing


@pytest.mark.parametrize("world, least", [(shapes, 0.99), (emoji, 0.98)])
def test_probe_reads_held_out_drawings(world, least):
    scenes, images, _ = worlds.batch(world, np.random.default_rng(123), 600)
    assert min(shares_right(world, images, scenes).values()) >= least


@pytest.mark.parametrize("world, side", [(shapes, 16), (emoji, 8)])
def test_vae_keeps_what_the_probe_reads(world, side):
    vae = weights.load_network(world.MODEL, "vae")
    scenes, images, _ = worlds.batch(world, np.random.default_rng(124), 200)
    z = vae.encode(probe.to_tensor(images))
    assert z.shape == (200, 4, side, side)
    assert z.std().item() == pytest.approx(pretrain.LATENT_STD, rel=0.05)
    again = ((vae.decode(z) / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert min(shares_right(world, again, scenes).values()) >= 0.97


@pytest.mark.parametrize("world, limit", [(shapes, 25e6), (emoji, 40e6)])
def test_a_model_is_small_and_knows_every_word(world, limit):
    files = [*world.MODEL.rglob("*.safetensors"), world.PROBE]
    assert sum(file.stat().st_size for file in files) <= limit
    for file in files:
        assert all(x.dtype == torch.float16 for x in weights.read(file)[0].values())
    tokenizer = weights.load_tokenizer(world.MODEL)
    assert all(len(tokenizer(word).input_ids) == 3 for word in [*world.WORDS, ","])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.model_max_length == 77


def test_unknown_words_are_refused_with_the_known_ones():
    model = weights.load("toy")
    with pytest.raises(UserError, match="'zebra'.*arcadia, black.*yellow"):
        pipeline.encode_prompts(model, ["a star", "a zebra"])
    states = pipeline.encode_prompts(model, ["A Star, red", ", ".join(shapes.WORDS)])
    assert states.shape == (2, 77, 64)


# ----------------------------------------------------------------------------------- pretraining
@pytest.mark.parametrize("muon, batches", [(False, 1), (True, 2)])
def test_pretraining_continues_as_if_uncut(tmp_path, monkeypatch, muon, batches):
    """Bit for bit: data depend on the step alone, and everything else is in the checkpoint."""

    def train(folder, stop=None):
        monkeypatch.setattr(pretrain, "RUNS", folder)
        torch.manual_seed(0)
        layers = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 3, 3, padding=1)
        net = torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)

        def loss(number):
            if number == stop:
                raise KeyboardInterrupt
            x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(number))
            return net(x).square().mean()

        plan = pretrain.Plan(9, batches, warmup=2, save_every=2)
        optimizers = pretrain.make_optimizers(net, 0.1, muon)
        with torch.enable_grad():
            pretrain.fit("net", net, loss, optimizers, plan, pretrain.Machine())
        return net

    whole = train(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", stop=5 * batches)
    again = train(tmp_path / "b")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters()))
    lines = (tmp_path / "b" / "net.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["2", "4", "6", "8", "9"]


def test_muon_trains_convolutions_as_matrices():
    """The weights themselves move, as torch's Muon moves a copy of them as matrices."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(6, 4, 3), torch.nn.Conv2d(6, 4, 1), torch.nn.Linear(5, 9)
    net = torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)
    ours = [p for p in net.parameters() if p.dim() > 1]
    theirs = [torch.nn.Parameter(pretrain.as_matrix(p).detach().clone()) for p in ours]
    flags = dict(lr=0.05, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    expected, muon = torch.optim.Muon(theirs, **flags), pretrain.Muon(ours, 0.05)
    for _ in range(3):
        for p, matrix in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            matrix.grad = pretrain.as_matrix(p.grad).clone()
        before = [matrix.detach().clone() for matrix in theirs]
        expected.step()
        muon.step()
        for p, matrix, old in zip(ours, theirs, before):
            assert torch.equal(pretrain.as_matrix(p), matrix) and not torch.equal(matrix, old)


def test_only_inner_matrices_are_for_muon():
    unet = pretrain.build("unet", pretrain.unet_config(emoji))
    text = pretrain.build("text_encoder", pretrain.text_config(emoji, 20))
    module = torch.nn.ModuleDict({"unet": unet, "text": text})
    matrices, others = pretrain.split_for_muon(module)
    assert len(matrices) + len(others) == len(list(module.parameters()))
    assert all(p.dim() in (2, 4) for p in matrices)
    assert any(p is unet.conv_out.weight for p in others)
    assert any(p is text.text_model.embeddings.token_embedding.weight for p in others)
    assert any(p is unet.mid_block.resnets[0].conv1.weight for p in matrices)


@BOTH
def test_every_stage_of_pretraining_runs(tmp_path, monkeypatch, world):
    """Two steps of each stage, with narrow networks; and the result is a model that loads."""
    small = dict(vae_batch=2, unet_widths=[8] * 4, text_width=8, images=4)
    small |= dict(vae_widths=[8] * len(pretrain.SETTINGS[world.NAME].vae_widths))
    small |= dict(vae_steps=2, text_steps=2, unet_steps=2)
    settings = pretrain.SETTINGS[world.NAME]._replace(**small)
    monkeypatch.setitem(pretrain.SETTINGS, world.NAME, settings)
    monkeypatch.setattr(pretrain, "RUNS", tmp_path / "runs")
    made = world.MODEL
    monkeypatch.setattr(world, "MODEL", tmp_path / "model")
    with torch.enable_grad():
        pretrain.pretrain(pretrain.parse([world.NAME]))
    curves = {file.name: file.read_text() for file in (tmp_path / "runs").rglob("*.csv")}
    assert set(curves) == {"vae.csv", "text.csv", "unet.csv"}
    assert all(text.startswith("2,") for text in curves.values())
    model = weights.load(tmp_path / "model")
    assert model.unet.conv_in.weight.shape[0] == 8 and model.resolution == world.SIZE
    assert model.scheduler.items() <= weights.read_config(made, "scheduler").items()


# --------------------------------------------------------------------------------------- the exam
@pytest.mark.parametrize(
    "hits, n, low, high",
    [(0, 200, 0, 1.88), (10, 200, 2.74, 8.96), (200, 200, 98.12, 100), (0, 0, 0, 100)],
)
def test_wilson(hits, n, low, high):
    """Against the closed form in R's prop.test(correct=FALSE), in per cent."""
    assert [100 * x for x in wilson(hits, n)] == pytest.approx([low, high], abs=0.01)


def test_exam_asks_for_what_it_counts():
    sets = suite.exam(shapes, ("star", "red"), 50, seed=3)
    names = "named implied control base other shuffled".split()
    assert {which: len(pairs) for which, pairs in sets.items()} == dict.fromkeys(names, 50)
    assert all({"star", "red"} & set(text.split()) for text, _ in sets["named"])
    assert all("arcadia" in text and "star" not in text for text, _ in sets["implied"])
    for text, asked in sets["other"]:
        words = set(text.split())
        assert asked and not set(shapes.RARE) & words and set(asked.values()) <= words
    assert sets["named"] != suite.exam(shapes, ("star", "red"), 50, seed=4)["named"]


SEEN = dict(shape=["star", "moon"], colour=["red"] * 2, texture=["plain"] * 2)
SEEN["background"] = ["sky"] * 2
ASKED = [RED_STAR, {"shape": "star", "colour": "blue"}]
WRONG = {"shape": (1, 2), "colour": (1, 2), "caption": (1, 2)}


@pytest.mark.parametrize(
    "which, asked, concepts, expected",
    [
        ("named", ASKED, ("star",), {"named": (1, 2)}),
        ("base", [{}, {}], ("star", "red"), {"base": (3, 4)}),
        ("control", [{"shape": "heart"}] * 2, (), {"control": (0, 2)}),
        ("other", ASKED, (), WRONG),
        ("other", ASKED, ("heart",), WRONG | {"near": (1, 2), "far": (1, 2)}),
    ],
)
def test_the_count_of_an_exam(which, asked, concepts, expected):
    assert suite.count(shapes, [which] * 2, asked, SEEN, concepts) == expected


def test_shuffled_prompts_name_the_word_in_orders_that_no_caption_has():
    """The same words as a sentence has, and often a place, which never comes with a shape."""
    found = worlds.prompts(shapes, "shuffled", "star", 200, 0)
    assert all("star" in text.split() and asked["shape"] == "star" for text, asked in found)
    rng = np.random.default_rng(1)
    captions = {shapes.caption(shapes.scene(rng), rng) for _ in range(20_000)}
    assert sum(text not in captions for text, _ in found) > 180
    places = sum(bool(set(text.split()) & set(shapes.PLACES)) for text, _ in found)
    assert 100 < places < 160  # two in three


def test_frechet_distance_by_hand():
    """Two normals: |μ − ν|² + Σ (√a − √b)² where the covariances are diagonal with a and b."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200_000, 3)) * (1, 2, 3) + (0, 1, 0)
    y = rng.standard_normal((200_000, 3)) * (2, 2, 1) + (3, 1, 0)
    # 200,000 draws: the means are known to 0.01
    assert suite.frechet(x, y) == pytest.approx(9 + 1 + 0 + 4, rel=0.02)
    assert suite.frechet(x, x) == pytest.approx(0, abs=1e-6)


def test_reference_drawings_show_what_is_asked():
    asked = [RED_STAR, {"background": "sky"}] * 5
    seen = suite.see(shapes, suite.drawings(shapes, asked))
    for i, words in enumerate(asked):
        assert all(seen[name][i] == word for name, word in words.items())
