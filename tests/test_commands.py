"""The commands as a user runs them: as processes where that matters, else by their functions."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from common import SD_WORDS, write_model_folder
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

import ablation
import generate
import train
import weights
from presets import METHODS, TRAIN_PARAMS
from support.cli import run_command
from support.errors import UserError

ROOT = Path(__file__).parent.parent
SHORT = (
    "--iters 6 --warmup 2 --steps 3 --batch-size 2 --save-every 2 --preview-every 3 "
    "--preview-steps 2"
).split()


def command(*words, **options):
    """(exit status, stdout, stderr) of `python WORDS…` in the repository's folder."""
    process = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        **options,
    )
    return process.returncode, process.stdout, process.stderr


def refused(*words, **options):
    """The sentence with which a command ended: exit status 2 and no traceback."""
    status, out, err = command(*words, **options)
    assert status == 2 and "Traceback" not in err, (status, err)
    return err.strip().splitlines()[-1]


def run(module, *words):
    """A command's main function in this process, with its arguments; its exit status."""
    main = {train: train.train, generate: generate.generate}[module]
    try:
        args = module.parse([*map(str, words)])
    except SystemExit as e:  # the parser's own errors
        return e.code
    with torch.enable_grad():
        return run_command(main, args)


def pictures(folder):
    return np.stack(
        [
            np.asarray(Image.open(file)).astype(int)
            for file in sorted(Path(folder).glob("[0-9]*.png"))
        ]
    )


# ------------------------------------------------------------------------------------- generate.py
@pytest.mark.parametrize("kind", ["pndm", "ddim"])
@pytest.mark.parametrize("which", ["toy", "random"])
def test_pictures_equal_diffusers_pipeline(which, kind, model_folder, tmp_path):
    model, folder = ("toy", weights.TOY) if which == "toy" else (model_folder, model_folder)
    prompts = ["a red star on sand", "a blue dotted heart"]
    assert (
        run(
            generate,
            *prompts,
            "--model",
            model,
            "--scheduler",
            kind,
            "--steps",
            12,
            "--num-images",
            2,
            "--seed",
            5,
            "--negative-prompt",
            "a moon",
            "--batch-size",
            3,
            "--device",
            "cpu",
            "--out",
            tmp_path / "ours",
        )
        == 0
    )
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if kind == "ddim":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    assert isinstance(pipeline.scheduler, {"pndm": PNDMScheduler, "ddim": DDIMScheduler}[kind])
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    for prompt, ours in zip(
        prompts, pictures(tmp_path / "ours").reshape(2, 2, *pictures(tmp_path / "ours").shape[1:])
    ):
        theirs = pipeline(
            prompt,
            negative_prompt="a moon",
            num_inference_steps=12,
            guidance_scale=7.5,
            num_images_per_prompt=2,
            generator=[g.manual_seed(g.initial_seed()) for g in generators],
            output_type="pil",
        ).images
        for a, b in zip(ours, theirs):
            assert (
                np.abs(a - np.asarray(b).astype(int)).max() <= 1
            )  # rounding to 8 bits of numbers that differ by 1e-6


def test_embedded_model_draws_in_diffusers_as_it_comes():
    """No further argument; and what is drawn is a red star to the probe."""
    from toy import shapes, suite

    pipeline = StableDiffusionPipeline.from_pretrained(weights.TOY)
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(8)]
    images = pipeline(
        "a green heart on sand",
        num_images_per_prompt=8,
        num_inference_steps=25,
        generator=generator,
    ).images
    seen = suite.see(shapes, np.stack([np.asarray(image) for image in images]))
    assert images[0].size == (64, 64)
    assert (
        seen["shape"].count("heart") >= 6
        and seen["colour"].count("green") >= 6
        and seen["background"].count("sand") >= 6
    )


