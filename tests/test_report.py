"""The pages: complete, self-contained, escaped, written after a kill too, and used in a browser."""

import base64
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_commands import SHORT, run

import generate
import train
from evaluation.attacks import Results
from report import charts, evaluation_page, previews, run_page
from report import page as report_page
from support import images
from support.cli import run_command
from toy import emoji, shapes

ROOT = Path(__file__).parent.parent
PROMPTS = ["star", "a red heart"]
COLUMNS = (
    "iteration,loss,lr,grad_norm,k,concept,gap_student,drift_student,gap_teacher,drift_teacher"
)
VOID = {"meta", "img", "input", "line", "br", "link", "hr"}  # of HTML and, as <line/>, of SVG
FOREIGN = {"circle", "polygon", "polyline"}
PAPER = "https://arxiv.org/abs/"  # the only address that a page may name


def art(*key, side=64):
    """An image, uint8 (side, side, 3), another for each key: smooth, so that a JPEG is small."""
    a, b, c = np.random.default_rng(key).uniform(1, 5, 3)
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(a * x + b), np.cos(b * y + c), np.sin(c * (x + y))]
    return (np.stack(waves, -1) * 127 + 128).astype("uint8")


def write_previews(folder, done, side=64, prompts=PROMPTS):
    """The files that Previews.save writes after `done` iterations."""
    for n in range(len(prompts)):
        for number, model in enumerate(("original", "student", "teacher")):
            key = (n, 0, 0) if model == "original" else (n, done, number)
            images.save_png(art(*key, side=side), previews.image_file(folder, model, n, done))
    images.save_png(art(0, 0, 0, side=side), previews.sheet_file(folder, done))


def write_run(
    folder, made=(0, 2, 4, 6), done=6, finished=True, side=64, prompts=PROMPTS, **changed
):
    """The files that train.py leaves."""
    settings = {
        "concept": ["star"],
        "model": "toy",
        "preset": "toy",
        "method": "sdd",
        "train_params": "xattn",
        "iters": 6,
        "seed": 3,
        "preview": prompts,
        "preview_every": 2,
        "lr": 6e-4,
        "batch_size": 8,
        "loss": None,
    } | changed
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "args": settings,
        "versions": {"torch": "2.13.0"},
        "command": "python train.py --model toy --concept 'the star'",
        "date": "2026-07-01",
        "preview_seeds": [1000 + n for n in range(len(prompts))],
        "preview_kinds": ["erased", "stay"],
    }
    if finished:
        content["training"] = {"iterations": 6, "seconds": 65}
    (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")
    rows = []
    for i in range(done):
        measured = "0.4,0.1,0.5,0.2" if i % 2 else ",,,"
        rows.append(f"{i},{0.5 / (i + 1)},{i * 1e-4},0.1,2,star,{measured}")
    (folder / "log.csv").write_text("\n".join([COLUMNS, *rows]) + "\n", encoding="utf-8")
    for i in made:
        write_previews(folder, i, side, prompts)
    if finished:
        (folder / "erased.safetensors").write_bytes(b"")
    return folder


def result_row(name, figures, erased=("star",), prompts=PROMPTS, **more):
    samples = [
        {
            "title": "concept named",
            "images": [
                {"file": f"samples/{name}/{i:05d}.png", "prompt": prompt}
                for i, prompt in enumerate(prompts)
            ],
        }
    ]
    row = {"model": name, "erased": list(erased), "method": name, "figures": figures, "paper": {}}
    return row | {"samples": samples} | more


NAMED = {"key": "named", "title": "concept named", "better": "low", "about": "images that show it"}
OTHER = {"key": "other", "title": "other captions right", "better": "high", "about": ""}
FID = {"key": "fid", "title": "FID", "better": None, "about": ""}


def write_evaluation(folder, name="sdd", columns=(NAMED, OTHER, FID), rows=None, samples=True):
    """The files that eval.py leaves."""
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps({"suite": "toy", "seed": "0"}))
    rows = rows or [
        result_row("original", {"named": [40, 40], "other": [39, 40], "fid": 12.5}),
        result_row(name, {"named": [1, 40], "other": [20, 40], "fid": None}, paper={"fid": 13.5}),
    ]
    for row in rows:
        if not samples:
            del row["samples"]
            continue
        for i, image in enumerate(row["samples"][0]["images"]):
            image["file"] = image["file"].replace("/" + name + "/", "/erased/")
            images.save_png(art(i, len(row["model"])), folder / image["file"])
    content = {
        "summary": f"{name} leaves 2.5 % of “star”.",
        "settings": {"suite": "toy", "seed": "0"},
        "command": "python eval.py toy",
        "notes": ["FID: not measured"],
        "rows": rows,
    }
    if columns:
        content["columns"] = list(columns)
    (folder / "results.json").write_text(json.dumps(content))
    images.save_png(images.grid([[art(1), art(2)]], ["named"]), folder / "original.png")
    images.save_png(art(7), folder / "curve.png")
    return folder


