"""Other people's formats: a model, with or without a patch, as a folder in diffusers' layout or as one file in the original's.

    python convert.py --model toy --patch runs/0001-star/erased.safetensors --format diffusers --dtype fp16 --out forgetful
    python convert.py --patch runs/0001-nudity/erased.safetensors --format single-file --out forgetful.safetensors
    python convert.py --model sd-v1-4.safetensors --format diffusers --out sd14           then: python train.py --model sd14

A single file says nothing of configs or sampler: SD 1.4's are taken, unless this program wrote it, which notes them in the file's
metadata. A model card goes with what is written: README.md in the folder, NAME.md beside the file.
"""

import support.openmp  # noqa: F401 (before torch)

import argparse
import inspect
import json
import os
import shutil
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch

import weights
from clip_text import MAX_TOKENS
from support.cli import DTYPES, run_command
from support.errors import UserError
from support.files import lock_folder
from tools.compvis_names import ASIDE, few, from_original, to_original
from tools.model_card import card
from weights import NETWORKS

TOKENIZER = "openai/clip-vit-large-patch14"  # where SD 1.4 has its tokenizer from
TOKENIZER_FILES = [
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
]
CONFIGS = {**{network: "config.json" for network in NETWORKS}, "scheduler": "scheduler_config.json"}
PICKLES = (".ckpt", ".pt", ".pth", ".bin")


# ------------------------------------------------------------------------------------------------ reading
def sd14_configs():
    """SD 1.4's: our networks' defaults and the values that they implement; the embedded model's scheduler is SD 1.4's, too."""
    configs = {"scheduler": weights.read_config(weights.TOY, "scheduler")}
    for network, (make, _) in NETWORKS.items():
        configs[network] = {key: p.default for key, p in inspect.signature(make).parameters.items()}
        configs[network] |= {key: values[0] for key, values in weights.ONLY[network].items()}
    levels = len(configs["vae"]["block_out_channels"])
    configs["unet"] |= dict(_class_name="UNet2DConditionModel", sample_size=64)
    configs["vae"] |= dict(
        _class_name="AutoencoderKL",
        sample_size=512,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    configs["text_encoder"] |= dict(architectures=["CLIPTextModel"])
    return configs


def read_single(file, folder):
    """The networks of one file in the original layout; its configs are put into `folder`."""
    if file.suffix in PICKLES:
        raise UserError(
            f"{file} is a pickle, which can run code when opened and is never read here: get the model as safetensors"
            " or convert it first, on a machine that holds nothing you would miss."
        )
    tensors, metadata = weights.read(file)
    try:
        configs = json.loads(metadata["configs"]) if "configs" in metadata else sd14_configs()
        for part, name in CONFIGS.items():
            write_json(folder / part / name, configs[part])
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{file}: the configs in its metadata are damaged ({e!r}): write the file again."
        ) from e
    weights.read_config(folder, "scheduler")  # refuses what is not implemented
    networks = {network: weights.make_network(folder, network) for network in NETWORKS}
    aside = from_original(tensors, networks, file)
    for network, module in networks.items():
        count = sum(p.numel() for p in module.parameters())
        print(f"{network}: {file}, {len(module.state_dict())} tensors, {count:,} parameters")
    groups = Counter(name if name.startswith(ASIDE) else name.split(".")[0] for name in aside)
    if groups:
        print(
            "left aside: "
            + ", ".join(
                f"{group} ({n} tensors)" if n > 1 else group for group, n in sorted(groups.items())
            )
        )
    return networks


def fetch_tokenizer(where, folder, vocab_size):
    """Copies the tokenizer `where`, a folder or hub id, into folder/tokenizer. UserError if it is not for `vocab_size` words."""
    advice = f"name a folder with CLIP's {', '.join(TOKENIZER_FILES[:2])} and {TOKENIZER_FILES[3]} with --tokenizer."
    try:
        source = Path(where)
        if not source.is_dir():
            from huggingface_hub import snapshot_download

            source = Path(snapshot_download(where, allow_patterns=TOKENIZER_FILES))
        copy_tokenizer(source / "tokenizer" if (source / "tokenizer").is_dir() else source, folder)
    except Exception as e:  # the hub's client raises some twenty classes
        reason = (str(e).strip() or repr(e)).splitlines()[0]
        raise UserError(
            f"Cannot get the tokenizer {where} from the hub ({reason}): check the network, or {advice}"
        ) from e
    tokenizer = weights.load_tokenizer(folder)
    words, tokens = len(tokenizer), tokenizer.model_max_length
    if (words, tokens) != (vocab_size, MAX_TOKENS):
        raise UserError(
            f"The tokenizer {where} has {words:,} words and reads {tokens:,} tokens, and the text encoder is for "
            f"{vocab_size:,} and {MAX_TOKENS}: {advice}"
        )


def copy_tokenizer(source, folder):
    (folder / "tokenizer").mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / "tokenizer" / name)


