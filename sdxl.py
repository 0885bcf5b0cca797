"""Stable Diffusion XL's UNet and text encoders, on the blocks of unet.py and clip_text.py.

Podell et al. 2023 (arXiv 2307.01952). What differs from Stable Diffusion 1.4:

1. Two text encoders read the prompt. Their states stand side by side: 768 numbers of CLIP
   ViT-L/14, the encoder of SD 1.4, and 1280 of OpenCLIP ViT-bigG/14, which is larger and was
   trained on more images. The second one has the exact GELU, and its tokenizer fills a prompt up
   with "!" (token 0).
2. A state is the output of the layer *before* the last, without the final LayerNorm. The last layer
   prepares one vector for the comparison with an image. The layer before describes each token.
3. That vector is the *pooled state*: the second encoder's last layer and LayerNorm, at the end
   token, times a matrix. It describes the whole prompt. It enters the UNet without attention:
   `add_embedding` turns it into a bias for each ResNet, as `time_embedding` does with the timestep.
4. Six more numbers enter with the pooled state: height and width of the original image, top and
   left edge of the crop, height and width to generate. SDXL was trained on small and on cropped
   images, too, and on these numbers. So you can ask for a large, whole image.
5. The UNet has three rows each way instead of four. A transformer has 2 TransformerBlocks in the
   second row and 10 in the third. Each head has 64 channels. The projections before and after the
   TransformerBlocks are linear layers on positions, not 1x1 convolutions.
6. The autoencoder is SD 1.4's network, trained again: `scaling_factor` is 0.13025. It decodes in
   float32, because float16 overflows (in the config: `force_upcast`).
7. The sampler is Euler's method. It *is* DDIM: let x = z / √ᾱ and σ = √((1 − ᾱ) / ᾱ). Then DDIM's
   step reads x + (σ_next − σ) e. Only the end differs: Euler ends at σ = 0, so ᾱ is 1 there.
8. For guidance without a negative prompt, e_0 is the estimate for *zeros*, not for the empty
   prompt (in model_index.json: `force_zeros_for_empty_prompt`).

Here a prompt has 78 rows of 2048 numbers: 77 states, and the pooled state as row 78, with zeros
behind its 1280 numbers. The UNet takes row 78 off again. So samplers, guidance and losses are those
of SD 1.4.

Letters in the shape comments: as in unet.py. L = 78, D = 2048, P = 1280 (the pooled state).
"""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import unet
from clip_text import CLIPText
from unet import DownBlock, MidBlock, TransformerBlock, UpBlock, named, timestep_embedding

# Kinds of blocks: without transformers, and with them
DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"


# ------------------------------------------------------------------------------------ text encoders
class CLIPTextProjection(CLIPText):
    """The second text encoder: a CLIPText, and the matrix for the pooled state.

    Its arguments are keys of `text_encoder_2/config.json`; their defaults are SDXL's.
    """

    def __init__(self, projection_dim=1280, hidden_size=1280, **others):
        sizes = dict(intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
        super().__init__(**dict(hidden_size=hidden_size, hidden_act="gelu") | sizes | others)
        self.text_projection = nn.Linear(hidden_size, projection_dim, bias=False)


class CLIPTextXL(nn.Module):
    """Both text encoders. They have the names of the folders that hold their weights."""

    def __init__(self, text_encoder, text_encoder_2):
        super().__init__()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2

    def forward(self, tokens, tokens_2):
        """Token ids of both tokenizers, (B, 77) each -> 77 states and the pooled state (B, 78, D).

        The end token has the highest id, so argmax finds the first one.
        """
        second = self.text_encoder_2
        states = before_last(self.text_encoder.text_model, tokens)  # (B, 77, 768)
        states_2 = before_last(second.text_model, tokens_2)  # (B, 77, 1280)
        last = second.text_model.encoder["layers"][-1](states_2)
        last = second.text_model.final_layer_norm(last)
        rows = torch.arange(len(last), device=last.device)
        pooled = second.text_projection(last[rows, tokens_2.argmax(dim=1)])  # (B, P)
        states = torch.cat([states, states_2], dim=2)  # (B, 77, D)
        row_78 = F.pad(pooled, (0, states.shape[2] - pooled.shape[1]))  # (B, D)
        return torch.cat([states, row_78[:, None]], dim=1)  # (B, 78, D)


def before_last(text_model, tokens):
    """The output of the layer before the last: token ids (B, 77) -> states (B, 77, C)."""
    x = text_model.embeddings(tokens)
    for layer in text_model.encoder["layers"][:-1]:
        x = layer(x)
    return x


# --------------------------------------------------------------------------------------------- UNet
class Transformer(unet.Transformer):
    """`depth` TransformerBlocks on the positions of a feature map. Its projections are linear."""

    def __init__(self, c, c_context, heads, groups, depth):
        super().__init__(c, c_context, heads, groups)
        self.proj_in = nn.Linear(c, c)
        blocks = [TransformerBlock(c, c_context, heads) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(c, c)

    def forward(self, x, context):
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")  # (B, N, C)
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h)
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])  # (B, C, H, W)


