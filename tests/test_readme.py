"""The documents: every command and every snippet runs, links lead somewhere, numbers agree."""

import importlib.util
import os
import re
import runpy
import shlex
import sys

import pytest
import torch
from common import ROOT, SD_WORDS, write_model_folder

from evaluation import own_row
from evaluation.suites import COUNTRIES

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
BLOCK = re.compile(r"^```.*?^```", re.M | re.S)
CODE = re.compile(r"^```.*?^```|`[^`]+`|<!--.*?-->", re.M | re.S)
SHORT = {  # flags that make a command short
    "train.py": "--iters 2 --warmup 1 --steps 1 --preview-every 2 --preview-steps 1",
    "generate.py": "--steps 1",
    "eval.py": "--limit 1 --steps 1",
    "attack.py": "--at 0 1 --samples 2 --num-images 2 --steps 1",
    "-m tools.convert": "",
    "-m report.page": "",
    "minimal.py": "",
}


def code_blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(texts):
    """The commands `python …` of some pages, each once, in their order."""
    found = []
    for text in texts:
        for line in "\n".join(code_blocks("sh", text)).splitlines():
            found += re.split(r" && ", line.strip())
        found += re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
    found = [line for line in dict.fromkeys(found) if re.match(r"python \S", line)]
    return [line for line in found if "…" not in line]


def split(line):
    """(script, its words): `python -m tools.convert --out x` gives ("-m tools.convert", [...])."""
    words = shlex.split(line)[1:]
    if words[0] == "-m":
        return f"-m {words[1]}", words[2:]
    return words[0], words[1:]


