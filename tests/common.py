"""What the tests share: small networks, their twins in diffusers and transformers, and comparisons.

A twin is the same network in diffusers or transformers, with the same tensors. A comparison
computes the same thing with both. It returns the relative error, or raises AssertionError.
test_parity and test_sampling check that each comparison is below TOLERANCE. test_mistakes adds
one mistake to our code at a time and checks that a comparison fails.
"""

import errno
import importlib
import inspect
import json
import math
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
)

import clip_text
import guidance
import presets
import scheduler
import sdd
import unet
import vae
import weights
from support.cli import run_command
from support.files import checksum
from toy import shapes
from toy.pretrain import write_tokenizer

ROOT = Path(__file__).parent.parent
# The words of the README's prompts for Stable Diffusion
SD_WORDS = " ".join([*presets.I2P, *presets.PREVIEW_PROMPTS]).split()

# Both sides compute the same float32 operations, a few of them in another order. One rounding is
# 6e-8. We measured errors from 0 (the same bits) to 1e-6. The smallest mistake in test_mistakes
# makes an error of 1.4e-4.
TOLERANCE = 1e-5

# ---------------------------------------------------------------------- sizes
DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
# Arguments for unet.UNet and for diffusers' UNet2DConditionModel. The first one has 4 or 8
# channels per head, the second one 8, 16 or 32. Neither equals its number of heads everywhere.
UNETS = {
    "8 heads, cross first": dict(
        block_out_channels=[32, 64, 64, 64],
        attention_head_dim=8,
        cross_attention_dim=24,
        norm_num_groups=8,
        down_block_types=[CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
        up_block_types=[UP, CROSS_UP, CROSS_UP, CROSS_UP],
    ),
    "2 heads, plain first": dict(
        block_out_channels=[16, 32, 32, 64],
        attention_head_dim=2,
        cross_attention_dim=40,
        norm_num_groups=4,
        down_block_types=[DOWN, CROSS_DOWN, DOWN, CROSS_DOWN],
        up_block_types=[CROSS_UP, UP, CROSS_UP, UP],
    ),
}
VAE = dict(
    block_out_channels=[16, 32, 32], layers_per_block=1, norm_num_groups=8, latent_channels=4
)
TEXT = dict(
    vocab_size=99, hidden_size=24, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2
)
SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    set_alpha_to_one=False,
    skip_prk_steps=True,
)  # SD 1.4's scheduler_config.json


