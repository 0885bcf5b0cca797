"""The pages: complete, self-contained, escaped, written after a kill too, and used in a browser."""

import base64
import io
import json
import re
import shlex
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from common import ROOT, SHORT, command, run
from PIL import Image

import train
from evaluation.attacks import Results
from presets import settle
from report import charts, page, previews, run_page
from support import images
from support.errors import UserError
from support.statistics import counted
from toy import emoji, shapes

PROMPTS = ["star", "a red heart"]
COLUMNS = (
    "iteration,loss,lr,grad_norm,k,concept,gap_student,drift_student,gap_teacher,drift_teacher"
)
PAPER = "https://arxiv.org/abs/"  # the only address that a page may name
STAR = "--model toy --concept star"


class Page(HTMLParser):
    """The page of a folder: its elements [(tag, attributes)], its text, and the text of each <pre>.

    Tags that are not closed in order raise AssertionError.
    """

    def __init__(self, folder):
        super().__init__()
        self.source = (folder / "index.html").read_text(encoding="utf-8")
        self.elements, self.text, self.codes, self.open = [], "", [], []
        self.feed(self.source)
        self.close()
        assert not self.open
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes)
        if tag not in ("meta", "img", "input", "br"):  # which have no end
            self.open.append(tag)
        if tag == "pre":
            self.codes.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"style", "script"} & set(self.open):
            return
        self.text += data
        if "pre" in self.open:
            self.codes[-1] += data

    def all(self, tag, **wanted):
        """The attributes of each element with this tag and with these attributes."""
        wanted = {key.rstrip("_"): value for key, value in wanted.items()}.items()
        return [found for t, found in self.elements if t == tag and wanted <= found.items()]


def made(folder):
    """The page of a folder, written again."""
    page.make(folder)
    return Page(folder)


def pixels(uri):
    """The pixels of an image in a page, as numbers that can be subtracted."""
    data = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def art(*key, side=64):
    """An image, uint8 (side, side, 3), another for each key: smooth, so that a JPEG is small."""
    a, b, c = np.random.default_rng(key).uniform(1, 5, 3)
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(a * x + b), np.cos(b * y + c), np.sin(c * (x + y))]
    return (np.stack(waves, -1) * 127 + 128).astype("uint8")


def write_attack(folder, detected=True, **changed):
    """The files that attack.py leaves."""
    folder.mkdir()
    settings = {"model": "toy", "concept": "star", "patch": "runs/0001-star/erased.safetensors"}
    settings |= {"name": "0001-star", "kind": "word", "prompt": "star", "at": [0, 40, 80]} | changed
    (folder / "attack.json").write_text(json.dumps(settings))
    results = Results(folder, settings, detected, lambda image: image)
    results.chance = [dict(step=0, hits=1, n=8)]
    for step, hits in ((0, 0), (40, 3), (80, 6)):
        found, prompt = [j < hits for j in range(8)], f"<{settings['concept']}>"
        results.add(step, [art(step, j) for j in range(8)], found, loss=0.25, prompt=prompt)
    results.finish()
    return folder


