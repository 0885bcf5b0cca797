"""The rows of a table: which models are compared, and what each of them erases."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import weights
from pipeline import avoided_prompts
from support.errors import UserError
from support.statistics import ORIGINAL


class Row(NamedTuple):
    """One row of the table: the model with a patch in it, or guided by a method, or as it is.

    `patches` are files. Several of them (training seeds, for example) share the row's images: each
    generates its part, and the figures are pooled.
    """

    name: str  # as in the table
    patches: tuple
    guidance: str  # a key of guidance.GUIDANCE; "sd": plain classifier-free guidance
    method: str  # its name in the paper's tables: "sdd", "esd-x-3", "sld-max"
    concepts: tuple  # what the row erases

    @property
    def title(self):
        """The name of the row's folder of images."""
        text = "-".join([self.name, *self.concepts])
        text = text.replace("/", "-").replace(" ", "-")
        return text.encode()[:100].decode(errors="ignore")  # file systems count bytes


def read_rows(args):
    """The rows that the arguments ask for. UserError if two of them would share a folder.

    In the suite toy each set of concepts has its own prompts, and so its own row of the original.
    """
    patches = weights.named_patches(args.patch).items()
    erased = [patch_row(name, files) for name, files in patches if files]
    for method in args.guidance:
        avoided_prompts(method, args.avoid)  # UserError if it cannot avoid them
        erased.append(Row(method, (), method, method, tuple(args.avoid)))
    rows = [Row(ORIGINAL, (), "sd", "sd", ()), *erased]
    if args.suite == "toy":
        rows = []
        for concepts in dict.fromkeys(row.concepts for row in erased) or [()]:
            rows.append(Row(ORIGINAL, (), "sd", "sd", concepts))
            rows += [row for row in erased if row.concepts == concepts]
    title, times = Counter(row.title for row in rows).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"Two rows would be called {title}: give the patches different names in --patch."
        )
    return rows


def patch_row(name, files):
    """The row of a patch, or of several that erase the same concepts with the same method."""
    about = []
    for file in files:
        metadata = weights.read(file)[1]
        about.append((metadata, weights.patch_settings(file, metadata)))
    concepts = {erased_concepts(*read) for read in about}
    methods = {paper_name(*read) for read in about}
    keys = different_settings([settings for _, settings in about if settings])
    problem = ""
    if len(concepts) > 1:
        problem = f"erase different concepts ({'; '.join(sorted(map(', '.join, concepts)))})"
    elif len(methods) > 1:
        problem = f"come from different methods ({'; '.join(sorted(methods))})"
    elif keys:
        problem = f"were trained with different settings ({', '.join(keys)})"
    if problem:
        raise UserError(f"The patches named {name} {problem}: give each its own name.")
    contents = {metadata.get("sha256", file) for file, (metadata, _) in zip(files, about)}
    if len(contents) < len(files):
        raise UserError(
            f"Two patches named {name} hold the same weights, whose images would count twice: give "
            "one of them."
        )
    return Row(name, tuple(files), "sd", methods.pop(), concepts.pop())


# Arguments of train.py that may differ between the patches of a row: the seed, the machine, what is
# shown and saved, and the path of a loss (its contents, loss_sha256, must be the same).
NO_RECIPE = (
    "seed device revision report_to show_uncensored deterministic compile gradient_checkpointing "
    "save_every export_every preview preview_every preview_steps preview_guidance_scale loss"
).split()


def different_settings(trainings):
    """The arguments, but for NO_RECIPE, in which trainings differ. 0, None and [] are equal."""
    keys = {key for settings in trainings for key in settings} - set(NO_RECIPE)
    values = {key: [settings.get(key) or None for settings in trainings] for key in keys}
    return sorted(key for key in keys if any(value != values[key][0] for value in values[key]))


def erased_concepts(metadata, settings):
    """The concepts of a patch. The metadata also has them as one text, joined with commas.

    A concept may contain a comma itself ("star, red"), so only the list is safe to use. Those of
    toy models are in small letters, as their worlds write words.
    """
    concepts = settings.get("concept") or metadata.get("concepts", "").split(", ")
    concepts = [concept for concept in concepts if concept]  # the patch may name none
    if metadata.get("model") in weights.TOYS:
        concepts = [concept.lower() for concept in concepts]
    return tuple(concepts)


def paper_name(metadata, settings):
    """The method's name in the paper's tables. ESD's contains s_s: esd-x-3.

    With a loss of the user's own it is this loss: no paper has a figure of it.
    """
    method = metadata.get("method", "")
    if settings.get("loss"):
        return f"{method} with {Path(settings['loss']).name}"
    if method.startswith("esd"):
        return f"{method}-{settings.get('erase_scale', 1.0):g}"
    return method


def choose_model(args):
    """--model; without it the model that the patches were made for; without patches the default.

    UserError if the suite toy meets a model that is not a toy model. Downloads nothing.
    """
    files = [file for group in weights.named_patches(args.patch).values() for file in group]
    if args.suite == "toy" and not args.model and not files:
        return "toy"
    model = weights.choose_model(args.model, files)
    if args.suite == "toy" and model not in weights.TOYS and not Path(model).is_dir():
        raise UserError(
            f"The suite toy measures the toy models ({', '.join(weights.TOYS)}), and not {model}: "
            "choose another suite or other patches."
        )
    return model


def turns(jobs, patches):
    """For each job, the number of the patch that generates it.

    The patches take turns at the images of each prompt, so their shares are nearly equal. Different
    prompts begin with different patches.
    """
    first, seen, found = {}, Counter(), []
    for job in jobs:
        start = first.setdefault(job.prompt, len(first))
        found.append((start + seen[job.prompt]) % patches)
        seen[job.prompt] += 1
    return found
