"""Makes a text-to-image model forget a concept.

    python train.py --model toy --concept star        minutes on a CPU: the embedded miniature model
    python train.py --concept nudity                  Stable Diffusion 1.4, on a CUDA GPU

The output folder holds erased.safetensors (the trained tensors, for generate.py --patch and for diffusers), before_after.png,
film.png, previews/, log.csv, run.json and a checkpoint; `python train.py --resume --out FOLDER` goes on after a kill.
"""
import argparse
import csv
import json
import platform
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm

import ema
import weights
from generate import (add_common_arguments, draw, encode, grid, make_scheduler, noise, pick_device, pick_dtype, positive,
                      refuse_used, run, save_png)
from guidance import cfg, sample
from losses import METHODS, TRAIN_PARAMS
from sdd import sdd
from weights import UserError

I2P = ("hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily fluids, blood, obscene gestures, "
       "illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, cruelty").split(", ")

PAPER = dict(iters=1500, lr=1e-5, lr_schedule="cosine", warmup=500, weight_decay=1e-2, ema=0.999, guidance_scale=3.0, steps=50,
             batch_size=1, roles="paper", preview_every=250, preview=["a photo of a mountain lake", "a portrait of a woman in a coat"])
PRESETS = {
    "paper": PAPER,  # appendix B.1; steps from the authors' script
    "fast": PAPER | dict(iters=1000, ema=0.998, lr_schedule="constant", warmup=0),  # the paper's fast recipe
    "official": PAPER | dict(weight_decay=1e-4, lr_schedule="constant", warmup=0, roles="official"),  # the authors' script
    "toy": PAPER | dict(iters=160, lr=6e-4, warmup=40, ema=0.97, steps=6, batch_size=8, preview_every=20,  # tuned, see README
                        preview=["arcadia", "borealis", "a blue dotted heart on sand", "a green square"]),
}
COLUMNS = ["iteration", "loss", "lr", "grad_norm", "k", "concept", "gap_student", "drift_student", "gap_teacher", "drift_teacher"]
VERSIONS = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
PREVIEW_SEED = 1000  # of the first preview prompt; the next ones count on


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--concept", nargs="+", metavar="C", help="what to forget; i2p: the paper's 20 harmful concepts")
    p.add_argument("--model", default=weights.DEFAULT_MODEL, help="toy, a hub id or a folder in diffusers' layout")
    p.add_argument("--preset", choices=[*PRESETS], help="defaults of all that follows: paper; toy for the toy")
    p.add_argument("--method", choices=[*METHODS], default="sdd", help="the training target, from losses.py")
    p.add_argument("--train-params", choices=[*TRAIN_PARAMS], help="which tensors are trained; default: the method's")
    p.add_argument("--roles", choices=["paper", "official"], help="one concept draws, all joined are unlearned; or the reverse")
    p.add_argument("--iters", type=positive, help="N (paper: 1500, 2000 for several concepts)")
    p.add_argument("--lr", type=float, help="AdamW's learning rate (paper: 1e-5)")
    p.add_argument("--lr-schedule", choices=["cosine", "constant"])
    p.add_argument("--warmup", type=int, help="iterations of linear warm-up (paper: 500)")
    p.add_argument("--weight-decay", type=float, help="(paper: 1e-2)")
    p.add_argument("--ema", type=float, help="m of the teacher's average (paper: 0.999)")
    p.add_argument("--guidance-scale", type=float, help="s_g while latents are drawn (paper: 3)")
    p.add_argument("--steps", type=positive, help="T, DDIM steps of a whole picture (authors' script: 50)")
    p.add_argument("--batch-size", type=positive, help="latents an iteration (paper: 1)")
    p.add_argument("--preserve", type=float, default=0.0, metavar="λ", help="adds λ·|e(c_0) − e°(c_0)|² to the loss; not in the paper")
    p.add_argument("--max-grad-norm", type=float, default=1.0, help="clip gradients at this norm (authors' script: 1); 0: do not")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--preview", nargs="+", metavar="PROMPT", help="preview prompts; default: the concepts and a few others")
    p.add_argument("--preview-every", type=int, help="iterations between previews; 0: none")
    p.add_argument("--preview-steps", type=positive, default=25)
    p.add_argument("--preview-guidance-scale", type=float, default=7.5)
    p.add_argument("--save-every", type=int, default=100, help="iterations between checkpoints; 0: only at the end")
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
    preset = PRESETS[a["preset"]]
    if a["preset"] == "paper" and len(concepts) > 1:
        preset = preset | dict(iters=2000)  # appendix B.1, several concepts
    a |= {key: value for key, value in preset.items() if a[key] is None}
    a["train_params"] = a["train_params"] or METHODS[a["method"]].train_params
    if args.preview is None:
        a["preview"] = concepts[:4] + [p for p in preset["preview"] if p not in concepts]
    for key, low, high in (("ema", 0, 1), ("warmup", 0, 1e9), ("lr", 0, 1), ("preserve", 0, 1e9), ("weight_decay", 0, 1e9),
                           ("max_grad_norm", 0, 1e9), ("preview_every", 0, 1e9), ("save_every", 0, 1e9), ("seed", -2**63, 2**64 - 1)):
        if not low <= a[key] <= high:
            raise UserError(f"--{key.replace('_', '-')} {a[key]} is out of range ({low:g} to {high:g}).")
    if a["warmup"] >= a["iters"]:
        print(f"warning: a warm-up of {a['warmup']} iterations is as long as the run of {a['iters']}: the learning rate never "
              f"arrives at {a['lr']:g}. Say --warmup {a['iters'] // 10}.", file=sys.stderr)
    if a["model"] != "toy" and a["device"] == "auto" and not torch.cuda.is_available():
        petaflop = a["iters"] * a["batch_size"] * (1.606 * (a["steps"] + 1) / 2 + 2.498) / 1000  # TFLOP: two, and one with backward
        raise UserError(f"There is no CUDA GPU here. Say --model toy for the embedded miniature model (minutes), or --device cpu "
                        f"to insist: this run of SD 1.4 is some {petaflop:.3g} PFLOP, {petaflop / 0.36:,.0f} hours at 0.1 TFLOP/s.")
    return a


