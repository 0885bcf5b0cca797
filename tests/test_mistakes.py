"""Historical mistakes, planted one at a time: each must turn a comparison red that is green without it.

A row of MISTAKES is the mistake's name, a function of pytest's monkeypatch that plants it in our modules (never in
diffusers), and the comparison of test_parity or test_sampling that must see it.
"""

from pathlib import Path
from types import SimpleNamespace

import common
import pytest
import torch
import torch.nn.functional as F
from common import TOLERANCE
from einops import rearrange

import clip_text
import guidance
import scheduler
import unet
import vae


# ------------------------------------------------------------------------------------------------ ways to plant
def after_init(cls, change):
    """Every new `cls` is changed by `change(self)`."""

    def plant(monkeypatch):
        init = cls.__init__

        def wrong(self, *args, **kwargs):
            init(self, *args, **kwargs)
            change(self)

        monkeypatch.setattr(cls, "__init__", wrong)

    return plant


def put(owner, name, wrong):
    """owner.name = wrong."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, wrong)


def functional(module, **wrong):
    """`module` alone (not diffusers) gets its own torch.nn.functional, in which some functions are others."""
    return put(module, "F", SimpleNamespace(**vars(F) | wrong))


def swapped(cls, a, b):
    """The forward of `cls` finds its parts a and b exchanged (not where their sizes differ)."""

    def plant(monkeypatch):
        forward = cls.forward

        def wrong(self, *args):
            first, second = getattr(self, a), getattr(self, b)
            if first.weight.shape == second.weight.shape:
                setattr(self, a, second), setattr(self, b, first)
            y = forward(self, *args)
            setattr(self, a, first), setattr(self, b, second)
            return y

        monkeypatch.setattr(cls, "forward", wrong)

    return plant


# ------------------------------------------------------------------------------------------------ the longer mistakes
def sin_first(t, width, right=unet.timestep_embedding):
    return right(t, width).roll(width // 2, dims=1)


def freq_shift_1(t, width):
    half = width // 2
    angles = t.float()[:, None] * 10000 ** (-torch.arange(half) / (half - 1))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def other_half_is_the_gate(self, x):
    gate, x = self.proj(x).chunk(2, dim=-1)
    return x * F.gelu(gate)


def corner_padding(self):
    for step in self.downsamplers:
        step.conv.padding = 0
        step.register_forward_pre_hook(lambda _, args: (F.pad(args[0], (0, 1, 0, 1)),))


def no_final_norm(self, tokens):
    x = self.embeddings(tokens)
    for layer in self.encoder["layers"]:
        x = layer(x)
    return x


def padded_with_0(tokenizer, prompts, right=clip_text.tokenize):
    ids, cut = right(tokenizer, prompts)
    after_the_end = (ids == tokenizer.eos_token_id).cumsum(1) > 1
    return ids.masked_fill(after_the_end, 0), cut


def linear_betas(self):
    self.alphas_cumprod = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), dim=0)


def no_offset(self):
    self.timesteps = [max(t - 1, 0) for t in self.timesteps]


def trailing(self):
    self.timesteps = [*(999 - self.stride * i for i in range(1000 // self.stride)), 0]


def alpha_1_at_the_end(self, t):
    return self.alphas_cumprod[t] if t >= 0 else torch.tensor(1.0)


def clipped_step(self, z, e, i):
    alpha, alpha_next = (self._alpha(self.timesteps[i] - back) for back in (0, self.stride))
    z_0 = ((z - (1 - alpha).sqrt() * e) / alpha.sqrt()).clamp(-1, 1)
    return alpha_next.sqrt() * z_0 + (1 - alpha_next).sqrt() * e


def never_twice(monkeypatch):
    """PNDM that goes on from its first guess: the level is not repeated and nothing corrected."""
    right = scheduler.PNDM.step
    after_init(scheduler.PNDM, lambda self: self.timesteps.pop(1))(monkeypatch)

    def step(self, z, e, i):
        if i == 0:
            return right(self, z, e, 0)
        self.timesteps.insert(
            1, None
        )  # so that i + 1 is the i-th level of those without the repeated one
        z = right(self, z, e, i + 1)
        self.timesteps.pop(1)
        return z

    monkeypatch.setattr(scheduler.PNDM, "step", step)


def guided(combine):
    def cfg(unet, c_0, c_p, s):
        def estimate(z, t, i=0):
            return combine(*(unet(z, t, c.expand(len(z), -1, -1)) for c in (c_0, c_p)), s)

        return estimate

    return cfg


# ------------------------------------------------------------------------------------------------ the table
NO_MASK = {
    "scaled_dot_product_attention": lambda q, k, v, is_causal: F.scaled_dot_product_attention(
        q, k, v
    )
}
TWICE = {"interpolate": lambda x, size, mode: F.interpolate(x, scale_factor=2.0, mode=mode)}

RESNET_EPS = after_init(
    unet.ResnetBlock, lambda self: [setattr(norm, "eps", 1e-6) for norm in (self.norm1, self.norm2)]
)
LAST_EPS = after_init(unet.UNet, lambda self: setattr(self.conv_norm_out, "eps", 1e-6))
TRANSFORMER_EPS = after_init(unet.Transformer, lambda self: setattr(self.norm, "eps", 1e-5))
LAYER_EPS = after_init(unet.TransformerBlock, lambda self: setattr(self.norm1, "eps", 1e-6))
PAD_ALL = after_init(
    vae.Level,
    lambda self: [setattr(step, "pad", torch.nn.ZeroPad2d(1)) for step in self.downsamplers],
)
CLIP_EPS = after_init(clip_text.Layer, lambda self: setattr(self.layer_norm2, "eps", 1e-6))

MISTAKES = [
    # --- UNet
    ("UNet's ResNets with eps 1e-6: its value", RESNET_EPS, lambda: common.same_eps("unet")),
    (
        "UNet's ResNets with eps 1e-6: one block",
        RESNET_EPS,
        lambda: common.unet_part("resnet", 3e-3),
    ),
    ("UNet's ResNets with eps 1e-6: all", RESNET_EPS, lambda: common.unet_error(gain=3e-3)),
    ("conv_norm_out with eps 1e-6", LAST_EPS, lambda: common.unet_error(gain=3e-3)),
    (
        "transformer's norm with eps 1e-5: its value",
        TRANSFORMER_EPS,
        lambda: common.same_eps("unet"),
    ),
    (
        "transformer's norm with eps 1e-5: one block",
        TRANSFORMER_EPS,
        lambda: common.unet_part("transformer", 3e-3),
    ),
    (
        "transformer's norm with eps 1e-5: all",
        TRANSFORMER_EPS,
        lambda: common.unet_error(gain=3e-3),
    ),
    ("LayerNorm with eps 1e-6: its value", LAYER_EPS, lambda: common.same_eps("unet")),
    (
        "LayerNorm with eps 1e-6: one block",
        LAYER_EPS,
        lambda: common.unet_part("transformer block", 3e-3),
    ),
    (
        "UNet pads right and bottom only",
        after_init(unet.DownBlock, corner_padding),
        lambda: common.unet_part("downsample"),
    ),
    ("up-sampling by 2 on odd sizes", functional(unet, **TWICE), common.unet_error),
    (
        "8 channels a head",
        after_init(unet.Attention, lambda self: setattr(self, "heads", self.to_q.in_features // 8)),
        lambda: common.unet_error("2 heads, plain first"),
    ),
    (
        "8 channels a head, one block",
        after_init(
            unet.Attention, lambda self: setattr(self, "heads", self.to_q.in_features // 16)
        ),
        lambda: common.unet_part("cross-attention"),
    ),
    (
        "prompts in turn for latents in a row",
        put(
            unet, "rearrange", lambda x, how, **n: rearrange(x, how.replace("(p b)", "(b p)"), **n)
        ),
        common.shared_prompts_error,
    ),
    ("sin first", put(unet, "timestep_embedding", sin_first), common.timestep_error),
    ("sin first: all", put(unet, "timestep_embedding", sin_first), common.unet_error),
    ("frequency shift 1", put(unet, "timestep_embedding", freq_shift_1), common.timestep_error),
    ("frequency shift 1: all", put(unet, "timestep_embedding", freq_shift_1), common.unet_error),
    (
        "GEGLU with tanh's gelu",
        functional(unet, gelu=lambda x: F.gelu(x, approximate="tanh")),
        lambda: common.unet_part("feed-forward"),
    ),
    (
        "GEGLU with tanh's gelu: all",
        functional(unet, gelu=lambda x: F.gelu(x, approximate="tanh")),
        common.unet_error,
    ),
    (
        "GEGLU's halves swapped",
        put(unet.GEGLU, "forward", other_half_is_the_gate),
        lambda: common.unet_part("feed-forward"),
    ),
    (
        "norm1 and norm2 swapped in a ResNet",
        swapped(unet.ResnetBlock, "norm1", "norm2"),
        lambda: common.unet_part("resnet, same width"),
    ),
    (
        "norm1 and norm2 swapped in the ResNets",
        swapped(unet.ResnetBlock, "norm1", "norm2"),
        common.unet_error,
    ),
    (
        "norm2 and norm3 swapped in a transformer block",
        swapped(unet.TransformerBlock, "norm2", "norm3"),
        common.unet_error,
    ),
    # --- VAE
    ("VAE with eps 1e-5: its value", put(vae, "EPS", 1e-5), lambda: common.same_eps("vae")),
    (
        "VAE with eps 1e-5: one block",
        put(vae, "EPS", 1e-5),
        lambda: common.vae_part("resnet", 3e-3),
    ),
    (
        "VAE with eps 1e-5: encoder",
        put(vae, "EPS", 1e-5),
        lambda: common.vae_error("moments", 3e-3),
    ),
    ("VAE with eps 1e-5: decoder", put(vae, "EPS", 1e-5), lambda: common.vae_error("decode", 3e-3)),
    ("VAE pads on all sides", PAD_ALL, lambda: common.vae_part("downsample")),
    ("VAE pads on all sides: encoder", PAD_ALL, lambda: common.vae_error("moments")),
    (
        "norm1 and norm2 swapped in the VAE",
        swapped(vae.ResnetBlock, "norm1", "norm2"),
        lambda: common.vae_error("decode"),
    ),
    (
        "latents not scaled",
        after_init(vae.VAE, lambda self: setattr(self, "scaling_factor", 1.0)),
        lambda: common.vae_error("encode"),
    ),
    (
        "latents not scaled back",
        after_init(vae.VAE, lambda self: setattr(self, "scaling_factor", 1.0)),
        lambda: common.vae_error("decode"),
    ),
    # --- text encoder
    ("exact gelu", put(clip_text, "quick_gelu", F.gelu), common.text_error),
    ("no causal mask", functional(clip_text, **NO_MASK), common.text_error),
    ("no causal mask: one layer", functional(clip_text, **NO_MASK), common.text_layer_error),
    ("no final layer norm", put(clip_text.TextModel, "forward", no_final_norm), common.text_error),
    ("CLIP's LayerNorm with eps 1e-6", CLIP_EPS, lambda: common.text_error(gain=3e-3)),
    ("padding with 0", put(clip_text, "tokenize", padded_with_0), common.padding),
    # --- schedule and samplers
    *(
        (f"{name}: {kind}", plant, lambda kind=kind: common.trajectory_error(kind, 10))
        for kind in ("ddim", "pndm")
        for name, plant in (
            ("linear betas", after_init(scheduler.DDIM, linear_betas)),
            ("steps_offset 0", after_init(scheduler.DDIM, no_offset)),
            ("set_alpha_to_one", put(scheduler.DDIM, "_alpha", alpha_1_at_the_end)),
        )
    ),
    (
        "clip_sample",
        put(scheduler.DDIM, "step", clipped_step),
        lambda: common.trajectory_error("ddim", 10),
    ),
    (
        "trailing spacing",
        after_init(scheduler.DDIM, trailing),
        lambda: common.trajectory_error("ddim", 10),
    ),
    (
        "trailing spacing: the levels",
        after_init(scheduler.DDIM, trailing),
        lambda: common.timesteps("ddim", 10),
    ),
    (
        "steps_offset 0: the levels",
        after_init(scheduler.DDIM, no_offset),
        lambda: common.timesteps("ddim", 10),
    ),
    ("PNDM visits no level twice", never_twice, lambda: common.trajectory_error("pndm", 10)),
    ("PNDM visits no level twice: the levels", never_twice, lambda: common.timesteps("pndm", 10)),
    # --- guidance
    (
        "e_p + s (e_p − e_0)",
        put(guidance, "cfg", guided(lambda e_0, e_p, s: e_p + s * (e_p - e_0))),
        lambda: common.trajectory_error("ddim", 10),
    ),
    (
        "e_0 and e_p swapped",
        put(guidance, "cfg", guided(lambda e_p, e_0, s: e_0 + s * (e_p - e_0))),
        lambda: common.trajectory_error("ddim", 10),
    ),
]


def is_green(comparison):
    """Wrong shapes count as red; any other exception is a fault of the test."""
    try:
        return comparison() <= TOLERANCE
    except AssertionError:
        return False
    except RuntimeError as e:
        assert "size of tensor" in str(e).lower() or "sizes of tensors" in str(e).lower(), e
        return False


@pytest.mark.parametrize(
    "plant, comparison", [pytest.param(*row, id=name) for name, *row in MISTAKES]
)
def test_a_planted_mistake_is_seen(plant, comparison, monkeypatch):
    assert is_green(comparison)
    plant(monkeypatch)
    assert not is_green(comparison)


def test_teaching_says_how_many():
    assert f"plants {len(MISTAKES)} mistakes" in (
        Path(unet.__file__).parent / "TEACHING.md"
    ).read_text(encoding="utf-8")


def test_planting_nothing_changes_nothing(monkeypatch):
    """The tools themselves are harmless: what turns red does so by the mistake."""
    after_init(unet.ResnetBlock, lambda self: None)(monkeypatch)
    functional(unet)(monkeypatch)
    put(guidance, "cfg", guided(lambda e_0, e_p, s: e_0 + s * (e_p - e_0)))(monkeypatch)
    swapped(unet.TransformerBlock, "norm2", "norm2")(monkeypatch)
    assert is_green(common.unet_error) and is_green(lambda: common.trajectory_error("ddim", 10))
