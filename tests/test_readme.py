"""The documents: every command and every snippet runs, links lead somewhere, limits hold."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

import pytest
import safetensors.torch
import torch
from common import SD_WORDS, write_model_folder

import attack
import eval as evaluation
import generate
import train
import weights
from evaluation import own_row
from evaluation.suites import COUNTRIES
from tools import bench, convert

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
CODE = re.compile(r"^```.*?^```|`[^`]+`|<!--.*?-->", re.M | re.S)
SHORT = {  # flags that make a command short
    "train.py": "--iters 2 --warmup 1 --steps 2 --preview-every 2 --preview-steps 2",
    "generate.py": "--steps 2",
    "eval.py": "--limit 3 --steps 2",
    "attack.py": "--at 0 1 --samples 2 --num-images 4 --steps 2",
    "-m tools.convert": "",
    "-m report.page": "",
}


def code_blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(texts):
    """The lines `python …` of some pages, each once, in their order."""
    found = []
    for text in texts:
        in_blocks = "\n".join(code_blocks("sh", text))
        found += re.findall(r"^(python .*)$", in_blocks, re.M)
        found += re.findall(
            r"`(python [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        )
    return [line for line in dict.fromkeys(found) if "…" not in line]


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
            if script.startswith("-m "):
                runpy.run_module(script[3:], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as e:
        return e.code or 0
    finally:
        sys.argv = argv
        torch.use_deterministic_algorithms(False)
    return 0


class InThisThread:
    """In place of a pool of threads."""

    @staticmethod
    def submit(function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def shortened(script, words, model):
    """The words of a command that runs in seconds; `model` stands in for Stable Diffusion."""
    words = [str(model) if word == "FOLDER" else word for word in words]
    words = [word.replace(":NAME", ":sdd_loss") for word in words]
    if "losses.py:sdd_loss" in words:
        words[words.index("losses.py:sdd_loss")] = f"{ROOT / 'losses.py'}:sdd_loss"
    if "--help" in words or "--resume" in words or script == "-m report.page":
        return words
    if script == "eval.py" and "--loss" in words:  # it trains, attacks and measures
        flags = "--iters 2 --warmup 0 --steps 1 --batch-size 2"
        return [*words, "--limit", "1", "--train-flags", flags]
    closed_form = "uce" in words  # it has no loop, and rejects the flags of one
    words += ["--preview-steps", "2"] if closed_form else SHORT[script].split()
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
    (path / "my_loss.py").write_text(code_blocks("python")[0], encoding="utf-8")
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
    patch = pytest.MonkeyPatch()
    short = ["--at", "0", "1", "--samples", "2", "--num-images", "4", "--steps", "2"]
    patch.setattr(own_row, "ATTACKS", {"word": short})
    # eval.py --loss starts commands of its own, two at a time. Here they run in this process, one
    # after the other.
    patch.setattr(own_row, "command", lambda *words: call(words[0], [*map(str, words[1:])]))
    patch.setattr(own_row, "ThreadPoolExecutor", lambda workers: nullcontext(InThisThread))
    os.chdir(folder)
    try:
        for line in lines:
            script, given = split(line)
            if script in SHORT:
                found[line] = call(script, shortened(script, given, model))
    finally:
        os.chdir(before)
        patch.undo()
    return found


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # runpy, after our imports
def test_every_command_runs(results, folder):
    assert {line: status for line, status in results.items() if status} == {}
    scripts = {split(line)[0] for line in results}
    assert scripts == {"train.py", "generate.py", "eval.py", "attack.py"}
    assert (folder / "runs/0001-alcohol/index.html").exists()
    assert (folder / "runs/l1/own_loss.py").exists()
    tables = [file.read_text() for file in folder.glob("tables/*/table.md")]
    assert any("| l1_loss |" in table for table in tables)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # runpy, after our imports
def test_every_command_of_the_other_pages_runs(results, folder, model):
    """After those of the README, because they use its results."""
    lines = [line for line in commands(TEXTS.values()) if line not in results]
    found = run_all(lines, folder, model)
    assert {line: status for line, status in found.items() if status} == {}
    assert {split(line)[0] for line in [*results, *found]} == set(SHORT)


def test_every_command_of_all_pages_is_understood():
    """Their flags exist. The benchmarks take long, and test_bench runs them."""
    parsers = {f"{module.__name__}.py": module.parse for module in (train, generate, attack)}
    parsers |= {"eval.py": evaluation.parse, "-m tools.bench": bench.parse}
    parsers |= {"-m tools.convert": convert.parse}
    seen = set()
    for line in commands(TEXTS.values()):
        script, words = split(line)
        seen.add(script)
        if script in parsers and "--help" not in words:
            parsers[script](words)
        elif script == "-m pytest":
            assert all((ROOT / word).is_file() for word in words), line
        elif not script.startswith("-m "):
            assert (ROOT / script).is_file(), line
    assert {*parsers, "-m pytest"} <= seen


def test_the_diffusers_snippet(results, folder, monkeypatch):
    """The README's, with the patch that its first command made."""
    monkeypatch.chdir(folder)
    snippet = next(block for block in code_blocks("python") if "StableDiffusionPipeline" in block)
    names = {}
    exec(snippet, names)
    assert (folder / "party.png").exists()
    ours = weights.load("emoji").unet.state_dict()
    patch = safetensors.torch.load_file(folder / "runs/0001-alcohol/erased.safetensors")
    loaded = names["pipeline"].unet.state_dict()
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor.float(), patch.get(name, ours[name]).float())


