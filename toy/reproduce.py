"""The papers' claims, in miniature: trains every eraser on the embedded model, measures it, and writes REPRODUCTION.md.

    python eval.py toy --reproduce [--quick] --out DIR        hours on two cores; --quick: 15 minutes, one seed, fewer pictures

Trainings and tables are commands of this project, run as such; what is there already is not made again, so the same command goes on
after a stop. Every method has the settings of presets.METHODS; TUNING says how those were found.
"""
import concurrent.futures
import csv
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TUNING = """Every trainer was tuned on the star, with training seed 777 and 60 pictures a figure from prompts and noise of seed 777;
nothing of it is reported. Four learning rates and one other choice (ESD: s_s = 3; Ablating: all tensors; All-but-One: λ = 0.3), then
one or two trials beyond, as for most the best lay at the end of the range; the one that left the least of the star, named and implied,
without loss elsewhere was kept. SDD's preset is the best of six (batch, learning rate, length and steps), its λ of two. The methods that
only guide have their papers' presets, but for the warm-up: those are for 50 steps, and here are 12; 2, 1 and 0 were tried, and 0 left
the least of the star."""
GUIDED_WARMUP = 0
TRAINERS = {"sdd": [], "sdd + preserve": ["--preserve", "0.3", "--lr", "2e-3"],
            "esd-x": ["--method", "esd-x"], "esd-u": ["--method", "esd-u"],
            "ablate": ["--method", "ablate", "--anchor", "circle"], "ablate-noise": ["--method", "ablate-noise", "--anchor", "circle"],
            "all-but-one": ["--method", "all-but-one"]}
GUIDED = ["neg", "sld-weak", "sld-medium", "sld-strong", "sld-max", "sega"]
THREE = ["star", "red", "striped"]
TEXTURES = ["striped", "dotted", "outlined"]
LONGER = ["--iters", "300"]  # for three concepts
POINTS = (40, 80, 120, 160)  # iterations, of the curve
TEMPLATES = ["a {} circle", "a blue {} square on sand", "a {} triangle on snow", "something {}"]  # four: three seeds share them


def plan(quick):
    """[(title, table's name, {row: (concepts, arguments of train.py)}, guided methods, what they avoid)]."""
    few = ["sdd", "sdd + preserve", "esd-x"] if quick else TRAINERS
    star = {name: (["star"], TRAINERS[name]) for name in few}
    if quick:
        return [("One concept (the paper's Table 1)", "one", star, ["neg", "sld-max", "sega"], ["star"])]
    three = {name: (THREE, TRAINERS[name] + LONGER) for name in ("sdd", "sdd + preserve", "esd-x", "esd-u", "all-but-one")}
    three |= {name: (THREE, ["--method", name, "--anchor", "circle", "blue", "plain", *LONGER]) for name in ("ablate", "ablate-noise")}
    three |= {f"{name}, official roles": (THREE, [*three[name][1], "--roles", "official"]) for name in ("sdd", "sdd + preserve")}
    three["sdd, lr 2e-3"] = (THREE, ["--lr", "2e-3", *LONGER])  # what --preserve does, apart from what its learning rate does
    three["sdd + preserve 0.1"] = (THREE, ["--lr", "2e-3", *LONGER, "--preserve", "0.1"])
    three["esd-x + preserve"] = (THREE, [*three["esd-x"][1], "--preserve", "0.3"])
    sizes = {f"sdd, batch {B}{' + preserve' * bool(keep)}": (["star"], ["--batch-size", B, *keep])
             for B in "14" for keep in ([], TRAINERS["sdd + preserve"])}
    return [("One concept (the paper's Table 1)", "one", star, GUIDED, ["star"]),
            ("Three concepts at once (Table 2)", "three", three, ["neg", "sld-medium", "sld-max", "sega"], THREE),
            ("Batches of 1 and 4 (8 is above)", "batch", sizes, [], [])]


def command(*words):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        from support.errors import UserError
        raise UserError(f"This command failed; mend it, and say the same again: {' '.join(map(str, words))}\n{done.stderr[-2000:]}")


def patches(files):
    return [word for file in files for word in ("--patch", file)]


def train(out, concepts, words, seed):
    """One training, unless it is there; one that was cut short goes on."""
    if (out / "erased.safetensors").exists():
        return
    if not (out / "run.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        command("train.py", "--model", "toy", "--concept", *concepts, *words, "--seed", seed, "--preview-every", 40,
                "--preview", concepts[0], "--preview-steps", 12, "--export-every", 40, "--out", out)
    else:
        command("train.py", "--resume", "--out", out)


def measured(out):
    """Has eval.py ended there? Its plot is the last that it makes, where it makes one."""
    return (out / "results.json").exists() and (out.name not in ("curve", "matrix") or (out / f"{out.name}.png").exists())


