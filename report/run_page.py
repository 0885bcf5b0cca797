"""The content of a training run's page: before and after, the film, the curves, how to use it."""

import os
import shlex
from pathlib import Path

import weights
from presets import METHODS, PRESETS, preset_values
from report.charts import line_chart, running_mean
from report.inputs import read_data_uri, read_dict, read_json, read_list, read_log
from report.previews import finished_previews, image_file, thin_out

ROOT = Path(__file__).parent.parent  # the project's folder
SIDE = 512  # pixels of an image before and after, at most
FILM_SIDE = 256  # and of an image of the film
FRAMES = 40  # of the film at most: 40 × 6 prompts × 2 JPEGs of 256 pixels a side are about 5 MB
MEAN_FROM = 10  # iterations: shorter runs get no running mean
ROWS = 20  # of the table of figures, in a run without previews
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
NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit
PAPERS = {
    "sdd": ("SDD", "2307.05977"),
    "esd-x": ("ESD", "2303.07345"),
    "esd-u": ("ESD", "2303.07345"),
    "ablate": ("Ablating Concepts", "2303.13516"),
    "ablate-noise": ("Ablating Concepts", "2303.13516"),
    "all-but-one": ("All-but-One", "2312.12807"),
    "uce": ("UCE", "2308.14761"),
    "mace": ("MACE", "2403.06135"),
    "rece": ("RECE", "2407.12383"),
    "speed": ("SPEED", "2503.07392"),
}


def run_content(folder):
    """What run.html.j2 shows of the run in a folder: {name: value}."""
    problems = []
    run = read_json(folder / "run.json", problems)
    settings = read_dict(run, "args")
    prompts = [str(prompt) for prompt in read_list(settings, "preview")]
    rows = read_log(folder / "log.csv", FIGURES)
    all_previews = finished_previews(folder)
    finished = (folder / "erased.safetensors").is_file()
    return {
        "settings": settings,
        "concept": in_words(settings.get("concept")),
        "date": run.get("date"),
        "training_time": training_time(read_dict(run, "training")),
        "done": int(rows[-1]["iteration"]) + 1 if rows else 0,
        "finished": finished,
        "seeds": in_words(read_list(run, "preview_seeds")),
        "after": name_of_after(settings, all_previews, finished),
        "pairs": before_and_after(folder, settings, prompts, all_previews, run, problems),
        "frames": film(folder, prompts, thin_out(all_previews, FRAMES), problems),
        "number_of_previews": len(all_previews),
        "charts": curves(rows),
        "columns": ["iteration", *FIGURES],
        "rows": rows_for_table(rows),
        "generate": generate_command(folder, settings, prompts, run),
        "diffusers": diffusers_snippet(folder, settings, prompts),
        "differences": differences(settings),
        "command": run.get("command"),
        "versions": read_dict(run, "versions"),
        "paper": PAPERS.get(settings.get("method")),
        "readme": link_to_readme(folder),
        "problems": list(dict.fromkeys(problems)),
    }


def in_words(value):
    """A setting as text."""
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        return ", ".join(str(x) for x in value)
    return str(value)


def training_time(training):
    """ "40 iterations in 1 min 5 s", from run.json.

    None before the end of the run, and if a kill came between the last checkpoint and the note.
    """
    try:
        minutes, seconds = divmod(int(training["seconds"]), 60)
        iterations = int(training["iterations"])
    except (KeyError, TypeError, ValueError):
        return None
    time = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return f"{iterations} iterations in {time.replace(' ', NO_BREAK_SPACE)}"


# -------------------------------------------------------------------------------------- images
def output_of(settings):
    """Which model is the result of the run: "teacher" or "student"."""
    method = METHODS.get(settings.get("method"))
    return method.output if method else "student"


def name_of_after(settings, previews, finished):
    if not previews:
        return None
    if finished and previews[-1] == settings.get("iters"):
        return f"the {output_of(settings)}, which is the result"
    return f"the {output_of(settings)} after {previews[-1]} iterations"


def before_and_after(folder, settings, prompts, previews, run, problems):
    """[{prompt, kind, before, after}], a dict per prompt, from the newest preview."""
    if not previews:
        return []
    kinds = read_list(run, "preview_kinds")
    output = output_of(settings)
    pairs = []
    for n, prompt in enumerate(prompts):
        before = image_file(folder, "original", n, 0)
        after = image_file(folder, output, n, previews[-1])
        pairs.append(
            {
                "prompt": prompt,
                "kind": KINDS.get(kinds[n]) if n < len(kinds) else None,
                "before": read_data_uri(before, SIDE, problems),
                "after": read_data_uri(after, SIDE, problems),
            }
        )
    return pairs