def test_the_own_loss_is_short_and_differs_from_sdd():
    block = code_blocks("python")[0]
    assert "def l1_loss" in block and len(block.splitlines()) <= 8


def test_limits():
    """The README is read in one sitting."""
    assert len(README.splitlines()) <= 130
    assert len(README.split()) <= 1300
    assert len(re.findall(r"\d+(?:\.\d+)?", README)) <= 150
    assert (ROOT / "docs/film.webp").stat().st_size <= 1_000_000


def test_set_up():
    """The first line with pytest sets up everything by itself: .ci/run runs it."""
    lines = README.splitlines()
    line = next(line for line in lines if "-m pytest" in line)
    assert line.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install -r ")
    assert line.endswith(" && python -m pytest")
    torch_pin = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.M)[0]
    cpu = next(i for i, line in enumerate(lines) if "download.pytorch.org/whl/cpu" in line)
    default = next(i for i, line in enumerate(lines) if "-r requirements.txt" in line)
    assert f"pip install {torch_pin} " in lines[cpu]
    assert cpu < default, "the CPU build comes before what downloads gigabytes"
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
    shown = table_rows(README.split("\n## Results")[1].split("\n## ")[0])
    assert len(columns) == 4 and len(shown) >= 5  # the head and four rows
    assert {"original", "sdd"} < shown.keys()
    del shown["model"]
    for name, cells in shown.items():
        found = [full[name][i].split()[0] for i in columns]
        assert cells[:3] == found[:3], name
        assert cells[3] == (found[3] if found[3] == "never" else f"{float(found[3]):.0f}"), name


def heading_anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    anchors = set()
    for heading in re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M
    ):
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


@pytest.mark.parametrize(
    "text, fine", [("x = 1\n", True), ("x=1\n", False), ("import os\n", False)]
)
def test_the_hook_runs_ruff(tmp_path, text, fine):
    def git(*words):
        return subprocess.run(["git", *words], cwd=tmp_path, capture_output=True, text=True)

    if not shutil.which("git") or not shutil.which("ruff", path=os.path.dirname(sys.executable)):
        pytest.skip("needs git and ruff")
    git("init", "-q")
    git("config", "user.name", "a")
    git("config", "user.email", "a@example.org")
    git("config", "core.hooksPath", str(ROOT / "tools/hooks"))
    (tmp_path / "a.py").write_text(text)
    git("add", "a.py")
    environment = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["git", "commit", "-qm", "x"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode == 0) == fine, done.stderr
