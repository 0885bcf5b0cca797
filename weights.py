"""Files <-> modules, strictly: the only file that reads or writes weights, and safetensors only.

    load(model)                  a toy model's name, a hub id or a model folder -> Model
    save, load_patch             a patch: the trained tensors of a fine-tuned model, with metadata
                                 about how they were made and which base model they belong to
    save_checkpoint, …           the state of a training run

Whatever is wrong with a user's files is raised as a UserError, one sentence that says what to do.
"""

import difflib
import hashlib
import inspect
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import huggingface_hub as hub
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from clip_text import MAX_TOKENS, CLIPText
from scheduler import DDIM
from sdxl import CLIPTextProjection, CLIPTextXL, UNetXL
from support.cli import has_gpu
from support.errors import UserError, first_line, warn_once
from support.files import atomic_write, checksum, damage
from support.statistics import ORIGINAL
from toy import worlds
from unet import UNet
from vae import VAE

DEFAULT_MODEL = "CompVis/stable-diffusion-v1-4"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
# {name: folder} of the models that are part of the project
TOYS = {name: world.MODEL for name, world in worlds.MODELS.items()}
TOY = TOYS["toy"]
NETWORKS = {
    "unet": (UNet, "diffusion_pytorch_model"),
    "vae": (VAE, "diffusion_pytorch_model"),
    "text_encoder": (CLIPText, "model"),
}
NETWORKS_XL = NETWORKS | {
    "unet": (UNetXL, "diffusion_pytorch_model"),
    "text_encoder_2": (CLIPTextProjection, "model"),
}

# Config keys that change the arithmetic: key -> the value that our modules implement. A list has
# one value per block. SDXL's UNet is "unet_xl".
# fmt: off
ONLY = {
    "unet": dict(
        act_fn="silu", norm_eps=1e-5, downsample_padding=1, conv_in_kernel=3, conv_out_kernel=3,
        time_embedding_type="positional", flip_sin_to_cos=True, freq_shift=0,
        mid_block_type="UNetMidBlock2DCrossAttn", mid_block_scale_factor=1,
        resnet_time_scale_shift="default", resnet_out_scale_factor=1,
        attention_type="default", transformer_layers_per_block=1,
    ),
    "vae": dict(
        act_fn="silu", mid_block_add_attention=True, use_quant_conv=True, use_post_quant_conv=True,
        down_block_types="DownEncoderBlock2D", up_block_types="UpDecoderBlock2D",
    ),
    "text_encoder": dict(hidden_act="quick_gelu", model_type="clip_text_model"),
    "scheduler": dict(
        beta_schedule="scaled_linear", prediction_type="epsilon",
        timestep_spacing="leading", skip_prk_steps=True,
    ),
}
ONLY["unet_xl"] = ONLY["unet"] | dict(
    addition_embed_type="text_time", use_linear_projection=True,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
)
del ONLY["unet_xl"]["transformer_layers_per_block"]
ONLY["text_encoder_2"] = ONLY["text_encoder"] | dict(hidden_act="gelu")
# fmt: on
# Config keys of what our modules do not have: they are absent, or null, false or 0.
OFF = """
    use_linear_projection only_cross_attention dual_cross_attention mid_block_only_cross_attention
    cross_attention_norm num_attention_heads center_input_sample class_embed_type num_class_embeds
    class_embeddings_concat addition_embed_type encoder_hid_dim encoder_hid_dim_type
    time_embedding_dim time_embedding_act_fn timestep_post_act time_cond_proj_dim
    resnet_skip_time_act shift_factor latents_mean clip_sample set_alpha_to_one thresholding
    trained_betas rescale_betas_zero_snr
    use_karras_sigmas use_exponential_sigmas use_beta_sigmas
""".split()
# Config keys that are arguments of our modules: {part: {key: SD 1.4's value, the default}}.
ARGUMENTS = {
    part: {key: x.default for key, x in inspect.signature(make).parameters.items()}
    for part, make in dict(
        unet=UNet, vae=VAE, text_encoder=CLIPText, scheduler=DDIM, unet_xl=UNetXL
    ).items()
}
del ARGUMENTS["scheduler"]["steps"]
ARGUMENTS["text_encoder_2"] = ARGUMENTS["text_encoder"] | {"projection_dim": 1280}
# What diffusers' samplers use for a key that scheduler_config.json does not have.
SCHEDULER_DEFAULTS = dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", steps_offset=0)
# Keys that count only for the model's own sampler (own_sampler), and the samplers that we have.
OWN_SAMPLER = """
    timestep_spacing skip_prk_steps clip_sample set_alpha_to_one thresholding use_karras_sigmas
    use_exponential_sigmas use_beta_sigmas
""".split()
# Further settings of diffusers' Euler, with the values that ours has.
EULER = dict(interpolation_type="linear", final_sigmas_type="zero", timestep_type="discrete")
SAMPLER_NAMES = {  # in scheduler_config.json
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
}
# Signs of architectures that are not implemented: how names of a folder's files or of a file's
# tensors begin, or sizes of a UNet.
# fmt: off
OTHERS = {
    "cond_stage_model.model.": "Stable Diffusion 2", "width 1024": "Stable Diffusion 2",
    "conditioner.embedders.": "Stable Diffusion XL", "width 2048": "Stable Diffusion XL",
    "text_encoder_2/": "Stable Diffusion XL", "transformer/": "a diffusion transformer",
    "model.diffusion_model.joint_blocks.": "a diffusion transformer",
    "channels 9": "an inpainting model (9 input channels)",
    "channels 8": "an InstructPix2Pix model (8 input channels)",
}
# fmt: on
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
PICKLE = (
    "is a pickle, which can run code when it is opened and is never read here: get it as a "
    "safetensors file, or convert it on a machine without anything valuable"
)
FOREIGN = {  # the first bytes of a file -> what it is
    b"version ": "is a Git LFS pointer, and not the file itself: run git lfs pull",
    b"<": "is a web page: sign in there and download the file itself",
    b"GGUF": "is a GGUF file, which is never read here: get it as a safetensors file",
    b"PK": PICKLE,
    b"\x80": PICKLE,
}


