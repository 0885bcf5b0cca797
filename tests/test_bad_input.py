"""A table of mistakes that a user can make: words, numbers and files.

Each is refused in one sentence that says what to do, with exit status 2, without a traceback, and
with nothing written.
"""

import json
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_commands import ROOT, command

import eval as evaluation
import generate
import train
import weights
from support.cli import run_command
from tools import convert

MAIN = {
    "train": (train.train, train.parse),
    "generate": (generate.generate, generate.parse),
    "eval": (evaluation.evaluate, evaluation.parse),
    "convert": (convert.convert, convert.parse),
}
STAR = "train --model toy --concept star --iters 1 --warmup 0 --steps 1 --preview-every 0"
DRAW = "generate star --model toy --steps 1"
EVAL = "eval toy --limit 1 --steps 1"
CONVERT = "convert --model toy --format diffusers"
CASES = [  # the command without --out; what the sentence contains. {f}: the folder of `files`
    # words
    (f"{STAR} --method esdx", "did you mean esd-x"),
    (f"{STAR} --method SDD", "did you mean|There are: sdd"),
    (f"{STAR} --preset papr", "did you mean paper"),
    (f"{STAR} --train-params xatn", "There are:"),
    (f"{DRAW} --guidance sld-maxx --avoid star", "did you mean sld-max"),
    (f"{DRAW} --scheduler dim", "did you mean ddim"),
    (f"{DRAW} --dtype fp32x", "did you mean fp32"),
    ("eval nudty", "did you mean nudity"),
    (f"{EVAL} --guidance segaa --avoid star", "did you mean sega"),
    ("generate stra --model toy", "Did you mean 'star'"),
    ("train --model toy --concept hart", "Did you mean 'heart'"),
    ("generate qqqq --model toy", "It knows: a"),
    (f"{EVAL} --guidance neg --avoid strr", "strr"),
    ("train --model toy --concept star STAR star", "twice"),
    ("train --model toy --concept ''", "empty"),
    ("train --model toy --concept ' ' moon", "empty"),
    (f"train --model toy --concept '{'star ' * 76}'", "77 tokens"),
    (f"train --model toy --concept '{'red ' * 40}' '{'blue ' * 40}'", "77 tokens"),
    (f"{DRAW} --guidance neg", "--avoid"),
    (f"{DRAW} --avoid moon", "--guidance"),
    (f"{DRAW} --guidance sega --avoid ''", "empty"),
    (f"{DRAW} --model toyy", "no folder toyy.*Did you mean toy"),
    (f"{DRAW} --model toi", "Did you mean toy"),
    (f"{DRAW} --guidance-scal 3", "did you mean --guidance-scale"),
    (f"{DRAW} --wombat", "unknown argument --wombat"),
    (f"{CONVERT} --ptch x", "did you mean --patch"),
    ("convert --model toy --format difusers", "did you mean diffusers"),
    ("convert --model toy", "required: --format"),
    (f"{DRAW} --guidance-warmup 3", "no effect with --guidance sd"),
    (f"{DRAW} --guidance neg --avoid moon --guidance-warmup 1", "no effect with --guidance neg"),
    (f"{DRAW} --guidance sega --avoid moon --guidance-warmup 1", "not shorter than the run"),
    (f"{DRAW} --guidance sld-weak --avoid moon", "15 evaluations.*not shorter than the run"),
    (f"{DRAW} --guidance neg --avoid moon --negative-prompt star", "only one of them"),
    (f"{DRAW} --model ''", "no folder"),
    (f"{DRAW} --model a/b/c", "no folder"),
    (f"{DRAW} --revision main", "--revision"),
    (f"{DRAW} --device cda", "--device cda"),
    (f"{DRAW} --device meta:x", "--device"),
    ("train --model toy", "No concept is given"),
    ("train", "No concept is given"),
    (f"{STAR} --loss nothing", "FILE.py:FUNCTION"),
    (f"{STAR} --no-such-flag 1", "no-such-flag"),
    ("generate --model toy", "PROMPT"),
    # numbers
    (f"{STAR} --lr nan", "finite"),
    (f"{STAR} --lr x", "not a number"),
    (f"{STAR} --lr -1", "--lr"),
    (f"{STAR} --ema 2", "--ema"),
    (f"{STAR} --seed -1", "--seed"),
    (f"{STAR} --seed {2**63}", "--seed"),
    (f"{STAR} --seed 1.5", "--seed"),
    (f"{STAR} --iters 0", "less than 1"),
    (f"{STAR} --guidance-scale inf", "finite"),
    (f"{STAR} --steps 1001", "steps"),
    (f"{STAR} --warmup -1", "--warmup"),
    (f"{STAR} --save-every -1", "--save-every"),
    (f"{STAR} --batch-size 99999999", "more than 1000000"),
    (f"{STAR} --erase-scale nan", "finite"),
    (f"{DRAW} --seed -1", "--seed"),
    (f"{DRAW} --seed {2**70}", "is more than"),
    (f"{DRAW} --num-images 0", "less than 1"),
    (f"{DRAW} --guidance-scale nan", "finite"),
    (f"{DRAW} --num-images 1000000000", "more than 1000000"),
    (f"{DRAW} --resolution 63", "multiples of 4"),
    (f"{DRAW} --resolution 400000", "memory"),
    (f"{EVAL} --seed x", "--seed"),
    (f"{EVAL} --batch-size 0", "less than 1"),
    (f"{EVAL} --guidance-scale=-inf", "finite"),
    # csv files
    ("eval coco --model toy", "--prompts"),
    ("eval coco --model toy --prompts {f}/none.csv", "none.csv"),
    ("eval coco --model toy --prompts {f}/empty.csv", "no rows"),
    ("eval coco --model toy --prompts {f}/binary.csv", "csv"),
    ("eval coco --model toy --prompts {f}/other.csv", "column `caption`"),
    ("eval i2p --model toy --prompts {f}/other.csv", "I2P"),
    ("eval i2p --model toy --prompts {f}/seeds.csv", "sd_seed"),
    ("eval i2p --model toy --prompts {f}/sizes.csv", "size"),
    ("eval i2p --model toy --prompts {f}/scales.csv", "finite"),
    # a patch
    (f"{DRAW} --patch {{f}}/none.safetensors", "no file"),
    (f"{DRAW} --patch {{f}}", "safetensors file"),
    (f"{DRAW} --patch {{f}}/cut.safetensors", "is cut off"),
    (f"{DRAW} --patch {{f}}/nan.safetensors", "NaN"),
    (f"{DRAW} --patch {{f}}/inf.safetensors", "infinity"),
    (f"{DRAW} --patch {{f}}/shape.safetensors", "does not fit"),
    (f"{DRAW} --patch {{f}}/dtype.safetensors", "int32"),
    (f"{DRAW} --patch {{f}}/name.safetensors", "does not fit"),
    (f"{DRAW} --patch {{f}}/base.safetensors", "right --model"),
    (f"{DRAW} --patch {{f}}/changed.safetensors", "damaged"),
    (f"{DRAW} --patch {{f}}/pickle.safetensors", "safetensors file"),
    (f"{DRAW} --patch {{f}}/lies.safetensors", "safetensors file"),
    (f"{DRAW} --patch {{f}}/bomb.safetensors", "safetensors file"),
    (f"{DRAW} --patch {{f}}/empty.csv", "safetensors file"),
    (f"{DRAW} --patch {{f}}/nothing.safetensors", "base"),
    (f"{EVAL} --patch sdd", "NAME=FILE"),
    (f"{EVAL} --patch sdd={{f}}/none.safetensors", "no file"),
    (f"{EVAL} --patch sdd={{f}}/nan.safetensors", "NaN"),
    (f"{EVAL} --patch sdd={{f}}/args.safetensors", "metadata"),
    (f"{CONVERT} --patch {{f}}/nan.safetensors", "NaN"),
    (f"{CONVERT} --patch {{f}}/args.safetensors", "metadata"),
    # a patch names its model
    ("generate star --patch {f}/whole.safetensors {f}/other.safetensors", "patches of one model"),
    ("generate star --model some/one --patch {f}/whole.safetensors", "use --model toy"),
    ("generate star --patch {f}/gone.safetensors", "not on this machine"),
    ("convert --format diffusers --patch {f}/gone.safetensors", "not on this machine"),
    # a model
    (f"{DRAW} --model {{f}}/nan", "NaN"),
    (f"{DRAW} --model {{f}}", "missing"),
    (f"{DRAW} --model {{f}}/bomb.safetensors", "is one file"),
    ("convert --format diffusers --model {f}/bomb.safetensors", "safetensors file"),
    ("convert --format diffusers --model {f}/m.ckpt", "pickle"),
    ("convert --format single-file --model toy", "has to end in .safetensors"),
    (f"{CONVERT} --tokenizer {{f}}", "--tokenizer is for"),
]
PROCESSES = [  # some of them as commands of their own
    (line, said)
    for line, said in CASES
    if said in ("did you mean esd-x", "Did you mean 'star'", "twice", "is cut off", "is one file")
    or line in ("train", "generate --model toy", "eval nudty", f"{CONVERT} --tokenizer {{f}}")
]
SCRIPTS = {"convert": ["-m", "tools.convert"]}  # the others are NAME.py


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    f = tmp_path_factory.mktemp("files")
    base = {
        name: x for name, x in weights.load("toy").unet.state_dict().items() if ".attn2." in name
    }
    about = {
        "model": "toy",
        "concepts": "star",
        "method": "sdd",
        "args": "{}",
        "base_fingerprint": weights.fingerprint(base),
    }

    def write(name, change=lambda t: None, metadata=about):
        tensors = {key: x.clone() for key, x in base.items()}
        change(tensors)
        save_file(tensors, f / f"{name}.safetensors", metadata)

    one = min(base)
    write("whole")
    write("nan", lambda t: t[one].view(-1)[7:8].fill_(torch.nan))
    write("inf", lambda t: t[one].view(-1)[:1].fill_(-torch.inf))
    write("shape", lambda t: t.update({one: torch.ones(3, 3)}))
    write("dtype", lambda t: t.update({one: t[one].int()}))
    write("name", lambda t: t.update({"other": torch.ones(2)}))
    write("base", metadata=about | {"base_fingerprint": "0" * 16})
    write("changed", metadata=about | {"sha256": "0" * 64})
    write("args", metadata=about | {"args": "{", "method": "esd-x"})
    write("nothing", lambda t: t.clear())
    write("other", metadata=about | {"model": "someone/else"})
    write("gone", metadata=about | {"model": "/no/such/folder"})
    whole = (f / "whole.safetensors").read_bytes()
    (n,) = struct.unpack("<Q", whole[:8])
    (f / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (f / "bomb.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{" * 100)
    header = json.loads(whole[8 : 8 + n])
    header[one]["data_offsets"] = [0, 2**50]
    lies = json.dumps(header).encode()
    (f / "lies.safetensors").write_bytes(struct.pack("<Q", len(lies)) + lies + whole[8 + n :])
    (f / "pickle.safetensors").write_bytes(
        b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x08os\x94."
    )
    (f / "m.ckpt").write_bytes(b"PK\3\4")
    i2p = "prompt,sd_seed,sd_guidance_scale,sd_image_height,sd_image_width\nstar,{},{},{},64\n"
    for name, text in (
        ("empty", ""),
        ("other", "a,b\n1,2\n"),
        ("seeds", i2p.format(-5, 7, 64)),
        ("sizes", i2p.format(1, 7, 63)),
        ("scales", i2p.format(1, "nan", 64)),
    ):
        (f / f"{name}.csv").write_text(text)
    (f / "binary.csv").write_bytes(b"\xff\xfe\x00\x01" * 9)
    shutil.copytree(weights.TOY, f / "nan")
    file = f / "nan" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[max(tensors)].view(-1)[-1:].fill_(torch.nan)
    save_file(tensors, file)
    return f


def split(line, folder):
    """The words of a command; '…' is one word."""
    words = []
    for word in re.findall(r"'[^']*'|\S+", line.replace("{f}", str(folder))):
        words.append(word[1:-1] if word.startswith("'") else word)
    return words


def check_sentence(error, said):
    last = error.strip().splitlines()[-1]
    assert "Traceback" not in error and "usage:" not in error, error
    assert "error: " in last and len(re.findall("error: ", error)) == 1, error
    assert re.search(said, last), last


@pytest.fixture(scope="module", autouse=True)
def toy_model_is_loaded_once():
    """The cases do not change the toy model."""
    toy, load = weights.load("toy"), weights.load

    def load_once(name=None, *rest):
        return toy if name == "toy" and not any(rest) else load(name, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "load", load_once)
        yield


@pytest.mark.parametrize("line, said", CASES, ids=[line for line, _ in CASES])
def test_a_mistake_is_one_sentence(line, said, files, tmp_path, capsys):
    which, *words = split(line, files)
    before = sorted(files.rglob("*"))
    main, parse = MAIN[which]
    try:
        with torch.enable_grad():
            status = run_command(main, parse([*words, "--out", str(tmp_path / "out" / "o")]))
    except SystemExit as e:  # from the argument parser
        status = e.code
    assert status == 2
    check_sentence(capsys.readouterr().err, said)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    assert before == sorted(files.rglob("*"))


@pytest.mark.parametrize("line, said", PROCESSES, ids=[line for line, _ in PROCESSES])
def test_a_mistake_in_a_process_of_its_own(line, said, files, tmp_path):
    which, *words = split(line, files)
    script = SCRIPTS.get(which, [ROOT / f"{which}.py"])
    status, _, error = command(*script, *words, "--out", tmp_path / "o")
    assert status == 2
    check_sentence(error, said)


def test_there_are_enough_cases():
    assert len({line for line, _ in CASES}) == len(CASES) >= 60
    assert len(PROCESSES) >= 8
