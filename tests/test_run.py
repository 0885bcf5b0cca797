"""A training run under pressure: full memory, a diverged loss, less memory and less precision."""

import copy
import gc
import json
import re
import signal
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import relative
from PIL import Image
from test_commands import SHORT, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ablation
import closed_form
import ema
import presets
import train
import weights
from pipeline import InferenceUNet, compiled
from report.previews import Previews
from support.cli import memory_is_full
from support.cuda_graph import CudaGraph
from support.own_loss import OwnLossError
from train import Run

STAR = ["--model", "toy", "--concept", "star", *SHORT, "--device", "cpu"]
ONE_PREVIEW = ["--preview", "star", "--preview-steps", "1"]
FAILS = '''
from pathlib import Path
import torch
from losses import sdd_loss

called = 0


def fails(**x):
    """Does FAULT in its fourth call, unless the file `corrected` lies next to it."""
    global called
    called += 1
    value = sdd_loss(**x)
    if called == 4 and not Path(__file__).with_name("corrected").exists():
        FAULT
    return value
'''


@pytest.fixture
def fails(tmp_path):
    def write(fault):
        (tmp_path / "loss.py").write_text(FAILS.replace("FAULT", fault), encoding="utf-8")
        return ["--loss", f"{tmp_path / 'loss.py'}:fails"]

    return write


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def lost_in_another_error(text):
    """An error on the way out of one about memory, as from a CUDA graph that was not recorded."""
    error = RuntimeError("the recording failed")
    error.__context__ = torch.OutOfMemoryError(text)
    return error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, lost_in_another_error])
def test_the_unfinished_iteration_is_freed_before_the_checkpoint(
    error, tmp_path, capsys, monkeypatch
):
    """Otherwise the memory could be too full to save. Some libraries raise a RuntimeError."""
    latents, left = [], []

    def iterate(*_):
        z = torch.zeros(3)
        latents.append(weakref.ref(z))
        raise error("CUDA error: out of memory")

    monkeypatch.setattr(train, "iterate", iterate)
    monkeypatch.setattr(Run, "save", lambda run: left.append(latents[0]()))
    assert run(train, *STAR, "--preview-every", "0", "--out", tmp_path / "o") == 2
    assert "--gradient-checkpointing" in capsys.readouterr().err
    assert left == [None]