class UNetXL(nn.Module):
    """ε(z, t, c). Its arguments are keys of `unet/config.json`; their defaults are SDXL's.

    `attention_head_dim` is the *number* of heads of each row, `transformer_layers_per_block` the
    number of TransformerBlocks in each of its transformers. The first row has no transformer.
    `projection_class_embeddings_input_dim` is P plus six times `addition_time_embed_dim`.
    Raises ValueError if the config describes a different network.
    """

    factor = 8  # pixels per latent, in each direction: the VAE's f

    def __init__(
        self,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        norm_num_groups=32,
    ):
        super().__init__()
        rows = (block_out_channels, transformer_layers_per_block, attention_head_dim)
        if [len(row) for row in rows] + [layers_per_block] != [3, 3, 3, 2]:
            raise ValueError("the UNet has 3 rows each way, with layers_per_block 2")
        c1, c2, c3 = block_out_channels
        c_emb = 4 * c1
        self.c_size = addition_time_embed_dim
        self.c_pooled = projection_class_embeddings_input_dim - 6 * self.c_size
        if not 0 < self.c_pooled <= cross_attention_dim:
            raise ValueError(f"a pooled state of {self.c_pooled} numbers does not fit one row")

        row_1, row_2, row_3 = (
            dict(
                c_emb=c_emb,
                groups=norm_num_groups,
                transformer=partial(
                    Transformer,
                    c_context=cross_attention_dim,
                    heads=heads,
                    groups=norm_num_groups,
                    depth=depth,
                ),
            )
            for heads, depth in zip(attention_head_dim, transformer_layers_per_block)
        )
        self.conv_in = nn.Conv2d(in_channels, c1, 3, padding=1)
        self.time_embedding = named(
            linear_1=nn.Linear(c1, c_emb), silu=nn.SiLU(), linear_2=nn.Linear(c_emb, c_emb)
        )
        self.add_embedding = named(
            linear_1=nn.Linear(projection_class_embeddings_input_dim, c_emb),
            silu=nn.SiLU(),
            linear_2=nn.Linear(c_emb, c_emb),
        )
        # The U, one row per block, as in unet.py. On the right: SDXL's output channels, its
        # TransformerBlocks per transformer, and the side of the feature maps for 128 x 128 latents.
        # fmt: off
        self.down_blocks = nn.ModuleList([
            DownBlock(DOWN, [c1, c1], c1, downsample=True, **row_1),              #  320  0  128
            DownBlock(CROSS_DOWN, [c1, c2], c2, downsample=True, **row_2),        #  640  2   64
            DownBlock(CROSS_DOWN, [c2, c3], c3, downsample=False, **row_3),       # 1280 10   32
        ])
        self.mid_block = MidBlock(c3, **row_3)                                    # 1280 10   32
        self.up_blocks = nn.ModuleList([
            UpBlock(CROSS_UP, [c3+c3, c3+c3, c3+c2], c3, upsample=True, **row_3), # 1280 10   32
            UpBlock(CROSS_UP, [c3+c2, c2+c2, c2+c1], c2, upsample=True, **row_2), #  640  2   64
            UpBlock(UP, [c2+c1, c1+c1, c1+c1], c1, upsample=False, **row_1),      #  320  0  128
        ])
        # fmt: on
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, c1, 1e-5)
        self.conv_out = nn.Conv2d(c1, out_channels, 3, padding=1)

    def forward(self, z, t, context):
        """Estimates the noise in latents z (B, 4, H, W).

        t: their timesteps in 0 .. 999, one number or a tensor () or (B,).
        context: states and pooled states of the prompts, (B, L, D), or (1, L, D) for one that all
        share.
        Returns the noise, (B, 4, H, W).
        """
        context = context.expand(len(z), -1, -1)
        context, pooled = context[:, :-1], context[:, -1, : self.c_pooled]  # (B, 77, D), (B, P)
        if isinstance(t, torch.Tensor):
            t = t.to(z.device).expand(len(z))  # (B,)
        else:
            t = torch.full((len(z),), t, device=z.device)
        emb = timestep_embedding(t, self.conv_in.out_channels).to(z.dtype)  # (B, c1)
        emb = self.time_embedding(emb)  # (B, c_emb)
        emb = emb + self.add_embedding(torch.cat([pooled, self.sizes(z)], dim=1))
        x = self.conv_in(z)  # (B, c1, H, W)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, emb, context, skips)
        x = self.mid_block(x, emb, context)  # (B, c3, H/4, W/4)
        for block in self.up_blocks:
            x = block(x, emb, context, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, 4, H, W)

    def sizes(self, z):
        """Sinusoids of the six size numbers, for a whole image of the size of z: (B, 6 · 256)."""
        height, width = self.factor * z.shape[2], self.factor * z.shape[3]
        pixels = [height, width, 0, 0, height, width]
        rows = [torch.full((len(z),), n, device=z.device) for n in pixels]
        numbers = torch.stack(rows, dim=1).flatten()  # (6 B,)
        sinusoids = timestep_embedding(numbers, self.c_size)  # (6 B, 256)
        return sinusoids.view(len(z), -1).to(z.dtype)  # (B, 6 · 256)
