"""Tables: how much of a concept is left, and what else was lost.

    python eval.py toy                                                    how well the embedded model draws
    python eval.py toy --patch star=runs/0001-star/erased.safetensors     what erasing did; several --patch make several rows,
                                                                          those of one NAME (training seeds) are pooled
    python eval.py nudity --patch sdd=… --methods neg sld-max sega        the papers' suites, for Stable Diffusion: nudity, i2p, coco,
                                                                          artists; `torchrun --nproc-per-node N eval.py …` shares the work
Every picture is a file in DIR/pictures and is made once: after a kill the same command goes on. Then they are measured (metrics.py).
A proportion comes with its 95 % Wilson interval. A row NAME@ITERATION is a point of the curve NAME in curve.png.
"""
import argparse
import itertools
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

import metrics
import weights
from clip_text import tokenize
from generate import (add_common_arguments, avoided, draw, encode, grid, make_scheduler, pick_device, pick_dtype, positive, refuse_used,
                      run, save_png)
from guidance import GUIDANCE
from suites import SUITES, paper
from weights import UserError

TITLES = {"nude": "%NUDE", "harm": "%HARM", "fid": "FID", "kid": "KID", "lpips": "LPIPS to the original", "ssim": "SSIM to the original",
          "clip": "CLIP score"}


class System(NamedTuple):
    """A row of the table: the model, patched (by each of `files` in turn, which share the pictures) or guided by a method."""
    name: str
    files: tuple
    method: str  # of GUIDANCE; and under which the paper has it
    trained: str
    concepts: tuple

    @property
    def title(self):
        return "-".join([self.name, *self.concepts]).replace("/", "-").replace(" ", "-")[:100]


def systems(args):
    """The rows: for each set of concepts the original, then what erases them."""
    groups, found = {}, []
    for text in args.patch:
        name, _, file = text.partition("=")
        if not file:
            raise UserError(f"--patch {text}: write NAME=FILE.")
        groups.setdefault(name, []).append(file)
    for name, files in groups.items():
        told = [weights.read(file)[1] for file in files]
        concepts = {tuple(x.get("concepts", "").split(", ")) for x in told}
        if len(concepts) > 1:
            raise UserError(f"The patches named {name} erase different concepts ({concepts}): give them names of their own.")
        found.append(System(name, tuple(files), "sd", told[0].get("method", ""), concepts.pop()))
    for method in args.methods:
        avoided(method, args.avoid)
        found.append(System(method, (), method, method, tuple(args.avoid)))
    if args.suite != "toy":
        return [System("original", (), "sd", "sd", ()), *found]
    ordered = {}  # the embedded model is asked other things for other concepts
    for system in found or [System("original", (), "sd", "sd", ())]:
        ordered.setdefault(system.concepts, [System("original", (), "sd", "sd", system.concepts)]).append(system)
    return list(dict.fromkeys(itertools.chain(*ordered.values())))


