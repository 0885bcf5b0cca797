"""weights.py reads every layout in which SD 1.x was published, and names what is wrong."""

import json
import re
import shutil

import common
import pytest
import torch
from safetensors.torch import load_file, save_file

import weights
from clip_text import CLIPText
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


def reconfigure(folder, part, **changes):
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


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
        tensors = load_file(model_folder / FILES[network])
        theirs = {
            k if network != "text_encoder" else f"text_model.{k.removeprefix('text_model.')}": v
            for k, v in tensors.items()
        }
        assert module.state_dict().keys() == theirs.keys() and all(
            torch.equal(v, theirs[k]) for k, v in module.state_dict().items()
        )
        assert not module.training and not any(p.requires_grad for p in module.parameters())
        assert (
            f"{len(tensors)} tensors, {sum(v.numel() for v in tensors.values()):,} parameters"
            in printed
        )
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


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("position_ids", [False, True])
def test_clips_names_old_and_new(folder, prefix, position_ids):
    new, start = weights.load_network(folder, "text_encoder"), "text_model." if prefix else ""

    def rename(tensors):
        tensors = {start + name.removeprefix("text_model."): x for name, x in tensors.items()}
        return tensors | (
            {start + "embeddings.position_ids": torch.arange(77)[None]} if position_ids else {}
        )

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
MISSING = {
    "unet": "conv_in.weight",
    "vae": "encoder.conv_in.weight",
    "text_encoder": "final_layer_norm.weight",
}


@pytest.mark.parametrize("network", FILES)
def test_a_missing_tensor(folder, network):
    name = MISSING[network]
    rewrite(folder / FILES[network], lambda t: {k: v for k, v in t.items() if not k.endswith(name)})
    refused(folder, FILES[network], f"{name} is missing")


@pytest.mark.parametrize("network", FILES)
def test_an_extra_tensor(folder, network):
    rewrite(folder / FILES[network], lambda t: t.update({"text_model.more.weight": torch.zeros(3)}))
    refused(folder, FILES[network], "text_model.more.weight is unknown")


@pytest.mark.parametrize("network", FILES)
def test_a_tensor_of_another_shape(folder, network):
    name = next(k for k in load_file(folder / FILES[network]) if k.endswith(MISSING[network]))
    rewrite(folder / FILES[network], lambda t: t.update({name: torch.cat([t[name], t[name]])}))
    refused(folder, FILES[network], MISSING[network], "should be")


def test_a_tensor_of_integers(folder):
    rewrite(folder / FILES["unet"], lambda t: t.update({"conv_in.bias": t["conv_in.bias"].int()}))
    refused(folder, "conv_in.bias", "int32")


@pytest.mark.parametrize("network", FILES)
def test_a_truncated_file_names_the_first_tensor_it_lacks(folder, network):
    file = folder / FILES[network]
    header = int.from_bytes(file.read_bytes()[:8], "little")
    table = json.loads(file.read_bytes()[8 : 8 + header])
    half = (file.stat().st_size - 8 - header) // 2
    cut = next(
        k
        for k, v in sorted(table.items(), key=lambda x: x[1].get("data_offsets", [0]))
        if k != "__metadata__" and v["data_offsets"][1] > half
    )
    file.write_bytes(file.read_bytes()[: 8 + header + half])
    refused(folder, FILES[network], f"{cut} is cut off")


@pytest.mark.parametrize("content", [b"", b"abc", b"\0" * 100, b"<html>" + b"x" * 200])
def test_a_file_that_is_no_safetensors(folder, content):
    (folder / FILES["vae"]).write_bytes(content)
    refused(folder, FILES["vae"], "not a whole safetensors file")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt"])
def test_a_pickle_is_never_opened(folder, name):
    (folder / FILES["unet"]).unlink()
    (folder / "unet" / name).write_bytes(b"cos\nsystem\n")
    refused(folder, f"unet/{name}", "pickle")


def test_missing_files(folder):
    (folder / FILES["text_encoder"]).unlink()
    refused(folder, FILES["text_encoder"])
    (folder / "unet" / "config.json").unlink()
    refused(folder, "unet/config.json is missing")