def test_a_seed_is_a_picture_at_any_batch_size(tmp_path):
    for batch in (1, 3):
        run(
            generate,
            "a star",
            "a moon",
            "--model",
            "toy",
            "--steps",
            5,
            "--num-images",
            2,
            "--batch-size",
            batch,
            "--device",
            "cpu",
            "--out",
            tmp_path / str(batch),
        )
    assert np.abs(pictures(tmp_path / "1") - pictures(tmp_path / "3")).max() <= 1
    run(
        generate,
        "a moon",
        "--model",
        "toy",
        "--steps",
        5,
        "--seed",
        1,
        "--device",
        "cpu",
        "--out",
        tmp_path / "one",
    )
    assert np.abs(pictures(tmp_path / "one")[0] - pictures(tmp_path / "1")[3]).max() <= 1
    assert (
        np.abs(pictures(tmp_path / "1")[2] - pictures(tmp_path / "1")[3]).max() > 20
    )  # another seed, another picture


def test_the_sheet_of_many_images_shows_some(tmp_path, monkeypatch):
    """5,000 images side by side would need more memory than there is."""
    monkeypatch.setattr(generate, "COLUMNS", 2)
    words = ["a star", "a circle", "--model", "toy", "--steps", "1", "--device", "cpu"]
    sheets = []
    for n in (2, 3):
        out = tmp_path / str(n)
        assert run(generate, *words, "--num-images", str(n), "--out", out) == 0
        assert len(list(out.glob("0*.png"))) == 2 * n
        sheets.append(np.asarray(Image.open(out / "grid.png")))
    assert np.array_equal(*sheets)


def test_what_generate_leaves(tmp_path):
    status, out, err = command(
        "generate.py",
        "a red star",
        "a moon",
        "--model",
        "toy",
        "--steps",
        2,
        "--num-images",
        2,
        "--out",
        tmp_path / "o",
    )
    assert status == 0, err
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        *(f"{i:05d}.png" for i in range(4)),
        "grid.png",
        "prompts.jsonl",
    ]
    lines = [
        json.loads(line) for line in (tmp_path / "o" / "prompts.jsonl").read_text().splitlines()
    ]
    assert [(x["file"], x["prompt"], x["seed"]) for x in lines] == [
        ("00000.png", "a red star", 0),
        ("00001.png", "a red star", 1),
        ("00002.png", "a moon", 0),
        ("00003.png", "a moon", 1),
    ]
    text = Image.open(tmp_path / "o" / "00003.png").text
    assert text == {"prompt": "a moon", "seed": "1", "model": "toy", "patch": "none"}
    for network in ("unet", "vae", "text_encoder"):
        assert re.search(rf"{network}: .*safetensors, \d+ tensors, [\d,]+ parameters", out)