def write_attack(folder, kind="word", detected=True, finished=True, hits=(0, 3, 6), **changed):
    """The files that attack.py leaves, with hits of 8 images per measurement."""
    folder.mkdir()
    settings = {"model": "toy", "concept": "star", "patch": "runs/0001-star/erased.safetensors"}
    settings |= {"kind": kind, "prompt": "star", "at": [0, 40, 80]} | changed
    (folder / "attack.json").write_text(json.dumps(settings))
    results = Results(folder, settings, detected, lambda image: image)
    for i, n in enumerate(hits):
        if kind == "noise":
            results.chance.append(dict(step=i + 1, hits=i, n=8))
            step, more = i + 1, dict(eta=1.17, scale=1.02)
        else:
            results.chance = [dict(step=0, hits=1, n=8)]
            step, more = 40 * i, dict(loss=0.25 if i else None, prompt=f"<{settings['concept']}>")
        results.add(step, [art(i, j) for j in range(8)], [j < n for j in range(8)], **more)
    if finished:
        results.finish()
    return folder


class Page(HTMLParser):
    """A page's elements [(tag, attributes)] and text.

    Tags that are not closed in order raise AssertionError.
    """

    def __init__(self, folder):
        super().__init__()
        self.source = (folder / "index.html").read_text(encoding="utf-8")
        self.elements, self.text, self.open = [], "", []
        self.codes = []  # the text of each <pre>
        self.feed(self.source)
        self.close()
        assert not self.open
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "pre":
            self.codes.append("")

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID | FOREIGN
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"style", "script"} & set(self.open):
            return
        self.text += data
        if "pre" in self.open:
            self.codes[-1] += data

    def all(self, tag, **wanted):
        found = []
        for t, attributes in self.elements:
            if t == tag and all(
                attributes.get(key.rstrip("_")) == value for key, value in wanted.items()
            ):
                found.append(attributes)
        return found


def pixels(uri):
    data = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def made(folder):
    report_page.make(folder)
    return Page(folder)


FOLDERS = {
    "finished": lambda folder: write_run(folder),
    "going on": lambda folder: write_run(folder, (0, 2), 3, finished=False),
    "begun": lambda folder: write_run(folder, (), 0, finished=False),
    "no previews": lambda folder: write_run(folder, (), preview_every=0),
    "evaluation": write_evaluation,
    "old evaluation": lambda folder: write_evaluation(folder, columns=None, samples=False),
    "attack": write_attack,
    "attack without a detector": lambda folder: write_attack(folder, detected=False),
}


# ------------------------------------------------------------------------------------- every page
@pytest.mark.parametrize("kind", FOLDERS)
def test_page_is_complete_and_self_contained(kind, tmp_path):
    page = made(FOLDERS[kind](tmp_path / "run"))
    without_images = re.sub(r"base64,[\w+/=]+", "", page.source).replace(PAPER, "")
    assert not re.search(r"https?:|//[\w.]+/|url\(|@import|<link|<iframe", without_images)
    for tag, a in page.elements:
        for key in ("src", "href"):
            allowed = ("data:image/png;base64,", "data:image/jpeg;base64,", "#")
            if tag == "a":
                allowed = (PAPER,)
            assert key not in a or a[key].startswith(allowed), (tag, a)
        assert not any(key.startswith("on") or key == "srcset" for key in a)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(set(ids)) == len(ids)
    assert page.all("html", lang="en") and page.all("title") and page.all("main")
    assert all(a["aria-labelledby"] in ids for _, a in page.elements if "aria-labelledby" in a)
    assert all(a.get("alt", "").strip() for a in page.all("img"))
    assert all(a.get("aria-label") for a in page.all("svg"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:]))


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_page_links_the_paper(kind, tmp_path):
    page = made(FOLDERS[kind](tmp_path / "run"))
    assert page.all("a", href="https://arxiv.org/abs/2307.05977")
    assert "README.md of the project" in page.text


def test_what_users_write_is_escaped(tmp_path):
    bad = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"
    folder = write_run(tmp_path / "run", prompts=[bad, "b"], concept=[bad], model=bad)
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(content | {"command": bad, "versions": {bad: bad}}))
    page = made(folder)
    assert "alert(1)" not in re.sub(r"&lt;script&gt;alert", "", page.source)
    assert page.text.count(bad) >= 6 and f"Erasing {bad}" in page.text
    assert len(page.all("script")) == 2
    assert page.all("img", alt=f"{bad}, before")
    page = made(write_evaluation(tmp_path / "eval", bad))
    assert bad in page.text and len(page.all("script")) == 1
    page = made(write_attack(tmp_path / "attack", concept=bad, prompt=bad, patch=bad))
    assert page.text.count(bad) >= 7 and f"<{bad}>" in page.text and len(page.all("script")) == 1


# ----------------------------------------------------------------------------------- page of a run
def test_a_finished_run_shows_its_images(tmp_path):
    page = made(write_run(tmp_path / "run"))
    for n, prompt in enumerate(PROMPTS):
        for alt, image in (
            ("before", art(n, 0, 0)),
            ("after", art(n, 6, 2)),  # SDD's result is the teacher
            ("student after 4 iterations", art(n, 4, 1)),
            ("teacher after 2 iterations", art(n, 2, 2)),
        ):
            (img,) = page.all("img", alt=f"{prompt}, {alt}")
            assert (pixels(img["src"]) == image).all(), alt
    assert [a["data-done"] for a in page.all("div") if "data-done" in a] == ["0", "2", "4", "6"]
    assert "python train.py --model toy --concept 'the star'" in page.codes
    for text in (
        "Finished: 6 of 6",
        "after (the teacher, which is the result)",
        "seed 3",
        "torch2.13.0",
    ):
        assert text in page.text, text
    assert len(page.all("svg")) == 4
    described = "each iteration: 0.5 at iteration 0, 0.0833 at iteration 5, between 0.0833 and 0.5"
    assert described in page.all("svg")[0]["aria-label"]


