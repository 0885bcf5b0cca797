"""Stable Diffusion's noise predictor ε(z, t, c) (UNet2DConditionModel), from scratch.

The U, as SD 1.4's `unet/config.json` has it (channels, places a side for 64x64 latents, heads 8 everywhere):

    conv_in         4 -> 320   64
    down_blocks.0        320   64 -> 32   2 x (ResNet, transformer), downsample
    down_blocks.1        640   32 -> 16   2 x (ResNet, transformer), downsample
    down_blocks.2       1280   16 ->  8   2 x (ResNet, transformer), downsample
    down_blocks.3       1280    8         2 x  ResNet
    mid_block           1280    8         ResNet, transformer, ResNet
    up_blocks.0         1280    8 -> 16   3 x  ResNet, upsample
    up_blocks.1         1280   16 -> 32   3 x (ResNet, transformer), upsample
    up_blocks.2          640   32 -> 64   3 x (ResNet, transformer), upsample
    up_blocks.3          320   64         3 x (ResNet, transformer)
    conv_out      320 -> 4     64

The embedded model is the same table, narrower. Every output of the way down is put on a stack and taken off it on the
way up: the U. Attribute names are the checkpoint's (diffusers layout), so that loading is a strict `load_state_dict`.
Letters in shape comments: B batch, P prompts, C channels, N = H·W places, L = 77 tokens, D context width, h heads, d = C / h.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


def timestep_embedding(t, width):
    """Sinusoids of the timesteps (B,) -> (B, width): cosines first, frequencies 10000^(-i / half) (config: flip_sin_to_cos
    true, freq_shift 0)."""
    half = width // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def named(**modules):
    """One after the other, each with its checkpoint's name."""
    return nn.Sequential(OrderedDict(modules))


class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out, c_emb, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, 1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_emb, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, 1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Attention of x (B, N, C) to `context` (P, L, D), each of its P prompts for B / P of x in a row; to itself where there is none."""

    def __init__(self, c, c_context, heads):
        super().__init__()
        if c % heads:
            raise ValueError(f"{heads} heads do not divide {c} channels")
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k, self.to_v = (
            nn.Linear(c_context, c, bias=False),
            nn.Linear(c_context, c, bias=False),
        )
        self.to_out = nn.ModuleList([nn.Linear(c, c)])  # a list only for the name `to_out.0`

    def forward(self, x, context=None):
        context = x if context is None else context
        # all places that read the same prompt ask together: a batch of 8 latents computes its keys and values once, 1 to 4 % faster
        q = rearrange(self.to_q(x), "(p b) n (h d) -> p h (b n) d", h=self.heads, p=len(context))
        k, v = (
            rearrange(y, "p l (h d) -> p h l d", h=self.heads)
            for y in (self.to_k(context), self.to_v(context))
        )
        y = F.scaled_dot_product_attention(q, k, v)  # softmax(q kᵀ / √d) v
        return self.to_out[0](rearrange(y, "p h (b n) d -> (p b) n (h d)", n=x.shape[1]))


class GEGLU(nn.Module):
    def __init__(self, c, c_hidden):
        super().__init__()
        self.proj = nn.Linear(c, 2 * c_hidden)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, c, c_context, heads):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(c), Attention(c, c, heads)
        self.norm2, self.attn2 = (
            nn.LayerNorm(c),
            Attention(c, c_context, heads),
        )  # attn2 is what SDD trains
        self.norm3 = nn.LayerNorm(c)
        self.ff = named(
            net=nn.Sequential(GEGLU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c))
        )  # net.1 was a dropout of 0

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Places attend to each other and to the prompt; x (B, C, H, W), context (P, L, D)."""

    def __init__(self, c, c_context, heads, groups):
        super().__init__()
        self.norm = nn.GroupNorm(
            groups, c, 1e-6
        )  # 1e-6 here, 1e-5 in the ResNets: so was SD trained
        self.proj_in = nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c, c_context, heads)])
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x, context):
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]))


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class DownBlock(nn.Module):
    """One level on the way down; puts each of its outputs on the stack `skips`."""

    def __init__(self, c_in, c_out, n, c_emb, groups, transformer, last):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, c_emb, groups) for i in range(n)
        )
        self.attentions = nn.ModuleList(transformer(c_out) for _ in range(n if transformer else 0))
        self.downsamplers = nn.ModuleList(
            [] if last else [named(conv=nn.Conv2d(c_out, c_out, 3, stride=2, padding=1))]
        )

    def forward(self, x, emb, context, skips):
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, c, c_emb, groups, transformer):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(c, c, c_emb, groups), ResnetBlock(c, c, c_emb, groups)]
        )
        self.attentions = nn.ModuleList([transformer(c)])

    def forward(self, x, emb, context):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, emb), context), emb)