# ---------------------------------------------------------------------- numbers
def relative(a, b):
    """‖a − b‖ / ‖b‖, in float64 so that the measure itself does not round."""
    a, b = a.detach().double(), b.detach().double()
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    return ((a - b).norm() / b.norm()).item()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomise(module, seed=0, gain=1.0):
    """Fills *every* tensor of a module with random numbers. Activations stay near 1.

    Fresh norms have weight 1 and bias 0. With these, swapped norms would pass. So norms get random
    numbers, too.
    gain: a factor on all other weights. With 3e-3, the inputs of the norms have a variance of about
    1e-5, which is as small as their eps. Then a wrong eps makes a visible error.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in module.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))]
    norm_scales = {id(m.weight): 0.3 for m in norms} | {id(m.bias): 0.2 for m in norms}
    for p in module.parameters():
        if id(p) in norm_scales:
            scale = norm_scales[id(p)]
        elif p.dim() == 1:
            scale = 0.2 * gain  # a bias
        elif p.dim() == 2 and p.shape[0] > 40_000:
            scale = gain  # SD 1.4's token embedding, which is no matrix product
        else:
            scale = gain / math.sqrt(p[0].numel())
        p.normal_(0, scale, generator=generator)
    for m in norms:
        m.weight += 1
    return module


# ---------------------------------------------------------------------- twins
def unet_twin(**sizes):
    sizes = dict(cross_attention_dim=768) | sizes  # diffusers' default is SD 2's
    return UNet2DConditionModel(**sizes)


def vae_twin(**sizes):
    sizes = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2) | sizes
    n = len(sizes["block_out_channels"])
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * n,
        up_block_types=["UpDecoderBlock2D"] * n,
        **sizes,
    )


def text_twin(**sizes):
    sd14 = dict(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    )
    sizes = sd14 | sizes
    end = sizes["vocab_size"] - 1
    config = CLIPTextConfig(
        hidden_act="quick_gelu",
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
        **sizes,
    )
    return CLIPTextModel(config)


# Name of a network -> (our class, the twin). A lambda looks the class up when it is called, so
# that test_mistakes can replace it.
TWINS = {
    "unet": (lambda **sizes: unet.UNet(**sizes), unet_twin),
    "vae": (lambda **sizes: vae.VAE(**sizes), vae_twin),
    "text_encoder": (lambda **sizes: clip_text.CLIPText(**sizes), text_twin),
}


def empty_pair(network, **sizes):
    """Our network and its twin, on the meta device: names and shapes, no numbers."""
    make_ours, make_theirs = TWINS[network]
    with torch.device("meta"):
        return make_ours(**sizes), make_theirs(**sizes)


def their_names(state, theirs):
    """Our state dict with the twin's names.

    transformers 5 leaves out the `text_model.` in front of the names in SD 1.4's files.
    """
    if any(name.startswith("text_model.") for name in theirs.state_dict()):
        return dict(state)
    return {name.removeprefix("text_model."): x for name, x in state.items()}


def pair(network, seed=0, gain=1.0, **sizes):
    """Our network with random numbers, and its twin with the very same tensors."""
    ours, theirs = empty_pair(network, **sizes)
    randomise(ours.to_empty(device="cpu"), seed, gain)
    theirs.load_state_dict(their_names(ours.state_dict(), theirs), strict=True, assign=True)
    if network == "text_encoder":
        # The twin has a table of positions that is in no file.
        embeddings = getattr(theirs, "text_model", theirs).embeddings
        length = embeddings.position_embedding.num_embeddings
        embeddings.position_ids = torch.arange(length)[None]
    return ours.eval(), theirs.eval()


# ---------------------------------------------------------------------- planted mistakes
def plant(monkeypatch, module, changes):
    """Runs the source of one of our modules again, with changes = {right text: wrong text}."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    for right, wrong in changes.items():
        assert right in source, f"{module.__name__}.py does not contain {right!r}"
        source = source.replace(right, wrong)
    names = {"__name__": module.__name__}
    exec(source, names)
    for name, value in names.items():
        monkeypatch.setattr(module, name, value, raising=False)


# ---------------------------------------------------------------------- comparisons: UNet
def unet_error(gain=1.0, name="8 heads, cross first", size=(15, 13)):
    """Three latents, each with its own timestep and prompt.

    With odd sizes, upsampling must go to the size of the skip.
    """
    sizes = UNETS[name]
    ours, theirs = pair("unet", gain=gain, **sizes)
    z = randn(3, 4, *size)
    t = torch.tensor([999, 1, 500])
    context = randn(3, 7, sizes["cross_attention_dim"], seed=1)
    return relative(ours(z, t, context), theirs(z, t, context).sample)


UNET_PARTS = {
    "resnet": "down_blocks.1.resnets.0",
    "resnet, same width": "down_blocks.1.resnets.1",
    "transformer": "down_blocks.1.attentions.0",
    "transformer block": "down_blocks.1.attentions.0.transformer_blocks.0",
    "self-attention": "down_blocks.1.attentions.0.transformer_blocks.0.attn1",
    "cross-attention": "down_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "feed-forward": "down_blocks.1.attentions.0.transformer_blocks.0.ff",
    "downsample": "down_blocks.1.downsamplers.0",
    "upsample": "up_blocks.0.upsamplers.0",
    "time embedding": "time_embedding",
}  # both sides have the same names


