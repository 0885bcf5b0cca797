"""Between diffusers' folder and the original single file, both ways.

Names are compared with diffusers' converters and with the original's numbering. Round trips are
equal bit for bit. diffusers generates our images. Mistakes are one sentence.
"""

import hashlib
import json
import shutil

import common
import numpy as np
import pytest
import torch
from common import pictures, run
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import weights
from support.cli import DTYPES
from support.errors import UserError
from tools import compvis_names, convert
from weights import NETWORKS

FILES = {network: f"{network}/{name}.safetensors" for network, (_, name) in NETWORKS.items()}
PROMPTS = ["a star", "the moon on something"]  # words that both toy models know


def converted(words, out):
    """Runs tools.convert, which succeeds; returns `out`."""
    assert run(f"tools.convert {words}", out) == 0
    return out


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
SPELLED_2022 = "query key value proj_attn"
SIZES = {"SD 1.4": (686, 248, 196), "toy": (556, 156, 36)}  # tensors of each network


def sized(sizes):
    """{network: module} on the meta device."""
    with torch.device("meta"):
        if sizes == "SD 1.4":
            return {network: make() for network, (make, _) in NETWORKS.items()}
        return {network: weights.make_network(weights.TOY, network) for network in NETWORKS}


def tagged(sizes):
    """{network: module} whose nth tensor is filled with n, in full size but without its memory."""
    networks, n = sized(sizes), 0
    for module in networks.values():
        state = module.state_dict()
        for name, x in state.items():
            n += 1
            state[name] = torch.tensor(float(n)).expand(x.shape)
        module.load_state_dict(state, assign=True)
    return networks


def summary(tensors):
    """{name: (shape, the number that it is full of)}."""
    assert all(x[(0,) * x.dim()] == x.flatten()[-1] for x in tensors.values())
    return {name: (tuple(x.shape), x.flatten()[0].item()) for name, x in tensors.items()}


@pytest.mark.parametrize("sizes", SIZES)
def test_diffusers_reads_what_we_write(sizes):
    """Every tensor arrives under its name and in its shape; each carries a number of its own."""
    networks = tagged(sizes)
    tensors = compvis_names.to_original(convert.states_of(networks))
    assert len(tensors) == sum(SIZES[sizes])
    attention = [name for name in tensors if ".attn_1." in name and "norm" not in name]
    matrices = [tensors[name] for name in attention if name.endswith("weight")]
    assert len(matrices) == 8  # the original has them as 1x1 convolutions
    assert {x.shape[2:] for x in matrices} == {(1, 1)}
    levels = range(len(networks["vae"].encoder.down_blocks))
    n = len(networks["unet"].down_blocks[0].resnets)
    unet, vae = {"layers_per_block": n}, dict(down_block_types=levels, up_block_types=levels)
    theirs = (
        single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), unet),
        single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), vae),
        single_file_utils.convert_ldm_clip_checkpoint(dict(tensors)),
    )
    assert tuple(map(len, theirs)) == SIZES[sizes]
    for module, their in zip(networks.values(), theirs, strict=True):
        assert summary(their) == summary(module.state_dict())


def assert_read(tensors, sizes, unused=()):
    """We read the tagged networks from the tensors of a single file; `unused` are left."""
    like = convert.states_of(sized(sizes))
    states, left = compvis_names.from_original(tensors, like, "x.safetensors")
    assert {*left} == {*unused} and states.keys() == like.keys()
    for network, expected in convert.states_of(tagged(sizes)).items():
        assert summary(states[network]) == summary(expected), network


@pytest.mark.parametrize("sizes", SIZES)
def test_what_diffusers_reads_we_read(sizes):
    """Back again, from a file that contains more than the three networks."""
    position_ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    more = {
        "betas": torch.ones(1000),
        "model_ema.diffusion_modeltime_embed0weight": torch.ones(2),
        "cond_stage_model.logit_scale": torch.ones(()),
        "first_stage_model.loss.logvar": torch.ones(()),
        position_ids: torch.arange(77)[None],
    }
    assert_read(
        compvis_names.to_original(convert.states_of(tagged(sizes))) | more, sizes, unused=more
    )


