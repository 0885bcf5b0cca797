"""CUDA. Without a GPU: the losses that are recorded. With a GPU: the numbers."""

import shlex

import pytest
import torch
from common import (
    HALVES,
    SHORT,
    command,
    differences,
    follows_fp32,
    randn,
    relative,
    trained,
    training,
    watch_gradients,
)
from torch.nn.functional import cosine_similarity

import sdd
import weights
from support import fast
from support.fast import CudaGraph, GraphedLoss

STAR = f"{SHORT} --concept star --preview-every 0"
CARD = "--device cuda:0"
ABLATE = "--anchor circle --anchor-images 2"
no_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def next_loss(loop, iterations):
    """The loss of the next iteration of a `training`, as train.py runs it."""
    weight = loop["original"].conv_in.weight  # of the frozen type
    half = weight.dtype != torch.float32
    autocast = torch.autocast(weight.device.type, weight.dtype, enabled=half, cache_enabled=False)
    with torch.enable_grad(), autocast:
        loss = next(iterations).loss
    if loop["teacher"]:
        loop["teacher"].sync()
    return loss


@no_card
@pytest.mark.parametrize(
    "words",
    [
        "--method sdd",
        "--method esd-x",
        "--method esd-u",
        f"--method ablate {ABLATE} --train-params full",
    ],
)
def test_an_iteration_equals_the_cpus(words, tmp_path, monkeypatch):
    """The same random numbers, other kernels.

    Rounding is 6e-8. The loss is the square of a small difference of two estimates, so at most 1e-3
    of it. cuDNN's default for convolutions, TF32, rounds at 5e-4 and would need a hundred times the
    tolerance.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    line = f"{STAR} {words} --warmup 0 --dtype fp32"
    ours, theirs = (
        training(f"{line} --device {device}", tmp_path / device) for device in ("cpu", "cuda")
    )
    grads, grads_2 = watch_gradients(ours), watch_gradients(theirs)
    loss, loss_2 = (next_loss(loop, sdd.sdd(**loop)) for loop in (ours, theirs))
    assert loss_2 == pytest.approx(loss, rel=1e-3)
    assert cosine_similarity(grads[0], grads_2[0].cpu(), dim=0) > 0.9999


GRAPHED = pytest.mark.parametrize(
    "words",
    [
        "",
        "--gradient-checkpointing",
        "--preserve 0.3 --adversary 1",
        "--method esd-x",
        f"--method ablate {ABLATE} --prior 1 --detach-start",
        f"--method ablate-noise {ABLATE}",
        "--method all-but-one --anchor circle",
        "--method all-but-one --quantile 0.9",
    ],
)


def compare_with_and_without_graph(line, tmp_path, monkeypatch, tolerance):
    """Three iterations with GraphedLoss next to three without it, from the same weights each time.

    A loss with several terms adds its gradients in another order. Some kernels on a GPU add in an
    order that changes from run to run. Both are rounding.
    """
    calls, original = [], GraphedLoss.__call__
    monkeypatch.setattr(
        GraphedLoss, "__call__", lambda *a, **b: calls.append(1) or original(*a, **b)
    )
    runs, gradients = [], []
    for name, graphs in (("with", True), ("without", False)):
        monkeypatch.setattr(fast, "can_record", lambda device, graphs=graphs: graphs)
        loop = training(f"{line} --warmup 0", tmp_path / name)
        gradients.append(watch_gradients(loop))
        runs.append((loop, sdd.sdd(**loop)))
        next_loss(*runs[-1])
    (loop, with_graph), (other, without) = runs
    for _ in range(2):
        copy_state(loop, other)
        loss, loss_2 = next_loss(loop, with_graph), next_loss(other, without)
        assert loss == pytest.approx(loss_2, rel=tolerance)
    for a, b in zip(*gradients, strict=True):
        assert cosine_similarity(a, b, dim=0) > 1 - tolerance / 10
        assert a.norm().item() == pytest.approx(b.norm().item(), rel=tolerance)
    assert len(calls) >= 3


@torch.no_grad()
def copy_state(loop, other):
    """A large change of θ, so that old values would be seen; then `other` gets θ and θ*."""
    torch._foreach_mul_(trained(loop), 1.05)
    torch._foreach_copy_(trained(other), trained(loop))
    torch._foreach_copy_(other["theta_ema"], loop["theta_ema"])
    for each in (loop, other):
        if each["teacher"]:
            each["teacher"].sync()


@GRAPHED
def test_a_graphed_loss_is_the_loss_on_the_cpu(words, tmp_path, monkeypatch):
    """Without a GPU the function runs instead of its graph. All inputs must keep their shapes."""
    shapes = {}

    def replay(graph, *inputs):
        shapes.setdefault(graph, []).append([x.shape for x in inputs])
        return graph.function(*inputs)

    monkeypatch.setattr(CudaGraph, "__call__", replay)
    compare_with_and_without_graph(f"{STAR} {words}", tmp_path, monkeypatch, 1e-3)
    assert any(len(found) >= 3 for found in shapes.values())


@no_card
@GRAPHED
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-3), ("bf16", 0.02)])
def test_a_graphed_loss_is_the_loss(words, dtype, tolerance, tmp_path, monkeypatch):
    """Without cuDNN's TF32, as in test_an_iteration_equals_the_cpus. bf16 rounds at 2^-9."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    line = f"{STAR} {words} {CARD} --dtype {dtype}"
    compare_with_and_without_graph(line, tmp_path, monkeypatch, tolerance)


