"""Mistakes that people really made in such code. Each one must make a comparison fail.

A row of MISTAKES has these parts: what is wrong; a function that plants the mistake in our modules
(never in diffusers) with pytest's monkeypatch; and the comparison of common.py that must see it,
with its arguments. The comparison must pass without the mistake and fail with it.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from common import (
    TOLERANCE,
    padding,
    same_eps,
    text_error,
    timestep_error,
    timesteps,
    trajectory_error,
    unet_error,
    unet_part,
    vae_error,
    vae_part,
)
from einops import rearrange

import clip_text
import guidance
import scheduler
import unet
import vae


# ---------------------------------------------------------------------- ways to plant a mistake
def replace(owner, name, wrong):
    """owner.name = wrong."""

    def plant(monkeypatch):
        monkeypatch.setattr(owner, name, wrong)

    return plant


def replace_functional(module, **wrong):
    """Replaces functions of torch.nn.functional in one of our modules only, not in diffusers."""
    return replace(module, "F", SimpleNamespace(**vars(F) | wrong))


def after_init(cls, change):
    """Calls change(self) on every new object of the class."""

    def plant(monkeypatch):
        right = cls.__init__

        def wrong(self, *args, **kwargs):
            right(self, *args, **kwargs)
            change(self)

        monkeypatch.setattr(cls, "__init__", wrong)

    return plant


def set_eps(cls, name, eps):
    """The norm `name` in every new object of the class has another eps."""

    def change(self):
        getattr(self, name).eps = eps

    return after_init(cls, change)


def set_heads(channels_per_head):
    """Attention takes a number for channels per head, and not for the number of heads."""

    def change(self):
        self.heads = self.to_q.in_features // channels_per_head

    return after_init(unet.Attention, change)


def swap(cls, a, b):
    """The forward of the class finds its parts a and b swapped, where they have the same size."""

    def plant(monkeypatch):
        right = cls.forward

        def wrong(self, *args):
            first, second = getattr(self, a), getattr(self, b)
            if first.weight.shape != second.weight.shape:
                return right(self, *args)
            setattr(self, a, second)
            setattr(self, b, first)
            y = right(self, *args)
            setattr(self, a, first)
            setattr(self, b, second)
            return y

        monkeypatch.setattr(cls, "forward", wrong)

    return plant


# ---------------------------------------------------------------------- mistakes in the UNet
def resnet_eps(self):
    self.norm1.eps = 1e-6
    self.norm2.eps = 1e-6


def pad_right_and_bottom(self):
    """Downsampling pads as in the VAE."""
    for downsample in self.downsamplers:
        downsample.conv.padding = 0
        downsample.register_forward_pre_hook(lambda _, args: (F.pad(args[0], (0, 1, 0, 1)),))


def upsample_by_2(x, size, mode):
    return F.interpolate(x, scale_factor=2.0, mode=mode)


def interleaved_heads(x, pattern, **sizes):
    return rearrange(x, pattern.replace("(h d)", "(d h)"), **sizes)


def sin_first(t, width, right=unet.timestep_embedding):
    return right(t, width).roll(width // 2, dims=1)


def freq_shift_1(t, width):
    half = width // 2
    angles = t.float()[:, None] * 10000 ** (-torch.arange(half) / (half - 1))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def tanh_gelu(x):
    return F.gelu(x, approximate="tanh")


def gate_first(self, x):
    gate, x = self.proj(x).chunk(2, dim=-1)
    return x * F.gelu(gate)


# ---------------------------------------------------------------------- mistakes in the VAE
def pad_all_sides(self):
    """Downsampling pads as in the UNet."""
    for downsample in self.downsamplers:
        downsample.pad = torch.nn.ZeroPad2d(1)


def no_scaling(self):
    self.scaling_factor = 1.0


# ---------------------------------------------------------------------- mistakes in the text model
def no_mask(q, k, v, is_causal):
    return F.scaled_dot_product_attention(q, k, v)


def no_final_norm(self, tokens):
    x = self.embeddings(tokens)
    for layer in self.encoder["layers"]:
        x = layer(x)
    return x


def padded_with_0(tokenizer, prompts, right=clip_text.tokenize):
    ids, cut = right(tokenizer, prompts)
    after_the_end = (ids == tokenizer.eos_token_id).cumsum(1) > 1
    return ids.masked_fill(after_the_end, 0), cut


# ---------------------------------------------------------------------- mistakes in the samplers
def linear_betas(self):
    self.alphas_cumprod = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), dim=0)


def no_offset(self):
    self.timesteps = [max(t - 1, 0) for t in self.timesteps]


def trailing_spacing(self):
    steps = 1000 // self.stride
    self.timesteps = [999 - self.stride * i for i in range(steps)] + [0]


def alpha_one(self, t):
    return self.alphas_cumprod[t] if t >= 0 else torch.tensor(1.0)


def clipped_step(self, z, e, i):
    alpha = self.alpha(self.timesteps[i])
    alpha_next = self.alpha(self.timesteps[i] - self.stride)
    z_0 = ((z - (1 - alpha).sqrt() * e) / alpha.sqrt()).clamp(-1, 1)
    return alpha_next.sqrt() * z_0 + (1 - alpha_next).sqrt() * e


def no_corrector(monkeypatch):
    """PNDM continues from its prediction: it visits no timestep twice and corrects nothing."""
    right = scheduler.PNDM.step

    def drop_second_visit(self):
        self.timesteps.pop(1)

    def step(self, z, e, i):
        if i == 0:
            return right(self, z, e, 0)
        self.timesteps.insert(1, None)  # the right step counts the second visit
        z = right(self, z, e, i + 1)
        self.timesteps.pop(1)
        return z

    after_init(scheduler.PNDM, drop_second_visit)(monkeypatch)
    monkeypatch.setattr(scheduler.PNDM, "step", step)


# ---------------------------------------------------------------------- mistakes in guidance
def guided(combine):
    """A cfg that evaluates the two prompts one after the other and combines the two estimates."""

    def cfg(unet, c_0, c_p, s):
        def estimate(z, t, i=0):
            return combine(unet(z, t, c_0), unet(z, t, c_p), s)

        return estimate

    return cfg


def right_guidance(e_0, e_p, s):
    return e_0 + s * (e_p - e_0)


def from_the_prompt(e_0, e_p, s):
    return e_p + s * (e_p - e_0)


def swapped_estimates(e_0, e_p, s):
    return e_p + s * (e_0 - e_p)


# ---------------------------------------------------------------------- the table
SMALL = 3e-3  # inputs so small that the eps of a norm matters
RESNET_EPS = after_init(unet.ResnetBlock, resnet_eps)
TRANSFORMER_EPS = set_eps(unet.Transformer, "norm", 1e-5)
NO_MASK = replace_functional(clip_text, scaled_dot_product_attention=no_mask)

# fmt: off
MISTAKES = [
    # (what is wrong, plant, comparison, its arguments). A mistake stands here once. The
    # transformer's eps shows which comparisons can see an eps.
    # --- UNet
    ("ResNet eps 1e-6", RESNET_EPS, unet_part, "resnet", SMALL),
    ("conv_norm_out eps 1e-6", set_eps(unet.UNet, "conv_norm_out", 1e-6), unet_error, SMALL),
    ("transformer eps 1e-5, its value", TRANSFORMER_EPS, same_eps, "unet"),
    ("transformer eps 1e-5, one block", TRANSFORMER_EPS, unet_part, "transformer", SMALL),
    ("transformer eps 1e-5, whole UNet", TRANSFORMER_EPS, unet_error, SMALL),
    ("LayerNorm eps 1e-6", set_eps(unet.TransformerBlock, "norm1", 1e-6),
        unet_part, "transformer block", SMALL),
    ("UNet pads right and bottom only", after_init(unet.DownBlock, pad_right_and_bottom),
        unet_part, "downsample"),
    ("upsampling by 2 on odd sizes", replace_functional(unet, interpolate=upsample_by_2),
        unet_error),
    ("16 channels per head, not 8 heads", set_heads(16), unet_part, "cross-attention"),
    ("heads are interleaved channels", replace(unet, "rearrange", interleaved_heads),
        unet_part, "cross-attention"),
    ("sin first", replace(unet, "timestep_embedding", sin_first), timestep_error),
    ("freq_shift 1", replace(unet, "timestep_embedding", freq_shift_1), timestep_error),
    ("GEGLU with the tanh GELU", replace_functional(unet, gelu=tanh_gelu),
        unet_part, "feed-forward"),
    ("GEGLU's first half is the gate", replace(unet.GEGLU, "forward", gate_first),
        unet_part, "feed-forward"),
    ("ResNet norms swapped", swap(unet.ResnetBlock, "norm1", "norm2"),
        unet_part, "resnet, same width"),
    ("transformer block's norms swapped", swap(unet.TransformerBlock, "norm2", "norm3"),
        unet_error),
    # --- VAE
    ("VAE eps 1e-5", replace(vae, "EPS", 1e-5), vae_part, "resnet", SMALL),
    ("VAE pads all sides", after_init(vae.Level, pad_all_sides), vae_part, "downsample"),
    ("VAE norms swapped", swap(vae.ResnetBlock, "norm1", "norm2"), vae_error, "decode"),
    ("latents not scaled", after_init(vae.VAE, no_scaling), vae_error, "encode"),
    ("latents not scaled back", after_init(vae.VAE, no_scaling), vae_error, "decode"),
    # --- text encoder
    ("exact GELU", replace(clip_text, "quick_gelu", F.gelu), text_error),
    ("no causal mask", NO_MASK, text_error),
    ("no final norm", replace(clip_text.TextModel, "forward", no_final_norm), text_error),
    ("CLIP's LayerNorm eps 1e-6", set_eps(clip_text.Layer, "layer_norm2", 1e-6),
        text_error, SMALL),
    ("prompts padded with 0", replace(clip_text, "tokenize", padded_with_0), padding),
    # --- schedule and samplers
    ("linear betas", after_init(scheduler.DDIM, linear_betas), trajectory_error, "ddim", 4),
    ("steps_offset 0", after_init(scheduler.DDIM, no_offset), timesteps, "ddim", 10),
    ("set_alpha_to_one", replace(scheduler.DDIM, "alpha", alpha_one), trajectory_error, "ddim", 4),
    ("clip_sample", replace(scheduler.DDIM, "step", clipped_step), trajectory_error, "ddim", 4),
    ("trailing spacing", after_init(scheduler.DDIM, trailing_spacing), timesteps, "ddim", 10),
    ("PNDM without its corrector", no_corrector, trajectory_error, "pndm", 4),
    # --- guidance
    ("guidance starts from e_p", replace(guidance, "cfg", guided(from_the_prompt)),
        trajectory_error, "ddim", 4),
    ("e_0 and e_p swapped", replace(guidance, "cfg", guided(swapped_estimates)),
        trajectory_error, "ddim", 4),
]
# fmt: on


# ---------------------------------------------------------------------- the tests
def passes(comparison, *arguments):
    """Whether the error is below TOLERANCE. Wrong shapes count as a failed comparison."""
    try:
        return comparison(*arguments) <= TOLERANCE
    except AssertionError:
        return False
    except RuntimeError as e:
        message = str(e).lower()
        assert "size of tensor" in message or "sizes of tensors" in message, e
        return False


passes_without_mistake = functools.cache(passes)


@pytest.mark.parametrize("mistake", MISTAKES, ids=[name for name, *_ in MISTAKES])
def test_mistake_is_seen(mistake, monkeypatch):
    _, plant, *comparison = mistake
    assert passes_without_mistake(*comparison)
    plant(monkeypatch)
    assert not passes(*comparison)


def test_planting_alone_changes_nothing(monkeypatch):
    """The tools that plant mistakes are harmless when they plant the right thing."""
    after_init(unet.ResnetBlock, lambda self: None)(monkeypatch)
    replace_functional(unet)(monkeypatch)
    swap(unet.TransformerBlock, "norm2", "norm2")(monkeypatch)
    replace(guidance, "cfg", guided(right_guidance))(monkeypatch)
    assert passes(unet_error)
    assert passes(trajectory_error, "ddim", 4)
