"""How fast, and in how much memory: ours beside the authors' loop on diffusers' classes, in one process.

    python bench.py                          SD 1.4's sizes on a CUDA GPU; on a CPU the embedded model
    python bench.py --size sd14 --parts memory      on a CPU, in a minute: the bytes that SD 1.4's iteration needs
    python bench.py --size sd14 --parts step --rounds 1 --k 2       on a CPU, in many minutes: the time
    python bench.py --rows BENCHMARKS.md     adds what it prints to that file

Weights are random at SD 1.4's sizes, as speed does not depend on values. The loops take turns, iteration by iteration, with the same k.
Memory is the allocator's on a GPU; on a CPU it is counted: the bytes of all tensors that live at the peak, whatever the device would
add (workspaces, rounding of the allocator). Needs diffusers (requirements-test.txt).
"""

import support.openmp  # noqa: F401 (before torch)

import argparse
import datetime
import gc
import platform
import random
import statistics
import sys
import tempfile
import time
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import presets
import sdd
import train
import weights
from clip_text import CLIPText
from pipeline import InferenceUNet, encode_prompts, generate_images, make_scheduler
from support.cli import one_of, pick_device, positive, run_command
from support.errors import UserError
from support.files import atomic_write
from tools.baseline import PROMPT, Authors, their_parts
from train import Run
from unet import UNet
from vae import VAE

SIZES = {"toy": (8, 6), "sd14": (1, 50)}  # latents a batch, T
THEIRS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
}  # the authors' default, and what a user would try next


def our_model(size, device):
    if size == "toy":
        return weights.load("toy")
    with torch.device(device):
        parts = dict(unet=UNet(), vae=VAE(), text_encoder=CLIPText())
    return weights.Model(
        "random",
        **{name: part.eval().requires_grad_(False) for name, part in parts.items()},
        resolution=512,
        tokenizer=weights.load_tokenizer(weights.TOY),
        scheduler=weights.read_config(weights.TOY, "scheduler"),
    )


class Ours:
    """train.py's own run, with its previews left out; `words`: more of its arguments."""

    def __init__(self, size, device, batch_size, steps, *words):
        a = presets.settle(
            train.parse(
                [
                    "--concept",
                    PROMPT,
                    "--model",
                    "toy" if size == "toy" else "random",
                    "--device",
                    str(device),
                    "--preview-every",
                    "0",
                    "--preview",
                    PROMPT,
                    "--batch-size",
                    str(batch_size),
                    "--steps",
                    str(steps),
                    "--iters",
                    "1000000",
                    *words,
                ]
            )
        )
        self.run = Run(Path(tempfile.gettempdir()), a, our_model(size, device))
        self.run.make_latents()
        self.iterations = self.run.iterations()
        self.parts = [
            self.run.student.unet,
            self.run.teacher.unet,
            self.run.original.unet,
            self.run.optimizer,
        ]

    def iteration(self, k):
        drawn, sdd.draw = (
            sdd.draw,
            lambda roles, scheduler, K, i, generator: (k, scheduler.timesteps[k], 0),
        )
        try:
            with torch.autocast(
                self.run.device.type,
                self.run.dtype,
                enabled=self.run.dtype != torch.float32,
                cache_enabled=False,
            ):
                return next(self.iterations).loss
        finally:
            sdd.draw = drawn


