"""Before torch is imported: names missing packages, and limits how long OpenMP threads spin.

GNU's OpenMP (libgomp, in torch's Linux builds) lets a thread that waits for others run in a loop.
Next to another busy program this makes training several times slower: docs/benchmarks.md has the
times. 20,000 rounds cost almost nothing on an idle machine. Your own setting is respected.
"""

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

missing = []
requirements = (Path(__file__).parent.parent / "requirements.txt").read_text(encoding="utf-8")
for name in re.findall(r"^(\w+)==", requirements, re.M):
    try:
        version(name)
    except PackageNotFoundError:
        missing.append(name)
if missing:
    print(
        f"error: These Python packages are missing: {', '.join(missing)}. Activate the virtual "
        "environment, or install them for Python 3.11 or newer: python -m pip install -r "
        "requirements.txt",
        file=sys.stderr,
    )
    sys.exit(2)
for library in ("TRANSFORMERS", "DIFFUSERS"):  # their warnings are for programmers
    os.environ.setdefault(f"{library}_VERBOSITY", "error")
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
