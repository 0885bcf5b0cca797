"""Stop and resume: the result has the bits of a command that was never stopped.

ONE table: a command, how it stops, before which call of which function, and what the user reads.
Then the same folder continues, and is compared with the folder of a whole run, file by file.
Kills (kill -9) come at random moments, in test_kill.py.
"""

import pytest
from common import SHORT, differences, run, stopped

import attack
import pipeline
import presets
import train
import weights
from support import runs

SDD = f"{SHORT} --steps 1 --batch-size 1 --preview-steps 1 --concept star"
QUIET = f"{SDD} --preview-every 0"
ABLATE = f"{QUIET} --method ablate --anchor circle"
ATTACK = "attack.py --model toy --concept star --device cpu --patch none"
FEW = "--samples 2 --steps 2 --batch-size 2"
COMMANDS = {
    "previews": f"{SDD} --preview star --export-every 3",
    "sdd": QUIET,
    "fp16": f"{QUIET} --dtype fp16 --warmup 0",  # with the state of the GradScaler
    "adversary": f"{QUIET} --adversary 1 --preserve 0.3 --keep circle 'a red square'",
    "images": f"{ABLATE} --anchor-images 6 --prior 1",
    "embedding": f"{ABLATE} --anchor-images 3 --train-params embedding",
    "esd-x": f"{QUIET} --method esd-x --save-every 0",
    "rece": "train.py --model toy --concept star --method rece --anchor circle --preview-every 0 "
    "--iters 3 --save-every 1",
    "word": f"{ATTACK} --kind word {FEW} --num-images 3 --at 0 2 4",
    "tokens": f"{ATTACK} --kind tokens {FEW} --num-images 3 --at 0 2 4",
    "relearn": f"{ATTACK} --kind relearn {FEW} --num-images 3 --at 0 2 4",
    "noise": f"{ATTACK} --kind noise {FEW}",
}
SAVED = "of 6 iterations are saved. To continue: python train.py --resume --out"
KEPT = "--gradient-checkpointing --preview-every 0, or a device with more free memory"
STEP = "torch.Tensor.addcdiv_"  # once for each of the 55 tensors, after its moments have changed
# fmt: off
ROWS = [
    # command     how it stops   before this call                       what the user reads
    ("sdd",       "Ctrl-C",      "weights.load", 1,                     "nothing has been written"),
    ("previews",  "SIGTERM",     "report.previews.save_png", 2,         "files that are written"),
    ("previews",  "Ctrl-C",      "report.previews.Previews.save", 2,    f"3 {SAVED}"),
    ("previews",  "Ctrl-C",      "report.previews.Previews.finish", 1,  "files that are written"),
    ("previews",  "full memory", "report.previews.Previews.measure", 1, KEPT),
    ("previews",  "full memory", "report.previews.Previews.finish", 1,  KEPT),
    ("previews",  "full disk",   "os.replace", 9,                       "No space left on device"),
    ("sdd",       "full disk",   "csv.DictWriter.writerow", 4,          "No space left on device"),
    ("sdd",       "SIGTERM",     "ema.update", 1,                       f"1 {SAVED}"),
    ("sdd",       "full memory", STEP, 3,                               "a smaller --batch-size"),
    ("sdd",       "full memory", STEP, 3 * 55 + 3,                      KEPT),
    ("sdd",       "full memory", "ema.update", 4,                       KEPT),
    ("sdd",       "full disk",   "weights.save_checkpoint", 2,          "No space left on device"),
    ("fp16",      "Ctrl-C",      "ema.update", 3,                       f"3 {SAVED}"),
    ("adversary", "Ctrl-C",      "ema.update", 3,                       f"3 {SAVED}"),
    ("images",    "SIGTERM",     "pipeline.generate_latents", 2,        "files that are written"),
    ("images",    "Ctrl-C",      "ema.update", 3,                       f"3 {SAVED}"),
    ("embedding", "SIGTERM",     "ema.update", 5,                       f"5 {SAVED}"),
    ("esd-x",     "Ctrl-C",      "ema.update", 2,                       f"2 {SAVED}"),
    ("esd-x",     "full memory", "ema.update", 5,                       "a smaller --batch-size"),
    ("rece",      "full memory", "closed_form.edit", 3,                 KEPT),
    ("word",      "Ctrl-C",      "attack.Attack.train_step", 4,         "files that are written"),
    ("tokens",    "SIGTERM",     "attack.Attack.train_step", 4,         "files that are written"),
    ("relearn",   "Ctrl-C",      "attack.Attack.train_step", 4,         "files that are written"),
    ("noise",     "SIGTERM",     "attack.Attack.measure", 4,            "files that are written"),
]
# fmt: on


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function: the folder of a command that was not stopped, made once."""
    folder = tmp_path_factory.mktemp("whole")

    def made(name):
        if not (folder / name).exists():
            assert run(COMMANDS[name], folder / name) == 0
        return folder / name

    return made


@pytest.mark.parametrize("name, how, where, number, said", ROWS)
def test_a_stopped_run_continues_to_the_same_bits(
    name, how, where, number, said, whole, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(pipeline, "SAVED", 4)  # images of the anchor are saved in two parts
    monkeypatch.setattr(attack, "ETAS", (1.0,))
    monkeypatch.setattr(attack, "SCALES", (1.0, 1.04))
    out = tmp_path / "o"
    with stopped(how, where, number):
        assert run(COMMANDS[name], out) == (130 if how in ("Ctrl-C", "SIGTERM") else 2)
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not list(tmp_path.rglob(".*"))  # no half file, no lock
    again = "train.py --resume" if (out / "run.json").exists() else COMMANDS[name]
    assert run(again, out) == 0
    assert differences(out, whole(name)) == []


def test_the_anchors_images_are_generated_once(tmp_path, monkeypatch):
    """A thousand images take hours: the signal does not wait for the rest of them."""
    generate, seeds = pipeline.generate_latents, []

    def watched(model, prompts, some, **how):
        seeds.append(some)
        return generate(model, prompts, some, **how)

    monkeypatch.setattr(pipeline, "SAVED", 4)
    monkeypatch.setattr(pipeline, "generate_latents", watched)
    with stopped("SIGTERM", "pipeline.generate_latents", 2):
        assert run(COMMANDS["images"], tmp_path / "o") == 130
    assert seeds == [[0, 1, 2, 3]]
    assert run("train.py --resume", tmp_path / "o") == 0
    assert seeds == [[0, 1, 2, 3], [4, 5]]


def test_a_run_continues_only_with_the_weights_that_it_began_with(whole, capsys, monkeypatch):
    out, load = whole("sdd"), weights.load  # made before the weights change

    def other_weights(*given):
        model = load(*given)
        for name, p in model.unet.named_parameters():
            if "attn2" in name:
                p.data.mul_(1.5)
        return model

    monkeypatch.setattr(weights, "load", other_weights)
    assert run("train.py --resume", out) == 2
    assert "The weights of toy have changed" in capsys.readouterr().err


def test_the_log_ends_where_the_checkpoint_does(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("iteration,loss\n0,1\n1,1\n2,0.")  # half a line at its end
    runs.cut_log(log, 5)
    assert log.read_text() == "iteration,loss\n0,1\n1,1\n"
    runs.cut_log(log, 1)
    assert log.read_text() == "iteration,loss\n0,1\n"


@pytest.mark.parametrize(
    "flags, changed",
    [
        ("", {}),
        ("--preview-every 0", dict(preview_every=0)),  # previews can be what does not fit
        ("--gradient-checkpointing", dict(gradient_checkpointing=True)),
        ("--device cuda --show-uncensored", dict(device="cuda", show_uncensored=True)),
        (f"{SDD.removeprefix('train.py')} --show-uncensored", dict(show_uncensored=True)),
    ],
)
def test_what_may_change_in_a_resumed_run(flags, changed, tmp_path):
    settings = presets.settle(train.parse(SDD.split()[1:]))
    runs.write_json(tmp_path / "run.json", {"args": settings})
    args = train.parse(["--resume", "--out", str(tmp_path), *flags.split()])
    assert runs.resumed(args, train.FREE, presets.settle) == settings | changed
