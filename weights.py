"""Files <-> modules, strictly: the only file of the project that reads or writes weights, and safetensors only.

    load(model)             `toy`, `emoji`, a hub id or a folder in diffusers' layout -> a Model
    save_patch, load_patch  the trained tensors of a fine-tuned UNet, with what they are and which base they belong to
    save_checkpoint, …      a training run as it stands
Whatever is wrong with a user's files is raised as a UserError, one sentence that says what to do.
"""

import hashlib
import inspect
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from clip_text import CLIPText
from support.errors import UserError
from support.files import atomic_write, checksum, damage
from unet import UNet
from vae import VAE

DEFAULT_MODEL = "CompVis/stable-diffusion-v1-4"
TOY = Path(__file__).parent / "toy" / "model"
TOYS = {"toy": TOY, "emoji": TOY.with_name("emoji_model")}
NETWORKS = {
    "unet": (UNet, "diffusion_pytorch_model"),
    "vae": (VAE, "diffusion_pytorch_model"),
    "text_encoder": (CLIPText, "model"),
}

# Config keys whose other values would change the arithmetic: key -> the values that these modules implement. The networks'
# remaining keys are their constructor's arguments; what is neither and neither empty nor INERT is refused.
ONLY = {
    "unet": dict(
        act_fn=["silu"],
        downsample_padding=[1],
        flip_sin_to_cos=[True],
        freq_shift=[0],
        mid_block_scale_factor=[1],
        norm_eps=[1e-5],
        mid_block_type=["UNetMidBlock2DCrossAttn"],
        resnet_time_scale_shift=["default"],
        time_embedding_type=["positional"],
        transformer_layers_per_block=[1],
        conv_in_kernel=[3],
        conv_out_kernel=[3],
        attention_type=["default"],
        resnet_out_scale_factor=[1],
    ),
    "vae": dict(
        act_fn=["silu"],
        mid_block_add_attention=[True],
        use_quant_conv=[True],
        use_post_quant_conv=[True],
    ),
    "text_encoder": dict(hidden_act=["quick_gelu"], model_type=["clip_text_model"]),
    "scheduler": dict(
        beta_schedule=["scaled_linear"],
        prediction_type=["epsilon"],
        timestep_spacing=["leading"],
        skip_prk_steps=[True],
    ),
}
BLOCKS = {
    "unet": dict(
        down_block_types={"DownBlock2D", "CrossAttnDownBlock2D"},
        up_block_types={"UpBlock2D", "CrossAttnUpBlock2D"},
    ),
    "vae": dict(down_block_types={"DownEncoderBlock2D"}, up_block_types={"UpDecoderBlock2D"}),
    "text_encoder": {},
    "scheduler": {},
}
ARGUMENTS = {
    network: set(inspect.signature(make).parameters) for network, (make, _) in NETWORKS.items()
}
ARGUMENTS["scheduler"] = {"num_train_timesteps", "beta_start", "beta_end", "steps_offset"}
INERT = {
    "architectures",
    "initializer_factor",
    "initializer_range",
    "projection_dim",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "force_upcast",
    "addition_embed_type_num_heads",
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "sample_max_value",
}


class Model(NamedTuple):
    name: str
    unet: UNet
    vae: VAE
    text_encoder: CLIPText
    tokenizer: CLIPTokenizer
    scheduler: dict  # scheduler_config.json, checked
    resolution: int  # pixels a side that the model was trained for


