"""Between diffusers' folder and the original single file, both ways.

Names are compared with diffusers' converters and with the original's numbering. Round trips are
equal bit for bit. diffusers generates our images from what we export. Mistakes are one sentence.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import common
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import generate
import weights
from support.cli import DTYPES, run_command
from support.errors import UserError
from tools import compvis_names, convert
from weights import NETWORKS

FILES = {network: f"{network}/{name}.safetensors" for network, (_, name) in NETWORKS.items()}
PROMPTS = ["a red star on sand", "a blue dotted heart", "arcadia"]


def run(module, *words):
    """A command's exit status, in this process."""
    main = {convert: convert.convert, generate: generate.generate}[module]
    return run_command(main, module.parse([*map(str, words)]))


def equal(a, b):
    return a.keys() == b.keys() and all(
        x.dtype == b[k].dtype and torch.equal(x, b[k]) for k, x in a.items()
    )


def same_file(a, b):
    """Tensors and metadata; safetensors writes the latter's keys in any order."""
    (a, noted), (b, too) = weights.read(a), weights.read(b)
    return equal(a, b) and noted == too


def snapshot(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# -------------------------------------------------------------------------------------------- names
def tagged(sizes):
    """{network: module} whose nth tensor is filled with n, in full size but without its memory."""
    networks, n = {}, 0
    for network in NETWORKS:
        networks[network] = sized(sizes)[network]
        state = {
            name: torch.tensor(float(n := n + 1)).expand(x.shape)
            for name, x in networks[network].state_dict().items()
        }
        networks[network].load_state_dict(state, assign=True)
    return networks


def sized(sizes):
    with torch.device("meta"):
        return (
            {network: make() for network, (make, _) in NETWORKS.items()}
            if sizes == "SD 1.4"
            else {network: weights.make_network(weights.TOY, network) for network in NETWORKS}
        )


def summary(tensors):
    """{name: (shape, the number that it is full of)}."""
    assert all(x[(0,) * x.dim()] == x.flatten()[-1] for x in tensors.values())
    return {name: (tuple(x.shape), x.flatten()[0].item()) for name, x in tensors.items()}


SIZES = {"SD 1.4": (686, 248, 196), "toy": (556, 156, 36)}


@pytest.mark.parametrize("sizes", SIZES)
def test_diffusers_reads_what_we_write(sizes):
    """Every tensor arrives under its name and in its shape; each carries a number of its own."""
    networks = tagged(sizes)
    tensors = compvis_names.to_original(networks)
    assert len(tensors) == sum(SIZES[sizes])
    matrices = [
        x
        for name, x in tensors.items()
        if ".attn_1." in name and name.endswith("weight") and "norm" not in name
    ]
    assert len(matrices) == 8 and {x.shape[2:] for x in matrices} == {
        (1, 1)
    }  # the original's 1x1 convolutions
    levels = len(networks["vae"].encoder.down_blocks)
    n = len(networks["unet"].down_blocks[0].resnets)
    blocks = dict(down_block_types=range(levels), up_block_types=range(levels))
    theirs = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(
            dict(tensors), {"layers_per_block": n}
        ),
        "vae": single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), blocks),
        "text_encoder": single_file_utils.convert_ldm_clip_checkpoint(dict(tensors)),
    }
    for network, module in networks.items():
        assert len(theirs[network]) == SIZES[sizes][list(NETWORKS).index(network)]
        assert summary(theirs[network]) == summary(module.state_dict())


