"""Folders of runs: their JSON files, and how a command stops between two steps."""

import csv
import datetime
import json
import platform
import shlex
import signal
import sys
from contextlib import contextmanager

import torch
import transformers

from support.cli import refuse_unused, refuse_used
from support.errors import UserError
from support.files import used_files, write_text
from support.own_loss import sha256

OWN_LOSS = "own_loss.py"  # a run's copy of --loss FILE

VERSIONS = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}


def description(settings):
    """What a run's JSON file says about the run: its settings, and where they come from."""
    return {
        "args": settings,
        "versions": VERSIONS,
        "command": shlex.join(["python", *sys.argv]),
        "date": f"{datetime.date.today()}",
    }


def read_json(file):
    """The content of a JSON file; {} if there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError) as e:
        raise UserError(
            f"{file} cannot be read ({e}): restore the file, or use another folder."
        ) from None


def write_json(file, content):
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False))


def add(file, **more):
    write_json(file, read_json(file) | more)


def begin_or_continue(file, settings):
    """Writes what counts for a command as a JSON file in its output folder.

    The same command continues in the folder. UserError if the folder holds anything else.
    """
    text = json.dumps(settings, indent=1, ensure_ascii=False)
    if file.exists() and file.read_text(encoding="utf-8", errors="replace") == text:
        return
    if used_files(file.parent) != [file]:  # else nothing is lost
        refuse_used(file.parent, ", or repeat the command that began in it to continue")
    write_text(file, text)


def resumed(args, free, settle):
    """The settings of the run in --out. UserError for flags that change it.

    free: the arguments that may change. settle: presets.settle.
    """
    out = args.out
    if not out or not (out / "run.json").is_file():
        raise UserError(
            "--resume needs --out FOLDER with a run in it (a run.json). Runs without --out are in "
            "runs/."
        )
    settings = read_json(out / "run.json")["args"]
    for key in args.given & set(free):
        settings[key] = getattr(args, key)
    settings["show_uncensored"] = args.show_uncensored  # for the images that this command makes
    advice = f"Use --resume --out {out} alone, or choose a new folder."
    if args.concept:
        wanted = settle(args) | {key: settings[key] for key in free}
        if args.preview is None:  # prompts that the model does not know were skipped
            wanted["preview"] = settings["preview"]
        if wanted != settings:
            raise UserError(f"{out} holds a run with other arguments. {advice}")
    else:
        changed = sorted(args.given - {"resume", "out", *free})
        refuse_unused(changed, "on a resumed run, which keeps its arguments", f". {advice}")
    if settings["loss"] and sha256(out / OWN_LOSS) != settings["loss_sha256"]:
        raise UserError(
            f"{out / OWN_LOSS} has changed since the run began. Start a new run with "
            f"--loss {settings['loss']}, or restore the file."
        )
    return settings


# ------------------------------------------------------------------------------------ the loop
@contextmanager
def open_log(file, columns):
    """A csv.DictWriter that appends to a file, line by line."""
    with open(file, "a", buffering=1, newline="", encoding="utf-8") as f:
        log = csv.DictWriter(f, columns, lineterminator="\n")
        if not f.tell():
            log.writeheader()
        yield log


def cut_log(file, rows):
    """Keeps the header and the first `rows` whole lines of a CSV file; makes a missing file."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    write_text(file, "".join(lines[: rows + 1]))


@contextmanager
def deferred_interrupts():
    """Collects Ctrl-C and SIGTERM in a list, so that the current iteration can end first."""
    received = []
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress_figures(it, device):
    """{name: text} of an sdd.Iteration, for a progress bar."""
    figures = {"loss": f"{it.loss:.2e}", "lr": f"{it.lr:.1e}"}
    if device.type == "cuda":
        figures["GB"] = f"{torch.cuda.max_memory_reserved() / 1e9:.1f}"
    return figures