class UpBlock(nn.Module):
    """One level on the way up; each ResNet also reads what the way down left on top of the stack."""

    def __init__(self, c_in, c_out, c_skips, c_emb, groups, transformer, last):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock((c_in if i == 0 else c_out) + c_skip, c_out, c_emb, groups)
            for i, c_skip in enumerate(c_skips)
        )
        self.attentions = nn.ModuleList(
            transformer(c_out) for _ in (c_skips if transformer else ())
        )
        self.upsamplers = nn.ModuleList([] if last else [Upsample(c_out)])

    def forward(self, x, emb, context, skips):
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), emb)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample(
                x, skips[-1].shape[-2:]
            )  # not 2H x 2W: on odd sizes the skip has one place less
        return x


class UNet(nn.Module):
    """ε(z, t, c). Arguments are the keys of `unet/config.json`; the defaults are SD 1.4's.

    `attention_head_dim` is the *number* of heads, at every level: the config's name for it is a historical mistake.
    """

    def __init__(
        self,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=768,
        norm_num_groups=32,
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    ):
        super().__init__()
        widths, n, groups = list(block_out_channels), layers_per_block, norm_num_groups
        c_emb, top = 4 * widths[0], len(widths) - 1

        def transformer(c):
            return Transformer(c, cross_attention_dim, attention_head_dim, groups)

        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = named(
            linear_1=nn.Linear(widths[0], c_emb), silu=nn.SiLU(), linear_2=nn.Linear(c_emb, c_emb)
        )
        self.down_blocks = nn.ModuleList()
        c, c_skips = widths[0], [widths[0]]
        for level, kind in enumerate(down_block_types):
            cross = transformer if kind == "CrossAttnDownBlock2D" else None
            self.down_blocks.append(
                DownBlock(c, widths[level], n, c_emb, groups, cross, last=level == top)
            )
            c = widths[level]
            c_skips += [c] * (n if level == top else n + 1)
        self.mid_block = MidBlock(c, c_emb, groups, transformer)
        self.up_blocks = nn.ModuleList()
        for level, kind in enumerate(up_block_types):
            cross = transformer if kind == "CrossAttnUpBlock2D" else None
            skips = [c_skips.pop() for _ in range(n + 1)]
            self.up_blocks.append(
                UpBlock(c, widths[top - level], skips, c_emb, groups, cross, last=level == top)
            )
            c = widths[top - level]
        self.conv_norm_out = nn.GroupNorm(groups, c, 1e-5)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, z, t, context):
        """Latents (B, 4, H, W), timesteps 0..999 (B,) or (), prompt embeddings (P, L, D), each for B / P latents in a
        row -> noise (B, 4, H, W)."""
        # a number goes along with the kernel; copied to a GPU it would be waited for, in each evaluation
        t = (
            t.to(z.device).expand(len(z))
            if isinstance(t, torch.Tensor)
            else torch.full((len(z),), t, device=z.device)
        )
        emb = self.time_embedding(timestep_embedding(t, self.conv_in.out_channels).to(z.dtype))
        x = self.conv_in(z)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, emb, context, skips)
        x = self.mid_block(x, emb, context)
        for block in self.up_blocks:
            x = block(x, emb, context, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