@pytest.mark.parametrize(
    "part, file",
    [
        ("unet", "config.json"),
        ("vae", "config.json"),
        ("text_encoder", "config.json"),
        ("scheduler", "scheduler_config.json"),
    ],
)
@pytest.mark.parametrize("text", ['{"a": ', "", "[1, 2]", "3", '"ab"', "\udcff"])
def test_broken_json(folder, part, file, text):
    (folder / part / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, f"{part}/{file}", "JSON")


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer" / "vocab.json").write_text("{")
    refused(folder, "tokenizer")


# ------------------------------------------------------------------------------------------ configs
OTHER = {
    bool: lambda v: not v,
    int: lambda v: v + 1,
    float: lambda v: 2 * v,
    str: lambda v: "other",
}


@pytest.mark.parametrize(
    "part, key", [(part, key) for part in weights.ONLY for key in weights.ONLY[part]]
)
def test_a_key_that_changes_the_arithmetic(folder, part, key):
    value = weights.ONLY[part][key]
    reconfigure(folder, part, **{key: value})
    weights.load(folder)
    reconfigure(folder, part, **{key: OTHER[type(value)](value)})
    refused(folder, f"{key} = ")


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("scheduler", "clip_sample", True),
        ("scheduler", "set_alpha_to_one", True),
        ("scheduler", "thresholding", True),
        ("scheduler", "rescale_betas_zero_snr", True),
        ("scheduler", "trained_betas", [0.1]),
        ("scheduler", "beta_end", "0.012"),
        ("scheduler", "prediction_type", "v_prediction"),
        ("unet", "attention_head_dim", [5, 10, 20, 20]),
        ("unet", "use_linear_projection", True),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "dropout", 0.1),
        ("unet", "dual_cross_attention", True),
        ("unet", "only_cross_attention", [True] * 3),
        ("unet", "num_attention_heads", 4),
        ("unet", "upcast_attention", True),
        ("unet", "cross_attention_dim", [40] * 3),
        ("unet", "layers_per_block", [1, 1, 1]),
        ("unet", "down_block_types", ["AttnDownBlock2D"] * 3),
        ("unet", "something_new", 1),
        ("vae", "shift_factor", 0.1),
        ("vae", "latents_mean", [0.0]),
        ("vae", "down_block_types", ["AttnDownEncoderBlock2D"] * 3),
        ("vae", "something_new", "x"),
        ("text_encoder", "attention_dropout", 0.1),
        ("text_encoder", "something_new", True),
        ("unet", "norm_num_groups", True),
        ("unet", "norm_num_groups", None),
        ("unet", "sample_size", "8"),
        ("unet", "down_block_types", 3),
        ("vae", "up_block_types", None),
    ],
)
def test_a_value_that_is_not_implemented(folder, part, key, value):
    reconfigure(folder, part, **{key: value})
    refused(folder, part, key)


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("unet", "attention_head_dim", 5),
        ("unet", "attention_head_dim", 0),
        ("unet", "norm_num_groups", 5),
        ("unet", "norm_num_groups", 0),
        ("unet", "layers_per_block", 1.5),
        ("unet", "block_out_channels", [16, 32]),
        ("unet", "down_block_types", []),
        ("vae", "norm_num_groups", 7),
        ("text_encoder", "num_attention_heads", 7),
    ],
)
def test_sizes_that_make_no_network(folder, part, key, value):
    reconfigure(folder, part, **{key: value})
    refused(folder, f"{part}/", "config.json")


