"""Stable Diffusion's autoencoder (AutoencoderKL): pictures (B, 3, H, W) in [-1, 1] <-> latents (B, 4, H/f, W/f).

f = 2^(levels - 1): 8 for SD 1.4 (Rombach et al. 2022, arXiv 2112.10752), 4 for the embedded model. Attribute names are
the checkpoint's (diffusers layout, `vae/config.json`), so that loading is a strict `load_state_dict`. The latents
that go in and come out are scaled by `scaling_factor` here, and nowhere else.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

EPS = 1e-6  # every GroupNorm in the VAE (the UNet's ResNets have 1e-5)


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """One head over all H·W places, with its own norm and residual."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, EPS)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])  # a list only for the name `to_out.0`

    def forward(self, x):
        h = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + rearrange(self.to_out[0](h), "b 1 (h w) c -> b c h w", h=x.shape[2])


def downsample(c):
    pad = nn.ZeroPad2d((0, 1, 0, 1))  # right and bottom only, unlike the UNet's
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(c, c, 3, stride=2)))


def upsample(c):
    return nn.Sequential(
        OrderedDict(
            twice=nn.Upsample(scale_factor=2.0, mode="nearest"), conv=nn.Conv2d(c, c, 3, padding=1)
        )
    )


class Level(nn.Module):
    """`n` ResNets, then a step to the next resolution (none where `resample` is None)."""

    def __init__(self, c_in, c_out, n, groups, resample=None):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(n)
        )
        self.downsamplers = nn.ModuleList([downsample(c_out)] if resample is downsample else [])
        self.upsamplers = nn.ModuleList([upsample(c_out)] if resample is upsample else [])

    def forward(self, x):
        for module in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = module(x)
        return x


class Middle(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)])
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, in_channels, latent_channels, widths, n, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], w, n, groups, downsample if i < len(widths) - 1 else None)
            for i, w in enumerate(widths)
        )
        self.mid_block = Middle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(
            widths[-1], 2 * latent_channels, 3, padding=1
        )  # mean and log variance

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, out_channels, latent_channels, widths, n, groups):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)], w, n + 1, groups, upsample if i < len(widths) - 1 else None
            )
            for i, w in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, z):
        z = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            z = level(z)
        return self.conv_out(F.silu(self.conv_norm_out(z)))


class VAE(nn.Module):
    """The two halves. Arguments are the keys of `vae/config.json`; the defaults are SD 1.4's."""

    def __init__(
        self,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        norm_num_groups=32,
        scaling_factor=0.18215,
    ):
        super().__init__()
        table = list(block_out_channels), layers_per_block, norm_num_groups
        self.encoder = Encoder(in_channels, latent_channels, *table)
        self.decoder = Decoder(out_channels, latent_channels, *table)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.scaling_factor = scaling_factor  # 0.18215 brings SD 1.4's latents to unit variance
        self.factor = 2 ** (len(block_out_channels) - 1)

    def moments(self, x):
        """Mean and log variance of q(z | x), unscaled: two tensors (B, 4, H/f, W/f)."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)  # the original's bounds

    def encode(self, x, generator=None):
        """Pictures (B, 3, H, W) in [-1, 1] -> scaled latents: a sample with `generator`, else the mean."""
        mean, logvar = self.moments(x)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32).to(mean)
            mean = mean + (logvar / 2).exp() * noise
        return self.scaling_factor * mean

    def decode(self, z):
        """Scaled latents (B, 4, h, w) -> pictures (B, 3, f·h, f·w), about [-1, 1]: clamp before showing."""
        return self.decoder(self.post_quant_conv(z / self.scaling_factor))
