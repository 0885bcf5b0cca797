"""Stable Diffusion's noise predictor ε(z, t, c): the UNet (`UNet2DConditionModel`), from scratch.

The rows in `UNet.__init__` are the network: one row per block, from the latents down to 8 x 8
positions and back up. `unet/config.json` only changes their widths and kinds.

Attribute names are the checkpoint's names (diffusers' layout). So loading is
`load_state_dict(strict=True)`, without a table of names. vae.py has a ResnetBlock and an Attention
of its own, because each file of the lesson stands alone.

Letters in the shape comments, which stand where the shape changes:
    B      batch
    C      channels
    H, W   height and width of the feature map; N = H·W positions
    L, D   tokens of the prompt (77) and the width of their embeddings (768)
    h, d   attention heads (8), and channels per head: d = C / h
In einops patterns of feature maps, h and w are H and W.
"""

import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


def timestep_embedding(t, width):
    """Sinusoids of the timesteps (B,) -> (B, width).

    Cosines come first, and the frequencies are 10000^(-i / half) for i = 0 .. half − 1 (in the
    config: flip_sin_to_cos true, freq_shift 0).
    """
    half = width // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * i / half)
    angles = t.float()[:, None] * frequencies  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, width)


def named(**modules):
    """nn.Sequential with the checkpoint's names."""
    return nn.Sequential(OrderedDict(modules))


class ResnetBlock(nn.Module):
    """Two convolutions and a shortcut. The timestep enters between them, as a bias per channel."""

    def __init__(self, c_in, c_out, c_emb, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, 1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_emb, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, 1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_out, H, W)
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Multi-head attention of x (B, N, C) to a context (B, L, D), or to x itself without one."""

    def __init__(self, c, c_context, heads):
        super().__init__()
        if c % heads:
            raise ValueError(f"{heads} heads do not divide {c} channels")
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(c_context, c, bias=False)
        self.to_v = nn.Linear(c_context, c, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])  # a list only for the name `to_out.0`

    def forward(self, x, context=None):
        if context is None:
            context = x
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)  # (B, h, N, d)
        k = rearrange(self.to_k(context), "b l (h d) -> b h l d", h=self.heads)  # (B, h, L, d)
        v = rearrange(self.to_v(context), "b l (h d) -> b h l d", h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)  # softmax(q kᵀ / √d) v: (B, h, N, d)
        return self.to_out[0](rearrange(y, "b h n d -> b n (h d)"))  # (B, N, C)


class GEGLU(nn.Module):
    """A linear layer with 2·c_hidden outputs: the first half, times the GELU of the second."""

    def __init__(self, c, c_hidden):
        super().__init__()
        self.proj = nn.Linear(c, 2 * c_hidden)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)  # 2 x (B, N, c_hidden)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Positions attend to each other (attn1), then to the prompt (attn2). SDD trains attn2."""

    def __init__(self, c, c_context, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(c)
        self.attn1 = Attention(c, c, heads)
        self.norm2 = nn.LayerNorm(c)
        self.attn2 = Attention(c, c_context, heads)
        self.norm3 = nn.LayerNorm(c)
        # net.1 holds the place of a dropout, so that the second linear layer is `net.2`.
        self.ff = named(net=nn.Sequential(GEGLU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c)))

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """A TransformerBlock on the positions of a feature map x, with a context (B, L, D)."""

    def __init__(self, c, c_context, heads, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, 1e-6)  # 1e-6 here, 1e-5 in the ResNets
        self.proj_in = nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c, c_context, heads)])
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x))  # (B, C, H, W)
        h = rearrange(h, "b c h w -> b (h w) c")  # (B, N, C)
        h = self.transformer_blocks[0](h, context)
        h = rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])  # (B, C, H, W)
        return x + self.proj_out(h)


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # (B, C, *size)


def cross_attentions(kind, n, c, transformer):
    """n transformers for a block with cross-attention, none for a plain one."""
    if kind in ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"):
        return nn.ModuleList(transformer(c) for _ in range(n))
    if kind in ("DownBlock2D", "UpBlock2D"):
        return nn.ModuleList()
    raise ValueError(f"there is no block {kind!r}")