def open_model(args, work):
    """(a folder with configs and tokenizer, {network: module}) of --model; for a single file that folder is made in `work`."""
    file = Path(args.model)
    if file.is_dir() or not (file.is_file() or file.suffix in (".safetensors", *PICKLES)):
        if args.tokenizer:
            raise UserError(
                f"--tokenizer is for a single file: {args.model} has a tokenizer of its own."
            )
        folder = weights.find(args.model, args.revision)
        model = weights.load(folder)
        return folder, {network: getattr(model, network) for network in NETWORKS}
    if args.revision:
        raise UserError(f"--revision is for models from the hub; {file} is a file.")
    folder = work / file.name
    networks = read_single(file, folder)
    if args.format == "diffusers":
        embedding = networks["text_encoder"].text_model.embeddings.token_embedding
        fetch_tokenizer(args.tokenizer or TOKENIZER, folder, embedding.num_embeddings)
    return folder, networks


def check_finite(tensors, what, advice):
    if bad := [name for name, x in tensors.items() if not x.isfinite().all()]:
        raise UserError(f"{what} in {len(bad)} tensors ({few(bad)}): {advice}.")


# ------------------------------------------------------------------------------------------------ writing
def write_json(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def cast(tensors, dtype):
    """The tensors as `dtype`, a key of DTYPES. UserError where a number does not fit it."""
    tensors = {name: x.to(DTYPES[dtype]) for name, x in tensors.items()}
    check_finite(tensors, f"There are numbers too large for {dtype}", "say --dtype bf16 or fp32")
    return tensors


def read_configs(folder):
    """{part: its config}. The text encoder's says float32: transformers 5 would keep float16 weights as they are, and diffusers
    loads the UNet beside them as float32."""
    configs = {part: weights.read_config(folder, part) for part in CONFIGS}
    configs["text_encoder"] = {
        k: v for k, v in configs["text_encoder"].items() if k != "torch_dtype"
    } | {"dtype": "float32"}
    return configs


def write_folder(out, folder, networks, dtype):
    """A folder in diffusers' layout at `out`; configs and tokenizer are those of the model folder `folder`."""
    configs = read_configs(folder)
    for part, name in CONFIGS.items():
        write_json(out / part / name, configs[part])
    for network, module in networks.items():
        weights.save(
            out / network / f"{NETWORKS[network][1]}.safetensors",
            cast(module.state_dict(), dtype),
            {"format": "pt"},
        )
    copy_tokenizer(folder / "tokenizer", out)
    index = json.loads((weights.TOY / "model_index.json").read_text(encoding="utf-8"))
    sampler = configs["scheduler"].get("_class_name", "PNDMScheduler")
    write_json(out / "model_index.json", index | {"scheduler": ["diffusers", sampler]})


@contextmanager
def staged(out, notes):
    """A folder to work in. What is in its folder `made` at the end is moved beside `out`, the card `notes` first. After a kill it is
    left, as .NAME-unfinished, perhaps without the card, and the next one clears it."""
    work = out.parent / f".{out.name}-unfinished"
    killed = work.exists()
    try:
        with lock_folder(work):
            try:
                for file in (out, notes):
                    if file.exists() and not (killed and file == notes and not out.exists()):
                        raise UserError(f"{file} is there already: choose another --out.")
                for left in work.iterdir():
                    shutil.rmtree(left)
                yield work
                for made in sorted((work / "made").iterdir()):
                    os.replace(made, out.parent / made.name)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as e:
        raise UserError(
            f"Cannot write {out} ({e}): free some space or choose another place with --out."
        ) from e


@torch.no_grad()
def convert(args):
    single = args.format == "single-file"
    if single and args.out.suffix != ".safetensors":
        raise UserError(
            f"--format single-file writes a file: --out {args.out} has to end in .safetensors."
        )
    notes = args.out.with_suffix(".md") if single else args.out / "README.md"
    with staged(args.out, notes) as work:
        folder, networks = open_model(args, work)
        patch = (
            weights.load_patch(args.patch, networks["unet"], networks["text_encoder"])
            if args.patch
            else None
        )
        made = work / "made" / args.out.name
        if single:
            metadata = {"format": "pt", "configs": json.dumps(read_configs(folder))}
            weights.save(made, cast(to_original(networks), args.dtype), metadata)
        else:
            write_folder(made, folder, networks, args.dtype)
        text = card(args.model, args.format, args.dtype, args.patch, patch)
        (made.parent / notes.relative_to(args.out.parent)).write_text(text, encoding="utf-8")
    print(f"{args.out}: {args.format}, {args.dtype}; its model card: {notes}")


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=weights.DEFAULT_MODEL,
        help="toy, a hub id, a folder in diffusers' layout, or a "
        ".safetensors file in the original's",
    )
    parser.add_argument("--revision", help="a branch, tag or commit of the hub's model")
    parser.add_argument("--patch", type=Path, help="an erased.safetensors that train.py wrote")
    parser.add_argument(
        "--format", choices=["diffusers", "single-file"], required=True, help="what to write"
    )
    parser.add_argument(
        "--dtype",
        choices=[*DTYPES],
        default="fp32",
        help="of what is written; default: fp32, without loss",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help=f"of a single file, which has none: a folder or hub id ({TOKENIZER})",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="a new folder, or a new .safetensors file"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(convert, parse(), "nothing is left of it; run the same command again"))
