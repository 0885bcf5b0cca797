"""tools.bench, shortened: equal work in both loops, bytes counted right, rows in the table."""

import re

import pytest
import torch
from test_commands import command

import pipeline
import sdd
from support.cli import run_command
from support.cuda_graph import CudaGraph
from tools import bench


def test_rows(tmp_path):
    """The toy model, one round of two loops: a row says what, how, and how much."""
    (tmp_path / "B.md").write_text(
        "| date | machine | what | command | figure |\n|---|---|---|---|---|\n"
    )
    status, out, err = command(
        "-m",
        "tools.bench",
        "--rounds",
        1,
        "--only",
        "the authors' loop, fp32",
        "ours as shipped",
        "--device",
        "cpu",
        "--rows",
        tmp_path / "B.md",
    )
    assert status == 0, err
    rows = (tmp_path / "B.md").read_text().splitlines()[2:]
    assert len(rows) == 2 * 2 + 2 + 2 and all(
        row.count("|") == 6 and f"torch {torch.__version__}" in row for row in rows
    )
    steps = [row for row in rows if "k = 3: " in row]
    assert len(steps) == 2 and "1.00 × the authors' loop" in steps[0] and "TFLOP" in steps[1]
    seconds, ratios = (
        [float(re.search(said, row)[1]) for row in steps]
        for said in (r"([\d.e-]+) s \(", r"([\d.]+) × the authors")
    )
    assert ratios == [
        1,
        pytest.approx(seconds[0] / seconds[1], rel=0.02),
    ]  # above 1: ours is the faster
    assert any("peak memory" in row and "(counted)" in row for row in rows) and any(
        "images/s; diffusers' pipeline" in row for row in rows
    )


def test_an_unknown_loop_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as e:
        bench.parse(["--only", "ours as shiped", "--rounds", "1"])
    error = capsys.readouterr().err
    assert e.value.code == 2 and "did you mean ours as shipped?" in error and "usage" not in error


def test_more_steps_than_an_image_has_are_one_sentence(capsys):
    words = "--size toy --parts step --rounds 1 --k 7 --device cpu".split()
    assert run_command(bench.bench, bench.parse(words)) == 2
    assert "--k 7 is more than the 6 steps" in capsys.readouterr().err


def test_a_loop_for_a_gpu_is_one_sentence_on_a_cpu(capsys):
    words = ["--size", "toy", "--only", "ours, --compile", "--device", "cpu"]
    assert run_command(bench.bench, bench.parse(words)) == 2
    assert "'ours, --compile' needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.long
@torch.enable_grad()
def test_the_flop_of_a_compiled_loop_are_counted(monkeypatch, capsys):
    """As of the same loop without torch.compile, which still works afterwards."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda unet, **how: compile_(unet, backend="eager", **how)
    )
    monkeypatch.setattr(pipeline, "can_record", lambda device: True)
    monkeypatch.setattr(CudaGraph, "__call__", lambda graph, *inputs: graph.function(*inputs))
    monkeypatch.setattr(bench, "matmul_rate", lambda device, dtype: 1e9)
    cpu, said = torch.device("cpu"), []
    for words in ([], ["--compile"]):
        contender = bench.Ours("toy", cpu, 2, 6, *words)
        contender.iteration(1)
        said.append(bench.flop_rate(contender, 1, [1.0], cpu))
        contender.iteration(1)
    assert said[0] == said[1] and float(said[0].split()[0]) > 0
    assert "torch.compile failed" not in capsys.readouterr().err


def test_help_quotes_names_with_spaces(capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--help"])
    assert '"ours, bf16, checkpointing"' in " ".join(capsys.readouterr().out.split())


@torch.enable_grad()
def test_both_loops_do_the_same_work():
    """On the same weights and noise the authors' loop has our loss, so the ratio is fair."""
    authors = bench.Authors("toy", torch.device("cpu"), 2, 6, torch.float32)
    ours = bench.Ours("toy", torch.device("cpu"), 2, 6)
    generator = ours.run.generator
    z_T = torch.randn(2, 4, 16, 16, generator=generator)  # the first random numbers of our loop
    expected = authors.iteration(3, z_T)
    generator.manual_seed(ours.run.settings["seed"])
    original = sdd.random_timestep
    assert ours.iteration(3) == pytest.approx(expected, rel=1e-3)
    assert sdd.random_timestep is original  # a later run draws k again


def test_bytes_of_existing_tensors_are_counted_once():
    """A view adds nothing, and a deleted tensor is subtracted."""
    module = torch.nn.Linear(
        256, 256, bias=False
    )  # 256 KiB, as its gradient and AdamW's two moments, which also counts its steps
    optimizer = torch.optim.AdamW(module.parameters())
    module.weight.grad = torch.ones(256, 256)
    optimizer.step()
    held = 4 * 256 * 1024 + 4
    with bench.LiveBytes() as live:
        torch.ones(2**20)  # before the count begins
        live.include([module, optimizer, module])
        x = torch.ones(64, 256)  # 64 KiB
        y = x.view(256, 64)  # none
        z = module(x)  # 64 KiB
        assert live.now == held + (64 + 64) * 1024
        del z
        assert live.now == held + 64 * 1024
        del x, y
        torch.ones(1024)  # 4 KiB, gone at once
    assert live.now == held and live.peak == held + (64 + 64) * 1024


@pytest.mark.parametrize("size", ["toy", "sd14"])
def test_the_peak_is_that_of_the_second_iteration(size):
    """With real tensors and with fake ones."""

    class Contender:
        def __init__(self):
            self.parts, self.made = (
                [torch.nn.Linear(256, 256, bias=False)],
                [2**20, 2**16],
            )  # 256 KiB; 4 MiB once, then 256 KiB

        def iteration(self, k):
            torch.ones(self.made.pop(0))

    assert bench.counted_peak(Contender, size) == (256 + 256) * 1024 and bench.weights.fingerprint(
        {"x": torch.ones(1)}
    )


@torch.enable_grad()
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("name, gib", [("ours, bf16", 6), ("ours, bf16, checkpointing", 4)])
def test_sd14_fits_a_card_of_8_gb(name, gib):
    """As `python -m tools.bench --size sd14 --parts memory` counts it.

    The frozen tensors alone have 1.5 GiB. 6 and 4 GiB are the project's goals.
    """
    device = torch.device("cpu")
    peak = bench.counted_peak(lambda: bench.make_contender(name, "sd14", device), "sd14") / 2**30
    assert 1.5 < peak < gib
