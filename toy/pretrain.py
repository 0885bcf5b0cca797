"""Trains a toy model from nothing: autoencoder, text encoder, UNet, with the project's own modules.

    python -m toy.pretrain shapes        all stages; overwrites toy/model/; about an hour
    python -m toy.pretrain emoji         the same for the emoji world and toy/emoji_model/
    python -m toy.pretrain emoji unet    one stage, from its checkpoint in runs/pretrain/emoji/ on
    python -m toy.pretrain emoji --device cuda --bf16    on a GPU; not tried yet

Every step's data depends on (stage, step) alone, and the state is saved every few minutes. So a run
that was stopped continues with the same bits. What differs from Stable Diffusion's training:

1. Latents are scaled to standard deviation 0.5, not 1. A 16x16 latent shows its mean through more
   noise than a 64x64 one: at t = 981 (√ᾱ = 0.076) it would still be legible, and the model would
   read the background there instead of in the prompt.
2. The loss is weighted. The shapes model's weight is min(SNR, 5) / SNR (Hang et al. 2023, arXiv
   2303.09556), which converges in fewer steps. The emoji model's weight is (1 + SNR) / SNR, at most
   100: the loss of v-prediction (Salimans & Ho 2022, arXiv 2202.00512). At first, its t are from
   600 to 999. During the first half of the training the lower limit falls to 0. Both favour the
   noisy steps, where the caption decides what will be drawn.
3. The text encoder first learns to name an image's attributes from its caption. This takes two
   minutes and replaces CLIP's contrastive training. From there it goes on with the UNet.
4. The emoji model's rate is constant in the first half, and falls to 0 in the second half.
5. The emoji model's weight matrices are trained by Muon (Jordan et al. 2024,
   kellerjordan.github.io/posts/muon), all else by AdamW.
6. The emoji model's own sampler is DDIM. With PNDM and guidance scale 7.5 its images are blurred
   (toy/emoji_model/README.md has figures).
"""

import support.openmp

import copy
import csv
import json
import math
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import weights
from clip_text import tokenize
from scheduler import DDIM
from support.cli import Parser, one_of, pick_device, run_command
from support.files import write_text
from toy import probe, worlds

RUNS = Path("runs/pretrain")


def cosine(progress):
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant(progress):
    """1, and over the second half of the training a straight line down to 0."""
    return min(1.0, 2 - 2 * progress)


def min_snr(snr):
    return snr.clamp(max=5) / snr


def velocity(snr):
    return ((1 + snr) / snr).clamp(max=100)


# fmt: off
TABLE = [
    # setting           shapes              emoji
    ("vae_widths",      [16, 32, 64],       [32, 64, 64, 128]),
    ("vae_batch",       32,                 16),
    ("vae_steps",       1750,               3000),
    ("text_width",      64,                 96),
    ("text_steps",      600,                1000),
    ("unet_widths",     [32, 64, 128, 128], [96, 128, 128, 128]),
    ("unet_attention",  [1, 2],             [0, 1]),             # the levels that have it
    ("unet_steps",      3500,               6000),
    ("unet_lr",         1.5e-3,             3e-3),
    # How many the UNet learns from; each gets a new caption whenever it comes up.
    ("images",          40_000,             30_000),
    # The weight of the noise estimate's squared error, by the signal-to-noise ratio.
    ("weighting",       min_snr,            velocity),
    # The UNet learns from t >= first_t at first, from all t in the second half.
    ("first_t",         0,                  600),
    # Of the autoencoder and the UNet: batches in each step (the UNet's have 48 images), the
    # schedule of the rate, and whether Muon trains the weight matrices.
    ("batches",         1,                  2),
    ("schedule",        cosine,             constant),
    ("muon",            False,              True),
    # The one that the model's scheduler_config.json names.
    ("sampler",         "PNDMScheduler",    "DDIMScheduler"),
]
# fmt: on
Settings = namedtuple("Settings", [name for name, _, _ in TABLE])
SETTINGS = {
    "shapes": Settings(*(value for _, value, _ in TABLE)),
    "emoji": Settings(*(value for _, _, value in TABLE)),
}
LATENT_STD = 0.5


