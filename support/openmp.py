"""Limits how long OpenMP threads spin. Import this before torch.

GNU's OpenMP (libgomp, in torch's Linux builds) lets a thread that waits for others run in a loop.
Next to another busy program this makes training several times slower: docs/benchmarks.md has the
times. 20,000 rounds cost almost nothing on an idle machine. Your own setting is respected.
"""

import os

import support.packages

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
