"""Trains a toy model from nothing: autoencoder, text encoder, UNet, with the project's own modules.

    python -m toy.pretrain shapes        all stages; overwrites toy/model/; about an hour
    python -m toy.pretrain emoji         the same for the emoji world and toy/emoji_model/
    python -m toy.pretrain emoji unet    one stage, from its checkpoint in runs/pretrain/emoji/ on
    python -m toy.pretrain emoji --device cuda --bf16    on a GPU; not tried yet

Every step's data depends on (stage, step) alone, and the state is saved every few minutes. So a run
that is cut short continues as if it had not been. What differs from Stable Diffusion's training:

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import weights
from clip_text import CLIPText, tokenize
from scheduler import DDIM
from support.cli import Parser, pick_device, run_command
from support.files import write_text
from toy import probe, worlds
from unet import UNet
from vae import VAE

RUNS = Path("runs/pretrain")


class Settings(NamedTuple):
    """What differs between the two models."""

    vae_widths: list
    vae_batch: int
    unet_widths: list
    unet_attention: list  # the levels that have it
    text_width: int
    images: int  # how many the UNet learns from; each gets a new caption whenever it comes up
    batches: int  # in each step of the autoencoder and the UNet (there, of 48 images)
    muon: bool  # for the weight matrices of the autoencoder and the UNet
    unet_lr: float
    weighting: str  # of the UNet's loss over the time steps: a name in WEIGHTINGS
    first_t: int  # the UNet learns from t >= first_t at first, from all t in the second half
    schedule: str  # of the rate of the autoencoder and the UNet: a name in SCHEDULES
    sampler: str  # the one that the model's scheduler_config.json names
    steps: dict  # {stage: how many}


SETTINGS = {
    "shapes": Settings(
        vae_widths=[16, 32, 64],
        vae_batch=32,
        unet_widths=[32, 64, 128, 128],
        unet_attention=[1, 2],
        text_width=64,
        images=40_000,
        batches=1,
        muon=False,
        unet_lr=1.5e-3,
        weighting="min-snr-5",
        first_t=0,
        schedule="cosine",
        sampler="PNDMScheduler",
        steps=dict(vae=1750, text=600, unet=3500),
    ),
    "emoji": Settings(
        vae_widths=[32, 64, 64, 128],
        vae_batch=16,
        unet_widths=[96, 128, 128, 128],
        unet_attention=[0, 1],
        text_width=96,
        images=30_000,
        batches=2,
        muon=True,
        unet_lr=3e-3,
        weighting="v",
        first_t=600,
        schedule="constant",
        sampler="DDIMScheduler",
        steps=dict(vae=3_000, text=1000, unet=6_000),
    ),
}
LATENT_STD = 0.5


def vae_config(settings):
    return dict(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=settings.vae_widths,
        layers_per_block=1,
        norm_num_groups=8,
    )


def text_config(settings):
    width = settings.text_width
    return dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
    )


def unet_config(settings):
    """The UNet's config. Not all levels have attention, because it makes steps slow.

    Shapes, with the widths 32-64-96-96: 0.57 s with attention at the first level, 0.33 s without.
    Emoji, 48 images on one core: 0.85 s with attention at three levels, 0.62 s at two.
    """
    down, up = [], []
    for level in range(len(settings.unet_widths)):
        cross = level in settings.unet_attention
        down.append("CrossAttnDownBlock2D" if cross else "DownBlock2D")
        up.insert(0, "CrossAttnUpBlock2D" if cross else "UpBlock2D")
    return dict(
        in_channels=4,
        out_channels=4,
        block_out_channels=settings.unet_widths,
        layers_per_block=2,
        attention_head_dim=2,
        cross_attention_dim=settings.text_width,
        norm_num_groups=8,
        down_block_types=down,
        up_block_types=up,
    )


def cosine(progress):
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant(progress):
    """1, and over the second half of the training a straight line down to 0."""
    return min(1.0, 2 - 2 * progress)


SCHEDULES = {"cosine": cosine, "constant": constant}
# Weights of the noise estimate's squared error, by the signal-to-noise ratio.
WEIGHTINGS = {
    "min-snr-5": lambda snr: snr.clamp(max=5) / snr,
    "v": lambda snr: ((1 + snr) / snr).clamp(max=100),
}


class Machine(NamedTuple):
    """Where and how the training computes."""

    device: torch.device = torch.device("cpu")
    bf16: bool = False  # the forward pass in bfloat16; the weights stay in float32
    compiled: bool = False  # torch.compile for the UNet


CPU = Machine()


def attention_kernel(machine):
    """On a CPU, the backward pass of the fused kernel is slow in bfloat16: use the plain one."""
    if machine.bf16 and machine.device.type == "cpu":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def as_matrix(x):
    """A weight as a matrix (O, I). A convolution's (O, I, h, w) becomes (O, h·w·I)."""
    return x.permute(0, 2, 3, 1).flatten(1) if x.dim() == 4 else x