@no_card
def test_a_graph_reads_new_weights_and_follows_the_shapes():
    device = torch.device("cuda:0")
    source = weights.load("toy").unet.to(device)
    inference = fast.InferenceUNet(source, device, torch.bfloat16)
    c = torch.randn(1, 77, 64, device=device)
    for n in (1, 3, 1):
        z = torch.randn(n, 4, 16, 16, device=device)
        e = inference(z, 500, c)
        change(source, 1.1)
        assert torch.equal(inference(z, 500, c), e)  # still the old weights
        inference.sync()
        changed = inference(z, 500, c)
        assert not torch.equal(changed, e)
        eager = inference.unet(z.bfloat16(), 500, c.bfloat16()).float()
        torch.testing.assert_close(changed, eager, rtol=0.02, atol=0.02)  # bf16: 2^-8
        assert not torch.equal(inference(z, 400, c), changed)
        assert torch.equal(inference(z, 500, c), changed)  # results are not overwritten


def change(unet, factor):
    for name, p in unet.named_parameters():
        if "attn2" in name:
            p.data.mul_(factor)


@no_card
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-4), ("bf16", 0.03)])
def test_a_compiled_unet_is_the_unet(dtype, tolerance, monkeypatch, capsys):
    """Also with a new timestep, another prompt and new weights.

    In fp32 without TF32, rounding is 6e-8. In bf16 it is 2^-9 per operation; at SD 1.4's size the
    two UNets differed by 0.014. The new weights are larger, and so are their errors.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    device = torch.device("cuda:0")
    source = weights.load("toy").unet.to(device)
    number = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    plain, compiled = (fast.InferenceUNet(source, device, number, how) for how in (False, True))
    z = randn(4, 4, 16, 16).to(device)
    c, c_0 = (randn(4, 77, 64, seed=seed).to(device) for seed in (1, 2))
    before = plain(z, 500, c)
    assert relative(compiled(z, 500, c), before) < tolerance
    assert relative(compiled(z, 400, c_0), plain(z, 400, c_0)) < tolerance
    change(source, 4)
    plain.sync()
    compiled.sync()
    after = plain(z, 500, c)
    assert relative(after, before) > 3 * tolerance
    assert relative(compiled(z, 500, c), after) < (1e-3 if dtype == "fp32" else 0.05)
    assert "torch.compile failed" not in capsys.readouterr().err


@no_card
@HALVES
@pytest.mark.parametrize("more", ["", "--gradient-checkpointing"])
def test_half_precision_follows_fp32(dtype, loss, norm, cosine, z, more, tmp_path):
    """The CPU's bounds; there norms are in half precision throughout, here in fp32 for the loss."""
    follows_fp32(f"{STAR} {CARD} {more}", tmp_path / "o", dtype, loss, norm, cosine, z)


STOPPED = """
import sys
sys.path.insert(0, "tests")
import common
with common.stopped("SIGTERM", "ema.update", 4):
    sys.exit(common.run(sys.argv[1], sys.argv[2]))
"""


EMBEDDING = f"--method ablate {ABLATE} --train-params embedding"


@no_card
@pytest.mark.parametrize(
    "words", ["", "--dtype fp32", "--dtype fp16", "--gradient-checkpointing", EMBEDDING]
)
def test_deterministic_runs_are_equal_also_after_a_stop(words, tmp_path):
    """Commands, as cuBLAS reads its setting once a process.

    SDD's own loss is a graph. It must read the weights that --resume restored. In fp16 there is no
    graph, but the state of the GradScaler.
    """
    line = f"{STAR} {CARD} --deterministic {words}"
    status, _, error = command(line, tmp_path / "b")
    assert status == 0, error
    status, _, error = command(shlex.join(["-c", STOPPED, line, str(tmp_path / "a")]))
    assert status == 130 and "4 of 6 iterations are saved" in error, error
    status, _, error = command("train.py --resume", tmp_path / "a")
    assert status == 0, error
    assert differences(tmp_path / "a", tmp_path / "b") == []
