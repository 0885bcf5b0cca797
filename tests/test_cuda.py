"""CUDA.

Without a GPU: one iteration of each method, one image and one measurement with fake tensors, which
have a device and a type but no values. That finds a tensor that was left on the CPU, or two types
that do not fit, on any machine. With a GPU: the numbers.
"""

import copy
import ctypes
import shutil
import subprocess

import pytest
import torch
from common import randn, relative
from test_commands import SHORT, command
from test_run import (  # noqa: F401, the fixture
    HALVES,
    Casts,
    fails,
    follows_fp32,
    make,
    watch_gradients,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ablation
import presets
import train
import weights
from pipeline import InferenceUNet, generate_latents
from report.previews import Previews
from support.cuda_graph import CudaGraph, GraphedLoss
from train import Run
from unet import Attention

CARD = torch.device("cuda:0")
no_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ABLATE = ["--method", "ablate", "--anchor", "circle", "--anchor-images", "2"]


class Numbers(TorchDispatchMode):
    """Answers 1 for the value of a fake tensor. Counts the waits of the host: values, copies."""

    waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(
            args[0], FakeTensor
        ):
            self.waits += args[0].device == CARD
            return 1.0 if args[0].is_floating_point() else 1
        self.waits += (
            function is torch.ops.aten._to_copy.default
            and kwargs.get("device") == CARD != args[0].device
        )
        return function(*args, **kwargs)


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """Slices ask for CUDA's current device. torch's CPU build has none; this C++ adds one."""
    if torch.backends.cuda.is_built():
        return
    if not shutil.which("g++"):
        pytest.skip("torch's CPU build, and no compiler")
    folder, root = tmp_path_factory.mktemp("guard"), torch.__path__[0]
    (folder / "guard.cpp").write_text(
        "#include <c10/core/impl/DeviceGuardImplInterface.h>\n"
        "C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)\n"
    )
    words = [
        "-std=c++20",
        "-shared",
        "-fPIC",
        f"-I{root}/include",
        "guard.cpp",
        "-o",
        "guard.so",
        f"-L{root}/lib",
        "-lc10",
    ]
    if subprocess.run(["g++", *words], cwd=folder, capture_output=True).returncode:
        pytest.skip("the compiler does not know torch's headers")
    ctypes.CDLL(str(folder / "guard.so"))


def on_the_card(part):
    """Replaces a module's tensors with fake ones on the GPU: `to` would not change the device."""
    for module in part.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(
                    torch.empty(p.shape, device=CARD), requires_grad=False
                )
    return part


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a real card tests more")
@pytest.mark.parametrize(
    "words",
    [
        [],
        [*ABLATE, "--train-params", "embedding"],
        *(
            pytest.param(words, marks=pytest.mark.long)
            for words in (
                [*ABLATE, "--prior", "1", "--detach-start"],
                ["--dtype", "fp32"],
                ["--dtype", "fp16", "--gradient-checkpointing"],
                ["--roles", "official", "--preserve", "0.3"],
                ["--method", "esd-x"],
                ["--method", "esd-u"],
                [*ABLATE, "--train-params", "full"],
                ["--method", "ablate-noise", *ABLATE[2:]],
                ["--method", "all-but-one", "--anchor", "circle"],
                ["--method", "all-but-one", "--quantile", "0.9"],
            )
        ),
    ],
    ids=" ".join,
)
def test_all_is_on_the_card(words, guard, model_folder, tmp_path, monkeypatch):
    """Without the backward pass, for which autograd needs a driver."""

    def backward(value):
        assert value.device == CARD and value.dtype == torch.float32
        for p in r.models.theta.values():
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr("train.pick_device", torch.device)
    # Otherwise autocast turns itself off.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)  # they are there
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(weights, "fingerprint", lambda tensors: "")
    monkeypatch.setattr(ablation, "save", lambda *_: None)
    arguments = ["--model", str(model_folder), "--preset", "toy", "--concept", "star", "red"]
    arguments += ["--device", str(CARD), "--dtype", "bf16", *SHORT, *words]
    settings = presets.settle(train.parse(arguments))
    model = weights.load(model_folder)
    on_the_cpu = copy.deepcopy(model.unet)
    with FakeTensorMode(allow_non_fake_inputs=True), Numbers() as numbers:
        moved = model._replace(
            unet=on_the_card(model.unet),
            vae=on_the_card(model.vae),
            text_encoder=on_the_card(model.text_encoder),
        )
        r = Run(tmp_path, settings, moved)
        student, c_0 = r.models.student, r.prompts.c_0
        for p in r.models.theta.values():
            p.requires_grad_(False)
        with torch.autocast("cuda", r.dtype, enabled=r.dtype != torch.float32, cache_enabled=False):
            iterations = r.iterations()
            next(iterations)  # with Ablating, this also generates the anchor's images
            before = numbers.waits
            next(iterations)
            # Random numbers in, the loss out; not one per evaluation. GradScaler asks twice.
            limit = 10 if r.pairs else 5
            assert numbers.waits - before <= limit + 2 * r.scaler.is_enabled()
            shown = Previews(r)
            shown.measure()
            c_p = r.prompts.previews[:1]
            if r.trains_text:
                c_p = shown.encode(student, ["arcadia"])
            unet = InferenceUNet(student.unet, r.device, r.dtype)
            with Casts() as casts:
                unet(torch.empty(1, *r.shape[1:], device=CARD), 500, c_0)
            # z, the sinusoids of t, c, e, and five in each attention, which has no kernel of its
            # own for fake tensors. No weight and no norm.
            attentions = [m for m in unet.unet.modules() if isinstance(m, Attention)]
            assert casts.n <= 5 + 5 * len(attentions)
            copied = InferenceUNet(on_the_cpu, r.device, r.dtype)  # as in generate.py and eval.py
            e = copied(torch.empty(1, *r.shape[1:], device=CARD), 500, c_0)
            assert (e.device, e.dtype) == (CARD, torch.float32)
            assert {(p.device, p.dtype) for p in copied.unet.parameters()} == {(CARD, r.dtype)}
            (z,) = generate_latents(student, unet, c_0, c_p, [3], r.preview_scheduler, 7.5)
            x = student.vae.decode(z)
        trained = [*r.models.theta.values(), *r.models.theta_ema.values()]
        for state in r.optimizer.state.values():
            trained += [state["exp_avg"], state["exp_avg_sq"]]
        # GradScaler reads 1 for "a gradient is infinite", and skips the step.
        assert len(trained) == (2 if r.scaler.is_enabled() else 4) * len(r.models.theta)
        assert all(p.device == CARD and p.dtype == torch.float32 for p in trained)
        for name, p in student.unet.named_parameters():
            assert name in r.models.theta or "norm" in name or p.dtype == r.dtype, name
        assert z.device == x.device == CARD
        assert z.dtype == torch.float32 and x.dtype == r.dtype


@torch.enable_grad()
def iterations(tmp_path, n, *words):
    """The losses of n iterations, and θ's gradients, on the CPU."""
    r, grads = make(tmp_path, "--warmup", 0, *words), []
    r.optimizer.register_step_pre_hook(
        lambda *_: grads.append(
            torch.cat([p.grad.flatten() for p in r.models.theta.values()]).cpu()
        )
    )
    run = r.iterations()
    return [next_loss(r, run) for _ in range(n)], grads


@no_card
@pytest.mark.parametrize(
    "words",
    [
        ["--method", "sdd"],
        ["--method", "esd-x"],
        ["--method", "esd-u"],
        [*ABLATE, "--train-params", "full"],
    ],
    ids=" ".join,
)
def test_an_iteration_equals_the_cpus(words, tmp_path, monkeypatch):
    """The same random numbers, other kernels.

    Rounding is 6e-8. The loss is the square of a small difference of two estimates, so at most 1e-3
    of it. cuDNN's default for convolutions, TF32, rounds at 5e-4 and would need a hundred times the
    tolerance.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    (loss, grad), (loss_2, grad_2) = (
        iterations(tmp_path / device, 1, *words, "--dtype", "fp32", "--device", device)
        for device in ("cpu", str(CARD))
    )
    assert loss_2 == pytest.approx(loss, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(grad[0], grad_2[0], dim=0) > 0.9999


GRAPHED = pytest.mark.parametrize(
    "words",
    [
        [],
        ["--gradient-checkpointing"],
        ["--preserve", "0.3", "--adversary", "1"],
        ["--method", "esd-x"],
        [*ABLATE, "--prior", "1", "--detach-start"],
        ["--method", "ablate-noise", *ABLATE[2:]],
        ["--method", "all-but-one", "--anchor", "circle"],
        ["--method", "all-but-one", "--quantile", "0.9"],
    ],
    ids=" ".join,
)


@torch.enable_grad()
def compare_with_and_without_graph(tmp_path, monkeypatch, words, tolerance):
    """Three iterations with GraphedLoss next to three without it, from the same weights each time.

    A loss with several terms adds its gradients in another order. Some kernels on a GPU add in an
    order that changes from run to run. Both are rounding.
    """
    calls = []
    original = GraphedLoss.__call__
    monkeypatch.setattr(
        GraphedLoss, "__call__", lambda *a, **b: calls.append(1) or original(*a, **b)
    )
    runs, gradients = [], []
    for name, graphed in (("with", True), ("without", False)):
        monkeypatch.setattr(Run, "uses_graphs", lambda _, graphed=graphed: graphed)
        r = make(tmp_path / name, "--warmup", 0, *words)
        gradients.append(watch_gradients(r))
        runs.append((r, r.iterations()))
        next_loss(*runs[-1])  # Run.loss asks uses_graphs in the first iteration
    (r, with_graph), (r_2, without) = runs
    for _ in range(2):
        copy_state(r, r_2)
        loss, loss_2 = next_loss(r, with_graph), next_loss(r_2, without)
        assert loss == pytest.approx(loss_2, rel=tolerance)
    for a, b in zip(*gradients, strict=True):
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 1 - tolerance / 10
        assert a.norm().item() == pytest.approx(b.norm().item(), rel=tolerance)
    assert len(calls) >= 3


def next_loss(r, iterations):
    """The loss of the next iteration, as train.py runs it."""
    half = r.dtype != torch.float32
    with torch.autocast(r.device.type, r.dtype, enabled=half, cache_enabled=False):
        return next(iterations).loss


@torch.no_grad()
def copy_state(r, r_2):
    """A large change of θ, so that old values would be seen; then r_2 gets the state of r."""
    for p in r.models.theta.values():
        p.mul_(1.05)
    for group in ("theta", "theta_ema"):
        for name, p in getattr(r.models, group).items():
            getattr(r_2.models, group)[name].copy_(p)
    if r.adversary:
        r_2.adversary.words.copy_(r.adversary.words)


@GRAPHED
def test_a_graphed_loss_is_the_loss_on_the_cpu(words, tmp_path, monkeypatch):
    """Without a GPU the function runs instead of its graph. All inputs must keep their shapes."""
    shapes = []

    def replay(graph, *inputs):
        shapes.append([x.shape for x in inputs])
        return graph.function(*inputs)

    monkeypatch.setattr(CudaGraph, "__call__", replay)
    compare_with_and_without_graph(tmp_path, monkeypatch, [*words, "--device", "cpu"], 1e-3)
    assert all(one == shapes[0] for one in shapes)


@no_card
@GRAPHED
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-3), ("bf16", 0.02)])
def test_a_graphed_loss_is_the_loss(words, dtype, tolerance, tmp_path, monkeypatch):
    """Without cuDNN's TF32, as in test_an_iteration_equals_the_cpus. bf16 rounds at 2^-9."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    words = [*words, "--device", str(CARD), "--dtype", dtype]
    compare_with_and_without_graph(tmp_path, monkeypatch, words, tolerance)


@no_card
def test_a_graph_reads_new_weights_and_follows_the_shapes(tmp_path):
    r = make(tmp_path, "--device", str(CARD), "--dtype", "bf16")
    source, c = r.models.teacher.unet, r.prompts.concepts
    inference = InferenceUNet(source, r.device, r.dtype)
    for n in (1, 3, 1):
        z = torch.randn(n, *r.shape[1:], device=CARD)
        e = inference(z, 500, c)
        for name, p in source.named_parameters():
            if "attn2" in name:
                p.data.mul_(1.1)
        assert torch.equal(inference(z, 500, c), e)  # still the old weights
        inference.sync()
        changed = inference(z, 500, c)
        assert not torch.equal(changed, e)
        eager = inference.unet(z.to(r.dtype), 500, c.to(r.dtype)).float()
        torch.testing.assert_close(changed, eager, rtol=0.02, atol=0.02)  # bf16: 2^-8
        assert not torch.equal(inference(z, 400, c), changed)
        assert torch.equal(inference(z, 500, c), changed)  # results are not overwritten


@no_card
@torch.enable_grad()
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-4), ("bf16", 0.03)])
def test_a_compiled_unet_is_the_unet(dtype, tolerance, tmp_path, monkeypatch, capsys):
    """Also with a new timestep, another prompt and new weights.

    In fp32 without TF32, rounding is 6e-8. In bf16 it is 2^-9 per operation; at SD 1.4's size the
    two UNets differed by 0.014. The new weights are larger, and so are their errors.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    calls, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **b: calls.append(a) or compile_(*a, **b))
    r = make(tmp_path, "--device", str(CARD), "--dtype", dtype, "--compile")
    iterations = r.iterations()
    next_loss(r, iterations)
    assert len(calls) == 1
    source = r.models.teacher.unet
    # The batch of the iteration, so that the UNet is not compiled for another one.
    z = torch.cat([randn(*r.shape), randn(*r.shape, seed=1)]).to(CARD)
    c, c_0 = (x.repeat(len(z), 1, 1) for x in (r.prompts.concepts, r.prompts.c_0))
    plain, compiled = (InferenceUNet(source, r.device, r.dtype, how) for how in (False, True))
    before = plain(z, 500, c)
    assert relative(compiled(z, 500, c), before) < tolerance
    assert relative(compiled(z, 400, c_0), plain(z, 400, c_0)) < tolerance
    for name, p in source.named_parameters():
        if "attn2" in name:
            p.data.mul_(4)
    plain.sync()
    compiled.sync()
    after = plain(z, 500, c)
    assert relative(after, before) > 3 * tolerance
    assert relative(compiled(z, 500, c), after) < (1e-3 if dtype == "fp32" else 0.05)
    assert len(calls) == 2
    assert "torch.compile failed" not in capsys.readouterr().err


@no_card
@HALVES
@pytest.mark.parametrize("more", [[], ["--gradient-checkpointing"]], ids=" ".join)
def test_half_precision_follows_fp32(dtype, loss, norm, cosine, z, more, tmp_path):
    """The CPU's bounds; there norms are in half precision throughout, here in fp32 for the loss."""
    follows_fp32(dtype, loss, norm, cosine, z, tmp_path, "--device", CARD, *more)