def call(script, words):
    """Runs a script or module of the project as `python` would, in this process."""
    argv, sys.argv = sys.argv, [script, *words]
    try:
        with torch.enable_grad():
            if script == "minimal.py":
                text = (ROOT / script).read_text(encoding="utf-8")
                exec(text.replace("ITERS = 160", "ITERS = 2").replace("steps=12", "steps=2"), {})
            elif script.startswith("-m "):
                runpy.run_module(script[3:], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as e:
        return e.code or 0
    finally:
        sys.argv = argv
        torch.use_deterministic_algorithms(False)
    return 0


def shortened(script, words, model):
    """The words of a command that runs in seconds; `model` stands in for Stable Diffusion."""
    words = [str(model) if word == "FOLDER" else word for word in words]
    words = [word.replace(":NAME", ":sdd_loss") for word in words]
    if "losses.py:sdd_loss" in words:
        words[words.index("losses.py:sdd_loss")] = f"{ROOT / 'losses.py'}:sdd_loss"
    if {"--help", "--resume"} & set(words) or script in ("-m report.page", "minimal.py"):
        return words
    if script == "eval.py" and "--loss" in words:  # it trains, attacks and measures
        flags = "--iters 2 --warmup 0 --steps 1 --batch-size 2"
        return [*words, "--limit", "1", "--train-flags", flags]
    closed_form = "uce" in words  # it has no loop, and rejects the flags of one
    words += ["--preview-steps", "1"] if closed_form else SHORT[script].split()
    if not {"toy", "--model", "--patch"} & set(words):  # a patch names its model
        words += ["--model", str(model)]
    if script != "-m tools.convert" and "--device" not in words:
        words += ["--device", "cpu"]
    if "forgetful.safetensors" in words and "--patch" not in words:
        words += ["--tokenizer", str(model / "tokenizer")]  # the default is on the hub
    if "ablate" in words:
        words += ["--anchor-images", "2"]
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reader's folder: the toy model is there, and what the commands write."""
    path = tmp_path_factory.mktemp("reader")
    os.symlink(ROOT / "toy", path / "toy")
    (own_loss,) = (block for block in code_blocks("python") if "def l1_loss" in block)
    (path / "my_loss.py").write_text(own_loss, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model in Stable Diffusion's layout, which stands in for it."""
    words = [*SD_WORDS, "body", *" ".join(COUNTRIES).lower().split()]
    return write_model_folder(tmp_path_factory.mktemp("model") / "sd", words=words)


@pytest.fixture(scope="module")
def results(folder, model):
    """{command: exit status} of the README's commands."""
    return run_all(commands([README]), folder, model)


def run_all(lines, folder, model):
    """{command: exit status}: the commands, cut short, one after the other, in one folder."""
    before = os.getcwd()
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        # eval.py --loss starts commands of its own, two at a time. Here they run in this process,
        # one after the other, and attacks are short.
        short = "--samples 2 --num-images 2 --steps 1".split()
        patch.setattr(own_row, "AT", {"word": (0, 1)})

        async def command(script, *words):
            call(script, [*map(str, words), *(short if script == "attack.py" else [])])

        patch.setattr(own_row, "command", command)
        os.chdir(folder)
        try:
            for line in lines:
                script, given = split(line)
                if script in SHORT:
                    found[line] = call(script, shortened(script, given, model))
        finally:
            os.chdir(before)
    return found


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # runpy, after our imports
def test_every_command_runs(results, folder):
    assert {line: status for line, status in results.items() if status} == {}
    scripts = {split(line)[0] for line in results}
    assert {"train.py", "generate.py", "eval.py", "attack.py"} <= scripts
    assert (folder / "runs/alcohol/index.html").exists()
    tables = [file.read_text() for file in folder.glob("tables/*/table.md")]
    assert any("| l1_loss |" in table for table in tables)


def test_every_snippet_runs(results, folder, monkeypatch):
    """In the folder where the commands have run."""
    monkeypatch.chdir(folder)
    for block in code_blocks("python"):
        block = block.replace("seeds=[0, 1]", "seeds=[0, 1], steps=1")
        exec(block.replace('"a party")', '"a party", num_inference_steps=1)'), {})
    for file in re.findall(r'save\("([^"]+)"\)', README):
        assert (folder / file).exists()


def test_minimal_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert call("minimal.py", []) == 0
    assert (folder / "before.png").read_bytes() != (folder / "after.png").read_bytes()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # runpy, after our imports
def test_every_command_of_the_other_pages_runs(results, folder, model):
    """After those of the README, because they use its results."""
    lines = [line for line in commands(TEXTS.values()) if line not in results]
    found = run_all(lines, folder, model)
    assert {line: status for line, status in found.items() if status} == {}


@pytest.mark.parametrize("line", commands(TEXTS.values()))
def test_every_command_of_all_pages_is_understood(line):
    """Its file and its flags exist."""
    script, words = split(line)
    name = script.removeprefix("-m ").removesuffix(".py")
    if name == "pytest":
        assert all((ROOT / word).is_file() for word in words if "/" in word)
        return
    file = ROOT / f"{name.replace('.', '/')}.py"
    assert file.is_file() or script.startswith("-m ") and importlib.util.find_spec(name)
    if file.is_file() and "def parse(" in file.read_text(encoding="utf-8"):
        if "--help" not in words:
            importlib.import_module(name).parse(words)


def test_set_up():
    """The first line with pytest sets up everything by itself: .ci/run runs it."""
    lines = README.splitlines()
    line = next(line for line in lines if "-m pytest" in line)
    assert line.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install -r ")
    assert line.endswith(" && python -m pytest")
    torch_pin = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.M)[0]
    assert any(f"pip install {torch_pin} " in line and "whl/cpu" in line for line in lines)
    for text in TEXTS.values():
        for name in re.findall(r"requirements[-\w]*\.txt", text):
            assert (ROOT / name).is_file(), name


def table_rows(text):
    """{first cell: [the other cells]} of the Markdown tables in a text."""
    rows = {}
    for line in text.splitlines():
        if line.startswith("| "):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[name] = cells
    return rows


def test_the_results_are_those_of_the_results_page():
    """The README's columns are figures of the table of all methods, the last one rounded."""
    section = TEXTS["docs/results.md"].split("\n## Which method")[1].split("\n## ")[0]
    full = table_rows(section)
    columns = []
    titles = ("concept named", "concept implied", "other captions right", "steps until a new word")
    for wanted in titles:
        columns += [i for i, title in enumerate(full["model"]) if title.startswith(wanted)]
    shown = {name: cells for name, cells in table_rows(README).items() if name in full}
    del shown["model"]
    assert len(columns) == 4 and {"original", "sdd"} < shown.keys()
    for name, cells in shown.items():
        found = [full[name][i].split()[0] for i in columns]
        assert cells[:3] == found[:3], name
        assert cells[3] == (found[3] if found[3] == "never" else f"{float(found[3]):.0f}"), name


def heading_anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    anchors = set()
    for heading in re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchors.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return anchors


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    text = CODE.sub("", TEXTS[page])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in heading_anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_nothing_disappears_in_markdown(page):
    """Words in <angle brackets> outside of code are taken for HTML and not shown."""
    assert re.findall(r"<[a-z/][^>]*>", CODE.sub("", TEXTS[page])) == []