def orthogonalise(x):
    """A stack of matrices (n, O, I) -> about the nearest matrices with orthogonal rows or columns.

    The Newton-Schulz iteration of torch.optim.Muon, with its five steps and its coefficients.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT).mT
    x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        update = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, update, x, beta=3.4445)
    return x


class Muon:
    """Muon for weights of linear and convolution layers.

    The same as torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), with which the learning rates of
    AdamW fit. But all matrices of one shape are computed together: for 230 matrices of a UNet,
    this took 0.12 s on two cores, and torch's, one by one, 0.26 s.
    """

    def __init__(self, parameters, lr):
        self.parameters, self.lr = parameters, lr
        for p in parameters:  # as_matrix must not copy: step writes into its result
            assert as_matrix(p).data_ptr() == p.data_ptr(), "a convolution is not channels-last"
        self.momenta = [torch.zeros_like(as_matrix(p)) for p in parameters]
        self.groups = {}  # {shape: numbers of the parameters}
        for i, momentum in enumerate(self.momenta):
            self.groups.setdefault(tuple(momentum.shape), []).append(i)

    def state(self):
        """What a checkpoint has to keep: {number of the weight: its momentum}."""
        return {str(i): momentum for i, momentum in enumerate(self.momenta)}

    @torch.no_grad()
    def step(self, rate, momentum=0.95, weight_decay=0.01):
        """One step with `rate` times the learning rate."""
        lr = rate * self.lr
        for shape, group in self.groups.items():
            gradients = [as_matrix(self.parameters[i].grad) for i in group]
            averages = [self.momenta[i] for i in group]
            torch._foreach_lerp_(averages, gradients, 1 - momentum)
            nesterov = torch.stack(torch._foreach_lerp(gradients, averages, momentum))
            updates = orthogonalise(nesterov).float() * (0.2 * max(shape) ** 0.5)
            for i, update in zip(group, updates):
                matrix = as_matrix(self.parameters[i])  # shares the parameter's memory
                matrix.mul_(1 - lr * weight_decay).sub_(update, alpha=lr)


def split_for_muon(module):
    """(the parameters for Muon, the others).

    Muon is for the matrices between the first and the last layer (Jordan et al. 2024).
    """
    matrices, others = [], []
    for name, p in module.named_parameters():
        outer = any(part in name for part in ("embedding", "conv_in", "conv_out"))
        (others if outer or p.dim() < 2 else matrices).append(p)
    return matrices, others


def with_muon(module, lr):
    """(Muon for the module's inner matrices, AdamW's parameter groups for the rest)."""
    matrices, others = split_for_muon(module)
    return Muon(matrices, lr), [dict(params=others, lr=lr)]


def fit(
    stage,
    module,
    loss,
    groups,
    steps,
    average=0.998,
    warmup=200,
    save_every=250,
    schedule=cosine,
    write=None,
    machine=CPU,
    batches=1,
    muon=None,
):
    """Minimises loss(number of a batch) over `groups` (AdamW). Leaves averaged weights in `module`.

    Continues from RUNS/<stage>.safetensors, which is written every `save_every` steps; a curve goes
    to <stage>.csv. `write`, if given, gets the averaged module at the same times. `module` is on
    machine.device. A step takes the mean gradient of `batches` batches. On a CPU they are computed
    at the same time, with one thread each: this uses the cores better than a larger batch does.
    `muon`, if given, trains the parameters that are not in `groups`.
    """
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    averaged, parameters = copy.deepcopy(module), list(module.parameters())
    kept = {"module": module.state_dict(), "averaged": averaged.state_dict()}
    if muon:
        kept["momentum"] = muon.state()
    start, file = 0, RUNS / f"{stage}.safetensors"
    if file.exists():
        start = int(weights.load_checkpoint(file, kept, optimizer)["step"])

    def gradients(number):
        """(loss, its gradients) of one batch."""
        with torch.autocast(machine.device.type, torch.bfloat16, enabled=machine.bf16):
            value = loss(number)
        return value.item(), torch.autograd.grad(value, parameters)

    each = map
    if batches > 1 and machine.device.type == "cpu":
        each = ThreadPoolExecutor(batches, initializer=torch.set_num_threads, initargs=(1,)).map
        if machine.compiled:  # one thread compiles; two at the same time have hung
            with attention_kernel(machine):
                list(each(gradients, [0]))
    began, losses = time.time(), []
    for step in range(start, steps):
        pace = min((step + 1) / warmup, schedule(step / steps))
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * pace
        with attention_kernel(machine):
            found = list(each(gradients, range(batches * step, batches * (step + 1))))
        for p, *parts in zip(parameters, *[part for _, part in found]):
            p.grad = sum(parts) / batches
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if muon:
            muon.step(pace)
        m = min(average, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), parameters, 1 - m)
        losses.append(np.mean([value for value, _ in found]))
        if (step + 1) % save_every == 0 or step + 1 == steps:
            weights.save_checkpoint(file, kept, optimizer, {"step": str(step + 1)})
            row = (
                step + 1,
                f"{np.mean(losses[-save_every:]):.5f}",
                f"{(time.time() - began) / len(losses):.3f}",
            )
            mode = "w" if len(losses) == step + 1 <= save_every else "a"  # a training from step 0
            with open(RUNS / f"{stage}.csv", mode, newline="") as f:
                csv.writer(f).writerow(row)  # step, mean loss since the last row, seconds a step
            print(f"{stage} {step + 1}/{steps}: loss {row[1]}, {row[2]} s a step", flush=True)
            if write:
                write(averaged)
    module.load_state_dict(averaged.state_dict())


def write_network(folder, network, config, module):
    """One network of the model folder: config.json and float16 weights."""
    name = weights.NETWORKS[network][1]
    weights.save(
        folder / network / f"{name}.safetensors",
        {k: v.half() for k, v in module.state_dict().items()},
    )
    write_text(folder / network / "config.json", json.dumps(config, indent=2) + "\n")


def distance(y, x, eye):
    """How far images y are from x: L1, and L1 of the probe's feature maps, against blur."""
    seen = sum((a - b).abs().mean() for a, b in zip(eye.maps(y)[:3], eye.maps(x)[:3]))
    return 2 * (y - x).abs().mean() + 0.5 * seen