def find(model, revision=None):
    """The folder that holds `model`; a hub id is downloaded first (only the files that `load` reads; resumable)."""
    if model in TOYS or model and Path(model).is_dir():
        if revision:
            raise UserError(
                f"--revision is for models from the hub; {model} is a folder on this machine."
            )
        return TOYS.get(model) or Path(model)
    if model and (Path(model).is_file() or str(model).endswith(".safetensors")):
        raise UserError(
            f"{model} is one file: make it a folder: python convert.py --model {model} --format diffusers --out DIR"
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        raise UserError(
            f"There is no folder {model}, and it is not a hub id like {DEFAULT_MODEL}; or say `toy` or `emoji`."
        )
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = set(HfApi().list_repo_files(model, revision=revision))
        wanted = [_weights_file(names, network, model) for network in NETWORKS]
        wanted += [f"{network}/config.json" for network in NETWORKS] + [
            "scheduler/scheduler_config.json"
        ]
        wanted += [
            name
            for name in names
            if name.startswith("tokenizer/") and name.endswith((".json", ".txt"))
        ]
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except UserError:
        raise
    except Exception as e:  # the hub's client raises some twenty classes; whatever it was, a complete copy may be here
        try:
            folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
            here = {p.relative_to(folder).as_posix() for p in folder.glob("*/*")}
            [
                _weights_file(here, network, model) for network in NETWORKS
            ]  # is it all here, or did a download break off?
            return folder
        except Exception:
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise UserError(
                f"Cannot get {model} from the hub ({reason}): check the name and the network and run the same "
                "command again (a download goes on where it stopped), or name a local folder."
            ) from e


def _weights_file(names, network, model):
    stem = f"{network}/{NETWORKS[network][1]}"
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if name in names:
            return name
    pickled = [
        name
        for name in sorted(names)
        if name.startswith(f"{network}/") and name.endswith((".bin", ".ckpt", ".pt"))
    ]
    if pickled:
        raise UserError(
            f"{model} has {network} only as a pickle ({pickled[0]}), which can run code when opened and is never "
            "read here: get the .safetensors files, or convert it with diffusers."
        )
    raise UserError(
        f"{model} has no {stem}.safetensors: it should be a folder in diffusers' layout (see the README)."
    )


def read_config(folder, part):
    """part's config.json; a value that these modules do not implement is refused by name."""
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        items = (
            {"skip_prk_steps": False} if config.get("_class_name") == "PNDMScheduler" else {}
        ) | config  # diffusers' default
    except FileNotFoundError:
        raise UserError(f"{file} is missing: a model is a folder in diffusers' layout.") from None
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{file} is not a readable JSON object ({e}): fetch it again.") from e
    for key, value in items.items():
        if key in ONLY[part]:
            fine = value in ONLY[part][key]
        elif key in BLOCKS[part]:
            fine = isinstance(value, list) and set(value) <= BLOCKS[part][key]
        elif key in ARGUMENTS[part] or key == "sample_size" and value is not None:
            values = (
                value
                if key == "block_out_channels" and isinstance(value, list) and value
                else [value]
            )
            real = (
                (int, float)
                if key in ("beta_start", "beta_end", "layer_norm_eps", "scaling_factor")
                else (int,)
            )
            fine = all(type(v) in real and v >= 0 for v in values)
        else:
            fine = key.startswith("_") or key in INERT or not value
        if not fine:
            raise UserError(
                f"{file}: {key} = {value!r} is not what Stable Diffusion 1.x computes, and is not implemented."
            )
    return config


def read(file):
    """All tensors of a safetensors file, as they are, and its metadata. UserError if it is not whole, or damaged."""
    try:
        with safe_open(file, "pt") as f:
            tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"There is no file {file}.") from None
    except (SafetensorError, OSError) as e:
        raise UserError(
            f"{file} is not a whole safetensors file ({_first_cut(file) or e}): fetch or make it again."
        ) from e
    if why := damage(tensors, metadata):
        raise UserError(f"{file} {why}: it is damaged; fetch or make it again.")
    return tensors, metadata


def _first_cut(file):
    """The first tensor that a truncated file does not hold to its end, in words."""
    try:
        with open(file, "rb") as f:
            n = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(n)) if n < 100_000_000 else {}
        here = os.path.getsize(file) - 8 - n
        header.pop("__metadata__", None)
        cut = [
            name
            for name, t in sorted(header.items(), key=lambda x: x[1]["data_offsets"])
            if t["data_offsets"][1] > here
        ]
        return f"{cut[0]} is cut off" if cut else None
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None


OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _rename(network, tensors):
    """Older and newer files' names -> ours; the VAE attention's 1x1 convolutions become matrices."""
    renamed = {}
    for name, x in tensors.items():
        if network == "text_encoder":
            if name.endswith("position_ids"):  # 0..76, in files of 2022
                continue
            name = (
                name if name.startswith("text_model.") else f"text_model.{name}"
            )  # transformers 5 leaves it out
        elif network == "vae" and ".attentions." in name:
            stem, leaf, kind = name.rsplit(".", 2)
            name = f"{stem}.{OLD_VAE.get(leaf, leaf)}.{kind}"
            x = x.flatten(1) if x.dim() == 4 and x.shape[2:] == (1, 1) else x
        renamed[name] = x
    return renamed


def _fill(module, tensors, file):
    """Strict: every tensor of the module once, of its shape, and nothing else. Widened to float32."""
    wanted = module.state_dict()
    for what, names in (
        ("is missing", wanted.keys() - tensors.keys()),
        ("is unknown", tensors.keys() - wanted.keys()),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(
                f"{file}: {min(names)} {what}{more}: these are other weights than the config.json beside them says."
            )
    for name, x in tensors.items():
        if x.shape != wanted[name].shape or not x.is_floating_point():
            raise UserError(
                f"{file}: {name} is {x.dtype} {tuple(x.shape)}, and should be floating point "
                f"{tuple(wanted[name].shape)}: these are other weights than the config.json beside them says."
            )
    module.load_state_dict(
        {name: x.float() for name, x in tensors.items()}, strict=True, assign=True
    )


def make_network(folder, network):
    """One of NETWORKS as its config.json has it, on the meta device: names and shapes, no numbers."""
    ours = {
        key: value
        for key, value in read_config(folder, network).items()
        if key in ARGUMENTS[network]
    }
    try:
        with torch.device("meta"):
            return NETWORKS[network][0](**ours)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError, IndexError) as e:
        raise UserError(
            f"{folder / network / 'config.json'}: these sizes make no network ({e})."
        ) from e