@pytest.mark.parametrize("spelled", ["q k v proj_out", "to_q to_k to_v to_out.0", SPELLED_2022])
def test_other_spellings_are_read(spelled):
    """Text encoders without `text_model.`, the VAE's attention as matrices or with other names."""
    other, changed, spelled = {}, 0, dict(zip(("q", "k", "v", "proj_out"), spelled.split()))
    for name, x in compvis_names.to_original(convert.states_of(tagged("toy"))).items():
        new = name.replace("transformer.text_model.", "transformer.")
        layer, _, kind = new.partition(".attn_1.")[2].rpartition(".")
        if layer in spelled:
            new = new.replace(f".{layer}.{kind}", f".{spelled[layer]}.{kind}")
        other[new] = x.flatten(1) if ".attn_1." in name and x.dim() == 4 else x
        changed += new != name or other[new].shape != x.shape
    assert changed == 36 + (8 if "q" in spelled.values() else 16)
    assert_read(other, "toy")


# SD 1.4: one tensor of each layer that has another name in the original, and of each numbered block
EXAMPLES = """
unet time_embedding.linear_2                      time_embed.2
unet conv_in                                      input_blocks.0.0
unet conv_norm_out                                out.0
unet conv_out                                     out.2
unet down_blocks.0.resnets.0.norm1                input_blocks.1.0.in_layers.0
unet down_blocks.0.downsamplers.0.conv            input_blocks.3.0.op
unet down_blocks.1.resnets.0.conv_shortcut        input_blocks.4.0.skip_connection
unet down_blocks.1.resnets.1.time_emb_proj        input_blocks.5.0.emb_layers.1
unet down_blocks.2.attentions.1.proj_in           input_blocks.8.1.proj_in
unet down_blocks.3.resnets.1.conv1                input_blocks.11.0.in_layers.2
unet mid_block.resnets.0.norm2                    middle_block.0.out_layers.0
unet mid_block.attentions.0.transformer_blocks.0.norm3  middle_block.1.transformer_blocks.0.norm3
unet mid_block.resnets.1.conv2                    middle_block.2.out_layers.3
unet up_blocks.0.upsamplers.0.conv                output_blocks.2.1.conv
unet up_blocks.1.upsamplers.0.conv                output_blocks.5.2.conv
unet up_blocks.3.attentions.2.norm                output_blocks.11.1.norm
vae  post_quant_conv                              post_quant_conv
vae  encoder.conv_norm_out                        encoder.norm_out
vae  encoder.down_blocks.1.resnets.0.conv_shortcut  encoder.down.1.block.0.nin_shortcut
vae  encoder.down_blocks.2.downsamplers.0.conv    encoder.down.2.downsample.conv
vae  encoder.mid_block.resnets.1.conv1            encoder.mid.block_2.conv1
vae  encoder.mid_block.attentions.0.group_norm    encoder.mid.attn_1.norm
vae  encoder.mid_block.attentions.0.to_q          encoder.mid.attn_1.q
vae  encoder.mid_block.attentions.0.to_k          encoder.mid.attn_1.k
vae  decoder.mid_block.attentions.0.to_v          decoder.mid.attn_1.v
vae  decoder.mid_block.attentions.0.to_out.0      decoder.mid.attn_1.proj_out
vae  decoder.up_blocks.0.resnets.2.norm2          decoder.up.3.block.2.norm2
vae  decoder.up_blocks.0.upsamplers.0.conv        decoder.up.3.upsample.conv
text_encoder text_model.final_layer_norm          text_model.final_layer_norm
"""


def test_names_are_the_originals():
    """diffusers' converter accepts names that it does not know, and an upsampling anywhere."""
    names, examples = {}, [line.split() for line in EXAMPLES.split("\n") if line]
    for network, state in convert.states_of(sized("SD 1.4")).items():
        names[network] = compvis_names.original_names(network, state)
    for network, ours, theirs in examples:
        expected = f"{compvis_names.PREFIX[network]}{theirs}.weight"
        assert names[network][f"{ours}.weight"] == expected
    for network, layers in compvis_names.LAYERS.items():
        text = " ".join(ours for where, ours, _ in examples if where == network)
        assert [layer for layer in layers if layer not in text] == []


