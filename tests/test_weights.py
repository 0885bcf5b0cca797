"""weights.py reads every layout in which SD 1.x was published, and names what is wrong.

Damaged files: test_bad_input.py and test_fuzz.py.
"""

import inspect
import json
import re
import shutil

import common
import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import weights
from pipeline import make_scheduler
from support import files
from support.errors import UserError
from unet import UNet

FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy to break."""
    return shutil.copytree(model_folder, tmp_path / "copy")


def rewrite(file, change):
    """The tensors of a file, changed by `change` (a dict in place, or a new one returned)."""
    tensors = load_file(file)
    save_file({k: v.contiguous() for k, v in (change(tensors) or tensors).items()}, file)


def reconfigure(folder, part, without=(), **changes):
    """Changes a part's config, and removes the keys `without`."""
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: x for key, x in config.items() if key not in without}))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


def networks_of(model):
    return {network: getattr(model, network) for network in FILES}


def refused(folder, *words):
    """`load` refuses the folder, in one line that contains all of `words`."""
    with pytest.raises(UserError) as e:
        weights.load(folder)
    message = str(e.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 500, message


# ---------------------------------------------------------------------------- reading what is right
def test_load(model_folder, capsys):
    model = weights.load(str(model_folder))
    printed = capsys.readouterr().out
    for network, module in networks_of(model).items():
        theirs = load_file(model_folder / FILES[network])
        count = sum(x.numel() for x in theirs.values())
        if network == "text_encoder":
            theirs = {f"text_model.{k.removeprefix('text_model.')}": x for k, x in theirs.items()}
        ours = module.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
        assert not module.training and not any(p.requires_grad for p in module.parameters())
        assert f"{len(theirs)} tensors, {count:,} parameters" in printed
    assert model.scheduler["beta_end"] == 0.012 and model.resolution == 8 * model.vae.factor
    assert model.tokenizer("a red star").input_ids[-1] == model.tokenizer.eos_token_id


def test_float16_files_are_widened(folder):
    plain = networks_of(weights.load(folder))
    for file in FILES.values():
        rewrite(folder / file, lambda tensors: {k: v.half() for k, v in tensors.items()})
        (folder / file).rename((folder / file).with_suffix(".fp16.safetensors"))
    for network, module in networks_of(weights.load(folder)).items():
        assert all(p.dtype == torch.float32 for p in module.parameters())
        assert same(module, plain[network].half().float())


def test_plain_files_are_preferred(folder):
    for file in FILES.values():
        (folder / file).with_suffix(".fp16.safetensors").write_bytes(b"never opened")
    weights.load(folder)


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("convolutions", [False, True])
def test_the_vaes_attention_under_its_names_of_2022(folder, convolutions):
    new = weights.load_network(folder, "vae")

    def age(tensors):
        aged = {}
        for name, x in tensors.items():
            match = re.fullmatch(r"(.*attentions\.0\.)(to_q|to_k|to_v|to_out\.0)(\.\w+)", name)
            name = f"{match[1]}{OLD[match[2]]}{match[3]}" if match else name
            aged[name] = x[:, :, None, None] if match and convolutions and x.dim() == 2 else x
        assert sum(".query." in name for name in aged) == 4  # weight and bias, encoder and decoder
        return aged

    rewrite(folder / FILES["vae"], age)
    assert same(weights.load_network(folder, "vae"), new)


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("position_ids", [False, True])
def test_clips_names_old_and_new(folder, prefix, position_ids):
    new = weights.load_network(folder, "text_encoder")

    def rename(tensors):
        renamed = {prefix + name.removeprefix("text_model."): x for name, x in tensors.items()}
        if position_ids:
            renamed[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
        return renamed

    rewrite(folder / FILES["text_encoder"], rename)
    assert same(weights.load_network(folder, "text_encoder"), new)


def test_tokenizer_files_of_both_kinds(folder):
    old = weights.load_tokenizer(folder)
    shutil.rmtree(folder / "tokenizer")
    old.save_pretrained(folder / "tokenizer")  # transformers 5: tokenizer.json
    new = weights.load_tokenizer(folder)
    assert new("a red star, on snow").input_ids == old("a red star, on snow").input_ids
    assert (new.model_max_length, new.pad_token_id) == (77, new.eos_token_id)


# --------------------------------------------------------------------------------------- strictness
NAMES = {  # of one tensor in each network
    "unet": "conv_in.weight",
    "vae": "encoder.conv_in.weight",
    "text_encoder": "final_layer_norm.weight",
}


@pytest.mark.parametrize("network", FILES)
def test_strictness(folder, network):
    """A tensor that is missing, has another shape or type, or that nobody knows."""
    file, name = folder / FILES[network], NAMES[network]
    whole = load_file(file)
    full_name = next(key for key in whole if key.endswith(name))
    x = whole.pop(full_name)
    for change, *said in (
        ({}, f"{name} is missing"),
        ({full_name: torch.cat([x, x])}, name, "should be"),
        ({full_name: x.int()}, name, "int32"),
        ({full_name: x, f"{full_name}.more": x.clone()}, f"{full_name}.more is unknown"),
    ):
        save_file(whole | change, file)
        refused(folder, FILES[network], *said)


# fmt: off
@pytest.mark.parametrize("file, content, said", [
    ("unet/diffusion_pytorch_model.bin", b"cos\nsystem\n", "pickle"),  # it is never opened
    ("unet/model.ckpt", b"cos\nsystem\n", "pickle"),
    ("unet/config.json", None, "is missing"),
    ("unet/config.json", b'{"a": ', "JSON"),
    ("vae/config.json", b"", "JSON"),
    ("text_encoder/config.json", b"[1, 2]", "JSON"),
    ("scheduler/scheduler_config.json", b"\xff", "JSON"),
    ("tokenizer/vocab.json", b"{", "cannot be read"),
    (FILES["text_encoder"], None, "diffusers' layout"),
])
# fmt: on
def test_missing_and_broken_files(folder, file, content, said):
    if said == "pickle":
        (folder / FILES["unet"]).unlink()
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    refused(folder, file.replace("/vocab.json", ""), said)


# ------------------------------------------------------------------------------------------ configs
OTHER = {
    bool: lambda v: not v,
    int: lambda v: v + 1,
    float: lambda v: 2 * v,
    str: lambda v: "other",
}


@pytest.mark.parametrize("part", [*FILES, "scheduler"])
def test_keys_that_change_the_arithmetic(folder, part):
    reconfigure(folder, part, **weights.ONLY[part])
    assert weights.read_config(folder, part).items() >= weights.ONLY[part].items()
    for key, value in weights.ONLY[part].items():
        if key in weights.OWN_SAMPLER:  # test_files.py
            continue
        reconfigure(folder, part, **{key: OTHER[type(value)](value)})
        refused(folder, f"{key} = ")
        reconfigure(folder, part, **{key: value})


# fmt: off
@pytest.mark.parametrize("part, key, value", [
    ("scheduler", "trained_betas", [0.001] * 1000),  # the sentence has not all of them
    ("scheduler", "beta_end", "0.012"),
    ("unet", "attention_head_dim", [5, 10, 20, 20]),
    ("unet", "use_linear_projection", True),
    ("unet", "class_embed_type", "timestep"),
    ("unet", "only_cross_attention", [False, True, True]),
    ("unet", "num_attention_heads", 4),
    ("unet", "norm_num_groups", True),
    ("unet", "norm_num_groups", None),
    ("unet", "layers_per_block", 1.5),
    ("vae", "shift_factor", 0.1),
    ("vae", "down_block_types", ["AttnDownEncoderBlock2D"] * 3),
    ("vae", "up_block_types", None),
])
def test_a_value_that_is_not_implemented(folder, part, key, value):
    reconfigure(folder, part, **{key: value})
    refused(folder, part, f"{key} = ")


@pytest.mark.parametrize("part, key, value", [
    ("unet", "attention_head_dim", 5),
    ("unet", "attention_head_dim", 0),
    ("unet", "norm_num_groups", 5),
    ("unet", "norm_num_groups", 0),
    ("unet", "block_out_channels", [16, 32]),
    ("unet", "block_out_channels", [16.5] * 4),
    ("unet", "down_block_types", []),
    ("unet", "down_block_types", ["AttnDownBlock2D"] * 4),
    ("unet", "down_block_types", 3),
    ("vae", "norm_num_groups", 7),
    ("text_encoder", "num_attention_heads", 7),
])
def test_sizes_that_make_no_network(folder, part, key, value):
    reconfigure(folder, part, **{key: value})
    with pytest.raises(UserError, match="config.json: these sizes make no network"):
        weights.make_network(folder, part)


# Arguments of diffusers' classes that change no number that we compute.
INERT = {
    "unet": dict(sample_size=9, dropout=0.1, upcast_attention=True, addition_time_embed_dim=None,
                 addition_embed_type_num_heads=64, reverse_transformer_layers_per_block=None,
                 projection_class_embeddings_input_dim=None),
    "vae": dict(sample_size=512, force_upcast=True, latents_std=None),
    "text_encoder": dict(architectures=["CLIPTextModel"], dtype="float16", attention_dropout=0.1,
                         projection_dim=768, bos_token_id=0, eos_token_id=2, pad_token_id=1),
    "scheduler": dict(dynamic_thresholding_ratio=0.995, clip_sample_range=1.0,
                      sample_max_value=1.0),
}
CLASSES = dict(unet=diffusers.UNet2DConditionModel, vae=diffusers.AutoencoderKL,
               scheduler=diffusers.DDIMScheduler)


def test_each_argument_of_diffusers_is_known():
    """It is one of our arguments, has one value, is off, or changes nothing."""
    for part, theirs in CLASSES.items():
        known = {*weights.ARGUMENTS[part], *weights.ONLY[part], *weights.OFF, *INERT[part]}
        assert not set(inspect.signature(theirs).parameters) - known, part


def test_inert_keys_pass(folder):
    """And keys that nobody knows, null for what is off, a list with one value per block."""
    before = networks_of(weights.load(folder))
    for part, keys in INERT.items():
        more = dict(something_new=1, _name_or_path="x", trained_betas=None)
        reconfigure(folder, part, **keys | more)
    reconfigure(folder, "unet", resnet_time_scale_shift=["default"] * 4)
    after = networks_of(weights.load(folder))
    assert all(same(before[network], after[network]) for network in FILES)


SD14_SCHEDULER = dict(  # CompVis/stable-diffusion-v1-4's own file
    _class_name="PNDMScheduler", _diffusers_version="0.7.0.dev0", num_train_timesteps=1000,
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", trained_betas=None,
    clip_sample=False, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1,
)
# fmt: on


def test_short_configs_of_2022(folder):
    """Keys that are not in files of 2022. The networks' defaults are SD 1.4's."""
    reconfigure(folder, "vae", ["scaling_factor", "force_upcast", "mid_block_add_attention"])
    reconfigure(folder, "unet", ["mid_block_type"])
    assert weights.load(folder).vae.scaling_factor == 0.18215
    for unneeded in ([], ["clip_sample", "set_alpha_to_one"]):  # the first files of 2022
        config = {key: x for key, x in SD14_SCHEDULER.items() if key not in unneeded}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        assert weights.read_config(folder, "scheduler") == config


@pytest.mark.parametrize("kind", ["PNDMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("key", ["beta_start", "beta_end", "steps_offset", "num_train_timesteps"])
def test_a_missing_scheduler_number_is_diffusers_default(folder, kind, key):
    no_clipping = dict(clip_sample=False, set_alpha_to_one=False)
    reconfigure(folder, "scheduler", [key], _class_name=kind, **no_clipping)
    config = weights.read_config(folder, "scheduler")
    ours = make_scheduler(config, 10, "ddim")
    config.pop(key, None)
    theirs = diffusers.DDIMScheduler.from_config(config, **no_clipping)
    theirs.set_timesteps(10)
    assert ours.timesteps[:-1] == theirs.timesteps.tolist()
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


def test_a_missing_beta_schedule_is_diffusers_default(folder):
    reconfigure(folder, "scheduler", ["beta_schedule"])
    refused(folder, "beta_schedule = 'linear'")


def test_sample_size(folder):
    for version, size, latents in (
        ("0.2.2", 16, 64),
        ("0.8.9", 32, 64),
        ("0.9.0", 16, 16),
        ("0.2.2", 96, 96),
        ("0.42.1", None, 64),
        ("0.42.1", [96, 96], 64),
        (None, 16, 16),  # diffusers corrects only a config that names an old version
    ):
        changes = dict(_diffusers_version=version, sample_size=size)
        reconfigure(folder, "unet", ["_diffusers_version"] if version is None else [], **changes)
        assert weights.read_latent_size(folder) == latents


# -------------------------------------------------------------------------------------------- names
def write_patch(file, model):
    weights.save(file, {"x": torch.ones(1)}, {"model": model} if model else {})
    return file


def test_a_patch_names_its_model(tmp_path, monkeypatch):
    """Without --model the patch's model is used; no hub is asked. Mistakes: test_bad_input.py."""
    monkeypatch.setattr(weights, "find", None)
    monkeypatch.setattr(weights, "has_gpu", lambda: True)
    toy = write_patch(tmp_path / "toy.safetensors", "toy")
    other = write_patch(tmp_path / "other.safetensors", "some/model")
    silent = write_patch(tmp_path / "silent.safetensors", None)
    for given, patches, expected in (
        (None, [], weights.DEFAULT_MODEL),
        (None, [silent], weights.DEFAULT_MODEL),
        (None, [silent, toy], "toy"),
        (None, [other], "some/model"),
        ("a/copy", [other], "a/copy"),
        (str(weights.TOY), [toy], str(weights.TOY)),
    ):
        assert weights.choose_model(given, patches) == expected


# ------------------------------------------------------------------------------------------ the hub
@pytest.mark.parametrize("reason", [None, "404 Client Error\n\nSee the manual for more", ""])
def test_a_hub_id_without_network(monkeypatch, reason):
    """Errors of the hub have one line, many lines, or no message."""
    import huggingface_hub

    def fail(*args, **kwargs):
        raise RuntimeError(reason)

    if reason is not None:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="Cannot get nobody/no-model from the hub") as e:
        weights.load("nobody/no-model")
    assert "\n" not in str(e.value) and "network" in str(e.value)


# -------------------------------------------------------------------------- patches and checkpoints
@pytest.fixture
def patch(model_folder, tmp_path):
    """(file, tensors): a patch for the tiny model, every cross-attention tensor moved."""
    state = weights.load_network(model_folder, "unet").state_dict()
    base = {name: x for name, x in state.items() if ".attn2." in name}
    tensors = {name: x + 0.1 for name, x in base.items()}
    metadata = {"model": "tiny", "base_fingerprint": weights.fingerprint(base)}
    file = tmp_path / "runs" / "patch.safetensors"
    weights.save(file, tensors, metadata)
    return file, tensors


def test_patch_round_trip(model_folder, patch):
    file, tensors = patch
    net, before = (weights.load_network(model_folder, "unet") for _ in range(2))
    assert weights.load_patch(file, net)["model"] == "tiny"
    expected = before.state_dict() | tensors  # all others are bit-identical
    for name, x in net.state_dict().items():
        assert torch.equal(x, expected[name]), name


def test_a_patch_for_another_base(model_folder, patch):
    file, tensors = patch
    net = weights.load_network(model_folder, "unet")
    net.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k.weight[0, 0] += 0.5
    before = {name: x.clone() for name, x in net.state_dict().items()}
    other_shapes = common.UNETS["2 heads, plain first"] | dict(cross_attention_dim=24)
    for other, said in (
        (net, "made for tiny"),
        (UNet(**common.UNETS["8 heads, cross first"]), "attn2.* does not fit .* made for tiny"),
        (UNet(**other_shapes), "attn2.* does not fit .* made for tiny"),
    ):
        with pytest.raises(UserError, match=said):
            weights.load_patch(file, other)
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())


def test_fingerprint():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    found = weights.fingerprint({"x": a, "y": b})
    assert re.fullmatch("[0-9a-f]{16}", found)
    assert weights.fingerprint({"y": b, "x": a}) == found  # order does not matter
    half = {"x": a.half(), "y": b.half()}
    assert weights.fingerprint(half) == found  # a float16 copy of a model is the same base
    for other in ({"x": a}, {"x": b, "y": a}, {"x": a + 1, "y": b}):
        assert weights.fingerprint(other) != found


def test_an_interrupted_write_leaves_no_half_file(tmp_path):
    """All commands write with atomic_write."""
    file = tmp_path / "new" / "a.safetensors"
    weights.save(file, {"x": torch.ones(2)})
    for fault, seen in ((ZeroDivisionError(), ZeroDivisionError), (OSError("full"), UserError)):
        with pytest.raises(seen), files.atomic_write(file) as temporary:
            temporary.write_text("half")
            raise fault
    assert [p.name for p in file.parent.iterdir()] == ["a.safetensors"]
    assert weights.read(file)[0]["x"].tolist() == [1, 1]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        weights.save(tmp_path / "file" / "b.safetensors", {"x": torch.ones(2)})


def test_a_checkpoint_of_another_run(tmp_path):
    """How a checkpoint continues, bit for bit: test_resume.py."""
    file, net = tmp_path / "checkpoint.safetensors", torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    weights.save_checkpoint(file, {"student": net.state_dict()}, optimizer, {})
    with pytest.raises(UserError, match="another run"):
        weights.load_checkpoint(file, {"teacher": net.state_dict()}, optimizer)
    with pytest.raises(UserError, match="There is no file"):
        weights.load_checkpoint(tmp_path / "none.safetensors", {}, optimizer)


# ---------------------------------------------------------------------- --patch [NAME=]FILE | none
def test_the_grammar_of_patches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "lr=1" / "moon.safetensors").touch()
    texts = ["none", "a=x.safetensors", "a=y.safetensors", "runs/0001-star/erased.safetensors"]
    assert weights.named_patches([*texts, "lr=1/moon.safetensors"]) == {
        "original": [],
        "a": ["x.safetensors", "y.safetensors"],
        "0001-star": ["runs/0001-star/erased.safetensors"],
        "moon": ["lr=1/moon.safetensors"],
    }
    for text in ("=x.safetensors", "a=", "..=x.safetensors"):
        with pytest.raises(UserError, match=r"write \[NAME=\]FILE, or none"):
            weights.named_patches([text])
    for text in ("original=x.safetensors", "patches/original.safetensors"):
        with pytest.raises(UserError, match="the untouched model has this name"):
            weights.named_patches([text])