@pytest.mark.parametrize(
    "part, keys",
    [
        (
            "unet",
            dict(
                _name_or_path="x",
                dropout=0.0,
                sample_size=9,
                num_attention_heads=None,
                upcast_attention=False,
                addition_embed_type_num_heads=64,
                something_new=None,
            ),
        ),
        ("vae", dict(sample_size=512, force_upcast=True, latents_std=None, shift_factor=None)),
        (
            "text_encoder",
            dict(
                architectures=["CLIPTextModel"],
                dropout=0.0,
                initializer_range=0.02,
                torch_dtype="float16",
                dtype="float32",
                projection_dim=768,
                bos_token_id=0,
                eos_token_id=2,
                pad_token_id=1,
            ),
        ),
        (
            "scheduler",
            dict(
                trained_betas=None, thresholding=False, clip_sample_range=1.0, sample_max_value=1.0
            ),
        ),
    ],
)
def test_inert_keys_pass(folder, part, keys):
    before = networks_of(weights.load(folder))
    reconfigure(folder, part, **keys)
    after = networks_of(weights.load(folder))
    assert all(same(before[network], after[network]) for network in FILES)


def test_short_configs_of_2022(folder):
    """Keys that are not in files of 2022. The networks' defaults are SD 1.4's."""
    for part, keys in (
        ("vae", ["scaling_factor", "force_upcast", "mid_block_add_attention"]),
        ("scheduler", ["clip_sample", "timestep_spacing", "prediction_type"]),
        ("unet", ["mid_block_type"]),
    ):
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        file.write_text(
            json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in keys})
        )
    assert weights.load(folder).vae.scaling_factor == 0.18215


def without(folder, *keys):
    """Removes keys from the scheduler's config; returns what `read_config` makes of it."""
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    for key in keys:
        config.pop(key, None)
    file.write_text(json.dumps(config))
    return weights.read_config(folder, "scheduler")


