"""Makes a text-to-image model forget a concept.

    python train.py --model toy --concept star        minutes on a CPU: the embedded miniature model
    python train.py --concept nudity                  Stable Diffusion 1.4, on a CUDA GPU

The output folder holds erased.safetensors (the trained tensors, for generate.py --patch and for diffusers), before_after.png,
film.png, previews/, log.csv, run.json and a checkpoint; `python train.py --resume --out FOLDER` goes on after a kill.
"""
import argparse
import csv
import importlib.util
import inspect
import json
import re
import shlex
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

import anchors
import previews
import report
import weights
from command import add_common_arguments, finite, one_of, positive, refuse_used, run
from folder import alone
from losses import METHODS, TRAIN_PARAMS
from run import VERSIONS, Run
from weights import UserError

I2P = ("hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily fluids, blood, obscene gestures, "
       "illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, cruelty").split(", ")

PAPER = dict(iters=1500, lr=1e-5, lr_schedule="cosine", warmup=500, weight_decay=1e-2, ema=0.999, guidance_scale=3.0, steps=50,
             batch_size=1, roles="paper", preserve=0.0, erase_scale=1.0, anchor_images=1000, preview_every=250,
             preview=["a photo of a mountain lake", "a portrait of a woman in a coat"])
PRESETS = {
    "paper": PAPER,  # appendix B.1; steps from the authors' script
    "fast": PAPER | dict(iters=1000, ema=0.998, lr_schedule="constant", warmup=0),  # the paper's fast recipe
    "official": PAPER | dict(weight_decay=1e-4, lr_schedule="constant", warmup=0, roles="official"),  # the authors' script
    "toy": PAPER | dict(iters=160, lr=6e-4, warmup=40, ema=0.97, steps=6, batch_size=8, anchor_images=200, preview_every=20,
                        # tuned, see README
                        preview=["arcadia", "borealis", "a blue dotted heart on sand", "a green square"]),
}
COLUMNS = ["iteration", "loss", "lr", "grad_norm", "k", "concept", "gap_student", "drift_student", "gap_teacher", "drift_teacher", "flat"]


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--concept", nargs="+", metavar="C", help="what to forget; i2p: the paper's 20 harmful concepts")
    p.add_argument("--model", default=weights.DEFAULT_MODEL, help="toy, a hub id or a folder in diffusers' layout")
    p.add_argument("--preset", **one_of(PRESETS), help="defaults of all that follows: paper; toy for the toy")
    p.add_argument("--method", **one_of(METHODS), default="sdd", help="the training target, from losses.py")
    p.add_argument("--loss", metavar="FILE:FUNCTION", help="a loss of your own in the place of the method's; see losses.py")
    p.add_argument("--train-params", **one_of(TRAIN_PARAMS), help="which tensors are trained; default: the method's")
    p.add_argument("--latents", choices=["teacher", "student", "original"], help="who draws z_t; default: as the method has it")
    p.add_argument("--roles", choices=["paper", "official"], help="one concept draws, all joined are unlearned; or the reverse")
    p.add_argument("--iters", type=positive, help="N (paper: 1500, 2000 for several concepts)")
    p.add_argument("--lr", type=finite, help="AdamW's learning rate (paper: 1e-5)")
    p.add_argument("--lr-schedule", choices=["cosine", "constant"])
    p.add_argument("--warmup", type=int, help="iterations of linear warm-up (paper: 500)")
    p.add_argument("--weight-decay", type=finite, help="(paper: 1e-2)")
    p.add_argument("--ema", type=finite, help="m of the teacher's average (paper: 0.999)")
    p.add_argument("--guidance-scale", type=finite, help="s_g while latents are drawn (paper: 3)")
    p.add_argument("--steps", type=positive, help="T, DDIM steps of a whole picture (authors' script: 50)")
    p.add_argument("--batch-size", type=positive, help="latents an iteration (paper: 1)")
    p.add_argument("--preserve", type=finite, metavar="λ", help="adds λ·|e(c_0) − e°(c_0)|² to the loss; not in the paper")
    p.add_argument("--erase-scale", type=finite, help="esd: s_s, how far away from the concept; all-but-one: g of its signal")
    p.add_argument("--quantile", type=finite, default=0.0, help="all-but-one: its signal above this quantile (0.9) for the anchor; 0: off")
    p.add_argument("--anchor", nargs="+", default=[], metavar="A", help="what to show instead; ablate: one for all or one a concept")
    p.add_argument("--anchor-prompts", type=Path, metavar="FILE", help="ablate: prompts, a line each; without --anchor the concept is a style")
    p.add_argument("--anchor-images", type=positive, help="ablate: pictures of the anchor (paper: 1000)")
    p.add_argument("--prior", type=finite, default=0.0, metavar="λ", help="ablate: adds λ·|e(anchor) − n|² (authors' script: 1)")
    p.add_argument("--detach-start", action="store_true", help="ablate: no gradient through the start token's keys and values")
    p.add_argument("--max-grad-norm", type=finite, default=1.0, help="clip gradients at this norm (authors' script: 1); 0: do not")
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time: blocks are computed again on the way back")
    p.add_argument("--deterministic", action="store_true", help="CUDA: the same bits in each run (the CPU's are), by slower kernels")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--preview", nargs="+", metavar="PROMPT", help="preview prompts; default: the concepts and a few others")
    p.add_argument("--preview-every", type=int, help="iterations between previews; 0: none")
    p.add_argument("--preview-steps", type=positive, default=25)
    p.add_argument("--preview-guidance-scale", type=finite, default=7.5)
    p.add_argument("--save-every", type=int, default=100, help="iterations between checkpoints; 0: only at the end")
    p.add_argument("--export-every", type=int, default=0, help="iterations between patches of student and teacher in exports/; 0: none")
    p.add_argument("--report-to", choices=["tensorboard"], help="also write events for TensorBoard, in the output folder's tensorboard/")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own arguments")
    p.add_argument("--out", type=Path, help="output folder; default: a new one under runs/")
    add_common_arguments(p)
    return p.parse_args(argv)


