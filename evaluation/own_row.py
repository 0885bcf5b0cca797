"""`eval.py toy --loss FILE:FUNCTION`: a loss of your own, next to all stored rows.

The loss is trained on one concept (the star) and on three at once. Both models are measured like
any other row of the suite toy, and the first one is attacked (attack.py, word and relearn). The
result is two tables, in which your row stands among the rows of docs/results.md, and a list of what
your row wins and loses. The folder toy_rows has the stored rows: the rows.json of the studies `one`
and `three` (workflow/). Your row is measured like these, with 60 images per figure instead of 200.

Every step is a command of this project. After a stop, the same command with the same --out
continues.
"""

import json
import os
import shlex
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from evaluation.attacks import attack_figures, cost
from evaluation.columns import all_columns
from evaluation.findings import joined
from evaluation.tables import markdown
from support.errors import UserError
from support.files import lock_folder, write_text
from support.own_loss import check_loss, load_loss, loss_file, sha256
from support.statistics import figure, is_original, judge
from toy import suite, worlds

ROOT = Path(__file__).parent.parent
STORED = Path(__file__).parent / "toy_rows"
SEEDS = (2, 3, 4)  # those of the stored rows; --seeds N takes the first N
LIMIT = 60  # images per figure, unless --limit is given
CONCEPTS = {"one": ["star"], "three": ["star", "red", "striped"]}  # {table: concepts}
TITLES = {"one": "One concept: star", "three": "Three concepts: star, red, striped"}
LONGER = {"one": [], "three": ["--iters", "300"]}  # as in the stored rows
ATTACKS = {  # {kind: flags of attack.py}
    "word": ["--at", *"0 40 80 120 160 240 320".split()],
    "relearn": ["--at", *"0 5 10 15 20 30".split()],
}
SAMPLING = ["--steps", 12, "--device", "cpu"]  # as for the stored rows
PREVIEWS = ["--preview-every", 40, "--preview-steps", 12]  # their time counts, as there
OWN_FLAGS = ("--model", "--concept", "--loss", "--seed", "--device", "--out", "--resume")
SHOWN = [  # the columns of the tables
    "named",
    "shuffled",
    "implied",
    "caption",
    "near",
    "base",
    "word",
    "word_half",
    "relearn",
    "relearn_half",
    "seconds",
]


def own_row(args):
    """The whole command: trains, attacks, measures, and writes table.md and results.json."""
    name = args.loss.rpartition(":")[2]
    stored = read_stored()
    check_loss(load_loss(args.loss), args.loss, noise="ablate" in args.train_flags)
    train_flags = split_flags(args.train_flags)
    seeds = SEEDS[: args.seeds or 1]
    limit = args.limit or LIMIT
    out = args.out
    stopped.clear()
    with lock_folder(out):
        open_folder(out, args, seeds, limit)
        work = [(table, args.loss, name, seeds, limit, train_flags, out) for table in CONCEPTS]
        with ThreadPoolExecutor(2) as pool:  # one thread per process, two processes at a time
            try:
                made = [pool.submit(make_row, *one) for one in work]
                for future in as_completed(made):
                    future.result()  # raises what failed first
            except BaseException:  # Ctrl-C, SIGTERM, or a command that failed
                stop_commands()
                raise
        rows = [future.result() for future in made]
        write(out, name, dict(zip(CONCEPTS, rows)), stored)


def split_flags(text):
    """The words of --train-flags. UserError for a flag that this command sets itself."""
    try:
        words = shlex.split(text)
    except ValueError as e:
        raise UserError(f"--train-flags {text!r} cannot be read ({e}).") from None
    for word in words:
        flag = word.partition("=")[0]
        if flag in OWN_FLAGS:
            raise UserError(f"--train-flags has {flag}, which this command sets itself: remove it.")
    return words


def read_stored():
    """{table: the stored rows}."""
    stored = {}
    for table in CONCEPTS:
        file = STORED / f"{table}.json"
        if not file.exists():
            raise UserError(
                f"{file} is missing: restore it from the repository, or make it with snakemake "
                f"--cores 2 {table} and copy results/{table}/rows.json to {file}."
            )
        stored[table] = json.loads(file.read_text(encoding="utf-8"))["tables"][table]
    return stored


