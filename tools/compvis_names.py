"""The layout of Stable Diffusion's original single file (github.com/CompVis/stable-diffusion).

The original's names are derived from ours, block by block, so the toy model's are found as well as
SD 1.4's. Reading and writing use the same table, `original_names`.
"""

import re

from support.errors import UserError
from weights import other_architecture

PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
UNUSED = (  # in some files, and not needed to generate images
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
    "cond_stage_model.transformer.text_model.text_projection",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
)
# Names of the VAE's attention in newer files and in files of 2022.
SPELLINGS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
SPELLINGS |= {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
ATTENTION = rf"(^first_stage_model\..*\.attn_1\.)({'|'.join(map(re.escape, SPELLINGS))})(?=\.)"
# The text encoder's names without "text_model.", as in files that went through transformers 5.
BARE = r"^cond_stage_model\.transformer\.(?!text_model\.)"
SIZES = ("input_blocks.0.0.weight", "attn2.to_k.weight")  # their second size tells architectures
LAYERS = {  # {network: {our layer of a block: the original's}}
    "unet": {  # an index in an nn.Sequential that contains the activations, too
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    },
    "vae": {
        "conv_shortcut": "nin_shortcut",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    },
    "text_encoder": {},
}
OTHER_ARCHITECTURE = "(2.x, XL and others are not implemented)"


# -------------------------------------------------------------------------------------------- names
def unet_blocks(names):
    """{our block: the original's}, for the UNet.

    We count blocks by resolution. The original numbers them in a row (openaimodel.py):
    `input_blocks` has one entry for conv_in, each ResNet and each downsampling; `output_blocks` has
    one entry for each ResNet that takes a tensor from the skip stack.
    """
    blocks = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    n = count(names, "up_blocks.0.resnets")  # entries of a level
    for i in range(count(names, "up_blocks")):
        for j in range(n):
            entry = i * n + j
            blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{entry + 1}.0"
            blocks[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{entry + 1}.1"
            blocks[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{entry}.0"
            blocks[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{entry}.1"
        blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{entry + 1}.0.op"
        # In the entry of the level's last ResNet, after it and its transformer, if it has one.
        position = 2 if count(names, f"up_blocks.{i}.attentions") else 1
        blocks[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{entry}.{position}.conv"
    return blocks


def vae_blocks(names):
    """The same for the VAE. The original counts the decoder's, too, from the image's resolution."""
    blocks, levels = {}, count(names, "decoder.up_blocks")
    for side, way in (("encoder", "down"), ("decoder", "up")):
        blocks[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        blocks[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        for j in range(2):
            blocks[f"{side}.mid_block.resnets.{j}"] = f"{side}.mid.block_{j + 1}"
        for i in range(levels):
            ours = f"{side}.{way}_blocks.{i}"
            theirs = f"{side}.{way}.{i if way == 'down' else levels - 1 - i}"
            for j in range(count(names, f"{ours}.resnets")):
                blocks[f"{ours}.resnets.{j}"] = f"{theirs}.block.{j}"
            blocks[f"{ours}.{way}samplers.0.conv"] = f"{theirs}.{way}sample.conv"
    return blocks


def count(names, start):
    """How many blocks there are: start.0, start.1, …"""
    return len({name[len(start) :].split(".")[1] for name in names if name.startswith(f"{start}.")})


def original_names(network, names):
    """{name: its name in the original layout} of our names of a network's tensors."""
    blocks = {"unet": unet_blocks, "vae": vae_blocks, "text_encoder": lambda _: {}}[network](names)
    found = {}
    for name in names:
        block = next((block for block in blocks if name.startswith(f"{block}.")), "")
        layer, _, kind = name.removeprefix(f"{block}.").rpartition(".")
        parts = blocks.get(block), LAYERS[network].get(layer, layer), kind
        found[name] = PREFIX[network] + ".".join(part for part in parts if part)
    return found


def spelled(name):
    """A name of a single file as the original spells it."""
    name = re.sub(BARE, r"\g<0>text_model.", name)
    return re.sub(ATTENTION, lambda found: found[1] + SPELLINGS[found[2]], name)


def some_names(names):
    """The first three names, as text."""
    more = ", …" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


# ------------------------------------------------------------------------------------------ tensors
def to_original(states):
    """{network: {our name: tensor}} -> {original name: tensor}."""
    tensors = {}
    for network, state in states.items():
        for name, original in original_names(network, state).items():
            x = state[name]
            if network == "vae" and ".attentions." in name and x.dim() == 2:
                x = x[:, :, None, None]  # the original has a 1x1 convolution
            tensors[original] = x
    return tensors


def from_original(tensors, like, file):
    """({network: {our name: tensor}}, the names that no network uses) of {original name: tensor}.

    like: {network: {our name: tensor}}, all that the networks need; only their shapes are used.
    UserError if a tensor is missing, unknown to its network or of another shape.
    """
    sizes = {name: x.shape[1] for name, x in tensors.items() if name.endswith(SIZES)}
    channels = sizes.get("model.diffusion_model.input_blocks.0.0.weight")
    width = next((n for name, n in sizes.items() if name.endswith(SIZES[1])), None)
    if what := other_architecture(tensors, channels, width):
        raise UserError(f"{file} is {what}, which is not implemented: use Stable Diffusion 1.x.")
    tensors = {spelled(name): x for name, x in tensors.items()}
    names = {network: original_names(network, own) for network, own in like.items()}
    wanted = {original for own in names.values() for original in own.values()}
    prefixes = tuple(PREFIX.values())
    found = {name for name in tensors if name.startswith(prefixes) and not name.startswith(UNUSED)}
    if not any(name.startswith(PREFIX["vae"]) for name in found):
        raise UserError(f"{file} has no VAE: name a folder that has one with --vae.")
    if missing := wanted - found:
        raise UserError(
            f"{file} lacks {len(missing):,} of the {len(wanted):,} tensors of Stable Diffusion 1.x "
            f"({some_names(missing)}): it is incomplete, in another layout, or of another "
            f"architecture {OTHER_ARCHITECTURE}."
        )
    if unknown := found - wanted:
        raise UserError(
            f"{file} has {len(unknown):,} tensors that Stable Diffusion 1.x does not have "
            f"({some_names(unknown)}): it is in another layout, or of another architecture "
            f"{OTHER_ARCHITECTURE}."
        )
    states = {network: {} for network in like}
    for network, state in states.items():
        for name, original in names[network].items():
            x, shape = tensors[original], like[network][name].shape
            if len(shape) == 2 and x.shape == (*shape, 1, 1):  # of the VAE's attention
                x = x.flatten(1)
            if x.shape != shape or not x.is_floating_point():
                raise UserError(
                    f"{file}: {original} is {x.dtype} {tuple(x.shape)}, and should be floating "
                    f"point {tuple(shape)}: this is another architecture than "
                    "Stable Diffusion 1.x."
                )
            state[name] = x
    return states, tensors.keys() - wanted