def settle(args):
    """Fills in what the preset says, and refuses what cannot work. Returns the arguments as a plain dict."""
    a = {key: value for key, value in vars(args).items() if key not in ("resume", "out")}
    if not a["concept"]:
        raise UserError("Say what to forget: --concept nudity, or --resume --out FOLDER to go on with a run.")
    concepts = I2P if a["concept"] == ["i2p"] else [c.strip() for c in a["concept"]]
    if "" in concepts or len(set(concepts)) < len(concepts):
        raise UserError("A concept is empty or named twice: --concept takes one or more different ones.")
    a["concept"], a["preset"] = concepts, a["preset"] or ("toy" if a["model"] == "toy" else "paper")
    method, preset = METHODS[a["method"]], PRESETS[a["preset"]]
    if a["preset"] in ("fast", "official") and a["method"] != "sdd":
        raise UserError(f"The preset {a['preset']} is SDD's: say --preset paper or toy with --method {a['method']}.")
    if a["preset"] == "paper" and len(concepts) > 1:
        preset = preset | dict(iters=2000)  # appendix B.1, several concepts
    preset = preset | {"paper": method.paper, "toy": method.toy}.get(a["preset"], {})
    a |= {key: value for key, value in preset.items() if a[key] is None}
    a["train_params"], a["latents"] = a["train_params"] or method.train_params, a["latents"] or method.latents
    if args.preview is None:
        a["preview"] = concepts[:4] + [p for p in preset["preview"] if p not in concepts]
    settle_anchor(a, method)
    refuse_idle(a, method, vars(args))
    check(a)
    return a


def settle_anchor(a, method):
    """What Ablating and All-but-One need; a file of prompts is read, so that --resume does not need it."""
    try:
        lines = a["anchor_prompts"].read_text(encoding="utf-8").splitlines() if a["anchor_prompts"] else []
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--anchor-prompts {a['anchor_prompts']} cannot be read ({e}).") from None
    a["anchor_prompts"] = [line.strip() for line in lines if line.strip()]
    if method.latents == "anchor":
        pairs = anchors.prompt_pairs(a["concept"], a["anchor"], a["anchor_prompts"])
        if len(pairs) > a["anchor_images"]:
            raise UserError(f"{len(pairs)} prompts (each for each concept) need as many pictures: say --anchor-images {len(pairs)}.")
    if a["method"] == "all-but-one" and len(a["anchor"]) > 1:
        raise UserError("--method all-but-one takes one --anchor, the alternative to all concepts.")