@pytest.mark.parametrize("sizes", SIZES)
def test_what_diffusers_reads_we_read(sizes):
    """Back again, from a file that contains more than the three networks."""
    tensors = compvis_names.to_original(tagged(sizes))
    more = {
        "betas": torch.ones(1000),
        "model_ema.diffusion_modeltime_embed0weight": torch.ones(2),
        "cond_stage_model.logit_scale": torch.ones(()),
        "first_stage_model.loss.logvar": torch.ones(()),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    networks = sized(sizes)
    aside = compvis_names.from_original(tensors | more, networks, "x.safetensors")
    assert set(aside) == set(more)
    for (network, module), expected in zip(networks.items(), tagged(sizes).values(), strict=True):
        assert summary(module.state_dict()) == summary(expected.state_dict()), network


def test_other_spellings_are_read():
    """Text encoders without `text_model.`, and the VAE's attention as matrices."""
    tensors = compvis_names.to_original(tagged("toy"))
    other = {
        name.replace("transformer.text_model.", "transformer."): x.flatten(1)
        if ".attn_1." in name and x.dim() == 4
        else x
        for name, x in tensors.items()
    }
    assert len(other.keys() - tensors.keys()) == 36
    assert sum(x.shape != tensors[name].shape for name, x in other.items() if name in tensors) == 8
    networks = sized("toy")
    assert not compvis_names.from_original(other, networks, "x.safetensors")
    assert all(
        summary(networks[n].state_dict()) == summary(module.state_dict())
        for n, module in tagged("toy").items()
    )


def both(*modules):
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


def unet_numbering(widths, n, attention):
    """The UNet's names as the original's constructor makes them (openaimodel.py)."""

    def resnet(c_in, c):
        shortcut = ["skip_connection"] * (c_in != c)
        return both(
            "in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", *shortcut
        )

    block = both(
        "attn1.to_out.0", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"
    )
    block |= {f"attn{i}.to_{x}.weight" for i in (1, 2) for x in "qkv"}
    transformer = both("norm", "proj_in", "proj_out") | {
        f"transformer_blocks.0.{name}" for name in block
    }
    inputs, outputs, skips, c, last = (
        [[{"weight", "bias"}]],
        [],
        [widths[0]],
        widths[0],
        len(widths) - 1,
    )
    for level, width in enumerate(widths):
        for _ in range(n):
            inputs.append([resnet(c, width), *[transformer] * (level in attention)])
            c = width
            skips.append(c)
        if level != last:
            inputs.append([both("op")])
            skips.append(c)
    for level, width in reversed([*enumerate(widths)]):
        for i in range(n + 1):
            outputs.append([resnet(c + skips.pop(), width), *[transformer] * (level in attention)])
            c = width
            if level and i == n:
                outputs[-1].append(both("conv"))
    middle = [[resnet(0, 0), transformer, resnet(0, 0)]]
    parts = [
        ("input_blocks.{}.{}", inputs),
        ("middle_block.{1}", middle),
        ("output_blocks.{}.{}", outputs),
    ]
    result = both("time_embed.0", "time_embed.2", "out.0", "out.2")
    for form, blocks in parts:
        places = {
            form.format(i, j): names
            for i, layers in enumerate(blocks)
            for j, names in enumerate(layers)
        }
        result |= {f"{place}.{name}" for place, names in places.items() for name in names}
    return result


def vae_numbering(widths, n):
    """The VAE's names (the original's model.py): `up` counts from the image's resolution."""

    def resnet(place, c_in, c):
        return both(
            *(
                f"{place}.{part}"
                for part in ("norm1", "conv1", "norm2", "conv2", *["nin_shortcut"] * (c_in != c))
            )
        )

    names, last = both("quant_conv", "post_quant_conv"), len(widths) - 1
    for side in ("encoder", "decoder"):
        names |= both(*(f"{side}.{part}" for part in ("conv_in", "norm_out", "conv_out")))
        names |= resnet(f"{side}.mid.block_1", 0, 0) | resnet(f"{side}.mid.block_2", 0, 0)
        names |= both(
            *(f"{side}.mid.attn_1.{part}" for part in ("norm", "q", "k", "v", "proj_out"))
        )
    for way, side, levels, blocks in (
        ("down", "encoder", range(last + 1), n),
        ("up", "decoder", range(last, -1, -1), n + 1),
    ):
        c = widths[levels[0]]
        for level in levels:
            for j in range(blocks):
                names |= resnet(f"{side}.{way}.{level}.block.{j}", c, widths[level])
                c = widths[level]
            if level != levels[-1]:
                names |= both(f"{side}.{way}.{level}.{way}sample.conv")
    return names


def test_names_are_the_originals():
    """diffusers' converter accepts names that it does not know, so the set of names is compared."""
    for sizes, unet, vae in (
        ("SD 1.4", ((320, 640, 1280, 1280), 2, {0, 1, 2}), ((128, 256, 512, 512), 2)),
        ("toy", ((32, 64, 128, 128), 2, {1, 2}), ((16, 32, 64), 1)),
    ):
        networks = sized(sizes)
        names = {
            network: {*compvis_names.original_names(network, module).values()}
            for network, module in networks.items()
        }
        assert names["unet"] == {f"model.diffusion_model.{name}" for name in unet_numbering(*unet)}
        assert names["vae"] == {f"first_stage_model.{name}" for name in vae_numbering(*vae)}
        assert names["text_encoder"] == {
            f"cond_stage_model.transformer.{name}" for name in networks["text_encoder"].state_dict()
        }
        assert [len(x) for x in names.values()] == [*SIZES[sizes]]


def test_sd14_configs_are_what_diffusers_builds(tmp_path):
    """A file without metadata gets SD 1.4's configs. They build the same networks in diffusers."""
    configs = convert.sd14_configs()
    for part, config in configs.items():
        convert.write_json(tmp_path / part / convert.CONFIGS[part], config)
        assert weights.read_config(tmp_path, part)
    with torch.device("meta"):
        theirs = {
            "unet": UNet2DConditionModel.from_config(
                UNet2DConditionModel.load_config(tmp_path / "unet")
            ),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(tmp_path / "vae")),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig.from_pretrained(tmp_path / "text_encoder")
            ),
        }
        unet, vae, text = (theirs[network].config for network in ("unet", "vae", "text_encoder"))
        assert (unet.attention_head_dim, unet.sample_size, vae.scaling_factor) == (
            8,
            64,
            0.18215,
        )  # no tensor's shape shows them
        assert (text.num_attention_heads, text.hidden_act) == (12, "quick_gelu")
        default = {network: make().state_dict() for network, (make, _) in NETWORKS.items()}
    for network, module in theirs.items():
        expected = {name: x.shape for name, x in module.state_dict().items()}
        for ours in (weights.make_network(tmp_path, network).state_dict(), default[network]):
            assert (
                common.their_names({name: x.shape for name, x in ours.items()}, module) == expected
            ), network
    assert configs["scheduler"].items() >= common.SCHEDULER.items()