def unet_part(part, scale=1.0):
    """One part alone, with inputs of size `scale`. With 3e-3, the eps of a norm matters."""
    ours, theirs = (
        net.get_submodule(UNET_PARTS[part]) for net in pair("unet", **UNETS["8 heads, cross first"])
    )
    x = scale * randn(2, 64, 8, 6)  # (B, C, H, W)
    positions = x.flatten(2).transpose(1, 2)  # (B, N, C)
    emb = randn(2, 128, seed=1)
    context = randn(2, 7, 24, seed=2)  # (B, L, D)
    inputs = {
        "resnet": (x[:, :32], emb),
        "resnet, same width": (x, emb),
        "transformer": (x, context),
        "transformer block": (positions, context),
        "self-attention": (positions,),
        "cross-attention": (positions, context),
        "feed-forward": (positions,),
        "downsample": (x,),
        "upsample": (x, (15, 11)),
        "time embedding": (x[:, :32, 0, 0],),
    }[part]
    if part == "transformer block":  # the second argument of diffusers' block is a mask
        expected = theirs(positions, encoder_hidden_states=context)
    else:
        expected = theirs(*inputs)
    expected = getattr(expected, "sample", expected)
    return relative(ours(*inputs), expected)


def timestep_error():
    """Our sinusoids against the twin's `time_proj`, which follows SD 1.4's config."""
    t = torch.tensor([0, 1, 10, 500, 999])
    _, theirs = pair("unet", **UNETS["8 heads, cross first"])
    return relative(unet.timestep_embedding(t, 32), theirs.time_proj(t))


# ---------------------------------------------------------------------- comparisons: VAE
def vae_error(way, gain=1.0):
    """way: `moments` or `encode` (the scaled mean) of images, or `decode` of latents.

    The images are not square, so that exchanged height and width fail.
    """
    ours, theirs = pair("vae", gain=gain, **VAE)
    x = randn(2, 3, 32, 24)
    z = randn(2, 4, 8, 6)
    scale = theirs.config.scaling_factor
    if way == "moments":
        posterior = theirs.encode(x).latent_dist
        return relative(torch.cat(ours.moments(x)), torch.cat([posterior.mean, posterior.logvar]))
    if way == "encode":
        return relative(ours.encode(x), scale * theirs.encode(x).latent_dist.mean)
    return relative(ours.decode(z), theirs.decode(z / scale).sample)


VAE_PARTS = {
    "resnet": "encoder.down_blocks.1.resnets.0",
    "resnet, same width": "encoder.mid_block.resnets.0",
    "attention": "encoder.mid_block.attentions.0",
    "downsample": "encoder.down_blocks.1.downsamplers.0",
    "upsample": "decoder.up_blocks.0.upsamplers.0",
}


def vae_part(part, scale=1.0):
    """One part alone, with inputs of size `scale`. With 3e-3, the eps of a norm matters."""
    ours, theirs = (net.get_submodule(VAE_PARTS[part]) for net in pair("vae", **VAE))
    x = scale * randn(2, 32, 8, 6)
    if part == "resnet":
        x = x[:, :16]
    if "resnet" in part:  # diffusers' ResNets take a timestep, which the VAE has not
        return relative(ours(x), theirs(x, None))
    return relative(ours(x), theirs(x))


# ---------------------------------------------------------------------- comparisons: text
def padded_tokens(vocab_size, length=77):
    """Two prompts of 5 and 29 words: start, words, then end of text up to the end. (2, length)"""
    start, end = vocab_size - 2, vocab_size - 1
    tokens = torch.full((2, length), end)
    tokens[:, 0] = start
    tokens[0, 1:6] = torch.arange(5)
    tokens[1, 1:30] = torch.arange(29)
    return tokens


def text_error(gain=1.0):
    ours, theirs = pair("text_encoder", gain=gain, **TEXT)
    tokens = padded_tokens(TEXT["vocab_size"])
    return relative(ours(tokens), theirs(tokens).last_hidden_state)