def test_sd14_configs_are_what_diffusers_builds(tmp_path):
    """A file without metadata gets SD 1.4's configs. They build the same networks in diffusers."""
    configs = convert.sd14_configs()
    for part, config in configs.items():
        convert.write_json(tmp_path / part / convert.CONFIGS[part], config)
        assert weights.read_config(tmp_path, part)
    assert configs["scheduler"].items() >= common.SCHEDULER.items()
    ours = sized("SD 1.4")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tmp_path / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(tmp_path / "vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(tmp_path / "text_encoder"))
    # No tensor's shape shows these numbers.
    assert (unet.config.attention_head_dim, unet.config.sample_size) == (8, 64)
    assert vae.config.scaling_factor == 0.18215
    assert (text.config.num_attention_heads, text.config.hidden_act) == (12, "quick_gelu")
    for network, theirs in dict(unet=unet, vae=vae, text_encoder=text).items():
        expected = {name: x.shape for name, x in theirs.state_dict().items()}
        for module in (weights.make_network(tmp_path, network), ours[network]):
            shapes = {name: x.shape for name, x in module.state_dict().items()}
            assert common.their_names(shapes, theirs) == expected, network


# -------------------------------------------------------------------------------------- round trips
@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The toy model as a single file, float16 as it is."""
    file = tmp_path_factory.mktemp("single") / "toy.safetensors"
    return converted("--model toy --format single-file --dtype fp16", file)


def test_a_round_trip_is_bit_identical(single, tmp_path):
    """Folder, file, folder: tensors, configs and tokenizer; and file, file."""
    words = f"--model {single} --dtype fp16 --format"
    back = tmp_path / "new" / "toy"  # a folder that has to be made
    converted(f"{words} diffusers --tokenizer {weights.TOY}", back)
    for network, file in FILES.items():
        assert equal(load_file(back / file), load_file(weights.TOY / file)), network
    for file in weights.TOY.glob("**/*.*"):
        if file.suffix in (".json", ".txt"):
            a, b = file.read_text(), (back / file.relative_to(weights.TOY)).read_text()
            assert (json.loads(a) == json.loads(b)) if file.suffix == ".json" else a == b, file
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]
    again = converted(f"{words} single-file", tmp_path / "again.safetensors")
    assert same_file(again, single)


def test_a_random_float32_model_and_back(model_folder, tmp_path):
    """Other sizes, SD 1.4's 2022 tokenizer files, float32: nothing is lost by default."""
    file = converted(f"--model {model_folder} --format single-file", tmp_path / "a.safetensors")
    words = f"--model {file} --tokenizer {model_folder / 'tokenizer'} --format diffusers"
    a, b = weights.load(model_folder), weights.load(converted(words, tmp_path / "b"))
    for network in NETWORKS:
        assert equal(getattr(a, network).state_dict(), getattr(b, network).state_dict())
    assert a.scheduler == b.scheduler and a.resolution == b.resolution
    assert a.tokenizer(PROMPTS).input_ids == b.tokenizer(PROMPTS).input_ids


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_dtypes(dtype, model_folder, tmp_path):
    out = converted(f"--model {model_folder} --format diffusers --dtype {dtype}", tmp_path / "o")
    for network, file in FILES.items():
        state = weights.load_network(model_folder, network).state_dict()
        expected = {name: x.to(DTYPES[dtype]) for name, x in state.items()}
        assert equal(load_file(out / file), expected), network


# --------------------------------------------------------------------- the same images as diffusers
@pytest.fixture(scope="module")
def patch(tmp_path_factory):
    """A patch for the toy model in a run's folder, as train.py writes one."""
    state = weights.load("toy").unet.state_dict()
    base = {name: x for name, x in state.items() if ".attn2." in name}
    tensors = {}
    for i, (name, x) in enumerate(base.items()):
        tensors[name] = x + 0.3 * x.std() * common.randn(*x.shape, seed=i)
    args = dict(concept=["star", "red"], model="toy", iters=160, lr=6e-4, seed=2)
    metadata = dict(
        model="toy",
        concepts="star, red",
        method="sdd",
        base_fingerprint=weights.fingerprint(base),
        args=json.dumps(args | dict(preview=["a secret preview"])),
        versions='{"torch": "2.13.0"}',
    )
    file = tmp_path_factory.mktemp("runs") / "0001-star" / "erased.safetensors"
    weights.save(file, tensors, metadata)
    return file


@pytest.fixture(scope="module")
def exports(patch, tmp_path_factory):
    """{name: the toy model with the patch in it}."""
    folder = tmp_path_factory.mktemp("exports")
    words = f"--model toy --patch {patch} --format"
    return {
        "folder": converted(f"{words} diffusers", folder / "toy"),
        "file": converted(f"{words} single-file", folder / "toy.safetensors"),
        "fp16": converted(f"{words} diffusers --dtype fp16", folder / "half"),
    }


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A function: generate.py's images, (4, H, W, 3). It makes the same images once."""
    made = {}

    def images(words):
        if words not in made:
            out = tmp_path_factory.mktemp("images") / "o"
            how = "--negative-prompt 'a picture' --steps 6 --seed 5 --num-images 2 --device cpu"
            prompts = " ".join(f"'{prompt}'" for prompt in PROMPTS)
            assert run(f"generate.py {prompts} --batch-size 3 {how} {words}", out) == 0
            made[words] = pictures(out)
        return made[words]

    return images


SAMPLERS = {  # diffusers' sampler, and what a model's config may lack
    "ddim": (DDIMScheduler, dict(clip_sample=False)),
    "pndm": (PNDMScheduler, dict(skip_prk_steps=True)),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("source", ["toy", "emoji", "random", "patch", "folder", "file", "fp16"])
def test_diffusers_generates_our_images(source, sampler, model_folder, patch, exports, generated):
    """No pixel differs by more than 1: numbers that differ by 1e-6 are rounded to 8 bits."""
    exported = exports.get(source)
    model, folder = {
        "toy": ("toy", weights.TOY),
        "emoji": ("emoji", weights.TOYS["emoji"]),
        "random": (model_folder, model_folder),
        "patch": (f"toy --patch {patch}", weights.TOY),
        "folder": (f"toy --patch {patch}", exported),
        "file": (f"toy --patch {patch}", weights.TOY),
        "fp16": (exported, exported),
    }[source]
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    if source == "patch":
        found = pipeline.unet.load_state_dict(load_file(patch), strict=False)
        assert not found.unexpected_keys
    if source == "file":  # for a file diffusers takes SD 1.4's configs, if it gets no others
        pipeline = StableDiffusionPipeline.from_single_file(str(exported), config=str(folder))
    pipeline.set_progress_bar_config(disable=True)
    theirs, more = SAMPLERS[sampler]
    pipeline.scheduler = theirs.from_config(pipeline.scheduler.config, **more)
    ours = generated(f"--model {model} --scheduler {sampler}")
    theirs = pipeline(
        [prompt for prompt in PROMPTS for _ in range(2)],
        negative_prompt=["a picture"] * 4,
        num_inference_steps=6,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 5, 6)],
    ).images
    assert np.abs(ours - np.stack(theirs)).max() <= 1
    if source == "patch":  # it counts in this comparison
        plain = generated(f"--model toy --scheduler {sampler}")
        assert np.abs(ours - plain).max(axis=(1, 2, 3)).min() > 20