def train_vae(world, machine, lr=2e-3):
    """The distance to the original, and a light KL term that keeps the latents smooth."""
    settings = SETTINGS[world.NAME]
    torch.manual_seed(0)
    vae = VAE(**vae_config(settings), scaling_factor=1.0)
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

    muon, groups = None, [dict(params=vae.parameters(), lr=lr)]
    if settings.muon:
        muon, groups = with_muon(vae, lr)
    fit(
        f"{world.NAME}/vae",
        vae,
        loss,
        groups,
        settings.steps["vae"],
        schedule=SCHEDULES[settings.schedule],
        machine=machine,
        batches=settings.batches,
        muon=muon,
        save_every=100,
    )
    write_vae(world, vae.cpu())


@torch.no_grad()
def write_vae(world, vae):
    images = worlds.batch(world, np.random.default_rng(7), 1024)[1]
    z = torch.cat([vae.encode(probe.to_tensor(part)) for part in np.array_split(images, 16)])
    levels = len(SETTINGS[world.NAME].vae_widths)
    config = vae_config(SETTINGS[world.NAME]) | dict(
        _class_name="AutoencoderKL",
        _diffusers_version="0.42.1",
        act_fn="silu",
        sample_size=world.SIZE,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        scaling_factor=round(LATENT_STD / z.std().item(), 5),
    )
    write_network(world.MODEL, "vae", config, vae)


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
    words = [
        *alphabet,
        *(c + "</w>" for c in alphabet),
        *map("".join, merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    files = {
        "vocab.json": json.dumps({word: i for i, word in enumerate(words)}, indent=0),
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
        "tokenizer_config.json": json.dumps(
            dict(
                tokenizer_class="CLIPTokenizer",
                model_max_length=77,
                bos_token="<|startoftext|>",
                errors="replace",
                eos_token="<|endoftext|>",
                pad_token="<|endoftext|>",
                unk_token="<|endoftext|>",
            ),
            indent=2,
        ),
    }
    for name, text in files.items():
        if not text.endswith("\n"):
            text += "\n"
        write_text(folder / "tokenizer" / name, text)
    return len(words)


def train_text(world, machine, size=256, lr=2e-3):
    """The text encoder, for a minute: which words describe an image with this caption?"""
    settings = SETTINGS[world.NAME]
    torch.manual_seed(1)
    vocab_size = write_tokenizer(world.MODEL, world.WORDS)
    tokenizer = weights.load_tokenizer(world.MODEL)
    values = [len(words) for words in world.ATTRIBUTES.values()]
    text = CLIPText(vocab_size, **text_config(settings))
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

    fit(
        f"{world.NAME}/text",
        module,
        loss,
        [dict(params=module.parameters(), lr=lr)],
        settings.steps["text"],
        average=0.98,
        machine=machine._replace(bf16=False),
    )
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
    encoded = []
    for i in range(0, n, 100):  # the first hundred tell whether the stored latents still fit
        images = [world.draw(scene, rng) for scene in scenes[i : i + 100]]
        encoded.append(vae.encode(probe.to_tensor(images)).half())
        if i == 0 and file.exists():
            z = weights.read(file)[0]["z"]
            same_shape = z.shape == (n, *encoded[0].shape[1:])
            if same_shape and torch.allclose(z[: len(images)], encoded[0], atol=0.01):
                return scenes, z
    z = torch.cat(encoded)
    weights.save(file, {"z": z})
    return scenes, z


def train_unet(world, machine, size=48):
    """The UNet and the text encoder: predict the noise from the caption."""
    settings = SETTINGS[world.NAME]
    text, tokenizer = train_text(world, machine), weights.load_tokenizer(world.MODEL)
    torch.manual_seed(2)
    scenes, z_all = latents(world)
    unet = UNet(**unet_config(settings)).to(machine.device, memory_format=torch.channels_last)
    module = torch.nn.ModuleDict({"unet": unet, "text": text})
    noise_estimate = torch.compile(unet) if machine.compiled else unet  # the same weights
    tokenizer_lock = Lock()  # two threads may not use it at the same time
    scheduler = DDIM(50)  # only its noise schedule is used
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod) * LATENT_STD**2
    weight_at = WEIGHTINGS[settings.weighting](snr)
    batches = settings.batches * settings.steps["unet"]  # in the whole training

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
    if settings.muon:
        muon, groups = with_muon(module, lr)
    else:
        muon = None
        groups = [
            dict(params=unet.parameters(), lr=lr),
            dict(params=text.parameters(), lr=0.4 * lr),
        ]
    fit(
        f"{world.NAME}/unet",
        module,
        loss,
        groups,
        settings.steps["unet"],
        average=0.999,
        schedule=SCHEDULES[settings.schedule],
        write=lambda averaged: write_model(world, averaged),
        machine=machine,
        batches=settings.batches,
        muon=muon,
    )


def write_model(world, module):
    """All of the model folder but the autoencoder and the model card."""
    folder, settings = world.MODEL, SETTINGS[world.NAME]
    vocab_size = len(weights.load_tokenizer(folder))  # train_text has written it
    write_network(
        folder,
        "unet",
        unet_config(settings)
        | dict(
            _class_name="UNet2DConditionModel",
            _diffusers_version="0.42.1",
            sample_size=world.SIZE // 2 ** (len(settings.vae_widths) - 1),
            act_fn="silu",
            flip_sin_to_cos=True,
            freq_shift=0,
            norm_eps=1e-5,
            downsample_padding=1,
            mid_block_scale_factor=1,
        ),
        module["unet"],
    )
    write_network(
        folder,
        "text_encoder",
        text_config(settings)
        | dict(
            architectures=["CLIPTextModel"],
            model_type="clip_text_model",
            hidden_act="quick_gelu",
            dtype="float32",
            layer_norm_eps=1e-5,
            max_position_embeddings=77,
            projection_dim=settings.text_width,
            vocab_size=vocab_size,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        ),
        module["text"],
    )
    scheduler = dict(
        _class_name=settings.sampler,
        _diffusers_version="0.42.1",
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        trained_betas=None,
        clip_sample=False,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )
    if settings.sampler == "PNDMScheduler":
        scheduler["skip_prk_steps"] = True
    index = dict(
        _class_name="StableDiffusionPipeline",
        _diffusers_version="0.42.1",
        unet=["diffusers", "UNet2DConditionModel"],
        vae=["diffusers", "AutoencoderKL"],
        text_encoder=["transformers", "CLIPTextModel"],
        tokenizer=["transformers", "CLIPTokenizer"],
        scheduler=["diffusers", settings.sampler],
        feature_extractor=[None, None],
        safety_checker=[None, None],
        image_encoder=[None, None],
        requires_safety_checker=False,
    )
    for name, config in (
        ("scheduler/scheduler_config.json", scheduler),
        ("model_index.json", index),
    ):
        write_text(folder / name, json.dumps(config, indent=2) + "\n")


# The UNet's stage trains the text encoder first.
STAGES = {"vae": train_vae, "unet": train_unet}


def main():
    parser = Parser("python -m toy.pretrain", description=__doc__.split("\n\n")[0])
    parser.add_argument("world", choices=SETTINGS)
    parser.add_argument("stages", nargs="*", help=f"some of {', '.join(STAGES)}; default: all")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="mixed precision, for GPUs and for CPUs with AMX (Sapphire Rapids and later)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the UNet (torch.compile, needs g++): minutes at first, then faster steps",
    )
    args = parser.parse_args()
    for stage in args.stages:
        if stage not in STAGES:
            parser.error(f"there is no stage {stage}: choose from {', '.join(STAGES)}")
    return run_command(pretrain, args, "the same command continues")


def pretrain(args):
    machine = Machine(pick_device(args.device), args.bf16, args.compile)
    for stage in args.stages or STAGES:
        STAGES[stage](worlds.WORLDS[args.world], machine)


if __name__ == "__main__":
    sys.exit(main())
