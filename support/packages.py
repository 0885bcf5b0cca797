"""Packages that are missing, or of another build than torch: one sentence.

support/openmp.py imports this file before torch, so it needs nothing but the standard library.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def installed(name):
    """The version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def torchvision_problem():
    """A sentence if torchvision is not built for this torch and cannot be imported; else None.

    On Linux PyPI has torchvision for CUDA only. It installs next to the CPU build of torch, too.
    """
    torch, torchvision = installed("torch"), installed("torchvision")
    if torchvision is None or torch.endswith("+cpu") == torchvision.endswith("+cpu"):
        return None
    index = " --index-url https://download.pytorch.org/whl/cpu" if torch.endswith("+cpu") else ""
    return (
        f"torchvision {torchvision} does not fit torch {torch}. Install the same build: python -m "
        "pip install --force-reinstall --no-deps "
        f"torchvision=={torchvision.partition('+')[0]}{index}"
    )


REQUIREMENTS = (Path(__file__).parent.parent / "requirements.txt").read_text(encoding="utf-8")
MISSING = [name for name in re.findall(r"^(\w+)==", REQUIREMENTS, re.M) if not installed(name)]
if MISSING:
    print(
        f"error: These Python packages are missing: {', '.join(MISSING)}. Activate the virtual "
        "environment, or install them for Python 3.11 or newer: python -m pip install -r "
        "requirements.txt",
        file=sys.stderr,
    )
    sys.exit(2)
