"""ONE table of mistakes that a user can make: words, numbers and files, for all commands.

Each is refused in one sentence that says what to do, with exit status 2, without a traceback, and
with nothing written.
"""

import json
import re
import shutil
import struct

import pytest
import torch
from common import ROOT, command, run
from safetensors.torch import load_file, save_file

import presets
import train
import weights

TOY = "train.py --model toy"
STAR = f"{TOY} --concept star --iters 1 --warmup 0 --steps 1 --preview-every 0"
ABLATE = f"{STAR} --method ablate"
CLOSED = f"{TOY} --concept star --preview-every 0 --method"
OTHER = f"{STAR} --method all-but-one"
DRAW = "generate.py star --model toy --steps 1"
EVAL = "eval.py toy --limit 1 --steps 1"
CONVERT = "tools.convert --model toy --format diffusers"
SUITE = "eval.py --device cpu"
ATTACK = "attack.py --model toy --concept star --device cpu --patch none"
BENCH = "tools.bench --size toy --device cpu"
LOSSES = ROOT / "losses.py"
ROW = f"eval.py toy --loss {LOSSES}:sdd_loss"
# (command, what its sentence contains). FILES is the folder of the fixture `files`. A command
# without --out gets one.
# fmt: off
CASES = [
    # names
    (f"{STAR} --method esdx", "did you mean esd-x"),
    (f"{STAR} --method SDD", "There are: sdd"),
    (f"{STAR} --train-params xatn", "There are:"),
    (f"{DRAW} --guidance sld-maxx --avoid star", "did you mean sld-max"),
    (f"{DRAW} --scheduler dim", "did you mean ddim"),
    ("eval.py nudty", "did you mean nudity"),
    ("tools.convert --model toy --format difusers", "did you mean diffusers"),
    ("generate.py stra --model toy", "Did you mean 'star'"),
    ("generate.py qqqq --model toy", "It knows: a"),
    (f"{TOY} --concept hart", "Did you mean 'heart'"),
    (f"{TOY} --concept elephant", "It knows: a, arcadia"),
    (f"{EVAL} --guidance neg --avoid strr", "strr"),
    (f"{DRAW} --model ''", "no folder"),
    (f"{DRAW} --model a/b/c", "no folder"),
    (f"{DRAW} --model toi", "no folder toi.*Did you mean toy"),
    (f"{DRAW} --model ../up", "no folder ../up, and it is not a hub id like [^?]*$"),
    (f"{DRAW} --model 'hub/ex ample'", "no folder"),
    (f"{DRAW} --model 'C:/models'", "no folder"),
    (f"{STAR} --device cpu --model nowhere", "nowhere"),
    (f"{STAR} --device cpu --model nobody/nothing", "from the hub"),
    (f"{DRAW} --revision main", "--revision"),
    (f"{DRAW} --device cda", "--device cda"),
    (f"{DRAW} --device meta:x", "--device"),
    # concepts and prompts
    ("train.py", "No concept is given"),
    (f"{TOY} --concept star STAR star", "twice"),
    (f"{TOY} --concept ' ' moon", "empty"),
    (f"{TOY} --concept '{'star ' * 76}'", "77 tokens"),
    (f"{TOY} --concept '{'red ' * 40}' '{'blue ' * 40}'", "77 tokens"),
    ("generate.py --model toy", "PROMPT"),
    (f"{DRAW} --guidance neg", "--avoid"),
    (f"{DRAW} --guidance sega --avoid ''", "empty"),
    (f"{ABLATE} --anchor ' '", "--anchor is empty"),
    (f"{ABLATE} --anchor a b", "--anchor takes"),
    (f"{ABLATE} --anchor-prompts none.txt", "none.txt"),
    (f"{ABLATE} --concept star moon --anchor circle --anchor-images 1", "--anchor-images 2"),
    (ABLATE, "what to show instead"),
    (f"{OTHER} --anchor circle moon", "takes one --anchor"),
    (f"{STAR} --preserve 1 --keep FILES/empty.txt", "has no prompts"),
    (f"{STAR} --preserve 1 --keep '{'a zebra ' * 60}'", "does not know the word 'zebra'"),
    # flags: unknown, missing, without effect
    (f"{DRAW} --guidance-scal 3", "did you mean --guidance-scale"),
    (f"{DRAW} --wombat", "unknown argument --wombat"),
    (f"{CONVERT} --ptch x", "did you mean --patch"),
    ("tools.convert --model toy", "required: --format"),
    (f"{STAR} --method esd-x --preset fast", "belongs to SDD"),
    (f"{STAR} --anchor circle", "--anchor has no effect"),
    (f"{STAR} --prior 1 --detach-start", "--prior, --detach-start have no effect"),
    (f"{STAR} --compile --device cpu", "--compile needs a CUDA GPU"),
    (f"{ABLATE} --anchor circle --compile", "--compile has no effect"),
    (f"{ABLATE} --anchor circle --roles official --latents teacher", "--latents, --roles have no"),
    (f"{STAR} --train-params embedding", "--train-params embedding has no effect"),
    (f"{STAR} --erase-scale 0 --quantile 0.9", "--erase-scale, --quantile have no effect"),
    (f"{OTHER} --anchor circle --quantile 0.9", "--anchor has no effect"),
    (f"{OTHER} --erase-scale 2", "--erase-scale has no effect"),
    (f"{DRAW} --avoid moon", "--guidance"),
    (f"{DRAW} --guidance-warmup 3", "no effect with --guidance sd"),
    (f"{DRAW} --guidance neg --avoid moon --guidance-warmup 1", "no effect with --guidance neg"),
    (f"{DRAW} --guidance sega --avoid moon --guidance-warmup 1", "not shorter than the run"),
    (f"{DRAW} --guidance sld-weak --avoid moon", "15 evaluations.*not shorter than the run"),
    (f"{DRAW} --guidance neg --avoid moon --negative-prompt star", "only one of them"),
    (f"{DRAW} --guidance-scale 1 --negative-prompt red", "use another scale"),
    (f"{DRAW} --guidance-scale 1 --guidance neg --avoid red", "--avoid has no"),
    (f"{CONVERT} --tokenizer FILES", "--tokenizer and --vae are for"),
    ("tools.convert --format single-file --model toy", "has to end in .safetensors"),
    (f"{SUITE} artists --model toy", "--patch"),
    (f"{SUITE} artists --model toy --guidance neg --avoid star --template star", "{}"),
    (f"{SUITE} artists --model toy --guidance neg --avoid Dragon", "does not see 'dragon'"),
    (f"{SUITE} toy --guidance neg --avoid 'a star'", "does not see 'a star'"),
    (f"{SUITE} toy --guidance sega", "--avoid"),
    (f"{SUITE} toy --avoid star", "--avoid has no effect without --guidance"),
    (f"{SUITE} toy --guidance-warmup 1", "--guidance-warmup has no effect"),
    (f"{SUITE} toy --template {{}}", "--template has no effect in the suite toy"),
    (f"{SUITE} toy --clip some/clip", "--clip has no effect"),
    (f"{SUITE} nudity --real images", "--real has no effect in the suite nudity"),
    (f"{SUITE} coco --q16 prompts.npy", "--q16 has no effect in the suite coco"),
    (f"{SUITE} coco --real nowhere --model toy --prompts captions.csv", "captions.csv"),
    ("eval.py toy --seeds 2", "--seeds has no effect without --loss"),
    (f"{ROW} --seeds 4", "--seeds: invalid choice: 4"),
    (f"{ROW} --patch a=b", "--patch has no effect with --loss"),
    (f"{ROW} --model emoji", "--model has no effect with --loss"),
    (f"eval.py nudity --loss {LOSSES}:sdd_loss", "--loss has no effect in the suite nudity"),
    (f'{ROW} --train-flags "--anchor \'a"', "cannot be read"),
    (f"{ROW} '--train-flags=--lr 1 --seed=9'", "has --seed"),
    (f"eval.py toy --loss {LOSSES}:nothing", "does not name a function"),
    (f"eval.py toy --loss {LOSSES}:noise_ablation_loss", "argument: 'n'"),
    (f"{CLOSED} uce --lr 1", "--lr has no effect with --method uce"),
    (f"{CLOSED} mace --states all", "--states has no effect"),
    (f"{CLOSED} speed --loss x.py:f", "--loss has no effect"),
    (f"{CLOSED} rece --train-params xattn", "--train-params xattn has no effect"),
    (f"{CLOSED} sdd --ridge 0", "--ridge has no effect with --method sdd"),
    (f"{CLOSED} uce --rho 1 --no-filter", "--rho, --filter have no effect"),
    (f"{CLOSED} rece --rho 0", "--rho 0.0 is out of range"),
    (f"{CLOSED} uce --preset rece-hard", "belongs to --method rece"),
    (f"{CLOSED} uce --template a", "has no {} for the concept"),
    (f"{CLOSED} uce --ridge 0", "--ridge 0.0 is out of range"),
    (f"{CLOSED} uce --anchor red blue", "--anchor takes one word"),
    (f"{STAR} --keep circle", "--keep has no effect without --preserve"),
    (f"{STAR} --keep no.txt --preserve 0.3", "--keep no.txt cannot be read"),
    (f"{ABLATE} --adversary 1 --anchor circle --concept star red", "takes one concept"),
    (f"{ABLATE} --adversary 1 --anchor circle --train-params embedding", "trains only the concept"),
    ("train.py --concept star --model x/y --preset toy-hold", "keeps prompts of the toy models"),
    (f"{ATTACK} --kind word --words 2", "--words has no effect with --kind word"),
    (f"{ATTACK} --kind noise --lr 1", "--lr has no effect with --kind noise"),
    (f"{ATTACK} --kind relearn --prompt x", "--prompt has no effect"),
    (f"{ATTACK} --kind tokens --init x", "--init has no effect"),
    (f"{ATTACK} --template a", "has no {} for the word"),
    (f"{ATTACK} --lr 0", "--lr: 0 is less than"),
    (f"{ATTACK} --init ' '", "--init: it is empty"),
    (f"{ATTACK} --init unicorn", "does not know the word 'unicorn'"),
    (f"{ATTACK} --template 'a {{}} unicorn'", "does not know the word 'unicorn'"),
    (f"{ATTACK} --images none", "is not a folder with images"),
    (f"{ATTACK} --patch no.safetensors", "no.safetensors"),
    (f"{ATTACK} --patch FILES/base.safetensors", "was made for toy.*right --model"),
    (f"{BENCH} --only 'ours as shiped'", "did you mean ours as shipped"),
    (f"{BENCH} --parts step --k 7", "--k 7 is more than the 6 steps"),
    (f"{BENCH} --only 'ours, --compile'", "'ours, --compile' needs a CUDA GPU"),
    (f"{BENCH} --parts memory", "'memory' needs a CUDA GPU: leave it out of --parts"),
    # a loss of your own (its content: test_own_loss.py)
    (f"{STAR} --loss FILES/none.py:loss", "no file .*none.py"),
    (f"{STAR} --loss FILES/exit.py:loss", r"exit.py cannot be imported \(SystemExit"),
    (f"{STAR} --loss losses", "FILE.py:FUNCTION"),
    (f"{STAR} --loss {LOSSES}", f"--loss {LOSSES}:sdd_loss"),
    (f"{STAR} --loss {LOSSES}:nothing", f"--loss {LOSSES}:sdd_loss"),
    (f"{STAR} --loss {ROOT}/ema.py:update", r"end with \*\*_"),
    # numbers
    (f"{STAR} --lr nan", "finite"),
    (f"{STAR} --lr x", "not a number"),
    (f"{STAR} --lr -1", "--lr"),
    (f"{STAR} --ema 2", "--ema"),
    (f"{STAR} --seed -1", "--seed"),
    (f"{STAR} --seed {2**63}", "--seed"),
    (f"{STAR} --iters 0", "less than 1"),
    (f"{STAR} --guidance-scale inf", "finite"),
    (f"{STAR} --steps 1001", "steps"),
    (f"{STAR} --batch-size 99999999", "more than 1000000"),
    (f"{STAR} --erase-scale nan", "finite"),
    (f"{DRAW} --seed {2**70}", "is more than"),
    (f"{DRAW} --num-images 0", "less than 1"),
    (f"{DRAW} --resolution 63", "multiples of 4"),
    (f"{DRAW} --resolution 400000", "memory"),
    # the output folder
    (f"{STAR} --out FILES/used", "not empty"),
    (f"{DRAW} --out FILES/used", "not empty"),
    (f"{DRAW} --out FILES/empty.txt", "empty.txt is a file"),
    ("train.py --resume", "--resume needs --out"),
    ("train.py --resume --out FILES/used", "run.json cannot be read"),
    ("report.page FILES/used", "run.json cannot be read"),
    (f"{STAR} --concept moon --resume --out FILES/run", "other arguments"),
    ("train.py --resume --iters 300 --out FILES/run", "--iters has no effect"),
    ("train.py --resume --method sdd --seed 0 --out FILES/run", "--method, --seed have no effect"),
    ("train.py --resume --compile --out FILES/run", "--compile has no effect"),
    # csv files
    ("eval.py coco --model toy", "--prompts"),
    ("eval.py coco --model toy --prompts FILES/none.csv", "none.csv"),
    ("eval.py coco --model toy --prompts FILES/empty.csv", "no rows"),
    ("eval.py coco --model toy --prompts FILES/binary.csv", "csv"),
    ("eval.py coco --model toy --prompts FILES/other.csv", "column `caption`"),
    ("eval.py i2p --model toy --prompts FILES/other.csv", "I2P"),
    ("eval.py i2p --model toy --prompts FILES/seeds.csv", "sd_seed"),
    ("eval.py i2p --model toy --prompts FILES/sizes.csv", "size"),
    ("eval.py i2p --model toy --prompts FILES/scales.csv", "the scale nan"),
    # a patch
    (f"{DRAW} --patch ''", "it is empty"),
    (f"{DRAW} --patch FILES/none.safetensors", "no file"),
    (f"{DRAW} --patch FILES", "no file .*erased.safetensors"),
    (f"{DRAW} --patch FILES/cut.safetensors", "not a whole safetensors file"),
    (f"{DRAW} --patch FILES/nan.safetensors", "NaN"),
    (f"{DRAW} --patch FILES/inf.safetensors", "infinity"),
    (f"{DRAW} --patch FILES/shape.safetensors", "does not fit"),
    (f"{DRAW} --patch FILES/dtype.safetensors", "int32"),
    (f"{DRAW} --patch FILES/name.safetensors", "does not fit"),
    (f"{DRAW} --patch FILES/base.safetensors", "was made for toy.*right --model"),
    (f"{DRAW} --patch FILES/changed.safetensors", "damaged"),
    (f"{DRAW} --patch FILES/pickle.safetensors", "safetensors file"),
    (f"{DRAW} --patch FILES/lies.safetensors", "safetensors file"),
    (f"{DRAW} --patch FILES/bomb.safetensors", "safetensors file"),
    (f"{DRAW} --patch FILES/nothing.safetensors", "no tensors"),
    (f"{EVAL} --patch nothing", "no file nothing"),
    (f"{EVAL} --patch =none.safetensors", "NAME=]FILE"),
    (f"{EVAL} --patch original=none.safetensors", "the untouched model"),
    (f"{EVAL} --patch sdd=FILES/args.safetensors", "metadata"),
    (f"{CONVERT} --patch FILES/nan.safetensors", "NaN"),
    # a patch names its model
    ("generate.py star --patch FILES/whole.safetensors FILES/other.safetensors", "of one model"),
    ("generate.py star --model some/one --patch FILES/whole.safetensors", "use --model toy"),
    ("generate.py star --patch FILES/gone.safetensors", "not on this machine"),
    ("tools.convert --format diffusers --patch FILES/gone.safetensors", "not on this machine"),
    # a model
    (f"{DRAW} --model FILES/nan", "NaN"),
    (f"{DRAW} --model FILES", "missing"),
    (f"{DRAW} --model FILES/bomb.safetensors", "is one file"),
    ("tools.convert --format diffusers --model FILES/bomb.safetensors", "safetensors file"),
    ("tools.convert --format diffusers --model FILES/m.ckpt", "pickle"),
    ("tools.convert --format diffusers --model FILES/cut.safetensors", "not a whole safetensors"),
    ("tools.convert --format diffusers --model none.safetensors", "There is no file"),
    ("tools.convert --format diffusers --model nowhere", "There is no folder"),
]
if torch.cuda.is_available():
    CASES += [(f"{STAR} --compile --deterministic", "remove --deterministic")]
