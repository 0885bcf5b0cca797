"""What the commands share: argument parser, common flags, device, and how a command ends."""

import argparse
import difflib
import math
import os
import re
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

import torch

from support.errors import UserError, first_line
from support.files import used_files

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# ---------------------------------------------------------------------------------------- arguments
class Parser(argparse.ArgumentParser):
    """An ArgumentParser that keeps the layout of its description and ends with one sentence.

    For an unknown flag the sentence names a similar one. argparse would print the whole usage.
    """

    def __init__(self, prog=None, **arguments):
        super().__init__(
            prog=prog or f"python {Path(sys.argv[0]).name}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **arguments,
        )
        # On Windows a pipe may not know every letter: better a "?" than an error.
        if getattr(sys.stdout, "errors", "") == "strict" and hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")

    def parse_args(self, args=None, namespace=None):
        """The arguments; `given`: the names of those that are really given."""
        for text in sys.argv[1:] if args is None else args:
            if text.encode("utf-8", "ignore").decode() != text:
                self.error(f"the argument {text!r} has characters that are not UTF-8")
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unknown argument {unknown[0]}{hint}")
        without_defaults = argparse.Namespace(**{action.dest: None for action in self._actions})
        again, _ = self.parse_known_args(args, without_defaults)
        found.given = {name for name, value in vars(again).items() if value is not None}
        return found

    def error(self, message):
        end = "" if message.endswith((".", "?")) else "."
        print(f"error: {message}{end} All arguments: {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def number(text, kind=float, low=-math.inf, high=math.inf):
    """A number of an argument, neither NaN nor infinite."""
    try:
        value = kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
    if kind is float and not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    if value < low:
        raise argparse.ArgumentTypeError(f"{text} is less than {low}")
    if value > high:
        raise argparse.ArgumentTypeError(f"{text} is more than {high}")
    return value


finite = number
positive = partial(number, kind=int, low=1, high=1_000_000)  # a list of so many fits memory
natural = partial(number, kind=int, low=0, high=10**13)  # attack.py multiplies a seed by 10^5


def not_empty(text):
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; is a variable of the shell not set?")
    return text


def one_of(names):
    """Keywords of add_argument for a flag that takes one of `names`; suggests the nearest."""

    def name(text):
        if text in names:
            return text
        near = difflib.get_close_matches(text, names, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise argparse.ArgumentTypeError(
            f"there is no {text!r}: {hint}There are: {', '.join(names)}"
        )

    return {"type": name, "metavar": f"{{{','.join(names)}}}"}


def add_common_arguments(parser):
    # fmt: off
    add = parser.add_argument_group("model files, machine and display").add_argument
    add("--revision", metavar="NAME", help="branch, tag or commit of the model on the hub")
    add("--device", default="auto", metavar="DEVICE",
        help="cuda, cuda:1, mps, cpu or auto: CUDA, else MPS, else CPU (default: %(default)s)")
    add("--dtype", default="auto", **one_of(["auto", *DTYPES]),
        help="auto: fp32; on CUDA fp16, and for training bf16 if the GPU has it (default: "
        "%(default)s)")
    add("--show-uncensored", action="store_true", help="do not cover nudity in previews and sheets")
    # fmt: on


def flag(key):
    return f"--{key.replace('_', '-')}"


def unused(given, used_by, choice):
    """The flags in `given` that `choice` does not use. used_by: {flags: the choices that do}."""
    found = []
    for keys, users in used_by.items():
        if choice not in users:
            found += [key for key in keys.split() if key in given]
    return found


def refuse_unused(keys, where, advice=""):
    """UserError if there are flags without an effect; `where` and `advice` are for its sentence."""
    if keys:
        verb, them = ("has", "it") if len(keys) == 1 else ("have", "them")
        flags = ", ".join(flag(key) for key in keys)
        raise UserError(f"{flags} {verb} no effect {where}: remove {them}{advice}.")


# ------------------------------------------------------------------------------------------- device
def pick_device(name):
    """A torch.device that works. `auto` is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        device = torch.device(name)
        # A sum starts a kernel. torch has none for a GPU that is older than its build supports.
        torch.ones(2, device=device).sum().item()
    except (RuntimeError, AssertionError) as e:  # which of the two depends on the device
        if memory_is_full(e):
            raise
        raise UserError(
            f"--device {name} cannot be used here ({first_line(e)}): use --device cpu, or a build "
            "of torch for your GPU and driver (pytorch.org)."
        ) from e
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # for calls without a device: synchronize, memory, autocast
    return device


def has_gpu():
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def why_no_gpu():
    """One line: why torch finds no NVIDIA GPU."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:  # torch is for the CPU, or the driver is too old
        return first_line(e)
    return "its driver finds none"


def pick_dtype(name, device, training=False):
    """A torch.dtype. `auto` is float32 on a CPU or MPS.

    On CUDA it is float16, whose images are nearer to float32's than bfloat16's are. Training uses
    bfloat16 if the GPU has it, because float16 gradients can overflow.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    if training and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def use_deterministic_algorithms():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    torch.use_deterministic_algorithms(True)


def autocast(device, dtype):
    """Autocast to `dtype`; nothing for float32.

    cache_enabled=False: a cast of a trained weight would be out of date after each step, and a CUDA
    graph would read it for ever.
    """
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype, enabled=half, cache_enabled=False)


# ---------------------------------------------------------------------------------- how it all ends
def refuse_used(folder, advice=""):
    """UserError if the output folder already contains something."""
    if used_files(folder):
        raise UserError(f"{folder} is not empty: choose a new folder with --out{advice}.")


def memory_is_full(error):
    """Whether a MemoryError or RuntimeError is about memory; torch has no one class for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # ALLOC_FAILED: cuBLAS and cuDNN have memory of their own.
    if re.search("can't allocate memory|out of memory|ALLOC_FAILED", str(error)):
        return True
    # A CUDA graph that could not be recorded raises another error on the way out.
    return error.__context__ is not None and memory_is_full(error.__context__)


def how_to_need_less(args):
    """What a user can do if the memory is full, in the flags of this command."""
    sizes = ("batch_size", "resolution")
    advice = [f"a smaller {flag(size)}" for size in sizes if hasattr(args, size)]
    if getattr(args, "dtype", None) == "fp32":
        advice.append("--dtype bf16")
    if hasattr(args, "resume") and args.out and (args.out / "checkpoint.safetensors").exists():
        advice.append(f"--resume --out {args.out} --gradient-checkpointing --preview-every 0")
    return ", or ".join([*advice, "a device with more free memory"])


def run_command(
    main, args, stopped="files that are written stay; start again with a new --out", gpus=1
):
    """Runs main(args) and returns the exit status of the command.

    0: success. 2: one sentence says what the user can do. 130: Ctrl-C or SIGTERM, with the sentence
    of the KeyboardInterrupt, or `stopped`, which may contain {out}. Without a folder args.out,
    nothing has been written. gpus: 1 for a command that torchrun cannot divide, else None.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:  # `python -W default` shows them
                warnings.simplefilter("ignore")
            if gpus == 1 < int(os.environ.get("WORLD_SIZE", 1)):
                raise UserError("this command uses one GPU: start it without torchrun.")
            main(args)
        return 0
    except UserError as e:
        error = f"{e}\n{e.details}" if e.details else f"{e}"
    except (RuntimeError, MemoryError) as e:
        if not memory_is_full(e):
            raise  # a mistake in the program: the traceback is needed
        error = f"the memory is full: use {how_to_need_less(args)}."
    except FloatingPointError as e:  # it diverged
        error = f"{e}. Start again in another folder with a smaller --lr, or with --dtype fp32."
    except OSError as e:
        error = (
            f"{e}: check the disk's space and the folder's permissions, then run the same command "
            "again."
        )
    except KeyboardInterrupt as e:
        text = str(e) or "nothing has been written."
        if not str(e) and getattr(args, "out", None) and used_files(args.out):
            text = stopped.format(out=args.out) + "."
        print(f"stopped: {text}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"error: {error}", file=sys.stderr)
    return 2
