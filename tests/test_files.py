"""Files and situations that people met with neighbouring programs: what they write is read here.

A file that cannot work is named in one sentence, before anything is written. The files are written
by diffusers, transformers and safetensors, or have the layout of the hub's cache.
"""

import json
import os
import shutil

import diffusers
import numpy as np
import pytest
import torch
from common import ROOT, command, pictures, run
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import weights
from pipeline import make_scheduler
from support.errors import warn_once
from tools import convert

TOY = weights.TOY
UNET, VAE = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae"))
TEXT = "text_encoder/model.safetensors"
STAR = "generate.py 'a red star' --device cpu --steps 2"
TRAIN = "train.py --concept star --device cpu --iters 2 --warmup 0 --steps 1 --preview-every 0"


@pytest.fixture
def toy(tmp_path):
    """A copy of the toy model to change."""
    warn_once.cache_clear()
    return shutil.copytree(TOY, tmp_path / "toy")


def change(file, changed):
    """Rewrites a safetensors file with changed(its tensors)."""
    save_file({name: x.contiguous() for name, x in changed(load_file(file)).items()}, file)


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


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """What STAR generates with the toy model."""
    out = tmp_path_factory.mktemp("toy") / "o"
    assert run(f"{STAR} --model toy", out) == 0
    return pictures(out)


def generated(line, out):
    assert run(line, out) == 0
    return pictures(out)


# ------------------------------------------------------------------------------------- the hub
@pytest.fixture
def cache(tmp_path):
    """A function: the environment of a machine that downloaded SD 1.4's files, here the toy's."""

    def fill(name=weights.DEFAULT_MODEL, listed=("safety_checker/model.safetensors",)):
        storage, commit = tmp_path / f"models--{name.replace('/', '--')}", "a" * 40
        (storage / "blobs").mkdir(parents=True)
        for file in [file for file in TOY.glob("*/*") if file.suffix != ".csv"]:
            blob = storage / "blobs" / f"{file.parent.name}-{file.name}"
            shutil.copy(file, blob)
            link = storage / "snapshots" / commit / file.relative_to(TOY)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        names = [file.relative_to(TOY).as_posix() for file in TOY.glob("*/*.*")]
        names = [name for name in names if not name.endswith("csv")]
        files = dict.fromkeys([*names, *listed], {"size": 1, "blob_id": "b"})
        for file, text in (
            ("refs/main", commit),
            (f"trees/{commit}.json", json.dumps({"format_version": 1, "files": files})),
        ):
            (storage / file).parent.mkdir()
            (storage / file).write_text(text)

    fill.environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    return fill


def test_a_download_works_offline_and_none_begins_unasked(cache, tmp_path, images):
    """The first command finds nothing on this machine, which has no GPU; the second has a cache."""
    words = STAR
    if not torch.cuda.is_available():
        for line in (words, "eval.py nudity"):
            status, _, error = command(line, tmp_path / "o", env=cache.environment)
            assert status == 2 and "4.3 GB" in error and "--model toy" in error, error
    cache()
    status, _, error = command(words, tmp_path / "o", env=cache.environment)
    assert status == 0, error
    assert np.array_equal(pictures(tmp_path / "o"), images)