def contenders(size, device, only=None):
    """{name: a function that makes it}, those of `only` if it is given; the last is what train.py does here by default."""
    batch_size, steps = SIZES[size]
    rows = {
        f"the authors' loop, {name}": lambda dtype=dtype: Authors(
            size, device, batch_size, steps, dtype
        )
        for name, dtype in THEIRS.items()
    }
    for name, words in {
        "ours, fp32": ["--dtype", "fp32"],
        "ours, bf16, checkpointing": ["--dtype", "bf16", "--gradient-checkpointing"],
        "ours, bf16": ["--dtype", "bf16"],
        "ours, with --preserve": ["--preserve", "0.3"],
        "ours as shipped": [],
    }.items():
        rows[name] = lambda words=words: Ours(size, device, batch_size, steps, *words)
    return {name: make for name, make in rows.items() if not only or name in only}


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def paired(made, ks, device):
    """{name: seconds of each iteration}; all take turns, the order reversed each time."""
    spent = {name: [] for name in made}
    for i, k in enumerate(ks):
        for name in list(made)[:: 1 - 2 * (i % 2)]:
            began = clock(device)
            made[name].iteration(k)
            spent[name].append(clock(device) - began)
    return spent


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive: what `include` is given, and whatever an operation makes. Fake tensors have no
    values: wherever the loop asks for one, to log it or to see that it is finite, it gets 1."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def include(self, parts):
        """The tensors of modules and optimizers; the peak is counted from now on."""
        for part in parts:
            states = part.state.values() if isinstance(part, torch.optim.Optimizer) else []
            for x in [
                *(part.parameters() if isinstance(part, nn.Module) else ()),
                *(x for state in states for x in state.values()),
            ]:
                self.add(x)
                self.add(x.grad)
        self.peak = self.now

    def add(self, x):
        if not isinstance(x, torch.Tensor) or (storage := x.untyped_storage())._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())

    def gone(self, key, n):
        self.known.discard(key)
        self.now -= n

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(
            args[0], FakeTensor
        ):
            return 1.0
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            self.add(x)
        return out