def text_layer_error():
    """One layer alone. The twin gets the causal mask: −∞ where a token would look ahead."""
    ours, theirs = pair("text_encoder", **TEXT)
    x = randn(2, 77, 24)
    mask = torch.full((77, 77), -torch.inf).triu(1)[None, None]
    expected = getattr(theirs, "text_model", theirs).encoder.layers[1](x, mask)
    if isinstance(expected, tuple):
        expected = expected[0]
    return relative(ours.text_model.encoder["layers"][1](x), expected)


def padding():
    """`clip_text.tokenize` gives the ids that StableDiffusionPipeline uses. Returns 0 or raises."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), shapes.WORDS)
        tokenizer = CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer")
    prompts = ["a red star", "", "the picture of a blue moon on snow"]
    ids, cut = clip_text.tokenize(tokenizer, prompts)
    expected = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True
    )
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids.tolist() == expected.input_ids
    assert ids[1].tolist() == [start, *[end] * 76]  # the empty prompt
    assert cut == [False] * 3
    return 0.0


# ---------------------------------------------------------------------- comparisons: eps
def same_eps(network):
    """At SD 1.4's size, every norm has the eps of its twin. Returns 0 or raises."""
    ours, theirs = empty_pair(network)
    our_eps = {name: m.eps for name, m in ours.named_modules() if hasattr(m, "eps")}
    their_eps = {name: m.eps for name, m in theirs.named_modules() if hasattr(m, "eps")}
    assert their_names(our_eps, theirs) == their_eps
    return 0.0


# ---------------------------------------------------------------------- comparisons: sampling
def their_scheduler(kind, steps):
    """diffusers' scheduler with SD 1.4's config."""
    theirs = PNDMScheduler(**SCHEDULER)
    if kind == "ddim":  # SD 1.4's config has no `clip_sample`, and diffusers' default is True
        theirs = DDIMScheduler.from_config(theirs.config, clip_sample=False)
    theirs.set_timesteps(steps)
    return theirs


def timesteps(kind, steps):
    """Our sampler visits diffusers' timesteps, then 0, the end. Returns 0 or raises."""
    expected = [*their_scheduler(kind, steps).timesteps.tolist(), 0]
    assert scheduler.SAMPLERS[kind](steps).timesteps == expected
    return 0.0


def trajectory_error(kind, steps, s=7.5):
    """All steps with classifier-free guidance, against the loop of diffusers' pipeline."""
    ours, theirs = pair("unet", **UNETS["2 heads, plain first"])
    z_T = 1.5 * randn(2, 4, 8, 6)
    c_0, c_p = randn(1, 7, 40, seed=1), randn(1, 7, 40, seed=2)
    estimate = guidance.cfg(ours, c_0, c_p, s)
    result = guidance.sample(estimate, scheduler.SAMPLERS[kind](steps), z_T)

    z = z_T
    sampler = their_scheduler(kind, steps)
    context = torch.cat([c_0, c_0, c_p, c_p])
    for t in sampler.timesteps:
        e_0, e_p = theirs(torch.cat([z, z]), t, context).sample.chunk(2)
        z = sampler.step(e_0 + s * (e_p - e_0), t, z).prev_sample
    return relative(result, z)


SCHEDULES = {  # of the learning rate: (optimizer, warmup, iterations) -> transformers' scheduler
    "cosine": get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warmup, _: get_constant_schedule_with_warmup(optimizer, warmup),
}


# ---------------------------------------------------------------------- a model folder
def write_vocabulary(path, words):
    """Writes the toy model's tokenizer with additional `words`, one token each, as CLIP has them.

    Returns the size of the vocabulary.
    """
    return write_tokenizer(path, sorted({*shapes.WORDS, *words}))


