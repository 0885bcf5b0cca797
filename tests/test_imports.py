"""The house rules that a machine can hold: who imports whom, no pickle, no diffusers, and how much code there is."""
import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {  # module: the local modules that it may import; nothing else of the project, not even inside a function
    "unet": "", "vae": "", "clip_text": "", "scheduler": "", "guidance": "", "losses": "", "ema": "", "intact": "",
    "weights": "unet vae clip_text intact", "folder": "weights",
    "sdd": "guidance losses ema",
    "command": "weights", "cover": "metrics", "generate": "weights scheduler guidance clip_text command cover folder",
    "anchors": "weights generate", "previews": "generate guidance cover",
    "run": "weights clip_text command generate losses ema sdd anchors unet intact",
    "train": "weights command losses anchors run previews report folder",
    "report": "weights", "metrics": "", "suites": "weights toy.worlds toy.suite",
    "tables": "weights clip_text cover generate metrics suites toy.suite toy.worlds report",
    "eval": "weights command generate guidance metrics suites tables toy.reproduce folder",
    "original": "weights", "model_card": "weights", "convert": "weights command clip_text model_card original folder",
    "authors": "weights", "bench": "authors sdd train weights clip_text command generate run unet vae",
    "toy": "", "toy.shapes": "", "toy.emoji": "", "toy.atlas": "toy.emoji", "toy.worlds": "", "toy.probe": "toy.worlds",
    "toy.suite": "toy.worlds toy.probe", "toy.reproduce": "metrics weights",
    "toy.pretrain": "toy.worlds toy.probe unet vae clip_text scheduler weights",
}
INSIDE_A_FUNCTION = {"report": "weights", "suites": "toy.worlds toy.suite", "tables": "toy.suite toy.worlds", "eval": "toy.reproduce", "toy.probe": "toy.worlds",
                     "toy.reproduce": "metrics weights"}
FILE, FUNCTION, CORE = 310, 42, 2200  # lines; the core's without blank ones, comments and docstrings
TOOLS = {"authors", "bench", "convert", "cover", "folder", "intact", "model_card", "original", "report"}
REQUIRED = "unet vae clip_text scheduler guidance losses ema weights sdd toy.shapes toy.probe toy.pretrain"

FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
         for path in [*ROOT.glob("*.py"), *ROOT.glob("toy/**/*.py")]}


def imported(module, tree):
    """(name, is the import inside a function?) for every import; `from toy import shapes` is both toy and toy.shapes."""
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    inside = {id(n) for function in functions for n in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[:-node.level] if node.level else []  # `from . import worlds` in toy.probe
            base = ".".join([*package, *filter(None, [node.module])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from ((name, id(node) in inside) for name in names)


def forbidden(module, tree):
    """What breaks a rule in the source of `module`, in words."""
    allowed, late = ALLOWED[module].split(), INSIDE_A_FUNCTION.get(module, "").split()
    found = []
    for name, inside in imported(module, tree):
        if name in ALLOWED and name != "toy" and (name not in allowed or (name in late and not inside)):
            found.append(f"{module} imports {name}" + (" outside a function" if name in allowed else ""))
        if name.split(".")[0] == "diffusers" and module in ("authors", "bench") and inside:
            continue  # it measures diffusers, and says so if it is missing
        if name.split(".")[0] in ("diffusers", "pickle", "cPickle", "dill", "joblib") or name == "torch.load":
            found.append(f"{module} imports {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node.value) == "torch":
            found.append(f"{module} calls torch.load, line {node.lineno}")
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= FUNCTION:
            found.append(f"{module}.{node.name} has {node.end_lineno - node.lineno + 1} lines")
    return found


def test_every_file_has_a_place():
    assert set(FILES) <= set(ALLOWED), "a new file: say in ALLOWED what it may import"
    assert set(REQUIRED.split()) <= set(FILES)


@pytest.mark.parametrize("module", sorted(FILES))
def test_rules(module):
    source = FILES[module].read_text()
    assert not forbidden(module, ast.parse(source))
    assert len(source.splitlines()) <= FILE


def test_core_is_small():
    """The model, the methods, training and measuring; not the tools beside them."""
    sources = {name: path.read_text() for name, path in sorted(FILES.items()) if path.parent == ROOT and name not in TOOLS}
    code = {name: code_lines(source) for name, source in sources.items()}
    lines = sum(len(source.splitlines()) for source in sources.values())
    print("\n" + "\n".join(f"{n:6} {name}.py" for name, n in code.items()) + f"\n{sum(code.values()):6} in all; with the rest {lines}")
    assert sum(code.values()) <= CORE


def code_lines(source):
    """How many lines hold code: neither blank, nor a comment, nor a docstring."""
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    found = {i for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in blank
             for i in range(token.start[0], token.end[0] + 1)}
    texts = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return len(found - {i for node in texts for i in range(node.lineno, node.end_lineno + 1)})


def test_code_lines():
    assert code_lines('"""A\nB"""\n\n# c\nx = 1  # d\n\n\ndef f(\n):\n    "doc"\n    return """\n"""\n') == 5


@pytest.mark.parametrize("module, source, complaint", [
    ("unet", "import vae", "unet imports vae"),
    ("losses", "def f():\n    from guidance import cfg", "losses imports guidance"),
    ("sdd", "from toy.shapes import scene", "sdd imports toy.shapes"),
    ("weights", "from toy import shapes as d", "weights imports toy.shapes"),
    ("tables", "from toy import suite", "tables imports toy.suite outside a function"),
    ("toy.probe", "from . import worlds", "toy.probe imports toy.worlds outside a function"),
    ("toy.shapes", "from .probe import Probe", "toy.shapes imports toy.probe"),
    ("suites", "class A:\n    import toy.suite", "suites imports toy.suite outside a function"),
    ("train", "def f():\n    import diffusers.utils", "train imports diffusers.utils"),
    ("weights", "import pickle", "weights imports pickle"),
    ("weights", "from torch import load", "weights imports torch.load"),
    ("weights", "x = torch.load(path)", "weights calls torch.load, line 1"),
    ("sdd", "def f():\n" + FUNCTION * "    x\n", f"sdd.f has {FUNCTION + 1} lines"),
])
def test_rules_can_be_broken(module, source, complaint):
    assert forbidden(module, ast.parse(source)) == [complaint]


@pytest.mark.parametrize("module, source", [
    ("sdd", "import ema\nfrom guidance import cfg"), ("suites", "def f():\n    from toy import suite"),
    ("weights", "import torch\nfrom safetensors.torch import load\nload()"), ("toy.probe", "def f():\n    from . import worlds"),
    ("sdd", "def f():\n" + (FUNCTION - 1) * "    x\n"),
])
def test_rules_can_be_kept(module, source):
    assert not forbidden(module, ast.parse(source))