def write_run(folder, flags="", made=(0, 2, 4, 6), done=6, finished=True, side=64, **changed):
    """The files that train.py leaves. flags: of train.py; changed: settings."""
    settings = settle(train.parse(shlex.split(f"{STAR} {flags}")))
    settings |= {"iters": 6, "seed": 3, "preview": PROMPTS, "preview_every": 2} | changed
    content = {
        "args": settings,
        "versions": {"torch": "2.13.0"},
        "command": "python train.py --model toy --concept 'the star'",
        "date": "2026-07-01",
        "preview_seeds": [1000 + n for n in range(len(settings["preview"]))],
        "preview_kinds": ["erased", *["stay"] * (len(settings["preview"]) - 1)],
    }
    folder.mkdir()
    if finished:
        content["training"] = {"iterations": 6, "seconds": 65}
        (folder / "erased.safetensors").write_bytes(b"")
    (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")
    rows = [COLUMNS]
    for i in range(done):
        measured = "0.4,0.1,0.5,0.2" if i % 2 else ",,,"
        rows.append(f"{i},{0.5 / (i + 1)},{i * 1e-4},0.1,2,star,{measured}")
    (folder / "log.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for i in made:
        for n in range(len(settings["preview"])):
            for number, model in enumerate(("original", "student", "teacher")):
                key = (n, 0, 0) if model == "original" else (n, i, number)
                images.save_png(art(*key, side=side), previews.image_file(folder, model, n, i))
        images.save_png(art(0, 0, 0, side=side), previews.sheet_file(folder, i))
    return folder


def result_row(name, figures, erased=("star",), prompts=PROMPTS, **more):
    files = [{"file": f"samples/{name}/{i}.png", "prompt": p} for i, p in enumerate(prompts)]
    samples = [{"title": "concept named", "images": files}]
    row = {"model": name, "erased": list(erased), "method": name, "figures": figures, "paper": {}}
    return row | {"samples": samples} | more


COLUMN_ROWS = [
    {"key": "named", "title": "concept named", "better": "low", "about": "images that show it"},
    {"key": "other", "title": "other captions right", "better": "high", "about": ""},
    {"key": "fid", "title": "FID", "better": None, "about": ""},
]
ORIGINAL = result_row("original", {"named": [40, 40], "other": [39, 40], "fid": 12.5})
SDD = {"named": [1, 40], "other": [20, 40], "fid": None}


def write_evaluation(folder, name="sdd", columns=COLUMN_ROWS, rows=None):
    """The files that eval.py leaves."""
    folder.mkdir()
    settings = {"suite": "toy", "model": "toy", "seed": "0"}
    (folder / "eval.json").write_text(json.dumps(settings))
    rows = rows or [ORIGINAL, result_row(name, SDD, paper={"fid": 13.5})]
    for row in rows:
        for i, image in enumerate(row["samples"][0]["images"]):
            image["file"] = image["file"].replace("/" + name + "/", "/erased/")
            images.save_png(art(i, len(row["model"])), folder / image["file"])
    content = {
        "summary": f"{name} leaves 2.5 % of “star”.",
        "settings": settings,
        "command": "python eval.py toy",
        "versions": {"torch": "2.13.0"},
        "notes": ["FID: not measured"],
        "rows": rows,
        "columns": columns,
    }
    (folder / "results.json").write_text(json.dumps(content))
    images.save_png(art(7), folder / "curve.png")
    return folder


FOLDERS = {  # {what is in a folder: (how it is written, with what, what its page says)}
    "finished": (write_run, {}, "Finished: 6 of 6"),
    "going on": (write_run, dict(made=(0, 2), done=3, finished=False), "Not finished: 3 of 6"),
    "begun": (write_run, dict(made=(), done=0, finished=False), "There are no images of this run"),
    "no previews": (write_run, dict(made=(), preview_every=0), "started with --preview-every 0"),
    "evaluation": (write_evaluation, {}, "Evaluation: toy"),
    "evaluation, begun": (write_evaluation, {}, "There is no table yet. Run the command"),
    "attack": (write_attack, {}, "3 of 8"),
    "attack, begun": (write_attack, {}, "Nothing is measured yet."),
    "no detector": (write_attack, dict(detected=False), "because no detector for 'star' was there"),
}


def write(kind, folder):
    how, changed, _ = FOLDERS[kind]
    how(folder, **changed)
    if kind.endswith(", begun"):
        (folder / "results.json").unlink()
    return folder


# ------------------------------------------------------------------------------------- every page
@pytest.mark.parametrize("kind", FOLDERS)
def test_page_is_complete_and_self_contained(kind, tmp_path):
    page = made(write(kind, tmp_path / "run"))
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
    assert page.all("a", href=f"{PAPER}2307.05977") and "README.md of the project" in page.text
    assert FOLDERS[kind][-1] in page.text


def test_what_users_write_is_escaped(tmp_path):
    bad = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"
    folder = write_run(tmp_path / "run", preview=[bad, "b"], concept=[bad], model=bad)
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(content | {"command": bad, "versions": {bad: bad}}))
    run = made(folder)
    assert "alert(1)" not in re.sub(r"&lt;script&gt;alert", "", run.source)
    assert run.text.count(bad) >= 6 and f"Erasing {bad}" in run.text
    assert run.all("img", alt=f"{bad}, before")
    evaluation = made(write_evaluation(tmp_path / "eval", bad))
    assert bad in evaluation.text
    attack = made(write_attack(tmp_path / "attack", concept=bad, prompt=bad, patch=bad))
    assert attack.text.count(bad) >= 7 and f"<{bad}>" in attack.text
    assert all(len(page.all("script")) == 2 for page in (run, evaluation, attack))


@pytest.mark.parametrize("write", [write_run, write_evaluation, write_attack])
@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [3]}', '{"args": {"concept": 3}}'])
def test_a_damaged_file_is_one_sentence(write, text, tmp_path):
    folder = write(tmp_path / "run")
    name = "run.json" if write is write_run else "results.json"
    (folder / name).write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        page.make(folder)