def write_model_folder(path, words=(), **unet_sizes):
    """Writes a tiny model with random weights, saved by diffusers. Returns its path.

    It has the tokenizer files of 2022 and SD 1.4's scheduler.
    """
    path = Path(path)
    vocab_size = write_vocabulary(path, words)
    unet_sizes = UNETS["2 heads, plain first"] | dict(sample_size=8) | unet_sizes
    text_sizes = TEXT | dict(vocab_size=vocab_size, hidden_size=unet_sizes["cross_attention_dim"])
    with torch.device("meta"):  # SD 1.4's size is not filled twice
        unet = unet_twin(**unet_sizes)
    StableDiffusionPipeline(
        unet=randomise(unet.to_empty(device="cpu"), 1),
        vae=randomise(vae_twin(**VAE, sample_size=32), 2),
        text_encoder=randomise(text_twin(**text_sizes), 3),
        tokenizer=CLIPTokenizer.from_pretrained(path / "tokenizer"),
        scheduler=PNDMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    # transformers 5 wrote tokenizer.json. SD 1.4's folder has vocab.json and merges.txt.
    shutil.rmtree(path / "tokenizer")
    write_vocabulary(path, words)
    return path


# ---------------------------------------------------------------------- commands
# A short training on the toy model. Add --concept.
SHORT = (
    "train.py --model toy --device cpu --iters 6 --warmup 2 --steps 3 --batch-size 2 "
    "--save-every 2 --preview-every 3 --preview-steps 2"
)


def command(words, out=None, **options):
    """(exit status, stdout, stderr) of `python WORDS`, a process in the repository's folder."""
    words = [sys.executable, *shlex.split(words), *(["--out", str(out)] if out else [])]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=400, **options)
    return done.returncode, done.stdout, done.stderr


def run(line, out=None):
    """The exit status of a command in this process, for example of `train.py --model toy`.

    out: the path of --out. A module has its dotted name: `tools.convert --model toy`.
    """
    script, *words = shlex.split(line)
    name = script.removesuffix(".py")
    module = importlib.import_module(name)
    short = {"eval": "evaluate"}.get(name, name.rpartition(".")[2])
    main = getattr(module, "main", None) or getattr(module, short)
    try:
        args = module.parse([*words, *(["--out", str(out)] if out else [])])
    except SystemExit as e:  # the parser's own errors
        return e.code
    with torch.enable_grad():
        return run_command(main, args, gpus=None if name == "eval" else 1)


def pictures(folder):
    """The images of generate.py, (n, H, W, 3), as numbers that can be subtracted."""
    files = sorted(Path(folder).glob("[0-9]*.png"))
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in files])


def contents(folder):
    """{file: its content} of a folder or file, without dates, times and the folder's name.

    Of weights it is the checksum and the metadata, because their bytes have no fixed order.
    """
    found = {}
    for file in [folder, *folder.rglob("*")]:
        if file.is_dir():
            continue
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            tensors, metadata = weights.read(file)
            content = checksum(tensors), metadata
        if file.suffix == ".html":  # it says when it was made, where, and how long training took.
            # After a kill between the last checkpoint and run.json, nobody knows how long.
            content = content.decode().replace(str(folder), "FOLDER")
            content = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "DATE", content)
            content = re.sub(r"\d+ iterations in (\d+\smin\s)?\d+\ss", "TIME", content)
            content = re.sub(r"(\d+) of \1 iterations", "TIME", content)
        if file.name == "run.json":
            content = json.loads(content)
            for key in ("training", "command", "date"):  # how long it took, and the test's name
                content.pop(key, None)
        found[file.relative_to(folder).as_posix()] = content
    return found


def differences(a, b):
    """The names of the files in which two folders differ."""
    a, b = contents(a), contents(b)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


# ---------------------------------------------------------------------- trainings
STOPS = {
    "Ctrl-C": signal.SIGINT,
    "SIGTERM": signal.SIGTERM,
    "full memory": torch.OutOfMemoryError("CUDA out of memory"),
    "full disk": OSError(errno.ENOSPC, "No space left on device"),
}


@contextmanager
def stopped(how, where, number):
    """Stops a command before a call of a function: where="ema.update", number=3: the third call."""
    function, calls = pkgutil.resolve_name(where), []

    def counted(*given, **named):
        calls.append(1)
        if len(calls) == number:
            if isinstance(STOPS[how], Exception):
                raise STOPS[how]
            signal.raise_signal(STOPS[how])
        return function(*given, **named)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, counted)
        yield
    assert len(calls) >= number, f"{where} was called {len(calls)} times"


