"""The layout of Stable Diffusion's original single file (github.com/CompVis/stable-diffusion), to and from our modules.

`model.diffusion_model.*` is the UNet, `first_stage_model.*` the VAE, `cond_stage_model.transformer.*` the text encoder. Names are
derived from the modules, level by level: the embedded model has them as well as SD 1.4.
"""

import re

from support.errors import UserError

PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
ASIDE = (
    "first_stage_model.loss.",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
)  # of no use when drawing
BARE = r"^cond_stage_model\.transformer\.(?!text_model\.)"  # as files that passed through newer transformers have it

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # places in nn.Sequentials, counted with their activations
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def unet_places(unet):
    """{module of ours: the original's}. Where our table of blocks counts by level, `input_blocks` counts every output of the way
    down, conv_in's first, and `output_blocks` every ResNet that takes one off the stack (openaimodel.py)."""
    places = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    resnets, i = (
        {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"},
        0,
    )
    for level, block in enumerate(unet.down_blocks):
        for j, _ in enumerate(block.resnets):
            i += 1
            resnets[f"down_blocks.{level}.resnets.{j}"] = f"input_blocks.{i}.0"
            places[f"down_blocks.{level}.attentions.{j}"] = f"input_blocks.{i}.1"
        i += len(block.downsamplers)
        places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{i}.0.op"
    i = -1
    for level, block in enumerate(unet.up_blocks):
        for j, _ in enumerate(block.resnets):
            i += 1
            resnets[f"up_blocks.{level}.resnets.{j}"] = f"output_blocks.{i}.0"
            places[f"up_blocks.{level}.attentions.{j}"] = f"output_blocks.{i}.1"
        behind = (
            2 if block.attentions else 1
        )  # the level's last ResNet and, where there is one, its transformer
        places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{i}.{behind}.conv"
    return places | {
        f"{ours}.{a}": f"{theirs}.{b}"
        for ours, theirs in resnets.items()
        for a, b in RESNET.items()
    }


def vae_places(vae):
    """The same for the autoencoder; the original counts the decoder's levels, too, from the picture's resolution down."""
    places, top = {}, len(vae.decoder.up_blocks) - 1
    for side, way, blocks in (
        ("encoder", "down", vae.encoder.down_blocks),
        ("decoder", "up", vae.decoder.up_blocks),
    ):
        places[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        places |= {
            f"{side}.mid_block.attentions.0.{a}": f"{side}.mid.attn_1.{b}"
            for a, b in VAE_ATTENTION.items()
        }
        resnets = {f"{side}.mid_block.resnets.{j}": f"{side}.mid.block_{j + 1}" for j in (0, 1)}
        for level, block in enumerate(blocks):
            theirs = f"{side}.{way}.{level if way == 'down' else top - level}"
            resnets |= {
                f"{side}.{way}_blocks.{level}.resnets.{j}": f"{theirs}.block.{j}"
                for j, _ in enumerate(block.resnets)
            }
            places[f"{side}.{way}_blocks.{level}.{way}samplers.0.conv"] = (
                f"{theirs}.{way}sample.conv"
            )
        places |= resnets | {
            f"{ours}.conv_shortcut": f"{theirs}.nin_shortcut" for ours, theirs in resnets.items()
        }
    return places


PLACES = {"unet": unet_places, "vae": vae_places, "text_encoder": lambda _: {}}


def original_names(network, module):
    """{tensor of `module`, one of NETWORKS: its name in the original layout}."""
    places = PLACES[network](module)

    def rename(name):
        place = max((p for p in places if name.startswith(f"{p}.")), key=len, default="")
        return PREFIX[network] + places.get(place, "") + name[len(place) :]

    return {name: rename(name) for name in module.state_dict()}


def to_original(networks):
    """{network: module} -> {original name: tensor}. The VAE's attention is of 1x1 convolutions: (C, C) becomes (C, C, 1, 1)."""
    tensors = {}
    for network, module in networks.items():
        names = original_names(network, module)
        for name, x in module.state_dict().items():
            matrix = network == "vae" and ".attentions." in name and x.dim() == 2
            tensors[names[name]] = x[:, :, None, None] if matrix else x
    return tensors


def from_original(tensors, networks, file):
    """Puts {original name: tensor} into {network: module on the meta device}, as float32. Returns the names that it left aside.
    UserError if a tensor is missing, unknown to its network or of another shape."""
    tensors = {re.sub(BARE, r"\g<0>text_model.", name): x for name, x in tensors.items()}
    names = {network: original_names(network, module) for network, module in networks.items()}
    wanted = {name for table in names.values() for name in table.values()}
    own = {
        name
        for name in tensors
        if name.startswith(tuple(PREFIX.values())) and not name.startswith(ASIDE)
    }
    for said, some in (
        (
            f"lacks {len(wanted - own):,} of the {len(wanted):,} tensors of Stable Diffusion 1.x",
            wanted - own,
        ),
        (f"has {len(own - wanted):,} tensors that Stable Diffusion 1.x has not", own - wanted),
    ):
        if some:
            raise UserError(
                f"{file} {said} ({few(some)}): it is incomplete, in another layout than the original's or of another "
                "architecture (2.x, XL and others are not implemented)."
            )
    for network, module in networks.items():
        state = {}
        for name, like in module.state_dict().items():
            theirs = names[network][name]
            x = tensors[theirs]
            if network == "vae" and ".attentions." in name and x.shape == (*like.shape, 1, 1):
                x = x.flatten(1)
            if x.shape != like.shape or not x.is_floating_point():
                raise UserError(
                    f"{file}: {theirs} is {x.dtype} {tuple(x.shape)}, and should be floating point "
                    f"{tuple(like.shape)}: it is of another architecture than Stable Diffusion 1.x."
                )
            state[name] = x.float()
        module.load_state_dict(state, strict=True, assign=True)
    return tensors.keys() - wanted


def few(names):
    return ", ".join(sorted(names)[:3]) + ", …" * (len(names) > 3)