def test_long_prompts_are_cut_as_diffusers_cuts_them_and_that_is_said_once(capsys, tmp_path):
    long = "a red star on sand " * 20
    run(
        generate,
        long,
        long + "a moon",
        "--model",
        "toy",
        "--steps",
        2,
        "--device",
        "cpu",
        "--out",
        tmp_path / "o",
    )
    assert capsys.readouterr().err.count("longer than 77 tokens") == 1
    pipeline = StableDiffusionPipeline.from_pretrained(weights.TOY)
    theirs = pipeline(
        long, num_inference_steps=2, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert np.abs(pictures(tmp_path / "o")[0] - np.asarray(theirs).astype(int)).max() <= 1


# ---------------------------------------------------------------------------------------- train.py
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "star"
    status, printed, err = command(
        "train.py", "--model", "toy", "--concept", "star", *SHORT, "--out", out
    )
    assert status == 0, err
    return out


def test_what_training_leaves(trained):
    assert {p.name for p in trained.iterdir()} == {
        "erased.safetensors",
        "checkpoint.safetensors",
        "before_after.png",
        "film.png",
        "film.webp",
        "previews",
        "log.csv",
        "run.json",
        "index.html",
    }
    names = {
        p.relative_to(trained / "previews").as_posix() for p in trained.glob("previews/**/*.png")
    }
    for n in range(5):  # one file per prompt; the original's do not change
        names.remove(f"original-{n}.png")
        for done in ("000000", "000003", "000006"):
            names.remove(f"{done}/student-{n}.png")
            names.remove(f"{done}/teacher-{n}.png")
    assert names == {"000000.png", "000003.png", "000006.png"}
    lines = (trained / "log.csv").read_text().splitlines()
    assert lines[0].split(",") == list(train.LOG_COLUMNS) and len(lines) == 7
    assert (
        lines[1].endswith(",star,,,,,") and float(lines[1].split(",")[2]) == 0.0
    )  # lr starts at 0; gap and drift at previews only
    assert lines[3].endswith(",0.0") and all(float(x) > 0 for x in lines[6].split(",")[6:-1])
    tensors, metadata = weights.read(trained / "erased.safetensors")
    assert (
        metadata["model"] == "toy"
        and metadata["concepts"] == "star"
        and metadata["method"] == "sdd"
    )
    assert json.loads(metadata["args"])["iters"] == 6 and "torch" in json.loads(
        metadata["versions"]
    )
    assert tensors and all(".attn2." in name for name in tensors)
    state = weights.read(trained / "checkpoint.safetensors")[0]
    assert all(torch.equal(x, state[f"teacher/{name}"]) for name, x in tensors.items())
    assert not any(torch.equal(x, state[f"student/{name}"]) for name, x in tensors.items())
    after, teacher = (
        np.asarray(Image.open(trained / name))[-132:, -132:]
        for name in ("before_after.png", "previews/000006.png")
    )
    assert np.array_equal(after, teacher)  # the last prompt, in the lower right corner


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "esd-x", "--latents", "original"],
        ["--method", "esd-u"],
        ["--method", "ablate-noise", "--anchor", "circle", "--train-params", "full"],
        ["--method", "ablate", "--anchor", "circle", "--prior", "1", "--detach-start"],
        ["--method", "all-but-one", "--anchor", "circle"],
        ["--method", "all-but-one", "--quantile", "0.9"],
        ["--loss", f"{ROOT / 'losses.py'}:esd_loss"],
    ],
    ids=" ".join,
)
def test_the_other_trainers(words, tmp_path):
    few = ["--anchor-images", 3] if "ablat" in str(words) else []
    assert (
        run(
            train,
            "--model",
            "toy",
            "--concept",
            "star",
            *SHORT[:8],
            "--preview-every",
            0,
            *few,
            *words,
            "--out",
            tmp_path / "o",
        )
        == 0
    )
    tensors, metadata = weights.read(tmp_path / "o" / "erased.safetensors")
    method, options = metadata["method"], json.loads(metadata["args"])
    unet = weights.load("toy").unet
    assert set(tensors) == {
        name for name, _ in unet.named_parameters() if TRAIN_PARAMS[options["train_params"]](name)
    }
    assert method in words or method == "sdd"
    state = weights.read(tmp_path / "o" / "checkpoint.safetensors")[0]
    assert all(
        torch.equal(x, state[f"{METHODS[method].output}/{name}"]) for name, x in tensors.items()
    )
    before = dict(unet.named_parameters())
    assert any(not torch.equal(x, before[name]) for name, x in tensors.items())
    assert (
        run(
            generate,
            "a star",
            "--model",
            "toy",
            "--patch",
            tmp_path / "o" / "erased.safetensors",
            "--steps",
            2,
            "--out",
            tmp_path / "p",
        )
        == 0
    )


def test_ablating_trains_the_concepts_rows_only(tmp_path):
    """And resumes: the anchor's pictures are made once, and their latents kept."""
    words = [
        "--model",
        "toy",
        "--concept",
        "star",
        "--method",
        "ablate",
        "--anchor",
        "circle",
        "--train-params",
        "embedding",
        *SHORT,
        "--anchor-images",
        3,
    ]
    assert run(train, *words, "--out", tmp_path / "o") == 0
    ((name, after),) = weights.read(tmp_path / "o" / "erased.safetensors")[0].items()
    model = weights.load("toy")
    changed = (after != model.text_encoder.get_parameter(name)).any(1).nonzero().flatten().tolist()
    assert changed == model.tokenizer("star", add_special_tokens=False).input_ids
    kept = weights.read(tmp_path / "o" / "anchors.safetensors")[0]["z_0"]
    assert kept.shape == (3, 4, 16, 16) and not torch.equal(kept[0], kept[1])
    for batch, patch in enumerate((["--patch", tmp_path / "o" / "erased.safetensors"], [])):
        assert (
            run(
                generate,
                "a star",
                "--model",
                "toy",
                *patch,
                "--steps",
                4,
                "--device",
                "cpu",
                "--out",
                tmp_path / str(batch),
            )
            == 0
        )
    assert not np.array_equal(pictures(tmp_path / "0"), pictures(tmp_path / "1"))
    (tmp_path / "o" / "erased.safetensors").rename(tmp_path / "whole.safetensors")
    (tmp_path / "o" / "checkpoint.safetensors").unlink()
    assert run(train, "--resume", "--out", tmp_path / "o") == 0
    assert torch.equal(weights.read(tmp_path / "o" / "erased.safetensors")[0][name], after)