def test_a_text_encoder_that_says_float16_is_loaded_as_float32(model_folder, tmp_path):
    """Otherwise from_pretrained would load it as float16 next to a float32 UNet, which fails."""
    file = shutil.copytree(model_folder, tmp_path / "model") / "text_encoder" / "config.json"
    config = json.loads(file.read_text()) | {"torch_dtype": "float16"}
    config.pop("dtype", None)
    file.write_text(json.dumps(config))
    words = f"--model {tmp_path / 'model'} --format diffusers --dtype fp16"
    pipeline = StableDiffusionPipeline.from_pretrained(converted(words, tmp_path / "half"))
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == torch.float32


# ----------------------------------------------------------------------------------- the model card
def test_the_card_says_what_it_is(exports, patch):
    folder = (exports["folder"] / "README.md").read_text()
    file = exports["file"].with_suffix(".md").read_text()
    for text in (folder, file):
        for said in (
            *("license: mit\n", "# toy without star, red\n", "method: sdd", '"lr": 0.0006'),
            *("No table of `eval.py` about this patch", "not a proof of safety", "MIT. Converting"),
            weights.read(patch)[1]["base_fingerprint"],
        ):
            assert said in text
        assert text.startswith("---\n")
        assert "a secret preview" not in text and str(patch.parent) not in text
    assert "from_pretrained" in folder and "library_name: diffusers" in folder
    assert "from_pretrained" not in file and "original (CompVis)" in file


def test_the_card_without_a_patch(model_folder, single, tmp_path):
    text = single.with_suffix(".md").read_text()
    assert "No patch was applied" in text and "# toy, converted" in text and "Limits" not in text
    converted(f"--model {model_folder} --format single-file", tmp_path / "a.safetensors")
    text = (tmp_path / "a.md").read_text()
    assert "license:" not in text and str(model_folder) not in text
    assert "That of the base model, tiny" in text