def vae_config(world, scaling_factor=1.0):
    """The content of config.json, as weights.sd14_config."""
    widths = SETTINGS[world.NAME].vae_widths
    return weights.sd14_config(
        "vae",
        _class_name="AutoencoderKL",
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=world.SIZE,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        scaling_factor=scaling_factor,
    )


def text_config(world, vocab_size):
    width = SETTINGS[world.NAME].text_width
    return weights.sd14_config(
        "text_encoder",
        architectures=["CLIPTextModel"],
        dtype="float32",
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        vocab_size=vocab_size,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )


def unet_config(world):
    """Not all levels have attention, because it makes steps slow.

    Shapes, with the widths 32-64-96-96: 0.57 s with attention at the first level, 0.33 s without.
    Emoji, 48 images on one core: 0.85 s with attention at three levels, 0.62 s at two.
    """
    settings = SETTINGS[world.NAME]
    kinds = ["CrossAttn" if i in settings.unet_attention else "" for i in range(4)]
    return weights.sd14_config(
        "unet",
        _class_name="UNet2DConditionModel",
        block_out_channels=settings.unet_widths,
        attention_head_dim=2,
        cross_attention_dim=settings.text_width,
        norm_num_groups=8,
        sample_size=world.SIZE // 2 ** (len(settings.vae_widths) - 1),
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
    )


def build(network, config):
    """One of weights.NETWORKS, with random weights."""
    make, _ = weights.NETWORKS[network]
    return make(**{key: config[key] for key in weights.ARGUMENTS[network]})


class Machine(NamedTuple):
    """Where and how the training computes."""

    device: torch.device = torch.device("cpu")
    bf16: bool = False  # the forward pass in bfloat16; the weights stay in float32
    compiled: bool = False  # torch.compile for the UNet


def attention_kernel(machine):
    """On a CPU, the backward pass of the fused kernel is slow in bfloat16: use the plain one."""
    if machine.bf16 and machine.device.type == "cpu":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def as_matrix(x):
    """A weight as a matrix (O, I). A convolution's (O, I, h, w) becomes (O, h·w·I)."""
    return x.permute(0, 2, 3, 1).flatten(1) if x.dim() == 4 else x


class Muon(torch.optim.Muon):
    """Muon for weights of linear and convolution layers, with which AdamW's learning rates fit.

    torch's Muon takes matrices only. So it gets views of the weights as matrices. For 230 matrices
    of a UNet a step takes 0.26 s on two cores.
    """

    def __init__(self, parameters, lr):
        self.weights = parameters
        for p in parameters:
            assert as_matrix(p).data_ptr() == p.data_ptr(), "a convolution is not channels-last"
        matrices = [torch.nn.Parameter(as_matrix(p.detach())) for p in parameters]
        super().__init__(matrices, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        for matrix in matrices:
            self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)

    def momenta(self):
        """What a checkpoint has to keep: {number of the weight: its momentum}."""
        return {str(i): state["momentum_buffer"] for i, state in enumerate(self.state.values())}

    def step(self):
        for p, matrix in zip(self.weights, self.param_groups[0]["params"]):
            matrix.grad = as_matrix(p.grad)
        super().step()


def split_for_muon(module):
    """(the parameters for Muon, the others).

    Muon is for the matrices between the first and the last layer (Jordan et al. 2024).
    """
    matrices, others = [], []
    for name, p in module.named_parameters():
        outer = any(part in name for part in ("embedding", "conv_in", "conv_out"))
        (others if outer or p.dim() < 2 else matrices).append(p)
    return matrices, others


def adamw(parameters, lr):
    """parameters: tensors, or groups with their own rates."""
    return torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def make_optimizers(module, lr, muon):
    """[AdamW], or with `muon` [AdamW, Muon for the module's inner matrices]."""
    if not muon:
        return [adamw(module.parameters(), lr)]
    matrices, others = split_for_muon(module)
    return [adamw(others, lr), Muon(matrices, lr)]


class Plan(NamedTuple):
    """The numbers of a training."""

    steps: int
    batches: int = 1  # a step takes the mean gradient of so many batches
    schedule: Callable = cosine
    average: float = 0.998
    warmup: int = 200
    save_every: int = 250


