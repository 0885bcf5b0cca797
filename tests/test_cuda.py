"""CUDA. Without a card: an iteration of each trainer, a drawing and a measurement on fake tensors, which have a device and a type but
no numbers, so that a tensor left on the CPU or two types that do not meet are found on any machine. With a card: the numbers."""

import copy
import ctypes
import shutil
import subprocess

import pytest
import torch
from test_commands import SHORT, command
from test_run import HALVES, Casts, fails, follows_fp32, make  # noqa: F401, the fixture
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ablation
import presets
import train
import weights
from generate import InferenceUNet, generate_latents
from report import previews
from train import Run
from unet import Attention

CARD = torch.device("cuda:0")
no_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ABLATE = ["--method", "ablate", "--anchor", "circle", "--anchor-images", "2"]


class Numbers(TorchDispatchMode):
    """Gives a 1 where the loop asks a fake tensor for its value, and counts how often the host waits: for such a value, or for a copy."""

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
    """torch's CPU build has no word for CUDA's current device, which slices ask for; two lines of C++ teach it one that does nothing."""
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
    """The module with fake tensors on the card for its own: moving a fake tensor there would not change what it says of itself."""
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
        [*ABLATE, "--prior", "1", "--detach-start"],
        [*ABLATE, "--train-params", "embedding"],
        *(
            pytest.param(words, marks=pytest.mark.long)
            for words in (
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
    """The backward pass is left out: autograd needs a driver for it. Where it puts a gradient follows from the parameter."""

    def backward(value):
        assert value.device == CARD and value.dtype == torch.float32
        for p in r.theta.values():
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr("train.pick_device", torch.device)
    monkeypatch.setattr(
        torch.cuda.amp.common, "amp_definitely_not_available", lambda: False
    )  # else autocast turns itself off
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)  # they are there
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(weights, "fingerprint", lambda tensors: "")
    monkeypatch.setattr(ablation, "save", lambda *_: None)
    a = presets.settle(
        train.parse(
            [
                "--model",
                str(model_folder),
                "--preset",
                "toy",
                "--concept",
                "star",
                "red",
                "--device",
                str(CARD),
                "--dtype",
                "bf16",
                *SHORT,
                *words,
            ]
        )
    )
    model = weights.load(model_folder)
    on_the_cpu = copy.deepcopy(model.unet)
    with FakeTensorMode(allow_non_fake_inputs=True), Numbers() as numbers:
        r = Run(
            tmp_path,
            a,
            model._replace(
                unet=on_the_card(model.unet),
                vae=on_the_card(model.vae),
                text_encoder=on_the_card(model.text_encoder),
            ),
        )
        r.make_latents()
        for p in r.theta.values():
            p.requires_grad_(False)
        with torch.autocast("cuda", r.dtype, enabled=r.dtype != torch.float32, cache_enabled=False):
            before = numbers.waits
            next(r.iterations())
            assert numbers.waits - before <= (
                10 if r.pairs else 5
            )  # random numbers in, the loss out; not one an evaluation
            previews.measure(r)
            c_p = previews.texts(r, r.student, ["arcadia"]) if r.reads else r.previews[:1]
            painter = InferenceUNet(r.student.unet, r.device, r.dtype)
            with Casts() as casts:
                painter(torch.empty(1, *r.shape, device=CARD), 500, r.c_0)
            # z, t's sinusoids, c, e; five in each attention, which has no kernel of its own on fake tensors; no weight, and no norm
            assert casts.n <= 5 + 5 * sum(
                isinstance(module, Attention) for module in painter.unet.modules()
            )
            afar = InferenceUNet(
                on_the_cpu, r.device, r.dtype
            )  # as generate.py and eval.py have it
            e = afar(torch.empty(1, *r.shape, device=CARD), 500, r.c_0)
            assert (e.device, e.dtype) == (CARD, torch.float32)
            assert {(p.device, p.dtype) for p in afar.unet.parameters()} == {(CARD, r.dtype)}
            (z,) = generate_latents(r.student, painter, r.c_0, c_p, [3], r.preview_scheduler, 7.5)
            x = r.student.vae.decode(z)
        moments = [
            state[key] for state in r.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
        ]
        trained = [*r.theta.values(), *r.theta_ema.values(), *moments]
        assert len(trained) == 4 * len(r.theta) and all(
            p.device == CARD and p.dtype == torch.float32 for p in trained
        )
        frozen = {
            p.dtype
            for name, p in r.student.unet.named_parameters()
            if name not in r.theta and "norm" not in name
        }
        assert (
            frozen <= {r.dtype}
            and z.device == x.device == CARD
            and z.dtype == torch.float32
            and x.dtype == r.dtype
        )


@torch.enable_grad()
def iterations(tmp_path, n, *words):
    """The losses of n iterations, and θ's gradients, on the CPU."""
    r, grads = make(tmp_path, "--warmup", 0, *words), []
    r.optimizer.register_step_pre_hook(
        lambda *_: grads.append(torch.cat([p.grad.flatten() for p in r.theta.values()]).cpu())
    )
    with torch.autocast(
        r.device.type, r.dtype, enabled=r.dtype != torch.float32, cache_enabled=False
    ):
        rows = [it for _, it in zip(range(n), r.iterations())]
    return [it.loss for it in rows], grads


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
    """The same draws, in other kernels: rounding is 6e-8, and the loss, the square of a small difference of two estimates, has 1e-3 of it
    at most. cuDNN's own choice for convolutions, TF32, rounds at 5e-4, and would need a hundred times the tolerance."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    (loss, grad), (loss_2, grad_2) = (
        iterations(tmp_path / device, 1, *words, "--dtype", "fp32", "--device", device)
        for device in ("cpu", str(CARD))
    )
    assert loss_2 == pytest.approx(loss, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(grad[0], grad_2[0], dim=0) > 0.9999


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
    words = [
        "--model",
        "toy",
        "--concept",
        "star",
        *SHORT,
        "--device",
        CARD,
        "--deterministic",
        *fails("raise torch.OutOfMemoryError('CUDA out of memory')"),
    ]
    status, _, err = command("train.py", *words, "--out", tmp_path / "a")
    assert status == 2 and "3 iterations are saved" in err
    (tmp_path / "mended").touch()
    for more in (["--resume", "--out", tmp_path / "a"], [*words, "--out", tmp_path / "b"]):
        status, _, err = command("train.py", *more)
        assert status == 0, err
    same(tmp_path / "a", tmp_path / "b")


def same(a, b):
    for file in ("erased.safetensors", "checkpoint.safetensors"):
        (x, _), (y, _) = (weights.read(folder / file) for folder in (a, b))
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