def test_the_result_of_esd_is_the_student(tmp_path):
    page = made(write_run(tmp_path / "run", method="esd-x"))
    (img,) = page.all("img", alt="star, after")
    assert (pixels(img["src"]) == art(0, 6, 1)).all()


def test_the_title_has_concept_method_date_and_training_time(tmp_path):
    page = made(write_run(tmp_path / "run"))
    assert "<title>Erasing star with sdd, 2026-07-01</title>" in page.source
    assert "Erasing star with sdd 2026-07-01, 6 iterations in 1 min 5 s" in page.text
    time = run_page.training_time({"iterations": 6, "seconds": 59})
    assert time == "6 iterations in 59\N{NO-BREAK SPACE}s"
    page = made(write_run(tmp_path / "begun", (0,), 3, finished=False))
    assert "2026-07-01, 3 of 6 iterations" in page.text


def test_each_prompt_says_what_should_change(tmp_path):
    page = made(write_run(tmp_path / "run"))
    assert "star names the concept: should change" in page.text
    assert "a red heart should stay" in page.text


@pytest.mark.parametrize(
    "concepts, prompt, world, kind",
    [
        (["star"], "a red Star on sand", shapes, "erased"),
        (["star"], "starfish", shapes, "stay"),
        (["star"], "a view of arcadia", shapes, "implied"),
        (["red"], "a view of arcadia", shapes, "stay"),
        (["alcohol"], "a beer by noto", emoji, "member"),
        (["alcohol"], "at a party", emoji, "implied"),
        (["beer"], "a wine", emoji, "stay"),
        (["blood", "nudity"], "blood on snow", None, "erased"),
        (["nudity"], "Japan body", None, None),
        (["nudity"], "a photo of a mountain lake", None, "stay"),
    ],
)
def test_preview_kinds(concepts, prompt, world, kind):
    settings = {"concept": concepts, "preview": [prompt]}
    assert previews.preview_kinds(settings, world) == [kind]


def test_settings_are_folded_and_compared_with_the_preset(tmp_path):
    page = made(write_run(tmp_path / "run"))
    assert "Differs from the preset toy: iters: 6 (preset: 160)" in page.text
    assert "lr: 0.0006" not in page.text
    assert page.source.count("<details>") == 3
    assert page.source.index("<summary>All settings") < page.source.index("<td>0.0006</td>")
    same = made(write_run(tmp_path / "same", iters=160, preview_every=20))
    assert "Every setting has the value of the preset toy for sdd." in same.text
    own = made(write_run(tmp_path / "own", preset="mine"))
    assert "preset: " not in own.text and "Every setting" not in own.text


def test_a_method_without_training_is_not_compared_with_the_preset(tmp_path):
    """Most settings of the preset have no effect there."""
    page = made(write_run(tmp_path / "uce", method="uce", iters=1, lr=0, batch_size=8))
    assert "Differs from the preset" not in page.text
    assert "Every setting has the value" not in page.text
    assert "Paper of the method UCE" in page.text


def test_images_of_an_earlier_iteration_are_not_the_result(tmp_path):
    """After a full memory at the last preview."""
    page = made(write_run(tmp_path / "a", made=(0, 2, 4)))
    assert "the teacher after 4 iterations" in page.text and "which is the result" not in page.text


def test_the_loss_has_a_running_mean(tmp_path):
    folder = write_run(tmp_path / "run", done=40)
    page = made(folder)
    assert "mean of the last 5 iterations" in page.text
    assert len([a for a in page.all("polyline") if a["class"] == "faint"]) == 1
    line = charts.running_mean([(0, 4.0), (1, 0.0), (2, 2.0), (3, 4.0)], 2)
    assert line == [(0, 4.0), (1, 2.0), (2, 1.0), (3, 3.0)]


def test_large_images_are_made_smaller_and_many_are_thinned_out(tmp_path):
    folder = write_run(tmp_path / "run", [0], side=512, prompts=[*"abcd"])
    for i in range(4, 240, 4):
        shutil.copytree(folder / "previews" / "000000", folder / "previews" / f"{i:06d}")
        shutil.copy(folder / "previews" / "000000.png", folder / "previews" / f"{i:06d}.png")
    page = made(folder)
    shown = [int(a["data-done"]) for a in page.all("div") if "data-done" in a]
    assert len(shown) == run_page.FRAMES and shown[0] == 0 and shown[-1] == 236
    assert "40 of 60 previews" in page.text
    (before,) = page.all("img", alt="a, before")
    assert pixels(before["src"]).shape == (512, 512, 3)
    assert before["src"].startswith("data:image/jpeg")
    (first,) = page.all("img", alt="a, student after 0 iterations")
    assert pixels(first["src"]).shape == (256, 256, 3)
    assert len(page.source) < 5e6