def fit(stage, module, loss, optimizers, plan, machine, write=None):
    """Minimises loss(number of a batch). Leaves averaged weights in `module`.

    optimizers: of make_optimizers. `module` is on machine.device.
    Continues from RUNS/<stage>.safetensors, which is written every save_every steps; a curve goes
    to <stage>.csv. `write`, if given, gets the averaged module at the same times. On a CPU the
    batches of a step are computed at the same time, with one thread each: this uses the cores
    better than a larger batch does.
    """
    averaged, parameters = copy.deepcopy(module), list(module.parameters())
    kept = {"module": module.state_dict(), "averaged": averaged.state_dict()}
    first, *muons = optimizers
    for muon in muons:
        kept["momentum"] = muon.momenta()
    start, file, curve = 0, RUNS / f"{stage}.safetensors", RUNS / f"{stage}.csv"
    if file.exists():
        start = int(weights.load_checkpoint(file, kept, first)["step"])
    else:
        curve.unlink(missing_ok=True)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]

    def gradients(number):
        """(loss, its gradients) of one batch."""
        with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.bf16):
            value = loss(number)
        return value.item(), torch.autograd.grad(value, parameters)

    each = map
    if plan.batches > 1 and machine.device.type == "cpu":
        threads = ThreadPoolExecutor(plan.batches, initializer=torch.set_num_threads, initargs=(1,))
        each = threads.map
        if machine.compiled:  # one thread compiles; two at the same time have hung
            with attention_kernel(machine):
                list(each(gradients, [0]))
    began, losses = time.time(), []
    for step in range(start, plan.steps):
        pace = min((step + 1) / plan.warmup, plan.schedule(step / plan.steps))
        for group, rate in zip(groups, rates):
            group["lr"] = rate * pace
        with attention_kernel(machine):
            numbers = range(plan.batches * step, plan.batches * (step + 1))
            found = list(each(gradients, numbers))
        for p, *parts in zip(parameters, *[part for _, part in found]):
            p.grad = sum(parts) / plan.batches
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        m = min(plan.average, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), parameters, 1 - m)
        losses.append(np.mean([value for value, _ in found]))
        done = step + 1
        if done % plan.save_every == 0 or done == plan.steps:
            weights.save_checkpoint(file, kept, first, {"step": str(done)})
            mean, seconds = np.mean(losses[-plan.save_every :]), (time.time() - began) / len(losses)
            row = done, f"{mean:.5f}", f"{seconds:.3f}"  # mean loss since the last row
            with open(curve, "a", newline="") as f:
                csv.writer(f).writerow(row)
            print(f"{stage} {done}/{plan.steps}: loss {row[1]}, {row[2]} s a step", flush=True)
            if write:
                write(averaged)
    module.load_state_dict(averaged.state_dict())


def write_network(world, network, config, module):
    """One network of the model folder: config.json and float16 weights."""
    folder, name = world.MODEL / network, weights.NETWORKS[network][1]
    tensors = {key: x.half() for key, x in module.state_dict().items()}
    weights.save(folder / f"{name}.safetensors", tensors)
    write_json(folder / "config.json", config)


def write_json(file, content):
    write_text(file, json.dumps(content, indent=2) + "\n")


def distance(y, x, eye):
    """How far images y are from x: L1, and L1 of the probe's feature maps, against blur."""
    seen = sum((a - b).abs().mean() for a, b in zip(eye.maps(y)[:3], eye.maps(x)[:3]))
    return 2 * (y - x).abs().mean() + 0.5 * seen


def train_vae(world, machine, lr=2e-3):
    """The distance to the original, and a light KL term that keeps the latents smooth."""
    settings = SETTINGS[world.NAME]
    torch.manual_seed(0)
    vae = build("vae", vae_config(world))
    vae.to(machine.device, memory_format=torch.channels_last)
    eye = probe.load(world.PROBE).to(machine.device)

    def loss(step):
        rng, generator = np.random.default_rng([1, step]), torch.Generator().manual_seed(step)
        x = probe.to_tensor(worlds.batch(world, rng, settings.vae_batch)[1]).to(machine.device)
        mean, logvar = (part.float() for part in vae.moments(x))
        noise = torch.randn(mean.shape, generator=generator).to(machine.device)
        z = mean + (logvar / 2).exp() * noise
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return distance(vae.decode(z).float(), x, eye) + 1e-3 * kl

    optimizers = make_optimizers(vae, lr, settings.muon)
    plan = Plan(settings.vae_steps, settings.batches, settings.schedule, save_every=100)
    fit(f"{world.NAME}/vae", vae, loss, optimizers, plan, machine)
    write_vae(world, vae.cpu())