SD14_SCHEDULER = {  # CompVis/stable-diffusion-v1-4's own file
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def test_sd14s_own_scheduler_config(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    for unneeded in ([], ["clip_sample", "set_alpha_to_one"]):  # the first files of 2022
        config = {key: x for key, x in SD14_SCHEDULER.items() if key not in unneeded}
        file.write_text(json.dumps(config))
        assert weights.read_config(folder, "scheduler") == config


@pytest.mark.parametrize("kind", ["PNDMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("key", ["beta_start", "beta_end", "steps_offset", "num_train_timesteps"])
def test_a_missing_scheduler_number_is_diffusers_default(folder, kind, key):
    import diffusers

    reconfigure(folder, "scheduler", _class_name=kind, clip_sample=False, set_alpha_to_one=False)
    config = without(folder, key)
    default = getattr(diffusers, kind)().config[key]
    assert config[key] == default
    ours = make_scheduler(config, 10, "ddim")
    theirs = diffusers.DDIMScheduler.from_config(
        {k: v for k, v in config.items() if k != key}, clip_sample=False, set_alpha_to_one=False
    )
    theirs.set_timesteps(10)
    assert ours.timesteps[:-1] == theirs.timesteps.tolist()
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize(
    "kind, key, default",
    [
        ("PNDMScheduler", "beta_schedule", "'linear'"),
        ("DDIMScheduler", "beta_schedule", "'linear'"),
        ("PNDMScheduler", "skip_prk_steps", "False"),
        ("DDIMScheduler", "clip_sample", "True"),
        ("DDIMScheduler", "set_alpha_to_one", "True"),
    ],
)
def test_a_missing_scheduler_key_with_another_default_is_refused(folder, kind, key, default):
    reconfigure(folder, "scheduler", _class_name=kind, clip_sample=False, set_alpha_to_one=False)
    with pytest.raises(UserError, match=f"{key} = {default} .diffusers' default"):
        without(folder, key)


def test_a_long_value_is_shortened_in_the_message(folder):
    reconfigure(folder, "scheduler", trained_betas=[0.001] * 1000)
    with pytest.raises(UserError, match=r"trained_betas = \[0.001, .*… is not what") as e:
        weights.load(folder)
    assert len(str(e.value)) < len(str(folder)) + 250


def test_pndm_with_runge_kutta_steps(folder):
    reconfigure(folder, "scheduler", skip_prk_steps=False)
    refused(folder, "skip_prk_steps")


@pytest.mark.parametrize(
    "version, size, resolution",
    [
        ("0.2.2", 16, 64),
        ("0.8.9", 32, 64),
        ("0.9.0", 16, 16),
        ("0.42.1", 8, 8),
        ("0.2.2", 96, 96),
        ("0.42.1", None, 64),
        (None, 16, 16),  # diffusers corrects only a config that names an old version
    ],
)
def test_sample_size(folder, version, size, resolution):
    reconfigure(folder, "unet", _diffusers_version=version, sample_size=size)
    if version is None:
        file = folder / "unet" / "config.json"
        config = json.loads(file.read_text())
        del config["_diffusers_version"]
        file.write_text(json.dumps(config))
    assert weights.load(folder).resolution == resolution * 4


# -------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize(
    "name",
    ["./nowhere", "nowhere", "/no/such/folder", "a/b/c", "../up", "C:\\models", "hub/ex ample"],
)
def test_names_that_are_neither_folder_nor_hub_id(name):
    with pytest.raises(UserError, match="no folder") as e:
        weights.load(name)
    assert "\n" not in str(e.value) and name in str(e.value)


@pytest.mark.parametrize("reason", [None, "404 Client Error\n\nSee the manual for more", ""])
def test_a_hub_id_without_network(monkeypatch, reason):
    """conftest.py sets HF_HUB_OFFLINE. Other errors of the hub have many lines, or no message."""
    import huggingface_hub

    if reason is not None:

        def fail(*args, **kwargs):
            raise RuntimeError(reason)

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    with pytest.raises(UserError, match="Cannot get nobody/no-model from the hub") as e:
        weights.load("nobody/no-model")
    assert "\n" not in str(e.value) and "network" in str(e.value)


def test_a_revision_is_for_the_hub(model_folder):
    with pytest.raises(UserError, match="--revision"):
        weights.load(str(model_folder), revision="main")


def test_a_similar_name_is_suggested():
    with pytest.raises(UserError, match="no folder toi.*Did you mean toy"):
        weights.check_name("toi")


def write_patch(file, model):
    weights.save(file, {"x": torch.ones(1)}, {"model": model} if model else {})
    return file


def test_a_patch_names_its_model(tmp_path, monkeypatch):
    """Without --model the patch's model is used. No hub is asked before that is settled."""
    monkeypatch.setattr(weights, "find", None)
    toy = write_patch(tmp_path / "toy.safetensors", "toy")
    other = write_patch(tmp_path / "other.safetensors", "some/model")
    silent = write_patch(tmp_path / "silent.safetensors", None)
    gone = write_patch(tmp_path / "gone.safetensors", "/no/such/folder")
    assert weights.model_of_patch(toy) == "toy" and weights.model_of_patch(silent) is None
    assert weights.choose_model(None, []) == weights.DEFAULT_MODEL
    assert weights.choose_model(None, [silent]) == weights.DEFAULT_MODEL
    assert weights.choose_model(None, [silent, toy]) == "toy"
    assert weights.choose_model(None, [other]) == "some/model"
    assert weights.choose_model("a/copy", [other]) == "a/copy"
    assert weights.choose_model(str(weights.TOY), [toy]) == str(weights.TOY)
    with pytest.raises(UserError, match="other.safetensors for some/model: use patches of one"):
        weights.choose_model(None, [toy, other])
    with pytest.raises(UserError, match="was made for the model toy: use --model toy"):
        weights.choose_model("some/model", [toy])
    with pytest.raises(UserError, match="/no/such/folder, which is not on this machine"):
        weights.choose_model(None, [gone])


# -------------------------------------------------------------------------- patches and checkpoints
def cross_attention(net):
    return {name: x for name, x in net.state_dict().items() if ".attn2." in name}


@pytest.fixture
def patch(model_folder, tmp_path):
    """(file, tensors): a patch for the tiny model, every cross-attention tensor moved."""
    base = cross_attention(weights.load_network(model_folder, "unet"))
    tensors = {name: x + 0.1 for name, x in base.items()}
    weights.save(
        tmp_path / "runs" / "patch.safetensors",
        tensors,
        {"model": "tiny", "base_fingerprint": weights.fingerprint(base)},
    )
    return tmp_path / "runs" / "patch.safetensors", tensors


def test_patch_round_trip(model_folder, patch):
    file, tensors = patch
    net, before = (
        weights.load_network(model_folder, "unet"),
        weights.load_network(model_folder, "unet").state_dict(),
    )
    assert weights.load_patch(file, net)["model"] == "tiny"
    for name, x in net.state_dict().items():  # everything but the patch's tensors is bit-identical
        assert torch.equal(x, tensors.get(name, before[name])), name


def test_a_patch_for_another_base(model_folder, patch):
    net = weights.load_network(model_folder, "unet")
    net.down_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k.weight[0, 0] += 0.5
    before = {name: x.clone() for name, x in net.state_dict().items()}
    with pytest.raises(UserError, match="made for tiny"):
        weights.load_patch(patch[0], net)
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    with pytest.raises(
        UserError, match="attn2.* does not fit .* made for tiny"
    ):  # other names and shapes
        weights.load_patch(patch[0], UNet(**common.UNETS["8 heads, cross first"]))
    with pytest.raises(
        UserError, match="attn2.* does not fit .* made for tiny"
    ):  # the same names, other shapes
        weights.load_patch(
            patch[0], UNet(**common.UNETS["2 heads, plain first"] | dict(cross_attention_dim=24))
        )


def test_a_patch_without_a_fingerprint(model_folder, patch):
    weights.save(patch[0], patch[1], {"model": "tiny"})
    with pytest.raises(UserError, match="base"):
        weights.load_patch(patch[0], weights.load_network(model_folder, "unet"))


def test_fingerprint():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    assert weights.fingerprint({"x": a, "y": b}) == weights.fingerprint(
        {"y": b, "x": a.clone()}
    )  # order does not matter
    assert (
        len({weights.fingerprint(t) for t in ({"x": a}, {"y": a}, {"x": a + 1}, {"x": a, "y": b})})
        == 4
    )
    assert weights.fingerprint({"x": a}) == weights.fingerprint(
        {"x": a.half()}
    )  # a float16 copy of a model is the same base
    assert re.fullmatch("[0-9a-f]{16}", weights.fingerprint({"x": a}))


def test_an_interrupted_write_leaves_no_half_file(tmp_path):
    file = tmp_path / "new" / "a.safetensors"
    weights.save(file, {"x": torch.ones(2)})
    with pytest.raises(ZeroDivisionError), files.atomic_write(file) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(UserError, match="Cannot write"), files.atomic_write(file) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert [p.name for p in file.parent.iterdir()] == ["a.safetensors"] and weights.read(file)[0][
        "x"
    ].tolist() == [1, 1]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        weights.save(tmp_path / "file" / "b.safetensors", {"x": torch.ones(2)})


def train(net, optimizer, steps):
    tokens = torch.arange(12).view(2, 6)
    for _ in range(steps):
        with torch.enable_grad():
            net(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def tiny_run():
    net = common.randomise(CLIPText(**common.TEXT))
    return net, torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.8, 0.95))


def test_a_run_continues_bit_for_bit(tmp_path):
    file, (straight, optimizer) = tmp_path / "checkpoint.safetensors", tiny_run()
    train(straight, optimizer, 3)
    weights.save_checkpoint(file, {"student": straight.state_dict()}, optimizer, {"step": "3"})
    train(straight, optimizer, 3)
    again, optimizer_2 = tiny_run()
    assert (
        weights.load_checkpoint(file, {"student": again.state_dict()}, optimizer_2).items()
        >= {"step": "3"}.items()
    )
    assert not same(again, straight)
    train(again, optimizer_2, 3)
    assert same(again, straight)
    for a, b in zip(straight.parameters(), again.parameters(), strict=True):
        a, b = optimizer.state[a], optimizer_2.state[b]
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_checkpoint_of_another_run(tmp_path):
    file, (net, optimizer) = tmp_path / "checkpoint.safetensors", tiny_run()
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
