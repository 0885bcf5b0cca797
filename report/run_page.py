"""The page of a training run: before and after, the film, the curves, how to use the result."""

import csv
import math
import shlex
from pathlib import Path

import weights
from presets import METHODS, preset_values
from report.blocks import SDD, in_words, made, path_from_project, read_image
from report.charts import line_chart, running_mean
from report.previews import MODELS, finished_previews, image_file, thin_out
from support.runs import read_json

SIDE = 512  # pixels of an image before and after, at most
FILM_SIDE = 256  # and of an image of the film
FRAMES = 40  # of the film at most: 40 × 6 prompts × 2 JPEGs of 256 pixels a side are about 5 MB
MEAN_FROM = 10  # iterations: shorter runs get no running mean
CURVES = {
    "Loss": {"loss": "each iteration"},
    "Learning rate": {"lr": "learning rate"},
    "Gap: concept to empty prompt": {"gap_student": "student", "gap_teacher": "teacher"},
    "Drift of the empty prompt": {"drift_student": "student", "drift_teacher": "teacher"},
}
FIGURES = [key for curve in CURVES.values() for key in curve]  # columns of log.csv
KINDS = {
    "erased": "names the concept: should change",
    "member": "names a member of the concept: should change",
    "implied": "implies the concept: should change",
    "stay": "should stay",
}
RESUME = "Reload this page to see the newest state. After a stop, this command continues the run:"
NO_PREVIEWS = "This run has no images, because it was started with --preview-every 0."
WITH_DIFFUSERS = "With diffusers (pip install diffusers), also in the project's folder:"
DIFFUSERS = """\
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

pipeline = StableDiffusionPipeline.from_pretrained({source})
pipeline.unet.load_state_dict(load_file({patch}), strict=False)
pipeline({prompt}).images[0].save("erased.png")"""
GAP_AND_DRIFT = (
    "Gap: mean |e(c_s) − e(c_0)|², how differently the model answers the concept and the empty "
    "prompt. Drift: mean |e(c_0) − e°(c_0)|², how far its answer to the empty prompt has moved "
    "from the original's. Both are measured on fixed latents at each preview."
)
PAPERS = {  # {first word of the method: its paper}
    "sdd": SDD,
    "esd": ("ESD", "2303.07345"),
    "ablate": ("Ablating Concepts", "2303.13516"),
    "all": ("All-but-One", "2312.12807"),
    "uce": ("UCE", "2308.14761"),
    "mace": ("MACE", "2403.06135"),
    "rece": ("RECE", "2407.12383"),
    "speed": ("SPEED", "2503.07392"),
}


def run_page(folder):
    """The page of the run in a folder; see blocks.py."""
    run = read_json(folder / "run.json")
    settings, rows = run["args"], read_log(folder / "log.csv")
    finished = (folder / "erased.safetensors").is_file()
    count = int(rows[-1]["iteration"]) + 1 if rows else 0
    done = f"{count} of {settings['iters']} iterations"
    state = (
        f"{'Finished' if finished else 'Not finished'}: {done}. Model {settings['model']}, "
        f"preset {settings['preset']}, seed {settings['seed']}."
    )
    intro = [{"text": state}]
    if not finished:
        resume = ["python", "train.py", "--resume", "--out", path_from_project(folder)]
        intro += [{"text": RESUME}, {"code": shlex.join(resume), "name": "Command that continues"}]
    return {
        "heading": f"Erasing {in_words(settings['concept'])} with {settings['method']}",
        "date": run["date"],
        "subtitle": f"{run['date']}, {training_time(run) or done}",
        "intro": intro,
        "sections": [
            ("compare", "Before and after", before_and_after(folder, run, finished)),
            ("film", "Student and teacher over the iterations", film(folder, settings)),
            ("curves", "Curves", curves(rows)),
            ("use", "Generate images with the result", use(folder, run) if finished else []),
            made(run, settings, *differences(settings)),
        ],
        "model": settings["model"],
        "paper": PAPERS[settings["method"].partition("-")[0]],
    }


def training_time(run):
    """ "40 iterations in 1 min 5 s"; None before the end of the run."""
    if "training" not in run:
        return None
    minutes, seconds = divmod(int(run["training"]["seconds"]), 60)
    time = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    time = time.replace(" ", "\N{NO-BREAK SPACE}")
    return f"{run['training']['iterations']} iterations in {time}"


# -------------------------------------------------------------------------------------- images
def before_and_after(folder, run, finished):
    """A card per prompt, from the newest preview."""
    settings, previews = run["args"], finished_previews(folder)
    if not previews:
        none_yet = "There are no images of this run yet."
        return [{"text": none_yet if settings["preview_every"] else NO_PREVIEWS}]
    model, done = METHODS[settings["method"]].output, previews[-1]
    after = f"the {model} after {done} iterations"
    if finished and done == settings["iters"]:
        after = f"the {model}, which is the result"
    about = (
        f"The same prompt and the same noise, before (the original model) and after ({after}). "
        f"The noise has the seeds {in_words(run['preview_seeds'])}, one per prompt."
    )
    models = {"before": "original", "after": model}
    pairs = cards(folder, settings, models, done, SIDE)
    for card, kind in zip(pairs, run["preview_kinds"]):
        card["kind"] = KINDS.get(kind)
    return [{"text": about}, {"pairs": pairs}]