@no_card
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--dtype", "fp32"],
        ["--gradient-checkpointing"],
        [*ABLATE, "--train-params", "embedding"],
    ],
    ids=" ".join,
)
def test_deterministic_runs_are_equal(words, tmp_path):
    """Commands, as cuBLAS reads its setting once a process."""
    for out in ("a", "b"):
        status, _, err = command(
            "train.py",
            "--model",
            "toy",
            "--concept",
            "star",
            *SHORT,
            "--device",
            CARD,
            "--deterministic",
            *words,
            "--out",
            tmp_path / out,
        )
        assert status == 0, err
    same(tmp_path / "a", tmp_path / "b")


@no_card
def test_a_resumed_run_is_equal(fails, tmp_path):  # noqa: F811
    """As on the CPU: what is restored, moments and generator, is where and what it was."""
    words = ["--model", "toy", "--concept", "star", *SHORT, "--device", CARD, "--deterministic"]
    fault = fails("raise torch.OutOfMemoryError('CUDA out of memory')")
    status, _, err = command("train.py", *words, *fault, "--out", tmp_path / "a")
    assert status == 2 and "3 iterations are saved" in err
    (tmp_path / "a" / "corrected").touch()
    without_fault = fails("pass")
    for more in (
        ["--resume", "--out", tmp_path / "a"],
        [*words, *without_fault, "--out", tmp_path / "b"],
    ):
        status, _, err = command("train.py", *more)
        assert status == 0, err
    same(tmp_path / "a", tmp_path / "b")


STOPPED_AFTER_FOUR = """
import signal, sys, train
save = train.Run.save

def save_and_stop(run):
    save(run)
    if run.done == 4:
        signal.raise_signal(signal.SIGTERM)

train.Run.save = save_and_stop
sys.exit(train.run_command(train.train, train.parse(sys.argv[1:])))
"""


@no_card
def test_a_resumed_run_with_graphs_is_equal(tmp_path):
    """SDD's own loss is a graph. It must read the weights that --resume restored."""
    words = ["--model", "toy", "--concept", "star", *SHORT, "--device", CARD, "--deterministic"]
    words += ["--preview-every", 0]
    status, _, err = command("train.py", *words, "--out", tmp_path / "b")
    assert status == 0, err
    status, _, err = command("-c", STOPPED_AFTER_FOUR, *words, "--out", tmp_path / "a")
    assert status == 130 and "4 of 6 iterations are saved" in err, err
    status, _, err = command("train.py", "--resume", "--out", tmp_path / "a")
    assert status == 0, err
    same(tmp_path / "a", tmp_path / "b")


def same(a, b):
    for file in ("erased.safetensors", "checkpoint.safetensors"):
        (x, _), (y, _) = (weights.read(folder / file) for folder in (a, b))
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
