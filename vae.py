"""Stable Diffusion's autoencoder (`AutoencoderKL`), from scratch.

Images (B, 3, H, W) in [-1, 1] <-> latents (B, 4, H/f, W/f), with f = 8 for SD 1.4 (Rombach et al.
2022, arXiv 2112.10752) and the emoji model, and f = 4 for the shapes model.

SD 1.4's rows (output channels, and the side of the feature map for images of 512 x 512):

    encoder.conv_in         3 -> 128  512           decoder.conv_in       4 -> 512   64
    encoder.down_blocks.0        128  512 -> 256    decoder.mid_block          512   64
    encoder.down_blocks.1        256  256 -> 128    decoder.up_blocks.0        512   64 -> 128
    encoder.down_blocks.2        512  128 ->  64    decoder.up_blocks.1        512  128 -> 256
    encoder.down_blocks.3        512   64           decoder.up_blocks.2        256  256 -> 512
    encoder.mid_block            512   64           decoder.up_blocks.3        128  512
    encoder.conv_out      512 ->   8   64           decoder.conv_out    128 ->   3  512

Attribute names are the checkpoint's names (diffusers' layout), so loading is
`load_state_dict(strict=True)`. This file, and no other, scales latents by `scaling_factor`.

Letters in the shape comments: B batch, C channels, H and W height and width, N = H·W positions.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

EPS = 1e-6  # of every GroupNorm in the VAE; the UNet's ResNets have 1e-5


class ResnetBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention of all positions, with one head, its own norm and a shortcut."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, EPS)
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])  # a list only for the name `to_out.0`

    def forward(self, x):
        h = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")  # (B, 1, N, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        h = rearrange(self.to_out[0](h), "b 1 (h w) c -> b c h w", h=x.shape[2])  # (B, C, H, W)
        return x + h


def downsample(c):
    """(B, c, H, W) -> (B, c, H/2, W/2). It pads right and bottom only, unlike the UNet."""
    pad = nn.ZeroPad2d((0, 1, 0, 1))
    conv = nn.Conv2d(c, c, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=pad, conv=conv))


def upsample(c):
    """(B, c, H, W) -> (B, c, 2H, 2W)."""
    twice = nn.Upsample(scale_factor=2.0, mode="nearest")
    conv = nn.Conv2d(c, c, 3, padding=1)
    return nn.Sequential(OrderedDict(twice=twice, conv=conv))


class Level(nn.Module):
    """`n` ResNets at one resolution, then `resample` (downsample, upsample or None) to the next."""

    def __init__(self, c_in, c_out, n, groups, resample):
        super().__init__()
        self.resnets = nn.ModuleList()
        for i in range(n):
            self.resnets.append(ResnetBlock(c_in if i == 0 else c_out, c_out, groups))
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()
        if resample is downsample:
            self.downsamplers.append(downsample(c_out))
        if resample is upsample:
            self.upsamplers.append(upsample(c_out))

    def forward(self, x):
        for module in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = module(x)
        return x


def levels(widths, n, groups, resample):
    """One Level per width; all but the last one end with `resample`."""
    last = len(widths) - 1
    rows = nn.ModuleList()
    c_in = widths[0]
    for i, c_out in enumerate(widths):
        rows.append(Level(c_in, c_out, n, groups, resample if i < last else None))
        c_in = c_out
    return rows


class Middle(nn.Module):
    """A ResNet, attention, a ResNet at the lowest resolution."""

    def __init__(self, c, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(c, c, groups), ResnetBlock(c, c, groups)])
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, x):
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    def __init__(self, in_channels, latent_channels, widths, n, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = levels(widths, n, groups, downsample)
        self.mid_block = Middle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        # Twice the channels of the latents: a mean and a log variance for each.
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)  # (B, widths[0], H, W)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)  # (B, widths[-1], H/f, W/f)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, 8, H/f, W/f)


class Decoder(nn.Module):
    def __init__(self, out_channels, latent_channels, widths, n, groups):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups)
        self.up_blocks = levels(widths, n + 1, groups, upsample)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, z):
        z = self.conv_in(z)  # (B, widths[0], H/f, W/f)
        z = self.mid_block(z)
        for level in self.up_blocks:
            z = level(z)
        return self.conv_out(F.silu(self.conv_norm_out(z)))  # (B, 3, H, W)


class VAE(nn.Module):
    """Encoder and decoder. Arguments are keys of `vae/config.json`; their defaults are SD 1.4's."""

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
        widths, n, groups = list(block_out_channels), layers_per_block, norm_num_groups
        self.encoder = Encoder(in_channels, latent_channels, widths, n, groups)
        self.decoder = Decoder(out_channels, latent_channels, widths, n, groups)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.scaling_factor = scaling_factor  # 0.18215 gives SD 1.4's latents a variance of 1
        self.factor = 2 ** (len(block_out_channels) - 1)  # f

    def moments(self, x):
        """Mean and log variance of q(z | x), not scaled: two tensors (B, 4, H/f, W/f)."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)  # the bounds of the original code

    def encode(self, x, generator=None):
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, H/f, W/f).

        Returns the mean of q(z | x). With a CPU `generator`, returns a random sample instead.
        """
        mean, logvar = self.moments(x)
        if generator is None:
            return self.scaling_factor * mean
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32).to(mean)
        return self.scaling_factor * (mean + (logvar / 2).exp() * noise)

    def decode(self, z):
        """Scaled latents (B, 4, h, w) -> images (B, 3, f·h, f·w).

        Values are about in [-1, 1]. Clamp them before you show the images.
        """
        return self.decoder(self.post_quant_conv(z / self.scaling_factor))