def batches(jobs, size):
    """Indices of jobs that are drawn together: cut by absolute index, and where guidance scale or picture size change."""
    for _, group in itertools.groupby(range(len(jobs)), key=lambda i: (i // size, jobs[i].scale, jobs[i].size)):
        yield list(group)


def draw_missing(model, system, jobs, folder, args, dtype, rank, world):
    """Makes the pictures that are not there. Each rank, and each restart, takes whole batches, so that a picture does not depend on
    who makes it when."""
    scheduler, base = make_scheduler(model.scheduler, args.steps, args.scheduler), {}
    device, files = next(model.unet.parameters()).device, system.files or (None,)
    for n, file in enumerate(files):
        mine = list(range(n, len(jobs), len(files)))
        todo = [[mine[i] for i in batch] for batch in batches([jobs[i] for i in mine], args.batch_size)]
        todo = [batch for batch in todo[rank::world] if not all((folder / f"{i:05d}.png").exists() for i in batch)]
        if file and todo:
            changed = weights.read(file)[0].keys()
            base = {name: x.clone() for part in (model.unet, model.text_encoder) for name, x in part.state_dict().items() if name in changed}
            weights.load_patch(file, model.unet, model.text_encoder)
        for batch in tqdm(todo, system.title, unit="batch", disable=None):
            some = [jobs[i] for i in batch]
            avoid = avoided(system.method, system.concepts if system.method != "sd" else ())
            texts = encode(model, ["", *avoid, *(job.prompt for job in some)], tell=False)
            c_0, c_S, c_p = texts.to(device).split([1, len(avoid), len(some)])
            scale = args.guidance_scale if some[0].scale is None else some[0].scale
            pictures = draw(model, model.unet, c_0, c_p, [job.seed for job in some], scheduler, scale, dtype, size=some[0].size,
                            batch_size=len(some), method=system.method, c_S=c_S, warmup=args.guidance_warmup)
            for i, picture in zip(batch, pictures):
                if not (folder / f"{i:05d}.png").exists():
                    about = dict(prompt=jobs[i].prompt, seed=jobs[i].seed, model=model.name, system=system.title)
                    save_png(picture, folder / f"{i:05d}.png", **about)
        for part in (model.unet, model.text_encoder):
            part.load_state_dict(base, strict=False)


def measure(keys, system, files, jobs, others, args, device):
    """{column: (hits, n) or a number} of one system's pictures; `others`: the original's, from the same noise."""
    found = {}
    for key in keys:
        if key == "toy":
            from toy.suite import measure as measure_toy
            found |= measure_toy(metrics.arrays(files), metrics.arrays(others), jobs, system.concepts)
        elif key == "nude":
            found[key] = metrics.nude(files)
        elif key == "harm" and args.q16:
            learned = next(iter(weights.read(args.q16)[0].values()))
            found[key] = metrics.harm(files, learned, args.clip, device)
        elif key in ("fid", "kid") and args.real:
            found[key] = getattr(metrics, key)(files, args.real)
        elif key in ("lpips", "ssim") and files != others:
            found[key] = getattr(metrics, key)(files, others)
        elif key == "clip":
            found[key] = metrics.clip_score(files, [job.prompt for job in jobs], args.clip, device)
        elif key == "matrix":  # a row of Figure 2: how far each artist's pictures moved; of the embedded model's, which still show
            for which in dict.fromkeys(job.which for job in jobs):
                mine = [i for i, job in enumerate(jobs) if job.which == which]
                if args.model == "toy":
                    from toy.suite import shown
                    found[which] = shown(metrics.arrays([files[i] for i in mine]), which)
                elif files != others:
                    found[which] = metrics.lpips([files[i] for i in mine], [others[i] for i in mine])
    return found


def cell(value):
    if not isinstance(value, (tuple, list)):
        return "–" if value is None else f"{value:.4g}"
    (hits, n), (low, high) = value, metrics.wilson(*value)
    return f"{100 * hits / n:.1f} ({100 * low:.0f}–{100 * high:.0f})" if n else "–"


def table(rows, titles, suite):
    """Markdown: a row a system; percentages with intervals, n in the header; the paper's figures in columns of their own."""
    columns = [key for key in titles if any(key in row["figures"] for row in rows)]
    known = [paper(suite, row["method"], row["erased"]) for row in rows]
    head, cells = ["model", "erased"], [[row["model"], ", ".join(row["erased"]) or "–"] for row in rows]
    for key in columns:
        values = [row["figures"].get(key) for row in rows]
        n = max((value[1] for value in values if isinstance(value, (tuple, list))), default=0)
        head.append(titles[key] + (f" (n ≤ {n})" if n else ""))
        for line, value in zip(cells, values):
            line.append(cell(value))
        if any(key in figures for figures in known):
            head.append(f"{titles[key]}, the paper's")
            for line, figures in zip(cells, known):
                line.append(f"{figures[key]:.4g}" if key in figures else "–")
    return "".join("| " + " | ".join(line) + " |\n" for line in [head, ["---"] * len(head), *cells])


def height(value):
    return 100 * value[0] / value[1] if isinstance(value, tuple) else value


def plot(rows, titles, suite, folder):
    """matrix.png for Figure 2's rows; curve.png where rows are named NAME@ITERATION."""
    curves = {}
    for row in rows:
        name, _, iteration = row["model"].rpartition("@")
        if name and iteration.isdigit():
            curves.setdefault(name, []).append((int(iteration), row["figures"]))
    matrix = [row for row in rows if suite == "artists" and row["figures"]]
    if not (curves or matrix):
        return
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    if curves:
        key = next(key for key in titles if all(key in figures for points in curves.values() for _, figures in points))
        figure, axes = pyplot.subplots()
        for name, points in sorted(curves.items()):
            axes.plot(*zip(*[(i, height(x[key])) for i, x in sorted(points, key=lambda p: p[0])]), marker="o", label=name)
        axes.set(xlabel="iteration", ylabel=titles[key])
        axes.legend()
        with weights.whole(folder / "curve.png") as beside:
            figure.savefig(beside, dpi=120)
    if matrix:
        asked = matrix[0]["asked"]
        figure, axes = pyplot.subplots()
        values = [[height(row["figures"][which]) for which in asked] for row in matrix]
        axes.figure.colorbar(axes.imshow(values), label="% shown" if isinstance(matrix[0]["figures"][asked[0]], tuple) else TITLES["lpips"])
        axes.set(xticks=range(len(asked)), xticklabels=asked, yticks=range(len(matrix)), yticklabels=[row["model"] for row in matrix], xlabel="asked for")
        axes.tick_params(axis="x", rotation=30)
        with weights.whole(folder / "matrix.png") as beside:
            figure.savefig(beside, dpi=120, bbox_inches="tight")
    pyplot.close("all")


def open_folder(args):
    """The settings that pictures and figures depend on; a folder with others is refused, one with the same gone on with."""
    settings = {key: str(value) for key, value in vars(args).items() if key not in ("out", "all_concepts")}
    file = args.out / "eval.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) == settings:
        return settings
    refuse_used(args.out, ", or repeat the command that filled it to go on")
    with weights.whole(file) as beside:
        beside.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return settings


def results(args, rows_of, settings, model, device):
    """Measures every system, and writes table.md, results.json, sheets of sample pictures and plots."""
    keys, rows, titles = SUITES[args.suite][1], [], dict(TITLES)
    if args.suite == "toy":
        from toy.suite import COLUMNS
        titles = COLUMNS | TITLES
    for system, jobs, folder in rows_of:
        files = [folder / f"{i:05d}.png" for i in range(len(jobs))]
        others = next(f for s, _, f in rows_of if s.name == "original" and (s.concepts == system.concepts or args.suite != "toy"))
        figures = measure(keys, system, files, jobs, [others / file.name for file in files], args, device)
        asked = list(dict.fromkeys(job.which for job in jobs))
        titles |= {which: which for which in asked} if args.suite == "artists" else {}
        rows.append({"model": system.name, "erased": system.concepts, "method": system.trained, "figures": figures, "asked": asked})
        sample = [[file for file, job in zip(files, jobs) if job.which == which][:12] for which in asked]
        sheet = [list(metrics.arrays(some, Image.open(files[0]).size)) for some in sample]
        save_png(grid(sheet, asked if asked != [""] else ()), args.out / f"{system.title}.png")
    cut = sum(tokenize(model.tokenizer, sorted({job.prompt for _, jobs, _ in rows_of for job in jobs}))[1])
    notes = [metrics.nude_note()] * ("nude" in keys) + [f"{cut} prompts were cut to 77 tokens"] * bool(cut)
    text = table(rows, titles, args.suite) + "".join(f"\n{note}\n" for note in notes)
    plot(rows, titles, args.suite, args.out)
    content = {"settings": settings, "notes": notes, "rows": [{key: x for key, x in row.items() if key != "asked"} for row in rows]}
    for name, text_of in (("table.md", text), ("results.json", json.dumps(content, indent=1, ensure_ascii=False))):
        with weights.whole(args.out / name) as beside:
            beside.write_text(text_of, encoding="utf-8")
    print(text)


def evaluate(args):
    if args.reproduce:
        from toy.reproduce import reproduce
        return reproduce(args.out, args.quick)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = systems(args)
    args.all_concepts = list(dict.fromkeys(concept for system in rows for concept in system.concepts))
    listed = [(system, SUITES[args.suite][0](args, system.concepts)) for system in rows]
    settings = open_folder(args) if rank == 0 else None
    many = args.device == "auto" and world > 1 and torch.cuda.is_available()
    device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if many else args.device)
    dtype, model = pick_dtype(args.dtype, device), weights.load(args.model, args.revision)
    for part in (model.unet, model.vae, model.text_encoder):
        part.to(device)
    rows_of = [(system, jobs[:args.limit] if args.suite != "toy" else jobs, args.out / "pictures" / system.title) for system, jobs in listed]
    for system, jobs, folder in rows_of:
        draw_missing(model, system, jobs, folder, args, dtype, rank, world)
    if world > 1:
        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()  # the others wait here for no one: the first rank measures alone
        torch.distributed.destroy_process_group()
    if rank == 0:
        try:
            results(args, rows_of, settings, model, device)
        except ModuleNotFoundError as e:
            raise UserError(f"The pictures are made, but {e.name} is missing to measure them: pip install -r requirements-eval.txt "
                            "and repeat the command.") from e
        except OSError as e:
            raise UserError(f"The pictures are made, but not measured ({str(e).strip().splitlines()[0]}): repeat the command with a network.") from e


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES])
    parser.add_argument("--model", help="toy, a hub id or a folder in diffusers' layout; default: toy for the suite toy")
    parser.add_argument("--patch", action="append", default=[], metavar="NAME=FILE", help="an erased.safetensors; may be repeated")
    parser.add_argument("--methods", nargs="+", default=[], choices=[method for method in GUIDANCE if method != "sd"], help="erasers that only guide")
    parser.add_argument("--avoid", nargs="+", default=[], metavar="C", help="what --methods keep away from (paper: nudity sexual)")
    parser.add_argument("--guidance-warmup", type=int, metavar="N", help="evaluations before sld or sega act; default: their papers', for 50 steps")
    parser.add_argument("--limit", type=positive, help="at most so many pictures; toy: of each set (default 200)")
    parser.add_argument("--prompts", type=Path, metavar="CSV", help="coco: captions; i2p: a copy of its file")
    parser.add_argument("--template", nargs="+", metavar="TEXT", help='artists: prompts with {} for the name')
    parser.add_argument("--real", type=Path, metavar="DIR", help="coco: real pictures, for FID and KID")
    parser.add_argument("--q16", type=Path, metavar="FILE", help="i2p: Q16's two learned prompts, a safetensors file (2, 768)")
    parser.add_argument("--clip", default=metrics.CLIP, help="hub id or folder of the CLIP that measures")
    parser.add_argument("--reproduce", action="store_true", help="toy: train every eraser, measure it, write REPRODUCTION.md (toy/reproduce.py)")
    parser.add_argument("--quick", action="store_true", help="... in 15 minutes: one seed, fewer rows and pictures")
    parser.add_argument("--scheduler", choices=["ddim", "pndm"], help="default: pndm (the paper's); toy: ddim, as PNDM needs more steps")
    parser.add_argument("--steps", type=positive, default=25)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--threads", type=positive, help="CPU threads of each process; pictures depend on it in the last bit")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or one that this command has begun to fill")
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    args.model = args.model or ("toy" if args.suite == "toy" else weights.DEFAULT_MODEL)
    args.scheduler = args.scheduler or ("ddim" if args.suite == "toy" else "pndm")
    return args


if __name__ == "__main__":
    sys.exit(run(evaluate, parse()))
