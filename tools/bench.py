"""Measures time and memory: our training loop next to the authors' loop on diffusers' classes.

    python -m tools.bench                              SD 1.4 on a CUDA GPU; toy on a CPU
    python -m tools.bench --size sd14 --parts memory   on a CPU, about a minute: SD 1.4's memory
    python -m tools.bench --size sd14 --parts step --rounds 1 --k 2    on a CPU, many minutes: time
    python -m tools.bench --only "ours as shipped" "ours, --compile"    these loops, on a GPU
    python -m tools.bench --rows docs/benchmarks.md    also adds what it prints to that file

Weights are random at SD 1.4's sizes, because speed does not depend on values. The loops take turns,
iteration by iteration, with the same k. On a GPU, memory is the allocator's. On a CPU it is
counted: the bytes of all tensors that exist at the peak, without what a device adds (workspaces,
rounding). All loops stay in memory while they are timed, at SD 1.4's sizes tens of GiB: on a small
GPU choose one or two with --only.
Needs diffusers (requirements-test.txt).
"""

import support.openmp  # noqa: F401 (before torch)

import datetime
import gc
import platform
import random
import shlex
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
from support.cli import Parser, one_of, pick_device, positive, run_command
from support.cuda_graph import CudaGraph
from support.errors import UserError
from support.files import write_text
from tools.baseline import PROMPT, SD14_SCHEDULER, Authors, their_parts
from unet import UNet
from vae import VAE

SIZES = {"toy": (8, 6), "sd14": (1, 50)}  # latents per batch, T
AUTHORS = {  # name: dtype of autocast; the script's own, and what a user would try next
    "the authors' loop, fp32": torch.float32,
    "the authors' loop, bf16": torch.bfloat16,
}
OURS = {  # name: arguments of train.py
    "ours, fp32": ["--dtype", "fp32"],
    "ours, bf16, checkpointing": ["--dtype", "bf16", "--gradient-checkpointing"],
    "ours, bf16": ["--dtype", "bf16"],
    "ours, with --preserve": ["--preserve", "0.3"],
    "ours, --compile": ["--compile"],
    "ours as shipped": [],
}
NAMES = [*AUTHORS, *OURS]
ON_A_GPU = ("ours, --compile",)


# ------------------------------------------------------------------------------------ contenders
def our_model(size, device):
    """The toy model, or random weights with SD 1.4's sizes and the toy model's tokenizer."""
    if size == "toy":
        return weights.load("toy")
    with torch.device(device):
        parts = dict(unet=UNet(), text_encoder=CLIPText())
    parts["vae"] = VAE()  # train.py moves it only for previews
    for part in parts.values():
        part.eval().requires_grad_(False)
    return weights.Model(
        "random/sd14",
        **parts,
        resolution=512,
        tokenizer=weights.load_tokenizer(weights.TOY),
        scheduler=weights.read_config(weights.TOY, "scheduler"),
    )


class Ours:
    """train.py's own run, without previews. flags: more arguments of train.py."""

    def __init__(self, size, device, batch_size, steps, *flags):
        words = ["--concept", PROMPT, "--preview", PROMPT, "--preview-every", "0"]
        words += ["--model", "toy" if size == "toy" else "random/sd14", "--device", str(device)]
        words += ["--batch-size", str(batch_size), "--steps", str(steps), "--iters", "1000000"]
        settings = presets.settle(train.parse([*words, *flags]))
        self.run = train.Run(Path(tempfile.gettempdir()), settings, our_model(size, device))
        self.device, self.dtype = self.run.device, self.run.dtype
        self.iterations = self.run.iterations()
        models = self.run.models
        self.parts = [
            models.student.unet,
            models.teacher.unet,
            models.original.unet,
            self.run.optimizer,
        ]

    def iteration(self, k):
        """One iteration of Algorithm 1 with k denoising steps; returns the loss."""

        def fixed_timestep(roles, scheduler, K, i, generator):
            return k, scheduler.timesteps[k], 0

        autocast = torch.autocast(
            self.device.type,
            self.dtype,
            enabled=self.dtype != torch.float32,
            cache_enabled=False,
        )
        with patch.object(sdd, "random_timestep", fixed_timestep), autocast:
            return next(self.iterations).loss


def make_contender(name, size, device):
    batch_size, steps = SIZES[size]
    if name in AUTHORS:
        return Authors(size, device, batch_size, steps, AUTHORS[name])
    return Ours(size, device, batch_size, steps, *OURS[name])


# ------------------------------------------------------------------------------------------ time
def clock(device):
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def paired_times(contenders, ks, device):
    """{name: seconds of each iteration}. All take turns; the order is reversed each time."""
    seconds = {name: [] for name in contenders}
    for i, k in enumerate(ks):
        names = list(contenders)
        if i % 2:
            names.reverse()
        for name in names:
            began = clock(device)
            contenders[name].iteration(k)
            seconds[name].append(clock(device) - began)
    return seconds


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product: the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = 0.0
    for _ in range(10):
        began = clock(device)
        a @ a
        best = max(best, 2 * n**3 / (clock(device) - began))
    return best