@torch.no_grad()
def write_vae(world, vae):
    images = worlds.batch(world, np.random.default_rng(7), 1024)[1]
    z = torch.cat([vae.encode(probe.to_tensor(part)) for part in np.array_split(images, 16)])
    scaling_factor = round(LATENT_STD / z.std().item(), 5)
    write_network(world, "vae", vae_config(world, scaling_factor), vae)


def write_tokenizer(folder, vocabulary):
    """CLIP's tokenizer for the world's WORDS: byte pairs merged until every word is one token."""
    alphabet, merges = [*"abcdefghijklmnopqrstuvwxyz,"], []
    for word in vocabulary:
        parts, done = [*word[:-1], word[-1] + "</w>"], 0
        while len(parts) > 1:
            if done == len(merges):  # all merges are applied, and the word is still in parts
                merges.append((parts[0], parts[1]))
            for i in reversed(range(len(parts) - 1)):
                if tuple(parts[i : i + 2]) == merges[done]:
                    parts[i : i + 2] = ["".join(merges[done])]
            done += 1
    words = [*alphabet, *(c + "</w>" for c in alphabet), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder = folder / "tokenizer"
    vocab = json.dumps({word: i for i, word in enumerate(words)}, indent=0)
    write_text(folder / "vocab.json", vocab + "\n")
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    write_text(folder / "merges.txt", "#version: 0.2\n" + lines)
    config = weights.TOY / "tokenizer/tokenizer_config.json"  # the same for every toy model
    write_text(folder / "tokenizer_config.json", config.read_text(encoding="utf-8"))
    return len(words)


def train_text(world, machine, size=256, lr=2e-3):
    """The text encoder, for a minute: which words describe an image with this caption?"""
    settings = SETTINGS[world.NAME]
    torch.manual_seed(1)
    vocab_size = write_tokenizer(world.MODEL, world.WORDS)
    tokenizer = weights.load_tokenizer(world.MODEL)
    values = [len(words) for words in world.ATTRIBUTES.values()]
    text = build("text_encoder", text_config(world, vocab_size))
    head = torch.nn.Linear(settings.text_width, sum(values))
    module = torch.nn.ModuleDict({"text": text, "head": head}).to(machine.device)

    def loss(step):
        rng = np.random.default_rng([2, step])
        scenes = [world.scene(rng) for _ in range(size)]
        tokens, _ = tokenize(tokenizer, [world.caption(s, rng) for s in scenes])
        tokens = tokens.to(machine.device)
        end = (tokens == tokenizer.eos_token_id).float()[..., None]
        pooled = (module["text"](tokens) * end).sum(1) / end.sum(1)
        logits = module["head"](pooled).split(values, dim=1)
        return sum(
            F.cross_entropy(a, b.to(machine.device))
            for a, b in zip(logits, probe.labels(scenes, world.ATTRIBUTES).values())
        )

    plan, optimizers = Plan(settings.text_steps, average=0.98), [adamw(module.parameters(), lr)]
    fit(f"{world.NAME}/text", module, loss, optimizers, plan, machine._replace(bf16=False))
    return module["text"]


@torch.no_grad()
def latents(world):
    """The scenes that the UNet learns from and their latents (N, 4, 64/f, 64/f).

    They are encoded once for each autoencoder.
    """
    n, file = SETTINGS[world.NAME].images, RUNS / world.NAME / "latents.safetensors"
    rng = np.random.default_rng(3)
    scenes = [world.scene(rng) for _ in range(n)]
    vae = weights.load_network(world.MODEL, "vae")
    made_by = {"vae": weights.fingerprint(vae.state_dict()), "images": str(n)}
    if file.exists():
        tensors, metadata = weights.read(file)
        if metadata == made_by:
            return scenes, tensors["z"]
    z = []
    for i in range(0, n, 100):
        images = [world.draw(scene, rng) for scene in scenes[i : i + 100]]
        z.append(vae.encode(probe.to_tensor(images)).half())
    weights.save(file, {"z": torch.cat(z)}, made_by)
    return scenes, torch.cat(z)


def train_unet(world, machine, size=48):
    """The UNet and the text encoder: predict the noise from the caption."""
    settings = SETTINGS[world.NAME]
    text, tokenizer = train_text(world, machine), weights.load_tokenizer(world.MODEL)
    torch.manual_seed(2)
    scenes, z_all = latents(world)
    unet = build("unet", unet_config(world))
    unet.to(machine.device, memory_format=torch.channels_last)
    module = torch.nn.ModuleDict({"unet": unet, "text": text})
    noise_estimate = torch.compile(unet) if machine.compiled else unet  # the same weights
    tokenizer_lock = Lock()  # two threads may not use it at the same time
    scheduler = DDIM(50)  # only its noise schedule is used
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod) * LATENT_STD**2
    weight_at = settings.weighting(snr)
    batches = settings.batches * settings.unet_steps  # in the whole training

    def loss(number):
        rng, generator = np.random.default_rng([4, number]), torch.Generator().manual_seed(number)
        chosen = rng.integers(len(scenes), size=size)
        z = z_all[chosen].float()
        first_t = int(settings.first_t * max(0, 1 - 2 * number / batches))
        t = torch.randint(first_t, 1000, (size,), generator=generator)
        noise = torch.randn(z.shape, generator=generator)
        captions = [world.caption(scenes[i], rng) for i in chosen]
        with tokenizer_lock:
            tokens, _ = tokenize(tokenizer, captions)
        batch = scheduler.add_noise(z, noise, t), t, tokens, noise, weight_at[t]
        z_t, t, tokens, noise, weight = (x.to(machine.device) for x in batch)
        e = noise_estimate(z_t, t, module["text"](tokens)).float()
        return (weight * (e - noise).square().mean((1, 2, 3))).mean()

    lr = settings.unet_lr
    optimizers = make_optimizers(module, lr, settings.muon)
    if not settings.muon:
        slower = dict(params=text.parameters(), lr=0.4 * lr)
        optimizers = [adamw([dict(params=unet.parameters()), slower], lr)]
    plan = Plan(settings.unet_steps, settings.batches, settings.schedule, average=0.999)
    fit(f"{world.NAME}/unet", module, loss, optimizers, plan, machine, partial(write_model, world))