# -------------------------------------------------------------------------------------- round trips
@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The toy model as a single file, float16 as it is."""
    file = tmp_path_factory.mktemp("single") / "toy.safetensors"
    assert (
        run(convert, "--model", "toy", "--format", "single-file", "--dtype", "fp16", "--out", file)
        == 0
    )
    return file


def test_a_round_trip_is_bit_identical(single, tmp_path):
    """Folder, file, folder: tensors, configs and tokenizer; and file, file."""
    back = tmp_path / "new" / "toy"  # a folder that has to be made
    words = "--model", single, "--dtype", "fp16"
    assert (
        run(convert, *words, "--format", "diffusers", "--tokenizer", weights.TOY, "--out", back)
        == 0
    )
    for network, file in FILES.items():
        assert equal(load_file(back / file), load_file(weights.TOY / file)), network
    for file in sorted(
        p.relative_to(weights.TOY)
        for p in weights.TOY.glob("**/*.*")
        if p.suffix in (".json", ".txt")
    ):
        a, b = ((folder / file).read_text() for folder in (back, weights.TOY))
        assert (json.loads(a) == json.loads(b)) if file.suffix == ".json" else a == b, file
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]
    assert (
        run(convert, *words, "--format", "single-file", "--out", tmp_path / "again.safetensors")
        == 0
    )
    assert same_file(tmp_path / "again.safetensors", single)


def test_a_random_float32_model_and_back(model_folder, tmp_path):
    """Other sizes, SD 1.4's 2022 tokenizer files, float32: nothing is lost by default."""
    assert (
        run(
            convert,
            "--model",
            model_folder,
            "--format",
            "single-file",
            "--out",
            tmp_path / "a.safetensors",
        )
        == 0
    )
    words = "--tokenizer", model_folder / "tokenizer"
    assert (
        run(
            convert,
            "--model",
            tmp_path / "a.safetensors",
            "--format",
            "diffusers",
            *words,
            "--out",
            tmp_path / "b",
        )
        == 0
    )
    a, b = weights.load(model_folder), weights.load(tmp_path / "b")
    for network in NETWORKS:
        assert equal(getattr(a, network).state_dict(), getattr(b, network).state_dict())
    assert a.scheduler == b.scheduler and a.resolution == b.resolution
    assert a.tokenizer(PROMPTS).input_ids == b.tokenizer(PROMPTS).input_ids


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_dtypes(dtype, model_folder, tmp_path):
    assert (
        run(
            convert,
            "--model",
            model_folder,
            "--format",
            "diffusers",
            "--dtype",
            dtype,
            "--out",
            tmp_path / "o",
        )
        == 0
    )
    for network, file in FILES.items():
        state = weights.load_network(model_folder, network).state_dict()
        expected = {name: x.to(DTYPES[dtype]) for name, x in state.items()}
        assert equal(load_file(tmp_path / "o" / file), expected), network


