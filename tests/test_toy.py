"""The toy world of shapes, its probe, its model and its numbers."""

from collections import Counter

import numpy as np
import pytest
import torch

import pipeline
import weights
from clip_text import CLIPText
from support.errors import UserError
from support.statistics import wilson
from toy import emoji, pretrain, probe, shapes, suite, worlds
from unet import UNet


def test_pictures_and_captions_depend_on_the_seed_alone():
    first, second = (worlds.batch(shapes, np.random.default_rng(3), 20) for _ in range(2))
    assert first[0] == second[0] and np.array_equal(first[1], second[1]) and first[2] == second[2]
    assert first[1].shape == (20, 64, 64, 3) and first[1].dtype == np.uint8
    assert not np.array_equal(first[1], worlds.batch(shapes, np.random.default_rng(4), 20)[1])


def test_the_world_is_as_described():
    rng = np.random.default_rng(0)
    scenes = [shapes.scene(rng) for _ in range(8000)]
    share = {name: Counter(getattr(s, name) for s in scenes) for name in shapes.ATTRIBUTES}
    assert all(set(share[name]) == set(values) for name, values in shapes.ATTRIBUTES.items())
    for name, word in (
        ("colour", "red"),
        ("texture", "striped"),
    ):  # 3 standard deviations of 8,000 draws are below 0.01
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
    assert (
        sum(", " in text for text in texts) > 400
    )  # "star, red, striped": what several concepts joined look like
    assert len({len(text.split()) for text in texts}) >= 7


def test_every_shape_is_inside_the_picture():
    rng = np.random.default_rng(2)
    for shape in shapes.SHAPES:
        for _ in range(30):
            picture = shapes.draw(shapes.Scene(shape, "black", "plain", "snow"), rng)
            dark = (picture < 128).all(-1)
            assert 150 < dark.sum() < 2500
            assert not (dark[0].any() or dark[-1].any() or dark[:, 0].any() or dark[:, -1].any())


def test_probe_reads_held_out_drawings():
    scenes, pictures, _ = worlds.batch(shapes, np.random.default_rng(123), 1000)
    seen = suite.see(shapes, pictures)
    for name in shapes.ATTRIBUTES:
        assert np.mean([word == getattr(s, name) for word, s in zip(seen[name], scenes)]) >= 0.99