def write_model(world, module):
    """All of the model folder but the autoencoder and the model card."""
    folder, sampler = world.MODEL, SETTINGS[world.NAME].sampler
    vocab_size = len(weights.load_tokenizer(folder))  # train_text has written it
    write_network(world, "unet", unet_config(world), module["unet"])
    write_network(world, "text_encoder", text_config(world, vocab_size), module["text"])
    scheduler = weights.sd14_config(
        "scheduler", _class_name=sampler, set_alpha_to_one=False, clip_sample=False
    )
    if sampler != "PNDMScheduler":
        del scheduler["skip_prk_steps"]
    write_json(folder / "scheduler/scheduler_config.json", scheduler)
    index = json.loads((weights.TOY / "model_index.json").read_text(encoding="utf-8"))
    write_json(folder / "model_index.json", index | {"scheduler": ["diffusers", sampler]})


# The UNet's stage trains the text encoder first.
STAGES = {"vae": train_vae, "unet": train_unet}


def pretrain(args):
    machine = Machine(pick_device(args.device), args.bf16, args.compile)
    for stage in args.stages or STAGES:
        STAGES[stage](worlds.WORLDS[args.world], machine)


def parse(argv=None):
    parser = Parser("python -m toy.pretrain", description=__doc__.split("\n\n")[0])
    # fmt: off
    add = parser.add_argument
    add("world", **one_of(SETTINGS))
    add("stages", nargs="*", **one_of(STAGES), help="default: all")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--bf16", action="store_true",
        help="mixed precision, for GPUs and for CPUs with AMX (Sapphire Rapids and later)")
    add("--compile", action="store_true",
        help="compile the UNet (torch.compile, needs g++): minutes at first, then faster steps")
    # fmt: on
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(pretrain, parse(), "the same command continues"))