def sd14_config(part, **changed):
    """The content of SD 1.4's config.json, with other values for some keys.

    part: one of NETWORKS, or "scheduler".
    """
    return ARGUMENTS[part] | ONLY[part] | changed


class Model(NamedTuple):
    name: str
    unet: UNet
    vae: VAE
    text_encoder: CLIPText | CLIPTextXL
    tokenizer: CLIPTokenizer
    scheduler: dict  # scheduler_config.json, checked
    resolution: int  # pixels per side that the model was trained for
    # SDXL only
    tokenizer_2: CLIPTokenizer | None = None
    zeros: bool = False  # images without a negative prompt: guidance takes zeros for c_0
    float32_vae: bool = False  # it overflows in float16


# ---------------------------------------------------------------------------------- names of models
def check_name(model):
    """UserError if `model` cannot be a toy model, a folder or a hub id. Asks nothing of the hub."""
    model = str(model)
    if model in TOYS or model and Path(model).is_dir():
        return
    if model and (Path(model).is_file() or model.endswith(".safetensors")):
        raise UserError(
            f"{model} is one file. Convert it to a folder first: python -m tools.convert "
            f"--model {model} --format diffusers --out DIR"
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        return
    near = difflib.get_close_matches(model, TOYS, 1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise UserError(
        f"There is no folder {model}, and it is not a hub id like {DEFAULT_MODEL}. {hint}"
        f"Models of this project: {', '.join(TOYS)}."
    )


def absolute(model):
    """A model's name that means the same model in every directory."""
    return os.path.abspath(model) if model not in TOYS and os.path.isdir(model) else model


def patch_file(path):
    """The file of a patch. The folder of a run stands for its erased.safetensors."""
    return Path(path) / "erased.safetensors" if Path(path).is_dir() else Path(path)


def name_of_patch(file):
    """The name of a patch: of its folder if it is erased.safetensors, else of the file."""
    file = Path(os.path.abspath(file))  # without "..": the name becomes a folder of generate.py
    name = file.parent.name if file.name == "erased.safetensors" else file.stem
    return name if name.strip(".") else "patch"


def named_patches(texts):
    """--patch [NAME=]FILE | none, one text each -> {name: [file, …]}; none: {"original": []}.

    Without NAME= the name is name_of_patch's.
    """
    patches = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if text == "none":
            patches[ORIGINAL] = []
            continue
        if not equals or Path(text).exists():  # a path may contain "="
            name, file = name_of_patch(patch_file(text)), text
        if not file or not name.strip(" ."):
            raise UserError(f"--patch {text}: write [NAME=]FILE, or none.")
        if name == ORIGINAL:
            raise UserError(
                f"--patch {text}: the untouched model has this name, choose another: NAME=FILE."
            )
        patches.setdefault(name, []).append(str(patch_file(file)))
    return patches


def choose_model(given, patches):
    """The model to load: `given`, or the model of the patches, or DEFAULT_MODEL.

    given: the value of --model, None without it. patches: files. UserError if two patches are for
    different models, if a toy model's patch meets a model from the hub, or if a machine without a
    GPU would begin a large download that nobody asked for. Downloads nothing.
    """
    names, bases = {}, set()  # {model: the first of its patches}, fingerprints
    for file in patches:
        metadata = read(file)[1]
        if "model" in metadata:
            names.setdefault(metadata["model"], file)
            bases.add(metadata.get("base_fingerprint"))
    if given is not None:
        for name, file in names.items():
            if name in TOYS and given not in TOYS and not Path(given).exists():
                raise UserError(f"{file} was made for the model {name}: use --model {name}.")
        return absolute(given)
    named = sorted(names.items(), key=lambda row: not Path(row[0]).is_dir())  # those that are here
    (name, file), *others = named or [(DEFAULT_MODEL, None)]
    if others and len(bases) > 1:  # else these are names of one model
        raise UserError(
            f"{file} was made for the model {name}, and {others[0][1]} for {others[0][0]}: use "
            "patches of one model."
        )
    try:
        check_name(name)
    except UserError:
        raise UserError(
            f"{file} was made for the model {name}, which is not on this machine: name the model's "
            "folder with --model."
        ) from None
    if not has_gpu() and not on_disk(name):
        raise UserError(
            f"{name} is not on this machine, which has no GPU that torch can use: use --model toy, "
            f"or download it with --model {name} (Stable Diffusion 1.4: 4.3 GB)."
        )
    return name


def find(model, revision=None):
    """The folder that contains `model`. A hub id is downloaded first, only what `load` reads."""
    check_name(model)
    folder = TOYS.get(model) or Path(model)
    if not folder.is_dir():
        return download(model, revision)
    if revision:
        raise UserError(
            f"--revision is for models from the hub; {model} is a folder on this machine."
        )
    return folder


def on_disk(model, revision=None):
    """The folder of a model, None if it would have to be downloaded. Asks nothing of the hub."""
    folder = TOYS.get(model) or Path(model)
    if folder.is_dir():
        return folder
    try:
        file = hub.try_to_load_from_cache(model, "unet/config.json", revision=revision)
    except hub.errors.HFValidationError:
        file = None
    return Path(file).parent.parent if isinstance(file, str) else None


def download(model, revision):
    """The folder of a model from the hub. Without a network: of a complete earlier download."""
    try:
        folder = Path(hub.snapshot_download(model, revision=revision, allow_patterns="scheduler/*"))
        try:
            names = {file.path for file in hub.get_cached_repo_tree(model, revision=revision)}
        except hub.errors.CachedRepoTreeNotFoundError:  # an older huggingface_hub downloaded it
            names = file_names(folder)
        networks = NETWORKS
        if any(name.startswith("text_encoder_2/") for name in names):
            hub.snapshot_download(model, revision=revision, allow_patterns="model_index.json")
            networks = networks_of(folder, model)
        wanted = files_to_download(names, model, networks)
        return Path(hub.snapshot_download(model, revision=revision, allow_patterns=wanted))
    except UserError:
        raise
    except Exception as e:  # the hub's client raises some twenty classes
        raise UserError(
            f"Cannot get {model} from the hub ({first_line(e)}): check the name and the network, "
            "then run the same command again (a download continues where it stopped), or name a "
            "local folder."
        ) from e


def files_to_download(names, model, networks=NETWORKS):
    """What `load` reads of a hub repository, as patterns. names: all its files."""
    wanted = ["scheduler/scheduler_config.json", "tokenizer*/*.json", "tokenizer*/*.txt"]
    if networks is not NETWORKS:
        wanted.append("model_index.json")
    for network in networks:
        wanted += [*weights_files(names, network, model), f"{network}/config.json"]
    return wanted


def file_names(folder):
    """The files in the subfolders of a model's folder, as "unet/config.json"."""
    return {file.relative_to(folder).as_posix() for file in folder.glob("*/*")}


def weights_files(names, network, model):
    """Which of `names` have the network's weights; files with full precision come first."""
    whole = f"{network}/{NETWORKS_XL[network][1]}"
    for stem in (whole, f"{whole}.fp16"):
        if f"{stem}.safetensors" in names:
            return [f"{stem}.safetensors"]
        shard = re.compile(re.escape(stem) + r"-\d+-of-0*(\d+)\.safetensors")
        shards = {name: int(found[1]) for name in names if (found := shard.fullmatch(name))}
        if shards:
            n = max(shards.values())
            if len(shards) < n:
                raise UserError(f"{model} lacks {n - len(shards)} of the {n} files of {network}.")
            return sorted(shards)
    for name in sorted(names):
        if name.startswith(f"{network}/") and name.endswith(PICKLES):
            raise UserError(f"{model} has {network} only as {name}, which {PICKLE}.")
    raise UserError(
        f"{model} has no {whole}.safetensors: it should be a folder in diffusers' layout "
        "(docs/stable-diffusion.md)."
    )


# ------------------------------------------------------------------------------------------ configs
def read_index(folder):
    """model_index.json, which names the pipeline of a folder; {} without a readable one."""
    try:
        return dict(json.loads((folder / "model_index.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def networks_of(folder, model=None):
    """NETWORKS, or NETWORKS_XL for Stable Diffusion XL. UserError for refiners and inpainting."""
    pipeline = str(read_index(folder).get("_class_name"))
    if "XL" in pipeline and pipeline != "StableDiffusionXLPipeline":
        raise UserError(
            f"{model or folder} is for diffusers' {pipeline}, and of Stable Diffusion XL only the "
            f"base model is implemented: use {SDXL}."
        )
    return NETWORKS_XL if "XL" in pipeline else NETWORKS


def kind_of(folder, part):
    """The part's key in ONLY and ARGUMENTS."""
    return "unet_xl" if part == "unet" and networks_of(folder) is NETWORKS_XL else part


def read_json(file):
    """The object in a JSON file of a model."""
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))  # Notepad begins with a BOM
        if not isinstance(config, dict):
            raise ValueError("it contains no JSON object")
    except FileNotFoundError:
        raise UserError(f"{file} is missing: a model is a folder in diffusers' layout.") from None
    except (OSError, ValueError) as e:
        why = foreign(file) or f"is not a readable JSON object ({e}): fetch it again"
        raise UserError(f"{file} {why}.") from e
    return config


def read_config(folder, part):
    """The part's config.json as a dict. UserError for a value that our modules do not implement.

    part: one of NETWORKS_XL, or "scheduler". A sampler's missing keys get diffusers' defaults.
    """
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    if part == "unet":
        refuse_other_architecture(folder)
    config = read_json(file)
    if part == "scheduler":
        config = SCHEDULER_DEFAULTS | config
    kind, xl = kind_of(folder, part), networks_of(folder) is NETWORKS_XL
    family, advice = ("XL's base model", f": use {SDXL}") if xl else ("1.x", "")
    for key, value in config.items():
        if isinstance(ARGUMENTS[kind].get(key), int) and isinstance(value, list) and value:
            if value == value[:1] * len(value):  # the same for each block
                value = config[key] = value[0]
        # With other settings of its sampler, XL is another model, for example Turbo.
        counts = xl or key not in OWN_SAMPLER
        if counts and not is_implemented(kind, key, value):
            raise UserError(
                f"{file}: {key} = {value!r:.60} is not what Stable Diffusion {family} computes, "
                f"and is not implemented{advice}."
            )
    return config


def other_architecture(names, in_channels, width):
    """What a model with these names, of files or tensors, is if it is not Stable Diffusion 1.x."""
    signs = [f"channels {in_channels}", f"width {width}", *names]
    found = [what for start, what in OTHERS.items() if any(x.startswith(start) for x in signs)]
    return found[0] if found else None


def refuse_other_architecture(folder):
    names, unet = file_names(folder), {}
    if "unet/config.json" in names:
        unet = read_json(folder / "unet" / "config.json")
    channels, width = unet.get("in_channels"), unet.get("cross_attention_dim")
    if networks_of(folder) is NETWORKS_XL:
        names, width = [], None
    what = other_architecture(names, channels, width)
    if what:
        raise UserError(f"{folder} is {what}, which is not implemented: use Stable Diffusion 1.x.")


def own_sampler(config):
    """The sampler that a scheduler_config.json asks for. UserError if it is not one of ours."""
    name = config.get("_class_name")
    # Without the key, diffusers' PNDM begins with Runge-Kutta steps, and its Euler has other steps.
    spacing = "linspace" if name == "EulerDiscreteScheduler" else "leading"
    config = dict(skip_prk_steps=name != "PNDMScheduler", timestep_spacing=spacing) | config
    fits = {key: config.get(key, value) == value for key, value in EULER.items()}
    for key in config.keys() & set(OWN_SAMPLER):
        fits[key] = is_implemented("scheduler", key, config[key])
    for key in sorted(fits):
        if not fits[key]:
            name = f"{name} with {key} = {config[key]!r:.60}"
    if name not in SAMPLER_NAMES:
        raise UserError(
            f"The model's own sampler, {name}, is not implemented: use --scheduler ddim or pndm."
        )
    return SAMPLER_NAMES[name]


def is_implemented(part, key, value):
    """Whether our modules compute what a config with this value asks for. Unknown keys pass."""
    values = value if isinstance(value, list) else [value]
    default = ARGUMENTS[part].get(key)
    if key in ONLY[part]:
        return value == ONLY[part][key] or all(x == ONLY[part][key] for x in values)
    if default is None:
        return key not in OFF or not any(values)
    return isinstance(default, tuple) or type(value) in (int, type(default))  # never a bool


# ------------------------------------------------------------------------------------------ tensors
def foreign(file):
    """What a file is whose content is of another kind, in words that follow its name; else None."""
    if not Path(file).is_file():
        return None
    with open(file, "rb") as f:
        start = f.read(9)
    if start[8:] == b"{":  # safetensors, after the length of the header
        return None
    found = [text for mark, text in FOREIGN.items() if start.lstrip().startswith(mark)]
    if Path(file).suffix in PICKLES:
        found.append(PICKLE)
    return found[0] if found else None


def read(file):
    """({name: tensor}, metadata) of a safetensors file. UserError if it is cut off or damaged."""
    tensors = {}
    try:
        with safe_open(file, "pt") as f:
            metadata = f.metadata() or {}
            for name in f.keys():
                tensors[name] = f.get_tensor(name)
    except FileNotFoundError:
        raise UserError(f"There is no file {file}.") from None
    except (SafetensorError, OSError) as e:
        why = foreign(file) or f"is not a whole safetensors file ({e}): fetch or make it again"
        raise UserError(f"{file} {why}.") from e
    why = damage(tensors, metadata)
    if why:
        raise UserError(f"{file} {why}: it is damaged; fetch or make it again.")
    return tensors, metadata


TEXT_MODEL = ("embeddings.", "encoder.", "final_layer_norm.")  # the parts of CLIP that are used
OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # 2022's names


def rename(network, tensors):
    """{name in older or newer files: tensor} -> {our name: tensor}.

    The VAE attention's 1x1 convolutions (C, C, 1, 1) become matrices (C, C).
    """
    renamed = {}
    for name, x in tensors.items():
        if network.startswith("text_encoder"):
            bare = name.removeprefix("text_model.")  # transformers 5 omits it
            if name.endswith("position_ids"):  # 0..76, in files of 2022
                continue
            if bare.startswith(TEXT_MODEL):
                name = f"text_model.{bare}"
            elif network == "text_encoder":  # other parts of CLIP
                continue
        elif network == "vae" and ".attentions." in name:
            stem, leaf, kind = name.rsplit(".", 2)
            name = f"{stem}.{OLD_VAE.get(leaf, leaf)}.{kind}"
            if x.dim() == 4 and x.shape[2:] == (1, 1):
                x = x.flatten(1)
        renamed[name] = x
    return renamed


def fill(module, tensors, file):
    """Loads tensors into a module, as float32. Strict: exactly its names, each with its shape."""
    other = "these weights do not belong to the config.json next to them."
    wanted = module.state_dict()
    odd = sorted(wanted.keys() ^ tensors.keys())
    if odd:
        what = "missing" if odd[0] in wanted else "unknown"
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise UserError(f"{file}: {odd[0]} is {what}{more}: {other}")
    for name, x in tensors.items():
        shape = tuple(wanted[name].shape)
        if x.shape != shape or not x.is_floating_point():
            raise UserError(
                f"{file}: {name} is {x.dtype} {tuple(x.shape)}, and should be floating point "
                f"{shape}: {other}"
            )
    widened = {name: x.float() for name, x in tensors.items()}
    module.load_state_dict(widened, strict=True, assign=True)


# ---------------------------------------------------------------------------------- loading a model
def make_network(folder, network):
    """One of NETWORKS with the sizes of its config.json, on the meta device: shapes, no numbers."""
    config = read_config(folder, network)
    sizes = {key: config[key] for key in ARGUMENTS[kind_of(folder, network)] if key in config}
    make, _ = networks_of(folder)[network]
    try:
        with torch.device("meta"):
            return make(**sizes)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError, IndexError) as e:
        raise UserError(
            f"{folder / network / 'config.json'}: these sizes make no network ({e})."
        ) from e


def load_network(folder, network):
    """One of NETWORKS from a diffusers folder: float32, on the CPU, in eval mode."""
    module = make_network(folder, network)
    tensors = {}
    for name in weights_files(file_names(folder), network, folder):
        file = folder / name
        tensors |= read(file)[0]
    parts = tuple(f"{name}." for name, _ in module.named_children())
    tensors = {name: x for name, x in rename(network, tensors).items() if name.startswith(parts)}
    fill(module, tensors, file)
    count = parameters(module)
    print(f"{network}: {file}, {len(tensors)} tensors, {count:,} parameters", flush=True)
    return module.eval().requires_grad_(False)


def load_tokenizer(folder, name="tokenizer"):
    try:
        return CLIPTokenizer.from_pretrained(folder / name, local_files_only=True)
    except Exception as e:  # each parser behind it has its own exceptions
        raise UserError(f"{folder / name} cannot be read ({first_line(e)}): fetch it again.") from e


def check_architecture(folder):
    """The tokenizers of a folder whose parts fit together, as those of Stable Diffusion."""
    networks = networks_of(folder)
    sizes = {
        part: ARGUMENTS[kind_of(folder, part)] | read_config(folder, part) for part in networks
    }
    encoders = [part for part in networks if part.startswith("text_encoder")]
    width = sum(sizes[part]["hidden_size"] for part in encoders)
    for part, key, wanted in (
        ("unet", "in_channels", 4),
        ("unet", "out_channels", 4),
        ("unet", "cross_attention_dim", width),
        ("vae", "latent_channels", 4),
        *((part, "max_position_embeddings", MAX_TOKENS) for part in encoders),
    ):
        if sizes[part][key] != wanted:
            raise UserError(
                f"{folder / part / 'config.json'}: {key} = {sizes[part][key]} does not fit the "
                f"other parts of Stable Diffusion, which need {wanted}."
            )
    tokenizers = []
    for part in encoders:
        name, rows = part.replace("text_encoder", "tokenizer"), sizes[part]["vocab_size"]
        tokenizers.append(load_tokenizer(folder, name))
        if len(tokenizers[-1]) > rows:
            raise UserError(
                f"{folder / name} has {len(tokenizers[-1]):,} words, and the text encoder has only "
                f"{rows:,}: they do not belong together."
            )
    return tokenizers


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def load(model=DEFAULT_MODEL, revision=None, own=False):
    """A Model: three networks (float32, on the CPU, in eval mode), tokenizer and sampler's config.

    All parameters are frozen (requires_grad is False): whoever trains some switches these on.
    own: the model's own sampler is going to be used.
    SDXL has a second tokenizer, and both text encoders in one CLIPTextXL.
    UserError if a file is missing, damaged, or not what Stable Diffusion computes.
    """
    folder = find(model, revision)
    tokenizer, *second_tokenizer = check_architecture(folder)
    others = dict(scheduler=read_config(folder, "scheduler"), tokenizer=tokenizer)
    if own:
        own_sampler(others["scheduler"])
    networks = {network: load_network(folder, network) for network in networks_of(folder)}
    resolution = read_latent_size(folder) * networks["vae"].factor
    if "text_encoder_2" in networks:
        second = networks.pop("text_encoder_2")
        networks["text_encoder"] = CLIPTextXL(networks["text_encoder"], second).eval()
        networks["unet"].factor = networks["vae"].factor
        others |= dict(
            tokenizer_2=second_tokenizer[0],
            zeros=bool(read_index(folder).get("force_zeros_for_empty_prompt", True)),
            float32_vae=bool(read_config(folder, "vae").get("force_upcast", True)),
        )
    name = os.path.basename(model) if os.path.isabs(model) else str(model)  # no path of a machine
    return Model(name, **networks, **others, resolution=resolution)


def read_latent_size(folder):
    """Height and width of the latents that the UNet was trained for."""
    config = read_config(folder, "unet")
    size = config["sample_size"] if isinstance(config.get("sample_size"), int) else 64
    version = re.findall(r"\d+", str(config.get("_diffusers_version", "1")))
    if size < 64 and tuple(int(number) for number in version[:2]) < (0, 9):
        return 64  # as diffusers does: some configs of 2022 state a smaller size by mistake
    return size


# ---------------------------------------------------------------------------------- saving, patches
def save(file, tensors, metadata=None):
    """Writes {name: tensor} and metadata {name: str}: the whole file or nothing."""
    on_cpu = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with atomic_write(file) as temporary:
        save_file(on_cpu, temporary, metadata=metadata)


def fingerprint(tensors):
    """16 hexadecimal digits that tell base models apart: a hash of names and float16 values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].detach().cpu().half().numpy().tobytes())
    return found.hexdigest()[:16]


def checksums(model):
    """{network: 16 hexadecimal digits} of a Model's weights."""
    return {part: checksum(getattr(model, part).state_dict())[:16] for part in NETWORKS}


def patch_settings(file, metadata):
    """The settings of the training, {name: value}, in the metadata of the patch `file`."""
    try:
        return dict(json.loads(metadata.get("args", "{}")))
    except (ValueError, TypeError) as e:
        raise UserError(
            f"{file}: its metadata is damaged ({e}): make it again with train.py."
        ) from e


def load_patch(file, *modules):
    """Copies a patch's tensors into the modules that have them; returns the patch's metadata.

    modules: the UNet, and the text encoder, whose names all begin with "text_model.". UserError if
    the patch was made for another base model; then nothing is copied. Official weights of ESD and
    UCE do not say what they were made for: if they fit, a warning says so.
    """
    tensors, metadata = read(file)
    own = {}
    for module in modules:
        own |= module.state_dict()
    model = metadata.get("model", "an unnamed model")
    if not tensors:
        raise UserError(f"{file} holds no tensors.")
    if any("lora" in name.lower() for name in tensors):
        raise UserError(f"{file} is a LoRA, which is not implemented.")
    for name, x in tensors.items():
        if name not in own or own[name].shape != x.shape or not x.is_floating_point():
            raise UserError(
                f"{file}: {name} {x.dtype} {tuple(x.shape)} does not fit this model; it was made "
                f"for {model}."
            )
    base = fingerprint({name: own[name] for name in tensors})
    if "base_fingerprint" not in metadata:
        warn_once(f"{file} does not say which model it was made for. It fits this one.")
    elif metadata["base_fingerprint"] != base:
        raise UserError(
            f"{file} was made for {model} (base {metadata['base_fingerprint']}), but this "
            f"model's base is {base}: name the right --model."
        )
    for name, x in tensors.items():
        own[name].copy_(x)
    return metadata


# -------------------------------------------------------------------------------------- checkpoints
def prefixed(groups):
    """{prefix: {name: tensor}} -> {"prefix/name": tensor}."""
    return {f"{prefix}/{name}": x for prefix, group in groups.items() for name, x in group.items()}


def save_checkpoint(file, groups, optimizer, metadata):
    """Writes groups {prefix: {name: tensor}}, the optimizer's state, and metadata {name: str}."""
    state = optimizer.state_dict()["state"]
    tensors = prefixed(groups | {f"optimizer/{i}": values for i, values in state.items()})
    tensors = {name: x.detach().cpu() for name, x in tensors.items()}  # once for checksum and file
    save(file, tensors, metadata | {"sha256": checksum(tensors)})


@torch.no_grad()
def load_checkpoint(file, groups, optimizer):
    """Copies a checkpoint into `groups` and `optimizer`, in place; returns its metadata."""
    tensors, metadata = read(file)
    state = {}
    for name in list(tensors):
        if name.startswith("optimizer/"):
            _, i, key = name.split("/")
            state.setdefault(int(i), {})[key] = tensors.pop(name)
    own = prefixed(groups)
    shapes = {name: x.shape for name, x in tensors.items()}
    if shapes != {name: x.shape for name, x in own.items()}:
        raise UserError(
            f"{file} holds other tensors than this run trains: it belongs to another run."
        )
    for name, x in tensors.items():
        own[name].copy_(x)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for p, values in optimizer.state.items():
        for key, x in values.items():
            if x.shape == p.shape:
                # In p's memory format: torch's fused optimizers go through both in memory order.
                values[key] = torch.empty_like(p, dtype=x.dtype).copy_(x)
    return metadata