def test_a_models_folder_has_one_name(toy, tmp_path, monkeypatch, refused, capsys):
    """It is trained under a relative name, used elsewhere, moved, resumed, and spelled otherwise."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    folder = toy.rename(tmp_path / "models" / "sd14")
    for out in ("a", "b"):
        assert run(f"{TRAIN} --model models/{'../models/' * (out == 'b')}sd14", out) == 0
    monkeypatch.chdir(ROOT)
    a, b = tmp_path / "a", tmp_path / "b"
    assert weights.read(a / "erased.safetensors")[1]["model"] == str(folder)
    assert run(f"{STAR} --patch {a} {b}", tmp_path / "o") == 0  # the folders of runs
    moved = folder.rename(tmp_path / "moved")
    error = refused(f"{STAR} --patch {a}", "p")
    assert "not on this machine" in error and "--model" in error
    assert run(f"train.py --resume --device cpu --model {moved} --out {a}") == 0
    assert json.loads((a / "run.json").read_text())["args"]["model"] == str(moved)
    assert run(f"{STAR} --patch {a} {b}", tmp_path / "p") == 0  # two names of one model
    change(moved / UNET, lambda t: {name: x + 0.1 for name, x in t.items()})
    assert "have changed" in refused(f"train.py --resume --device cpu --model {moved} --out {b}", a)


# ------------------------------------------------------------------------------- not a number
def test_not_a_number_is_no_image(toy, tmp_path, refused, capsys, images):
    change(toy / VAE, lambda t: t | {"decoder.conv_in.weight": 3e4 * t["decoder.conv_in.weight"]})
    full = generated(f"{STAR} --model {toy}", tmp_path / "fp32")
    half = generated(f"{STAR} --model {toy} --dtype fp16", tmp_path / "fp16")
    assert abs(full - half).mean() < 3 and half.std() > 20
    assert capsys.readouterr().err.count("decoded in float32") == 1
    change(toy / UNET, lambda t: t | {"conv_in.weight": 1e30 * t["conv_in.weight"].float()})
    for line in (STAR, "eval.py toy --limit 1 --steps 1 --device cpu"):
        assert run(f"{line} --model {toy}", tmp_path / "o") == 2
        assert "no images" in capsys.readouterr().err and not [*tmp_path.glob("o/**/*.png")]
        shutil.rmtree(tmp_path / "o", ignore_errors=True)


def test_a_truncated_image_is_generated_again(tmp_path):
    line = "eval.py toy --model toy --limit 1 --steps 1 --device cpu"
    assert run(line, tmp_path / "o") == 0
    file = sorted(tmp_path.glob("o/images/*/00000.png"))[0]
    whole = file.read_bytes()
    os.truncate(file, 300)
    assert run(line, tmp_path / "o") == 0
    assert file.read_bytes() == whole


def test_an_attack_does_not_mix_two_models(toy, tmp_path, refused):
    line = f"attack.py --concept star --kind noise --patch none --samples 1 --steps 1 --model {toy}"
    assert run(f"{line} --device cpu", tmp_path / "o") == 0
    change(toy / UNET, lambda t: t | {"conv_in.bias": 1.01 * t["conv_in.bias"]})
    assert "not empty" in refused(f"{line} --device cpu")


# ------------------------------------------------------------------------------- model folders
def test_what_diffusers_and_transformers_write_is_read(toy, tmp_path, images):
    """Shards, other parts of CLIP in the file, lists and byte order marks in configs."""
    config = toy / "unet" / "config.json"
    heads = json.loads(config.read_text())["attention_head_dim"]
    configure(config, attention_head_dim=[heads] * 4, upcast_attention=True)
    diffusers.UNet2DConditionModel.from_pretrained(TOY / "unet").save_pretrained(
        tmp_path / "shards", max_shard_size="5MB"
    )
    (toy / UNET).unlink()
    shards = [shutil.copy(file, toy / "unet") for file in tmp_path.glob("shards/*-of-*")]
    assert len(shards) > 2
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    change(toy / TEXT, lambda t: t | {"text_projection.weight": torch.ones(2, 2)})
    change(toy / VAE, lambda t: t | {"loss.logvar": torch.ones(())})
    configure(toy / "tokenizer" / "tokenizer_config.json", model_max_length=None)
    assert np.array_equal(generated(f"{STAR} --model {toy}", tmp_path / "o"), images)
    names = weights.files_to_download(weights.file_names(toy), "x")
    assert {f"unet/{file.name}" for file in tmp_path.glob("shards/*-of-*")} < {*names}
    os.unlink(shards[0])
    with pytest.raises(weights.UserError, match="lacks 1 of"):
        weights.load(toy)


SAMPLERS = "EulerDiscrete DPMSolverMultistep UniPCMultistep DEISMultistep LCM DDPM DDIM".split()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_of_diffusers_that_we_do_not_have(name, toy, tmp_path, refused, images):
    theirs = getattr(diffusers, f"{name}Scheduler")
    config = theirs.from_config(TOY / "scheduler", clip_sample=True)
    config.save_pretrained(toy / "scheduler")
    (toy / UNET).rename(toy / "moved")  # it is refused before weights are read
    assert "use --scheduler ddim or pndm" in refused(f"{STAR} --model {toy}")
    (toy / "moved").rename(toy / UNET)
    line = f"{STAR} --model {toy} --scheduler pndm"
    assert np.array_equal(generated(line, tmp_path / "o"), images)
    assert run(f"{TRAIN} --model {toy}", tmp_path / "run") == 0
    configure(toy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert "prediction_type" in refused(line, "p")


def test_the_runge_kutta_steps_of_pndm():
    """diffusers' default is to make them; then its images are others."""
    config = dict(_class_name="PNDMScheduler", set_alpha_to_one=False)
    with pytest.raises(weights.UserError, match="skip_prk_steps = False"):
        make_scheduler(config, 10)
    assert make_scheduler(config | {"skip_prk_steps": True}, 10)
    assert make_scheduler(config, 10, "pndm")


