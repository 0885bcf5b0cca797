"""Measures time and memory: our training loop next to the authors' loop on diffusers' classes.

    python -m tools.bench                              SD 1.4 on a CUDA GPU; toy on a CPU
    python -m tools.bench --size sd14 --parts step --rounds 1 --k 2    on a CPU, many minutes
    python -m tools.bench --only "ours as shipped" "ours, --compile"   these loops, on a GPU

Weights are random at SD 1.4's sizes, because speed does not depend on values. The loops take turns,
iteration by iteration, with the same k. All of them stay in memory while they are timed, at SD
1.4's sizes tens of GiB: on a small GPU choose one or two with --only. The memory of a loop is what
the CUDA allocator holds at the peak, so it is measured only on a CUDA GPU.
Needs diffusers (requirements-test.txt).
"""

import support.openmp

import gc
import platform
import random
import statistics
import sys
import time
from argparse import Namespace
from unittest.mock import patch

import numpy as np
import torch

import losses
import presets
import sdd
import train
import weights
from clip_text import CLIPText
from pipeline import images, latent_shape, make_scheduler
from support.cli import Parser, autocast, one_of, pick_device, pick_dtype, positive, run_command
from support.errors import UserError
from support.fast import InferenceUNet, graphed
from tools.baseline import PROMPT, Authors, their_pipeline
from unet import UNet
from vae import VAE

SIZES = {"toy": (8, 6), "sd14": (1, 50)}  # latents per batch, T
LOOPS = {  # name: dtype of the authors' autocast (the script's own is fp32), or flags of train.py
    "the authors' loop, fp32": torch.float32,
    "the authors' loop, bf16": torch.bfloat16,
    "ours, fp32": "--dtype fp32",
    "ours, bf16, checkpointing": "--dtype bf16 --gradient-checkpointing",
    "ours, bf16": "--dtype bf16",
    "ours, with --preserve": "--preserve 0.3",
    "ours, --compile": "--compile",
    "ours as shipped": "",
}
ON_A_GPU = ("ours, --compile", "memory")


# ------------------------------------------------------------------------------------ contenders
def our_model(size, device):
    """The toy model, or random weights with SD 1.4's sizes and the toy model's tokenizer."""
    model = weights.load("toy")
    if size == "sd14":
        with torch.device(device):
            model = model._replace(unet=UNet(), text_encoder=CLIPText(), resolution=512)
        model = model._replace(vae=VAE())  # train.py moves it only for previews
        for part in (model.unet, model.text_encoder, model.vae):
            part.eval().requires_grad_(False)
    return model


class Ours:
    """train.py's loop, without previews. flags: more arguments of train.py, in one text."""

    def __init__(self, size, device, batch_size, steps, flags):
        model = "toy" if size == "toy" else "random/sd14"
        words = (
            f"--concept {PROMPT} --model {model} --device {device} --batch-size {batch_size} "
            f"--steps {steps} --iters 1000000 --preview {PROMPT} --preview-every 0 {flags}"
        )
        a = Namespace(**presets.settle(train.parse(words.split())))
        self.device, self.dtype = device, pick_dtype(a.dtype, device, training=True)
        model = our_model(size, device)
        models, theta, theta_ema = train.three_models(model, a, device, self.dtype)
        student, teacher, original = models
        c = train.encode_all(student, a)
        self.generator, terms = torch.Generator().manual_seed(a.seed), []
        if a.preserve:
            terms.append(losses.preservation_term(a.preserve, c.kept, self.generator))
        self.teacher = InferenceUNet(teacher.unet, device, self.dtype, a.compile)
        self.iterations = sdd.sdd(
            student.unet,
            self.teacher,
            original.unet,
            train.make_optimizer(theta, a),
            list(theta_ema.values()),
            make_scheduler(model.scheduler, a.steps, "ddim"),
            sdd.Prompts(c.c_0, c.concepts, c.joined),
            (batch_size, *latent_shape(model)),
            self.generator,
            rates=sdd.learning_rates(a.iters, a.lr, a.warmup, a.lr_schedule),
            loss=graphed(losses.sdd_loss, theta, a, device, self.dtype),
            terms=terms,
        )

    def iteration(self, k):
        """One iteration of Algorithm 1 with k denoising steps; returns the loss."""

        def fixed_timestep(roles, scheduler, K, i, generator):
            return k, scheduler.timesteps[k], 0

        with patch.object(sdd, "random_timestep", fixed_timestep):
            with autocast(self.device, self.dtype):
                loss = next(self.iterations).loss
                self.teacher.sync()
        return loss


def make_contender(name, size, device):
    kind = Authors if isinstance(LOOPS[name], torch.dtype) else Ours
    return kind(size, device, *SIZES[size], LOOPS[name])


# ---------------------------------------------------------------------------------- measurements
def clock(device):
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def paired_times(calls, numbers, device):
    """{name: seconds of each call(number)}. All take turns; the order is reversed each time."""
    seconds = {name: [] for name in calls}
    for i, number in enumerate(numbers):
        for name in reversed(calls) if i % 2 else calls:
            began = clock(device)
            calls[name](number)
            seconds[name].append(clock(device) - began)
    return seconds