class Captured(Exception):
    """Ends train.main, when all is ready for the loop."""


def training(line, out):
    """What train.py passes to sdd.sdd, as {argument: value}: a training to drive step by step."""
    found = {}

    def capture(*given, **named):
        found.update(inspect.signature(sdd.sdd).bind(*given, **named).arguments)
        raise Captured

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Captured):
        patch.setattr("train.sdd", capture)
        run(f"{line} --preview-every 0", out)
    return found


def trained(loop):
    """θ of a `training`, in the order of theta_ema."""
    return [p for group in loop["optimizer"].param_groups for p in group["params"]]


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


HALVES = pytest.mark.parametrize(
    "dtype, loss, norm, cosine, z", [("bf16", 0.4, 0.2, 0.8, 0.5), ("fp16", 0.05, 0.2, 0.8, 0.1)]
)


@torch.enable_grad()
def follows_fp32(line, out, dtype, loss, norm, cosine, z):
    """Three iterations in half precision next to fp32, as on a GPU.

    Frozen tensors and sampling are in half precision; the loss is under autocast. Each iteration
    starts from the weights and z_t of fp32. The z_t that half precision samples itself is compared
    on its own. The loss is the square of a small difference of two estimates, so their rounding
    (2^-9 in bf16, 2^-12 in fp16) counts. The bounds are about twice what 100 iterations on the CPU
    showed (five seeds of 20): the loss up to 22 % off in bf16 (1 % in fp16), the gradient's norm
    8 % (5 %), its cosine at least 0.949 (0.946), z_t 22 % (2 %).
    """
    full, half = (
        training(f"{line} --warmup 0 --ema 0.999 --dtype {name}", out / name)
        for name in ("fp32", dtype)
    )
    theta, theta_full = trained(half), trained(full)
    before, sampled = flat(theta), []  # fp32's z_t
    full_loss, half_loss = full["loss"], half["loss"]

    def keep_latents(z_t, **batch):
        sampled.append(z_t)
        return full_loss(z_t=z_t, **batch)

    def compare_latents(z_t, **batch):
        assert relative(z_t.float(), sampled[-1]) < z
        return half_loss(z_t=sampled[-1], **batch)

    full["loss"], half["loss"] = keep_latents, compare_latents
    grads, half_grads = watch_gradients(full), watch_gradients(half)
    iterations, half_iterations = sdd.sdd(**full), sdd.sdd(**half)
    half_dtype = half["teacher"].dtype
    for i in range(3):
        with torch.no_grad():
            torch._foreach_copy_(theta, theta_full)
        a = next(iterations)
        with torch.autocast(half["teacher"].device.type, half_dtype, cache_enabled=False):
            b = next(half_iterations)
        assert b.loss == pytest.approx(a.loss, rel=loss) and b.loss != a.loss
        # Neither the norm nor AdamW sees the factor of the GradScaler.
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=norm)
        assert nn.functional.cosine_similarity(grads[i], half_grads[i], dim=0) > cosine
    assert all(x.dtype == torch.float32 for x in [*theta, *half["theta_ema"], *half_grads])
    own = {id(p) for p in theta}
    frozen = [p for name, p in half["student"].named_parameters() if "norm" not in name]
    frozen = [p for p in frozen if id(p) not in own]  # on CUDA norms stay in float32
    assert frozen and all(p.dtype == half_dtype != torch.float32 for p in frozen)
    moved, average = flat(theta) - before, flat(half["theta_ema"]) - before
    assert nn.functional.cosine_similarity(moved, average, dim=0) > 0.5
    assert (average != 0).float().mean() > 0.9


def watch_gradients(loop):
    """A list that receives the flat gradient of each step of a `training`."""
    seen, theta = [], trained(loop)
    loop["optimizer"].register_step_pre_hook(lambda *_: seen.append(flat(p.grad for p in theta)))
    return seen