# ----------------------------------------------------------------------------- exports in diffusers
@pytest.fixture(scope="module")
def patch(tmp_path_factory):
    """A patch for the toy model in a run's folder, as train.py writes one."""
    base = {
        name: x for name, x in weights.load("toy").unet.state_dict().items() if ".attn2." in name
    }
    tensors = {
        name: x + 0.3 * x.std() * common.randn(*x.shape, seed=i)
        for i, (name, x) in enumerate(base.items())
    }
    args = dict(
        concept=["star", "red"],
        model="toy",
        iters=160,
        lr=6e-4,
        preview=["a secret preview"],
        seed=2,
    )
    file = tmp_path_factory.mktemp("runs") / "0001-star" / "erased.safetensors"
    weights.save(
        file,
        tensors,
        dict(
            model="toy",
            concepts="star, red",
            method="sdd",
            base_fingerprint=weights.fingerprint(base),
            args=json.dumps(args),
            versions='{"torch": "2.13.0"}',
        ),
    )
    return file


@pytest.fixture(scope="module")
def exports(patch, tmp_path_factory):
    """{format: the toy model with the patch in it}, float32."""
    folder = tmp_path_factory.mktemp("exports")
    for form, name in (("diffusers", "toy"), ("single-file", "toy.safetensors")):
        assert (
            run(
                convert,
                "--model",
                "toy",
                "--patch",
                patch,
                "--format",
                form,
                "--out",
                folder / name,
            )
            == 0
        )
    return {"diffusers": folder / "toy", "single-file": folder / "toy.safetensors"}


@pytest.fixture(scope="module")
def ours(patch, tmp_path_factory):
    """{sampler: generate.py's images of PROMPTS with the patch, each in a batch of its own}."""
    return {
        kind: generated_images("toy", kind, tmp_path_factory.mktemp(kind) / "o", "--patch", patch)
        for kind in ("ddim", "pndm")
    }


def generated_images(model, kind, out, *words):
    assert (
        run(
            generate,
            *PROMPTS,
            "--model",
            model,
            "--scheduler",
            kind,
            "--steps",
            10,
            "--seed",
            3,
            "--batch-size",
            1,
            "--device",
            "cpu",
            *words,
            "--out",
            out,
        )
        == 0
    )
    return [np.asarray(Image.open(file)).astype(int) for file in sorted(out.glob("[0-9]*.png"))]


def generates_like(pipeline, kind, images):
    """No pixel differs by more than 1: numbers that differ by 1e-6 are rounded to 8 bits."""
    pipeline.set_progress_bar_config(disable=True)
    if kind == "ddim":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    for prompt, image in zip(PROMPTS, images, strict=True):
        theirs = pipeline(
            prompt, num_inference_steps=10, generator=torch.Generator().manual_seed(3)
        ).images[0]
        assert np.abs(image - np.asarray(theirs).astype(int)).max() <= 1, prompt


