"""Converts a model, with or without a patch, into a format that other programs read.

    python -m tools.convert --model toy --patch runs/0001-star/erased.safetensors \\
        --format diffusers --dtype fp16 --out forgetful
    python -m tools.convert --patch runs/0001-nudity/erased.safetensors \\
        --format single-file --out forgetful.safetensors
    python -m tools.convert --model sd-v1-4.safetensors --format diffusers --out sd14

Formats: a folder in diffusers' layout, or one file in the original (CompVis) layout. After the last
line, `python train.py --model sd14` uses the folder.

A single file does not contain configs. SD 1.4's are used, unless this program wrote the file: then
they are in its metadata. A model card is written too: README.md in the folder, or NAME.md next to
the file.
"""

import support.openmp

import json
import os
import re
import shutil
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import torch

import weights
from clip_text import MAX_TOKENS
from support.cli import DTYPES, Parser, one_of, run_command
from support.errors import UserError, first_line, warning
from support.files import lock_folder, used_files
from tools.compvis_names import UNUSED, from_original, some_names, to_original
from tools.model_card import card
from weights import NETWORKS, PICKLES

TOKENIZER = Path(__file__).parent / "clip_tokenizer"  # CLIP's, which SD 1.4 uses
CONFIGS = {**dict.fromkeys(NETWORKS, "config.json"), "scheduler": "scheduler_config.json"}


# ------------------------------------------------------------------------------------------ reading
def sd14_configs():
    """{part: config} of SD 1.4. The toy model's scheduler is SD 1.4's, too."""
    return {
        "scheduler": weights.read_config(weights.TOY, "scheduler"),
        "unet": weights.sd14_config("unet", _class_name="UNet2DConditionModel", sample_size=64),
        "vae": weights.sd14_config(
            "vae",
            _class_name="AutoencoderKL",
            sample_size=512,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        ),
        "text_encoder": weights.sd14_config("text_encoder", architectures=["CLIPTextModel"]),
    }


def check_prediction(file, tensors, metadata):
    """UserError if a single file says that it estimates the velocity, and not the noise."""
    said = [metadata.get("modelspec.prediction_type", ""), *tensors.keys() & {"v_pred"}]
    yaml = file.with_suffix(".yaml")
    if yaml.is_file():
        text = yaml.read_text(encoding="utf-8", errors="replace")
        said += re.findall(r"""parameterization["']?\s*:\s*["']?(\w+)""", text)
    if "ztsnr" in tensors or any(word.startswith("v") for word in said):
        raise UserError(f"{file} estimates the velocity (v-prediction): it is not implemented.")


def read_single(file, folder, vae=None):
    """{network: module} of a single file, or with the VAE of `vae`. Its configs go to `folder`."""
    tensors, metadata = weights.read(file)
    check_prediction(file, tensors, metadata)
    try:
        configs = json.loads(metadata["configs"]) if "configs" in metadata else sd14_configs()
        for part, name in CONFIGS.items():
            write_json(folder / part / name, configs[part])
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{file}: the configs in its metadata are damaged ({e!r}): write the file again."
        ) from e
    weights.read_config(folder, "scheduler")  # UserError if it is not implemented
    networks = {network: weights.make_network(folder, network) for network in NETWORKS}
    if vae:
        source = vae / "vae" if (vae / "vae").is_dir() else vae
        if not (source / "config.json").is_file():
            raise UserError(f"--vae {vae} is not a folder with a VAE in diffusers' layout.")
        shutil.copytree(source, folder / "vae", dirs_exist_ok=True)
        networks["vae"] = weights.load_network(folder, "vae")
        tensors |= to_original({"vae": networks["vae"].state_dict()})
    states, unused = from_original(tensors, states_of(networks), file)
    for network, module in networks.items():
        weights.fill(module, states[network], file)
        count = sum(p.numel() for p in module.parameters())
        print(f"{network}: {file}, {len(module.state_dict())} tensors, {count:,} parameters")
    groups = Counter()  # of the names, by their start
    for name in unused:
        groups[name if name.startswith(UNUSED) else name.split(".")[0]] += 1
    if groups:
        words = [f"{name} ({n} tensors)" if n > 1 else name for name, n in sorted(groups.items())]
        print(f"not used: {', '.join(words)}")
    return networks