@pytest.mark.parametrize(
    "part, sizes, said",
    [
        ("unet", dict(in_channels=9), "an inpainting model (9 input channels)"),
        ("unet", dict(in_channels=8), "an InstructPix2Pix model"),
        ("unet", dict(in_channels=5), "in_channels = 5"),
        ("unet", dict(cross_attention_dim=1024), "Stable Diffusion 2"),
        ("unet", dict(cross_attention_dim=40), "cross_attention_dim = 40"),
        ("vae", dict(latent_channels=8), "latent_channels = 8"),
    ],
)
def test_folders_of_another_architecture(part, sizes, said, toy, refused):
    theirs = dict(unet=diffusers.UNet2DConditionModel, vae=diffusers.AutoencoderKL)[part]
    theirs.from_config({**theirs.load_config(TOY / part), **sizes}).save_pretrained(toy / part)
    for line in (STAR, TRAIN):
        assert said in refused(f"{line} --model {toy}")


# -------------------------------------------------------------------------- words and tokenizers
def test_an_added_word_stays(toy, tmp_path, refused, capsys):
    """As textual inversion leaves it: one more row, and added_tokens.json of transformers 4."""
    rows = "text_model.embeddings.token_embedding.weight"
    change(toy / TEXT, lambda t: t | {rows: torch.cat([t[rows], 2 * t[rows][-40:-39]])})
    n = json.loads((toy / "text_encoder/config.json").read_text())["vocab_size"]
    (toy / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<thing>": n}))
    assert "tokenizer has" in refused(f"{STAR} --model {toy}")  # the config does not know the row
    configure(toy / "text_encoder" / "config.json", vocab_size=n + 1)
    assert run(f"tools.convert --model {toy} --format diffusers", tmp_path / "new") == 0
    line = "generate.py 'a red <thing>' --device cpu --steps 2 --model"
    before = generated(f"{line} {toy}", tmp_path / "a")
    assert np.array_equal(generated(f"{line} {tmp_path / 'new'}", tmp_path / "b"), before)
    capsys.readouterr()
    assert run(f"tools.convert --model {toy} --format single-file", tmp_path / "o.safetensors") == 0
    assert "loses the words <thing>" in capsys.readouterr().err


def test_clips_vocabulary_is_here():
    """49408 words; the ids are those in the documentation of CLIP."""
    tokenizer = CLIPTokenizer.from_pretrained(convert.TOKENIZER)
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_embeddings_of_other_programs(tmp_path, refused):
    for n in (1, 8):
        save_file({"emb_params": torch.randn(n, 64)}, tmp_path / f"thing{n}.safetensors")
    assert (
        run(
            f"generate.py 'a thing1' --model toy --steps 1 --word {tmp_path / 'thing1.safetensors'}",
            tmp_path / "o",
        )
        == 0
    )
    assert "8 vectors" in refused(
        f"{STAR} --model toy --word {tmp_path / 'thing8.safetensors'}", "p"
    )


# ------------------------------------------------------------------------------------- patches
def test_official_weights_of_esd_and_uce(tmp_path, refused, capsys):
    """diffusers' names, bfloat16, no metadata."""
    unet, file = (
        diffusers.UNet2DConditionModel.from_pretrained(TOY / "unet"),
        tmp_path / "esd.safetensors",
    )
    tensors = {name: 1.01 * x for name, x in unet.state_dict().items() if ".attn2." in name}
    save_file({name: x.to(torch.bfloat16) for name, x in tensors.items()}, file)
    assert run(f"{STAR} --model toy --patch {file} none", tmp_path / "o") == 0
    assert capsys.readouterr().err.count("does not say which model") == 1
    assert (
        run(
            f"eval.py toy --limit 1 --steps 1 --device cpu --model toy --patch esd={file}",
            tmp_path / "e",
        )
        == 0
    )
    assert "esd" in (tmp_path / "e" / "table.md").read_text()
    save_file({"unet.lora_A.weight": torch.ones(2, 2)}, file)
    assert "is a LoRA" in refused(f"{STAR} --model toy --patch {file}", "p")


# ---------------------------------------------------------------------------------- single files
@pytest.fixture(scope="module")
def single(tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "toy.safetensors"
    assert run("tools.convert --model toy --format single-file", out) == 0
    return out


def written(single, file, change, **more):
    tensors, metadata = weights.read(single)
    save_file({name: x.contiguous() for name, x in change(tensors).items()}, file, metadata | more)
    return f"tools.convert --model {file} --tokenizer {TOY} --format diffusers"


@pytest.mark.parametrize(
    "names", [("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")]
)
@pytest.mark.parametrize("matrices", [False, True])
def test_spellings_of_the_vaes_attention(names, matrices, single, tmp_path, images):
    def respelled(tensors):
        found = {}
        for name, x in tensors.items():
            for ours, theirs in zip(("q", "k", "v", "proj_out"), names):
                if f".attn_1.{ours}." in name:
                    name, x = (
                        name.replace(f".{ours}.", f".{theirs}."),
                        x.squeeze() if matrices else x,
                    )
            found[name] = x
        return found

    line = written(single, tmp_path / "x.ckpt", respelled)  # whatever its name is
    assert run(line, tmp_path / "new") == 0
    made = generated(f"{STAR} --model {tmp_path / 'new'}", tmp_path / "o")
    assert np.array_equal(made, images)


@pytest.mark.parametrize(
    "change, more, yaml",
    [
        (lambda t: t, {"modelspec.prediction_type": "v"}, ""),
        (lambda t: t | {"v_pred": torch.ones(())}, {}, ""),
        (lambda t: t | {"ztsnr": torch.ones(())}, {}, ""),
        (lambda t: t, {}, 'model:\n  params:\n    parameterization: "v"\n'),
    ],
)
def test_velocity_models(change, more, yaml, single, tmp_path, refused):
    line = written(single, tmp_path / "x.safetensors", change, **more)
    if yaml:
        (tmp_path / "x.yaml").write_text(yaml)
    assert "velocity" in refused(line)


def test_a_file_without_a_vae(single, tmp_path, refused, images):
    without = lambda t: {name: x for name, x in t.items() if not name.startswith("first_stage")}
    line = written(single, tmp_path / "x.safetensors", without)
    assert "has no VAE" in refused(line)
    for number, vae in enumerate((TOY, TOY / "vae")):
        assert run(f"{line} --vae {vae}", tmp_path / f"new{number}") == 0
        made = generated(f"{STAR} --model {tmp_path / f'new{number}'}", tmp_path / f"o{number}")
        assert np.array_equal(made, images)


# ------------------------------------------------------------------------- what is no model at all
@pytest.mark.parametrize(
    "content, said",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"GGUF\3\0\0\0", "is a GGUF file"),
        (b"PK\3\4", "is a pickle"),
    ],
)
def test_a_file_is_what_its_first_bytes_say(content, said, toy, refused):
    for file in (UNET, "unet/config.json"):
        (toy / file).write_bytes(content)
        assert said in refused(f"{STAR} --model {toy}")
    for line in (f"{STAR} --model toy --patch", "tools.convert --format diffusers --model"):
        assert said in refused(f"{line} {toy / UNET}")


def test_torchrun_is_for_eval(monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for line in (TRAIN, STAR):
        assert "without torchrun" in refused(f"{line} --model toy")


def test_large_is_what_has_many_parameters(toy, tmp_path, refused):
    """Not what has another name than ours; a resumed run is checked, too."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    line = f"{TRAIN} --model {toy}".replace("--device cpu", "")
    assert run(line, tmp_path / "run") == 0
    unet = diffusers.UNet2DConditionModel.load_config(TOY / "unet")
    (toy / "unet" / "config.json").write_text(
        json.dumps(unet | {"block_out_channels": [320, 640, 1280, 1280]})
    )
    for words in (line, f"train.py --resume --out {tmp_path / 'run'}"):
        assert "can take days" in refused(words, tmp_path / ("run" if "resume" in words else "o"))