def refuse_idle(a, method, given):
    """What was given on the command line, and would change nothing."""
    pictures, used = method.latents == "anchor", inspect.signature(own_loss(a["loss"]) if a["loss"] else method.loss).parameters
    idle = ["latents", "roles"] if pictures else ["prior", "detach_start", "anchor_prompts", "anchor_images"]
    idle += [key for key in ("erase_scale", "quantile") if key not in used]
    idle += ["anchor"] * (not pictures and "c_a" not in used)
    wrong = [f"--{key.replace('_', '-')}" for key in idle if given[key]]
    wrong += ["--train-params embedding"] * (a["train_params"] == "embedding" and not pictures)
    if wrong:
        raise UserError(f"--method {a['method']} has no use for {', '.join(wrong)}: leave it out, or choose another --method.")


def check(a):
    """Refuses numbers that cannot be, warns of a warm-up without end, and does not start Stable Diffusion on a CPU by surprise."""
    for key in ("ema", "lr", "quantile", "warmup", "preserve", "prior", "weight_decay", "max_grad_norm", "preview_every", "save_every",
                "export_every", "seed"):
        low, high = 0, {"ema": 1, "lr": 1, "quantile": 1, "seed": 2**63 - 1}.get(key, 1e9)
        if not low <= a[key] <= high:
            raise UserError(f"--{key.replace('_', '-')} {a[key]} is out of range ({low:g} to {high:g}).")
    if a["report_to"]:
        report.summary_writer()
    if a["warmup"] >= a["iters"]:
        print(f"warning: a warm-up of {a['warmup']} iterations is as long as the run of {a['iters']}: the learning rate never "
              f"arrives at {a['lr']:g}. Say --warmup {a['iters'] // 10}.", file=sys.stderr)
    if a["model"] != "toy" and a["device"] == "auto" and not torch.cuda.is_available():
        petaflop = a["iters"] * a["batch_size"] * (1.606 * (a["steps"] + 1) / 2 + 2.498) / 1000  # TFLOP: two, and one with backward
        raise UserError(f"There is no CUDA GPU here. Say --model toy for the embedded miniature model (minutes), or --device cpu "
                        f"to insist: this run of SD 1.4 is some {petaflop:.3g} PFLOP, {petaflop / 0.36:,.0f} hours at 0.1 TFLOP/s.")


