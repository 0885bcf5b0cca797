"""`eval.py toy --loss FILE:FUNCTION`: a loss of your own, next to all stored rows.

The loss is trained on one concept (the star) and on three at once. Both models are measured like
any other row of the suite toy, and the first one is attacked (attack.py, word and relearn). The
result is two tables, in which your row stands among the rows of docs/results.md, and a list of what
your row wins and loses. The folder toy_rows has the stored rows: the rows.json of the studies `one`
and `three` (workflow/). Your row is measured like these (evaluation/study.py), with 60 images per
figure instead of 200.
"""

import asyncio
import json
import os
import shlex
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

from evaluation import study
from evaluation.attacks import attack_figures, cost
from evaluation.columns import all_columns
from evaluation.findings import joined
from evaluation.tables import columns_with_figures, markdown
from support.errors import UserError
from support.files import lock_folder, write_text
from support.own_loss import check_loss, load_loss, loss_file, sha256
from support.runs import begin_or_continue, read_json
from support.statistics import figure, is_original, judge

ROOT = Path(__file__).parent.parent
STORED = Path(__file__).parent / "toy_rows"
LIMIT = 60  # images per figure, unless --limit is given
# {table: (its title, concepts, further words of train.py)}
TABLES = {
    "one": ("One concept", ["star"], []),
    "three": ("Three concepts", [*study.THREE], study.LONGER),
}
AT = {  # {kind of attack: the steps after which its images are counted}
    "word": [step for step in study.AT["word"] if step <= study.LAST_STEP],
    "relearn": study.AT["relearn"],
}
OWN_FLAGS = ("--model", "--concept", "--loss", "--seed", "--device", "--out", "--resume")
# The columns of the tables
SHOWN = (
    "named shuffled implied caption near base word word_half relearn relearn_half seconds".split()
)


def own_row(args):
    check_loss(load_loss(args.loss), args.loss, noise="ablate" in args.train_flags)
    check_flags(args.train_flags)
    settings = {
        "loss": args.loss,
        "sha256": sha256(loss_file(args.loss)),
        "seeds": study.SEEDS[: args.seeds or 1],
        "limit": args.limit or LIMIT,
        "train_flags": args.train_flags,
    }
    with lock_folder(args.out):
        begin_or_continue(args.out / "loss.json", settings)
        rows = asyncio.run(make_rows(settings, args.out))
        write(args.out, args.loss.rpartition(":")[2], rows)


def check_flags(text):
    try:
        words = shlex.split(text)
    except ValueError as e:
        raise UserError(f"--train-flags {text!r} cannot be read ({e}).") from None
    for word in words:
        flag = word.partition("=")[0]
        if flag in OWN_FLAGS:
            raise UserError(f"--train-flags has {flag}, which this command sets itself: remove it.")


# ------------------------------------------------------------------------------------- commands
async def make_rows(settings, out):
    """The rows of all TABLES, made at the same time: one process with one thread for each."""
    made = [make_row(table, settings, out) for table in TABLES]
    return dict(zip(TABLES, await asyncio.gather(*made)))


async def make_row(table, settings, out):
    """Trains, attacks and measures one set of concepts. Returns its row {"model", "figures", …}."""
    folder = out / table
    name = settings["loss"].rpartition(":")[2]
    patches, attacks, words = [], {}, ["toy", "--limit", settings["limit"]]
    for seed in settings["seeds"]:
        run = folder / f"run-{seed}"
        patch = run / "erased.safetensors"
        training = ["--resume", "--out", run]  # if it was stopped
        if not (run / "run.json").exists():
            _, concepts, longer = TABLES[table]
            more = ["--loss", settings["loss"], "--preview-every", study.EVERY, *longer]
            training = study.train_words("toy", concepts, more, seed, run)
            training += shlex.split(settings["train_flags"])
        if not patch.exists():
            await command("train.py", *training)
        patches.append(patch)
        words += ["--patch", f"{name}={patch}"]
        for kind, steps in AT.items() if table == "one" else ():
            # A complete attack repeats only its last measurement.
            found, at = folder / f"{kind}-{seed}", ["--at", *steps]
            await command(
                "attack.py", *study.attack_words("toy", "star", kind, patch, seed, at, found)
            )
            attacks.setdefault(kind, []).append(read_json(found / "results.json"))
    measured = folder / "table"
    if not (measured / "results.json").exists():
        await command("eval.py", *study.eval_words(words, "toy", measured))
    row = read_json(measured / "results.json")["rows"][-1]
    figures, row["attacks"] = attack_figures(attacks)
    row["figures"] |= figures | cost(patches)
    return {key: row[key] for key in ("model", "erased", "method", "paper", "figures", "attacks")}


async def command(*words):
    """Runs `python WORDS…` with one thread. UserError if it fails.

    Ctrl-C, SIGTERM, and a failure in the other table end it.
    """
    words = [str(word) for word in words]
    print(f"python {shlex.join(words)}", flush=True)
    words[0] = str(ROOT / words[0])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    pipes = dict(stdout=DEVNULL, stderr=PIPE, env=environment)
    process = await asyncio.create_subprocess_exec(sys.executable, *words, **pipes)
    try:
        _, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    if process.returncode:
        raise UserError(
            "This command failed. Fix the cause, then repeat your command (with a new --out "
            f"if you changed the loss): python {shlex.join(words)}",
            details=said.decode(errors="replace")[-2000:],
        )


# --------------------------------------------------------------------------------------- results
def write(out, name, rows):
    """table.md, results.json, and what the command prints. rows: {table: your row}."""
    columns = all_columns("toy", [], "toy")
    columns = [column for key in SHOWN for column in columns if column.key == key]
    text = f"# {name}, and the stored rows\n"
    for table, row in rows.items():
        title, concepts, _ = TABLES[table]
        stored = read_json(STORED / f"{table}.json")["tables"][table]
        group = [*stored, row]
        found = columns_with_figures(columns, group)
        text += f"\n## {title}: {', '.join(concepts)}\n\n{markdown(group, found)}\n"
        text += "".join(f"- {line}\n" for line in verdicts(row, stored, found))
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
        found = {"better": [], "worse": [], "open": []}
        for other in others:
            theirs = figure(other["figures"].get(column.key))
            if column.better and mine and theirs and not is_original(other):
                found[judge(mine, theirs, column.better)].append(other["model"])
        if any(found.values()):
            lines.append(
                f"{column.title}: better than {joined(found['better']) or 'none'}; "
                f"worse than {joined(found['worse']) or 'none'}; open against {len(found['open'])}"
            )
    return lines