def load_network(folder, network):
    """One of NETWORKS from a diffusers folder: float32, on the CPU, in eval mode."""
    module, names = (
        make_network(folder, network),
        {p.relative_to(folder).as_posix() for p in folder.glob("*/*")},
    )
    file = folder / _weights_file(names, network, folder)
    tensors, _ = read(file)
    _fill(module, _rename(network, tensors), file)
    count = sum(p.numel() for p in module.parameters())
    print(
        f"{network}: {file}, {len(module.state_dict())} tensors, {count:,} parameters", flush=True
    )
    return module.eval().requires_grad_(False)


def load_tokenizer(folder):
    try:
        return CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (
        Exception
    ) as e:  # a tokenizer's files can be wrong in as many ways as there are parsers behind it
        raise UserError(
            f"{folder / 'tokenizer'} cannot be read ({str(e).splitlines()[0]}): fetch it again."
        ) from e


def load(model=DEFAULT_MODEL, revision=None):
    """The three networks (float32, on the CPU, in eval mode), the tokenizer and the sampler's config. UserError if any file is
    missing, damaged, or not what Stable Diffusion 1.x computes."""
    folder = find(model, revision)
    scheduler, config = read_config(folder, "scheduler"), read_config(folder, "unet")
    tokenizer = load_tokenizer(folder)
    networks = {network: load_network(folder, network) for network in NETWORKS}
    size, version = config.get("sample_size") or 64, str(config.get("_diffusers_version", "0"))
    if size < 64 and tuple(int(x) for x in re.findall(r"\d+", version)[:2]) < (0, 9):
        size = 64  # as diffusers does with configs of 2022, some of which state a smaller one by mistake
    return Model(
        str(model),
        **networks,
        tokenizer=tokenizer,
        scheduler=scheduler,
        resolution=size * networks["vae"].factor,
    )


def save(file, tensors, metadata=None):
    """Writes tensors {name: tensor} and metadata {name: str}, whole or not at all."""
    with atomic_write(file) as beside:
        save_file(
            {name: x.detach().cpu().contiguous() for name, x in tensors.items()},
            beside,
            metadata=metadata,
        )


def fingerprint(tensors):
    """16 hexadecimal digits that tell one base model from another: a hash of the tensors' names and float16 values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].detach().cpu().half().numpy().tobytes())
    return found.hexdigest()[:16]


def load_patch(file, *modules):
    """Puts a patch's tensors into those of `modules` (the UNet; the text encoder, whose names all begin with "text_model.") that have
    them; returns its metadata. UserError if it is made for another base."""
    tensors, metadata = read(file)
    own = {name: x for module in modules for name, x in module.state_dict().items()}
    for name, x in tensors.items():
        if name not in own or own[name].shape != x.shape or not x.is_floating_point():
            raise UserError(
                f"{file}: {name} {x.dtype} {tuple(x.shape)} does not fit this model; it was made for {metadata.get('model')}."
            )
    base = fingerprint({name: own[name] for name in tensors})
    if metadata.get("base_fingerprint") != base:
        raise UserError(
            f"{file} was made for {metadata.get('model', 'an unnamed model')} (base {metadata.get('base_fingerprint')}), "
            f"and this one's base is {base}: name the right --model."
        )
    for name, x in tensors.items():
        own[name].copy_(x)
    return metadata


def save_checkpoint(file, groups, optimizer, metadata):
    """A training run: groups {prefix: {name: tensor}}, the optimizer's state, and metadata {name: str}."""
    tensors = {
        f"{prefix}/{name}": x for prefix, group in groups.items() for name, x in group.items()
    }
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{name}": x for name, x in state.items()}
    save(file, tensors, metadata | {"sha256": checksum(tensors)})


@torch.no_grad()
def load_checkpoint(file, groups, optimizer):
    """Copies a checkpoint into `groups` and `optimizer`, in place; returns its metadata."""
    tensors, metadata = read(file)
    state = {}
    for name in [name for name in tensors if name.startswith("optimizer/")]:
        _, i, key = name.split("/")
        state.setdefault(int(i), {})[key] = tensors.pop(name)
    own = {f"{prefix}/{name}": x for prefix, group in groups.items() for name, x in group.items()}
    if own.keys() != tensors.keys() or any(
        own[name].shape != x.shape for name, x in tensors.items()
    ):
        raise UserError(
            f"{file} holds other tensors than this run trains: it belongs to another run."
        )
    for name, x in tensors.items():
        own[name].copy_(x)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return metadata