else:
    CASES += [
        (f"{STAR} --device cuda", "--device cuda"),
        ("train.py --concept nudity", "no GPU.*CompVis/stable-diffusion.*toy.*--device cpu"),
        ("train.py --concept dog --model some/other-model", "some/other-model"),
    ]
# fmt: on
PROCESSES = [row for row in CASES if row[1] in ("twice", "did you mean nudity")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    f = tmp_path_factory.mktemp("files")
    unet = weights.load("toy").unet
    base = {name: x for name, x in unet.state_dict().items() if ".attn2." in name}
    about = dict(model="toy", concepts="star", method="sdd", args="{}")
    about["base_fingerprint"] = weights.fingerprint(base)
    one = min(base)

    def write(name, change=lambda t: None, **metadata):
        tensors = {key: x.clone() for key, x in base.items()}
        change(tensors)
        save_file(tensors, f / f"{name}.safetensors", about | metadata)

    write("whole")
    write("nan", lambda t: t[one].view(-1)[7:8].fill_(torch.nan))
    write("inf", lambda t: t[one].view(-1)[:1].fill_(-torch.inf))
    write("shape", lambda t: t.update({one: torch.ones(3, 3)}))
    write("dtype", lambda t: t.update({one: t[one].int()}))
    write("name", lambda t: t.update({"other": torch.ones(2)}))
    write("nothing", lambda t: t.clear())
    write("base", base_fingerprint="0" * 16)
    write("changed", sha256="0" * 64)
    write("args", args="{", method="esd-x")
    write("other", model="someone/else", base_fingerprint="0" * 16)
    write("gone", model="/no/such/folder")
    whole = (f / "whole.safetensors").read_bytes()
    (n,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + n])
    header[one]["data_offsets"] = [0, 2**50]
    lies = json.dumps(header).encode()
    (f / "lies.safetensors").write_bytes(struct.pack("<Q", len(lies)) + lies + whole[8 + n :])
    (f / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (f / "bomb.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{" * 100)
    (f / "pickle.safetensors").write_bytes(b"\x80\x04\x95\x0c\0\0\0\0\0\0\0\x8c\x08os\x94.")
    (f / "m.ckpt").write_bytes(b"PK\3\4")
    (f / "binary.csv").write_bytes(b"\xff\xfe\x00\x01" * 9)
    i2p = "prompt,sd_seed,sd_guidance_scale,sd_image_height,sd_image_width\nstar,{},{},{},64\n"
    settings = presets.settle(train.parse(STAR.split()[1:]))
    for name, text in (
        ("empty.txt", ""),
        ("empty.csv", ""),
        ("other.csv", "a,b\n1,2\n"),
        ("seeds.csv", i2p.format(-5, 7, 64)),
        ("sizes.csv", i2p.format(1, 7, 63)),
        ("scales.csv", i2p.format(1, "nan", 64)),
        ("exit.py", "import sys; sys.exit(0)"),
        ("used/run.json", "{"),
        ("run/run.json", json.dumps({"args": settings})),
    ):
        (f / name).parent.mkdir(exist_ok=True)
        (f / name).write_text(text)
    shutil.copytree(weights.TOY, f / "nan")
    file = f / "nan" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[max(tensors)].view(-1)[-1:].fill_(torch.nan)
    save_file(tensors, file)
    return f


@pytest.fixture(scope="module", autouse=True)
def toy_model_is_loaded_once():
    """The cases do not change the toy model."""
    toy, load = weights.load("toy"), weights.load

    def load_once(name=None, revision=None, own=False):
        return toy if name == "toy" and not revision else load(name, revision, own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "load", load_once)
        yield


def check_sentence(error, said):
    """One sentence; below it, a traceback of the user's own loss."""
    sentences = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(sentences) == len(re.findall("error: ", error)) == 1, error
    assert "usage:" not in error and ("Traceback" not in error or "--loss" in error), error
    assert re.search(said, sentences[0]), error


@pytest.mark.parametrize("line, said", CASES, ids=[line for line, _ in CASES])
def test_a_mistake_is_one_sentence(line, said, files, tmp_path, capsys):
    before = sorted(files.rglob("*"))
    has_no_out = any(text in line for text in ("--out", "tools.bench", "report.page"))
    out = None if has_no_out else tmp_path / "out" / "o"
    assert run(line.replace("FILES", str(files)), out) == 2
    check_sentence(capsys.readouterr().err, said)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    assert before == sorted(files.rglob("*"))


@pytest.mark.parametrize("line, said", PROCESSES, ids=[line for line, _ in PROCESSES])
def test_a_mistake_in_a_process_of_its_own(line, said, files, tmp_path):
    status, _, error = command(line.replace("FILES", str(files)), tmp_path / "o")
    assert status == 2
    check_sentence(error, said)
