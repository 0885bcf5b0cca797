"""A training run: a diverged loss, less memory, less precision, --compile, and its settings."""

import copy
import csv
import re

import numpy as np
import pytest
import torch
from common import HALVES, SHORT, flat, follows_fp32, run
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import presets
import train
import weights
from support import fast
from support.cli import memory_is_full

STAR = f"{SHORT} --concept star --preview-every 0"
DIVERGES = '''
from losses import sdd_loss
called = 0


def loss(**x):
    """Is wrong in its fourth call, at iteration 3."""
    global called
    called += 1
    value = sdd_loss(**x)
    return FAULT if called == 4 else value
'''


# ------------------------------------------------------------------------------------- divergence
@pytest.mark.parametrize(
    "fault, said",
    [
        ("value * float('nan')", "diverged at iteration 3 (loss nan"),
        ("value * 1e9", "diverged at iteration 3 (loss "),
        ("value + 0 * (value - value.detach()).sqrt()", "gradient norm nan"),
    ],
)
def test_a_diverged_loss_stops_the_run_before_the_step(fault, said, tmp_path, capsys):
    (tmp_path / "my.py").write_text(DIVERGES.replace("FAULT", fault))
    assert run(f"{STAR} --loss {tmp_path / 'my.py'}:loss", tmp_path / "o") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error and "Start again in another folder with a smaller --lr" in error
    tensors, metadata = weights.read(tmp_path / "o" / "checkpoint.safetensors")
    assert metadata["iterations"] == "2"
    assert all(x.isfinite().all() for x in tensors.values() if x.is_floating_point())
    assert len((tmp_path / "o" / "log.csv").read_text().splitlines()) == 1 + 3
    assert not (tmp_path / "o" / "erased.safetensors").exists()


# --------------------------------------------------------------------------- memory and precision
def test_checkpointing_keeps_the_bits_and_less_memory(tmp_path):
    """The same log and weights, with fewer bytes kept for the backward pass."""
    found = []
    for number, flags in enumerate(("", "--gradient-checkpointing")):
        kept = {}

        def keep(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        out = tmp_path / str(number)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            assert run(f"{STAR} --iters 2 --warmup 0 {flags}", out) == 0
        tensors, _ = weights.read(out / "erased.safetensors")
        found.append((sum(kept.values()), tensors, (out / "log.csv").read_text()))
    (plain, theta, log), (less, theta_2, log_2) = found
    assert log == log_2
    assert all(torch.equal(theta[name], theta_2[name]) for name in theta)
    assert less < plain / 2


@HALVES
def test_half_precision_follows_fp32_and_its_average_moves(dtype, loss, norm, cosine, z, tmp_path):
    follows_fp32(STAR, tmp_path / "o", dtype, loss, norm, cosine, z)


class Casts(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


def test_an_inference_unet_is_the_unet_in_half_precision():
    """It equals unet.to(bfloat16) without autocast, wherever it is called.

    It copies no tensor that is in bfloat16 already, and an evaluation casts no weight.
    """
    unet = weights.load("toy").unet
    trained = [p for name, p in unet.named_parameters() if ".attn2." in name]
    for name, p in unet.named_parameters():
        if ".attn2." not in name:
            p.data = p.data.bfloat16()
    inference = fast.InferenceUNet(unet, torch.device("cpu"), torch.bfloat16)
    z, c = torch.randn(2, 4, 16, 16), torch.randn(1, 77, 64)
    for _ in range(2):
        whole = copy.deepcopy(unet).to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), Casts() as casts:
            e = inference(z, 500, c)
        assert e.dtype == torch.float32 and not e.requires_grad
        assert torch.equal(e, whole(z.bfloat16(), 500, c.bfloat16()).float())
        assert casts.n <= 5  # z, t's sinusoids, c, e
        for p in trained:
            p.data.mul_(1.1)
        assert torch.equal(inference(z, 500, c), e)  # the old weights, until
        inference.sync()
    assert len(inference.copies) == len(trained) == 55
    assert inference.unet.conv_in.weight.data_ptr() == unet.conv_in.weight.data_ptr()


@pytest.mark.parametrize("method, output", [("sdd", "teacher"), ("esd-x", "student")])
def test_half_precision_samples_with_the_newest_weights(method, output, tmp_path, monkeypatch):
    """Each z_t comes from the θ* (ESD: θ) of the iteration before."""
    seen = []

    class Watched(fast.InferenceUNet):
        def __call__(self, *inputs):
            seen.append(flat(self.source))
            assert torch.equal(flat(self.copies), seen[-1].bfloat16())
            return super().__call__(*inputs)

    monkeypatch.setattr("train.InferenceUNet", Watched)
    line = f"{STAR} --method {method} --dtype bf16 --iters 3 --warmup 0 --steps 1 --export-every 1"
    assert run(line, tmp_path / "o") == 0
    assert not torch.equal(seen[0], seen[-1])
    newest, _ = weights.read(tmp_path / "o" / "exports" / f"{output}-000002.safetensors")
    names = [name for name, _ in weights.load("toy").unet.named_parameters() if name in newest]
    assert torch.equal(seen[-1], flat(newest[name] for name in names))


# ---------------------------------------------------------------------------------- torch.compile
def test_a_failure_of_torch_compile_is_a_warning(capsys, monkeypatch):
    """The run goes on with the UNet as it is. Errors as torch.compile raises them."""
    error = RuntimeError("Failed to find C compiler")

    def backend(*_):
        raise error

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda unet, **how: original(unet, backend=backend))
    evaluate = fast.compiled(lambda x: x + 1)
    assert [evaluate(torch.ones(())).item() for _ in range(2)] == [2, 2]
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "Failed to find C compiler" in said
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="out of memory") as e:
        fast.compiled(lambda x: x + 2)(torch.ones(()))
    assert memory_is_full(e.value)


