"""Mistakes that people really made in such code. Each one must make a comparison fail.

A row of MISTAKES has four parts: what is wrong; our module; {text in its source: the mistake}; and
the comparison of common.py that must see it, with its arguments. `plant` runs the changed source.
The comparison must pass without the mistake and fail with it.
"""

import functools

import pytest
from common import (
    TOLERANCE,
    padding,
    plant,
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

import clip_text
import guidance
import scheduler
import unet
import vae

SMALL = 3e-3  # inputs so small that the eps of a norm matters
TRANSFORMER_EPS = {"nn.GroupNorm(groups, c, 1e-6)": "nn.GroupNorm(groups, c, 1e-5)"}
ALPHA = "self.alphas_cumprod[max(t, 0)]"
Z_0 = "(z - (1 - alpha).sqrt() * e) / alpha.sqrt()"
CFG = "e_0 + s * (e_p - e_0)\n"

# fmt: off
MISTAKES = [
    # A mistake stands here once. The transformer's eps shows which comparisons can see an eps.
    ("ResNet eps 1e-6", unet,
        {"GroupNorm(groups, c_in, 1e-5)": "GroupNorm(groups, c_in, 1e-6)"},
        unet_part, "resnet", SMALL),
    ("conv_norm_out eps 1e-6", unet,
        {"GroupNorm(norm_num_groups, c1, 1e-5)": "GroupNorm(norm_num_groups, c1, 1e-6)"},
        unet_error, SMALL),
    ("transformer eps 1e-5, its value", unet, TRANSFORMER_EPS, same_eps, "unet"),
    ("transformer eps 1e-5, one block", unet, TRANSFORMER_EPS, unet_part, "transformer", SMALL),
    ("transformer eps 1e-5, whole UNet", unet, TRANSFORMER_EPS, unet_error, SMALL),
    ("LayerNorm eps 1e-6", unet,
        {"norm1 = nn.LayerNorm(c)": "norm1 = nn.LayerNorm(c, 1e-6)"},
        unet_part, "transformer block", SMALL),
    ("pads right and bottom only, as the VAE", unet,
        {"named(conv=nn.Conv2d(c, c, 3, stride=2, padding=1))":
         "named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2))"},
        unet_part, "downsample"),
    ("upsampling by 2 on odd sizes", unet, {"size=size, mode": "scale_factor=2.0, mode"},
        unet_error),
    ("16 channels per head, not 8 heads", unet, {"self.heads = heads": "self.heads = c // 16"},
        unet_part, "cross-attention"),
    ("heads are interleaved channels", unet, {"(h d)": "(d h)"}, unet_part, "cross-attention"),
    ("sin first", unet, {"[angles.cos(), angles.sin()]": "[angles.sin(), angles.cos()]"},
        timestep_error),
    ("freq_shift 1", unet, {"* i / half)": "* i / (half - 1))"}, timestep_error),
    ("GEGLU with the tanh GELU", unet, {"F.gelu(gate)": "F.gelu(gate, approximate='tanh')"},
        unet_part, "feed-forward"),
    ("GEGLU's first half is the gate", unet, {"x, gate = self.proj": "gate, x = self.proj"},
        unet_part, "feed-forward"),
    ("ResNet norms swapped", unet,
        {"F.silu(self.norm1(x))": "F.silu(self.norm2(x))",
         "F.silu(self.norm2(h))": "F.silu(self.norm1(h))"},
        unet_part, "resnet, same width"),
    ("transformer block's norms swapped", unet,
        {"self.attn2(self.norm2(x)": "self.attn2(self.norm3(x)",
         "self.ff(self.norm3(x)": "self.ff(self.norm2(x)"},
        unet_error),

    ("VAE eps 1e-5", vae, {"EPS = 1e-6": "EPS = 1e-5"}, vae_part, "resnet", SMALL),
    ("pads all sides, as the UNet", vae, {"ZeroPad2d((0, 1, 0, 1))": "ZeroPad2d(1)"},
        vae_part, "downsample"),
    ("VAE norms swapped", vae,
        {"F.silu(self.norm1(x))": "F.silu(self.norm2(x))",
         "F.silu(self.norm2(h))": "F.silu(self.norm1(h))"},
        vae_part, "resnet, same width"),
    ("latents not scaled", vae, {"return self.scaling_factor * mean": "return mean"},
        vae_error, "encode"),
    ("latents not scaled back", vae, {"z / self.scaling_factor": "z"}, vae_error, "decode"),

    ("exact GELU", clip_text, {"x * torch.sigmoid(1.702 * x)": "F.gelu(x)"}, text_error),
    ("no causal mask", clip_text, {"is_causal=True": "is_causal=False"}, text_error),
    ("no final norm", clip_text, {"return self.final_layer_norm(x)": "return x"}, text_error),
    ("CLIP's LayerNorm eps 1e-6", clip_text,
        {"layer_norm2 = nn.LayerNorm(c, eps)": "layer_norm2 = nn.LayerNorm(c, 1e-6)"},
        text_error, SMALL),
    ("prompts padded with 0", clip_text,
        {"return ids,": "return ids * ((ids == tokenizer.eos_token_id).cumsum(1) <= 1),"},
        padding),

    ("linear betas", scheduler,
        {"1 - sqrt_betas**2": "1 - torch.linspace(beta_start, beta_end, num_train_timesteps)"},
        trajectory_error, "ddim", 4),
    ("steps_offset 0", scheduler, {"steps_offset=1": "steps_offset=0"}, timesteps, "ddim", 10),
    ("set_alpha_to_one", scheduler, {ALPHA: f"{ALPHA} if t >= 0 else torch.tensor(1.0)"},
        trajectory_error, "ddim", 4),
    ("clip_sample", scheduler, {Z_0: f"({Z_0}).clamp(-1, 1)"}, trajectory_error, "ddim", 4),
    ("trailing spacing", scheduler, {"i * self.stride + steps_offset": "(i + 1) * self.stride - 1"},
        timesteps, "ddim", 10),
    ("PNDM without its corrector", scheduler,
        {"if steps > 1:": "if False:", "if i == 1:": "if False:"},
        trajectory_error, "pndm", 4),

    ("guidance starts from e_p", guidance, {CFG: "e_p + s * (e_p - e_0)\n"},
        trajectory_error, "ddim", 4),
    ("e_0 and e_p swapped", guidance, {CFG: "e_p + s * (e_0 - e_p)\n"},
        trajectory_error, "ddim", 4),
]
# fmt: on


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
    _, module, changes, *comparison = mistake
    assert passes_without_mistake(*comparison)
    plant(monkeypatch, module, changes)
    assert not passes(*comparison)


def test_planting_alone_changes_nothing(monkeypatch):
    for module in (unet, vae, clip_text, scheduler, guidance):
        plant(monkeypatch, module, {})
    for comparison in ((unet_error,), (vae_error, "decode"), (text_error,), (padding,)):
        assert passes(*comparison)
    assert passes(trajectory_error, "pndm", 4)