def compared(name, seconds):
    """A contender's median and quartiles, and how many times faster it is than the first one."""
    first = next(iter(seconds))
    ratio = statistics.median(a / b for a, b in zip(seconds[first], seconds[name]))
    low, median, high = np.percentile(seconds[name], (25, 50, 75))
    return f"{median:.3g} s ({low:.3g}–{high:.3g}), {ratio:.2f} × {first.split(',')[0]}"


def measure_steps(args, device):
    """Yields (what, figure): one iteration of each loop, at a fixed k and with random k."""
    batch_size, steps = SIZES[args.size]
    calls = {name: make_contender(name, args.size, device).iteration for name in args.only}
    for iteration in calls.values():
        iteration(1)  # warm-up
    k, generator = args.k or steps // 2, random.Random(0)
    plans = {f"k = {k}": [k] * args.rounds}
    if not args.k:
        ks = [generator.randint(1, steps) for _ in range(args.rounds)]
        plans[f"random k in 1..{steps}"] = ks
    for plan, ks in plans.items():
        seconds = paired_times(calls, ks, device)
        for name in calls:
            what = f"{args.size}, an iteration of {batch_size}, {plan}: {name}"
            yield what, compared(name, seconds)


def measure_memory(args, device):
    """Yields (what, figure): what torch's allocator holds at the peak of each loop alone.

    The memory of CUDA graphs is a part of it.
    """
    for name in args.only:
        contender = None
        gc.collect()  # contenders are in reference cycles
        torch.cuda.empty_cache()
        contender = make_contender(name, args.size, device)
        contender.iteration(1)  # makes gradients and the optimizer's state
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        contender.iteration(1)
        peak = torch.cuda.max_memory_reserved() / 2**30
        what = f"{args.size}, an iteration of {SIZES[args.size][0]}: {name}, peak memory"
        yield what, f"{peak:.2f} GiB"


def measure_generation(args, device):
    """Yields (what, figure): images per second with DDIM; ours and diffusers' take turns."""
    dtype, steps = torch.float32, 12 if args.size == "toy" else 1
    if device.type == "cuda":
        dtype, steps = torch.float16, 50
    model = our_model(args.size, device)
    for part in (model.vae, model.text_encoder):
        part.to(device)
    unet = InferenceUNet(model.unet, device, dtype)
    pipeline = their_pipeline(args.size, device).to(dtype)

    def ours(n):
        how = dict(unet=unet, scheduler="ddim", steps=steps, dtype=dtype, batch_size=n)
        list(images(model, [PROMPT] * n, **how))

    def theirs(n):
        side = model.resolution
        pipeline([PROMPT] * n, num_inference_steps=steps, height=side, width=side)

    for n in (1, 8):
        seconds = paired_times({"ours": ours, "theirs": theirs}, [n] * (args.rounds + 1), device)
        rates = [n / statistics.median(spent[1:]) for spent in seconds.values()]  # [0]: warm-up
        what = f"{args.size}, DDIM {steps}, batches of {n}, {str(dtype).removeprefix('torch.')}"
        yield what, f"{rates[0]:.3g} images/s; diffusers' pipeline {rates[1]:.3g}"


PARTS = {"step": measure_steps, "memory": measure_memory, "generation": measure_generation}


# ----------------------------------------------------------------------------------- the command
def bench(args):
    try:
        import diffusers
    except ModuleNotFoundError:
        raise UserError(
            "tools.bench also measures diffusers: python -m pip install -r requirements-test.txt"
        ) from None
    device = pick_device(args.device)
    on_a_gpu = device.type == "cuda"
    args.size = args.size or ("sd14" if on_a_gpu else "toy")
    for flag, names in (("only", LOOPS), ("parts", PARTS)):
        if getattr(args, flag) is None:
            setattr(args, flag, [name for name in names if on_a_gpu or name not in ON_A_GPU])
        for name in getattr(args, flag):
            if name in ON_A_GPU and not on_a_gpu:
                raise UserError(f"{name!r} needs a CUDA GPU: leave it out of --{flag}.")
    steps = SIZES[args.size][1]
    if args.k and args.k > steps:
        raise UserError(f"--k {args.k} is more than the {steps} steps of {args.size}.")
    machine = f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
    if on_a_gpu:
        machine = torch.cuda.get_device_name()
    print(f"{machine}, torch {torch.__version__}, diffusers {diffusers.__version__}")
    for part in args.parts:
        with torch.enable_grad():
            for what, figure in PARTS[part](args, device):
                print(f"{what}: {figure}", flush=True)


def parse(argv=None):
    parser = Parser(prog="python -m tools.bench", description=__doc__)
    # fmt: off
    add = parser.add_argument_group("what to measure").add_argument
    add("--size", **one_of(SIZES), help="model (default: sd14 on a GPU, toy on a CPU)")
    add("--parts", nargs="+", **one_of(PARTS),
        help="measurements (default: all that the device can do)")
    add("--only", nargs="+", type=one_of(LOOPS)["type"], metavar="NAME",
        help="loops; the others are compared with the first one. Names: "
        + ", ".join(f'"{name}"' for name in LOOPS) + " (default: all that the device can run)")
    add("--rounds", type=positive, default=11, metavar="N",
        help="timed iterations of each loop (default: %(default)s)")
    add("--k", type=positive, metavar="K",
        help="always this number of denoising steps (default: half of T, then random numbers)")
    add("--device", default="auto", metavar="DEVICE",
        help="cuda, cuda:1, mps, cpu or auto (default: %(default)s)")
    # fmt: on
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(bench, parse()))