def film(folder, prompts, previews, problems):
    """[{done, images: [{prompt, student, teacher}]}], a frame per preview."""
    frames = []
    for done in previews:
        images = []
        for n, prompt in enumerate(prompts):
            image = {"prompt": prompt}
            for model in ("student", "teacher"):
                file = image_file(folder, model, n, done)
                image[model] = read_data_uri(file, FILM_SIDE, problems)
            images.append(image)
        frames.append({"done": done, "images": images})
    return frames


# -------------------------------------------------------------------------------------- figures
def curves(rows):
    """A chart for each of CURVES that has figures."""
    charts = []
    for title, columns in CURVES.items():
        series = {}
        for key, name in columns.items():
            line = [(row["iteration"], row[key]) for row in rows if row[key] is not None]
            if line:
                series[name] = line
        if title == "Loss" and len(line) >= MEAN_FROM:
            charts.append(loss_chart(title, series))
        elif series:
            charts.append(line_chart(title, series))
    return charts


def loss_chart(title, series):
    """Each iteration's loss, and its running mean: the loss jumps, because t and z_t are random."""
    ((name, line),) = series.items()
    window = max(5, len(line) // 10)
    mean = {f"mean of the last {window} iterations": running_mean(line, window)}
    return line_chart(title, series | mean, faint=name)


def rows_for_table(rows):
    """The rows of previews, which have all figures; in a run without previews some, evenly."""
    complete = [row for row in rows if row["gap_student"] is not None]
    return thin_out(complete, FRAMES) if complete else thin_out(rows, ROWS)


# -------------------------------------------------------------------------------------- settings
def differences(settings):
    """[(setting, value, the preset's value)]; None if the preset is unknown or has no effect."""
    method = METHODS.get(settings.get("method"))
    needed = {"preset", "concept", "method", "batch_size"}
    if (
        method is None
        or method.loss is None
        or not needed <= settings.keys()
        or settings["preset"] not in PRESETS
    ):
        return None
    expected = preset_values(settings, method)
    expected |= {"train_params": method.train_params, "latents": method.latents}
    del expected["preview"]  # the prompts are above, with their images
    return [
        (key, settings[key], value)
        for key, value in expected.items()
        if key in settings and settings[key] != value
    ]


# -------------------------------------------------------------------------------------- use it
def path_from_project(path):
    """The path as a user types it in the project's folder."""
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()


def link_to_readme(folder):
    """A relative link to the project's README; None if the folder is not in the project."""
    if not folder.resolve().is_relative_to(ROOT):
        return None
    return Path(os.path.relpath(ROOT / "README.md", folder.resolve())).as_posix()


def generate_command(folder, settings, prompts, run):
    """The command that generates the first preview again, with the erased model."""
    model = str(settings.get("model"))
    if model not in weights.TOYS and Path(model).is_dir():
        model = path_from_project(model)
    words = ["python", "generate.py", *prompts[:1], "--model", model]
    words += ["--patch", path_from_project(folder / "erased.safetensors")]
    seeds = read_list(run, "preview_seeds")
    flags = {
        "--revision": settings.get("revision"),
        "--seed": seeds[0] if seeds else None,
        "--scheduler": "ddim",
        "--steps": settings.get("preview_steps"),
        "--guidance-scale": settings.get("preview_guidance_scale"),
    }
    for flag, value in flags.items():
        if value is not None:
            words += [flag, str(value)]
    if prompts and prompts[0].startswith("-"):  # it would be read as a flag
        words = [*words[:2], *words[3:], "--", prompts[0]]
    return shlex.join(words)


def diffusers_snippet(folder, settings, prompts):
    """Python that loads the patch in diffusers; None if the patch is not for the UNet."""
    if settings.get("train_params") == "embedding":
        return None
    model = str(settings.get("model"))
    if model in weights.TOYS:
        model = f"toy/{weights.TOYS[model].name}"
    elif Path(model).is_dir():
        model = path_from_project(model)
    arguments = repr(model)
    if settings.get("revision"):
        arguments += f", revision={str(settings['revision'])!r}"
    patch = path_from_project(folder / "erased.safetensors")
    prompt = prompts[0] if prompts else ""
    return f"""\
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

pipeline = StableDiffusionPipeline.from_pretrained({arguments})
pipeline.unet.load_state_dict(load_file({patch!r}), strict=False)
pipeline({prompt!r}).images[0].save("erased.png")"""