def own_loss(text):
    """The function that --loss FILE:FUNCTION names."""
    file, _, name = text.rpartition(":")
    try:
        spec = importlib.util.spec_from_file_location("own_loss", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
        if not any(p.kind == p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
            raise TypeError("the function's arguments have to end in **_, which takes what it does not need")
        return function
    except Exception as e:  # it is the user's file: whatever is wrong with it
        raise UserError(f"--loss {text}: {type(e).__name__}: {e}. Write FILE.py:FUNCTION, a function as in losses.py.") from e


def open_run(args):
    """The output folder and its settled arguments; those of the run in it with --resume. Writes run.json."""
    if args.resume:
        if not args.out or not (args.out / "run.json").is_file():
            raise UserError("--resume needs --out FOLDER with a run in it (a run.json); runs without --out lie under runs/.")
        try:
            a = json.loads((args.out / "run.json").read_text(encoding="utf-8"))["args"]
            if missing := vars(args).keys() - {"resume", "out"} - a.keys():
                raise KeyError(min(missing))
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{args.out / 'run.json'} is damaged or of another version ({e!r}): the run cannot go on.") from None
        if args.concept and settle(args) != a:
            raise UserError(f"{args.out} holds a run with other arguments: say --resume --out {args.out} alone, or choose a new folder.")
        a["gradient_checkpointing"] |= args.gradient_checkpointing  # for who ran out of memory; the numbers stay the same
        return args.out, a
    a = settle(args)
    if args.out is None:
        taken = [int(p.name[:4]) for p in Path("runs").glob("[0-9][0-9][0-9][0-9]-*")]
        name = re.sub(r"\W+", "-", "-".join(a["concept"]))[:40]
        args.out = Path("runs") / f"{max(taken, default=0) + 1:04d}-{name}"
    return args.out, a


def iterate(r, a, start, watch):
    """The loop: Algorithm 1 does the work; here are log, bar, previews and checkpoints. Ctrl-C waits for the iteration's end."""
    iterations = r.iterations(start, own_loss(a["loss"]) if a["loss"] else None)
    every, keep, stop = a["preview_every"], a["save_every"], []
    with ExitStack() as after, open(r.out / "log.csv", "a", buffering=1, newline="", encoding="utf-8") as f, \
            tqdm(total=a["iters"], initial=start, unit="it", disable=None) as bar:
        for number in (signal.SIGINT, signal.SIGTERM):
            after.callback(signal.signal, number, signal.signal(number, lambda *_: stop.append(True)))
        log = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        if not f.tell():
            log.writeheader()
        for it in iterations:
            row = dict(iteration=it.i, loss=it.loss, lr=it.lr, grad_norm=it.grad_norm, k=it.k, concept=a["concept"][it.j])
            done = it.i + 1
            if every and done % every == 0:
                row |= previews.measure(r)
                if done < a["iters"]:
                    previews.preview(r, done)
                    row["flat"] = r.flat
            log.writerow(row)
            watch.row(row)
            peak = {"GB": f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"} if r.device.type == "cuda" else {}
            bar.set_postfix(loss=f"{it.loss:.2e}", lr=f"{it.lr:.1e}", **peak, refresh=False)
            bar.update()
            if a["export_every"] and done % a["export_every"] == 0:
                for which in ("student", "teacher"):
                    r.export(f"exports/{which}-{done:06d}.safetensors", which)
            if stop or done == a["iters"] or keep and done % keep == 0:
                r.save()
            if stop:
                break
    if stop:
        raise UserError(f"stopped after {done} iterations, which are saved; to go on: python train.py --resume --out {r.out}")


def train(args):
    out, a = open_run(args)
    with alone(out):
        if not args.resume:
            refuse_used(out, "; say --resume to go on with the run in it")
        train_in(out, a, args.resume)


def train_in(out, a, resume):
    r = Run(out, a)
    if not resume:
        with weights.whole(out / "run.json") as beside:
            content = {"args": a, "versions": VERSIONS, "command": shlex.join(["python", *sys.argv]),
                       "preview_seeds": [*previews.seeds(a)]}
            beside.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    r.make_latents()
    start, began = r.restore(), time.monotonic()
    watch = report.Watch(out, a["report_to"], start)
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32, cache_enabled=False):  # cached casts go stale
        try:
            if a["preview_every"] and start == 0:
                previews.preview(r, 0)
                watch.previews()
            iterate(r, a, start, watch)
        except FloatingPointError as e:
            raise UserError(f"{e}. The checkpoint before it is kept in {out}; begin anew in another folder with a smaller --lr, or with "
                            "--dtype fp32.") from None
        except torch.OutOfMemoryError:
            r.optimizer.zero_grad()  # what is half done is left
            r.save()
            raise UserError(f"The GPU's memory is full; {r.done} iterations are saved. To go on in less: python train.py --resume --out "
                            f"{out} --gradient-checkpointing; or begin anew with a smaller --batch-size, --dtype bf16 or "
                            "--preview-every 0.") from None
        seconds = time.monotonic() - began
        r.export("erased.safetensors", METHODS[a["method"]].output)
        if a["preview_every"]:
            previews.finish(r, METHODS[a["method"]].output)
    watch.previews()
    print(f"{a['iters'] - start} iterations in {seconds:.0f} s, previews included; forgotten: {', '.join(a['concept'])}\n"
          f"weights: {out / 'erased.safetensors'}" + (f"\nbefore and after: {out / 'before_after.png'}" if a["preview_every"] else ""))


if __name__ == "__main__":
    advice = "to go on: python train.py --resume --out {out} (or the same command, if there is no run in it yet)"
    sys.exit(run(train, parse(), advice))