def open_folder(out, args, seeds, limit):
    """Writes loss.json; a folder of the same comparison is continued, another one is refused."""
    content = {
        "loss": args.loss,
        "sha256": sha256(loss_file(args.loss)),
        "seeds": list(seeds),
        "limit": limit,
        "train_flags": args.train_flags,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    file = out / "loss.json"
    if file.exists() and file.read_text(encoding="utf-8") == text:
        return
    if any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(
            f"{out} holds another comparison, or the loss has changed since: choose a new folder "
            "with --out."
        )
    write_text(file, text)


# ------------------------------------------------------------------------------------- commands
def make_row(table, loss, name, seeds, limit, train_flags, out):
    """Trains, attacks and measures one set of concepts. Returns its row {"model", "figures", …}."""
    concepts, folder = CONCEPTS[table], out / table
    patches, attacks = [], {}
    for seed in seeds:
        run = folder / f"run-{seed}"
        train(run, concepts, LONGER[table], loss, seed, train_flags)
        patches += ["--patch", f"{name}={run / 'erased.safetensors'}"]
        if table == "one":
            for kind, flags in ATTACKS.items():
                attack(folder / f"{kind}-{seed}", kind, flags, concepts[0], run, seed)
                found = folder / f"{kind}-{seed}" / "results.json"
                attacks.setdefault(kind, []).append(json.loads(found.read_text(encoding="utf-8")))
    measured = folder / "table"
    if not (measured / "results.json").exists():
        more = ["--limit", limit, *SAMPLING, "--threads", 1, "--out", measured]
        command("eval.py", "toy", *patches, *more)
    row = json.loads((measured / "results.json").read_text(encoding="utf-8"))["rows"][-1]
    figures, points_and_halves = attack_figures(attacks)
    figures |= cost([folder / f"run-{seed}" / "erased.safetensors" for seed in seeds])
    row["figures"] |= figures
    row["attacks"] = points_and_halves
    return {key: row[key] for key in ("model", "erased", "method", "paper", "figures", "attacks")}


def train(run, concepts, longer, loss, seed, train_flags):
    """Trains one model, or continues a training that was stopped."""
    if (run / "erased.safetensors").exists():
        return
    flags = ["--loss", loss, "--seed", seed, "--preview", concepts[0], *PREVIEWS]
    flags += ["--device", "cpu", *longer]
    flags += train_flags
    new = ["train.py", "--model", "toy", "--concept", *concepts, *flags, "--out", run]
    if (run / "run.json").exists():
        new = ["train.py", "--resume", "--out", run]
    command(*new)


def attack(folder, kind, flags, concept, run, seed):
    """Attacks one model, or continues. A complete attack repeats only its last measurement."""
    patch = run / "erased.safetensors"
    words = ["--model", "toy", "--concept", concept, "--patch", patch, "--kind", kind]
    command("attack.py", *words, *flags, *SAMPLING, "--seed", seed, "--out", folder)


running = []  # the processes of `command`
stopped = threading.Event()


def stop_commands():
    """Ends the commands that run, with SIGTERM, and starts no other."""
    stopped.set()
    for process in list(running):
        process.terminate()


def command(*words):
    """Runs `python WORDS…` with one thread. UserError if it fails."""
    if stopped.is_set():
        raise UserError("The comparison was stopped.")
    words = [str(word) for word in words]
    print(f"python {shlex.join(words)}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    words[0] = str(ROOT / words[0])
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    process = subprocess.Popen([sys.executable, *words], env=environment, **pipes)
    running.append(process)
    if stopped.is_set():  # since the question above
        process.terminate()
    try:
        _, said = process.communicate()
    finally:
        running.remove(process)
    if process.returncode:
        raise UserError(
            "This command failed. Fix the cause, then repeat your command (with a new --out "
            f"if you changed the loss): python {shlex.join(words)}",
            details=said[-2000:],
        )


# --------------------------------------------------------------------------------------- results
def write(out, name, rows, stored):
    """table.md, results.json, and what the command prints."""
    columns = all_columns("toy", [], suite.columns(worlds.of("toy")))
    columns = [column for key in SHOWN for column in columns if column.key == key]
    text = f"# {name}, and the stored rows\n"
    for table, row in rows.items():
        group = [*stored[table], row]
        found = [column for column in columns if any(column.key in r["figures"] for r in group)]
        text += f"\n## {TITLES[table]}\n\n{markdown(group, found)}\n"
        text += "".join(f"- {line}\n" for line in verdicts(row, stored[table], found))
    write_text(out / "table.md", text)
    write_text(out / "results.json", json.dumps(rows, indent=1, ensure_ascii=False))
    print(f"\n{text}\nThe same text: {out / 'table.md'}")


def verdicts(row, others, columns):
    """One line per column: which stored rows this row is better than, and which it is worse than.

    Only columns of proportions count. A row is better or worse if the 95 % intervals do not
    overlap; the other comparisons are open. The row of the original is left out.
    """
    lines = []
    for column in columns:
        mine = figure(row["figures"].get(column.key))
        if column.better is None or mine is None:
            continue
        better, worse, still_open = [], [], 0
        for other in others:
            theirs = figure(other["figures"].get(column.key))
            if is_original(other) or theirs is None:
                continue
            match judge(mine, theirs, column.better):
                case "open":
                    still_open += 1
                case "better":
                    better.append(other["model"])
                case "worse":
                    worse.append(other["model"])
        if not (better or worse or still_open):  # no stored row has this column
            continue
        lines.append(
            f"{column.title}: better than {joined(better) or 'none'}; "
            f"worse than {joined(worse) or 'none'}; open against {still_open}"
        )
    return lines
