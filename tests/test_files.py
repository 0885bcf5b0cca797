"""Files and situations that people met with neighbouring programs: what these write is read here.

A file that cannot work is named in one sentence, before anything is written. The files are written
by diffusers, transformers and safetensors, or have the layout of the hub's cache.
"""

import json
import os
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from common import ROOT, command, pictures, run
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import weights
from support.errors import UserError, warn_once

TOY = weights.TOY
UNET, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
TEXT = "text_encoder/model.safetensors"
STAR = "generate.py 'a red star' --device cpu --steps 2 --model"
TRAIN = "train.py --concept star --device cpu --iters 2 --warmup 0 --steps 1 --preview-every 0"
EVAL = "eval.py toy --limit 1 --steps 1 --device cpu --model"


@pytest.fixture
def toy(tmp_path):
    """A copy of the toy model to change."""
    warn_once.cache_clear()
    return shutil.copytree(TOY, tmp_path / "toy")


def rewrite(file, change, to=None, **more):
    """Rewrites a safetensors file with change(its tensors)."""
    tensors, metadata = weights.read(file)
    tensors = {name: x.contiguous() for name, x in change(tensors).items()}
    save_file(tensors, to or file, metadata | more)


def configure(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes))


@pytest.fixture
def refused(tmp_path, capsys):
    """A function: the one sentence with which a command ends. It writes nothing."""

    def sentence(line, out="o"):
        before = sorted(tmp_path.rglob("*"))
        assert run(line, tmp_path / out) == 2
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and "Traceback" not in error, error
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return sentence


def generated(line, out):
    assert run(line, out) == 0
    return pictures(out)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return generated(f"{STAR} toy", tmp_path_factory.mktemp("toy") / "o")


def test_a_download_works_offline_and_none_begins_unasked(tmp_path, images):
    """The cache of the hub's client: links to blobs, and a list of more files than are needed."""
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    line = STAR.removesuffix(" --model")
    for words in () if torch.cuda.is_available() else (line, "eval.py nudity"):
        status, _, error = command(words, tmp_path / "o", env=environment)
        assert status == 2 and "4.3 GB" in error and "--model toy" in error, error
    storage, commit = tmp_path / "models--CompVis--stable-diffusion-v1-4", "a" * 40
    others = ["safety_checker/model.safetensors", "unet/model.bin", "model_index.json", "a.ckpt"]
    listed = dict.fromkeys(others, {"size": 1, "blob_id": "b"})
    for file in [*TOY.glob("*/*.json"), *TOY.glob("*/*.safetensors"), *TOY.glob("*/*.txt")]:
        name = file.relative_to(TOY).as_posix()
        blob, link = storage / "blobs" / name, storage / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
        listed[name] = {"size": 1, "blob_id": "b"}
    listing = json.dumps({"format_version": 1, "files": listed})
    for file, text in (("refs/main", commit), (f"trees/{commit}.json", listing)):
        (storage / file).parent.mkdir()
        (storage / file).write_text(text)
    status, _, error = command(line, tmp_path / "o", env=environment)
    assert status == 0, error
    assert np.array_equal(pictures(tmp_path / "o"), images)
    wanted = weights.files_to_download(listed, "x")
    assert {*filter_repo_objects(listed, allow_patterns=wanted)} == {*listed} - {*others}
    (storage / "snapshots" / commit / VAE).unlink()
    status, _, error = command(line, tmp_path / "p", env=environment)
    assert status == 2 and "incomplete" in error and "run the same command again" in error, error


def test_a_models_folder_has_one_name(toy, tmp_path, monkeypatch, refused):
    """Trained under relative names, used in another folder, moved, resumed."""
    folder, a, b = tmp_path / "models" / "sd14", tmp_path / "a", tmp_path / "b"
    folder.parent.mkdir()
    toy.rename(folder)
    monkeypatch.chdir(tmp_path)
    for out, name in ((a, "models/sd14"), (b, "models/../models/sd14/")):
        assert run(f"{TRAIN} --model {name}", out) == 0
        assert weights.read(out / "erased.safetensors")[1]["model"] == str(folder)
    monkeypatch.chdir(ROOT)
    use = STAR.replace("--model", "--patch")
    assert run(f"{use} {a} {b}", tmp_path / "o") == 0  # the folders of runs
    moved = folder.rename(tmp_path / "moved")
    assert "not on this machine: name the model's folder with --model" in refused(f"{use} {a}", "p")
    resume = f"train.py --resume --device cpu --model {moved}"
    assert run(resume, a) == 0
    assert json.loads((a / "run.json").read_text())["args"]["model"] == str(moved)
    assert run(f"{use} {b} {a}", tmp_path / "p") == 0  # two names of one model
    rewrite(moved / UNET, lambda t: {name: x + 0.1 for name, x in t.items()})
    assert "have changed" in refused(resume, b)


