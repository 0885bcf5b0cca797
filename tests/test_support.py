"""What a command does around its work: Python, packages, messages, progress, output folder."""

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import ROOT, command, run

import generate
import pipeline
import weights
from support.cli import Parser, memory_is_full, run_command
from tools import convert

DRAW = "generate.py 'a star' --model toy --steps 2 --device cpu"


# ---------------------------------------------------------------------------- Python and packages
HIDE = """
import importlib.metadata as m
version = m.version
def hidden(name):
    if name in {names}:
        raise m.PackageNotFoundError(name)
    return version(name)
m.version = hidden
"""


def test_missing_packages_are_one_sentence(tmp_path):
    names = ["torch", "safetensors"]  # in the order of requirements.txt
    (tmp_path / "sitecustomize.py").write_text(HIDE.replace("{names}", str(names)))
    status, out, error = command("train.py", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert status == 2 and not out and error.count("\n") == 1
    assert error.startswith("error: These Python packages are missing: torch, safetensors. ")
    assert "python -m pip install -r requirements.txt" in error


# --------------------------------------------------------------------------------------- messages
@pytest.mark.parametrize(
    "words, said",
    [
        ("--guidance-scal=3", "unknown argument --guidance-scal=3; did you mean --guidance-scale?"),
        ("--qqq", "unknown argument --qqq."),
        ("--seed", "argument --seed: expected one argument."),
    ],
)
def test_the_end_of_a_sentence_about_arguments(words, said, capsys, monkeypatch):
    """Other mistakes: test_bad_input.py."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/generate.py"])
    with pytest.raises(SystemExit) as e:
        generate.parse(["a star", words])
    error = capsys.readouterr().err
    assert e.value.code == 2
    assert error == f"error: {said} All arguments: python generate.py --help\n"


@pytest.mark.parametrize(
    "module, name", [(generate, "python generate.py"), (convert, "python -m tools.convert")]
)
def test_help_has_groups_defaults_and_examples(module, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/generate.py"])
    with pytest.raises(SystemExit) as e:
        module.parse(["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and out.startswith(f"usage: {name} ")
    assert f"\n    {name} " in out and "\noutput:\n" in out and "default:" in out


def test_warnings_of_libraries_do_not_reach_the_user(capsys):
    def main(args):
        warnings.warn("This is almost definitely a bug in your code", stacklevel=1)
        import transformers

        transformers.utils.logging.get_logger("transformers").warning("nothing to do")

    with warnings.catch_warnings(record=True) as seen:
        assert run_command(main, SimpleNamespace()) == 0
    assert not seen and not capsys.readouterr().err


def test_the_arguments_that_are_really_given():
    parser = Parser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flag", action="store_true")
    assert vars(parser.parse_args(["--seed", "0"])) == dict(seed=0, flag=False, given={"seed"})
    assert vars(parser.parse_args([])) == dict(seed=0, flag=False, given=set())


@pytest.mark.skipif(os.name == "nt", reason="file names of Windows are Unicode")
def test_arguments_that_are_not_utf8(capsys):
    with pytest.raises(SystemExit) as e:
        generate.parse(["a star", "--out", os.fsdecode(b"su\xff")])
    assert e.value.code == 2 and "are not UTF-8" in capsys.readouterr().err


def test_output_in_an_encoding_without_arrows():
    """A pipe on Windows, for example."""
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, env=environment, capture_output=True
    )
    assert done.returncode == 0 and b"--preserve ?" in done.stdout


def test_errors_about_memory_are_recognised():
    for text in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory",
    ):
        assert memory_is_full(RuntimeError(text))
    other = "CUDA error: no kernel image is available for execution on the device"
    assert not memory_is_full(RuntimeError(other))


@pytest.mark.parametrize(
    "flags, said, not_said",
    [
        (dict(batch_size=1, resolution=512, dtype="auto"), "or a smaller --resolution", "bf16"),
        (dict(batch_size=1, dtype="fp32"), "--dtype bf16", "--resolution"),
        (dict(rounds=1), "with more free memory", "--"),
    ],
)
def test_a_full_memory_names_only_flags_that_the_command_has(flags, said, not_said, capsys):
    def full(args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert run_command(full, SimpleNamespace(**flags)) == 2
    error = capsys.readouterr().err
    assert said in error and not_said not in error


# ------------------------------------------------------------------------------------- generate.py
def test_without_out_the_output_folder_is_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run(DRAW) == 0
    assert sorted(path.name for path in Path("images").iterdir()) == ["0001-a-star", "0002-a-star"]


def test_the_progress_bar_counts_denoising_steps_and_reaches_the_end(monkeypatch):
    bars = []

    def terminal(*words, disable, **more):
        bars.append(tqdm(*words, disable=False, file=io.StringIO(), **more))
        return bars[-1]

    tqdm = pipeline.tqdm
    monkeypatch.setattr(pipeline, "tqdm", terminal)
    model = weights.load("toy")
    how = dict(scheduler="pndm", steps=3, batch_size=2, size=32)
    assert len([*pipeline.images(model, ["a star"] * 3, bar="0001-star", **how)]) == 3
    (bar,) = bars
    assert bar.n == bar.total == 2 * 4  # batches, evaluations of PNDM
    assert bar.desc == "0001-star" and bar.unit == "step"


def test_a_toy_patch_needs_no_model(tmp_path, monkeypatch):
    """Its metadata names the model, and nothing is downloaded."""
    unet = weights.load("toy").unet
    tensors = {name: x for name, x in unet.state_dict().items() if ".attn2.to_k." in name}
    metadata = {"model": "toy", "base_fingerprint": weights.fingerprint(tensors)}
    weights.save(tmp_path / "p.safetensors", tensors, metadata)
    line = f"generate.py 'a star' --steps 1 --device cpu --patch {tmp_path / 'p.safetensors'}"
    assert run(line, tmp_path / "o") == 0


@pytest.mark.parametrize(
    "file, name",
    [
        ("erased.safetensors", "deep"),  # in the current folder
        ("runs/0002-moon/erased.safetensors", "0002-moon"),
        ("patches/moon.safetensors", "moon"),
        # generate.py makes a folder of this name, so it is never a way out of a folder.
        ("../erased.safetensors", "0001-star"),
        ("previews/../erased.safetensors", "deep"),
        ("/erased.safetensors", "patch"),
        ("...safetensors", "patch"),
    ],
)
def test_the_name_of_a_patch(file, name, tmp_path, monkeypatch):
    (tmp_path / "0001-star" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "0001-star" / "deep")
    assert weights.name_of_patch(file) == name


# ------------------------------------------------------------------------------------------- OpenMP
@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "20000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),  # the user's own setting
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "None"),  # a spin count would override it
    ],
)
def test_threads_spin_for_a_short_time(given, expected):
    free = {key: x for key, x in os.environ.items() if key not in ("GOMP_SPINCOUNT",)}
    free.pop("OMP_WAIT_POLICY", None)
    code = "import support.openmp, os, sys; assert 'torch' not in sys.modules; "
    code += "print(os.environ.get('GOMP_SPINCOUNT'))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=free | given, capture_output=True, text=True
    )
    assert found.stdout.strip() == expected, found.stderr