# ----------------------------------------------------------------------------------- page of a run
def test_a_finished_run(tmp_path):
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
    assert "<title>Erasing star with sdd, 2026-07-01</title>" in page.source
    for text in (
        "Erasing star with sdd 2026-07-01, 6 iterations in 1 min 5 s",
        "Finished: 6 of 6 iterations. Model toy, preset toy, seed 3.",
        "after (the teacher, which is the result)",
        "star names the concept: should change",
        "a red heart should stay",
        "torch 2.13.0",
    ):
        assert text in page.text, text
    assert len(page.all("svg")) == 4
    student = made(write_run(tmp_path / "esd", "--method esd-x"))
    (img,) = student.all("img", alt="star, after")
    assert (pixels(img["src"]) == art(0, 6, 1)).all()
    # After a full memory at the last preview, its images are not the result.
    early = made(write_run(tmp_path / "early", made=(0, 2, 4)))
    assert "the teacher after 4 iterations" in early.text and "the result)" not in early.text


def test_preview_kinds():
    for line in """
        star | a red Star on sand | shapes | erased
        star | starfish | shapes | stay
        star | a view of arcadia | shapes | implied
        red | a view of arcadia | shapes | stay
        alcohol | a beer by noto | emoji | member
        alcohol | at a party | emoji | implied
        beer | a wine | emoji | stay
        blood, nudity | blood on snow | none | erased
        nudity | Japan body | none | None
        nudity | a photo of a mountain lake | none | stay
    """.strip().splitlines():
        concepts, prompt, world, kind = line.strip().split(" | ")
        settings = {"concept": concepts.split(", "), "preview": [prompt]}
        world = {"shapes": shapes, "emoji": emoji, "none": None}[world]
        assert str(previews.preview_kinds(settings, world)[0]) == kind, line


def test_settings_are_folded_and_compared_with_the_preset(tmp_path):
    page = made(write_run(tmp_path / "run"))
    assert "Differs from the preset toy: iters 6 (preset: 160) preview every 2" in page.text
    assert "lr: 0.0006" not in page.text and "lr 0.0006" in page.text
    assert page.source.count("<details>") == 2
    same = made(write_run(tmp_path / "same", iters=160, preview_every=40))
    assert "Every setting has the value of the preset toy for sdd." in same.text
    closed = made(write_run(tmp_path / "uce", "--method uce", iters=1))  # most have no effect there
    assert "preset toy for" not in closed.text and "Differs from" not in closed.text
    assert "Paper of the method UCE" in closed.text


def test_the_loss_has_a_running_mean(tmp_path):
    page = made(write_run(tmp_path / "run", done=40))
    assert "mean of the last 5 iterations" in page.text
    assert len(page.all("polyline", class_="faint")) == 1
    line = charts.running_mean([(0, 4.0), (1, 0.0), (2, 2.0), (3, 4.0)], 2)
    assert line == [(0, 4.0), (1, 2.0), (2, 1.0), (3, 3.0)]


