"""The rows of a table: which models are compared, and what each of them erases."""

import json
from pathlib import Path
from typing import NamedTuple

import weights
from pipeline import avoided_prompts
from support.errors import UserError


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
    erased = [*patch_rows(args.patch), *guided_rows(args.methods, args.avoid)]
    if args.suite == "toy":
        rows = group_by_concepts(erased)
    else:
        rows = [original(()), *erased]
    titles = [row.title for row in rows]
    for title in titles:
        if titles.count(title) > 1:
            raise UserError(
                f"Two rows would be called {title}: give the patches different names in --patch."
            )
    return rows


def original(concepts):
    return Row("original", (), "sd", "sd", concepts)


def group_by_concepts(erased):
    """Each set of concepts: the original first, then the rows that erase this set."""
    sets = list(dict.fromkeys(row.concepts for row in erased)) or [()]
    rows = []
    for concepts in sets:
        rows.append(original(concepts))
        rows.extend(row for row in erased if row.concepts == concepts)
    return rows


def guided_rows(methods, avoid):
    """One row per method of --methods; all of them avoid the concepts of --avoid."""
    for method in methods:
        avoided_prompts(method, avoid)  # refuses what cannot be avoided
    return [Row(method, (), method, method, tuple(avoid)) for method in methods]


def patch_files(patches):
    """["NAME=FILE", …] -> {name: [file, …]}."""
    files = {}
    for text in patches:
        name, _, file = text.partition("=")
        if not file or not name:
            raise UserError(f"--patch {text}: write NAME=FILE.")
        if name == "original":
            raise UserError(f"--patch {text}: the untouched model has this name, choose another.")
        files.setdefault(name, []).append(file)
    return files


def patch_rows(patches):
    """One row per name in ["NAME=FILE", …]."""
    return [patch_row(name, files) for name, files in patch_files(patches).items()]


def patch_row(name, files):
    """The row of a patch, or of several that erase the same concepts with the same method."""
    about = [read_about(file) for file in files]
    concepts = {erased_concepts(*read) for read in about}
    if len(concepts) > 1:
        listed = "; ".join(sorted(", ".join(one) for one in concepts))
        raise UserError(
            f"The patches named {name} erase different concepts ({listed}): give each its own name."
        )
    methods = {paper_name(*read) for read in about}
    if len(methods) > 1:
        raise UserError(
            f"The patches named {name} come from different methods ({', '.join(sorted(methods))}): "
            "give each its own name."
        )
    recipes = [recipe(settings) for _, settings in about if settings]
    for other in recipes[1:]:
        keys = []
        for key in sorted(recipes[0].keys() | other):
            if (recipes[0].get(key) or None) != (other.get(key) or None):
                keys.append(key)
        if keys:
            raise UserError(
                f"The patches named {name} were trained with different settings "
                f"({', '.join(keys)}): give each its own name."
            )
    contents = {metadata.get("sha256", file) for file, (metadata, _) in zip(files, about)}
    if len(contents) < len(files):
        raise UserError(
            f"Two patches named {name} hold the same weights, whose images would count twice: give "
            "one of them."
        )
    return Row(name, tuple(files), "sd", methods.pop(), concepts.pop())


def read_about(file):
    """A patch's metadata {key: text} and the arguments of its training {name: value}."""
    metadata = weights.read(file)[1]
    try:
        settings = json.loads(metadata.get("args", "{}"))
    except ValueError as e:
        raise damaged(file, e) from e
    if not isinstance(settings, dict):
        raise damaged(file, "args is not an object")
    concept = settings.get("concept", [])
    if not (isinstance(concept, list) and all(isinstance(text, str) for text in concept)):
        raise damaged(file, "concept is not a list of texts")
    if not isinstance(settings.get("erase_scale", 1.0), int | float):
        raise damaged(file, "erase_scale is not a number")
    return metadata, settings


# Arguments of train.py that may differ between the patches of a row: the seed, the machine, what is
# shown and saved, and the path of a loss (its contents, loss_sha256, must be the same).
NO_RECIPE = (
    "seed device revision report_to show_uncensored deterministic compile gradient_checkpointing "
    "save_every export_every preview preview_every preview_steps preview_guidance_scale loss"
).split()


def recipe(settings):
    """The arguments of a training that patches of one row must have in common."""
    return {key: value for key, value in settings.items() if key not in NO_RECIPE}


def damaged(file, why):
    return UserError(f"{file}: its metadata is damaged ({why}): make it again with train.py.")


def erased_concepts(metadata, settings):
    """The concepts of a patch. The metadata also has them as one text, joined with commas.

    A concept may contain a comma itself ("star, red"), so only the list is safe to use. Those of
    toy models are in small letters, as their worlds write words.
    """
    concepts = settings.get("concept") or metadata.get("concepts", "").split(", ")
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
    files = [file for group in patch_files(args.patch).values() for file in group]
    if args.suite == "toy" and not args.model and not files:
        return "toy"
    model = weights.choose_model(args.model, files)
    if args.suite == "toy" and model not in weights.TOYS and not Path(model).is_dir():
        raise UserError(
            f"The suite toy measures the toy models ({', '.join(weights.TOYS)}), and not {model}: "
            "choose another suite or other patches."
        )
    return model