def test_anchor_prompts():
    pairs = ablation.prompt_pairs(["star", "moon"], ["circle"], ["a circle", "the circle"])
    assert [pair[0] for pair in pairs] == [
        0,
        1,
        0,
        1,
    ]  # in turn, so that a few pictures show every concept's anchor
    pairs = ablation.prompt_pairs(["grumpy cat"], ["cat"], ["a cat on a mat", "the cat, sleeping"])
    assert pairs == [
        (0, "a cat on a mat", "a grumpy cat on a mat"),
        (0, "the cat, sleeping", "the grumpy cat, sleeping"),
    ]
    assert ablation.prompt_pairs(["star", "moon"], ["circle"], []) == [
        (0, "circle", "star"),
        (1, "circle", "moon"),
    ]
    assert ablation.prompt_pairs(["Van Gogh"], [], ["a lake", "a hill"]) == [
        (0, "a lake", "a lake, in the style of Van Gogh"),
        (0, "a hill", "in Van Gogh's style, a hill"),
    ]
    with pytest.raises(UserError, match="'dog'.*'a cat'"):
        ablation.prompt_pairs(["wolf"], ["dog"], ["a cat"])
    pairs = ablation.prompt_pairs(["go"], ["c++"], ["c++ and c++11"])  # words that \b does not end
    assert pairs == [ablation.Pair(0, "c++ and c++11", "go and c++11")]


def test_patch_fits_diffusers_and_changes_nothing_else(trained):
    theirs = UNet2DConditionModel.from_pretrained(weights.TOY / "unet")
    before = {name: x.clone() for name, x in theirs.state_dict().items()}
    tensors, _ = weights.read(trained / "erased.safetensors")
    result = theirs.load_state_dict(tensors, strict=False)
    assert not result.unexpected_keys
    ours = weights.load("toy").unet
    weights.load_patch(trained / "erased.safetensors", ours)
    for name, x in ours.state_dict().items():
        assert torch.equal(x, theirs.state_dict()[name])
        assert torch.equal(x, before[name]) == (name not in tensors), name


def test_patched_pictures_equal_diffusers(trained, tmp_path):
    assert (
        run(
            generate,
            "a red star",
            "--model",
            "toy",
            "--patch",
            trained / "erased.safetensors",
            "--steps",
            8,
            "--device",
            "cpu",
            "--out",
            tmp_path / "o",
        )
        == 0
    )
    pipeline = StableDiffusionPipeline.from_pretrained(weights.TOY)
    pipeline.unet.load_state_dict(weights.read(trained / "erased.safetensors")[0], strict=False)
    theirs = pipeline(
        "a red star", num_inference_steps=8, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert np.abs(pictures(tmp_path / "o")[0] - np.asarray(theirs).astype(int)).max() <= 1
    assert Image.open(tmp_path / "o" / "00000.png").text["patch"].endswith("(star)")


@pytest.mark.parametrize(
    "rows", [3, pytest.param(1, marks=pytest.mark.long), pytest.param(5, marks=pytest.mark.long)]
)
def test_killed_and_resumed_is_bit_identical(rows, trained, tmp_path):
    """kill -9 when the log has so many rows: before the first checkpoint, and after two of them."""
    out = tmp_path / "killed"
    words = ["train.py", "--model", "toy", "--concept", "star", *SHORT, "--out", out]
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = out / "log.csv"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > rows):
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "erased.safetensors").exists()
    status, _, err = command("train.py", "--resume", "--out", out)
    assert status == 0, err
    assert (out / "log.csv").read_bytes() == (trained / "log.csv").read_bytes()
    for name in ("erased.safetensors", "checkpoint.safetensors"):
        a, b = weights.read(out / name)[0], weights.read(trained / name)[0]
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert not list(out.rglob(".writing*"))