@pytest.mark.parametrize("kind", ["ddim", "pndm"])
def test_an_exported_folder_gives_our_images_in_diffusers(kind, exports, ours, tmp_path):
    generates_like(StableDiffusionPipeline.from_pretrained(exports["diffusers"]), kind, ours[kind])
    if kind == "ddim":  # the patch counts in this comparison
        assert (
            min(
                np.abs(a - b).max()
                for a, b in zip(
                    generated_images("toy", kind, tmp_path / "unpatched"), ours[kind], strict=True
                )
            )
            > 20
        )


@pytest.mark.parametrize("kind", ["ddim", "pndm"])
def test_an_exported_file_gives_our_images_in_diffusers(kind, exports, ours):
    """diffusers uses SD 1.4's configs for a single file, so the toy model's are passed."""
    pipeline = StableDiffusionPipeline.from_single_file(
        str(exports["single-file"]), config=str(weights.TOY)
    )
    generates_like(pipeline, kind, ours[kind])


def test_a_float16_export_needs_no_arguments_in_diffusers(patch, tmp_path):
    half = tmp_path / "half"
    assert (
        run(
            convert,
            "--model",
            "toy",
            "--patch",
            patch,
            "--format",
            "diffusers",
            "--dtype",
            "fp16",
            "--out",
            half,
        )
        == 0
    )
    generates_like(
        StableDiffusionPipeline.from_pretrained(half),
        "ddim",
        generated_images(half, "ddim", tmp_path / "o"),
    )


def test_a_text_encoder_that_says_float16_is_loaded_as_float32(model_folder, tmp_path):
    """Otherwise from_pretrained would load it as float16 next to a float32 UNet, which fails."""
    file = shutil.copytree(model_folder, tmp_path / "model") / "text_encoder" / "config.json"
    config = {
        key: value for key, value in json.loads(file.read_text()).items() if key != "dtype"
    } | {"torch_dtype": "float16"}
    file.write_text(json.dumps(config))
    half = tmp_path / "half"
    assert (
        run(
            convert,
            "--model",
            tmp_path / "model",
            "--format",
            "diffusers",
            "--dtype",
            "fp16",
            "--out",
            half,
        )
        == 0
    )
    pipeline = StableDiffusionPipeline.from_pretrained(half, safety_checker=None)
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == torch.float32
    generates_like(pipeline, "ddim", generated_images(half, "ddim", tmp_path / "o"))