@pytest.mark.parametrize("world, side", [(shapes, 16), (emoji, 8)])
def test_vae_keeps_what_the_probe_reads(world, side):
    vae = weights.load_network(world.MODEL, "vae")
    scenes, pictures, _ = worlds.batch(world, np.random.default_rng(124), 200)
    z = vae.encode(probe.to_tensor(pictures))
    assert z.shape == (200, 4, side, side)
    assert z.std().item() == pytest.approx(pretrain.LATENT_STD, rel=0.05)
    again = ((vae.decode(z) / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    seen = suite.see(world, again)
    assert all(
        np.mean([word == getattr(s, name) for word, s in zip(seen[name], scenes)]) >= 0.97
        for name in seen
    )


def test_model_is_small_and_half_precision():
    files = [*weights.TOY.rglob("*.safetensors"), shapes.PROBE]
    assert sum(p.stat().st_size for p in files) <= 25e6
    for file in files:
        assert all(x.dtype == torch.float16 for x in weights.read(file)[0].values())
    assert (weights.TOY / "README.md").is_file()


def test_every_word_is_one_token():
    tokenizer = weights.load_tokenizer(weights.TOY)
    assert all(len(tokenizer(word).input_ids) == 3 for word in [*shapes.WORDS, ","])
    assert (
        tokenizer.pad_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
        and tokenizer.model_max_length == 77
    )


def test_unknown_words_are_refused_with_the_known_ones():
    model = weights.load("toy")
    with pytest.raises(UserError, match="'zebra'.*arcadia, black.*yellow"):
        pipeline.encode_prompts(model, ["a star", "a zebra"])
    assert pipeline.encode_prompts(model, ["A Star, red", ", ".join(shapes.WORDS)]).shape == (
        2,
        77,
        64,
    )


@pytest.mark.parametrize("with_muon, batches", [(False, 1), (True, 2)])
def test_pretraining_continues_as_if_uncut(tmp_path, monkeypatch, with_muon, batches):
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

        matrices, others = pretrain.split_for_muon(net)
        muon = pretrain.Muon(matrices, 0.1) if with_muon else None
        groups = [dict(params=others if with_muon else net.parameters(), lr=0.1)]
        more = dict(warmup=2, save_every=2, batches=batches, muon=muon)
        with torch.enable_grad():
            pretrain.fit("net", net, loss, groups, 9, **more)
        return net

    whole = train(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", stop=5 * batches)
    again = train(tmp_path / "b")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters()))
    assert [
        line.split(",")[0] for line in (tmp_path / "b" / "net.csv").read_text().splitlines()
    ] == ["2", "4", "6", "8", "9"]


def test_muon_is_torchs_muon():
    """Three steps. Weights of the same shape are computed together; convolutions as matrices.

    Both compute in bfloat16, whose rounding grows in the iteration. The tolerance is 3 % of the
    largest move of a weight.
    """
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(6, 4, 3), torch.nn.Conv2d(6, 4, 3), torch.nn.Linear(5, 9)
    ).to(memory_format=torch.channels_last)
    ours = [p for p in net.parameters() if p.dim() > 1]
    theirs = [torch.nn.Parameter(pretrain.as_matrix(p).detach().clone()) for p in ours]
    flags = dict(lr=0.05, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    expected, muon = torch.optim.Muon(theirs, **flags), pretrain.Muon(ours, lr=0.1)
    for _ in range(3):
        for p, matrix in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            matrix.grad = pretrain.as_matrix(p.grad)
        before = [matrix.detach().clone() for matrix in theirs]
        expected.step()
        muon.step(0.5)
        for p, matrix, old in zip(ours, theirs, before):
            moved = (matrix - old).abs().max().item()
            assert moved > 0.01
            torch.testing.assert_close(pretrain.as_matrix(p), matrix, rtol=0, atol=0.03 * moved)
    for i, matrix in enumerate(theirs):
        momentum = expected.state[matrix]["momentum_buffer"]
        torch.testing.assert_close(muon.state()[str(i)], momentum)


def test_only_inner_matrices_are_for_muon():
    settings = pretrain.SETTINGS["emoji"]
    unet = UNet(**pretrain.unet_config(settings))
    text = CLIPText(20, **pretrain.text_config(settings))
    module = torch.nn.ModuleDict({"unet": unet, "text": text})
    matrices, others = pretrain.split_for_muon(module)
    assert len(matrices) + len(others) == len(list(module.parameters()))
    assert all(p.dim() in (2, 4) for p in matrices)
    assert any(p is unet.conv_out.weight for p in others)
    assert any(p is text.text_model.embeddings.token_embedding.weight for p in others)
    assert any(p is unet.mid_block.resnets[0].conv1.weight for p in matrices)


def test_every_stage_of_pretraining_runs(tmp_path, monkeypatch):
    """Two steps of each stage, with narrow networks; and the result is a model that loads."""
    settings = pretrain.SETTINGS["emoji"]._replace(
        vae_widths=[8, 8, 8, 8],
        vae_batch=2,
        unet_widths=[8, 8, 8, 8],
        text_width=8,
        images=4,
        steps=dict(vae=2, text=2, unet=2),
    )
    monkeypatch.setitem(pretrain.SETTINGS, "emoji", settings)
    monkeypatch.setattr(pretrain, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(emoji, "MODEL", tmp_path / "model")
    monkeypatch.setattr("sys.argv", ["toy.pretrain", "emoji"])
    with torch.enable_grad():
        pretrain.main()
    curves = {file.name: file.read_text() for file in (tmp_path / "runs/emoji").glob("*.csv")}
    assert set(curves) == {"vae.csv", "text.csv", "unet.csv"}
    assert all(text.startswith("2,") for text in curves.values())
    model = weights.load(tmp_path / "model")
    assert model.unet.state_dict()["conv_in.weight"].shape[0] == 8


@pytest.mark.parametrize(
    "hits, n, low, high",
    [(0, 200, 0, 1.88), (10, 200, 2.74, 8.96), (200, 200, 98.12, 100), (0, 0, 0, 100)],
)
def test_wilson(hits, n, low, high):
    """Against the closed form in R's prop.test(correct=FALSE), in per cent."""
    assert [100 * x for x in wilson(hits, n)] == pytest.approx([low, high], abs=0.01)


def test_exam_asks_for_what_it_counts():
    sets = suite.exam(shapes, ("star", "red"), 50, seed=3)
    assert {which: len(pairs) for which, pairs in sets.items()} == dict(
        named=50, implied=50, control=50, base=50, other=50, shuffled=50
    )
    assert all({"star", "red"} & set(text.split()) for text, _ in sets["named"])
    assert all("arcadia" in text and "star" not in text for text, _ in sets["implied"])
    for text, asked in sets["other"]:
        assert (
            asked
            and not set(shapes.RARE) & set(text.split())
            and set(asked.values()) <= set(text.split())
        )
    assert (
        suite.exam(shapes, ("star",), 50, seed=3)["named"]
        != suite.exam(shapes, ("star",), 50, seed=4)["named"]
    )
    seen = {
        "shape": ["star", "moon"],
        "colour": ["red", "red"],
        "texture": ["plain"] * 2,
        "background": ["sky"] * 2,
    }
    asked = [{"shape": "star", "colour": "red"}, {"shape": "star", "colour": "blue"}]
    assert suite.count(shapes, ["named"] * 2, asked, seen, ("star",)) == {"named": (1, 2)}
    assert suite.count(shapes, ["base"] * 2, [{}, {}], seen, ("star", "red")) == {"base": (3, 4)}
    assert suite.count(shapes, ["control"] * 2, [{"shape": "heart"}] * 2, seen, ()) == {
        "control": (0, 2)
    }
    assert suite.count(shapes, ["other"] * 2, asked, seen, ()) == {
        "shape": (1, 2),
        "colour": (1, 2),
        "caption": (1, 2),
    }

    counts = suite.count(shapes, ["other"] * 2, asked, seen, ("heart",))
    assert counts["near"] == (1, 2) and counts["far"] == (1, 2)  # shapes, and the rest


def test_shuffled_prompts_name_the_word_in_orders_that_no_caption_has():
    """The same words as a sentence has, and often a place, which never comes with a shape."""
    found = worlds.prompts(shapes, "shuffled", "star", 200, 0)
    assert all("star" in text.split() and asked["shape"] == "star" for text, asked in found)
    rng = np.random.default_rng(1)
    captions = {shapes.caption(shapes.scene(rng), rng) for _ in range(20_000)}
    new = sum(text not in captions for text, _ in found)
    assert new > 180
    places = sum(bool(set(text.split()) & set(shapes.PLACES)) for text, _ in found)
    assert 100 < places < 160  # two in three


def test_frechet_distance_by_hand():
    """Two normals: |μ − ν|² + Σ (√a − √b)² where the covariances are diagonal with a and b."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200_000, 3)) * (1, 2, 3) + (0, 1, 0)
    y = rng.standard_normal((200_000, 3)) * (2, 2, 1) + (3, 1, 0)
    assert suite.frechet(x, y) == pytest.approx(
        9 + 1 + 0 + 4, rel=0.02
    )  # 200,000 draws: the means are known to 0.01
    assert suite.frechet(x, x) == pytest.approx(0, abs=1e-6)


def test_reference_drawings_show_what_is_asked():
    asked = [{"shape": "star", "colour": "red"}, {"background": "sky"}] * 5
    seen = suite.see(shapes, suite.drawings(shapes, asked))
    assert all(
        seen[name][i] == word for i, words in enumerate(asked) for name, word in words.items()
    )
