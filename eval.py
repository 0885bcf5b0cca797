"""Tables: how much of a concept is left after erasing it, and what else was lost.

    python eval.py toy                                                    how well the embedded model draws
    python eval.py toy --patch star=runs/0001-star/erased.safetensors     what erasing did; several --patch make several rows,
                                                                          those of one NAME (training seeds) are pooled
Pictures are drawn, looked at by the probe and counted. Every proportion comes with its 95 % Wilson interval.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

import weights
from generate import (add_common_arguments, draw, encode, grid, make_scheduler, pick_device, pick_dtype, positive,
                      refuse_used, run, save_png)
from metrics import toy_seen, wilson
from toy.draw import exam
from weights import UserError

KINDS = {"named": "target, named", "implied": "target, implied", "base": "target, empty prompt", "control": "hearts in borealis",
         "shape": "other shapes", "colour": "other colours", "texture": "other textures", "background": "backgrounds"}


def count(which, prompts, seen, concepts):
    """{column: (hits, n)} of one set of pictures."""
    if which in ("named", "implied"):
        hits = [any(seen[name][i] == asked.get(name) and asked[name] in concepts for name in asked)
                for i, (_, asked) in enumerate(prompts)]
        return {which: (sum(hits), len(hits))}
    if which == "base":  # the mean over the concepts, as for the others
        return {"base": (sum(words.count(c) for words in seen.values() for c in concepts), len(prompts) * len(concepts))}
    if which == "control":
        return {"control": (seen["shape"].count("heart"), len(prompts))}
    counts = {}
    for name in seen:
        hits = [seen[name][i] == asked[name] for i, (_, asked) in enumerate(prompts) if name in asked]
        counts[name] = (sum(hits), len(hits))
    return counts


def measure(model, files, concepts, args, dtype):
    """{column: (hits, n)} and sample pictures of a model patched with each of `files` in turn (training seeds; none: as it is),
    which share the pictures of every set evenly."""
    scheduler, size = make_scheduler(model.scheduler, args.steps, args.scheduler), model.resolution
    device, base = next(model.unet.parameters()).device, {name: x.clone() for name, x in model.unet.state_dict().items()}
    sets = exam(concepts, args.limit, args.seed)
    texts = {which: encode(model, ["", *(text for text, _ in pairs)]).to(device) for which, pairs in sets.items()}
    pictures = {which: np.zeros((len(pairs), size, size, 3), "uint8") for which, pairs in sets.items()}
    for n, file in enumerate(files or [None]):
        if file:
            weights.load_patch(file, model.unet)
        for number, which in enumerate(sets):
            mine = list(range(n, len(sets[which]), len(files) or 1))
            c_0, c_p, seeds = texts[which][:1], texts[which][1:][mine], [args.seed + 100_000 * number + i for i in mine]
            drawn = draw(model, model.unet, c_0, c_p, seeds, scheduler, args.guidance_scale, dtype, batch_size=args.batch_size, bar=which)
            pictures[which][mine] = [*drawn]
        model.unet.load_state_dict(base)
    counts = {}
    for which, pairs in sets.items():
        counts |= count(which, pairs, toy_seen(pictures[which]), concepts)
    return counts, [list(some[:12]) for some in pictures.values()]


def cell(hits, n):
    low, high = wilson(hits, n)
    return f"{100 * hits / n:.1f} ({100 * low:.0f}–{100 * high:.0f})" if n else "–"


def table(rows):
    """Markdown: a row a patch, percentages with intervals; n stands in the header."""
    columns = [key for key in KINDS if any(key in counts for _, _, counts in rows)]
    size = {key: max(counts[key][1] for _, _, counts in rows if key in counts) for key in columns}
    lines = ["| model | erased | " + " | ".join(f"{KINDS[key]} (n ≤ {size[key]})" for key in columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, concepts, counts in rows:
        cells = [cell(*counts[key]) if key in counts else "–" for key in columns]
        lines.append(f"| {name} | {', '.join(concepts) or '–'} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def evaluate(args):
    groups = {}
    for text in args.patch:
        name, _, file = text.partition("=")
        if not file:
            raise UserError(f"--patch {text}: write NAME=FILE.")
        groups.setdefault(name, []).append(file)
    refuse_used(args.out)
    device = pick_device(args.device)
    dtype, model = pick_dtype(args.dtype, device), weights.load(args.model, args.revision)
    model.unet.to(device), model.vae.to(device)
    rows, seen = [], set()
    for name, files in list(groups.items()) or [("original", [])]:
        concepts = {tuple(weights.read(file)[1].get("concepts", "").split(", ")) for file in files} or {()}
        if len(concepts) > 1:
            raise UserError(f"The patches named {name} erase different concepts ({concepts}): give them names of their own.")
        concepts = concepts.pop()
        for title, of in [("original", [])] * (concepts not in seen) + [(name, files)] * bool(files):
            counts, samples = measure(model, of, concepts, args, dtype)
            rows.append((title, concepts, counts))
            save_png(grid(samples), args.out / f"{title}-{'-'.join(concepts) or 'all'}.png")
        seen.add(concepts)
    text = table(rows)
    results = {"settings": {key: str(value) for key, value in vars(args).items()},
               "rows": [{"model": title, "erased": concepts, "counts": counts} for title, concepts, counts in rows]}
    for file, content in (("table.md", text), ("results.json", json.dumps(results, indent=1))):
        with weights.whole(args.out / file) as beside:
            beside.write_text(content, encoding="utf-8")
    print(text)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=["toy"])
    parser.add_argument("--model", default="toy")
    parser.add_argument("--patch", action="append", default=[], metavar="NAME=FILE", help="an erased.safetensors; may be repeated")
    parser.add_argument("--limit", type=positive, default=200, help="pictures a figure")
    parser.add_argument("--scheduler", choices=["ddim", "pndm"], default="ddim", help="PNDM needs more steps")
    parser.add_argument("--steps", type=positive, default=25)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    add_common_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run(evaluate, parse()))