def test_large_is_what_has_many_parameters(toy, tmp_path, refused):
    """Not what has another name than ours. A resumed run is checked, too."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    line = f"{TRAIN.replace('--device cpu', '')} --model {toy}"
    assert run(line, tmp_path / "run") == 0
    configure(toy / "unet" / "config.json", block_out_channels=[320, 640, 1280, 1280])
    assert "can take days" in refused(line)
    assert "can take days" in refused("train.py --resume", "run")


def test_not_a_number_is_no_image(toy, tmp_path, capsys):
    rewrite(toy / VAE, lambda t: t | {"decoder.conv_in.weight": 3e4 * t["decoder.conv_in.weight"]})
    full = generated(f"{STAR} {toy}", tmp_path / "fp32")
    half = generated(f"{STAR} {toy} --dtype fp16", tmp_path / "fp16")
    assert abs(full - half).mean() < 3 and half.std() > 20
    assert capsys.readouterr().err.count("decoded in float32") == 1
    rewrite(toy / UNET, lambda t: t | {"conv_in.weight": 1e30 * t["conv_in.weight"].float()})
    for line in (STAR, EVAL):
        assert run(f"{line} {toy}", tmp_path / "o") == 2
        assert "no images" in capsys.readouterr().err and not [*tmp_path.glob("o/**/*.png")]
        shutil.rmtree(tmp_path / "o", ignore_errors=True)


def test_permissions_are_a_courtesy(tmp_path, monkeypatch):
    def refuse(*_, **__):  # as some mounts do
        raise PermissionError

    monkeypatch.setattr(os, "chmod", refuse)
    weights.save(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    assert weights.read(tmp_path / "a.safetensors")


def test_a_truncated_image_is_generated_again(tmp_path):
    assert run(f"{EVAL} toy", tmp_path / "o") == 0
    file = min(tmp_path.glob("o/images/*/00000.png"))
    whole = file.read_bytes()
    os.truncate(file, 300)
    assert run(f"{EVAL} toy", tmp_path / "o") == 0
    assert file.read_bytes() == whole


def test_an_attack_does_not_mix_two_models(toy, tmp_path, refused, monkeypatch):
    line = f"attack.py --concept star --kind noise --patch none --samples 1 --steps 1 --model {toy}"
    assert run(f"{line} --device cpu", tmp_path / "o") == 0
    rewrite(toy / UNET, lambda t: t | {"conv_in.bias": 1.01 * t["conv_in.bias"]})
    assert "not empty" in refused(f"{line} --device cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in refused(line)


def test_what_diffusers_and_transformers_write_is_read(toy, tmp_path, images):
    """Shards, other parts of CLIP and of a VAE, a list in a config, a byte order mark."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(TOY / "unet")
    unet.save_pretrained(tmp_path / "new", max_shard_size="5MB")
    (toy / UNET).unlink()
    shards = [Path(shutil.copy(file, toy / "unet")) for file in tmp_path.glob("new/*-of-*")]
    assert len(shards) > 2
    config = toy / "unet" / "config.json"
    configure(config, attention_head_dim=[unet.config.attention_head_dim] * 4)
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    rewrite(toy / TEXT, lambda t: t | {"text_projection.weight": torch.ones(2, 2)})
    rewrite(toy / VAE, lambda t: t | {"loss.logvar": torch.ones(())})
    assert np.array_equal(generated(f"{STAR} {toy}", tmp_path / "o"), images)
    names = weights.files_to_download(weights.file_names(toy), "x")
    assert {f"unet/{file.name}" for file in shards} < {*names}
    shards[0].unlink()
    with pytest.raises(UserError, match="lacks 1 of"):
        weights.load(toy)


