"""workshop.ipynb runs from top to bottom, its kept outputs are whole and name no folder, and its check knows right from wrong."""

import base64
import importlib.util
import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import losses

ROOT = Path(__file__).parent.parent
MISSING = [
    name
    for name in ("nbformat", "nbclient", "ipykernel", "matplotlib")
    if importlib.util.find_spec(name) is None
]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"the workshop needs {', '.join(MISSING)}: see requirements-workshop.txt"
)
LOCAL = re.compile(
    r"(?<![\w.])/\w[\w.-]*/\w|\b[A-Za-z]:\\\w|site-packages|ipykernel_\d"
)  # an absolute path, of any system


def notebook():
    import nbformat

    book = nbformat.read(ROOT / "workshop.ipynb", as_version=4)
    nbformat.validate(book)
    return book


def tagged(book, tag):
    """The one cell that is marked `tag`."""
    [cell] = [cell for cell in book.cells if tag in cell.metadata.get("tags", ())]
    return cell


def solution(book):
    return re.search(r"```python\n(.*?)```", tagged(book, "solution").source, re.S)[1]


def outputs(book):
    """(cell, output) for every output of every code cell."""
    return [
        (cell, output) for cell in book.cells if cell.cell_type == "code" for output in cell.outputs
    ]


def texts(output):
    """All that an output says in words."""
    data = output.get("data", {})
    return "\n".join(
        [output.get("text", ""), *(str(data[kind]) for kind in data if kind.startswith("text/"))]
    )


def said(book, tag):
    """What the cell that is marked `tag` printed."""
    return "".join(output.get("text", "") for output in tagged(book, tag).outputs)


def execute(book):
    """The book after a run of all its cells; raises where one fails."""
    from nbclient import NotebookClient

    where = {"metadata": {"path": str(ROOT)}}
    NotebookClient(
        book, timeout=1800, kernel_name="python3", coalesce_streams=True, resources=where
    ).execute()
    return book


