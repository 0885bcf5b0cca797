"""Checks the Python version and the installed packages, so that what is missing is one sentence.

support/openmp.py imports this file, and so does each command, before torch. It uses nothing but the
standard library, and no syntax that is newer than Python 3.8.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OLDEST_PYTHON = (3, 11)
REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"


def python_problem(found):
    """A sentence if the Python version `found`, (3, 10) for example, is too old; else None."""
    if found >= OLDEST_PYTHON:
        return None
    return "This is Python {}.{}, and the project needs Python 3.11 or newer.".format(*found)


def required_packages():
    """The names of the packages in requirements.txt."""
    names = []
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        name = line.partition("#")[0].partition("==")[0].strip()
        if name:
            names.append(name)
    return names


def package_problem(names):
    """A sentence if one of the packages `names` is not installed; else None."""
    missing = []
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    if not missing:
        return None
    return (
        "These Python packages are missing: {}. Activate the virtual environment, or install them: "
        "python -m pip install -r requirements.txt"
    ).format(", ".join(missing))


def torchvision_problem():
    """A sentence if torchvision is built for another torch; else None.

    PyPI has torchvision for CUDA only (on Linux). It installs next to the CPU build of torch, but
    then torchvision, and CLIP in transformers, cannot be imported.
    """
    try:
        torch, torchvision = version("torch"), version("torchvision")
    except PackageNotFoundError:
        return None
    if torch.endswith("+cpu") == torchvision.endswith("+cpu"):
        return None
    index = " --index-url https://download.pytorch.org/whl/cpu" if torch.endswith("+cpu") else ""
    return (
        f"torchvision {torchvision} does not fit torch {torch}. Install the same build: python -m "
        "pip install --force-reinstall --no-deps "
        f"torchvision=={torchvision.partition('+')[0]}{index}"
    )


def stop_on_interrupt(kind, error, traceback):
    """sys.excepthook: Ctrl-C while the packages are imported is a sentence, not a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def check():
    """Ends the program with status 2 and a sentence if something is missing."""
    problem = python_problem(sys.version_info[:2]) or package_problem(required_packages())
    if problem:
        print("error: " + problem, file=sys.stderr)
        sys.exit(2)
    sys.excepthook = stop_on_interrupt


check()
