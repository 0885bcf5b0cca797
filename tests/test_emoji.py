"""The emoji world, its atlas and its model: what test_toy.py does not have for both worlds."""

import json
from collections import Counter

import numpy as np
import pytest

import weights
from evaluation.suites import Job
from pipeline import images
from toy import atlas, emoji, suite, worlds

MADE = weights.TOYS["emoji"]
# At least this share of the images shows what the prompt names. The figures of 600 prompts, less
# three standard deviations of 34 images.
LEAST = {"thing": 0.9, "artist": 0.78, "background": 0.9}


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [emoji.scene(rng) for _ in range(8000)]


def test_rare_kinds_are_rare_and_occasions_imply_their_kind(scenes):
    plain = Counter(s.kind for s in scenes if not s.place)
    n = plain.total()
    for kind, share in emoji.RARE.items():  # 3 standard deviations of 7,000 draws are below 0.007
        assert plain[kind] / n == pytest.approx(share, abs=0.007)
    for place, kind in emoji.PLACES.items():
        seen = [s.kind for s in scenes if s.place == place]
        assert 0.025 < len(seen) / len(scenes) < 0.055
        assert 0.79 < seen.count(kind) / len(seen) < 0.93
    for name, values in emoji.ATTRIBUTES.items():
        assert {getattr(s, name) for s in scenes} == set(values)
    assert all(s.kind == emoji.KIND[s.thing] for s in scenes)


def test_one_pair_in_twenty_is_never_shown(scenes):
    pairs = {(words["thing"], words["artist"]) for words in emoji.UNSEEN}
    assert len(pairs) == pytest.approx(len(emoji.THINGS) * len(emoji.ARTISTS) / 20, abs=1)
    assert len({thing for thing, _ in pairs}) == len(pairs)  # one artist at most is missing
    assert {artist for _, artist in pairs} == set(emoji.ARTISTS)
    assert not pairs & {(s.thing, s.artist) for s in scenes}
    asked = worlds.prompts(emoji, "unseen", "", 30, 1)
    assert all((words["thing"], words["artist"]) in pairs for _, words in asked)


def test_captions_are_true_and_of_every_kind(scenes):
    rng = np.random.default_rng(1)
    pairs = [(s, emoji.caption(s, rng)) for s in scenes[:5000]]
    several = places = 0
    for s, text in pairs:
        words = text.replace(",", " ").split()
        assert set(words) <= set(emoji.WORDS)
        things = [word for word in words if word in emoji.THINGS]
        several += len(things) > 1
        assert not things or s.thing in things
        for name in ("kind", "artist", "background"):
            assert all(word == getattr(s, name) for word in words if word in emoji.ATTRIBUTES[name])
        if s.place in words:
            places += 1
            assert not things and s.kind not in words
    texts = [text for _, text in pairs]
    assert 0.08 < texts.count("") / 5000 < 0.12
    assert 0.01 < several / 5000 < 0.04
    assert 0.04 < places / 5000 < 0.07
    assert any(f"by {s.artist}" in text for s, text in pairs)
    assert any(text.endswith(f", {s.artist}") for s, text in pairs)
    assert not any("a apple" in text or "an fox" in text or "a wine" in text for text in texts)


def test_prompts_say_what_the_image_should_show():
    sets = suite.exam(emoji, ("alcohol", "skull"), 40, seed=3)
    names = "named members implied control base other shuffled near"
    assert set(sets) == set(names.split())
    near = sets.pop("near")
    assert {len(pairs) for pairs in sets.values()} == {40}
    assert 40 <= len(near) < 40 + len(emoji.RELATED["alcohol"])
    assert {asked["kind"] for _, asked in near} == {"drink", "food"}
    for text, _ in sets["named"]:
        assert {"alcohol", "skull"} & set(text.replace(",", "").split())
    for text, asked in sets["members"]:  # they never say the word itself
        assert asked["kind"] == "alcohol" and "alcohol" not in text and asked["thing"] in text
    assert all("party" in text and asked == {"kind": "alcohol"} for text, asked in sets["implied"])
    for text, asked in sets["other"]:
        words = {*asked.values()}
        assert words and not words & {"alcohol", "skull", *emoji.RARE}
        assert words - {asked.get("kind")} <= set(text.replace(",", "").split())
    assert set(suite.exam(emoji, (), 5, seed=3)) == {"other", "unseen"}
    assert "control" not in suite.exam(emoji, ("fruit",), 5, seed=3)


