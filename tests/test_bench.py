"""tools.bench, shortened: equal work in both loops, figures next to what was measured."""

import re
import shlex

import pytest
import torch
from common import run

import sdd
from tools import bench

CPU = torch.device("cpu")


def test_figures(capsys):
    """The toy model, one round of two loops: a line says what was measured, and how much it is."""
    names = "the authors' loop, fp32", "ours as shipped"
    assert run(f"tools.bench --device cpu --rounds 1 --only {shlex.join(names)}") == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out and out.count("images/s; diffusers' pipeline") == 2
    assert out.count("random k in 1..6: ") == 2
    theirs, ours = re.findall(
        r"k = 3: (.*): ([\d.e-]+) s \(.*\), ([\d.]+) × the authors' loop", out
    )
    assert (theirs[0], ours[0]) == names and float(theirs[2]) == 1
    ratio = float(theirs[1]) / float(ours[1])  # above 1: ours is the faster
    assert float(ours[2]) == pytest.approx(ratio, rel=0.02, abs=0.01)


def test_help_quotes_names_with_spaces(capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--help"])
    assert '"ours, bf16, checkpointing"' in " ".join(capsys.readouterr().out.split())


@torch.enable_grad()
def test_both_loops_do_the_same_work():
    """On the same weights and noise the authors' loop has our loss, so the ratio is fair."""
    authors = bench.make_contender("the authors' loop, fp32", "toy", CPU)
    ours = bench.make_contender("ours as shipped", "toy", CPU)
    z_T = torch.randn(authors.shape, generator=ours.generator)  # our loop's first random numbers
    expected = authors.iteration(3, z_T)
    ours.generator.manual_seed(0)
    original = sdd.random_timestep
    assert ours.iteration(3) == pytest.approx(expected, rel=1e-3)
    assert sdd.random_timestep is original  # a later run draws k again