SAMPLERS = (
    "EulerAncestralDiscrete DPMSolverMultistep UniPCMultistep DEISMultistep LCM DDPM DDIM".split()
)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_that_we_do_not_have(name, toy, tmp_path, refused, images):
    theirs = getattr(diffusers, f"{name}Scheduler").from_config(TOY / "scheduler", clip_sample=True)
    theirs.save_pretrained(toy / "scheduler")
    hidden = (toy / UNET).rename(toy / "hidden")  # it is refused before weights are read
    assert "use --scheduler ddim or pndm" in refused(f"{STAR} {toy}")
    hidden.rename(toy / UNET)
    chosen = f"{STAR} {toy} --scheduler pndm"
    assert np.array_equal(generated(chosen, tmp_path / "o"), images)
    assert run(f"{TRAIN} --model {toy}", tmp_path / "run") == 0
    configure(toy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert "prediction_type" in refused(chosen, "p")


ARCHITECTURES = [
    ("unet", dict(in_channels=9), "an inpainting model (9 input channels)"),
    ("unet", dict(in_channels=8), "an InstructPix2Pix model"),
    ("unet", dict(in_channels=5), "in_channels = 5"),
    ("unet", dict(cross_attention_dim=1024), "Stable Diffusion 2"),
    ("unet", dict(cross_attention_dim=40), "cross_attention_dim = 40"),
    ("vae", dict(latent_channels=8), "latent_channels = 8"),
]


@pytest.mark.parametrize("part, sizes, said", ARCHITECTURES)
def test_folders_of_another_architecture(part, sizes, said, toy, refused):
    theirs = dict(unet=diffusers.UNet2DConditionModel, vae=diffusers.AutoencoderKL)[part]
    theirs.from_config({**theirs.load_config(TOY / part), **sizes}).save_pretrained(toy / part)
    for line in (STAR, f"{TRAIN} --model"):
        assert said in refused(f"{line} {toy}")


def test_an_added_word_stays(toy, tmp_path, refused, capsys):
    """As textual inversion leaves it: one more row, and added_tokens.json of transformers 4."""
    rows = "text_model.embeddings.token_embedding.weight"
    rewrite(toy / TEXT, lambda t: t | {rows: torch.cat([t[rows], 2 * t[rows][-40:-39]])})
    config = toy / "text_encoder" / "config.json"
    n = json.loads(config.read_text())["vocab_size"]
    (toy / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<thing>": n}))
    assert "tokenizer has" in refused(f"{STAR} {toy}")  # the config does not know the row
    configure(config, vocab_size=n + 1)
    assert run(f"tools.convert --format diffusers --model {toy}", tmp_path / "new") == 0
    line = STAR.replace("star", "<thing>")
    before = generated(f"{line} {toy}", tmp_path / "a")
    assert np.array_equal(generated(f"{line} {tmp_path / 'new'}", tmp_path / "b"), before)
    assert run(f"tools.convert --format single-file --model {toy}", tmp_path / "o.safetensors") == 0
    assert "loses the words <thing>" in capsys.readouterr().err


def test_official_weights_of_esd_and_uce(tmp_path, refused, capsys):
    """diffusers' names, bfloat16, no metadata."""
    unet, file = load_file(TOY / UNET), tmp_path / "esd.safetensors"
    tensors = {name: 1.01 * x for name, x in unet.items() if ".attn2." in name}
    save_file({name: x.to(torch.bfloat16) for name, x in tensors.items()}, file)
    assert run(f"{STAR} toy --patch {file} none", tmp_path / "o") == 0
    assert capsys.readouterr().err.count("does not say which model") == 1
    assert run(f"{EVAL} toy --patch {file}", tmp_path / "e") == 0
    assert "| esd " in (tmp_path / "e" / "table.md").read_text()
    save_file({"unet.lora_A.weight": torch.ones(2, 2)}, file)
    assert "is a LoRA" in refused(f"{STAR} toy --patch {file}", "p")


def test_single_files(tmp_path, refused, images):
    """Velocity models are refused. A file without a VAE needs --vae."""
    single, changed = tmp_path / "toy.safetensors", tmp_path / "x.ckpt"  # the content counts
    assert run("tools.convert --model toy --format single-file", single) == 0
    line = f"tools.convert --model {changed} --tokenizer {TOY} --format diffusers"
    marks = dict.fromkeys(("v_pred", "ztsnr"), {}) | {"betas": {"modelspec.prediction_type": "v"}}
    for key, metadata in marks.items():
        more = {key: torch.ones(())}
        rewrite(single, lambda t, more=more: t | more, changed, **metadata)
        assert "velocity" in refused(line)
    vae = "first_stage_model."
    rewrite(single, lambda t: {k: x for k, x in t.items() if not k.startswith(vae)}, changed)
    assert "has no VAE" in refused(line) and "--vae" in refused(f"{line} --vae {tmp_path}")
    for n, vae in enumerate((TOY, TOY / "vae")):
        assert run(f"{line} --vae {vae}", tmp_path / f"new{n}") == 0
        made = generated(f"{STAR} {tmp_path / f'new{n}'}", tmp_path / f"o{n}")
        assert np.array_equal(made, images)
    (tmp_path / "x.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert "velocity" in refused(f"{line} --vae {TOY}")


def test_a_file_is_what_its_first_bytes_say(toy, refused):
    for content, said in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"GGUF\3\0\0\0", "is a GGUF file"),
        (b"PK\3\4", "is a pickle"),
    ):
        for file in (UNET, "unet/config.json"):
            (toy / file).write_bytes(content)
            assert said in refused(f"{STAR} toy --patch {toy / file}")
        assert said in refused(f"{STAR} {toy}")
        assert said in refused(f"tools.convert --format diffusers --model {toy / UNET}")
