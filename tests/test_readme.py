"""Every command that the README prints is run, in its order, cut short by flags; its worked example of another loss among them."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from common import SD_WORDS, write_model_folder

from evaluation.suites import COUNTRIES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = {
    "train.py": "--iters 2 --warmup 1 --steps 2 --preview-every 2 --preview-steps 2",
    "generate.py": "--steps 2",
    "eval.py": "--limit 3 --steps 2",
    "convert.py": "",
    "report.py": "",
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands():
    """[(script, its words)] of every `python SCRIPT …` in a shell block or in backticks, in the README's order."""
    text = "\n".join(
        m[0] or m[1]
        for m in re.findall(
            r"^```sh\n(.*?)^```|`((?:\.venv/bin/)?python \w+\.py [^`]*)`", README, re.M | re.S
        )
    )
    found = [shlex.split(line) for line in re.findall(r"python (\w+\.py .*)", text)]
    return [
        (words[0], words[1:]) for words in found if not {"--help", "--reproduce"} & set(words)
    ]  # the latter: test_reproduce.py


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project."""
    copy = tmp_path_factory.mktemp("readme") / "project"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "tests", "__pycache__")
    )
    return copy


def test_readme_commands(project, tmp_path):
    """Those for Stable Diffusion get a tiny random model in its layout for --model: its own is on a hub."""
    model = write_model_folder(
        tmp_path / "sd", words=[*SD_WORDS, "body", *" ".join(COUNTRIES).lower().split()]
    )
    (tmp_path / "toy").mkdir()
    (tmp_path / "gpu").mkdir()
    example = re.findall(r"## Change the loss.*?```python\n(.*?)```", README, re.S)[0]
    assert len(example.splitlines()) < 10  # what readers were promised
    (tmp_path / "toy" / "my_loss.py").write_text(example, encoding="utf-8")
    ran = []
    for script, words in commands():
        toy = "toy" in words
        extra = [] if "--resume" in words else SHORT[script].split()
        if not toy and "--resume" not in words and script != "report.py":
            extra += [
                "--model",
                str(model),
                *(["--device", "cpu"] if script != "convert.py" else []),
            ]
        extra += ["--anchor-images", "2"] * ("ablate" in words)
        line = [sys.executable, str(project / script), *words, *extra]
        done = subprocess.run(
            line,
            cwd=tmp_path / ("toy" if toy else "gpu"),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr}"
        ran.append((script, *words))
    assert len(ran) >= 8 and {script for script, *_ in ran} == set(SHORT)
    assert (tmp_path / "toy" / "runs" / "0001-star" / "before_after.png").exists()
    assert "my_loss.py" in str(ran) and "ablate" in str(ran)


def test_readme_says_how_long_each_file_is():
    rows = re.findall(r"\| \[`?([\w./]+\.py)`?\]\(\1\) \| (\d+) \|", README)
    assert len(rows) >= 13
    for name, lines in rows:
        assert int(lines) == len((ROOT / name).read_text(encoding="utf-8").splitlines()), name


def test_readme_lines_work_on_a_fresh_machine():
    """Two lines set everything up; one of them is what CI runs."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if "pip install" in line]
    assert len(lines) == 2 and "train.py --model toy" in lines[0] and lines[1].endswith("-m pytest")


def test_the_table_of_erasers_is_the_reproductions():
    """Each figure of the README's table stands in REPRODUCTION.md, in the row of that name."""

    def rows(text):
        lines = [
            [cell.strip() for cell in line[1:-2].split("|")]
            for line in text.splitlines()
            if line.startswith("| ")
        ]
        return {
            name: figures for name, *figures in lines if name.strip("-")
        }  # the head is below "model", or below nothing

    page = (ROOT / "REPRODUCTION.md").read_text(encoding="utf-8")
    one, three = (rows(section) for section in page.split("\n## ")[1:3])
    shown = rows(README.split("\n## ")[1])
    assert {
        "sdd",
        "esd-x",
        "esd-u",
        "ablate",
        "ablate-noise",
        "all-but-one",
        "neg",
        "sld-max",
        "sega",
    } <= shown.keys()
    keys = [
        next(i for i, title in enumerate(one["model"]) if title.startswith(wanted))
        for wanted in ("target, named", "target, implied", "whole captions")
    ]
    for name, figures in shown.items():
        for found, mine in ((one, figures[:3]), (three, figures[3:])):
            assert mine == ([found[name][i] for i in keys] if name in found else ["–"] * 3), name