def test_the_card_has_this_patchs_figures_and_no_others(patch, tmp_path):
    folder = shutil.copytree(patch.parent, tmp_path / "run")
    digest = hashlib.sha256(patch.read_bytes()).hexdigest()[:16]
    shown = dict(suite="toy", limit=12, scheduler="ddim", steps=4, guidance_scale=7.5, seed=0)
    for name, files in (("mine", {"x": digest}), ("other", {"x": "0" * 16})):
        convert.write_json(folder / name / "eval.json", shown | {"files": files})
        (folder / name / "table.md").write_text(f"| the table {name} |")
    convert.write_json(folder / "eval.json", shown | {"files": {"x": digest}})  # without a table
    words = f"--patch {folder / 'erased.safetensors'} --format diffusers"
    text = (converted(words, tmp_path / "o") / "README.md").read_text()
    assert "the table mine" in text and "suite toy, limit 12" in text and "No table of" not in text
    assert "the table other" not in text


# ----------------------------------------------------------------------------------------- mistakes
@pytest.fixture
def refused(tmp_path, capsys):
    """A function: the one sentence with which tools.convert ends. It leaves nothing."""

    def sentence(words, out="o", form="diffusers"):
        before = snapshot(tmp_path)
        capsys.readouterr()
        assert run(f"tools.convert {words} --format {form}", tmp_path / out) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error and len(error) < 700, error
        assert snapshot(tmp_path) == before
        return error

    return sentence


def changed(single, file, change):
    """A copy of a single file, its tensors changed by `change` in place."""
    tensors, metadata = weights.read(single)
    change(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, file, metadata)
    return file


def drop(start):
    """A change that removes tensors."""
    return lambda t: [t.pop(name) for name in [*t] if name.startswith(start)]


def put(name, x):
    return lambda t: t.update({name: x})


def rename_text_encoder(t):
    for name in [name for name in t if name.startswith("cond_stage_model.")]:
        t[f"conditioner.{name}"] = t.pop(name)


CONV = "model.diffusion_model.input_blocks.0.0.weight"
LABEL = "model.diffusion_model.label_emb.0.0.weight"
NORM = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
FIRST = "first_stage_model.decoder.conv_in.bias"


@pytest.mark.parametrize(
    "change, said",
    [
        (drop("first_stage_model.decoder."), ["lacks 88 of the 748", FIRST, ", …"]),
        (drop(CONV), ["lacks 1 of the 748", CONV]),
        (put(LABEL, torch.ones(2)), ["has 1 tensors", "label_emb", "architecture"]),
        (put(CONV, torch.ones(32, 5, 3, 3)), [CONV, "(32, 5, 3, 3)", "(32, 4, 3, 3)"]),
        (put(CONV, torch.ones(32, 9, 3, 3)), ["is an inpainting model"]),
        (lambda t: t.update({NORM: t[NORM].int()}), [NORM, "int32"]),
        (lambda t: t[NORM].fill_(torch.nan), ["NaN or infinity in 1 tensors", NORM]),
        (rename_text_encoder, ["lacks 36 of the 748", "XL and others are not implemented"]),
    ],
)
def test_bad_tensors(change, said, single, tmp_path, refused):
    file = changed(single, tmp_path / "bad.safetensors", change)
    error = refused(f"--model {file} --tokenizer {weights.TOY}")
    assert all(word in error for word in [*said, str(file)]), error


@pytest.mark.parametrize("configs", ["{", "[]", '{"unet": {}}'])
def test_damaged_configs(configs, single, tmp_path, refused):
    save_file(weights.read(single)[0], tmp_path / "bad.safetensors", {"configs": configs})
    assert "damaged" in refused(f"--model {tmp_path / 'bad.safetensors'}")


@pytest.mark.parametrize(
    "part, key, value, said",
    [
        ("unet", "use_linear_projection", True, "use_linear_projection = True"),
        ("unet", "attention_head_dim", 5, "make no network"),
        ("scheduler", "prediction_type", "v_prediction", "prediction_type = 'v_prediction'"),
    ],
)
def test_configs_that_are_not_implemented(part, key, value, said, single, tmp_path, refused):
    tensors, metadata = weights.read(single)
    configs = json.loads(metadata["configs"])
    configs[part][key] = value
    save_file(tensors, tmp_path / "other.safetensors", {"configs": json.dumps(configs)})
    error = refused(f"--model {tmp_path / 'other.safetensors'}")
    assert "other.safetensors" in error and said in error


def test_a_file_without_metadata_is_held_to_sd14(single, tmp_path, refused):
    save_file(weights.read(single)[0], tmp_path / "stripped.safetensors")
    error = refused(f"--model {tmp_path / 'stripped.safetensors'}")
    assert "of the 1,130 tensors of Stable Diffusion 1.x" in error


