"""train.py and generate.py as a user runs them: what they write, and what it is worth."""

import json
import re

import numpy as np
import pytest
import torch
from common import ROOT, SD_WORDS, SHORT, UNETS, command, pictures, run, write_model_folder
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

import ablation
import generate
import train
import weights
from presets import METHODS, TRAIN_PARAMS
from support.errors import UserError

DRAW = "generate.py --model toy --device cpu"
STAR = f"{SHORT} --concept star"
QUIET = f"{STAR} --preview-every 0 --iters 2 --warmup 0 --steps 1"
ABLATE = "--anchor circle --anchor-images 3"


# ------------------------------------------------------------------------------------- generate.py
def test_a_seed_is_an_image_at_any_batch_size(tmp_path):
    line = f"{DRAW} 'a star' 'a moon' --steps 3 --num-images 2"
    for batch_size in (1, 3):
        assert run(f"{line} --batch-size {batch_size}", tmp_path / str(batch_size)) == 0
    assert run(f"{DRAW} 'a moon' --steps 3 --seed 1", tmp_path / "one") == 0
    one, three, alone = (pictures(tmp_path / name) for name in ("1", "3", "one"))
    assert np.abs(one - three).max() <= 1
    assert np.abs(alone[0] - one[3]).max() <= 1
    assert np.abs(one[2] - one[3]).max() > 20  # another seed, another image


def test_the_sheet_of_many_images_shows_some(tmp_path, monkeypatch):
    """5,000 images side by side would need more memory than there is."""
    monkeypatch.setattr(generate, "COLUMNS", 2)
    sheets = []
    for n in (2, 3):
        out = tmp_path / str(n)
        assert run(f"{DRAW} 'a star' 'a circle' --steps 1 --num-images {n}", out) == 0
        assert len(list(out.glob("0*.png"))) == 2 * n
        sheets.append(np.asarray(Image.open(out / "grid.png")))
    assert np.array_equal(*sheets)