def film(folder, settings):
    """A frame per preview, with a card per prompt."""
    frames, previews = [], finished_previews(folder)
    for done in thin_out(previews, FRAMES):
        models = {model: model for model in MODELS}
        pairs = cards(folder, settings, models, done, FILM_SIDE, f" after {done} iterations")
        frames.append({"done": done, "pairs": pairs})
    blocks = [{"film": frames}] if frames else []
    if len(frames) < len(previews):
        number = f"{len(frames)} of {len(previews)} previews, evenly spaced"
        blocks.insert(0, {"text": f"{number}; the others are in previews/.", "style": "soft"})
    return blocks


def cards(folder, settings, models, done, side, when=""):
    """A card per prompt. models: {caption: model}; when: ends the images' alternative texts."""
    found = []
    for n, prompt in enumerate(settings["preview"]):
        images = {}
        for caption, model in models.items():
            file = image_file(folder, model, n, done)
            images[caption] = read_image(file, f"{prompt}, {caption}{when}", side)
        found.append({"prompt": prompt, "images": images})
    return found


# -------------------------------------------------------------------------------------- figures
def read_log(file):
    """The rows of log.csv, {column: number}, without empty cells. A kill can cut the last line."""
    text, rows = file.read_text(encoding="utf-8") if file.exists() else "", []
    for row in csv.DictReader(text.rpartition("\n")[0].splitlines()):
        numbers = {key: float(row[key]) for key in ("iteration", *FIGURES) if row[key]}
        rows.append({key: x for key, x in numbers.items() if math.isfinite(x)})
    return rows


def curves(rows):
    """A chart for each of CURVES that has figures."""
    charts = []
    for title, columns in CURVES.items():
        series = {}
        for key, name in columns.items():
            if line := [(row["iteration"], row[key]) for row in rows if key in row]:
                series[name] = line
        jumps = title == "Loss" and len(line) >= MEAN_FROM  # because t and z_t are random
        if jumps:
            window = max(5, len(line) // 10)
            series[f"mean of the last {window} iterations"] = running_mean(line, window)
        if series:
            charts.append(line_chart(title, series, faint=jumps))
    if not charts:
        return []
    return [
        {"charts": charts},
        {"text": GAP_AND_DRIFT, "style": "soft"},
        {"text": "log.csv has the figures of every iteration.", "style": "soft"},
    ]


# -------------------------------------------------------------------------------------- settings
def differences(settings):
    """Which settings differ from the preset. Nothing for a closed form: most have no effect."""
    name, preset = settings["method"], settings["preset"]
    method = METHODS[name]
    if method.loss is None:
        return []
    expected = preset_values(settings, method)
    del expected["preview"]  # the prompts are above, with their images
    rows = [
        (key.replace("_", " "), f"{in_words(settings[key])} (preset: {in_words(value)})")
        for key, value in expected.items()
        if settings[key] != value
    ]
    if not rows:
        return [{"text": f"Every setting has the value of the preset {preset} for {name}."}]
    heading = f"Differs from the preset {preset}"
    return [{"text": f"{heading}:"}, {"table": rows, "style": "settings", "label": heading}]


# -------------------------------------------------------------------------------------- use it
def use(folder, run):
    """The command that generates the first preview again, and Python that does it in diffusers."""
    settings = run["args"]
    model, revision, prompt = settings["model"], settings["revision"], settings["preview"][0]
    patch = path_from_project(folder / "erased.safetensors")
    if model not in weights.TOYS and Path(model).is_dir():
        model = path_from_project(model)
    words = ["--model", model, "--patch", patch]
    words += ["--revision", revision] if revision else []
    words += ["--seed", run["preview_seeds"][0], "--scheduler", "ddim"]
    words += ["--steps", settings["preview_steps"]]
    words += ["--guidance-scale", settings["preview_guidance_scale"]]
    # After "--", a prompt that begins with "-" is not read as a flag.
    words = [*words, "--", prompt] if prompt.startswith("-") else [prompt, *words]
    command = shlex.join(["python", "generate.py", *map(str, words)])
    blocks = [
        {"text": "In the project's folder, the one with train.py:"},
        {"code": command, "name": "Command that generates an image"},
    ]
    if settings["train_params"] == "embedding":  # the patch is not for the UNet
        return blocks
    if model in weights.TOYS:
        model = f"toy/{weights.TOYS[model].name}"
    source = f"{model!r}, revision={revision!r}" if revision else repr(model)
    snippet = DIFFUSERS.format(source=source, patch=repr(patch), prompt=repr(prompt))
    return [*blocks, {"text": WITH_DIFFUSERS}, {"code": snippet, "name": "Python for diffusers"}]