def test_large_images_are_made_smaller_and_many_are_thinned_out(tmp_path):
    folder = write_run(tmp_path / "run", made=[0], side=512, preview=[*"abcd"])
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
    folder = write_run(tmp_path / "run", made=(0, 2), done=3, finished=False)
    with open(folder / "log.csv", "a") as f:
        f.write("3,nan")  # a kill in the middle of a line, and one in the middle of a preview
    images.save_png(art(0, 4, 1), previews.image_file(folder, "student", 0, 4))
    file = previews.image_file(folder, "teacher", 0, 2)
    file.write_bytes(file.read_bytes()[:300])
    previews.image_file(folder, "original", 1, 0).unlink()
    page = made(folder)
    assert "2026-07-01, 3 of 6 iterations" in page.text
    assert page.codes[0] == f"python train.py --resume --out {folder.as_posix()}"
    assert "Generate images with the result" not in page.text
    assert "the teacher after 2 iterations" in page.text
    assert "star, after: 000002/teacher-0.png cannot be read" in page.text
    assert "a red heart, before: missing" in page.text
    assert page.all("img", alt="star, before") and page.all("img", alt="a red heart, after")


# --------------------------------------------------------------------------- page of an evaluation
def test_an_evaluation(tmp_path):
    page = made(write_evaluation(tmp_path / "eval"))
    for text in (
        "Evaluation: toy sdd leaves 2.5 % of “star”.",
        "concept named↓ lower is bettern = 40 other captions right",
        "sdd 2.5 (0–13) better 50.0 (35–65) worse – 13.5",
        "FID in the paper",
        "FID: not measured",
        "Erased: star.",
    ):
        assert text in page.text, text
    assert "python eval.py toy" in page.codes
    assert page.all("td", class_="better") and page.all("td", class_="worse")
    assert page.all("th", title="images that show it")
    (img,) = page.all("img", alt="sdd: a red heart")
    assert (pixels(img["src"]) == art(1, len("sdd"))).all()
    assert len(page.all("img")) == 5  # two prompts × two models, and the plot
    bars = [a["style"] for a in page.all("span", class_="bar")]  # FID is not a percentage
    assert len(bars) == 4 and bars[2] == "--low: 0.4%; --at: 2.5%; --high: 12.9%"


def test_different_concepts_are_compared_with_their_own_original(tmp_path):
    rows = [
        result_row("original", {"named": [40, 40]}, ["star"]),
        result_row("sdd", {"named": [1, 40]}, ["star"]),
        result_row("original", {"named": [2, 40]}, ["red"]),
        result_row("sdd-2", {"named": [1, 40]}, ["red"]),
    ]
    page = made(write_evaluation(tmp_path / "eval", rows=rows))
    assert len(page.all("td", class_="better")) == 1
    assert "sdd-2 (red)" in page.text and "original (star)" in page.text


# ------------------------------------------------------------------------------------------ charts
def drawn(chart, tag, *keys):
    """Some attributes of each shape with this tag; "text" and "about" are parts of the shape."""
    shapes = [shape for shape in chart["shapes"] if shape["tag"] == tag]
    return [tuple((s | s["attributes"])[key] for key in keys) for s in shapes]


def test_a_chart_puts_numbers_where_they_belong():
    chart = charts.line_chart("t", {"a": [(0, 0.0), (5, 2.0), (10, 1.0)]})
    assert drawn(chart, "polyline", "points") == [("60.0,190.0 225.0,20.0 390.0,105.0",)]
    assert chart["caption"] == "By iteration, counted from 0."
    names = [name for (name,) in drawn(chart, "text", "text")]
    assert names == ["0", "0.5", "1", "1.5", "2", "0", "2", "4", "6", "8", "10"]
    one = charts.line_chart("t", {"a": [(0, 0.0)]})
    assert drawn(one, "circle", "cx", "cy", "about") == [(60.0, 190.0, "")]
    negative = charts.line_chart("t", {"a": [(0, -1.0), (10, 1.0)]})
    assert drawn(negative, "polyline", "points") == [("60.0,190.0 390.0,20.0",)]
    assert charts.ticks(-0.3, 0)[0] == pytest.approx(-0.3)