def test_full_size_on_the_cpu(tmp_path):
    """SD 1.4's sizes and file layout (random weights, 8x8 latents): a patch of 80 tensors."""
    folder = write_model_folder(
        tmp_path / "sd",
        words=SD_WORDS,
        block_out_channels=[320, 640, 1280, 1280],
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=768,
        norm_num_groups=32,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    )
    status, out, err = command(
        "train.py",
        "--concept",
        "nudity",
        "--model",
        folder,
        "--device",
        "cpu",
        "--iters",
        1,
        "--warmup",
        0,
        "--steps",
        2,
        "--preview-every",
        0,
        "--out",
        tmp_path / "run",
    )
    assert status == 0, err
    assert "unet: " in out and "686 tensors, 859,520,964 parameters" in out
    tensors, _ = weights.read(tmp_path / "run" / "erased.safetensors")
    assert len(tensors) == 80 and sum(x.numel() for x in tensors.values()) == 43_962_560
    assert not (tmp_path / "run" / "before_after.png").exists()


# -------------------------------------------------------------------------- mistakes of the user's
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would start")
def test_stable_diffusion_without_a_gpu_is_one_sentence():
    sentence = refused("train.py", "--concept", "nudity")
    assert "--model toy" in sentence and "--device cpu" in sentence and "no GPU" in sentence
    assert "CompVis/stable-diffusion-v1-4" in sentence
    assert "some/other-model" in refused(
        "train.py", *"--concept dog --model some/other-model".split()
    )


STAR = "--model toy --concept star"
BAD_TRAINING_ARGUMENTS = [
    ("--model toy", "--concept"),
    ("--model toy --concept star ' '", "empty"),
    ("--model toy --concept star star", "twice"),
    ("--model toy --concept elephant", "It knows: a, arcadia"),
    (f"--model toy --concept '{'star ' * 80}'", "77 tokens"),
    (f"--model toy --concept '{'a star ' * 14}' '{'a moon ' * 14}' '{'red heart ' * 9}'", "77 tok"),
    (f"{STAR} --ema 1.5", "--ema"),
    (f"{STAR} --seed -1", "--seed"),
    (f"{STAR} --steps 1000", "steps"),
    (f"{STAR} --iters ten", "--iters"),
    (f"{STAR} --method esdx", "esd-x"),
    (f"{STAR} --guidence-scale 3", "did you mean --guidance-scale?"),
    (f"{STAR} --preset fast --method esd-x", "belongs to SDD"),
    # Ablating Concepts and All-but-One
    (f"{STAR} --method ablate", "what to show instead"),
    (f"{STAR} --method ablate --anchor ' '", "--anchor is empty"),
    (f"{STAR} --method ablate --anchor a b", "--anchor takes"),
    (f"{STAR} --method ablate --anchor-prompts none.txt", "none.txt"),
    (f"{STAR} moon --method ablate --anchor circle --anchor-images 1", "--anchor-images 2"),
    (f"{STAR} --method all-but-one --anchor circle moon", "takes one --anchor"),
    # flags without effect
    (f"{STAR} --anchor circle --prior 1", "--prior, --anchor has no effect"),
    (f"{STAR} --compile --device cpu", "--compile needs a CUDA GPU"),
    (f"{STAR} --compile --deterministic", "remove --deterministic"),
    (f"{STAR} --compile --method ablate --anchor circle", "--compile has no effect"),
    (f"{STAR} --train-params embedding", "--train-params embedding has no effect"),
    (
        f"{STAR} --erase-scale 2 --quantile 0.9 --anchor-images 3",
        "--anchor-images, --erase-scale, --quantile has no effect",
    ),
    (f"{STAR} --method ablate --anchor circle --roles official", "--roles has no effect"),
    (f"{STAR} --method ablate --anchor circle --latents teacher", "--latents has no effect"),
    (f"{STAR} --method all-but-one --anchor circle --quantile 0.9", "--anchor has no effect"),
    (f"{STAR} --method all-but-one --erase-scale 2", "--erase-scale has no effect"),
    (f"{STAR} --erase-scale 0", "--erase-scale has no effect"),
    (f"{STAR} --preserve 1 --keep empty.txt", "has no prompts"),
    (f"{STAR} --preserve 1 --keep '{'a zebra ' * 60}'", "does not know the word 'zebra'"),
    (f"{STAR} Star", "given twice"),
    # a loss of your own (its content: test_own_loss.py)
    (f"{STAR} --loss none.py:loss", "no file none.py"),
    (f"{STAR} --loss exit.py:loss", "exit.py cannot be imported (SystemExit"),
    (f"{STAR} --loss losses", "FILE.py:FUNCTION"),
    (f"{STAR} --loss {ROOT / 'losses.py'}", f"--loss {ROOT / 'losses.py'}:sdd_loss"),
    (f"{STAR} --loss {ROOT / 'losses.py'}:nothing", f"--loss {ROOT / 'losses.py'}:sdd_loss"),
    (f"{STAR} --loss {ROOT / 'ema.py'}:update", "end with **_"),
    # devices and models
    (f"{STAR} --device cuda", "--device cuda"),
    (f"{STAR} --device abacus", "abacus"),
    ("--model nowhere --device cpu --concept star", "nowhere"),
    ("--model nobody/nothing --device cpu --concept star", "from the hub"),
    ("--resume", "--out"),
]