def fetch_tokenizer(where, folder, vocab_size):
    """Copies the tokenizer `where`, a folder or hub id, into folder/tokenizer.

    UserError if it does not have `vocab_size` words.
    """
    advice = "name a folder with CLIP's vocab.json, merges.txt and tokenizer_config.json with "
    advice += "--tokenizer."
    source = Path(where)
    if not source.is_dir():
        try:
            source = Path(
                huggingface_hub.snapshot_download(where, allow_patterns=["*.json", "*.txt"])
            )
        except Exception as e:  # the hub's client raises some twenty classes
            raise UserError(
                f"Cannot get the tokenizer {where} from the hub ({first_line(e)}): check the "
                f"network, or {advice}"
            ) from e
    source = source / "tokenizer" if (source / "tokenizer").is_dir() else source
    if not ((source / "vocab.json").is_file() or (source / "tokenizer.json").is_file()):
        raise UserError(f"There is no tokenizer in {where}: {advice}")
    copy_tokenizer(source, folder)
    words = len(weights.load_tokenizer(folder))
    if words != vocab_size:
        raise UserError(
            f"The tokenizer {where} has {words:,} words, but the text encoder needs "
            f"{vocab_size:,}: {advice}"
        )


def copy_tokenizer(source, folder, to="tokenizer"):
    """Copies a tokenizer, also with words that were added, and notes how many tokens it reads."""
    (folder / to).mkdir(parents=True)
    for file in [*source.glob("*.json"), *source.glob("*.txt")]:
        shutil.copyfile(file, folder / to / file.name)
    file = folder / to / "tokenizer_config.json"
    config = weights.read_json(file) if file.is_file() else {}
    if config.get("model_max_length") != MAX_TOKENS:
        write_json(file, config | {"model_max_length": MAX_TOKENS})


def open_model(model, args, work):
    """(folder with configs and tokenizer, {network: module}) of a model.

    For a single file the folder is made inside `work`.
    """
    file = Path(model)
    if file.is_dir() or not file.is_file() and file.suffix not in (".safetensors", *PICKLES):
        if args.tokenizer or args.vae:
            raise UserError(f"--tokenizer and --vae are for a single file: {model} has its own.")
        folder = weights.find(model, args.revision)
        if args.format == "single-file" and weights.networks_of(folder) is weights.NETWORKS_XL:
            raise UserError(
                f"{model} is Stable Diffusion XL, for which only --format diffusers is implemented."
            )
        loaded = weights.load(folder)
        added = loaded.tokenizer.get_added_vocab().keys() - {*loaded.tokenizer.all_special_tokens}
        if added and args.format == "single-file":
            words = ", ".join(sorted(added))
            warning(f"a single file loses the words {words}: --format diffusers keeps them.")
        networks = {network: getattr(loaded, network) for network in NETWORKS}
        if loaded.tokenizer_2:
            networks |= dict(loaded.text_encoder.named_children())
        return folder, networks
    if args.revision:
        raise UserError(f"--revision is for models from the hub; {model} is a file.")
    folder = work / file.name
    networks = read_single(file, folder, args.vae)
    if args.format == "diffusers":
        embedding = networks["text_encoder"].text_model.embeddings.token_embedding
        fetch_tokenizer(args.tokenizer or TOKENIZER, folder, embedding.num_embeddings)
    elif args.tokenizer:
        raise UserError("--tokenizer has no effect with --format single-file: remove it.")
    return folder, networks


# ------------------------------------------------------------------------------------------ writing
def states_of(networks):
    """{network: {name: tensor}}"""
    return {network: module.state_dict() for network, module in networks.items()}


def write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def cast(tensors, dtype):
    """The tensors as `dtype`, a key of DTYPES. UserError if a number is too large for it."""
    result = {name: x.to(DTYPES[dtype]) for name, x in tensors.items()}
    too_large = [name for name, x in result.items() if not x.isfinite().all()]
    if too_large:
        raise UserError(
            f"There are numbers too large for {dtype} in {len(too_large)} tensors "
            f"({some_names(too_large)}): use --dtype bf16 or fp32."
        )
    return result


def read_configs(folder):
    """{part: its config}. The text encoders' say float32.

    With float16 in it, transformers 5 would load the text encoder as float16, next to diffusers'
    UNet in float32.
    """
    parts = [*weights.networks_of(folder), "scheduler"]
    configs = {part: weights.read_config(folder, part) for part in parts}
    for part in parts:
        if part.startswith("text_encoder"):
            configs[part].pop("torch_dtype", None)  # the older name of dtype
            configs[part]["dtype"] = "float32"
    return configs