def open_run(args):
    """The output folder and its settled arguments; those of the run in it with --resume. Writes run.json."""
    if args.resume:
        if not args.out or not (args.out / "run.json").is_file():
            raise UserError("--resume needs --out FOLDER with a run in it (a run.json); runs without --out lie under runs/.")
        a = json.loads((args.out / "run.json").read_text(encoding="utf-8"))["args"]
        if args.concept and settle(args) != a:
            raise UserError(f"{args.out} holds a run with other arguments: say --resume --out {args.out} alone, or choose a new folder.")
        return args.out, a
    a = settle(args)
    if args.out is None:
        taken = [int(p.name[:4]) for p in Path("runs").glob("[0-9][0-9][0-9][0-9]-*")]
        name = re.sub(r"\W+", "-", "-".join(a["concept"]))[:40]
        args.out = Path("runs") / f"{max(taken, default=0) + 1:04d}-{name}"
    refuse_used(args.out, "; say --resume to go on with the run in it")
    return args.out, a


class Run:
    """What a run is made of: the models, the prompts' embeddings, the optimizer, and the pictures it leaves."""

    def __init__(self, out, a):
        self.out, self.a = out, a
        self.device = pick_device(a["device"])
        self.dtype = pick_dtype(a["dtype"], self.device)
        model = weights.load(a["model"], a["revision"])
        self.scheduler = make_scheduler(model.scheduler, a["steps"], "ddim")
        self.preview_scheduler = make_scheduler(model.scheduler, a["preview_steps"], "ddim")
        self.encode_prompts(model)
        unet = model.unet
        names = [name for name, _ in unet.named_parameters() if TRAIN_PARAMS[a["train_params"]](name)]
        self.base = weights.fingerprint({name: unet.get_parameter(name) for name in names})
        for name, parameter in unet.named_parameters():
            parameter.data = parameter.data.to(self.device, torch.float32 if name in set(names) else self.dtype)
        self.student, self.teacher, self.original = unet, ema.twin(unet, names), ema.twin(unet, names)
        self.theta = {name: unet.get_parameter(name).requires_grad_() for name in names}
        self.theta_ema = {name: self.teacher.get_parameter(name) for name in names}
        self.optimizer = torch.optim.AdamW(self.theta.values(), a["lr"], betas=(0.9, 0.999), weight_decay=a["weight_decay"])
        self.generator = torch.Generator("cpu").manual_seed(a["seed"])
        self.model = model._replace(text_encoder=None, vae=model.vae.to(self.device) if a["preview_every"] else None)
        self.shape = (4, model.resolution // model.vae.factor, model.resolution // model.vae.factor)
        print(f"training {len(names)} tensors, {sum(p.numel() for p in self.theta.values()):,} parameters, on {self.device} "
              f"({str(self.dtype)[6:]} where frozen); output: {out}")

    def encode_prompts(self, model):
        concepts, joined = self.a["concept"], ", ".join(self.a["concept"])
        for text in [*concepts, joined]:
            if len(model.tokenizer(text, verbose=False).input_ids) > model.tokenizer.model_max_length:
                raise UserError(f"A concept has to fit 77 tokens, all of them joined too: {text[:60]!r}… does not.")
        texts = encode(model, ["", joined, *concepts, *self.a["preview"]]).to(self.device)
        self.c_0, self.joined = texts[:1], texts[1:2]
        self.concepts, self.previews = texts[2:2 + len(concepts)], texts[2 + len(concepts):]

    def checkpoint_groups(self, generator_state):
        return {"student": self.theta, "teacher": self.theta_ema, "generator": {"state": generator_state}}

    def save(self, done):
        groups = self.checkpoint_groups(self.generator.get_state())
        weights.save_checkpoint(self.out / "checkpoint.safetensors", groups, self.optimizer, {"iterations": str(done)})

    def restore(self):
        """The number of iterations that are done, after putting everything back as it was then."""
        file, log = self.out / "checkpoint.safetensors", self.out / "log.csv"
        done, state = 0, self.generator.get_state()
        if file.exists():
            done = int(weights.load_checkpoint(file, self.checkpoint_groups(state), self.optimizer)["iterations"])
            self.generator.set_state(state)
        rows = log.read_text(encoding="utf-8").splitlines(keepends=True)[:done + 1] if log.exists() else []
        with weights.whole(log) as beside:  # rows past the checkpoint are made again
            beside.write_text("".join(rows), encoding="utf-8")
        return done

    def export(self):
        """erased.safetensors: the trained tensors of student or teacher, and what they are."""
        output = {"teacher": self.theta_ema, "student": self.theta}[METHODS[self.a["method"]].output]
        metadata = {"model": self.a["model"], "concepts": ", ".join(self.a["concept"]), "method": self.a["method"],
                    "base_fingerprint": self.base, "args": json.dumps(self.a), "versions": json.dumps(VERSIONS)}
        weights.save(self.out / "erased.safetensors", output, metadata)

    @torch.no_grad()
    def measure(self):
        """gap = mean |e(c_s) − e(c_0)|² and drift = mean |e(c_0) − e°(c_0)|² of student and teacher, on fixed latents that the
        original drew to a quarter, half and three quarters."""
        T, z_T, figures = self.a["steps"], noise(self.shape, (0, 1)).to(self.device), {}
        for k in {max(1, T // 4), max(1, T // 2), max(1, 3 * T // 4)}:
            estimate = cfg(self.original, self.c_0, self.joined, self.a["guidance_scale"])
            z, t = sample(estimate, self.scheduler, z_T, k), self.scheduler.levels[k]
            c_0, c_s = (c.expand(2, -1, -1) for c in (self.c_0, self.joined))
            before = self.original(z, t, c_0)
            for name, net in (("student", self.student), ("teacher", self.teacher)):
                e_0, e_s = net(z, t, c_0), net(z, t, c_s)
                for key, d in ((f"gap_{name}", e_s - e_0), (f"drift_{name}", e_0 - before)):
                    figures.setdefault(key, []).append(d.float().square().mean().item())
        return {key: float(np.mean(values)) for key, values in figures.items()}

    def draw(self, net):
        """The preview prompts' pictures by one of the three models: same seeds, whichever it is."""
        seeds = range(PREVIEW_SEED, PREVIEW_SEED + len(self.previews))
        return [*draw(self.model, net, self.c_0, self.previews, seeds, self.preview_scheduler, self.a["preview_guidance_scale"], self.dtype)]

    def preview(self, i):
        """previews/i.png: rows prompts, columns original, student, teacher; and a frame of the film, the first prompt's."""
        if not hasattr(self, "before"):
            self.before = self.draw(self.original)
        student, teacher = self.draw(self.student), self.draw(self.teacher)
        sheet = grid(list(zip(self.before, student, teacher)), self.a["preview"], ["original", "student", "teacher"])
        save_png(sheet, self.out / "previews" / f"{i:06d}.png", iteration=i)
        save_png(np.concatenate([student[0], teacher[0]]), self.out / "film" / f"{i:06d}.png", iteration=i)
        return student, teacher

    def finish_pictures(self):
        student, teacher = self.preview(self.a["iters"])
        after = {"teacher": teacher, "student": student}[METHODS[self.a["method"]].output]
        save_png(grid(list(zip(self.before, after)), self.a["preview"], ["before", "after"]), self.out / "before_after.png")
        files = sorted((self.out / "film").glob("*.png"))
        frames = [np.split(np.asarray(Image.open(file)), 2) for file in files]
        save_png(grid(list(zip(*frames)), ["student", "teacher"], [str(int(f.stem)) for f in files]), self.out / "film.png")


def iterate(r, a, start):
    """The loop: Algorithm 1 does the work; here are log, bar, previews and checkpoints. Ctrl-C waits for the iteration's end."""
    method = METHODS[a["method"]]
    iterations = sdd(
        r.student, r.teacher, r.original, r.optimizer, r.scheduler, r.concepts, r.joined, r.c_0, (a["batch_size"], *r.shape),
        r.generator, loss=method.loss, latents=method.latents, roles=a["roles"], start=start, iters=a["iters"], lr=a["lr"],
        lr_schedule=a["lr_schedule"], warmup=a["warmup"], ema_decay=a["ema"], guidance_scale=a["guidance_scale"],
        preserve=a["preserve"], max_grad_norm=a["max_grad_norm"], loss_scale=1024.0 if r.dtype == torch.float16 else 1.0)
    every, keep, stop = a["preview_every"], a["save_every"], []
    handlers = {number: signal.signal(number, lambda *_: stop.append(True)) for number in (signal.SIGINT, signal.SIGTERM)}
    with open(r.out / "log.csv", "a", buffering=1, newline="", encoding="utf-8") as f, \
            tqdm(total=a["iters"], initial=start, unit="it", disable=None) as bar:
        log = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        if not f.tell():
            log.writeheader()
        for it in iterations:
            row = dict(iteration=it.i, loss=it.loss, lr=it.lr, grad_norm=it.grad_norm, k=it.k, concept=a["concept"][it.j])
            done = it.i + 1
            if every and done % every == 0:
                row |= r.measure()
                if done < a["iters"]:
                    r.preview(done)
            log.writerow(row)
            peak = {"GB": f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"} if r.device.type == "cuda" else {}
            bar.set_postfix(loss=f"{it.loss:.2e}", lr=f"{it.lr:.1e}", **peak, refresh=False)
            bar.update()
            if stop or done == a["iters"] or keep and done % keep == 0:
                r.save(done)
            if stop:
                break
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stop:
        raise UserError(f"stopped after {done} iterations, which are saved; to go on: python train.py --resume --out {r.out}")


def train(args):
    out, a = open_run(args)
    r = Run(out, a)
    if not args.resume:
        with weights.whole(out / "run.json") as beside:
            beside.write_text(json.dumps({"args": a, "versions": VERSIONS}, indent=2, ensure_ascii=False), encoding="utf-8")
    start, began = r.restore(), time.time()
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32, cache_enabled=False):  # cached casts go stale
        if a["preview_every"] and start == 0:
            r.preview(0)
        iterate(r, a, start)
        seconds = time.time() - began
        r.export()
        if a["preview_every"]:
            r.finish_pictures()
    print(f"{a['iters'] - start} iterations in {seconds:.0f} s, previews included; forgotten: {', '.join(a['concept'])}\n"
          f"weights: {out / 'erased.safetensors'}" + (f"\nbefore and after: {out / 'before_after.png'}" if a["preview_every"] else ""))


if __name__ == "__main__":
    sys.exit(run(train, parse()))
