"""Prints one hash per row for a checkout: did a refactoring change a bit of a patch or an image?

    python tests/same_bits.py [CHECKOUT [TITLE]] > after.txt    compare it with another commit's

Each row is a command of train.py or generate.py with all its numbers, on one thread. The hash is of
the trained tensors, of the losses in log.csv, and of the pixels of all images. This is not a test.
Hashes differ between machines, so they are not stored.
"""

import hashlib
import os
import runpy
import shlex
import sys
import tempfile
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import transformers  # noqa: F401 (once, before the forks)
from PIL import Image
from safetensors.torch import load_file

SCHEDULE = "--iters 3 --lr-schedule cosine --warmup 1 --lr 1e-3 --weight-decay 0.01 --ema 0.9"
SAMPLING = "--steps 4 --guidance-scale 3 --max-grad-norm 1"
LOOP = f"{SCHEDULE} {SAMPLING} --preserve 0 --adversary 0 --batch-size 3"
SEVERAL = "--concept star moon 'red cross'"
OUTPUT = "--preview star moon --preview-every 2 --preview-steps 2 --preview-guidance-scale 7.5"
ROLES = "--roles paper"
ANCHOR = "--anchor circle --anchor-images 5"
ABLATE = f"--concept star {LOOP} --method ablate {ANCHOR}"
TRAININGS = {
    "sdd": f"--concept star {LOOP} {ROLES}",
    "sdd, emoji": f"--model emoji --concept alcohol {LOOP} {ROLES}",
    "sdd, bf16": f"--concept star {LOOP} {ROLES} --dtype bf16",
    "sdd, checkpointing": f"--concept star {LOOP} {ROLES} --gradient-checkpointing",
    "sdd, full": f"--concept star {LOOP} {ROLES} --train-params full",
    "sdd, student's latents": f"--concept star {LOOP} {ROLES} --latents student",
    "sdd, original's latents": f"--concept star {LOOP} {ROLES} --latents original",
    "roles paper": f"{SEVERAL} {LOOP} --roles paper",
    "roles official": f"{SEVERAL} {LOOP} --roles official",
    "roles each": f"{SEVERAL} {LOOP} --roles each",
    "preserve": f"{SEVERAL} {LOOP} --roles each --preserve 0.3",
    "keep": f"--concept star {LOOP} {ROLES} --preserve 0.3 --keep circle 'a red heart'",
    "adversary": f"--concept star {LOOP} {ROLES} --adversary 2",
    "adversary, several": f"{SEVERAL} {LOOP} --roles each --adversary 2 --preserve 1 --keep moon",
    "own loss": f"--concept star {LOOP} {ROLES} --loss LOSS:esd_loss --erase-scale 2",
    "own loss, images": f"--concept star {LOOP} --method ablate {ANCHOR} --loss LOSS:prior_loss",
    "esd-x": f"--concept star {LOOP} {ROLES} --method esd-x --erase-scale 2",
    "esd-u": f"--concept star {LOOP} {ROLES} --method esd-u --erase-scale 2",
    "ablate": f"--concept star moon {LOOP} --method ablate {ANCHOR} --prior 1 --detach-start",
    "ablate, embedding": f"{ABLATE} --train-params embedding",
    "ablate, everything": f"{ABLATE} --prior 0.5 --preserve 1 --keep moon --adversary 1",
    "ablate-noise": f"--concept star {LOOP} --method ablate-noise {ANCHOR}",
    "all-but-one": f"--concept star {LOOP} {ROLES} --method all-but-one --anchor circle",
    "all-but-one, quantile": f"--concept star {LOOP} {ROLES} --method all-but-one --quantile 0.9 "
    "--erase-scale 1",
    "uce": "--concept star moon --method uce --anchor circle --template {} 'a {}' --keep heart "
    "--ridge 0.5 --states last",
    "uce, all states": "--concept star --method uce --template {} --keep heart --states all",
    "mace": "--concept star --method mace --anchor circle --template {} 'a {} on sand' "
    "--keep heart",
    "rece": "--concept star --method rece --template {} --keep heart --iters 3",
    "speed": "--concept star --method speed --anchor circle --template {} --keep heart moon",
}
GENERATE = "'a red star' 'circle' --steps 4 --guidance-scale 5 --num-images 2 --batch-size 3"
IMAGES = {
    "ddim": f"{GENERATE} --model toy --scheduler ddim",
    "pndm": f"{GENERATE} --model toy --scheduler pndm",
    "negative prompt": f"{GENERATE} --model toy --negative-prompt moon",
    "emoji": "'a beer by noto' --model emoji --steps 4",
    "guidance neg": f"{GENERATE} --model toy --guidance neg --avoid star",
}
for name in ("sld-weak", "sld-medium", "sld-strong", "sld-max", "sega"):
    IMAGES[f"guidance {name}"] = (
        f"{GENERATE} --model toy --guidance {name} --avoid star --guidance-warmup 1"
    )


def rows(checkout):
    """Yields (title, words of the command), without --out."""
    for title, text in TRAININGS.items():
        text = text.replace("LOSS", str(checkout / "losses.py"))
        yield title, ["train.py", *shlex.split(f"--model toy --seed 3 {OUTPUT} {text}")]
    for title, text in IMAGES.items():
        yield f"generate, {title}", ["generate.py", *shlex.split(f"{text} --seed 3")]


def run(checkout, command, out):
    """Runs a command in a fork of this process, which has imported torch. Returns its status."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.argv = [*command, "--device", "cpu", "--out", str(out / "out")]
    sys.path[0] = str(checkout)
    os.chdir(checkout)
    text = open(out / "text", "w", encoding="utf-8")
    os.dup2(text.fileno(), 1)
    os.dup2(text.fileno(), 2)
    status = 1
    try:
        runpy.run_path(str(checkout / command[0]), run_name="__main__")
    except SystemExit as e:
        status = int(e.code or 0)
    except BaseException:
        traceback.print_exc()
    text.flush()
    os._exit(status)


def row(checkout, title, command):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if run(checkout, command, folder):
            last = (folder / "text").read_text(encoding="utf-8").strip().split("\n")[-1]
            return f"{'failed':16}  {title}: {last}"
        return f"{hash_of(folder / 'out')}  {title}"


def hash_of(out):
    digest = hashlib.sha256()
    for file in sorted(out.rglob("*.safetensors")):
        if file.name != "checkpoint.safetensors":
            for name, x in sorted(load_file(file).items()):
                digest.update(name.encode() + x.contiguous().view(torch.uint8).numpy().tobytes())
    for file in sorted(out.rglob("*.png")):
        digest.update(file.name.encode() + np.asarray(Image.open(file).convert("RGB")).tobytes())
    if (out / "log.csv").exists():
        digest.update((out / "log.csv").read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    checkout = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    chosen = [
        (title, command) for title, command in rows(checkout) if " ".join(sys.argv[2:]) in title
    ]
    for title, command in chosen:
        print(row(checkout, title, command), flush=True)
