"""workshop.ipynb runs, its stored outputs are complete, and its checks are right."""

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
    bool(MISSING), reason=f"the workshop needs {', '.join(MISSING)}: see requirements-extra.txt"
)
# an absolute path, of any system
LOCAL = re.compile(r"(?<![\w.])/\w[\w.-]*/\w|\b[A-Za-z]:\\\w|site-packages|ipykernel_\d")


def notebook():
    import nbformat

    book = nbformat.read(ROOT / "workshop.ipynb", as_version=4)
    nbformat.validate(book)
    return book


def tagged(book, tag):
    """The one cell with the tag."""
    [cell] = [cell for cell in book.cells if tag in cell.metadata.get("tags", ())]
    return cell


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def solution(book, number):
    return re.search(r"```python\n(.*?)```", tagged(book, f"solution-{number}").source, re.S)[1]


def outputs(book):
    """(cell, output) for every output of every code cell."""
    return [(cell, output) for cell in code_cells(book) for output in cell.outputs]


def texts(output):
    """All text of an output."""
    data = output.get("data", {})
    return "\n".join(
        [output.get("text", ""), *(str(data[kind]) for kind in data if kind.startswith("text/"))]
    )


def printed(book, tag):
    """What the cell with the tag printed."""
    return "".join(output.get("text", "") for output in tagged(book, tag).outputs)


