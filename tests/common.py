"""What the tests share: tiny networks, their twins in diffusers and transformers, and the comparisons between the two.

A comparison takes no argument (or a name) and returns a relative error or raises AssertionError. test_parity and
test_sampling ask that each is green; test_mistakes plants historical mistakes and asks that they turn red.
"""

import math
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import clip_text
import guidance
import presets
import scheduler
import unet
import vae
from toy import shapes
from toy.pretrain import write_tokenizer

SD_WORDS = " ".join(
    [*presets.I2P, *presets.PREVIEW_PROMPTS["paper"]]
).split()  # what the README asks of Stable Diffusion

# Both sides run the same float32 operations, a few in another order. A rounding is 6e-8; errors of 0 (the same kernels in the
# same order, bit for bit) to 1e-6 were measured, and the smallest of the mistakes in test_mistakes.py makes 1.4e-4.
TOLERANCE = 1e-5

DOWN, CROSS_DOWN, UP, CROSS_UP = (
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "UpBlock2D",
    "CrossAttnUpBlock2D",
)
UNETS = {  # the arguments of unet.UNet and of UNet2DConditionModel; channels a head: 4 and 8, 16 and 32
    "8 heads, cross first": dict(
        block_out_channels=[32, 64, 64],
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=24,
        norm_num_groups=8,
        down_block_types=[CROSS_DOWN, CROSS_DOWN, DOWN],
        up_block_types=[UP, CROSS_UP, CROSS_UP],
    ),
    "2 heads, plain first": dict(
        block_out_channels=[16, 32, 64],
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=40,
        norm_num_groups=4,
        down_block_types=[DOWN, CROSS_DOWN, CROSS_DOWN],
        up_block_types=[CROSS_UP, CROSS_UP, UP],
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


# ------------------------------------------------------------------------------------------------ numbers
def relative(a, b):
    """‖a − b‖ / ‖b‖ in float64, so that the measure adds no rounding of its own."""
    a, b = a.detach().double(), b.detach().double()
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    return ((a - b).norm() / b.norm()).item()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomise(module, seed=0, gain=1.0):
    """Random numbers in *every* tensor (fresh norms are 1 and 0, so that swapped ones would pass); activations stay of order 1.

    A `gain` of 3e-3 makes what every norm reads as small as its eps (variance 1e-5), so that a wrong eps shows.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in module.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))]
    scales = {id(m.weight): 0.3 for m in norms} | {id(m.bias): 0.2 for m in norms}
    for p in module.parameters():
        fan_in = p[0].numel() if p.dim() > 1 else 25  # biases: 0.2
        fan_in = (
            1 if p.dim() == 2 and p.shape[0] > 40_000 else fan_in
        )  # SD 1.4's token embedding is no matrix product
        p.normal_(0, scales.get(id(p), gain / math.sqrt(fan_in)), generator=generator)
    for m in norms:
        m.weight += 1
    return module


# ------------------------------------------------------------------------------------------------ twins
def text_twin(**sizes):
    sizes = (
        dict(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
        )
        | sizes
    )
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_act="quick_gelu",
            bos_token_id=sizes["vocab_size"] - 2,
            eos_token_id=sizes["vocab_size"] - 1,
            pad_token_id=sizes["vocab_size"] - 1,
            **sizes,
        )
    )


def unet_twin(**sizes):
    sizes = dict(cross_attention_dim=768) | sizes  # diffusers' default is SD 2's
    return UNet2DConditionModel(**sizes)


def vae_twin(**sizes):
    sizes = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2) | sizes
    levels = len(sizes["block_out_channels"])
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        **sizes,
    )


TWINS = {
    "unet": (lambda **sizes: unet.UNet(**sizes), unet_twin),
    "vae": (lambda **sizes: vae.VAE(**sizes), vae_twin),
    "text_encoder": (lambda **sizes: clip_text.CLIPText(**sizes), text_twin),
}  # lambdas: a planted class is seen


def their_names(state, theirs):
    """Our state with the twin's names: transformers 5 leaves out the `text_model.` of SD 1.4's files."""
    prefix = (
        "" if any(name.startswith("text_model.") for name in theirs.state_dict()) else "text_model."
    )
    return {name.removeprefix(prefix): x for name, x in state.items()}


def pair(network, seed=0, gain=1.0, **sizes):
    """Our network filled at random, and its twin that holds the very same tensors."""
    with torch.device("meta"):  # no memory and no time for numbers that nobody will see
        ours, theirs = (make(**sizes) for make in TWINS[network])
    randomise(ours.to_empty(device="cpu"), seed, gain)
    theirs.load_state_dict(their_names(ours.state_dict(), theirs), strict=True, assign=True)
    if network == "text_encoder":
        embeddings = theirs.get_submodule(
            "text_model.embeddings" if hasattr(theirs, "text_model") else "embeddings"
        )
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[
            None
        ]  # in no file
    return ours.eval(), theirs.eval()


# ------------------------------------------------------------------------------------------------ comparisons: networks
def unet_error(name="8 heads, cross first", size=(15, 13), gain=1.0):
    """Batch 3 with a timestep each. Odd sizes: up-sampling has to go to the skip's size."""
    sizes = UNETS[name]
    ours, theirs = pair("unet", gain=gain, **sizes)
    z, t, context = (
        randn(3, 4, *size),
        torch.tensor([999, 1, 500]),
        randn(3, 7, sizes["cross_attention_dim"], seed=1),
    )
    return relative(ours(z, t, context), theirs(z, t, context).sample)


def shared_prompts_error():
    """Ours with 2 prompts for 6 latents, the first three and the last three; theirs needs a row for each."""
    sizes = UNETS["8 heads, cross first"]
    ours, theirs = pair("unet", **sizes)
    z, t, c = (
        randn(6, 4, 15, 13),
        torch.tensor([999, 1, 500, 20, 700, 981]),
        randn(2, 7, sizes["cross_attention_dim"], seed=1),
    )
    return relative(ours(z, t, c), theirs(z, t, c.repeat_interleave(3, 0)).sample)


def unet_levels(net):
    """The parts of a UNet of ours or theirs that `unet_part` compares; both have the same names."""
    level = net.down_blocks[1]
    block = level.attentions[0].transformer_blocks[0]
    return {
        "resnet": level.resnets[0],
        "resnet, same width": level.resnets[1],
        "transformer": level.attentions[0],
        "transformer block": block,
        "self-attention": block.attn1,
        "cross-attention": block.attn2,
        "feed-forward": block.ff,
        "downsample": level.downsamplers[0],
        "upsample": net.up_blocks[0].upsamplers[0],
        "time embedding": net.time_embedding,
    }


UNET_PARTS = (
    "resnet",
    "resnet, same width",
    "transformer",
    "transformer block",
    "self-attention",
    "cross-attention",
    "feed-forward",
    "downsample",
    "upsample",
    "time embedding",
)


def unet_part(part, scale=1.0):
    """One block alone. A `scale` of 3e-3 makes inputs of variance 1e-5, where a norm's eps counts."""
    ours, theirs = (unet_levels(net)[part] for net in pair("unet", **UNETS["8 heads, cross first"]))
    x, emb, context = scale * randn(2, 64, 8, 6), randn(2, 128, seed=1), randn(2, 7, 24, seed=2)
    places = x.flatten(2).transpose(1, 2)
    inputs = {
        "resnet": (x[:, :32], emb),
        "resnet, same width": (x, emb),
        "transformer": (x, context),
        "transformer block": (places, context),
        "self-attention": (places,),
        "cross-attention": (places, context),
        "feed-forward": (places,),
        "downsample": (x,),
        "upsample": (x, (15, 11)),
        "time embedding": (x[:, :32, 0, 0],),
    }[part]
    if part == "transformer block":  # diffusers has a mask as the second argument
        expected = theirs(places, encoder_hidden_states=context)
    else:
        expected = theirs(*inputs)
    return relative(ours(*inputs), getattr(expected, "sample", expected))


def timestep_error():
    """diffusers' sinusoids with SD 1.4's flags: the twin's `time_proj` got them from its config."""
    t = torch.tensor([0, 1, 10, 500, 999])
    _, theirs = pair("unet", **UNETS["8 heads, cross first"])
    return relative(unet.timestep_embedding(t, 32), theirs.time_proj(t))


def vae_error(way, gain=1.0):
    """`moments` or `encode` (the mean, scaled) of pictures, or `decode` of latents; not square."""
    ours, theirs = pair("vae", gain=gain, **VAE)
    x, z, scale = randn(2, 3, 32, 24), randn(2, 4, 8, 6), theirs.config.scaling_factor
    if way == "moments":
        posterior = theirs.encode(x).latent_dist
        return relative(torch.cat(ours.moments(x)), torch.cat([posterior.mean, posterior.logvar]))
    if way == "encode":
        return relative(ours.encode(x), scale * theirs.encode(x).latent_dist.mean)
    return relative(ours.decode(z), theirs.decode(z / scale).sample)


def vae_levels(net):
    level, middle = net.encoder.down_blocks[1], net.encoder.mid_block
    return {
        "resnet": level.resnets[0],
        "resnet, same width": middle.resnets[0],
        "attention": middle.attentions[0],
        "downsample": level.downsamplers[0],
        "upsample": net.decoder.up_blocks[0].upsamplers[0],
    }


VAE_PARTS = ("resnet", "resnet, same width", "attention", "downsample", "upsample")


def vae_part(part, scale=1.0):
    ours, theirs = (vae_levels(net)[part] for net in pair("vae", **VAE))
    x = scale * randn(2, 32, 8, 6)
    x = x[:, :16] if part == "resnet" else x
    return relative(ours(x), theirs(x, None) if "resnet" in part else theirs(x))


def padded_tokens(vocab_size, length=77):
    """Two prompts of other lengths: start, words, then end of text to the end."""
    tokens = torch.full((2, length), vocab_size - 1)
    tokens[:, 0] = vocab_size - 2
    tokens[0, 1:6], tokens[1, 1:30] = torch.arange(5), torch.arange(29)
    return tokens


def text_error(gain=1.0):
    ours, theirs = pair("text_encoder", gain=gain, **TEXT)
    tokens = padded_tokens(TEXT["vocab_size"])
    return relative(ours(tokens), theirs(tokens).last_hidden_state)


def text_layer_error():
    ours, theirs = pair("text_encoder", **TEXT)
    x, mask = (
        randn(2, 77, 24),
        torch.full((77, 77), -torch.inf).triu(1)[None, None],
    )  # −∞ where a token would look ahead
    expected = getattr(theirs, "text_model", theirs).encoder.layers[1](x, mask)
    return relative(
        ours.text_model.encoder.layers[1](x),
        expected[0] if isinstance(expected, tuple) else expected,
    )


def padding():
    """The ids of `clip_text.tokenize` are the ones StableDiffusionPipeline makes; returns 0 or raises."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer = CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer")
    prompts = ["a red star", "", "the picture of a blue moon on snow"]
    ids, cut = clip_text.tokenize(tokenizer, prompts)
    expected = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True
    )
    assert ids.tolist() == expected.input_ids and cut == [False] * 3
    assert ids[1].tolist() == [
        tokenizer.bos_token_id,
        *[tokenizer.eos_token_id] * 76,
    ]  # "": start, then only end of text
    return 0.0


def same_eps(network):
    """Every norm's eps at SD 1.4's size is the twin's; returns 0 or raises, naming the norm."""
    with torch.device("meta"):
        ours, theirs = (make() for make in TWINS[network])
    eps = {name: m.eps for name, m in ours.named_modules() if hasattr(m, "eps")}
    assert eps == {
        name
        if network != "text_encoder" or name.startswith("text_model.")
        else f"text_model.{name}": m.eps
        for name, m in theirs.named_modules()
        if hasattr(m, "eps")
    }
    return 0.0


# ------------------------------------------------------------------------------------------------ comparisons: sampling
def their_scheduler(kind, steps):
    if kind == "pndm":
        theirs = PNDMScheduler(**SCHEDULER)
    else:  # clipping would be on by default where the key is absent, as in SD 1.4's config
        theirs = DDIMScheduler.from_config(PNDMScheduler(**SCHEDULER).config, clip_sample=False)
    theirs.set_timesteps(steps)
    return theirs


def levels(kind, steps):
    """What a sampler visits: diffusers' timesteps, and 0 as the end. Returns 0 or raises."""
    assert scheduler.SAMPLERS[kind](steps).timesteps == [
        *their_scheduler(kind, steps).timesteps.tolist(),
        0,
    ]
    return 0.0


def trajectory_error(kind, steps, s=7.5):
    """A whole picture's worth of steps with guidance, against the classic loop of diffusers' pipeline."""
    sizes = UNETS["2 heads, plain first"]
    ours, theirs = pair("unet", **sizes)
    z, c_0, c_p = 1.5 * randn(2, 4, 8, 6), randn(1, 7, 40, seed=1), randn(1, 7, 40, seed=2)
    result = guidance.sample(guidance.cfg(ours, c_0, c_p, s), scheduler.SAMPLERS[kind](steps), z)

    sampler, context = their_scheduler(kind, steps), torch.cat([c_0, c_0, c_p, c_p])
    for t in sampler.timesteps:
        e_0, e_p = theirs(torch.cat([z, z]), t, context).sample.chunk(2)
        z = sampler.step(e_0 + s * (e_p - e_0), t, z).prev_sample
    return relative(result, z)


# ------------------------------------------------------------------------------------------------ a model folder
def write_vocabulary(path, words):
    """The embedded model's tokenizer with `words` more, each of them one token, as CLIP has them. Returns its size."""
    return write_tokenizer(path, sorted({*shapes.WORDS, *words}))


def write_model_folder(path, words=(), **unet_sizes):
    """A tiny model with random weights, saved by diffusers itself: 2022's tokenizer files, SD 1.4's scheduler. Returns path."""
    path = Path(path)
    vocab_size = write_vocabulary(path, words)
    sizes = UNETS["2 heads, plain first"] | dict(sample_size=8) | unet_sizes
    StableDiffusionPipeline(
        unet=randomise(unet_twin(**sizes), 1),
        vae=randomise(vae_twin(**VAE, sample_size=32), 2),
        text_encoder=randomise(
            text_twin(
                **TEXT | dict(vocab_size=vocab_size, hidden_size=sizes["cross_attention_dim"])
            ),
            3,
        ),
        tokenizer=CLIPTokenizer.from_pretrained(path / "tokenizer"),
        scheduler=PNDMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    shutil.rmtree(
        path / "tokenizer"
    )  # transformers 5 wrote tokenizer.json; SD 1.4's folder has vocab.json and merges.txt
    write_vocabulary(path, words)
    return path