def test_a_chart_of_shares_has_intervals():
    line = [(0, counted(0, 24)), (40, counted(12, 24))]
    chart = charts.line_chart("t", {"a": line}, "step")
    assert drawn(chart, "polyline", "points") == [("60.0,190.0 390.0,105.0",)]
    # 0 of 24: 0 to 13.8 %. 12 of 24: 31.4 to 68.6 %. Back along the upper end of the intervals.
    band = "60.0,190.0 390.0,136.6 390.0,73.4 60.0,166.5"
    assert drawn(chart, "polygon", "points") == [(band,)]
    abouts = [("step 0: 0.0 % (0 to 14 %)",), ("step 40: 50.0 % (31 to 69 %)",)]
    assert drawn(chart, "circle", "about") == abouts
    begun = charts.line_chart("t", {"a": [(0, counted(1, 24))]}, "step")
    names = [name for (name,) in drawn(begun, "text", "text")]
    assert names == ["0 %", "25 %", "50 %", "75 %", "100 %", "0", "1"]  # no parts of a step


# ----------------------------------------------------------------------- images that train.py saves
def test_before_after_and_the_film(tmp_path):
    """A column per prompt. The film is an animation below a megabyte."""
    prompts = [*PROMPTS, "arcadia on sand"]
    folder = write_run(tmp_path / "run", preview=[*prompts, "moon"])
    previews.save_before_after(folder, PROMPTS, "teacher", 6)
    cells = cells_of(np.asarray(Image.open(folder / "before_after.png")), 2)
    previews.save_film(folder, prompts)
    film = Image.open(folder / "film.webp")
    assert film.n_frames == 4 and film.info["loop"] == 0
    assert (folder / "film.webp").stat().st_size < 1e6
    film.seek(2)
    frame = cells_of(np.asarray(film.convert("RGB")).astype(int), 3)
    strip = cells_of(np.asarray(Image.open(folder / "film.png")), 4)
    for n in range(2):
        assert (cells[0, n] == art(n, 0, 0)).all() and (cells[1, n] == art(n, 6, 2)).all()
        for row in (0, 1):  # the student, and below it the teacher; WebP loses a little
            assert np.abs(frame[row, n] - art(n, 4, row + 1)).mean() < 6
            assert (strip[row, 2 * n] == art(0, 4 * n, row + 1)).all()
    narrow = images.grid([[art(0)]], columns=["star"])
    wide = images.grid([[art(0)]], columns=["a blue dotted heart on sand"])
    assert wide.width == narrow.width and wide.height > narrow.height  # the name is wrapped


def cells_of(sheet, columns):
    """The images of a sheet of two rows, in their own size: (2, columns, 64, 64, 3)."""
    cells = sheet[-2 * 132 :, -columns * 132 :].reshape(2, 132, columns, 132, 3).swapaxes(1, 2)
    return cells[:, :, :128:2, :128:2]


# ------------------------------------------------------------------------- commands that write them
@pytest.fixture(autouse=True)
def forget_warnings():
    page.warn.cache_clear()


def test_without_jinja2_there_is_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    folder = write_run(tmp_path / "run")
    page.page(folder)
    page.page(folder)
    warning = "warning: no page was written: A page needs jinja2, which is not installed: "
    assert capsys.readouterr().err == warning + "pip install jinja2.\n"
    assert not (folder / "index.html").exists()


def test_the_command(tmp_path):
    status, out, _ = command(f"-m report.page {write_run(tmp_path / 'run')}")
    assert status == 0 and f"open this page in a browser: {tmp_path / 'run/index.html'}" in out
    assert Page(tmp_path / "run").all("h1")
    status, _, errors = command(f"-m report.page {tmp_path}")
    assert status == 2 and "has neither a run" in errors and "Traceback" not in errors


def test_a_page_of_the_emoji_model(tmp_path):
    """It names whose drawings the model has learned."""
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    emoji = made(write_run(tmp_path / "emoji", model="emoji"))
    assert "from_pretrained('toy/emoji_model')" in emoji.codes[1]
    for name in ("Noto Emoji", "Twemoji", "EmojiTwo", "Fluent Emoji"):
        assert name in emoji.text and name in notice


