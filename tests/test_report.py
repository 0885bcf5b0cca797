"""The page of a run: whole, self-contained, escaped, there after a kill too, and used in a real browser where there is one."""

import base64
import html
import io
import json
import re
import shlex
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from test_commands import SHORT, run

import generate
import presets
import train
from report import page as report_page
from support import images
from support.errors import UserError

PROMPTS = ["star", "a red heart"]
COLUMNS = (
    "iteration,loss,lr,grad_norm,k,concept,gap_student,drift_student,gap_teacher,drift_teacher"
)
VOID = {"meta", "img", "input", "line", "br", "link", "hr"}  # of HTML and, as <line/>, of SVG
FOREIGN = {"circle", "polyline"}


def art(*key, side=64):
    """A picture, uint8 (side, side, 3), another for each key: smooth, so that a JPEG is small."""
    a, b, c = np.random.default_rng(key).uniform(1, 5, 3)
    y, x = np.mgrid[:side, :side] / side
    return (
        np.stack([np.sin(a * x + b), np.cos(b * y + c), np.sin(c * (x + y))], -1) * 127 + 128
    ).astype("uint8")


def write_run(
    folder, previews=(0, 2, 4, 6), done=6, finished=True, side=64, prompts=PROMPTS, **changed
):
    """What train.py leaves."""
    a = {
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
        "loss": None,
    } | changed
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "args": a,
        "versions": {"torch": "2.13.0"},
        "command": "python train.py --model toy --concept 'the star'",
        "preview_seeds": [1000 + n for n in range(len(prompts))],
    }
    (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")
    rows = [
        f"{i},{0.5 / (i + 1)},{i * 1e-4},0.1,2,star," + ("0.4,0.1,0.5,0.2" if i % 2 else ",,,")
        for i in range(done)
    ]
    (folder / "log.csv").write_text("\n".join([COLUMNS, *rows]) + "\n", encoding="utf-8")
    for i in previews:
        rows = [
            [art(n, 0 if column == 0 else i, column, side=side) for column in range(3)]
            for n in range(len(prompts))
        ]
        images.save_png(
            images.grid(rows, prompts, ["original", "student", "teacher"]),
            folder / "previews" / f"{i:06d}.png",
        )
    if finished:
        rows = [[art(n, 0, 0, side=side), art(n, 9, 9, side=side)] for n in range(len(prompts))]
        images.save_png(
            images.grid(rows, prompts, ["before", "after"]), folder / "before_after.png"
        )
        (folder / "erased.safetensors").write_bytes(b"")
    return folder


def write_evaluation(folder, name="sdd"):
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps({"suite": "toy", "seed": "0"}))
    content = {
        "settings": {"suite": "toy", "seed": "0"},
        "command": "python eval.py toy",
        "rows": [],
    }
    (folder / "results.json").write_text(json.dumps(content))
    table = [
        "| model | erased | named (n ≤ 4) |",
        "| --- | --- | --- |",
        "| original | – | 100.0 (51–100) |",
        f"| {name} | star | 0.0 (0–49) |",
    ]
    (folder / "table.md").write_text(
        "\n".join([*table, "", "FID: not measured\n"]), encoding="utf-8"
    )
    images.save_png(images.grid([[art(1), art(2)]], ["named"]), folder / "original.png")
    return folder


class Page(HTMLParser):
    """A page's elements [(tag, attributes)] and text; tags that are not closed in order raise AssertionError."""

    def __init__(self, folder):
        super().__init__()
        self.source, self.elements, self.text, self.open = (
            (folder / "index.html").read_text(encoding="utf-8"),
            [],
            "",
            [],
        )
        self.feed(self.source)
        self.close()
        assert not self.open
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes)
        self.open += [tag] * (tag not in VOID)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID | FOREIGN
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if not {"style", "script"} & set(self.open) else ""

    def all(self, tag, **wanted):
        return [
            a
            for t, a in self.elements
            if t == tag and all(a.get(key.rstrip("_")) == value for key, value in wanted.items())
        ]


def pixels(uri):
    return np.asarray(
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
    ).astype(int)


def made(folder):
    report_page.make(folder)
    return Page(folder)