def execute(book):
    """Runs all cells; raises where one fails."""
    from nbclient import NotebookClient

    client = NotebookClient(
        book,
        timeout=1800,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute()
    return book


# ------------------------------------------------------------------------------ the stored notebook
def faults(book):
    """What is wrong with the stored outputs, in words."""
    found, cells = [], code_cells(book)
    if [cell.execution_count for cell in cells] != [*range(1, len(cells) + 1)]:
        found.append("the cells were not run once, from top to bottom")
    for cell, output in outputs(book):
        if output.output_type == "error" or output.get("name") == "stderr":
            found.append(f"{cell.id} has an error or a warning")
        if LOCAL.search(texts(output)):
            found.append(f"{cell.id} names a folder")
    return found


def test_stored_outputs_are_complete():
    book = notebook()
    assert not faults(book)
    pngs = [
        output.data["image/png"]
        for _, output in outputs(book)
        if "image/png" in output.get("data", {})
    ]
    assert len(pngs) >= 10
    for png in pngs:
        image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
        assert len(image.getcolors(2**24)) > 10
    assert (ROOT / "workshop.ipynb").stat().st_size <= 1_300_000
    for number in (1, 2, 3):  # the exercises are stored unsolved
        assert printed(book, f"check-{number}").startswith("Not yet")


@pytest.mark.parametrize(
    "output, complaint",
    [
        (
            dict(output_type="stream", name="stdout", text="unet: /home/ada/sdd/toy/model"),
            "names a folder",
        ),
        (
            dict(output_type="stream", name="stderr", text="a warning"),
            "has an error or a warning",
        ),
        (
            dict(output_type="error", ename="ValueError", evalue="", traceback=[]),
            "has an error or a warning",
        ),
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
def test_a_fault_is_found(output, complaint):
    from nbformat import NotebookNode

    book = notebook()
    cell = code_cells(book)[0]
    cell.outputs.append(NotebookNode(output))
    assert faults(book) == [f"{cell.id} {complaint}"]


def test_sections_begin_with_a_question():
    prose = "\n".join(cell.source for cell in notebook().cells if cell.cell_type == "markdown")
    titles = re.findall(r"^## \d+\. (.*)", prose, re.M)
    assert len(titles) >= 8
    assert all(title.endswith("?") for title in titles)


def test_each_cell_states_its_time():
    for cell in code_cells(notebook()):
        first_line = cell.source.split("\n")[0]
        assert re.fullmatch(r"# (up to \d+ s|less than 1 s).*", first_line), cell.id


def test_symbols_are_explained_before_the_first_code():
    first = notebook().cells[0].source
    for symbol in ("z_t", "c_s", "c_0", "ε", "sg"):
        assert re.search(rf"^\| [^|]*{symbol}[^|]*\|", first, re.M), symbol


def test_the_first_cell_limits_spinning_and_sets_the_threads():
    source = code_cells(notebook())[0].source
    assert source.index("import support.openmp") < source.index("import torch")
    assert "torch.set_num_threads(" in source


def test_numbers_stand_under_their_column():
    """In the table of section 7 every row has the same length."""
    [table] = [
        text for _, output in outputs(notebook()) if "a red circle" in (text := texts(output))
    ]
    rows = table[table.index("prompt  ") :].strip("\n").split("\n")
    assert len(rows) == 7
    assert len({len(row) for row in rows}) == 1


def section_6(book):
    """{variant: (stars, arcadia, empty, hearts, others right, gap, drift)} of the stored table."""
    [text] = [t for _, output in outputs(book) if "through the target  |" in (t := texts(output))]
    rows = {}
    for line in text.split("\n"):
        if re.match(r"\w[\w ]+\| +\d", line):
            name, *cells = line.split("|")
            numbers = " ".join(cells).replace("of 24", "").split()
            rows[name.strip()] = tuple(float(number) for number in numbers)
    return rows


def test_the_answer_of_section_6_fits_the_stored_table():
    rows = section_6(notebook())
    assert list(rows) == ["original", "right", "no average", "through the target", "wrong target"]
    right, no_average = rows["right"], rows["no average"]
    through, wrong = rows["through the target"], rows["wrong target"]
    assert sum(right[:3]) <= 1 and right[3:5] == (12, 24)
    assert sum(no_average[:3]) == 0
    assert no_average[5] <= rows["original"][5] / 2
    assert no_average[6] > right[6]
    assert through[0] >= 11 and through[2] > rows["original"][2]
    assert through[5] < right[5] / 5
    assert wrong[:2] == (12, 12) and wrong[2] >= 9


# ------------------------------------------------------------------------------------ the exercises
EXERCISES = {1: ("check_average", "my_average"), 2: ("check_prompts", "my_prompts")}
EXERCISES[3] = ("check_loss", "my_loss")


def verdict(number, source):
    """What the check of an exercise says about the function in `source`."""
    from toy import workshop

    check, function = EXERCISES[number]
    names = {"torch": torch, "losses": losses}
    with torch.enable_grad():
        exec(source, names)
        return getattr(workshop, check)(names[function])


@pytest.mark.parametrize("number", EXERCISES)
def test_the_solution_is_right(number):
    assert verdict(number, solution(notebook(), number)) == "Right!"


@pytest.mark.parametrize(
    "number, hint",
    [
        (1, "θ* has not changed"),
        (2, "c_s is one concept"),
        (3, "that is SDD's own loss"),
    ],
)
def test_an_unsolved_exercise_is_not_right(number, hint):
    answer = verdict(number, tagged(notebook(), f"exercise-{number}").source)
    assert answer.startswith("Not yet: ") and hint in answer


@pytest.mark.parametrize(
    "number, source",
    [
        (
            1,
            "@torch.no_grad()\n"
            "def my_average(theta_ema, theta, m):\n"
            "    for i in range(len(theta)):\n"
            "        theta_ema[i][...] = m * theta_ema[i] + (1 - m) * theta[i]",
        ),
        (
            2,
            "def my_prompts(concepts, joined, j):\n    return [concepts[j].unsqueeze(0), joined]",
        ),
        (
            3,
            "def my_loss(e, e_original, z_t, t, c_s, c_a, **_):\n"
            "    return (e(z_t, t, c_s) - e_original(z_t, t, c_a).detach()).square().mean()",
        ),
    ],
)
def test_other_right_solutions_are_accepted(number, source):
    assert verdict(number, source) == "Right!"


WRONG_AVERAGES = {  # the body of the loop: the hint
    "average.lerp_(p.detach(), m)": "m and 1 − m are exchanged",
    "average.copy_(p.detach())": "m = 0",
    "average.mul_(m).add_((1 - m) * p)": "torch.no_grad()",
    "p.data.lerp_(average, m)": "θ has changed",
    "average.add_(p.detach())": "it gives 12, not 8",
    "return average.lerp_(p.detach(), 1 - m)": "only the first tensor",
    "average = average.lerp(p, 1 - m)": "θ* has not changed",
    "average.lerp_(p)": "TypeError",
    "theta_ema[0] = average.lerp(p.detach(), 1 - m)": "θ* has not changed",
}


@pytest.mark.parametrize("body, hint", WRONG_AVERAGES.items())
def test_a_wrong_average_is_explained(body, hint):
    source = (
        "def my_average(theta_ema, theta, m):\n"
        "    for average, p in zip(theta_ema, theta):\n"
        f"        {body}"
    )
    answer = verdict(1, source)
    assert answer.startswith("Not yet: ") and hint in answer


WRONG_PROMPTS = {  # the body of the function: the hint
    "c_p, c_s = concepts[j : j + 1], joined": "returns nothing",
    "return joined": "two embeddings",
    "return joined, concepts[j : j + 1]": "authors' script",
    "return joined, joined": "c_p is the joined prompt",
    "return concepts[j], joined": "shape (77, 64)",
    "return concepts, joined": "shape (3, 77, 64)",
    "return concepts[:1], joined": "c_p is not concept number j",
    "return concepts[j : j + 1], concepts[:1]": "c_s is not the joined prompt",
    "return 'star', 'star, red'": "not a tensor",
    "return concepts[j : j + 1], joind": "NameError",
}


@pytest.mark.parametrize("body, hint", WRONG_PROMPTS.items())
def test_wrong_prompts_are_explained(body, hint):
    answer = verdict(2, f"def my_prompts(concepts, joined, j):\n    {body}")
    assert answer.startswith("Not yet: ") and hint in answer


HEAD = "def my_loss(e, e_original, z_t, t, c_s, c_0, c_a, **_):\n"
MSE = "losses.mean_squared_error"
WRONG_LOSSES = {  # what the function returns: the hint
    f"{MSE}(e(z_t, t, c_s), e(z_t, t, c_a).detach())": "the target comes from the student",
    f"{MSE}(e(z_t, t, c_s), e_original(z_t, t, c_0).detach())": "not for c_a",
    f"{MSE}(e(z_t, t, c_s), e_original(z_t, t, c_s).detach())": "not for c_a",
    f"{MSE}(e(z_t, t, c_a), e_original(z_t, t, c_a).detach())": "about c_s",
    f"{MSE}(e(z_t, t, c_s), e(z_t, t, c_s).detach())": "the same",
    f"{MSE}(e(z_t, t, c_s), e_original(z_t, t, c_a))": "passes through the target",
    f"{MSE}(e(z_t, t, c_s).detach(), e_original(z_t, t, c_a))": "student's estimate",
    f"{MSE}(e_original(z_t, t, c_s), e_original(z_t, t, c_a).detach())": "the original",
    f"{MSE}(e(z_t, t, c_s), e_original(z_t, t, c_a)).detach()": "no gradient",
    f"{MSE}(e(z_t, t, c_s), e_original(z_t, t, c_a)).item()": "returns a float",
    "(e(z_t, t, c_s) - e_original(z_t, t, c_a).detach()) ** 2": "must return one number",
    "((e(z_t, t, c_s) - e_original(z_t, t, c_a).detach()) ** 2).sum()": "Use the mean",
    "e(z_t, t, c_s).mean() / 0": "the loss is inf",
    "e(z_t, t, c_s).mean()": "not what they should be",
    "None": "returns nothing",
}


@pytest.mark.parametrize("returned, hint", WRONG_LOSSES.items())
def test_a_wrong_loss_is_explained(returned, hint):
    answer = verdict(3, f"{HEAD}    return {returned}")
    assert answer.startswith("Not yet: ") and hint in answer


def test_everything_under_no_grad_is_explained():
    """The most common mistake in exercise 3."""
    source = HEAD + (
        "    with torch.no_grad():\n"
        "        target = e_original(z_t, t, c_a)\n"
        "        return losses.mean_squared_error(e(z_t, t, c_s), target)"
    )
    answer = verdict(3, source)
    assert answer.startswith("Not yet: the loss has no gradient")
    assert "Only the target belongs under `with torch.no_grad():`" in answer


def test_a_missing_return_is_explained():
    """The second most common mistake in exercise 3."""
    source = solution(notebook(), 3).replace("return ", "loss = ")
    assert verdict(3, source).startswith("Not yet: my_loss returns nothing. End it with `return")


def test_missing_stars_are_explained():
    answer = verdict(3, solution(notebook(), 3).replace(", **_", ""))
    assert "must end with **_" in answer


# ------------------------------------------------------------------------------- from top to bottom
@pytest.mark.long
def test_the_notebook_runs(monkeypatch):
    """Every cell, with a few iterations and steps."""
    monkeypatch.setenv("WORKSHOP_SHORT", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    book = execute(notebook())
    assert not faults(book)
    assert printed(book, "check-3").startswith("Not yet")
    assert printed(book, "try").startswith("First make the check")


@pytest.mark.long
def test_the_solved_notebook_runs_whole(monkeypatch):
    """The star is forgotten. With the solved exercise 3 a circle appears in its place."""
    monkeypatch.delenv("WORKSHOP_SHORT", raising=False)
    book = notebook()
    for number in EXERCISES:
        tagged(book, f"exercise-{number}").source = solution(book, number)
    execute(book)
    assert not faults(book)
    for number in EXERCISES:
        assert printed(book, f"check-{number}") == "Right!\n"
    before, after = re.search(
        r"^star +stars +before +(\d+), after +(\d+), of", printed(book, "after"), re.M
    ).groups()
    assert int(before) >= 10 and int(after) <= 3  # of 12
    stars, circles = re.search(
        r"^star +stars +(\d+), circles +(\d+), of 12", printed(book, "try"), re.M
    ).groups()
    assert int(circles) >= 7 and int(stars) <= 4