def tables(folder, sections, seeds, limit, jobs):
    """Trains and measures what is missing, `jobs` commands at a time. Returns {table: its rows}."""
    run = lambda name, row, seed: folder / "runs" / f"{name}-{row.replace(' ', '').replace(',', '-')}-{seed}"  # noqa: E731
    how = ["--limit", limit, "--steps", 12, "--device", "cpu", "--threads", 1, "--guidance-warmup", GUIDED_WARMUP]
    made = folder / f"tables-{len(seeds)}-{limit}"
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda work: train(*work), [(run(name, row, seed), concepts, words, seed) for _, name, rows, _, _ in sections
                                                  for row, (concepts, words) in rows.items() for seed in seeds]))
        work = []
        for _, name, rows, guided, avoid in sections:
            files = [f"{row}={run(name, row, seed) / 'erased.safetensors'}" for row in rows for seed in seeds]
            more = ["--methods", *guided, "--avoid", *avoid] if guided else []
            work.append(["eval.py", "toy", *how, *patches(files), *more, "--out", made / name])
        points = []
        for row in ("sdd", "esd-x"):
            for which in ("teacher", "student"):
                for i in POINTS:
                    points += [f"{row} {which}@{i}={run('one', row, seed) / 'exports' / f'{which}-{i:06d}.safetensors'}" for seed in seeds]
        work.append(["eval.py", "toy", *how, *patches(points), "--out", made / "curve"])
        list(pool.map(lambda words: measured(words[-1]) or command(*words), work))
    return {file.parent.name: json.loads(file.read_text(encoding="utf-8"))["rows"] for file in made.glob("*/results.json")}, run, made


def matrix(folder, made, seeds, limit, jobs):
    """Figure 2 with textures for artists: who was erased × who is asked for; the share of pictures that show what was asked."""
    words = {name: [word.replace("circle", "plain") for word in more] for name, more in TRAINERS.items() if "+" not in name}
    words["sdd"] = ["--steps", "12", "--lr", "4.4e-4"]  # the README's for textures
    work = [(folder / "runs" / f"matrix-{name}-{texture}-{seed}", [texture], words[name], seed)
            for name in words for texture in TEXTURES for seed in seeds]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda one: train(*one), work))
    files = [f"{out.name.split('-', 1)[1].rsplit('-', 2)[0]} {texture}={out / 'erased.safetensors'}" for out, (texture,), _, _ in work]
    if not measured(made / "matrix"):
        command("eval.py", "artists", "--model", "toy", "--limit", limit, "--scheduler", "ddim", "--steps", 12, "--device", "cpu",
                "--threads", 1, "--template", *TEMPLATES, *patches(files), "--out", made / "matrix")


def verdict(a, b):
    """Is the proportion a below b? By 95 % Wilson intervals: "holds", "fails" (it is above) or "open" (they overlap)."""
    from evaluation.metrics import wilson
    (low_a, high_a), (low_b, high_b) = wilson(*a), wilson(*b)
    return "holds" if high_a < low_b else "fails" if low_a > high_b else "open"


def claims(rows):
    """Markdown: the papers' claims as comparisons of two rows of the tables above, and which hold."""
    one, three, curve = ({row["model"]: row["figures"] for row in rows.get(name, [])} for name in ("one", "three", "curve"))
    target, kept = {"named": "named", "implied": "implied"}, {"caption": "wrong captions"}
    listed = [(f"SDD leaves less of {many} than {other} (Table {1 if found is one else 2})", found["sdd"], found[other], target)
              for found, many in ((one, "one concept"), (three, "three concepts")) for other in found
              if not other.startswith(("sdd", "original")) and "+" not in other]
    listed += [(f"SDD harms the rest less than {other} (the paper claims no such thing)", one["sdd"], one[other], kept)
               for other in one if other.startswith(("esd", "sld-max"))]
    for i in POINTS:
        teacher, student, esd = (curve[f"{name}@{i}"] for name in ("sdd teacher", "sdd student", "esd-x student"))
        listed.append((f"After {i} iterations SDD leaves less than ESD-x (Figure 5)", teacher, esd, target))
        listed.append((f"After {i} iterations the teacher harms the rest less than the student (Figures 3, 10, 11)",
                       teacher, student, kept))
    listed += [("Algorithm 1's roles leave less than the authors' script's", three[name], three[f"{name}, official roles"], target)
               for name in ("sdd", "sdd + preserve") if name in three]
    text = "| claim | measured | |\n|---|---|---|\n"
    for said, a, b, keys in listed:
        for key, name in keys.items():
            (hits, n), (others, m) = ((x[1] - x[0], x[1]) if key == "caption" else x for x in (a.get(key, (0, 0)), b.get(key, (0, 0))))
            if n and m:
                text += (f"| {said} | {name}: {100 * hits / n:.1f} against {100 * others / m:.1f} % | "
                         f"{verdict((hits, n), (others, m))} |\n")
    return text