FOLDERS = {
    "finished": lambda folder: write_run(folder),
    "going on": lambda folder: write_run(folder, (0, 2), 3, finished=False),
    "begun": lambda folder: write_run(folder, (), 0, finished=False),
    "no previews": lambda folder: write_run(folder, (), preview_every=0),
    "evaluation": write_evaluation,
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_page_is_whole_and_self_contained(kind, tmp_path):
    page = made(FOLDERS[kind](tmp_path / "run"))
    assert not re.search(
        r"https?:|//[\w.]+/|url\(|@import|<link|<iframe",
        re.sub(r"base64,[\w+/=]+", "", page.source),
    )
    for tag, a in page.elements:
        addresses = [a[key] for key in ("src", "href") if key in a]
        assert all(
            x.startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#"))
            for x in addresses
        ), (tag, a)
        assert not any(key.startswith("on") or key == "srcset" for key in a)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert (
        len(set(ids)) == len(ids)
        and page.all("html", lang="en")
        and page.all("title")
        and page.all("main")
    )
    assert all(a["aria-labelledby"] in ids for _, a in page.elements if "aria-labelledby" in a)
    assert all(a.get("alt", "").strip() for a in page.all("img")) and all(
        a.get("aria-label") for a in page.all("svg")
    )
    labelled = {a["for"] for a in page.all("label")}
    assert all(a.get("aria-label") or a.get("id") in labelled for a in page.all("input"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert (
        levels[0] == 1
        and levels.count(1) == 1
        and all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    )


def test_a_finished_run_shows_its_pictures(tmp_path):
    page = made(write_run(tmp_path / "run"))
    for n, prompt in enumerate(PROMPTS):
        for alt, picture in (
            ("before", art(n, 0, 0)),
            ("after", art(n, 9, 9)),
            ("student after 4 iterations", art(n, 4, 1)),
            ("teacher after 2 iterations", art(n, 2, 2)),
        ):
            (img,) = page.all("img", alt=f"{prompt}, {alt}")
            assert (pixels(img["src"]) == picture.repeat(2, 0).repeat(2, 1)).all(), (
                alt
            )  # grid shows 64 pixels as 128
    assert [a["data-done"] for a in page.all("div") if "data-done" in a] == ["0", "2", "4", "6"]
    command = "python train.py --model toy --concept 'the star'"
    for text in (
        "Finished: 6 of 6",
        "--patch",
        "erased.safetensors",
        command,
        "seed 3",
        "torch2.13.0",
    ):
        assert text in page.text, text
    assert len(page.all("svg")) == 4
    assert (
        "loss: 0.5 at iteration 0, 0.0833 at iteration 5, between 0.0833 and 0.5"
        in page.all("svg")[0]["aria-label"]
    )


def test_large_pictures_are_made_smaller_and_many_are_thinned_out(tmp_path):
    folder = write_run(tmp_path / "run", [0], side=512, prompts=[*"abcd"])
    for i in range(4, 240, 4):
        shutil.copy(folder / "previews" / "000000.png", folder / "previews" / f"{i:06d}.png")
    page = made(folder)
    shown = [int(a["data-done"]) for a in page.all("div") if "data-done" in a]
    assert (
        len(shown) == report_page.FRAMES
        and shown[0] == 0
        and shown[-1] == 236
        and "40 of 60 previews" in page.text
    )
    (before,) = page.all("img", alt="a, before")
    assert pixels(before["src"]).shape == (512, 512, 3) and before["src"].startswith(
        "data:image/jpeg"
    )
    assert pixels(page.all("img", alt="a, student after 0 iterations")[0]["src"]).shape == (
        256,
        256,
        3,
    )
    assert len(page.source) < 5e6


def test_a_sheet_of_another_layout_is_shown_whole(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    images.save_png(art(5, side=127), folder / "previews" / "000004.png")
    (img,) = made(folder).all("img", alt="previews after 4 iterations")
    assert pixels(img["src"]).shape == (127, 127, 3)


def test_what_users_write_is_escaped(tmp_path):
    bad = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"
    folder = write_run(tmp_path / "run", prompts=[bad, "b"], concept=[bad], model=bad)
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(content | {"command": bad, "versions": {bad: bad}}))
    page = made(folder)
    assert "alert(1)" not in re.sub(
        r"&lt;script&gt;alert|\\u003cscript\\u003ealert", "", page.source
    )
    assert (
        page.text.count(bad) >= 8 and f"Erasing {bad}" in page.text and len(page.all("script")) == 2
    )
    assert page.all("img", alt=f"{bad}, before")
    page = made(write_evaluation(tmp_path / "eval", bad))
    assert bad in page.text and len(page.all("script")) == 2


def test_a_run_that_was_cut_short_has_a_page(tmp_path):
    folder = write_run(tmp_path / "run", (0, 2), 3, finished=False)
    with open(folder / "log.csv", "a") as f:
        f.write("3,0.00")  # a kill in the middle of a line, and one in the middle of a picture
    (folder / "previews" / "000004.tmp.png").write_bytes(b"half")
    page = made(folder)
    assert (
        "Not finished: 4 of 6" in page.text
        and "--resume" in page.text
        and "Draw with the result" not in page.text
    )
    assert "the student after 2 iterations" in page.text and page.all("img", alt="star, after")


def test_damaged_files_are_said_and_the_rest_is_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    for file in (folder / "before_after.png", folder / "previews" / "000006.png"):
        file.write_bytes(file.read_bytes()[:300])
    (folder / "log.csv").write_text(f"{COLUMNS}\n0,nan,0,,,,,,,\n\0\0\n1,0.25,inf,,,,,,,\nx\n")
    page = made(folder)
    assert (
        "before_after.png cannot be read" in page.text and "000006.png cannot be read" in page.text
    )
    assert (
        "previews after 6 iterations: missing" in page.text
        and "the student after 4 iterations" in page.text
    )
    assert len(page.all("svg")) == 2 and page.all("svg")[0]["aria-label"].startswith(
        "Loss. loss: 0.25 at iteration 1"
    )
    for text in ('{"args": [', "[]", '{"args": 3, "versions": {}}'):
        (folder / "run.json").write_text(text)
        assert made(folder).all("h1")
    evaluation = write_evaluation(tmp_path / "eval")
    (evaluation / "results.json").write_text("{")
    (evaluation / "table.md").unlink()
    page = made(evaluation)
    assert "results.json cannot be read" in page.text and "no table yet" in page.text


def test_an_evaluation_shows_table_and_sheets(tmp_path):
    page = made(write_evaluation(tmp_path / "eval"))
    assert "original – 100.0 (51–100)" in page.text.replace("–100.0", "– 100.0").replace(
        "original–", "original –"
    )
    assert (
        len(page.all("th", scope="row")) == 4
        and len(page.all("th", scope="col")) == 3
        and "FID: not measured" in page.text
    )
    assert (
        page.all("img", alt="plot or sample pictures: original")
        and "python eval.py toy" in page.text
    )


def test_a_chart_puts_figures_where_they_belong():
    chart = report_page.chart("t", {"a": [(0, 0.0), (5, 2.0), (10, 1.0)]})
    assert (
        chart["lines"][0]["points"] == "60.0,190.0 225.0,20.0 390.0,105.0"
        and chart["averaged"] == 1
    )
    assert [name for _, name in chart["x"]] == ["0", "2", "4", "6", "8", "10"]
    assert [name for _, name in chart["y"]] == ["0", "0.5", "1", "1.5", "2"]
    long = report_page.chart(
        "t", {"a": [(i, 1.0 + i % 2) for i in range(4000)]}
    )  # means of 1.5, the curve's top
    assert (
        long["averaged"] == 10
        and long["lines"][0]["points"].count(",20.0") == 400
        and "between 1 and 2" in long["said"]
    )
    assert report_page.chart("t", {"a": [(0, 0.0)]})["lines"][0]["one"] == ["60.0", "190.0"]


def contrast(a, b):
    """WCAG 2.2's contrast ratio of two colours #rgb or #rrggbb."""
    light = []
    for text in (a, b):
        digits = text[1:] if len(text) == 7 else "".join(2 * c for c in text[1:])
        x = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        light.append(
            np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
            @ [0.2126, 0.7152, 0.0722]
            + 0.05
        )
    return max(light) / min(light)


def test_text_can_be_read_in_light_and_dark(tmp_path):
    source = made(write_run(tmp_path / "run")).source
    schemes = [
        dict(re.findall(r"--(\w+): (#\w+)", block))
        for block in re.findall(r":root \{(.*?)\}", source)
    ]
    assert len(schemes) == 2 and contrast("#000", "#ffffff") == pytest.approx(21)
    for colours in schemes:
        pairs = [
            (colours[ink], colours[ground])
            for ink in ("ink", "soft", "one", "two")
            for ground in ("paper", "card")
        ]
        assert min(contrast(*pair) for pair in pairs) >= 4.5
    assert not re.search(
        r"transition|animation|@keyframes|scroll-behavior", source
    )  # nothing moves by itself


# ------------------------------------------------------------------------------------------------ what goes wrong
@pytest.fixture(autouse=True)
def unwarned():
    report_page.warn.cache_clear()


def test_without_jinja2_there_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    folder = write_run(tmp_path / "run")
    report_page.page(folder), report_page.page(folder)
    said = "warning: no page was written: A page needs jinja2, which is not installed: pip install jinja2.\n"
    assert capsys.readouterr().err == said  # once
    assert not (folder / "index.html").exists()


def test_a_page_is_there_whole_or_as_it_was(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run")
    (folder / "index.html").write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    report_page.page(folder)
    assert "disk full" in capsys.readouterr().err and (folder / "index.html").read_text() == "old"
    assert not list(folder.glob("*.tmp*"))


def test_command(tmp_path, capsys):
    parse = type("Arguments", (), {})()
    parse.folder = tmp_path
    assert report_page.main(parse) == 2 and "holds neither a run" in capsys.readouterr().err
    parse.folder = write_run(tmp_path / "run")
    assert (
        report_page.main(parse) == 0
        and "index.html is written" in capsys.readouterr().out
        and Page(parse.folder).all("h1")
    )


def test_training_writes_pages_and_outlives_them(tmp_path, monkeypatch, capsys):
    """A page at the start, at each preview, and at the end; with the command; and none of them can stop a run."""
    written, make = [], report_page.make

    def count(folder):
        make(folder)
        written.append(Page(folder))

    monkeypatch.setattr(report_page, "make", count)
    monkeypatch.setattr(sys, "argv", ["train.py", "--concept", "the star"])
    words = ["--model", "toy", "--concept", "star", *SHORT, "--preview", "star", "--device", "cpu"]
    assert run(train, *words, "--out", tmp_path / "a") == 0
    assert [re.search(r"inished: (\d) of 6", page.text)[1] for page in written] == [
        "0",
        "3",
        "6",
        "6",
    ]
    assert "Finished" in written[-1].text and "Not finished" in written[2].text
    assert "python train.py --concept 'the star'" in written[0].text
    assert [len(page.all("svg")) for page in written] == [0, 4, 4, 4]
    assert "noise of the seeds 1000, one a prompt" in written[-1].text
    said = shlex.split(
        html.unescape(re.search("<pre>python (generate.py .*)</pre>", written[-1].source)[1])
    )  # draws what the page shows
    assert run(generate, *said[1:-1], tmp_path / "c") == 0
    drawn = (
        np.asarray(Image.open(tmp_path / "c" / "00000.png")).astype(int).repeat(2, 0).repeat(2, 1)
    )
    assert (
        np.abs(drawn - pixels(written[-1].all("img", alt="star, after")[0]["src"])).max() <= 1
    )  # another batch, another rounding
    monkeypatch.setattr(report_page, "make", lambda folder: 1 / 0)
    assert run(train, *words, "--out", tmp_path / "b") == 0
    assert capsys.readouterr().err.count("warning: no page was written: ZeroDivisionError") == 1
    assert (tmp_path / "b" / "erased.safetensors").exists()


# ------------------------------------------------------------------------------------------------ TensorBoard
def test_tensorboard_missing_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        presets.settle(
            train.parse(["--model", "toy", "--concept", "star", "--report-to", "tensorboard"])
        )
    assert presets.settle(train.parse(["--model", "toy", "--concept", "star"]))["report_to"] is None


class Writer:
    """What report_page.Watch uses of a SummaryWriter, remembered."""

    def __init__(self, folder, purge_step):
        self.folder, self.scalars, self.images, self.flushed = folder, [], [], 0

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def add_image(self, tag, image, step, dataformats):
        self.images.append((tag, image.shape, step, dataformats))

    def flush(self):
        self.flushed += 1


def test_events(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report_page, "summary_writer", lambda: Writer)
    folder = write_run(tmp_path / "run", (0, 2))
    (folder / "previews" / "000004.tmp.png").write_bytes(b"half")
    watch = report_page.Watch(folder, "tensorboard", 1)
    watch.row({"iteration": 1, "loss": 0.5, "lr": 1e-4, "grad_norm": 9.0})
    assert (
        watch.writer.scalars == [("loss", 0.5, 1), ("lr", 1e-4, 1)]
        and watch.writer.images == []
        and watch.writer.flushed == 1
    )
    watch.row({"iteration": 2, "loss": 0.4, "lr": 1e-4, "gap_student": 0.1, "drift_teacher": 0.2})
    assert watch.writer.scalars[-2:] == [("gap/student", 0.1, 2), ("drift/teacher", 0.2, 2)]
    watch.previews()
    assert [image[2:] for image in watch.writer.images] == [
        (2, "HWC")
    ]  # 0 was told before the kill
    monkeypatch.setattr(watch.writer, "flush", lambda: (_ for _ in ()).throw(OSError("disk full")))
    watch.row({"iteration": 3, "loss": 0.4})
    assert watch.writer is None and "disk full" in capsys.readouterr().err
    watch.row({"iteration": 4, "loss": 0.4})


def test_real_events(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = write_run(tmp_path / "run", (0, 2))
    watch = report_page.Watch(folder, "tensorboard")
    for i in range(4):
        watch.row(
            {"iteration": i, "loss": 0.5 - i / 10, "lr": 1e-4}
            | ({"gap_student": 0.3} if i == 1 else {})
        )
    watch = report_page.Watch(
        folder, "tensorboard", start=3
    )  # after a kill: the row 3 is made again
    watch.row({"iteration": 3, "loss": 9.0, "lr": 1e-4})
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


# ------------------------------------------------------------------------------------------------ in a browser
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


def test_in_a_browser(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    folder = write_run(tmp_path / "run")
    ask = show(browser, folder)
    assert (
        ask("[...document.images].every(x => x.complete && x.naturalWidth > 0)")
        and ask("document.images.length") == 20
    )
    assert ask(VISIBLE) == ["6"]
    scrub = browser.find_element(By.ID, "scrub")
    scrub.send_keys(Keys.ARROW_LEFT)
    assert ask(VISIBLE) == ["4"] and browser.find_element(By.ID, "done").text == "4"
    assert scrub.get_attribute("aria-valuetext") == "after 4 iterations"
    scrub.send_keys(Keys.HOME)
    assert ask(VISIBLE) == ["0"] and ask("document.activeElement.id") == "scrub"
    assert ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    slide = browser.find_element(By.CSS_SELECTOR, ".slide input")
    clip = "getComputedStyle(document.querySelector('.slide .after')).clipPath"
    assert ask(clip) == "inset(0px 0px 0px 50%)"
    slide.send_keys(Keys.HOME)
    assert (
        ask(clip) == "inset(0px 0px 0px 0%)"
        and slide.get_attribute("aria-valuetext") == "0 % before, 100 % after"
    )
    browser.execute_cdp_cmd(
        "Input.dispatchMouseEvent",
        {"type": "mousePressed", "button": "left", "clickCount": 1}
        | ask(
            "(r => ({x: r.x + r.width * 0.75, y: r.y + r.height / 3}))(arguments[0].getBoundingClientRect())",
            slide,
        ),
    )
    assert (
        70 <= float(slide.get_attribute("value")) <= 80
    )  # a finger or a mouse on the picture itself
    assert ask("document.querySelector('details').open") is False
    browser.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    assert ask("document.querySelector('details').open") is True
    assert (
        ask(
            "performance.getEntriesByType('resource').filter(x => !x.name.startsWith('data:')).length"
        )
        == 0
    )
    assert browser.get_log("browser") == []


def test_in_a_browser_without_scripts(browser, tmp_path):
    ask = show(browser, write_run(tmp_path / "run"), scripts=False)
    assert ask(VISIBLE) == ["0", "2", "4", "6"] and ask(
        "[...document.querySelectorAll('input')].every(x => !x.offsetParent)"
    )
    box = "document.querySelector('.slide {}').getBoundingClientRect()"
    assert ask(f"{box.format('.after')}.x - {box.format('img')}.right") > 0  # side by side


@pytest.mark.parametrize("kind", ["finished", "evaluation"])
def test_in_a_browser_on_a_phone_and_at_night(kind, browser, tmp_path):
    folder = FOLDERS[kind](tmp_path / "run")
    if kind == "evaluation":
        (folder / "table.md").write_text("| model |" + " 100.0 (51–100) |" * 12, encoding="utf-8")
    grounds = []
    for dark in (False, True):
        ask = show(browser, folder, width=360, dark=dark)
        assert ask("document.documentElement.scrollWidth") <= 360
        grounds.append(ask("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(18, 22, 27)"] and browser.get_log("browser") == []