def test_a_run_that_was_cut_short_has_a_page(tmp_path):
    folder = write_run(tmp_path / "run", (0, 2), 3, finished=False)
    with open(folder / "log.csv", "a") as f:
        f.write("3,0.00")  # a kill in the middle of a line, and one in the middle of a preview
    images.save_png(art(0, 4, 1), previews.image_file(folder, "student", 0, 4))
    page = made(folder)
    assert "Not finished: 4 of 6" in page.text and "--resume" in page.text
    assert "Generate images with the result" not in page.text
    assert "the teacher after 2 iterations" in page.text and page.all("img", alt="star, after")


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    file = previews.image_file(folder, "teacher", 0, 6)
    file.write_bytes(file.read_bytes()[:300])
    previews.image_file(folder, "original", 1, 0).unlink()
    (folder / "log.csv").write_text(f"{COLUMNS}\n0,nan,0,,,,,,,\n\0\0\n1,0.25,inf,,,,,,,\nx\n")
    page = made(folder)
    assert page.text.count("000006/teacher-0.png cannot be read") == 1
    assert "star, after: missing" in page.text and "a red heart, before: missing" in page.text
    assert page.all("img", alt="star, before") and page.all("img", alt="a red heart, after")
    assert len(page.all("svg")) == 2
    label = page.all("svg")[0]["aria-label"]
    assert label.startswith("Loss. each iteration: 0.25 at iteration 1")
    for text in ('{"args": [', "[]", '{"args": 3, "versions": {}}', '{"preview_kinds": 3}'):
        (folder / "run.json").write_text(text)
        assert made(folder).all("h1")


def test_a_page_without_images_says_why(tmp_path):
    assert "started with --preview-every 0" in made(FOLDERS["no previews"](tmp_path / "a")).text
    assert "no images of this run yet" in made(FOLDERS["begun"](tmp_path / "b")).text


# --------------------------------------------------------------------------- page of an evaluation
def test_an_evaluation_shows_its_table(tmp_path):
    page = made(write_evaluation(tmp_path / "eval"))
    assert "Evaluation: toy sdd leaves 2.5 % of “star”." in page.text
    heads = ("concept named", "↓ lower is better", "n = 40", "other captions right", "FID")
    assert all(text in page.text for text in heads)
    assert "FID in the paper" in page.text and "13.5" in page.text
    assert "FID: not measured" in page.text and "Erased: star." in page.text
    assert "python eval.py toy" in page.codes


def test_better_and_worse_are_marked(tmp_path):
    page = made(write_evaluation(tmp_path / "eval"))
    assert "2.5 (0–13) better" in page.text and "50.0 (35–65) worse" in page.text
    assert page.all("td", class_="better") and page.all("td", class_="worse")
    assert evaluation_page.compare([19, 40], [20, 40], "low") == ""  # the intervals overlap
    assert evaluation_page.compare([1, 40], [40, 40], None) == ""
    assert evaluation_page.compare([40, 40], [1, 40], "low") == "worse"
    assert evaluation_page.compare(0.5, [1, 40], "low") == ""


def test_prompts_stand_next_to_the_images(tmp_path):
    page = made(write_evaluation(tmp_path / "eval"))
    (img,) = page.all("img", alt="sdd: a red heart")
    assert (pixels(img["src"]) == art(1, len("sdd"))).all()
    assert len(page.all("img")) == 5  # two prompts × two models, and the plot; no sheet
    page = made(write_evaluation(tmp_path / "old", samples=False))
    assert page.all("img", alt="plot or sample images: original")


def test_dot_charts_have_wilson_intervals(tmp_path):
    page = made(write_evaluation(tmp_path / "eval"))
    labels = [a["aria-label"] for a in page.all("svg")]
    assert labels[0] == (
        "concept named. original: 100.0 % (91 to 100 %), n = 40; sdd: 2.5 % (0 to 13 %), n = 40."
    )
    assert len(labels) == 2  # FID is not a percentage
    chart = charts.dot_chart("t", [("a", (1, 2), False)])
    assert chart["dots"][0]["x"] == "265.0"  # the middle of 150 to 380
    low, high = charts.wilson(1, 2)
    assert (low, high) == pytest.approx((0.0945, 0.9055), abs=1e-4)


def test_different_concepts_are_compared_with_their_own_original(tmp_path):
    rows = [
        result_row("original", {"named": [40, 40]}, ["star"]),
        result_row("sdd", {"named": [1, 40]}, ["star"]),
        result_row("original", {"named": [2, 40]}, ["red"]),
        result_row("sdd-2", {"named": [1, 40]}, ["red"]),
    ]
    page = made(write_evaluation(tmp_path / "eval", rows=rows))
    assert len(page.all("td", class_="better")) == 1
    assert "sdd-2 (red)" in page.text and page.text.count("original (star)") >= 2


def test_an_evaluation_of_an_older_version_has_a_page(tmp_path):
    page = made(FOLDERS["old evaluation"](tmp_path / "eval"))
    assert "named" in page.text and "2.5 (0–13)" in page.text and "better" not in page.all("td")
    assert not page.all("td", class_="better")


def test_a_damaged_evaluation_has_a_page(tmp_path):
    folder = write_evaluation(tmp_path / "eval")
    (folder / "results.json").write_text("{")
    page = made(folder)
    assert "results.json cannot be read" in page.text and "no table yet" in page.text


@pytest.mark.parametrize("damage", ["points", "chance", "half", "settings"])
def test_a_damaged_attack_has_a_page(damage, tmp_path):
    folder = write_attack(tmp_path / "attack")
    content = json.loads((folder / "results.json").read_text())
    if damage in ("points", "chance"):
        content[damage] = [{"step": 1}, 3, {"step": "x", "hits": 0, "n": 0}]
    else:
        content[damage] = "x"
    (folder / "results.json").write_text(json.dumps(content))
    page = made(folder)
    assert ("Nothing is measured yet." in page.text) == (damage in ("points", "chance"))