def test_the_readmes_lines_for_a_patch_in_diffusers(patch, ours, tmp_path, monkeypatch):
    """With the folder of the shapes model and this patch in them."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    lines = next(block for block in blocks if "StableDiffusionPipeline" in block)
    lines = lines.replace('"toy/emoji_model"', repr(str(weights.TOY)))
    assert str(weights.TOY) in lines
    lines = re.sub(r'"[^"]*erased\.safetensors"', repr(str(patch)), lines)
    monkeypatch.chdir(tmp_path)  # the lines may save an image
    import safetensors.torch

    names = dict(StableDiffusionPipeline=StableDiffusionPipeline, safetensors=safetensors)
    exec(lines, names)
    generates_like(names["pipeline"], "pndm", ours["pndm"])


# ----------------------------------------------------------------------------------- the model card
def test_the_card_says_what_it_is(exports, patch):
    folder, file = (
        (exports["diffusers"] / "README.md").read_text(),
        exports["single-file"].with_suffix(".md").read_text(),
    )
    for text in (folder, file):
        assert text.startswith("---\n") and "license: mit\n" in text
        assert "# toy without star, red\n" in text
        assert (
            "method: sdd" in text
            and '"lr": 0.0006' in text
            and weights.read(patch)[1]["base_fingerprint"] in text
        )
        assert (
            "No table of `eval.py` about this patch was found." in text
            and "not a proof of safety" in text
            and "MIT. Converting" in text
        )
        assert "a secret preview" not in text and str(patch.parent) not in text
    assert "from_pretrained" in folder and "library_name" in folder
    assert "from_pretrained" not in file and "original (CompVis)" in file


def test_the_card_without_a_patch(model_folder, single, tmp_path):
    text = single.with_suffix(".md").read_text()
    assert "No patch was applied" in text and "# toy, converted" in text and "Limits" not in text
    assert (
        run(
            convert,
            "--model",
            model_folder,
            "--format",
            "single-file",
            "--out",
            tmp_path / "a.safetensors",
        )
        == 0
    )
    text = (tmp_path / "a.md").read_text()
    assert (
        "license:" not in text
        and "That of the base model, tiny" in text
        and str(model_folder) not in text
    )


def test_the_card_has_this_patchs_figures_and_no_others(patch, tmp_path):
    run_folder = shutil.copytree(patch.parent, tmp_path / "run")
    digest = hashlib.sha256(patch.read_bytes()).hexdigest()[:16]
    shown = dict(
        suite="toy", limit="12", scheduler="ddim", steps="4", guidance_scale="7.5", seed="0"
    )
    for name, files in (
        ("mine", dict(files={"x": digest})),
        ("other", dict(files={"x": "0" * 16})),
        ("old", {}),
    ):
        settings = shown | files
        convert.write_json(run_folder / name / "results.json", {"settings": settings})
        (run_folder / name / "table.md").write_text(f"| the table {name} |")
    (run_folder / "results.json").write_text("[")
    words = (
        "--model",
        "toy",
        "--patch",
        run_folder / "erased.safetensors",
        "--format",
        "diffusers",
        "--out",
        tmp_path / "o",
    )
    assert run(convert, *words) == 0
    text = (tmp_path / "o" / "README.md").read_text()
    assert "the table mine" in text and "suite toy, limit 12" in text and "No table of" not in text
    assert "the table other" not in text and "the table old" not in text


# ----------------------------------------------------------------------------------------- mistakes
def refused(tmp_path, capsys, *words, out="o", form="diffusers"):
    """The one sentence with which `convert.py` ends; its status is 2 and it leaves nothing."""
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert run(convert, *words, "--format", form, "--out", tmp_path / out) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and len(error) < 700, error
    assert snapshot(tmp_path) == before
    return error


def changed(single, file, change):
    """A copy of a single file, its tensors changed by `change` in place."""
    tensors, metadata = weights.read(single)
    change(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, file, metadata)
    return file


CONV, TEXT = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "cond_stage_model.transformer.text_model.final_layer_norm.bias",
)


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda t: [t.pop(name) for name in [*t] if name.startswith("first_stage_model.")],
            ["lacks 156 of the 748", "first_stage_model.decoder.conv_in.bias", ", …"],
        ),
        (lambda t: t.pop(CONV), ["lacks 1 of the 748", CONV]),
        (
            lambda t: t.update({"model.diffusion_model.label_emb.0.0.weight": torch.ones(2)}),
            ["has 1 tensors", "label_emb", "architecture"],
        ),
        (
            lambda t: t.update({CONV: torch.ones(32, 9, 3, 3)}),
            [CONV, "(32, 9, 3, 3)", "(32, 4, 3, 3)"],
        ),
        (lambda t: t.update({TEXT: t[TEXT].int()}), [TEXT, "int32"]),
        (
            lambda t: t[TEXT].fill_(torch.nan),
            ["NaN or infinity in 1 tensors", "final_layer_norm.bias"],
        ),
        (lambda t: t[CONV].view(-1)[:1].fill_(torch.inf), ["NaN or infinity in 1 tensors", CONV]),
        (
            lambda t: [
                t.update({f"conditioner.{name}": t.pop(name)})
                for name in [*t]
                if name.startswith("cond_stage_model.")
            ],
            ["lacks 36 of the 748", "XL and others are not implemented"],
        ),
    ],
)
def test_bad_tensors(change, said, single, tmp_path, capsys):
    file = changed(single, tmp_path / "bad.safetensors", change)
    for form, out in (("diffusers", "o"), ("single-file", "o.safetensors")):
        error = refused(
            tmp_path, capsys, "--model", file, "--tokenizer", weights.TOY, form=form, out=out
        )
        assert all(word in error for word in [*said, str(file)]), error


def test_files_that_are_no_single_files(single, tmp_path, capsys):
    (tmp_path / "cut.safetensors").write_bytes(single.read_bytes()[:1_000_000])
    assert "is cut off" in refused(tmp_path, capsys, "--model", tmp_path / "cut.safetensors")
    (tmp_path / "zip.safetensors").write_bytes(b"PK\3\4" + b"x" * 100)
    assert "not a whole safetensors file" in refused(
        tmp_path, capsys, "--model", tmp_path / "zip.safetensors"
    )
    (tmp_path / "model.ckpt").write_bytes(b"cos\nsystem\n")
    assert (
        "pickle" in (error := refused(tmp_path, capsys, "--model", tmp_path / "model.ckpt"))
        and "convert" in error
    )
    assert "There is no file" in refused(tmp_path, capsys, "--model", tmp_path / "none.safetensors")
    assert "no folder nowhere" in refused(tmp_path, capsys, "--model", "nowhere")


@pytest.mark.parametrize(
    "configs, said", [("{", "damaged"), ("[]", "damaged"), ('{"unet": {}}', "damaged")]
)
def test_damaged_configs(configs, said, single, tmp_path, capsys):
    tensors, _ = weights.read(single)
    save_file(tensors, tmp_path / "bad.safetensors", {"configs": configs})
    assert said in refused(tmp_path, capsys, "--model", tmp_path / "bad.safetensors")


def test_configs_that_are_not_implemented(single, tmp_path, capsys):
    tensors, metadata = weights.read(single)
    for part, key, value in (
        ("unet", "use_linear_projection", True),
        ("unet", "attention_head_dim", 5),
        ("scheduler", "prediction_type", "v_prediction"),
    ):
        configs = json.loads(metadata["configs"])
        configs[part][key] = value
        save_file(tensors, tmp_path / "other.safetensors", {"configs": json.dumps(configs)})
        error = refused(tmp_path, capsys, "--model", tmp_path / "other.safetensors")
        assert "other.safetensors" in error and (key in error or "make no network" in error)


def test_a_file_without_metadata_is_held_to_sd14(single, tmp_path, capsys):
    save_file(weights.read(single)[0], tmp_path / "stripped.safetensors")
    error = refused(tmp_path, capsys, "--model", tmp_path / "stripped.safetensors")
    assert "of the 1,130 tensors of Stable Diffusion 1.x" in error


def test_tokenizers(single, tmp_path, capsys):
    """conftest.py has set HF_HUB_OFFLINE."""
    error = refused(tmp_path, capsys, "--model", single)
    assert (
        "openai/clip-vit-large-patch14" in error and "--tokenizer" in error and "network" in error
    )
    common.write_vocabulary(tmp_path / "other", ["lake"])
    error = refused(tmp_path, capsys, "--model", single, "--tokenizer", tmp_path / "other")
    assert "182 words" in error and "179" in error
    (tmp_path / "empty").mkdir()
    assert "tokenizer" in refused(
        tmp_path, capsys, "--model", single, "--tokenizer", tmp_path / "empty"
    )
    assert "--tokenizer is for a single file" in refused(
        tmp_path, capsys, "--model", "toy", "--tokenizer", weights.TOY
    )
    assert "--revision" in refused(tmp_path, capsys, "--model", single, "--revision", "main")


def test_outputs_that_exist_are_refused(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    for name in ("a.safetensors", "b.md"):
        (tmp_path / name).write_text("mine")
    single = "single-file"
    for out, form in (
        ("folder", "diffusers"),
        ("a.safetensors", single),
        ("b.safetensors", single),
        ("b.md", "diffusers"),
    ):
        assert "already exists" in refused(tmp_path, capsys, "--model", "toy", out=out, form=form)
    assert "has to end in .safetensors" in refused(
        tmp_path, capsys, "--model", "toy", out="c.ckpt", form="single-file"
    )
    assert "Cannot write" in refused(tmp_path, capsys, "--model", "toy", out="b.md/c")


def test_numbers_too_large_for_float16(model_folder, tmp_path, capsys):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tensors = load_file(folder / FILES["vae"])
    tensors["decoder.conv_in.bias"][0] = 1e6
    save_file(tensors, folder / FILES["vae"])
    error = refused(tmp_path, capsys, "--model", folder, "--dtype", "fp16")
    assert "too large for fp16" in error and "decoder.conv_in.bias" in error and "bf16" in error
    assert (
        run(
            convert,
            "--model",
            folder,
            "--format",
            "diffusers",
            "--dtype",
            "bf16",
            "--out",
            tmp_path / "o",
        )
        == 0
    )


def test_patches_that_do_not_fit(patch, model_folder, tmp_path, capsys):
    assert "was made for toy" in refused(
        tmp_path, capsys, "--model", model_folder, "--patch", patch
    )
    tensors, metadata = weights.read(patch)
    weights.save(
        tmp_path / "other.safetensors",
        tensors,
        metadata | {"base_fingerprint": "0" * 16, "model": "someone/else"},
    )
    error = refused(tmp_path, capsys, "--model", "toy", "--patch", tmp_path / "other.safetensors")
    assert (
        "was made for someone/else" in error
        and "0" * 16 in error
        and "name the right --model" in error
    )
    weights.save(
        tmp_path / "nan.safetensors", {name: x * torch.nan for name, x in tensors.items()}, metadata
    )
    error = refused(tmp_path, capsys, "--model", "toy", "--patch", tmp_path / "nan.safetensors")
    assert (
        f"{tmp_path / 'nan.safetensors'} contains NaN" in error
        and f"in {len(tensors)} tensors" in error
    )
    weights.save(tmp_path / "odd.safetensors", tensors, metadata | {"args": "{"})
    assert "metadata is damaged" in refused(
        tmp_path, capsys, "--model", "toy", "--patch", tmp_path / "odd.safetensors"
    )
    assert "There is no file" in refused(
        tmp_path, capsys, "--model", "toy", "--patch", tmp_path / "none.safetensors"
    )


@pytest.mark.parametrize("form, out", [("diffusers", "o"), ("single-file", "o.safetensors")])
@pytest.mark.parametrize("fault", [OSError("disk full"), UserError("stop"), KeyboardInterrupt()])
def test_nothing_half_written_stays(fault, form, out, tmp_path, capsys, monkeypatch):
    """The card comes last."""

    def fail(*_):
        raise fault

    monkeypatch.setattr(convert, "card", fail)
    status = 130 if isinstance(fault, KeyboardInterrupt) else 2
    assert run(convert, "--model", "toy", "--format", form, "--out", tmp_path / out) == status
    assert not [*tmp_path.iterdir()]


def test_unused_tensors_are_listed(single, tmp_path, capsys):
    position_ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    file = changed(
        single,
        tmp_path / "full.safetensors",
        lambda t: t.update(
            {
                "betas": torch.ones(9),
                "model_ema.decay": torch.ones(()),
                "model_ema.num_updates": torch.ones(()),
                position_ids: torch.arange(77)[None],
            }
        ),
    )
    assert (
        run(
            convert,
            "--model",
            file,
            "--format",
            "single-file",
            "--dtype",
            "fp16",
            "--out",
            tmp_path / "o.safetensors",
        )
        == 0
    )
    assert f"not used: betas, {position_ids}, model_ema (2 tensors)\n" in capsys.readouterr().out
    assert same_file(tmp_path / "o.safetensors", single)


def test_other_commands_name_this_one(single):
    for name in (single, "some/model.safetensors"):
        with pytest.raises(UserError, match="python -m tools.convert --model .*--format diffusers"):
            weights.load(str(name))