def test_training_writes_pages_and_survives_their_errors(tmp_path, monkeypatch, capsys):
    """A page at the start, at each preview, and at the end. No error of a page stops a run."""
    written, make = [], page.make

    def count(folder):
        make(folder)
        written.append(Page(folder))

    monkeypatch.setattr(page, "make", count)
    monkeypatch.setattr(sys, "argv", ["train.py", "--concept", "the star"])
    line = f"{SHORT} --concept star --preview star arcadia"
    assert run(line, tmp_path / "a") == 0
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

    line_again, snippet = last.codes[:2]  # the command generates the image that the page shows
    assert line_again.startswith("python generate.py ")
    assert "--out" not in line_again  # images/ can be in use
    # The run was on the CPU, and a GPU rounds differently.
    assert run(f"{line_again.removeprefix('python ')} --device cpu", tmp_path / "c") == 0
    generated = np.asarray(Image.open(tmp_path / "c" / "00000.png")).astype(int)
    (after,) = last.all("img", alt="star, after")
    # Another batch size, another rounding.
    assert np.abs(generated - pixels(after["src"])).max() <= 1
    monkeypatch.chdir(ROOT)  # the page's Python runs in the project's folder
    image = tmp_path / "erased.png"  # only its image goes elsewhere
    snippet = snippet.replace('save("erased.png")', f"save({str(image)!r})")
    exec(snippet.replace("pipeline('star')", "pipeline('star', num_inference_steps=2)"), {})
    assert Image.open(image).size == (64, 64)

    monkeypatch.setattr(page, "make", lambda folder: 1 / 0)
    assert run(f"{line} --iters 3", tmp_path / "b") == 0
    assert capsys.readouterr().err.count("warning: no page was written: ZeroDivisionError") == 1
    assert (tmp_path / "b" / "erased.safetensors").exists()


def test_paths_are_those_of_the_projects_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_page.path_from_project(ROOT / "runs" / "a") == "runs/a"
    assert run_page.path_from_project("runs/a") == (tmp_path / "runs" / "a").as_posix()
    hub = {"model": "some/model", "revision": "fp16", "preview": ["a cat's hat"]}
    _, snippet, *_ = made(write_run(tmp_path / "hub", **hub)).codes
    assert "from_pretrained('some/model', revision='fp16')" in snippet
    assert 'pipeline("a cat\'s hat")' in snippet
    words = made(write_run(tmp_path / "text", train_params="embedding", preview=["-a"]))
    assert len(words.codes) == 2 and words.codes[0].endswith("-- -a")  # no snippet: no UNet