@pytest.mark.long
def test_the_unet_is_one_graph_for_torch_compile():
    """Otherwise --compile would end with an error, because it asks for one graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    unet = weights.load("toy").unet
    z, t, c = torch.randn(2, 4, 8, 8), torch.tensor([500, 500]), torch.randn(2, 77, 64)
    compiled = torch.compile(unet, dynamic=False, fullgraph=True, backend=backend)
    assert torch.equal(compiled(z, t, c), unet(z, t, c)) and len(graphs) == 1


# --------------------------------------------------------------------------------------- settings
def settled(words):
    return presets.settle(train.parse(words.split()))


def test_concepts_are_one_line_and_for_toy_models_in_small_letters():
    def concepts(*given):
        return presets.settle(train.parse([*given, "--device", "cpu"]))["concept"]

    toy = ("--model", "toy", "--concept")
    assert concepts(*toy, "I2P", "--preset", "paper") == list(presets.I2P)
    assert concepts(*toy, "Star\u2028 ", "RED\ngreen") == ["star", "red green"]
    assert concepts("--concept", "Van  Gogh", "--model", "some/model") == ["Van Gogh"]


@pytest.mark.parametrize(
    "words, lr",
    [
        ("", 3e-4),
        ("--method esd-x", 4e-4),
        ("--method ablate --anchor drink", 5e-4),
        ("--preset toy-hold", 1e-3),
        ("--lr 1", 1),
    ],
)
def test_the_emoji_model_takes_a_share_of_the_toy_presets_rates(words, lr):
    words = f"--model emoji --concept alcohol {words}"
    assert settled(words)["lr"] == pytest.approx(lr)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--iters 1 --warmup 1", "never reaches"),
        ("--method ablate --train-params embedding --anchor star", "the anchor's own word 'star'"),
    ],
)
def test_what_is_only_a_warning(words, said, capsys):
    concept = ["--concept", "red star"] if "embedding" in words else ["--concept", "star"]
    presets.settle(train.parse(["--model", "toy", *concept, *words.split()]))
    assert said in capsys.readouterr().err


def test_a_preset_skips_preview_prompts_that_the_model_does_not_know(tmp_path, capsys):
    line = f"{SHORT} --concept star --preset paper --iters 1 --warmup 0"
    assert run(f"{line} --preview-every 1 --preview-steps 1", tmp_path / "o") == 0
    assert "'a photo of a mountain lake' is skipped" in capsys.readouterr().err


def test_a_resumed_run_covers_or_shows_the_images_that_it_makes(tmp_path, monkeypatch):
    """Also those of the original, which are generated once per command."""
    monkeypatch.setattr("support.nudity.ABOUT", re.compile("star"))
    monkeypatch.setattr("support.nudity.censor", np.zeros_like)
    out = tmp_path / "o"
    first = f"{SHORT} --concept star --iters 1 --warmup 0 --preview star --preview-every 1"
    again = "train.py --resume"
    for line, covered in ((first, True), (f"{again} --show-uncensored", False), (again, True)):
        assert run(line, out) == 0
        for file in ("original-0.png", "000001/student-0.png"):
            image = np.asarray(Image.open(out / "previews" / file))
            assert (image.max() == 0) == covered


# ------------------------------------------------------------------------------------- the log
def test_gap_and_drift_are_in_the_rows_of_previews_and_in_the_last(tmp_path):
    words = "--concept star --iters 3 --preview star --preview-every 2 --preview-steps 1"
    assert run(f"{SHORT} {words}", tmp_path / "o") == 0
    with open(tmp_path / "o" / "log.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    for key in ("gap_student", "drift_student", "gap_teacher", "drift_teacher"):
        assert [bool(row[key]) for row in rows] == [False, True, True]