@contextmanager
def pretended():
    """SD 1.4 without computing anything: fake tensors have no values, are where they were made, and fit whatever their size. Norms are in
    float32, as a GPU's autocast has them; the CPU's has not."""

    def wide(x):
        return x.float() if torch.is_autocast_enabled("cpu") else x

    with (
        patch.object(weights, "fingerprint", lambda tensors: ""),
        patch.object(nn.Module, "to", lambda module, *_, **__: module),
        patch.object(
            nn.GroupNorm,
            "forward",
            lambda m, x: F.group_norm(wide(x), m.num_groups, wide(m.weight), wide(m.bias), m.eps),
        ),
        patch.object(
            nn.LayerNorm,
            "forward",
            lambda m, x: F.layer_norm(
                wide(x), m.normalized_shape, wide(m.weight), wide(m.bias), m.eps
            ),
        ),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def counted_peak(make, size):
    """Bytes at the peak of a second iteration."""
    with pretended() if size == "sd14" else nullcontext(), Live() as live:
        contender = make()
        contender.iteration(1)
        live.include(contender.parts)
        contender.iteration(1)
        return live.peak


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product: the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, best = torch.randn(n, n, device=device, dtype=dtype), 0.0
    for _ in range(10):
        began = clock(device)
        a @ a
        best = max(best, 2 * n**3 / (clock(device) - began))
    return best


def spread(values):
    q = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{statistics.median(values):.3g} s ({q[0]:.3g}–{q[2]:.3g})"


def training(args, device, rows):
    """One iteration of each loop at a fixed k and over real draws of k; FLOPs, and the fraction of the machine's matmul rate."""
    batch_size, steps = SIZES[args.size]
    made = {name: make() for name, make in contenders(args.size, device, args.only).items()}
    k, generator = args.k or steps // 2, random.Random(0)
    drawn = [generator.randint(1, steps) for _ in range(args.rounds)]
    for what, ks in [(f"k = {k}", [k] * args.rounds), (f"k drawn from 1..{steps}", drawn)][
        : 1 if args.k else 2
    ]:
        for contender in made.values() if what.startswith("k =") else ():
            contender.iteration(1)  # warm-up
        spent = paired(made, ks, device)
        first = next(iter(spent))
        for name, seconds in spent.items():
            with FlopCounterMode(display=False) as flops:
                made[name].iteration(k)
            dtype = made[name].dtype if isinstance(made[name], Authors) else made[name].run.dtype
            share = (
                flops.get_total_flops() / statistics.median(seconds) / matmul_rate(device, dtype)
            )
            ratio = statistics.median(a / b for a, b in zip(spent[first], seconds))
            rate = (
                f", {flops.get_total_flops() / 1e12:.3g} TFLOP at {share:.0%} of {str(dtype)[6:]} matmuls"
                if len(set(ks)) == 1
                else ""
            )
            rows.append(
                (
                    f"{args.size}, an iteration of {batch_size}, {what}: {name}",
                    f"{spread(seconds)}, {ratio:.2f} × {first.split(',')[0]}{rate}",
                )
            )


def memory(args, device, rows):
    """The peak of an iteration, of each loop alone, after one that makes gradients and moments."""
    for name, make in contenders(args.size, device, args.only).items():
        if device.type == "cuda":
            gc.collect()  # the loops that were timed hold themselves in circles
            contender = make()
            contender.iteration(1)
            torch.cuda.reset_peak_memory_stats()
            contender.iteration(1)
            peak = torch.cuda.max_memory_allocated()
            del contender
            gc.collect()
            torch.cuda.empty_cache()
        else:
            peak = counted_peak(make, args.size)
        rows.append(
            (
                f"{args.size}, an iteration of {SIZES[args.size][0]}: {name}, peak memory",
                f"{peak / 2**30:.2f} GiB{' (counted)' * (device.type == 'cpu')}",
            )
        )


def generation(args, device, rows):
    """Pictures a second, DDIM; ours and diffusers' pipeline take turns."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    model, (unet, vae, text, tokenizer) = (
        our_model(args.size, device),
        their_parts(args.size, device),
    )
    for part in (model.vae, model.text_encoder):
        part.to(device)
    dtype, steps = (
        (torch.float16, 50)
        if device.type == "cuda"
        else (torch.float32, 12 if args.size == "toy" else 1)
    )
    scheduler = make_scheduler(model.scheduler, steps, "ddim")
    theirs = StableDiffusionPipeline(
        vae.to(dtype),
        text.to(dtype),
        tokenizer,
        unet.to(dtype),
        DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    c_0, c_p = encode_prompts(model, ["", PROMPT]).split(1)
    painter = InferenceUNet(model.unet, device, dtype)

    def ours_draw(n):
        return [
            *generate_images(
                model,
                painter,
                c_0,
                c_p.expand(n, -1, -1),
                range(n),
                scheduler,
                7.5,
                dtype,
                batch_size=n,
            )
        ]

    def theirs_draw(n):
        return theirs(
            prompt_embeds=c_p.expand(n, -1, -1).to(dtype),
            negative_prompt_embeds=c_0.expand(n, -1, -1).to(dtype),
            num_inference_steps=steps,
            guidance_scale=7.5,
            height=model.resolution,
            width=model.resolution,
        )

    for n in (1, 8):
        spent = {ours_draw: [], theirs_draw: []}
        for i in range(args.rounds + 1):
            for who in spent:
                began = clock(device)
                who(n)
                spent[who].append(clock(device) - began)
        ours, theirs_spent = (statistics.median(values[1:]) for values in spent.values())
        rows.append(
            (
                f"{args.size}, DDIM {steps}, batches of {n}, {str(dtype)[6:]}",
                f"{n / ours:.3g} pictures/s; diffusers' pipeline {n / theirs_spent:.3g}",
            )
        )


PARTS = {"step": training, "memory": memory, "generation": generation}


def bench(args):
    try:
        import diffusers
    except ModuleNotFoundError:
        raise UserError(
            "bench.py measures diffusers too: pip install -r requirements-test.txt."
        ) from None
    device, rows = pick_device(args.device), []
    args.size = args.size or ("sd14" if device.type == "cuda" else "toy")
    cpu = f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
    machine = f"{torch.cuda.get_device_name() if device.type == 'cuda' else cpu}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    said = " ".join(["python", "bench.py", *(word for word in sys.argv[1:])])
    for part in args.parts:
        before = len(rows)
        with torch.enable_grad():
            PARTS[part](args, device, rows)
        for what, figure in rows[before:]:
            print(f"{what}: {figure}", flush=True)
    if args.rows:
        lines = [
            f"| {datetime.date.today()} | {machine} | {what} | `{said}` | {figure} |\n"
            for what, figure in rows
        ]
        text = args.rows.read_text(encoding="utf-8") if args.rows.exists() else ""
        with atomic_write(args.rows) as beside:
            beside.write_text(text.rstrip("\n") + "\n" + "".join(lines), encoding="utf-8")


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", choices=["toy", "sd14"], help="default: sd14 on a GPU, toy on a CPU"
    )
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument(
        "--only",
        nargs="+",
        **one_of([*contenders("toy", None)]),
        help="contenders, as printed; the first is what the others are compared to",
    )
    parser.add_argument(
        "--rounds", type=positive, default=11, help="timed iterations of each contender"
    )
    parser.add_argument(
        "--k",
        type=positive,
        help="denoising steps, always so many; default: half of T (25 for SD 1.4), then a real draw",
    )
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="append the figures to a Markdown table"
    )
    parser.add_argument("--device", default="auto")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(bench, parse()))