def median_and_quartiles(values):
    low = high = values[0]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.3g} s ({low:.3g}–{high:.3g})"


def measure_steps(args, device):
    """Yields (what, figure): one iteration of each loop, at a fixed k and with random k."""
    batch_size, steps = SIZES[args.size]
    contenders = {}
    for name in args.only:
        contenders[name] = make_contender(name, args.size, device)
    title = f"{args.size}, an iteration of {batch_size}"
    k = args.k or steps // 2
    for contender in contenders.values():
        contender.iteration(1)  # warm-up
    seconds = paired_times(contenders, [k] * args.rounds, device)
    for name, contender in contenders.items():
        rate = flop_rate(contender, k, seconds[name], device)
        yield f"{title}, k = {k}: {name}", f"{compared(name, seconds)}, {rate}"
    if args.k:
        return
    generator = random.Random(0)
    ks = [generator.randint(1, steps) for _ in range(args.rounds)]
    seconds = paired_times(contenders, ks, device)
    for name in contenders:
        yield f"{title}, random k in 1..{steps}: {name}", compared(name, seconds)


def compared(name, seconds):
    """A contender's seconds, and how many times faster it is than the first one."""
    first = next(iter(seconds))
    ratios = [a / b for a, b in zip(seconds[first], seconds[name])]
    ratio = statistics.median(ratios)
    return f"{median_and_quartiles(seconds[name])}, {ratio:.2f} × {first.split(',')[0]}"


def flop_rate(contender, k, seconds, device):
    """The FLOP of an iteration, and their rate as a share of the machine's matrix products."""

    def eager(graph, *inputs):  # the counter does not see what a CUDA graph replays
        return graph.function(*inputs)

    with (
        torch.compiler.set_stance("force_eager"),  # nor what torch.compile makes
        FlopCounterMode(display=False) as counter,
        patch.object(CudaGraph, "__call__", eager),
    ):
        contender.iteration(k)
    flop = counter.get_total_flops()
    share = flop / statistics.median(seconds) / matmul_rate(device, contender.dtype)
    dtype = str(contender.dtype).removeprefix("torch.")
    return f"{flop / 1e12:.3g} TFLOP at {share:.0%} of {dtype} matmuls"