def test_tokenizers(single, tmp_path, refused):
    """CLIP's is here. conftest.py has set HF_HUB_OFFLINE."""
    clip = CLIPTokenizer.from_pretrained(convert.TOKENIZER)
    assert clip("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(clip) == 49408 and clip.model_max_length == 77
    common.write_vocabulary(tmp_path / "other", ["lake"])
    (tmp_path / "empty").mkdir()
    for words, *said in (
        (f"{single} --tokenizer nobody/clip", "nobody/clip", "--tokenizer", "network"),
        (f"{single}", "49,408 words", "179"),
        (f"{single} --tokenizer {tmp_path / 'other'}", "182 words", "179"),
        (f"{single} --tokenizer {tmp_path / 'empty'}", "There is no tokenizer in"),
        (f"toy --tokenizer {weights.TOY}", "are for a single file"),
        (f"{single} --revision main", "--revision is for models from the hub"),
    ):
        error = refused(f"--model {words}")
        assert all(word in error for word in said), error


def test_outputs_that_exist_are_refused(tmp_path, refused):
    (tmp_path / "folder").mkdir()
    for name in ("a.safetensors", "b.md"):
        (tmp_path / name).write_text("mine")
    for out, form, said in (
        ("folder", "diffusers", "already exists"),
        ("a.safetensors", "single-file", "already exists"),
        ("b.safetensors", "single-file", "already exists"),
        ("b.md", "diffusers", "already exists"),
        ("c.ckpt", "single-file", "has to end in .safetensors"),
        ("b.md/c", "diffusers", "Cannot write"),
    ):
        assert said in refused("--model toy", out, form)


def test_numbers_too_large_for_float16(model_folder, tmp_path, refused):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tensors = load_file(folder / FILES["vae"])
    tensors["decoder.conv_in.bias"][0] = 1e6
    save_file(tensors, folder / FILES["vae"])
    error = refused(f"--model {folder} --dtype fp16")
    assert "too large for fp16" in error and "decoder.conv_in.bias" in error and "bf16" in error
    converted(f"--model {folder} --format diffusers --dtype bf16", tmp_path / "o")


def test_patches_that_do_not_fit(patch, model_folder, tmp_path, refused):
    tensors, metadata = weights.read(patch)
    other = metadata | {"base_fingerprint": "0" * 16, "model": "someone/else"}
    weights.save(tmp_path / "other.safetensors", tensors, other)
    weights.save(tmp_path / "odd.safetensors", tensors, metadata | {"args": "{"})
    for model, file, *said in (
        (model_folder, patch, "was made for toy"),
        ("toy", tmp_path / "other.safetensors", "made for someone/else", "name the right --model"),
        ("toy", tmp_path / "odd.safetensors", "metadata is damaged"),
        ("toy", tmp_path / "none.safetensors", "There is no file"),
    ):
        error = refused(f"--model {model} --patch {file}")
        assert all(word in error for word in said), error


@pytest.mark.parametrize("form, out", [("diffusers", "o"), ("single-file", "o.safetensors")])
@pytest.mark.parametrize("fault", [OSError("disk full"), UserError("stop"), KeyboardInterrupt()])
def test_nothing_half_written_stays(fault, form, out, tmp_path, monkeypatch):
    """The card comes last."""

    def fail(*_):
        raise fault

    monkeypatch.setattr(convert, "card", fail)
    status = 130 if isinstance(fault, KeyboardInterrupt) else 2
    assert run(f"tools.convert --model toy --format {form}", tmp_path / out) == status
    assert not [*tmp_path.iterdir()]


def test_unused_tensors_are_listed(single, tmp_path, capsys):
    position_ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    more = {name: torch.ones(()) for name in ("betas", "model_ema.decay", "model_ema.num_updates")}
    more[position_ids] = torch.arange(77)[None]
    file = changed(single, tmp_path / "full.safetensors", lambda t: t.update(more))
    words = f"--model {file} --format single-file --dtype fp16"
    assert same_file(converted(words, tmp_path / "o.safetensors"), single)
    assert f"not used: betas, {position_ids}, model_ema (2 tensors)\n" in capsys.readouterr().out


def test_other_commands_name_this_one(single):
    for name in (single, "some/model.safetensors"):
        with pytest.raises(UserError, match="python -m tools.convert --model .*--format diffusers"):
            weights.load(str(name))