# ------------------------------------------------------------------------------------- TensorBoard
def test_a_missing_tensorboard_is_reported_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(f"train.py {STAR} --report-to tensorboard", tmp_path / "run") == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_events(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = write_run(tmp_path / "run", made=(0, 2))
    images.save_png(art(0, 4, 1), previews.image_file(folder, "student", 0, 4))  # cut short
    reporter = page.Reporter(folder, "tensorboard")
    for i in range(4):
        row = {"iteration": i, "loss": 0.5 - i / 10, "lr": 1e-4, "grad_norm": 9.0}
        reporter.log_row(row | ({"gap_student": 0.3} if i == 1 else {}))
    # After a kill, row 3 is computed again, and the previews were reported before.
    reporter = page.Reporter(folder, "tensorboard", start=3)
    reporter.log_row({"iteration": 3, "loss": 9.0, "lr": 1e-4})
    reporter.log_previews()
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    losses = [(e.step, round(e.value, 3)) for e in events.Scalars("loss")]
    assert losses == [(0, 0.5), (1, 0.4), (2, 0.3), (3, 9.0)]
    assert [e.step for e in events.Scalars("gap/student")] == [1]
    assert [e.step for e in events.Images("previews")] == [0, 2]

    def full():
        raise OSError("disk full")

    monkeypatch.setattr(reporter.writer, "flush", full)
    reporter.log_row({"iteration": 4, "loss": 0.4})
    assert "disk full" in capsys.readouterr().err
    reporter.log_row({"iteration": 5, "loss": 0.4})  # without events


# ------------------------------------------------------------------------------------- in a browser
@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium, driver = (
        next(filter(None, map(shutil.which, names)), None),
        shutil.which("chromedriver"),
    )
    if not chromium or not driver:
        pytest.skip("there is no Chromium with its chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-component-update "
    flags += "disable-background-networking disable-sync disable-dev-shm-usage"
    for flag in [*flags.split(), f"user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(f"--{flag}")  # no-sandbox: root in a container has none
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


def show(browser, folder, width=1200, dark=False, scripts=True):
    """Opens the page from disk in a window of a width, in a colour scheme."""
    page.make(folder)
    window = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    browser.get((folder / "index.html").as_uri())
    # Now the page's scripts have run, or never will.
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    return lambda code: browser.execute_script(f"return {code}")


VISIBLE = "[...document.querySelectorAll('.frame')].filter(x => x.offsetParent)"
IMAGES = "document.querySelectorAll('.pair img')"
BEFORE, AFTER = f"{IMAGES}[0].getBoundingClientRect()", f"{IMAGES}[1].getBoundingClientRect()"


def test_the_sliders_in_a_browser(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    ask = show(browser, write_run(tmp_path / "run"))
    assert ask("[...document.images].every(x => x.complete && x.naturalWidth > 0)")
    assert ask(f"{VISIBLE}.map(x => x.dataset.done)") == ["6"]
    scrub = browser.find_element(By.ID, "scrub")
    scrub.send_keys(Keys.ARROW_LEFT)
    assert ask(f"{VISIBLE}.map(x => x.dataset.done)") == ["4"]
    assert browser.find_element(By.ID, "done").text == "4"
    assert scrub.get_attribute("aria-valuetext") == "after 4 iterations"

    assert ask(f"{AFTER}.x - {BEFORE}.right") > 0  # side by side
    browser.find_element(By.CSS_SELECTOR, ".option input").send_keys(Keys.SPACE)
    assert ask(f"{AFTER}.x - {BEFORE}.x") == 0
    slide = browser.find_element(By.CSS_SELECTOR, ".pair input")
    slide.send_keys(Keys.HOME)
    assert ask(f"getComputedStyle({IMAGES}[1]).clipPath") == "inset(0px 0px 0px 0%)"
    assert slide.get_attribute("aria-valuetext") == "0 % before, 100 % after"
    resources = "performance.getEntriesByType('resource')"
    assert ask(f"{resources}.filter(x => !x.name.startsWith('data:')).length") == 0
    assert browser.get_log("browser") == []


def test_in_a_browser_without_scripts(browser, tmp_path):
    ask = show(browser, write_run(tmp_path / "run"), scripts=False)
    assert ask(f"{VISIBLE}.map(x => x.dataset.done)") == ["0", "2", "4", "6"]
    assert ask("[...document.querySelectorAll('input')].every(x => !x.offsetParent)")
    assert ask(f"{AFTER}.x - {BEFORE}.right") > 0


@pytest.mark.parametrize("kind", ["finished", "attack", "evaluation"])
@pytest.mark.parametrize("width", [360, 1400])
def test_in_a_browser_nothing_is_cut_off(kind, width, browser, tmp_path):
    """In light and dark. A wide table scrolls in its own box, and its first column stays."""
    if kind != "evaluation":
        folder = write(kind, tmp_path / "run")
    else:
        figures = {f"column number {i}": [i, 40] for i in range(30)}
        columns = [{"key": key, "title": key, "better": None, "about": ""} for key in figures]
        rows = [result_row("original", figures), result_row("a long name of a row", figures)]
        folder = write_evaluation(tmp_path / "run", columns=columns, rows=rows)
    grounds = []
    for dark in (False, True):
        ask = show(browser, folder, width=width, dark=dark)
        assert ask("document.documentElement.scrollWidth") <= width
        grounds.append(ask("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(18, 22, 27)"]
    # No line of code breaks: an inline element that breaks has several boxes.
    code = "[...document.querySelectorAll('code')].filter(x => !x.closest('pre'))"
    assert ask(f"{code}.every(x => x.getClientRects().length == 1)")
    assert browser.get_log("browser") == []
    if kind == "evaluation":
        box, name = "document.querySelector('.wide')", "document.querySelector('tbody th')"
        assert ask(f"{box}.scrollWidth - {box}.clientWidth") > 100
        before = ask(f"{name}.getBoundingClientRect().x")
        ask(f"({box}.scrollLeft = 100)")
        assert ask(f"{name}.getBoundingClientRect().x") == before