# ---------------------------------------------------------------------------------------- memory
class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that exist: those of `include`, and results of operations.

    The value of a fake tensor is 1, where the loop asks for it (to log it, to see that it is
    finite). torch's own MemTracker has no such answer, so it would need a mode like this one, too.
    """

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def include(self, parts):
        """Adds the tensors of modules and optimizers; from now on, the peak is counted."""
        for part in parts:
            tensors = []
            if isinstance(part, nn.Module):
                tensors += part.parameters()
            if isinstance(part, torch.optim.Optimizer):
                for state in part.state.values():
                    tensors += state.values()
            for x in tensors:
                self.add(x)
                self.add(x.grad)
        self.peak = self.now

    def add(self, x):
        if not isinstance(x, torch.Tensor):
            return
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, key, size)

    def remove(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        asks_for_value = function is torch.ops.aten._local_scalar_dense.default
        if asks_for_value and isinstance(args[0], FakeTensor):
            return 1.0
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            self.add(x)
        return result


@contextmanager
def fake_tensors():
    """Nothing is computed: tensors have a shape, a type and a device, but no values.

    Norms are computed in float32, as in a GPU's autocast and unlike a CPU's.
    """

    def wide(x):
        return x.float() if torch.is_autocast_enabled("cpu") else x

    def group_norm(m, x):
        return F.group_norm(wide(x), m.num_groups, wide(m.weight), wide(m.bias), m.eps)

    def layer_norm(m, x):
        return F.layer_norm(wide(x), m.normalized_shape, wide(m.weight), wide(m.bias), m.eps)

    with (
        patch.object(weights, "fingerprint", lambda tensors: ""),
        patch.object(nn.Module, "to", lambda module, *_, **__: module),
        patch.object(nn.GroupNorm, "forward", group_norm),
        patch.object(nn.LayerNorm, "forward", layer_norm),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def counted_peak(make, size):
    """Bytes at the peak of the second iteration of the contender that make() returns."""
    with fake_tensors() if size == "sd14" else nullcontext(), LiveBytes() as live:
        contender = make()
        contender.iteration(1)  # makes gradients and the optimizer's state
        live.include(contender.parts)
        contender.iteration(1)
        return live.peak


def reserved_peak(make):
    """The same on a GPU: what its allocator holds, with the memory of CUDA graphs."""
    gc.collect()  # contenders that were timed are in reference cycles
    torch.cuda.empty_cache()
    contender = make()
    contender.iteration(1)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    contender.iteration(1)
    peak = torch.cuda.max_memory_reserved()
    del contender
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def measure_memory(args, device):
    """Yields (what, figure): the peak of an iteration, of each loop alone."""
    for name in args.only:

        def make(name=name):
            return make_contender(name, args.size, device)

        if device.type == "cuda":
            figure = f"{reserved_peak(make) / 2**30:.2f} GiB"
        else:
            figure = f"{counted_peak(make, args.size) / 2**30:.2f} GiB (counted)"
        yield f"{args.size}, an iteration of {SIZES[args.size][0]}: {name}, peak memory", figure


# ------------------------------------------------------------------------------------ generation
def diffusers_pipeline(parts, dtype):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    unet, vae, text_encoder, tokenizer = parts
    pipeline = StableDiffusionPipeline(
        vae.to(dtype),
        text_encoder.to(dtype),
        tokenizer,
        unet.to(dtype),
        DDIMScheduler(**SD14_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure_generation(args, device):
    """Yields (what, figure): images per second with DDIM; ours and diffusers' take turns."""
    dtype, steps = torch.float32, 12 if args.size == "toy" else 1
    if device.type == "cuda":
        dtype, steps = torch.float16, 50
    model = our_model(args.size, device)
    for part in (model.vae, model.text_encoder):
        part.to(device)
    pipeline = diffusers_pipeline(their_parts(args.size, device), dtype)
    scheduler = make_scheduler(model.scheduler, steps, "ddim")
    c_0, c_p = encode_prompts(model, ["", PROMPT]).split(1)
    unet = InferenceUNet(model.unet, device, dtype)

    def ours(n):
        prompts = c_p.expand(n, -1, -1)
        images = generate_images(
            model, unet, c_0, prompts, range(n), scheduler, 7.5, dtype, batch_size=n
        )
        return list(images)

    def theirs(n):
        return pipeline(
            prompt_embeds=c_p.expand(n, -1, -1).to(dtype),
            negative_prompt_embeds=c_0.expand(n, -1, -1).to(dtype),
            num_inference_steps=steps,
            guidance_scale=7.5,
            height=model.resolution,
            width=model.resolution,
        )

    for n in (1, 8):
        seconds = {ours: [], theirs: []}
        for _ in range(args.rounds + 1):
            for generate in seconds:
                began = clock(device)
                generate(n)
                seconds[generate].append(clock(device) - began)
        rates = [n / statistics.median(spent[1:]) for spent in seconds.values()]  # [0]: warm-up
        yield (
            f"{args.size}, DDIM {steps}, batches of {n}, {str(dtype).removeprefix('torch.')}",
            f"{rates[0]:.3g} images/s; diffusers' pipeline {rates[1]:.3g}",
        )


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
    args.size = args.size or ("sd14" if device.type == "cuda" else "toy")
    if args.only is None:
        args.only = [name for name in NAMES if device.type == "cuda" or name not in ON_A_GPU]
    for name in args.only:
        if name in ON_A_GPU and device.type != "cuda":
            raise UserError(f"{name!r} needs a CUDA GPU: leave it out of --only.")
    steps = SIZES[args.size][1]
    if args.k and args.k > steps:
        raise UserError(f"--k {args.k} is more than the {steps} steps of {args.size}.")
    machine = f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    machine += f", torch {torch.__version__}, diffusers {diffusers.__version__}"
    command = shlex.join(["python", "-m", "tools.bench", *sys.argv[1:]])
    lines = []
    for part in args.parts:
        with torch.enable_grad():
            for what, figure in PARTS[part](args, device):
                print(f"{what}: {figure}", flush=True)
                today = datetime.date.today()
                lines.append(f"| {today} | {machine} | {what} | `{command}` | {figure} |\n")
    if args.rows:
        append_lines(args.rows, lines)


def append_lines(file, lines):
    text = file.read_text(encoding="utf-8").rstrip("\n") + "\n" if file.exists() else ""
    write_text(file, text + "".join(lines))


def parse(argv=None):
    parser = Parser(prog="python -m tools.bench", description=__doc__)
    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--size", **one_of(SIZES), help="model (default: sd14 on a GPU, toy on a CPU)"
    )
    group.add_argument(
        "--parts",
        nargs="+",
        **one_of(PARTS),
        default=[*PARTS],
        help="measurements (default: all)",
    )
    group.add_argument(
        "--only",
        nargs="+",
        type=one_of(NAMES)["type"],
        metavar="NAME",
        help="loops; the others are compared with the first one. Names: "
        + ", ".join(f'"{name}"' for name in NAMES)
        + " (default: all that the device can run)",
    )
    group.add_argument(
        "--rounds",
        type=positive,
        default=11,
        metavar="N",
        help="timed iterations of each loop (default: %(default)s)",
    )
    group.add_argument(
        "--k",
        type=positive,
        metavar="K",
        help="always this number of denoising steps (default: half of T, then random numbers)",
    )
    group.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="cuda, cuda:1, mps, cpu or auto (default: %(default)s)",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--rows", type=Path, metavar="FILE", help="append the figures to this Markdown table"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(bench, parse()))