@pytest.mark.parametrize("full_in, kept", [(1, 0), (4, 2)])
def test_out_of_memory_in_a_step_keeps_the_checkpoint_before(
    full_in, kept, tmp_path, capsys, monkeypatch
):
    """Such a step has changed some tensors and not others. Without a checkpoint, it is iteration 0.

    The resumed run has the bits of a run that was never interrupted.
    """
    words = [*STAR, "--preview-every", "0"]
    assert run(train, *words, "--out", tmp_path / "whole") == 0
    steps, change = [], torch.Tensor.addcdiv_

    def full(*given, **how):  # called once for each trained tensor, after its moments have changed
        steps.append(1)
        if len(steps) == 55 * (full_in - 1) + 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return change(*given, **how)

    monkeypatch.setattr(torch.Tensor, "addcdiv_", full)
    assert run(train, *words, "--out", tmp_path / "o") == 2
    said = capsys.readouterr().err
    assert ("the last checkpoint is kept" if kept else "there is no checkpoint yet") in said
    file = tmp_path / "o" / "checkpoint.safetensors"
    assert file.exists() == bool(kept)
    if kept:
        assert weights.read(file)[1]["iterations"] == str(kept)  # --save-every is 2
    assert run(train, "--resume", "--out", tmp_path / "o") == 0
    for name in ("erased.safetensors", "checkpoint.safetensors"):
        (a, _), (b, _) = (weights.read(tmp_path / out / name) for out in ("o", "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_out_of_memory_between_the_step_and_the_average(tmp_path, monkeypatch):
    """θ is new and θ* is old: this is not saved."""
    words = [*STAR, "--preview-every", "0"]
    assert run(train, *words, "--out", tmp_path / "whole") == 0
    calls, update = [], ema.update

    def full(*given):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        update(*given)

    monkeypatch.setattr(ema, "update", full)
    assert run(train, *words, "--out", tmp_path / "o") == 2
    assert run(train, "--resume", "--out", tmp_path / "o") == 0
    (a, _), (b, _) = (weights.read(tmp_path / out / "erased.safetensors") for out in ("o", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_out_of_memory_in_a_round_of_rece(tmp_path, monkeypatch):
    words = "--model toy --concept star --method rece --anchor circle --preview-every 0".split()
    words += ["--device", "cpu"]
    assert run(train, *words, "--out", tmp_path / "whole") == 0
    calls, residual = [], closed_form.residual

    def full(*given):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return residual(*given)

    monkeypatch.setattr(closed_form, "residual", full)
    assert run(train, *words, "--out", tmp_path / "o") == 2
    assert run(train, "--resume", "--out", tmp_path / "o") == 0
    (a, _), (b, _) = (weights.read(tmp_path / out / "erased.safetensors") for out in ("o", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_out_of_memory_saves_and_names_what_helps(tmp_path, fails, capsys, monkeypatch):
    """The run continues with checkpointing, to the bits of a run that was never interrupted."""
    blocks = []
    monkeypatch.setattr(
        "train.checkpoint", lambda *words, **how: blocks.append(words) or checkpoint(*words, **how)
    )
    words = fails("raise torch.OutOfMemoryError('CUDA out of memory')")
    assert run(train, *STAR, *words, "--out", tmp_path / "o") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "3 iterations are saved" in said
        and "--gradient-checkpointing" in said
        and "--batch-size" in said
    )
    (tmp_path / "o" / "corrected").touch()
    assert (
        not blocks
        and weights.read(tmp_path / "o" / "checkpoint.safetensors")[1]["iterations"] == "3"
    )  # --save-every is 2
    assert (
        run(train, "--resume", "--out", tmp_path / "o", "--gradient-checkpointing") == 0 and blocks
    )
    assert run(train, *STAR, "--out", tmp_path / "whole") == 0  # the same loss without the fault
    for file in ("erased.safetensors", "checkpoint.safetensors"):
        (a, _), (b, _) = (weights.read(tmp_path / name / file) for name in ("o", "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "o" / "log.csv").read_bytes() == (
        tmp_path / "whole" / "log.csv"
    ).read_bytes()


@pytest.mark.parametrize(
    "fault, said",
    [
        ("value = value * float('nan')", "diverged at iteration 3 (loss nan"),
        ("value = value * 1e9", "at iteration 3"),
        ("value = value + 0 * (value - value.detach()).sqrt()", "gradient norm nan"),
    ],
)
def test_a_diverged_loss_stops_the_run_before_the_step(
    fault, said, tmp_path, fails, capsys, monkeypatch
):
    steps, step, before = [], torch.optim.AdamW.step, signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *words: steps.append(step(*words)))
    assert run(train, *STAR, *fails(fault), "--out", tmp_path / "o") == 2
    assert said in (err := capsys.readouterr().err.strip().splitlines()[-1]) and "--lr" in err
    assert (
        len(steps) == 3 and signal.getsignal(signal.SIGINT) == before
    )  # in a notebook, Ctrl-C stops again
    tensors, metadata = weights.read(tmp_path / "o" / "checkpoint.safetensors")
    assert metadata["iterations"] == "2" and all(
        x.isfinite().all() for x in tensors.values() if x.is_floating_point()
    )
    assert (
        len((tmp_path / "o" / "log.csv").read_text().splitlines()) == 1 + 3
        and not (tmp_path / "o" / "erased.safetensors").exists()
    )


def test_a_mistake_in_a_loss_keeps_what_was_done(tmp_path, fails, capsys):
    """Only a folder without an iteration is emptied (test_own_loss.py)."""
    out = tmp_path / "o"
    words = [
        *ONE_PREVIEW,
        *fails("raise ValueError('mine')"),
        "--save-every",
        "0",
        "--export-every",
        "1",
    ]
    assert run(train, *STAR, *words, "--out", out) == 2
    said = capsys.readouterr().err
    assert "mine" in said and f"{out} stays as it is" in said
    assert len((out / "log.csv").read_text().splitlines()) == 1 + 3
    assert (out / "exports" / "teacher-000003.safetensors").exists()


@pytest.mark.parametrize("kept", ["anchors.safetensors", None])
def test_a_mistake_in_a_loss_keeps_images_and_a_resumed_run(kept, tmp_path, capsys, monkeypatch):
    out = tmp_path / "o"
    with monkeypatch.context() as patched:
        patched.setattr(train, "iterate", lambda *_: None)
        assert run(train, *STAR, "--preview-every", "0", "--out", out) == 0

    def mistake(*_):
        raise OwnLossError("mine")

    monkeypatch.setattr(train, "train_in", mistake)
    words = ["--resume"]
    if kept:
        words = [*STAR]
        for file in [path for path in out.iterdir() if path.name != "previews"]:
            file.unlink()

        def mistake_after_images(*_):
            (out / kept).touch()
            raise OwnLossError("mine")

        monkeypatch.setattr(train, "train_in", mistake_after_images)
    assert run(train, *words, "--out", out) == 2
    assert "stays as it is" in capsys.readouterr().err
    assert (out / (kept or "run.json")).exists()


def test_a_full_memory_in_a_loss_of_your_own_saves_the_run(tmp_path, fails, capsys):
    words = [*STAR, *ONE_PREVIEW, *fails("raise MemoryError()")]
    assert run(train, *words, "--out", tmp_path / "o") == 2
    assert "3 iterations are saved" in capsys.readouterr().err


def test_no_memory_for_a_preview_in_between(tmp_path, capsys, monkeypatch):
    """The log and the checkpoint have the same iterations, and so has the log after --resume."""
    out = tmp_path / "o"
    with monkeypatch.context() as full:
        full.setattr("train.Previews.measure", out_of_memory)
        assert run(train, *STAR, *ONE_PREVIEW, "--preview-every", "2", "--out", out) == 2
    assert "2 iterations are saved" in capsys.readouterr().err
    assert len((out / "log.csv").read_text().splitlines()) == 1 + 2
    assert run(train, "--resume", "--out", out) == 0
    rows = (out / "log.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(len(rows)))


def test_uncensored_previews_can_be_asked_for_later(tmp_path, monkeypatch):
    out, asked = tmp_path / "o", []
    with monkeypatch.context() as patched:
        patched.setattr(train, "iterate", lambda *_: None)
        assert run(train, *STAR, "--preview-every", "0", "--out", out) == 0
    monkeypatch.setattr(train, "train_in", lambda out, settings, args: asked.append(settings))
    assert run(train, "--resume", "--out", out, "--show-uncensored") == 0
    assert run(train, "--resume", "--out", out) == 0
    assert [settings["show_uncensored"] for settings in asked] == [True, False]
    words = ["--resume", *STAR, "--preview-every", "0", "--show-uncensored"]
    assert run(train, *words, "--out", out) == 0
    assert asked[-1]["show_uncensored"]


def test_a_resumed_run_can_leave_out_previews(tmp_path, capsys, monkeypatch):
    """They can be what does not fit the memory. A run of a version without --compile continues."""
    out, asked, train_in = tmp_path / "o", [], train.train_in
    with monkeypatch.context() as patched:
        patched.setattr(train, "iterate", lambda *_: None)
        patched.setattr("train.Previews.finish", lambda *_: None)
        assert run(train, *STAR, "--preview-every", "2", "--out", out) == 0
    content = json.loads((out / "run.json").read_text())
    del content["args"]["compile"]
    (out / "run.json").write_text(json.dumps(content))
    monkeypatch.setattr(train, "train_in", lambda out, settings, args: asked.append(settings))
    assert run(train, "--resume", "--out", out, "--preview-every", "0") == 0
    assert run(train, "--resume", "--out", out) == 0
    assert [(x["preview_every"], x["compile"]) for x in asked] == [(0, False), (2, False)]
    assert run(train, "--resume", "--out", out, "--device", "cuda", "--show-uncensored") == 0
    assert run(train, "--resume", "--out", out) == 0
    assert [x["device"] for x in asked[2:]] == ["cuda", "cpu"]
    assert [x["show_uncensored"] for x in asked[2:]] == [True, False]
    content["args"]["compile"] = True  # a run that began on a GPU
    (out / "run.json").write_text(json.dumps(content))
    with monkeypatch.context() as patched:
        patched.setattr(train, "train_in", train_in)
        patched.setattr(train, "iterate", lambda *_: None)
        patched.setattr("train.Previews.finish", lambda *_: None)
        assert run(train, "--resume", "--out", out, "--device", "cpu") == 0
    assert "--compile needs a CUDA GPU, so it is not used" in capsys.readouterr().err
    assert run(train, "--resume", "--out", out, "--compile") == 2
    assert "--compile has no effect" in capsys.readouterr().err


def test_a_resumed_run_covers_or_shows_the_images_that_it_makes(tmp_path, monkeypatch):
    """Also those of the original, which are generated once per command."""
    monkeypatch.setattr("support.nudity.ABOUT", re.compile("star"))
    monkeypatch.setattr("support.nudity.censor", np.zeros_like)
    words = ["--preview", "star", "--preview-every", "3", "--out", tmp_path / "o"]
    assert run(train, *STAR, *words) == 0
    for flags, covered in (([], True), (["--show-uncensored"], False), ([], True)):
        assert run(train, "--resume", *words[-2:], *flags) == 0
        for file in ("original-0.png", "000006/student-0.png"):
            image = np.asarray(Image.open(tmp_path / "o" / "previews" / file))
            assert (image.max() == 0) == covered


def test_concepts_are_one_line_and_for_toy_models_in_small_letters():
    def concepts(*given):
        return presets.settle(train.parse(["--model", "toy", *given]))["concept"]

    assert concepts("--concept", "I2P", "--preset", "paper") == list(presets.I2P)
    assert concepts("--concept", "Star\u2028 ", "RED\ngreen") == ["star", "red green"]
    given = ["--concept", "Van  Gogh", "--model", "some/model", "--device", "cpu"]
    assert concepts(*given) == ["Van Gogh"]


def test_a_run_continues_only_with_the_weights_that_it_began_with(tmp_path, capsys, monkeypatch):
    words = [*STAR, "--preview-every", "0", "--out", tmp_path / "o"]
    assert run(train, *words) == 0
    load = weights.load

    def other_weights(*given):
        model = load(*given)
        for name, p in model.unet.named_parameters():
            if "attn2" in name:
                p.data.mul_(1.5)
        return model

    before = (tmp_path / "o" / "erased.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(weights, "load", other_weights)
        assert run(train, "--resume", "--out", tmp_path / "o") == 2
    assert "The weights of toy have changed" in capsys.readouterr().err
    assert (tmp_path / "o" / "erased.safetensors").read_bytes() == before
    log = tmp_path / "o" / "log.csv"
    whole = log.read_bytes()
    log.write_bytes(whole[:-10])  # half a line at its end
    assert run(train, "--resume", "--out", tmp_path / "o") == 0
    assert log.read_bytes() == whole[: whole[:-1].rindex(b"\n") + 1]


def test_an_interrupt_before_the_run_begins(tmp_path, capsys, monkeypatch):
    """There is nothing to resume, so the sentence must not say so."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("weights.load", interrupt)
    assert run(train, *STAR, "--out", tmp_path / "o") == 130
    said = capsys.readouterr().err
    assert "nothing has been written" in said and "--resume" not in said


def test_no_memory_for_the_last_preview(tmp_path, capsys, monkeypatch):
    """The training is over and saved, and the user must know it. --resume makes the preview."""
    out = tmp_path / "o"
    with monkeypatch.context() as full:
        full.setattr("train.Previews.finish", out_of_memory)
        assert run(train, *STAR, *ONE_PREVIEW, "--out", out) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(out / "erased.safetensors") in said and f"--resume --out {out}" in said
    trained, _ = weights.read(out / "erased.safetensors")
    run_json = (out / "run.json").read_bytes()
    assert not (out / "film.webp").exists()
    assert run(train, "--resume", "--out", out) == 0
    assert (out / "film.webp").exists()
    again, _ = weights.read(out / "erased.safetensors")
    assert all(torch.equal(again[name], x) for name, x in trained.items())
    assert (out / "run.json").read_bytes() == run_json  # with the time of the training


def test_a_mistake_in_the_last_preview_is_not_hidden(tmp_path, monkeypatch):
    def finish(*_):
        raise RuntimeError("a mistake")

    monkeypatch.setattr("train.Previews.finish", finish)
    with pytest.raises(RuntimeError, match="a mistake"):
        run(train, *STAR, *ONE_PREVIEW, "--out", tmp_path / "o")


def test_a_failure_of_torch_compile_is_a_warning(capsys, monkeypatch):
    """The run goes on with the UNet as it is. Errors as torch.compile raises them."""
    error = RuntimeError("Failed to find C compiler")

    def backend(*_):
        raise error

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda unet, **how: original(unet, backend=backend))
    evaluate = compiled(lambda x: x + 1)
    assert [evaluate(torch.ones(())).item() for _ in range(2)] == [2, 2]
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "Failed to find C compiler" in said
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="out of memory") as e:
        compiled(lambda x: x + 2)(torch.ones(()))
    assert memory_is_full(e.value)

    def mistake(x):
        raise ZeroDivisionError("a mistake in the UNet")

    monkeypatch.setattr(torch, "compile", lambda unet, **how: unet)
    with pytest.raises(ZeroDivisionError):
        compiled(mistake)(torch.ones(()))

    def not_for_this_python(unet, **how):
        raise RuntimeError("torch.compile is not supported on this Python")

    monkeypatch.setattr(torch, "compile", not_for_this_python)
    capsys.readouterr()
    evaluate = compiled(lambda x: x + 1)
    assert [evaluate(torch.ones(())).item() for _ in range(2)] == [2, 2]
    assert capsys.readouterr().err.count("is not supported on this Python") == 1


def test_a_unet_that_could_not_be_compiled_is_freed_with_its_last_reference(monkeypatch):
    """Its weights can be a tenth of a GPU's memory, and the garbage collector may run late."""

    class Doubled:
        def __call__(self, x):
            return 2 * x

    def fails(x):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch, "compile", lambda unet, **how: fails)
    unet = Doubled()
    alive = weakref.ref(unet)
    evaluate = compiled(unet)
    gc.disable()
    try:
        evaluate(torch.ones(()))
        del unet, evaluate
        assert alive() is None
    finally:
        gc.enable()


def test_only_the_unet_that_samples_is_compiled(tmp_path, monkeypatch):
    """On a CPU, with stand-ins for torch.compile and for the graph."""
    calls = []

    def stand_in(unet, dynamic, fullgraph):
        def call(*inputs):
            calls.append(inputs)
            return unet(*inputs)

        return call

    monkeypatch.setattr(torch, "compile", stand_in)
    monkeypatch.setattr(CudaGraph, "__call__", lambda graph, *inputs: graph.function(*inputs))
    monkeypatch.setattr("pipeline.can_record", lambda device: True)
    rows = []
    for words in ([], ["--compile"]):
        assert not calls
        with torch.enable_grad():
            r = make(tmp_path, *words)
            iterations = r.iterations()
            rows.append([next(iterations) for _ in range(2)])
    assert rows[0] == rows[1]
    assert len(calls) == sum(it.k for it in rows[1])
    Previews(r).images(r.models.student)
    assert len(calls) == sum(it.k for it in rows[1])


@pytest.mark.long
def test_the_unet_is_one_graph_for_torch_compile():
    """Otherwise --compile would end with an error, because it asks for one graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    unet = weights.load("toy").unet
    z, t, c = torch.randn(2, 4, 8, 8), torch.tensor([500, 500]), torch.randn(2, 77, 64)
    fast = torch.compile(unet, dynamic=False, fullgraph=True, backend=backend)
    assert torch.equal(fast(z, t, c), unet(z, t, c)) and len(graphs) == 1


def make(tmp_path, *words):
    """A train.Run of the star on the toy model, without previews."""
    settings = presets.settle(train.parse([*STAR, "--preview-every", "0", *map(str, words)]))
    return Run(tmp_path, settings)


@torch.enable_grad()
def test_checkpointing_keeps_the_bits_and_less_memory(tmp_path):
    """The same losses, gradients and updates, with fewer bytes kept for the backward pass."""
    rows, theta, plain = train_two_iterations(make(tmp_path))
    rows_2, theta_2, less = train_two_iterations(make(tmp_path, "--gradient-checkpointing"))
    assert rows == rows_2
    assert all(torch.equal(theta[name], theta_2[name]) for name in theta)
    assert less < plain / 2


def train_two_iterations(run):
    """Losses and gradient norms, the trained tensors, and the bytes kept for backward passes."""
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        rows = [(it.loss, it.grad_norm) for _, it in zip(range(2), run.iterations())]
    theta = {name: x.clone() for name, x in run.models.theta.items()}
    return rows, theta, sum(kept.values())


HALVES = pytest.mark.parametrize(
    "dtype, loss, norm, cosine, z", [("bf16", 0.4, 0.2, 0.8, 0.5), ("fp16", 0.05, 0.2, 0.8, 0.1)]
)


@HALVES
def test_half_precision_follows_fp32_and_its_average_moves(dtype, loss, norm, cosine, z, tmp_path):
    follows_fp32(dtype, loss, norm, cosine, z, tmp_path)


@torch.enable_grad()
def follows_fp32(dtype, loss, norm, cosine, z, tmp_path, *more):
    """Three iterations in half precision next to fp32, as on a GPU.

    Frozen tensors and sampling are in half precision; the loss is under autocast. Each iteration
    starts from the weights and z_t of fp32. The z_t that half precision samples itself is compared
    on its own. The loss is the square of a small difference of two estimates, so their rounding
    (2^-9 in bf16, 2^-12 in fp16) counts. The bounds are about twice what 100 iterations on the CPU
    showed (five seeds of 20): the loss up to 22 % off in bf16 (1 % in fp16), the gradient's norm
    8 % (5 %), its cosine at least 0.949 (0.946), z_t 22 % (2 %).
    """
    full, half = [
        make(tmp_path, "--dtype", name, "--warmup", 0, "--ema", 0.999, *more)
        for name in ("fp32", dtype)
    ]
    before = flat(full.models.theta)
    sampled = []  # fp32's z_t
    full_loss, half_loss = full.loss(), half.loss()

    def keep_latents(z_t, **batch):
        sampled.append(z_t)
        return full_loss(z_t=z_t, **batch)

    def compare_latents(z_t, **batch):
        assert relative(z_t.float(), sampled[-1]) < z
        return half_loss(z_t=sampled[-1], **batch)

    full.loss, half.loss = lambda: keep_latents, lambda: compare_latents
    grads, half_grads = watch_gradients(full), watch_gradients(half)
    iterations, half_iterations = full.iterations(), half.iterations()
    for i in range(3):
        with torch.no_grad():
            for name, p in half.models.theta.items():
                p.copy_(full.models.theta[name])
        a = next(iterations)
        with torch.autocast(half.device.type, half.dtype, cache_enabled=False):
            b = next(half_iterations)
        assert b.loss == pytest.approx(a.loss, rel=loss) and b.loss != a.loss
        # Neither the norm nor AdamW sees the factor of the GradScaler.
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=norm)
        assert F.cosine_similarity(grads[i], half_grads[i], dim=0) > cosine
    theta, theta_ema = half.models.theta, half.models.theta_ema
    for x in [*theta.values(), *theta_ema.values(), *half_grads]:
        assert x.dtype == torch.float32
    frozen = [
        p
        for name, p in half.models.student.unet.named_parameters()
        if name not in theta and "norm" not in name  # on CUDA norms stay in float32
    ]
    assert frozen and all(p.dtype == half.dtype != torch.float32 for p in frozen)
    moved, average = flat(theta) - before, flat(theta_ema) - before
    assert F.cosine_similarity(moved, average, dim=0) > 0.5
    assert (average != 0).float().mean() > 0.9


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors.values()])


def watch_gradients(run):
    """A list that receives the flat gradient of each step."""
    seen = []

    def watch(*_):
        seen.append(torch.cat([p.grad.flatten() for p in run.models.theta.values()]))

    run.optimizer.register_step_pre_hook(watch)
    return seen


class Casts(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


def test_an_inference_unet_is_the_unet_in_half_precision(tmp_path):
    """It equals unet.to(bfloat16) without autocast, wherever it is called.

    It copies no tensor that is in bfloat16 already, and an evaluation casts no weight.
    """
    unet = make(tmp_path, "--dtype", "bf16").models.teacher.unet
    inference, z, c = (
        InferenceUNet(unet, torch.device("cpu"), torch.bfloat16),
        torch.randn(2, 4, 16, 16),
        torch.randn(1, 77, 64),
    )
    for _ in range(2):
        whole = copy.deepcopy(unet).to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), Casts() as casts:
            e = inference(z, 500, c)
        assert e.dtype == torch.float32 and not e.requires_grad
        assert torch.equal(e, whole(z.bfloat16(), 500, c.bfloat16()).float())
        assert casts.n <= 5  # z, t's sinusoids, c, e
        for name, p in unet.named_parameters():
            p.data.mul_(1.1) if "attn2" in name else None
        assert torch.equal(inference(z, 500, c), e)
        inference.sync()
    assert (
        len(inference.copies) == 55
        and inference.unet.conv_in.weight.data_ptr() == unet.conv_in.weight.data_ptr()
    )


def test_an_inference_unet_is_freed(tmp_path):
    """Also with --gradient-checkpointing, whose blocks refer to themselves."""
    r = make(tmp_path, "--dtype", "bf16", "--gradient-checkpointing")
    inference = InferenceUNet(r.models.student.unet, r.device, r.dtype)
    copied = weakref.ref(inference.copies[0])
    gc.disable()
    try:
        del inference
        assert copied() is None
    finally:
        gc.enable()


@torch.enable_grad()
@pytest.mark.parametrize("method, theta", [("sdd", "theta_ema"), ("esd-x", "theta")])
def test_half_precision_samples_with_the_newest_weights(method, theta, tmp_path, monkeypatch):
    """Each z_t comes from the θ* (ESD: θ) of the iteration before."""
    copies, synced = [], []

    class Watched(InferenceUNet):
        def __init__(self, *given):
            super().__init__(*given)
            copies.append(self)

        def sync(self):
            super().sync()
            synced.append([x.detach().clone() for x in self.copies])
            newest = getattr(r.models, theta).values()
            for x, p in zip(self.copies, newest, strict=True):
                assert torch.equal(x, p.bfloat16())

    monkeypatch.setattr("train.InferenceUNet", Watched)
    r = make(tmp_path, "--method", method, "--dtype", "bf16", "--warmup", 0, "--ema", 0.5)
    with torch.autocast("cpu", r.dtype, cache_enabled=False):
        iterations = r.iterations()
        for _ in range(3):
            next(iterations)
    assert len(copies) == 1 and len(synced) == 2
    assert not torch.equal(synced[0][0], synced[1][0])


def test_an_average_in_bf16_would_not_move():
    """Why θ* stays in float32: 0.001 of a step is below bfloat16's resolution."""
    for dtype, moves in ((torch.float32, True), (torch.bfloat16, False)):
        average, student = [torch.ones(8, dtype=dtype)], [torch.full((8,), 1.01, dtype=dtype)]
        start = copy.deepcopy(average)
        for _ in range(10):
            ema.update(average, student, 0.999)
        assert torch.equal(average[0], start[0]) != moves


def test_anchor_images_are_generated_once(tmp_path, monkeypatch):
    """A run that is stopped while it generates them continues, to the same images."""
    words = [
        "--model",
        "toy",
        "--concept",
        "star",
        "--method",
        "ablate",
        "--anchor",
        "circle",
        *SHORT,
        "--anchor-images",
        6,
        "--device",
        "cpu",
    ]
    assert run(train, *words, "--out", tmp_path / "whole") == 0
    generated, generate, save = [], ablation.generate_latents, ablation.save

    def stop(*given):
        save(*given)
        signal.raise_signal(signal.SIGTERM)

    def watched(model, unet, c_0, c_p, seeds, *more, **how):
        generated.append(seeds)
        return generate(model, unet, c_0, c_p, seeds, *more, **how)

    monkeypatch.setattr(ablation, "KEPT", 4)
    monkeypatch.setattr(ablation, "generate_latents", watched)
    monkeypatch.setattr(ablation, "save", stop)
    assert run(train, *words, "--out", tmp_path / "o") == 130
    assert generated == [[0, 1, 2, 3]]  # the signal is not deferred: a thousand images take long
    monkeypatch.setattr(ablation, "save", save)
    assert run(train, "--resume", "--out", tmp_path / "o") == 0
    assert generated == [[0, 1, 2, 3], [4, 5]]
    for file in ("anchors.safetensors", "erased.safetensors"):
        (a, _), (b, _) = (weights.read(tmp_path / folder / file) for folder in ("o", "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "words, lr",
    [
        ([], 3e-4),
        (["--method", "esd-x"], 4e-4),
        (["--method", "ablate", "--anchor", "drink"], 5e-4),
        (["--preset", "toy-hold"], 1e-3),
    ],
)
def test_the_emoji_model_takes_a_share_of_the_toy_presets_rates(words, lr):
    words = ["--model", "emoji", "--concept", "alcohol", *words]
    assert presets.settle(train.parse(words))["lr"] == pytest.approx(lr)
    assert presets.settle(train.parse([*words, "--lr", "1"]))["lr"] == 1