def drifts(run, rows, sections, seeds):
    """Markdown: gap and drift at the end of each training, the mean of the seeds, beside what is left of the target and of the rest."""
    keys = ("gap_student", "drift_student", "gap_teacher", "drift_teacher")
    text = ("| trained | for | gap, student | drift, student | gap, teacher | drift, teacher | target, named | whole captions |\n"
            + "|---" * 8 + "|\n")
    for _, name, trained, _, _ in sections:
        figures = {row["model"]: row["figures"] for row in rows[name]}
        for row, (concepts, _) in trained.items():
            last = []
            for seed in seeds:
                with open(run(name, row, seed) / "log.csv", newline="", encoding="utf-8") as f:
                    last.append([line for line in csv.DictReader(f) if line["gap_student"]][-1])
            cells = [f"{sum(float(line[key]) for line in last) / len(last):.2g}" for key in keys]
            cells += [f"{100 * hits / n:.1f}" for hits, n in (figures[row]["named"], figures[row]["caption"])]
            text += f"| {row} | {', '.join(concepts)} | " + " | ".join(cells) + " |\n"
    return text


def write(folder, made, run, rows, sections, seeds, limit, quick, minutes):
    """REPRODUCTION.md and the pictures that it shows, beside it in docs/."""
    (folder / "docs").mkdir(exist_ok=True)
    shown = {f"film_{name}": run("one", name, seeds[0]) / "film.png" for name in ("sdd", "esd-x")}
    artists = (made / "matrix" / "results.json").exists()
    shown |= {name: made / name / f"{name}.png" for name in (["curve", "matrix"] if artists else ["curve"])}
    for name, file in shown.items():
        shutil.copyfile(file, folder / "docs" / f"{name}.png")

    def picture(name, alt):
        return f"![{alt}](docs/{name}.png)\n\n"

    def table(name):
        return (made / name / "table.md").read_text(encoding="utf-8")

    several = f"s {', '.join(map(str, seeds))}, pooled" if len(seeds) > 1 else f" {seeds[0]}"
    text = ["# The papers' claims, in miniature\n\n"
            f"`python eval.py toy --reproduce{' --quick' * quick} --out {os.path.relpath(folder, ROOT)}`, {datetime.date.today()}, "
            f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {minutes:.0f} minutes. Training seed{several}; "
            f"up to {limit} pictures a figure, percentages by the probe with 95 % Wilson intervals.\n\n{TUNING}\n"]
    text += [f"\n## {title}\n\n{table(name)}" for title, name, *_ in sections]
    text.append("\n## What holds\n\nA claim holds or fails where the two intervals do not meet, and is open where they do.\n\n")
    text.append(claims(rows))
    if artists:
        text += ["\n## Artists (Figure 2): textures in their place\n\nWhat shows, of what was asked for. SDD has the README's settings for a "
                 "texture, the others have the star's; Ablating's anchor is plain.\n\n",
                 picture("matrix", "who was erased and who is asked for"), table("matrix")]
    text += ["\n## Student, teacher and iterations (Figures 3, 5, 10, 11)\n\n", picture("curve", "target over iterations"),
             f"SDD, the star, seed {seeds[0]}:\n\n", picture("film_sdd", "student and teacher of SDD over the iterations"),
             "ESD-x:\n\n", picture("film_esd-x", "student and average of ESD-x"), table("curve")]
    text += ["\n## Gap and drift\n\nMean |e(c_s) − e(c_0)|² and |e(c_0) − e°(c_0)|² on fixed latents, after the last iteration, beside "
             "what else the model lost.\n\n", drifts(run, rows, sections, seeds)]
    (folder / "REPRODUCTION.md").write_text("".join(text), encoding="utf-8")


def reproduce(folder, quick=False, jobs=2):
    if not find_spec("matplotlib"):  # needed at the end, hours later
        from support.errors import UserError
        raise UserError("--reproduce draws a plot: pip install matplotlib, or all of requirements-eval.txt, first.")
    seeds, limit, began = ((2,), 40, time.time()) if quick else ((2, 3, 4), 100, time.time())
    sections, spent = plan(quick), folder / "seconds.txt"  # of this and of earlier, unfinished calls
    before = float(spent.read_text()) if spent.exists() else 0

    def note():
        folder.mkdir(parents=True, exist_ok=True)
        spent.write_text(f"{before + time.time() - began:.0f}")
        return (before + time.time() - began) / 60

    try:
        rows, run, made = tables(folder, sections, seeds, limit, jobs)
        write(folder, made, run, rows, sections, seeds, limit, quick, note())
        if not quick:
            matrix(folder, made, seeds, 240, jobs)
            write(folder, made, run, rows, sections, seeds, limit, quick, note())
    finally:
        note()
    print(f"{folder / 'REPRODUCTION.md'} is written, with its pictures in docs/ beside it; tables and plots are in {made}")