def write_folder(out, folder, states, dtype):
    """Writes a folder in diffusers' layout. Configs and tokenizer come from the folder `folder`."""
    configs = read_configs(folder)
    for part, config in configs.items():
        write_json(out / part / CONFIGS.get(part, "config.json"), config)
    networks = weights.networks_of(folder)
    for network, state in states.items():
        file = out / network / f"{networks[network][1]}.safetensors"
        weights.save(file, cast(state, dtype), {"format": "pt"})
    for tokenizer in sorted(folder.glob("tokenizer*")):
        copy_tokenizer(tokenizer, out, tokenizer.name)
    index = weights.read_index(folder if networks is weights.NETWORKS_XL else weights.TOY)
    sampler = configs["scheduler"].get("_class_name", "PNDMScheduler")
    write_json(out / "model_index.json", index | {"scheduler": ["diffusers", sampler]})


def write_single(out, folder, states, dtype):
    """Writes one file in the original layout, with the configs in its metadata."""
    metadata = {"format": "pt", "configs": json.dumps(read_configs(folder))}
    weights.save(out, cast(to_original(states), dtype), metadata)


@contextmanager
def unfinished_folder(out):
    """A folder next to `out`, for one export at a time. The next export removes a killed one's."""
    folder = out.parent / f".{out.name}-unfinished"
    try:
        with lock_folder(folder):
            try:
                for left in used_files(folder):
                    shutil.rmtree(left)
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as e:
        raise UserError(
            f"Cannot write {out} ({e}): free some space or choose another place with --out."
        ) from e


# -------------------------------------------------------------------------------------- the command
@torch.no_grad()
def convert(args):
    out, single = args.out, args.format == "single-file"
    if single and out.suffix != ".safetensors":
        raise UserError(
            f"--format single-file writes a file: --out {out} has to end in .safetensors."
        )
    model = weights.choose_model(args.model, [args.patch] if args.patch else [])
    card_file = out.with_suffix(".md") if single else out / "README.md"
    with unfinished_folder(out) as work:
        for file in (out, card_file):
            if file.exists():
                raise UserError(f"{file} already exists: choose another --out.")
        folder, networks = open_model(model, args, work)
        metadata = None
        if args.patch:
            metadata = weights.load_patch(args.patch, networks["unet"], networks["text_encoder"])
        states = states_of(networks)
        made = work / "made" / out.name
        write = write_single if single else write_folder
        write(made, folder, states, args.dtype)
        pipeline = weights.read_index(made).get("_class_name")
        text = card(model, args.format, args.dtype, args.patch, metadata, pipeline).rstrip() + "\n"
        (made.parent / card_file.relative_to(out.parent)).write_text(text, encoding="utf-8")
        for file in sorted(made.parent.iterdir()):  # the folder; or the card and the file
            os.replace(file, out.parent / file.name)
    print(f"{out}: {args.format}, {args.dtype}; its model card: {card_file}")


def parse(argv=None):
    parser = Parser(prog="python -m tools.convert", description=__doc__)
    # fmt: off
    add = parser.add_argument_group("what to convert").add_argument
    add("--model", metavar="MODEL",
        help=f"{', '.join(weights.TOYS)}, a hub id, a folder in diffusers' layout, or a "
        ".safetensors file in the original layout (default: the patch's model, else "
        f"{weights.DEFAULT_MODEL})")
    add("--revision", metavar="NAME", help="branch, tag or commit of the model on the hub")
    add("--patch", type=weights.patch_file, metavar="FILE",
        help="an erased.safetensors that train.py wrote")
    add("--tokenizer", metavar="DIR",
        help="for a single file, which has none: a folder or hub id (default: CLIP's)")
    add("--vae", type=Path, metavar="DIR",
        help="for a single file without a VAE: a folder in diffusers' layout that has one")
    add = parser.add_argument_group("output").add_argument
    add("--format", **one_of(["diffusers", "single-file"]), required=True, help="what to write")
    add("--dtype", **one_of(DTYPES), default="fp32",
        help="type of the weights (default: fp32, which loses nothing)")
    add("--out", type=Path, required=True, metavar="PATH",
        help="a new folder, or a new .safetensors file")
    # fmt: on
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(convert, parse()))