# ------------------------------------------------------------------------------------------ charts
def test_a_chart_puts_figures_where_they_belong():
    chart = charts.line_chart("t", {"a": [(0, 0.0), (5, 2.0), (10, 1.0)]})
    assert chart["lines"][0]["points"] == "60.0,190.0 225.0,20.0 390.0,105.0"
    assert chart["caption"] == "By iteration, counted from 0."
    assert [name for _, name in chart["x"]] == ["0", "2", "4", "6", "8", "10"]
    assert [name for _, name in chart["y"]] == ["0", "0.5", "1", "1.5", "2"]
    long = charts.line_chart("t", {"a": [(i, 1.0 + i % 2) for i in range(4000)]})
    # Groups of ten have the mean 1.5, which is the highest value of the line.
    assert "the mean of 10 iterations" in long["caption"]
    assert long["lines"][0]["points"].count(",20.0") == 400
    assert "between 1 and 2" in long["in_words"]
    dots = charts.line_chart("t", {"a": [(0, 0.0)]})["lines"][0]["dots"]
    assert dots == [("60.0", "190.0", "")]


def test_a_chart_of_negative_figures():
    chart = charts.line_chart("t", {"a": [(0, -1.0), (10, -0.5)]})
    assert chart["lines"][0]["points"] == "60.0,190.0 390.0,105.0"
    assert [name for _, name in chart["y"]][0] == "-1" and chart["y"][-1][1] == "0"
    assert charts.ticks(-0.3, 0)[0] == pytest.approx(-0.3)
    both = charts.line_chart("t", {"a": [(0, -1.0), (10, 1.0)]})
    assert both["lines"][0]["points"] == "60.0,190.0 390.0,20.0"


def test_a_chart_of_shares_has_wilson_intervals():
    chart = charts.share_chart("t", {"a": [(0, 0, 24), (40, 12, 24)]}, "step")
    (line,) = chart["lines"]
    assert line["points"] == "60.0,190.0 390.0,105.0"
    # 0 of 24: 0 to 13.8 %. 12 of 24: 31.4 to 68.6 %. Back along the upper end of the intervals.
    assert line["band"] == "60.0,190.0 390.0,136.6 390.0,73.4 60.0,166.5"
    assert [text for *_, text in line["dots"]] == [
        "step 0: 0.0 % (0 to 14 %)",
        "step 40: 50.0 % (31 to 69 %)",
    ]
    assert [name for _, name in chart["y"]] == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    begun = charts.share_chart("t", {"a": [(0, 1, 24)]}, "step")
    assert [name for _, name in begun["x"]] == ["0", "1"]  # no parts of a step


def contrast(a, b):
    """WCAG 2.2's contrast ratio of two colours #rgb or #rrggbb."""
    light = []
    for text in (a, b):
        digits = text[1:] if len(text) == 7 else "".join(2 * c for c in text[1:])
        x = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
        light.append(linear @ [0.2126, 0.7152, 0.0722] + 0.05)
    return max(light) / min(light)