def test_what_generate_leaves(tmp_path):
    line = "generate.py 'a red star' 'a moon' --model toy --steps 2 --num-images 2"
    status, printed, error = command(line, tmp_path)
    assert status == 0, error
    images = [f"{i:05d}.png" for i in range(4)]
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [*images, "grid.png", "prompts.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    asked = [("a red star", 0), ("a red star", 1), ("a moon", 0), ("a moon", 1)]
    assert [(x["file"], x["prompt"], x["seed"]) for x in lines] == [
        (file, *prompt_and_seed) for file, prompt_and_seed in zip(images, asked)
    ]
    text = Image.open(tmp_path / "00003.png").text
    assert text == {"prompt": "a moon", "seed": "1", "model": "toy", "patch": "none"}
    for network in ("unet", "vae", "text_encoder"):
        assert re.search(rf"{network}: .*safetensors, \d+ tensors, [\d,]+ parameters", printed)


def test_long_prompts_are_cut_as_diffusers_cuts_them_and_that_is_said_once(capsys, tmp_path):
    long = "a red star on sand " * 20
    assert run(f"{DRAW} '{long}' '{long} a moon' --steps 2", tmp_path / "o") == 0
    assert capsys.readouterr().err.count("longer than 77 tokens") == 1
    pipeline = StableDiffusionPipeline.from_pretrained(weights.TOY)
    theirs = pipeline(long, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert np.abs(pictures(tmp_path / "o")[0] - np.asarray(theirs.images[0])).max() <= 1


# ---------------------------------------------------------------------------------------- train.py
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "star"
    assert run(STAR, out) == 0
    return out


def test_what_training_leaves(trained):
    files = {file.relative_to(trained).as_posix() for file in trained.rglob("*.*")}
    previews = {f"previews/original-{n}.png" for n in range(5)}  # it does not change
    for done in ("000000", "000003", "000006"):
        previews.add(f"previews/{done}.png")
        for n in range(5):
            previews |= {f"previews/{done}/{name}-{n}.png" for name in ("student", "teacher")}
    weights_and_log = {"erased.safetensors", "checkpoint.safetensors", "log.csv", "run.json"}
    shown = {"before_after.png", "film.png", "film.webp", "index.html"}
    assert files == previews | weights_and_log | shown

    head, *rows = [line.split(",") for line in (trained / "log.csv").read_text().splitlines()]
    assert head == list(train.LOG_COLUMNS) and len(rows) == 6
    assert float(rows[0][2]) == 0.0  # the learning rate
    assert rows[0][5:] == ["star", "", "", "", "", ""]  # gap and drift only with previews
    assert rows[2][-1] == "0.0" and all(float(x) > 0 for x in rows[5][6:-1])

    last = [
        np.asarray(Image.open(trained / file))[-132:, -132:]
        for file in ("before_after.png", "previews/000006.png")
    ]
    assert np.array_equal(*last)  # of the teacher: the last prompt, in the lower right corner


def test_a_patch_is_the_teacher_and_fits_diffusers(trained):
    """It has the trained tensors only, and what made them."""
    tensors, metadata = weights.read(trained / "erased.safetensors")
    assert tensors and all(".attn2." in name for name in tensors)
    found = {key: metadata[key] for key in ("model", "concepts", "method")}
    assert found == dict(model="toy", concepts="star", method="sdd")
    assert json.loads(metadata["args"])["iters"] == 6
    assert "torch" in json.loads(metadata["versions"])
    state, _ = weights.read(trained / "checkpoint.safetensors")
    assert all(torch.equal(x, state[f"teacher/{name}"]) for name, x in tensors.items())
    assert not any(torch.equal(x, state[f"student/{name}"]) for name, x in tensors.items())

    theirs = UNet2DConditionModel.from_pretrained(weights.TOY / "unet")
    before = {name: x.clone() for name, x in theirs.state_dict().items()}
    assert not theirs.load_state_dict(tensors, strict=False).unexpected_keys
    ours = weights.load("toy").unet
    weights.load_patch(trained / "erased.safetensors", ours)
    for name, x in ours.state_dict().items():
        assert torch.equal(x, theirs.state_dict()[name])
        assert torch.equal(x, before[name]) == (name not in tensors), name


@pytest.mark.parametrize(
    "words",
    [
        "--method esd-x --latents original",
        "--method esd-u",
        f"--method ablate-noise {ABLATE} --train-params full",
        f"--method ablate {ABLATE} --prior 1 --detach-start",
        "--method all-but-one --anchor circle",
        "--method all-but-one --quantile 0.9",
        f"--loss {ROOT}/losses.py:esd_loss",
    ],
)
def test_the_other_methods(words, tmp_path):
    assert run(f"{QUIET} {words}", tmp_path / "o") == 0
    tensors, metadata = weights.read(tmp_path / "o" / "erased.safetensors")
    method, options = metadata["method"], json.loads(metadata["args"])
    assert method == (words.split()[1] if "--method" in words else "sdd")
    before = dict(weights.load("toy").unet.named_parameters())
    assert set(tensors) == {name for name in before if TRAIN_PARAMS[options["train_params"]](name)}
    assert any(not torch.equal(x, before[name]) for name, x in tensors.items())
    state, _ = weights.read(tmp_path / "o" / "checkpoint.safetensors")
    output = METHODS[method].output
    assert all(torch.equal(x, state[f"{output}/{name}"]) for name, x in tensors.items())


def test_ablating_trains_the_concepts_rows_only(tmp_path):
    """The patch has the text encoder's table of words, and changes images of the concept."""
    line = f"{QUIET} --method ablate {ABLATE} --train-params embedding"
    assert run(line, tmp_path / "o") == 0
    patch = tmp_path / "o" / "erased.safetensors"
    ((name, after),) = weights.read(patch)[0].items()
    model = weights.load("toy")
    changed = (after != model.text_encoder.get_parameter(name)).any(1).nonzero().flatten().tolist()
    assert changed == model.tokenizer("star", add_special_tokens=False).input_ids
    z_0 = weights.read(tmp_path / "o" / "anchors.safetensors")[0]["z_0"]
    assert z_0.shape == (3, 4, 16, 16) and not torch.equal(z_0[0], z_0[1])
    assert run(f"{DRAW} 'a star' --steps 2 --patch none new={patch}", tmp_path / "p") == 0
    before, after = (pictures(tmp_path / "p" / folder) for folder in ("original", "new"))
    assert not np.array_equal(before, after)


# fmt: off
PAIRS = [
    # concepts          --anchor    prompts with the anchor   (concept, prompt, with the concept)
    (["star", "moon"],  ["circle"], [], [(0, "circle", "star"), (1, "circle", "moon")]),
    (["grumpy cat"],    ["cat"],    ["a cat on a mat", "the cat, sleeping"],
     [(0, "a cat on a mat", "a grumpy cat on a mat"),
      (0, "the cat, sleeping", "the grumpy cat, sleeping")]),
    (["Van Gogh"],      [],         ["a lake", "a hill"],
     [(0, "a lake", "a lake, in the style of Van Gogh"),
      (0, "a hill", "in Van Gogh's style, a hill")]),
    # Words that \b does not end
    (["go"],            ["c++"],    ["c++ and c++11"], [(0, "c++ and c++11", "go and c++11")]),
    # In turn, so that a few images show every concept's anchor
    (["star", "moon"],  ["circle"], ["a circle", "the circle"],
     [(0, "a circle", "a star"), (1, "a circle", "a moon"),
      (0, "the circle", "the star"), (1, "the circle", "the moon")]),
]
# fmt: on


@pytest.mark.parametrize("concepts, anchors, lines, expected", PAIRS)
def test_anchor_prompts(concepts, anchors, lines, expected):
    assert ablation.prompt_pairs(concepts, anchors, lines) == expected


def test_an_anchor_that_is_not_in_its_prompt():
    with pytest.raises(UserError, match="'dog'.*'a cat'"):
        ablation.prompt_pairs(["wolf"], ["dog"], ["a cat"])


SMALL = dict(block_out_channels=[32, 64, 128, 128])
SD14 = dict(block_out_channels=[320, 640, 1280, 1280], cross_attention_dim=768, norm_num_groups=32)


@pytest.mark.parametrize(
    "sizes, parameters, trained",
    [
        (SMALL, 8_505_444, 308_960),
        pytest.param(SD14, 859_520_964, 43_962_560, marks=pytest.mark.long),
    ],
)
def test_sd14s_blocks_on_the_cpu(sizes, parameters, trained, tmp_path, capsys):
    """SD 1.4's blocks and file layout (random weights, 8x8 latents): a patch of 80 tensors."""
    sizes = UNETS["8 heads, cross first"] | sizes
    folder = write_model_folder(tmp_path / "sd", words=SD_WORDS, **sizes)
    line = f"train.py --concept nudity --model {folder} --device cpu --iters 1 --warmup 0 --steps 1"
    assert run(f"{line} --preview-every 0", tmp_path / "run") == 0
    assert f"686 tensors, {parameters:,} parameters" in capsys.readouterr().out
    tensors, _ = weights.read(tmp_path / "run" / "erased.safetensors")
    assert len(tensors) == 80 and sum(x.numel() for x in tensors.values()) == trained
    assert not (tmp_path / "run" / "before_after.png").exists()


def test_without_out_a_run_gets_the_next_number(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = "train.py --model toy --concept star --method uce --anchor circle --preview-every 0"
    for number in (1, 2):
        assert run(line) == 0
        assert (tmp_path / "runs" / f"{number:04d}-star" / "erased.safetensors").exists()
        assert f"{number:04d}-star" in capsys.readouterr().out
