"""What the commands share: argument types, common flags, the device, and how a command ends."""

import argparse
import difflib
import math
import signal
import sys

import torch

from support.errors import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that keeps the layout of its description and ends with one sentence.

    For an unknown flag the sentence names a similar one. argparse would print the whole usage.
    """

    def __init__(self, **arguments):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **arguments
        )

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1)
            hint = f"did you mean {near[0]}?" if near else f"see python {self.prog} --help."
            self.error(f"unknown argument {unknown[0]}: {hint}")
        return found

    def error(self, message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def pick_device(name):
    """`auto` is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if (
            device.type == "cuda" and device.index is not None
        ):  # clocks, peaks and autocast ask for none and mean this one
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as e:  # torch raises either, by device
        raise UserError(
            f"--device {name} cannot be used here ({str(e).splitlines()[0]}): say --device cpu, or check the driver."
        ) from e
    return device


def pick_dtype(name, device, training=False):
    """`auto` is float32; on CUDA float16, which draws nearer to it than bfloat16 does. For training, where float16 can overflow, it is
    bfloat16 on cards that have it."""
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return (
        torch.bfloat16
        if training and torch.cuda.is_bf16_supported(including_emulation=False)
        else torch.float16
    )


def refuse_used(folder, advice=""):
    """An output folder that already holds something is refused."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: choose a new folder with --out{advice}.")


def positive(text):
    """An argument that counts something: 1, 2, … up to a million, as a list of them has to fit the memory."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    if value > 1_000_000:
        raise argparse.ArgumentTypeError(f"{text} is more than a million")
    return value


def finite(text):
    """An argument that is a number, neither NaN nor infinite."""
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def one_of(names):
    """How argparse takes one of `names`; for another the nearest is suggested."""

    def name(text):
        if text not in names:
            near = "".join(f"did you mean {x}? " for x in difflib.get_close_matches(text, names, 1))
            raise argparse.ArgumentTypeError(
                f"there is no {text!r}: {near}There are: {', '.join(names)}"
            )
        return text

    return {"type": name, "metavar": f"{{{','.join(names)}}}"}


def natural(text):
    """An argument that starts a count or seeds a generator: 0, 1, … up to 2⁶² (seeds are counted on from it)."""
    if not 0 <= (value := int(text)) <= 2**62:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 … 2^62")
    return value


def add_common_arguments(parser):
    parser.add_argument(
        "--show-uncensored",
        action="store_true",
        help="do not cover nudity in previews and sheets (see the README)",
    )
    parser.add_argument("--revision", help="a branch, tag or commit of the hub's model")
    parser.add_argument(
        "--device", default="auto", help="auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps, cpu"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        **one_of(["auto", *DTYPES]),
        help="auto: fp32; on CUDA fp16, or to train bf16 if it has it",
    )


def run_command(
    main,
    args,
    stopped="what is written so far stays; choose a new folder with --out to begin again",
):
    """A command's exit status: 0; 2 after one sentence about what the user can do; 130 after Ctrl-C or SIGTERM and the sentence `stopped`,
    which may name {out}."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        if e.details:
            print(e.details, file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as e:
        full = isinstance(
            e, (MemoryError, torch.OutOfMemoryError)
        )  # torch's class is of a GPU's memory only
        if not full and "can't allocate memory" not in str(e) and "out of memory" not in str(e):
            raise  # also what derives from RuntimeError: CUDA's other errors, torch.distributed's
        print(
            "error: the memory is full: try a smaller --batch-size or --resolution, or --dtype bf16.",
            file=sys.stderr,
        )
        return 2
    except OSError as e:
        print(
            f"error: {e}: check the disk's space and the folder's permissions, and run the same command again.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as e:
        text = str(e) or stopped.format(out=getattr(args, "out", "")) + "."
        print(f"stopped: {text}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
