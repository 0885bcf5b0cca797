"""The numbers of the toy models' tables (docs/results.md), and the words of the commands.

workflow/plan.py makes these tables. evaluation/own_row.py measures a loss of your own like their
rows, so both take their numbers from here.
"""

from toy import worlds

SEEDS = (2, 3, 4)  # of trainings and attacks
STEPS = 12  # of the sampler, for the images of tables and previews
EVERY = 40  # iterations between two previews, and between two exports
THREE = {"star": "circle", "red": "blue", "striped": "plain"}  # {concept: its anchor}
LONGER = ["--iters", 300]  # of trainings on several concepts

# {kind of attack: the steps after which its images are counted}. The columns of the table need 160
# (word) and 10 (relearn), see evaluation/attacks.py. noise has no steps.
AT = {
    "word": (0, 40, 80, 120, 160, 240, 320, 480),
    "tokens": (0, 80, 160),
    "relearn": (0, 5, 10, 15, 20, 30),
    "noise": (),
}
LAST_STEP = 320  # of the attack `word` on most models


def train_words(model, concepts, more, seed, out):
    """The words of train.py. more: further words, of the method."""
    words = ["--model", model, "--concept", *concepts, *more, "--seed", seed]
    words += ["--preview", concepts[0], "--preview-steps", STEPS, "--device", "cpu"]
    if scale := worlds.of(model).GUIDANCE_SCALE:
        words += ["--preview-guidance-scale", scale]
    return as_text([*words, "--out", out])


def attack_words(model, concept, kind, patch, seed, more, out):
    words = ["--model", model, "--concept", concept, "--kind", kind, "--patch", patch]
    return as_text([*words, "--seed", seed, *more, *sampling(model), "--out", out])


def eval_words(words, model, out):
    """The words of eval.py. words: the suite, the rows and the number of images."""
    return as_text([*words, "--model", model, *sampling(model), "--threads", 1, "--out", out])


def sampling(model):
    """The words of attack.py and eval.py for the sampler and the device."""
    words = ["--steps", STEPS]
    if scale := worlds.of(model).GUIDANCE_SCALE:
        words += ["--guidance-scale", scale]
    return [*words, "--device", "cpu"]


def as_text(words):
    return [str(word) for word in words]