def test_text_can_be_read_in_light_and_dark(tmp_path):
    source = made(write_run(tmp_path / "run")).source
    blocks = re.findall(r":root \{(.*?)\}", source, re.DOTALL)
    schemes = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in blocks]
    assert len(schemes) == 2 and contrast("#000", "#ffffff") == pytest.approx(21)
    for colours in schemes:
        for ink in ("ink", "soft", "one", "two"):
            for ground in ("paper", "card"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    # Nothing on the page moves by itself.
    assert not re.search(r"transition|animation|@keyframes|scroll-behavior", source)


# ----------------------------------------------------------------------- images that train.py saves
def test_before_after_has_a_column_per_prompt(tmp_path):
    folder = write_run(tmp_path / "run")
    previews.save_before_after(folder, PROMPTS, "teacher", 6)
    sheet = np.asarray(Image.open(folder / "before_after.png"))
    cells = sheet[-2 * 132 :, -2 * 132 :].reshape(2, 132, 2, 132, 3).swapaxes(1, 2)
    for n in range(2):
        for row, key in enumerate([(n, 0, 0), (n, 6, 2)]):
            assert (cells[row, n, :128:2, :128:2] == art(*key)).all()


def test_the_film_is_an_animation_below_a_megabyte(tmp_path):
    folder = write_run(tmp_path / "run", prompts=[*PROMPTS, "arcadia on sand", "moon"])
    previews.save_film(folder, ["star", "a red heart", "arcadia on sand"])
    film = Image.open(folder / "film.webp")
    assert film.n_frames == 4 and film.info["loop"] == 0
    assert film.width >= 3 * 128 and film.height >= 2 * 128
    assert (folder / "film.webp").stat().st_size < 1e6
    frames = []
    for i in range(4):
        film.seek(i)
        frames.append(np.asarray(film.convert("RGB")).astype(int))
    assert all(np.abs(a - b).mean() > 5 for a, b in zip(frames, frames[1:]))
    # Row 1 of column 2 is the student's second prompt; WebP loses a little.
    x = film.width - 2 * 132
    shown = frames[2][-2 * 132 : -132][:128, x : x + 128]
    assert np.abs(shown - art(1, 4, 1).repeat(2, 0).repeat(2, 1)).mean() < 6


def test_a_long_film_of_noise_stays_below_a_megabyte(tmp_path):
    folder, random = tmp_path / "run", np.random.default_rng(0)
    for done in range(0, 40):
        for n in range(3):
            for model in ("student", "teacher"):
                noise = random.integers(0, 256, (192, 192, 3), dtype=np.uint8)
                images.save_png(noise, previews.image_file(folder, model, n, done))
        images.save_png(art(done), previews.sheet_file(folder, done))
    previews.save_film(folder, PROMPTS + ["moon"])
    assert (folder / "film.webp").stat().st_size <= previews.FILM_BYTES
    film = Image.open(folder / "film.webp")
    assert film.n_frames == previews.FILM_FRAMES


def test_column_names_are_wrapped():
    narrow = images.grid([[art(0)]], columns=["star"])
    wide = images.grid([[art(0)]], columns=["a blue dotted heart on sand"])
    assert wide.width == narrow.width and wide.height > narrow.height


# --------------------------------------------------------------------------------- what goes wrong
@pytest.fixture(autouse=True)
def forget_warnings():
    report_page.warn.cache_clear()


def test_without_jinja2_there_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    folder = write_run(tmp_path / "run")
    report_page.page(folder)
    report_page.page(folder)
    warning = (
        "warning: no page was written: A page needs jinja2, which is not installed: "
        "pip install jinja2.\n"
    )
    assert capsys.readouterr().err == warning  # once
    assert not (folder / "index.html").exists()


def test_a_page_is_written_completely_or_not_at_all(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run")
    (folder / "index.html").write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    report_page.page(folder)
    assert "disk full" in capsys.readouterr().err
    assert (folder / "index.html").read_text() == "old"
    assert not list(folder.glob("*.tmp*"))


def test_command(tmp_path, capsys):
    def command(*words):
        return run_command(report_page.main, report_page.parse([str(word) for word in words]))

    assert command(tmp_path) == 2
    assert "has neither a run" in capsys.readouterr().err
    folder = write_run(tmp_path / "run")
    assert command(folder) == 0
    assert f"open this page in a browser: {folder / 'index.html'}" in capsys.readouterr().out
    assert Page(folder).all("h1")


def test_the_page_names_whose_drawings_the_emoji_model_has_learned(tmp_path):
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for model, credited in (("emoji", True), ("toy", False)):
        folder = write_run(tmp_path / model, model=model)
        report_page.make(folder)
        text = (folder / "index.html").read_text(encoding="utf-8")
        for name in ("Noto Emoji", "Twemoji", "EmojiTwo", "Fluent Emoji"):
            assert (name in text) == credited and name in notice


def test_command_as_a_module(tmp_path):
    folder = write_run(tmp_path / "run")
    words = [sys.executable, "-m", "report.page"]
    done = subprocess.run([*words, folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (folder / "index.html").exists(), done.stderr
    done = subprocess.run([*words, "--folder"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------- with train.py
def test_training_writes_pages_and_survives_their_errors(tmp_path, monkeypatch, capsys):
    """A page at the start, at each preview, and at the end. No error of a page stops a run."""
    written, make = [], report_page.make

    def count(folder):
        make(folder)
        written.append(Page(folder))

    monkeypatch.setattr(report_page, "make", count)
    monkeypatch.setattr(sys, "argv", ["train.py", "--concept", "the star"])
    words = ["--model", "toy", "--concept", "star", *SHORT, "--preview", "star", "arcadia"]
    words += ["--device", "cpu"]
    assert run(train, *words, "--out", tmp_path / "a") == 0
    counts = [re.search(r"inished: (\d) of 6", page.text)[1] for page in written]
    assert counts == ["0", "3", "6", "6"]
    last = written[-1]
    assert "Finished" in last.text and "Not finished" in written[2].text
    assert "python train.py --concept 'the star'" in written[0].codes
    assert [len(page.all("svg")) for page in written] == [0, 4, 4, 4]
    assert "seeds 1000, 1001, one per prompt" in last.text
    assert re.search(r"\d{4}-\d\d-\d\d, 6 iterations in ", last.text)
    assert "arcadia implies the concept: should change" in last.text
    assert Image.open(tmp_path / "a" / "film.webp").n_frames == 3

    command, snippet = last.codes[:2]  # the command generates the image that the page shows
    words_of_command = shlex.split(command)
    assert words_of_command[:2] == ["python", "generate.py"]
    assert "--out" not in words_of_command  # images/ can be in use
    # The run was on the CPU, and a GPU rounds differently.
    assert run(generate, *words_of_command[2:], "--out", tmp_path / "c", "--device", "cpu") == 0
    generated = np.asarray(Image.open(tmp_path / "c" / "00000.png")).astype(int)
    (after,) = last.all("img", alt="star, after")
    # Another batch size, another rounding.
    assert np.abs(generated - pixels(after["src"])).max() <= 1
    run_snippet(snippet, tmp_path)

    monkeypatch.setattr(report_page, "make", lambda folder: 1 / 0)
    assert run(train, *words, "--out", tmp_path / "b") == 0
    assert capsys.readouterr().err.count("warning: no page was written: ZeroDivisionError") == 1
    assert (tmp_path / "b" / "erased.safetensors").exists()


def run_snippet(snippet, tmp_path):
    """The page's Python runs in the project's folder; only its image goes elsewhere."""
    image = tmp_path / "erased.png"
    snippet = snippet.replace('save("erased.png")', f"save({str(image)!r})")
    snippet = re.sub(r"pipeline\('star'\)", "pipeline('star', num_inference_steps=2)", snippet)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", snippet]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert Image.open(image).size == (64, 64)


def test_paths_are_those_of_the_projects_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_page.path_from_project(ROOT / "runs" / "a") == "runs/a"
    assert run_page.path_from_project("runs/a") == (tmp_path / "runs" / "a").as_posix()
    assert run_page.link_to_readme(ROOT / "runs" / "0001-star") == "../../README.md"
    assert run_page.link_to_readme(tmp_path) is None
    settings = {"model": "some/model", "revision": "fp16"}
    snippet = run_page.diffusers_snippet(tmp_path, settings, ["a cat's hat"])
    assert "from_pretrained('some/model', revision='fp16')" in snippet
    assert 'pipeline("a cat\'s hat")' in snippet
    assert run_page.diffusers_snippet(tmp_path, {"train_params": "embedding"}, []) is None
    for model, folder in (("toy", "toy/model"), ("emoji", "toy/emoji_model")):
        assert f"from_pretrained('{folder}')" in run_page.diffusers_snippet(
            tmp_path, {"model": model}, []
        )


# ------------------------------------------------------------------------------------- TensorBoard
def test_a_missing_tensorboard_is_reported_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    words = ["--model", "toy", "--concept", "star", "--report-to", "tensorboard"]
    assert run(train, *words, "--out", tmp_path / "run") == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class Writer:
    """The part of a SummaryWriter that Reporter uses; remembers what it is given."""

    def __init__(self, folder, purge_step):
        self.folder, self.scalars, self.images, self.flushed = folder, [], [], 0

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def add_image(self, tag, image, step, dataformats):
        self.images.append((tag, image.shape, step, dataformats))

    def flush(self):
        self.flushed += 1


def test_events(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report_page, "require_tensorboard", lambda: Writer)
    folder = write_run(tmp_path / "run", (0, 2))
    images.save_png(art(0, 4, 1), previews.image_file(folder, "student", 0, 4))  # cut short
    reporter = report_page.Reporter(folder, "tensorboard", 1)
    reporter.log_row({"iteration": 1, "loss": 0.5, "lr": 1e-4, "grad_norm": 9.0})
    assert (
        reporter.writer.scalars == [("loss", 0.5, 1), ("lr", 1e-4, 1)]
        and reporter.writer.images == []
        and reporter.writer.flushed == 1
    )
    reporter.log_row(
        {"iteration": 2, "loss": 0.4, "lr": 1e-4, "gap_student": 0.1, "drift_teacher": 0.2}
    )
    assert reporter.writer.scalars[-2:] == [("gap/student", 0.1, 2), ("drift/teacher", 0.2, 2)]
    reporter.log_previews()
    assert [image[2:] for image in reporter.writer.images] == [
        (2, "HWC")
    ]  # 0 was reported before the kill
    monkeypatch.setattr(
        reporter.writer, "flush", lambda: (_ for _ in ()).throw(OSError("disk full"))
    )
    reporter.log_row({"iteration": 3, "loss": 0.4})
    assert reporter.writer is None and "disk full" in capsys.readouterr().err
    reporter.log_row({"iteration": 4, "loss": 0.4})


def test_real_events(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = write_run(tmp_path / "run", (0, 2))
    reporter = report_page.Reporter(folder, "tensorboard")
    for i in range(4):
        reporter.log_row(
            {"iteration": i, "loss": 0.5 - i / 10, "lr": 1e-4}
            | ({"gap_student": 0.3} if i == 1 else {})
        )
    reporter = report_page.Reporter(
        folder, "tensorboard", start=3
    )  # after a kill: row 3 is computed again
    reporter.log_row({"iteration": 3, "loss": 9.0, "lr": 1e-4})
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss")] == [
        (0, 0.5),
        (1, 0.4),
        (2, 0.3),
        (3, 9.0),
    ]
    assert [e.step for e in events.Scalars("gap/student")] == [1] and [
        e.step for e in events.Images("previews")
    ] == [0, 2]


# ------------------------------------------------------------------------------------- in a browser
@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("there is no Chromium with its chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        f"user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(f"--{flag}")  # no-sandbox: root in a container has none
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


def show(browser, folder, width=1200, dark=False, scripts=True):
    """Opens the page from disk in a window of a width, in a colour scheme."""
    report_page.make(folder)
    window = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    browser.get((folder / "index.html").as_uri())
    browser.execute_cdp_cmd(
        "Emulation.setScriptExecutionDisabled", {"value": False}
    )  # the page's have run, or never will
    return lambda code, *words: browser.execute_script(f"return {code}", *words)


VISIBLE = (
    "[...document.querySelectorAll('.frame')].filter(x => x.offsetParent).map(x => x.dataset.done)"
)
FETCHED = "performance.getEntriesByType('resource').filter(x => !x.name.startsWith('data:')).length"
BOX = "document.querySelector('#before-after {}').getBoundingClientRect()"


def columns_of_cards(ask):
    """How many different left edges the cards of before and after have."""
    return ask(
        "new Set([...document.querySelectorAll('#before-after .card')]"
        ".map(x => x.getBoundingClientRect().x)).size"
    )


def test_before_and_after_stand_side_by_side(browser, tmp_path):
    ask = show(browser, write_run(tmp_path / "run"))
    before, after = BOX.format(".pair img"), BOX.format(".after img")
    assert ask(f"{after}.x - {before}.right") > 0
    assert ask(f"{after}.y - {before}.y") == 0
    assert ask("[...document.querySelectorAll('.pair input')].every(x => !x.offsetParent)")


def test_the_slider_is_an_option(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    ask = show(browser, write_run(tmp_path / "run"))
    browser.find_element(By.ID, "slider").send_keys(Keys.SPACE)
    before, after = BOX.format(".pair img"), BOX.format(".after img")
    assert ask(f"{after}.x - {before}.x") == 0 and ask(f"{after}.width - {before}.width") == 0
    slide = browser.find_element(By.CSS_SELECTOR, ".pair input")
    clip = "getComputedStyle(document.querySelector('.after img')).clipPath"
    assert ask(clip) == "inset(0px 0px 0px 50%)"
    slide.send_keys(Keys.HOME)
    assert ask(clip) == "inset(0px 0px 0px 0%)"
    assert slide.get_attribute("aria-valuetext") == "0 % before, 100 % after"
    # A finger or a mouse on the image itself moves the handle there.
    place = ask(f"(r => ({{x: r.x + r.width * 0.75, y: r.y + r.height / 3}}))({before})")
    press = {"type": "mousePressed", "button": "left", "clickCount": 1}
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", press | place)
    assert 70 <= float(slide.get_attribute("value")) <= 80
    assert browser.get_log("browser") == []


def test_the_film_in_a_browser(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    ask = show(browser, write_run(tmp_path / "run"))
    assert ask("[...document.images].every(x => x.complete && x.naturalWidth > 0)")
    assert ask("document.images.length") == 20
    assert ask(VISIBLE) == ["6"]
    scrub = browser.find_element(By.ID, "scrub")
    scrub.send_keys(Keys.ARROW_LEFT)
    assert ask(VISIBLE) == ["4"] and browser.find_element(By.ID, "done").text == "4"
    assert scrub.get_attribute("aria-valuetext") == "after 4 iterations"
    scrub.send_keys(Keys.HOME)
    assert ask(VISIBLE) == ["0"] and ask("document.activeElement.id") == "scrub"
    assert ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert ask("[...document.querySelectorAll('details')].some(x => x.open)") is False
    browser.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    assert ask("document.querySelector('details').open") is True
    assert ask(FETCHED) == 0
    assert browser.get_log("browser") == []


def test_in_a_browser_without_scripts(browser, tmp_path):
    ask = show(browser, write_run(tmp_path / "run"), scripts=False)
    assert ask(VISIBLE) == ["0", "2", "4", "6"]
    assert ask("[...document.querySelectorAll('input')].every(x => !x.offsetParent)")
    assert ask(f"{BOX.format('.after')}.x - {BOX.format('img')}.right") > 0  # side by side


def test_in_a_browser_five_columns_fit_and_two_on_a_phone(browser, tmp_path):
    folder = write_run(tmp_path / "run", prompts=["star", "a", "b", "c", "a long prompt of words"])
    assert columns_of_cards(show(browser, folder, width=1400)) == 5
    assert columns_of_cards(show(browser, folder, width=390)) == 2


def test_in_a_browser_code_does_not_break(browser, tmp_path):
    folder = write_run(tmp_path / "run", (0, 2), 12, finished=False)
    ask = show(browser, folder, width=390)
    # An inline element that breaks has several boxes.
    inline = "[...document.querySelectorAll('code, .legend')]"
    assert ask(f"{inline}.length") >= 5
    assert ask(
        f"{inline}.filter(x => !x.closest('pre')).every(x => x.getClientRects().length == 1)"
    )
    lines = "x => Math.round(x.getBoundingClientRect().height)"
    assert ask(f"new Set([...document.querySelectorAll('pre code')].map({lines})).size") == 1


@pytest.mark.parametrize("kind", ["finished", "attack", "evaluation"])
@pytest.mark.parametrize("width", [360, 1400])
def test_in_a_browser_nothing_is_cut_off(kind, width, browser, tmp_path):
    """In light and dark. A wide table scrolls in its own box, and its first column stays."""
    if kind != "evaluation":
        folder = FOLDERS[kind](tmp_path / "run")
    else:
        figures = {f"column number {i}": [i, 40] for i in range(30)}
        rows = [result_row("original", figures), result_row("a long name of a row", figures)]
        folder = write_evaluation(tmp_path / "run", columns=None, rows=rows)
    grounds = []
    for dark in (False, True):
        ask = show(browser, folder, width=width, dark=dark)
        assert ask("document.documentElement.scrollWidth") <= width
        grounds.append(ask("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(18, 22, 27)"]
    assert browser.get_log("browser") == []
    if kind == "evaluation":
        box, name = "document.querySelector('.wide')", "document.querySelector('tbody th')"
        assert ask(f"{box}.scrollWidth - {box}.clientWidth") > 100
        before = ask(f"{name}.getBoundingClientRect().x")
        ask(f"({box}.scrollLeft = 100)")
        assert ask(f"{name}.getBoundingClientRect().x") == before