class DownBlock(nn.Module):
    """A row of the way down. It puts each of its outputs on the stack `skips`.

    inputs: the input channels of its ResNets, one number per ResNet; c: their output channels.
    transformer: makes a Transformer for c channels.
    """

    def __init__(self, kind, inputs, c, downsample, *, c_emb, groups, transformer):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in, c, c_emb, groups) for c_in in inputs)
        self.attentions = cross_attentions(kind, len(inputs), c, transformer)
        self.downsamplers = nn.ModuleList()  # 0 or 1 modules; a list for the checkpoint's name
        if downsample:
            self.downsamplers.append(named(conv=nn.Conv2d(c, c, 3, stride=2, padding=1)))

    def forward(self, x, emb, context, skips):
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)  # (B, c, H, W)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)  # (B, c, H/2, W/2)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """The bottom of the U."""

    def __init__(self, c, *, c_emb, groups, transformer):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, c, c_emb, groups) for _ in range(2))
        self.attentions = nn.ModuleList([transformer(c)])

    def forward(self, x, emb, context):
        x = self.resnets[0](x, emb)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    """A row of the way up. Each ResNet takes one output of the way down off the stack `skips`.

    inputs: the input channels of its ResNets, x plus skip; c: their output channels.
    """

    def __init__(self, kind, inputs, c, upsample, *, c_emb, groups, transformer):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in, c, c_emb, groups) for c_in in inputs)
        self.attentions = cross_attentions(kind, len(inputs), c, transformer)
        self.upsamplers = nn.ModuleList()  # 0 or 1 modules; a list for the checkpoint's name
        if upsample:
            self.upsamplers.append(Upsample(c))

    def forward(self, x, emb, context, skips):
        for i, resnet in enumerate(self.resnets):
            x = torch.cat([x, skips.pop()], dim=1)  # (B, inputs[i], H, W)
            x = resnet(x, emb)  # (B, c, H, W)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            # The skip's size, not 2H x 2W: an odd size was rounded up on the way down.
            size = skips[-1].shape[-2:]
            x = upsample(x, size)  # (B, c, *size)
        return x


class UNet(nn.Module):
    """ε(z, t, c). Its arguments are keys of `unet/config.json`; their defaults are SD 1.4's.

    `attention_head_dim` is the *number* of heads, in every block: the key has this name by mistake.
    Raises ValueError if the config describes a different network.
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
        down_block_types=(
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        up_block_types=(
            "UpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
        ),
    ):
        super().__init__()
        down, up = down_block_types, up_block_types
        if (len(block_out_channels), len(down), len(up), layers_per_block) != (4, 4, 4, 2):
            raise ValueError("the UNet has 4 blocks each way, with layers_per_block 2")
        c1, c2, c3, c4 = block_out_channels
        c_emb = 4 * c1
        transformer = partial(
            Transformer,
            c_context=cross_attention_dim,
            heads=attention_head_dim,
            groups=norm_num_groups,
        )
        sizes = dict(c_emb=c_emb, groups=norm_num_groups, transformer=transformer)  # of every block

        self.conv_in = nn.Conv2d(in_channels, c1, 3, padding=1)
        self.time_embedding = named(
            linear_1=nn.Linear(c1, c_emb), silu=nn.SiLU(), linear_2=nn.Linear(c_emb, c_emb)
        )
        # The U, one row per block: its kind, the input channels of its ResNets, its output
        # channels. In a block with cross-attention, a transformer follows each ResNet.
        # On the way up, each ResNet reads x and one skip, the newest first: x + skip channels.
        # On the right: SD 1.4's output channels, and the side of the feature map for 64 x 64
        # latents.
        # fmt: off
        self.down_blocks = nn.ModuleList([
            DownBlock(down[0], [c1, c1], c1, downsample=True, **sizes),           #  320   64 -> 32
            DownBlock(down[1], [c1, c2], c2, downsample=True, **sizes),           #  640   32 -> 16
            DownBlock(down[2], [c2, c3], c3, downsample=True, **sizes),           # 1280   16 ->  8
            DownBlock(down[3], [c3, c4], c4, downsample=False, **sizes),          # 1280    8
        ])
        self.mid_block = MidBlock(c4, **sizes)                                    # 1280    8
        self.up_blocks = nn.ModuleList([
            UpBlock(up[0], [c4+c4, c4+c4, c4+c3], c4, upsample=True, **sizes),    # 1280    8 -> 16
            UpBlock(up[1], [c4+c3, c3+c3, c3+c2], c3, upsample=True, **sizes),    # 1280   16 -> 32
            UpBlock(up[2], [c3+c2, c2+c2, c2+c1], c2, upsample=True, **sizes),    #  640   32 -> 64
            UpBlock(up[3], [c2+c1, c1+c1, c1+c1], c1, upsample=False, **sizes),   #  320   64
        ])
        # fmt: on
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, c1, 1e-5)
        self.conv_out = nn.Conv2d(c1, out_channels, 3, padding=1)

    def forward(self, z, t, context):
        """Estimates the noise in latents z (B, 4, H, W).

        t: their timesteps in 0 .. 999, one number or a tensor () or (B,).
        context: the embeddings of the prompts, (B, L, D), or (1, L, D) for one that all share.
        Returns the noise, (B, 4, H, W).
        """
        # SDD's loss passes one prompt for the whole batch. A view with B rows copies nothing.
        context = context.expand(len(z), -1, -1)  # (B, L, D)
        if isinstance(t, torch.Tensor):
            t = t.to(z.device).expand(len(z))  # (B,)
        else:
            # torch.full avoids a host-to-device copy, and so a synchronisation, in every step.
            t = torch.full((len(z),), t, device=z.device)
        emb = timestep_embedding(t, self.conv_in.out_channels).to(z.dtype)  # (B, c1)
        emb = self.time_embedding(emb)  # (B, c_emb)
        x = self.conv_in(z)  # (B, c1, H, W)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, emb, context, skips)
        x = self.mid_block(x, emb, context)  # (B, c4, H/8, W/8)
        for block in self.up_blocks:
            x = block(x, emb, context, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, 4, H, W)