# ------------------------------------------------------------------------------------------------ as it is kept
def faults(book):
    """What is wrong with the kept outputs, in words."""
    found, code = [], [cell for cell in book.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != [*range(1, len(code) + 1)]:
        found.append("the cells were not run once, from top to bottom")
    for cell, output in outputs(book):
        if output.output_type == "error" or output.get("name") == "stderr":
            found.append(f"{cell.id} complains")
        if LOCAL.search(texts(output)):
            found.append(f"{cell.id} names a folder")
    return found


def test_the_kept_outputs_are_whole():
    book = notebook()
    assert not faults(book)
    pngs = [
        output.data["image/png"]
        for _, output in outputs(book)
        if "image/png" in output.get("data", {})
    ]
    images = [Image.open(io.BytesIO(base64.b64decode(png))) for png in pngs]
    assert len(images) >= 10 and all(
        len(image.convert("RGB").getcolors(2**24)) > 10 for image in images
    )
    assert (ROOT / "workshop.ipynb").stat().st_size <= 2_000_000
    assert said(book, "check").startswith("Not yet")  # kept unsolved


@pytest.mark.parametrize(
    "output, complaint",
    [
        (
            dict(output_type="stream", name="stdout", text="unet: /home/ada/sdd/toy/model"),
            "names a folder",
        ),
        (dict(output_type="stream", name="stderr", text="a warning"), "complains"),
        (dict(output_type="error", ename="ValueError", evalue="", traceback=[]), "complains"),
        (
            dict(
                output_type="execute_result",
                data={"text/plain": r"C:\Users\ada"},
                metadata={},
                execution_count=1,
            ),
            "names a folder",
        ),
    ],
)
def test_a_fault_would_be_seen(output, complaint):
    from nbformat import NotebookNode

    book = notebook()
    cell = next(cell for cell in book.cells if cell.cell_type == "code")
    cell.outputs.append(NotebookNode(output))
    assert faults(book) == [f"{cell.id} {complaint}"]


def test_sections_begin_with_a_question():
    prose = "\n".join(cell.source for cell in notebook().cells if cell.cell_type == "markdown")
    titles = re.findall(r"^## \d+\. (.*)", prose, re.M)
    assert len(titles) >= 8 and all(title.endswith("?") for title in titles)


# ------------------------------------------------------------------------------------------------ the exercise
def verdict(source):
    """What the notebook's check says about the `my_loss` of `source`."""
    names = {"torch": torch, "losses": losses}
    with torch.enable_grad():
        exec(source, names)
        exec(tagged(notebook(), "check").source, names)
        return names["check"](names["my_loss"])


def test_the_solution_is_right():
    assert verdict(solution(notebook())) == "Right!"


def test_the_check_does_not_ask_for_the_solutions_words():
    assert (
        verdict(
            "def my_loss(e, e_original, z_t, t, c_s, c_a, **_):\n"
            "    return (e(z_t, t, c_s) - e_original(z_t, t, c_a).detach()).square().mean()"
        )
        == "Right!"
    )


HEAD = "def my_loss(e, e_original, z_t, t, c_s, c_0, c_a, **_):\n"
WRONG = {  # what the function returns: what is said to it
    "losses.squared(e(z_t, t, c_s), e(z_t, t, c_a).detach())": "the target comes from the student",
    "losses.squared(e(z_t, t, c_s), e_original(z_t, t, c_0).detach())": "not for c_a",
    "losses.squared(e(z_t, t, c_s), e_original(z_t, t, c_s).detach())": "not for c_a",
    "losses.squared(e(z_t, t, c_a), e_original(z_t, t, c_a).detach())": "about c_s",
    "losses.squared(e(z_t, t, c_s), e(z_t, t, c_s).detach())": "the same",
    "losses.squared(e(z_t, t, c_s), e_original(z_t, t, c_a))": "gradient",  # through the target too
    "losses.squared(e(z_t, t, c_s).detach(), e_original(z_t, t, c_a))": "gradient",  # through the target alone
    "losses.squared(e_original(z_t, t, c_s), e_original(z_t, t, c_a).detach())": "the original",
    "losses.squared(e(z_t, t, c_s), e_original(z_t, t, c_a)).detach()": "RuntimeError",
    "(e(z_t, t, c_s) - e_original(z_t, t, c_a).detach()) ** 2": "RuntimeError",  # no scalar
    "((e(z_t, t, c_s) - e_original(z_t, t, c_a).detach()) ** 2).sum()": "not what they should be",
    "None": "AttributeError",
}


@pytest.mark.parametrize("returned, hint", WRONG.items())
def test_a_wrong_solution_is_told_why(returned, hint):
    answer = verdict(f"{HEAD}    return {returned}")
    assert answer.startswith("Not yet: ") and hint in answer


def test_a_solution_without_the_rest_is_told_why():
    assert "TypeError" in verdict(solution(notebook()).replace(", **_", ""))


def test_unsolved_it_is_not_right():
    assert verdict(tagged(notebook(), "exercise").source).startswith(
        "Not yet: that is SDD's own loss"
    )


# ------------------------------------------------------------------------------------------------ from top to bottom
def test_the_notebook_runs(monkeypatch):
    """Every cell, with a few iterations and steps instead of all."""
    monkeypatch.setenv("WORKSHOP_SHORT", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    book = execute(notebook())
    assert not faults(book)
    assert said(book, "check").startswith("Not yet") and said(book, "try").startswith(
        "First make the check"
    )


@pytest.mark.long
def test_the_solved_notebook_runs_whole(monkeypatch):
    """All of it, with the solution in its place: the star is forgotten, and where one is asked for comes a circle."""
    monkeypatch.delenv("WORKSHOP_SHORT", raising=False)
    book = notebook()
    tagged(book, "exercise").source = solution(book)
    execute(book)
    assert not faults(book)
    assert said(book, "check") == "Right!\n"
    before, after = re.search(
        r"^star +stars +before +(\d+), after +(\d+), of", said(book, "after"), re.M
    ).groups()
    assert int(before) >= 10 and int(after) <= 3  # of 12
    stars, circles = re.search(
        r"^star +stars +(\d+), circles +(\d+), of 12", said(book, "try"), re.M
    ).groups()
    assert int(circles) >= 7 and int(stars) <= 4