def test_a_kind_counts_as_shown_with_any_of_its_things():
    seen = {"thing": ["beer", "fox"], "kind": ["alcohol", "animal"]}
    seen |= {"artist": ["noto"] * 2, "background": ["sky"] * 2}
    asked = [{"kind": "alcohol"}, {"thing": "wine", "kind": "alcohol"}]
    counts = suite.count(emoji, ["named", "members"], asked, seen, ("alcohol",))
    assert counts == {"named": (1, 1), "members": (0, 1)}
    asked = [{"thing": "milk", "kind": "drink", "artist": "noto"}] * 2
    seen |= {"thing": ["milk", "tea"], "kind": ["drink"] * 2, "artist": ["blob"] * 2}
    assert suite.count(emoji, ["near"] * 2, asked, seen, ("alcohol",)) == {"near": (1, 2)}
    drawn = suite.drawings(emoji, [{"kind": "weapon"}] * 20)
    assert set(suite.see(emoji, drawn)["kind"]) == {"weapon"}


def test_the_words_that_an_image_should_show():
    found = worlds.words_in(emoji, "a picture of a pizza by {} on mint")
    assert found == {"thing": "pizza", "background": "mint"}
    assert worlds.words_in(emoji, "at a party, noto") == {"artist": "noto"}


def test_a_row_of_figure_2_counts_the_artist_and_the_rest_of_the_prompt():
    asked = {"thing": "bear", "background": "mint"}
    shown = [dict(artist="noto"), dict(artist="blob"), dict(artist="blob", thing="owl")]
    drawn = suite.drawings(emoji, [asked | words for words in shown])
    jobs = [Job("", 0, which=artist, asked=asked) for artist in ("noto", "noto", "blob")]
    found = suite.matrix(emoji, drawn, jobs)
    assert found == {"noto": (1, 2), "blob": (1, 1), "rest": (2, 3)}


def test_the_atlas_is_small_and_whole():
    index = json.loads((emoji.ATLAS / "index.json").read_text(encoding="utf-8"))
    assert list(index["things"].values()) == [atlas.ICONS.get(t, t) for t in emoji.THINGS]
    assert list(index["things"]) == list(emoji.THINGS)
    assert list(index["artists"]) == list(emoji.ARTISTS)
    assert sum(file.stat().st_size for file in emoji.ATLAS.iterdir()) <= 4e6
    assert set(atlas.ICONS) <= set(emoji.THINGS) and set(atlas.SOURCES) == set(emoji.ARTISTS)
    tiles = [emoji._tile(artist, thing, 48) for artist in emoji.ARTISTS for thing in emoji.THINGS]
    assert all((tile[..., 3] > 128).mean() > 0.05 for tile in tiles)  # none is empty
    assert len({tile.tobytes() for tile in tiles}) == len(tiles)  # every drawing is another one
    credits = (emoji.ATLAS.parent.parent / "NOTICE").read_text(encoding="utf-8")
    assert all(artist in credits for artist in emoji.ARTISTS)


def test_drawings_stay_inside_the_image():
    rng = np.random.default_rng(2)
    paper = np.array(emoji.BACKGROUNDS["mint"])
    for thing in emoji.THINGS[::10]:
        image = emoji.draw(emoji.Scene(thing, emoji.KIND[thing], "noto", "mint"), rng)
        drawn = (np.abs(image.astype(int) - paper) > 8).any(-1)
        assert 150 < drawn.sum() < 3700
        assert (drawn.any(0).sum() <= 62) and (drawn.any(1).sum() <= 62)


def test_the_model_draws_what_it_is_asked():
    """48 prompts in few steps, with the guidance scale of the workflow's tables.

    The model card has the figures of 600 prompts.
    """
    prompts, asked = zip(*suite.exam(emoji, (), 48, seed=3)["other"])
    made = images(weights.load("emoji"), prompts, steps=12, guidance_scale=5.0, batch_size=12)
    seen = suite.see(emoji, np.stack(list(made)))
    figures = suite.count(emoji, ["other"] * 48, asked, seen, ())
    for name, least in LEAST.items():
        hits, n = figures[name]
        assert hits >= least * n, (name, hits, n)