@pytest.mark.parametrize("words, said", BAD_TRAINING_ARGUMENTS)
def test_bad_training_arguments(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("exit.py").write_text("import sys; sys.exit(0)")
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run(train, *shlex.split(words)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0]
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("run.json"))


def test_folder_of_another_run_is_refused(trained, capsys):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    assert (
        run(train, "--model", "toy", "--concept", "star", "--out", trained) == 2
        and "not empty" in capsys.readouterr().err
    )
    assert (
        run(generate, "a star", "--model", "toy", "--out", trained) == 2
        and "not empty" in capsys.readouterr().err
    )
    assert run(train, "--model", "toy", "--concept", "moon", "--resume", "--out", trained) == 2
    assert "other arguments" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in trained.rglob("*")}


@pytest.mark.parametrize("text", ["{", "[]", '{"args": {"concept": ["star"]}}'])
def test_damaged_run_is_refused(text, tmp_path, capsys):
    (tmp_path / "run.json").write_text(text)
    assert (
        run(train, "--resume", "--out", tmp_path) == 2
        and "run.json is damaged" in capsys.readouterr().err
    )


def test_fresh_numbered_folder_without_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        assert (
            run(
                train,
                "--model",
                "toy",
                "--concept",
                "star",
                "--iters",
                1,
                "--warmup",
                0,
                "--steps",
                1,
                "--preview-every",
                0,
            )
            == 0
        )
        assert (tmp_path / "runs" / f"{number:04d}-star" / "erased.safetensors").exists()
        assert f"{number:04d}-star" in capsys.readouterr().out


def test_warm_up_as_long_as_the_run_is_warned_about(tmp_path, capsys):
    run(
        train,
        "--model",
        "toy",
        "--concept",
        "star",
        "--iters",
        1,
        "--warmup",
        1,
        "--steps",
        1,
        "--preview-every",
        0,
        "--out",
        tmp_path / "o",
    )
    assert "never reaches" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["a star", "--patch", "none.safetensors"], "none.safetensors"),
        (["a zebra"], "'zebra'"),
        (["a star", "--resolution", "63"], "multiples of 4"),
        (["a star", "--steps", "0"], "less than 1"),
        (["a star", "--revision", "main"], "--revision"),
        (["a star", "--patch", ""], "it is empty"),
        (["a star", "--guidance-scale", "1", "--negative-prompt", "red"], "use another scale"),
        (
            ["a star", "--guidance-scale", "1", "--guidance", "neg", "--avoid", "red"],
            "--avoid has no",
        ),
    ],
)
def test_bad_generation_arguments(words, said, tmp_path):
    assert said in refused("generate.py", *words, "--model", "toy", "--out", tmp_path / "o")
    assert not list(tmp_path.rglob("*.png"))


def test_patch_for_another_base_is_refused(trained, model_folder, tmp_path):
    assert "was made for toy" in refused(
        "generate.py",
        "a star",
        "--model",
        model_folder,
        "--patch",
        trained / "erased.safetensors",
        "--out",
        tmp_path / "o",
    )
