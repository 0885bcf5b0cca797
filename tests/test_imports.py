"""House rules that a machine can check: imports go one way, no pickle, no diffusers."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LESSON = "sdd losses ema guidance scheduler unet clip_text vae".split()
WORLDS = "toy.worlds toy.shapes toy.emoji".split()
# From the bottom to the top. A file may import files of its own layer and of the layers below.
LAYERS = [
    ["support", *WORLDS, *LESSON],
    ["weights"],
    ["pipeline"],
    ["ablation", "closed_form", "adversaries", "presets"],
    ["report"],
    ["toy", "evaluation"],
    ["train", "generate", "eval", "attack", "minimal"],
    ["tools", "workflow"],
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
ALONE = {name: group for group in (LESSON, WORLDS) for name in group}  # these import only the group
DIFFUSERS_ALLOWED = ("tools/bench.py", "tools/baseline.py")  # they measure it, inside functions
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (".", "support", "report", "evaluation", "tools", "toy", "workflow")
    for path in (ROOT / folder).glob("*.py")
)


def part(name):
    """The name in LAYER that a module, or something in it, belongs to; None if it is not ours."""
    top, *rest = name.split(".")
    module = ".".join([top, *rest[:1]])
    return next((key for key in (module, top) if key in LAYER), None)


def imported(tree):
    """All that an absolute import names, and whether it stands inside a function."""
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
    inside = {id(n) for function in functions for n in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in inside


def forbidden(file, source):
    """The house rules that the source of `file` breaks, in words."""
    tree = ast.parse(source)
    own = part(file.removesuffix(".py").replace("/", "."))
    found = []
    for name, inside in imported(tree):
        top = name.split(".")[0]
        other = part(name)
        if other and LAYER[other] > LAYER[own]:
            found.append(f"{file} imports {other}, which is above it")
        if other and own in ALONE and other not in ALONE[own]:
            found.append(f"{file} imports {name}: it may import only {', '.join(ALONE[own])}")
        if top == "diffusers" and not (file in DIFFUSERS_ALLOWED and inside):
            found.append(f"{file} imports diffusers")
        if top in ("pickle", "cPickle", "dill", "joblib") or name == "torch.load":
            found.append(f"{file} imports {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found.append(f"{file} calls torch.load")
    return sorted(set(found))


def test_every_file_has_a_layer():
    names = [file.removesuffix(".py").replace("/", ".") for file in FILES]
    assert all(map(part, names)), "a new file at top level: give it a place in LAYERS"
    assert {*LESSON, *WORLDS} <= set(names)


def test_top_level_is_small():
    assert len([file for file in FILES if "/" not in file]) <= 20


def lines_of(name):
    """wc -l of a file, or of a folder's code: Python, templates, styles and the Snakefile."""
    path = ROOT / name
    files = [path]
    if path.is_dir():
        kinds = ("*.py", "*.j2", "*.css", "*.smk", "Snakefile")
        files = [file for kind in kinds for file in path.rglob(kind)]
    return sum(file.read_text(encoding="utf-8").count("\n") for file in files)


def test_a_part_grows_only_together_with_its_row():
    """CONTRIBUTING.md has a table: | part | lines |. The README promises a minimal project."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*`) \| ([\d,]+) \|$", text, re.M)
    parts = [(re.findall(r"`([^`]+)`", names), int(n.replace(",", ""))) for names, n in rows]
    listed = {name for names, _ in parts for name in names}
    assert {file.split("/")[0] for file in FILES} | {"tests"} == {n.strip("/") for n in listed}
    for names, limit in parts:
        assert sum(map(lines_of, names)) <= limit, f"{names} has more lines than CONTRIBUTING.md"


@pytest.mark.parametrize("file", FILES)
def test_imports_go_one_way(file):
    assert not forbidden(file, (ROOT / file).read_text(encoding="utf-8"))
