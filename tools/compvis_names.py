"""The layout of Stable Diffusion's original single file (github.com/CompVis/stable-diffusion).

`model.diffusion_model.*` is the UNet, `first_stage_model.*` the VAE, and
`cond_stage_model.transformer.*` the text encoder. Names are derived from our modules, block by
block, so the toy model's are found as well as SD 1.4's.
"""

import re

from support.errors import UserError

PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
UNUSED = (  # in some files, and not needed to generate images
    "first_stage_model.loss.",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
)
# The text encoder's names without "text_model.", as in files that went through transformers 5.
BARE = r"^cond_stage_model\.transformer\.(?!text_model\.)"

RESNET = {  # ours: the original's, an index in an nn.Sequential that contains the activations, too
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OTHER_ARCHITECTURE = "(2.x, XL and others are not implemented)"


# -------------------------------------------------------------------------------------------- names
def unet_names(unet):
    """{our module: the original's}, for the UNet.

    We count blocks by resolution. The original numbers them in a row (openaimodel.py):
    `input_blocks` has one entry for conv_in, each ResNet and each downsampling; `output_blocks` has
    one entry for each ResNet that takes a tensor from the skip stack.
    """
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    i = 0  # input_blocks.0 is conv_in
    for level, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            i += 1
            resnets[f"down_blocks.{level}.resnets.{j}"] = f"input_blocks.{i}.0"
            names[f"down_blocks.{level}.attentions.{j}"] = f"input_blocks.{i}.1"
        i += len(block.downsamplers)
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{i}.0.op"
    i = -1
    for level, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            i += 1
            resnets[f"up_blocks.{level}.resnets.{j}"] = f"output_blocks.{i}.0"
            names[f"up_blocks.{level}.attentions.{j}"] = f"output_blocks.{i}.1"
        # In the entry of the level's last ResNet, after it and its transformer, if it has one.
        position = 2 if block.attentions else 1
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{i}.{position}.conv"
    for ours, theirs in resnets.items():
        for a, b in RESNET.items():
            names[f"{ours}.{a}"] = f"{theirs}.{b}"
    return names


def vae_names(vae):
    """{our module: the original's}, for the VAE.

    The original numbers the decoder's blocks, too, from the image's resolution down.
    """
    names = {}
    last = len(vae.decoder.up_blocks) - 1
    for side, way, blocks in (
        ("encoder", "down", vae.encoder.down_blocks),
        ("decoder", "up", vae.decoder.up_blocks),
    ):
        names[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for a, b in VAE_ATTENTION.items():
            names[f"{side}.mid_block.attentions.0.{a}"] = f"{side}.mid.attn_1.{b}"
        resnets = {}
        for j in range(2):
            resnets[f"{side}.mid_block.resnets.{j}"] = f"{side}.mid.block_{j + 1}"
        for level, block in enumerate(blocks):
            number = level if way == "down" else last - level
            theirs = f"{side}.{way}.{number}"
            for j in range(len(block.resnets)):
                resnets[f"{side}.{way}_blocks.{level}.resnets.{j}"] = f"{theirs}.block.{j}"
            ours = f"{side}.{way}_blocks.{level}.{way}samplers.0.conv"
            names[ours] = f"{theirs}.{way}sample.conv"
        for ours, theirs in resnets.items():
            names[ours] = theirs
            names[f"{ours}.conv_shortcut"] = f"{theirs}.nin_shortcut"
    return names


def module_names(network, module):
    if network == "unet":
        return unet_names(module)
    if network == "vae":
        return vae_names(module)
    return {}  # the text encoder has the same names in both layouts


def original_names(network, module):
    """{name of a tensor of `module`, one of NETWORKS: its name in the original layout}."""
    names = module_names(network, module)
    result = {}
    for name in module.state_dict():
        ours = ""  # the longest module name that the tensor's name begins with
        for candidate in names:
            if name.startswith(f"{candidate}.") and len(candidate) > len(ours):
                ours = candidate
        result[name] = PREFIX[network] + names.get(ours, "") + name[len(ours) :]
    return result


def is_convolution(network, name):
    """Whether the original has this matrix (C, C) as a 1x1 convolution (C, C, 1, 1)."""
    return network == "vae" and ".attentions." in name


# ------------------------------------------------------------------------------------------ tensors
def to_original(networks):
    """{network: module} -> {original name: tensor}."""
    tensors = {}
    for network, module in networks.items():
        names = original_names(network, module)
        for name, x in module.state_dict().items():
            if is_convolution(network, name) and x.dim() == 2:
                x = x[:, :, None, None]
            tensors[names[name]] = x
    return tensors


def from_original(tensors, networks, file):
    """Puts {original name: tensor} into {network: module on the meta device}, as float32.

    Returns the names that no network uses. UserError if a tensor is missing, unknown to its network
    or of another shape.
    """
    tensors = {re.sub(BARE, r"\g<0>text_model.", name): x for name, x in tensors.items()}
    names = {network: original_names(network, module) for network, module in networks.items()}
    wanted = set()
    for table in names.values():
        wanted |= set(table.values())
    check_names(tensors, wanted, file)
    for network, module in networks.items():
        state = {}
        for name, like in module.state_dict().items():
            original = names[network][name]
            x = tensors[original]
            if is_convolution(network, name) and x.shape == (*like.shape, 1, 1):
                x = x.flatten(1)
            if x.shape != like.shape or not x.is_floating_point():
                raise UserError(
                    f"{file}: {original} is {x.dtype} {tuple(x.shape)}, and should be floating "
                    f"point {tuple(like.shape)}: this is another architecture than "
                    "Stable Diffusion 1.x."
                )
            state[name] = x.float()
        module.load_state_dict(state, strict=True, assign=True)
    return tensors.keys() - wanted


def check_names(tensors, wanted, file):
    """UserError if tensors of the three networks are missing, or there are more than `wanted`."""
    found = set()
    for name in tensors:
        if name.startswith(tuple(PREFIX.values())) and not name.startswith(UNUSED):
            found.add(name)
    missing, unknown = wanted - found, found - wanted
    if missing:
        raise UserError(
            f"{file} lacks {len(missing):,} of the {len(wanted):,} tensors of Stable Diffusion 1.x "
            f"({some_names(missing)}): it is incomplete, in another layout, or of another "
            f"architecture {OTHER_ARCHITECTURE}."
        )
    if unknown:
        raise UserError(
            f"{file} has {len(unknown):,} tensors that Stable Diffusion 1.x does not have "
            f"({some_names(unknown)}): it is in another layout, or of another architecture "
            f"{OTHER_ARCHITECTURE}."
        )


def some_names(names):
    """The first three names, as text."""
    more = ", …" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more
