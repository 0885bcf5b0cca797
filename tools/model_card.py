"""The model card of an exported model: what it was made of, what was erased and how, what was measured, what it cannot do."""

import hashlib
import json
from pathlib import Path

import weights
from support.errors import UserError

LICENCES = {
    "toy": ("mit", "MIT"),
    weights.DEFAULT_MODEL: ("creativeml-openrail-m", "CreativeML OpenRAIL-M"),
}
DETAILS = {
    "concept",
    "method",
    "model",
    "device",
    "preview",
    "preview_every",
    "preview_steps",
    "preview_guidance_scale",
    "save_every",
    "export_every",
}  # arguments of train.py that stand elsewhere in the card, or do not change the result
SETTINGS = "suite", "limit", "scheduler", "steps", "guidance_scale", "seed"  # of eval.py
USE = """```python
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained("THIS FOLDER")
pipeline("a prompt").images[0].save("picture.png")
```
"""
LIMITS = """## Limits

An erased model answers a concept's prompt about as it answers the empty one: the concept can still turn up as often as it does
unasked. Other words for it, other languages, other samplers, images as input or further training can bring it back, and what lies
near it may suffer. It is a safer default, not a proof of safety; measure what you rely on.
"""


def figures(patch_file):
    """The tables that eval.py wrote in the patch's folder, or in a folder of it, about this patch: it notes the file's hash."""
    digest = hashlib.sha256(patch_file.read_bytes()).hexdigest()[:16]
    tables = []
    for file in sorted(
        [*patch_file.parent.glob("results.json"), *patch_file.parent.glob("*/results.json")]
    ):
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))["settings"]
            if digest in settings["files"].values():
                about = ", ".join(f"{key} {settings[key]}" for key in SETTINGS)
                tables.append(
                    f"`eval.py` ({about}):\n\n{file.with_name('table.md').read_text(encoding='utf-8').strip()}\n"
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not eval.py's, or of an older one that noted no hash
    return tables


def erased(base, patch_file, patch):
    """The card's sections about a patch. `patch`: its metadata. UserError if that is damaged."""
    try:
        settings = {
            key: value
            for key, value in json.loads(patch.get("args", "{}")).items()
            if key not in DETAILS
        }
    except (ValueError, AttributeError) as e:
        raise UserError(
            f"{patch_file}: its metadata is damaged ({e}): make it again with train.py."
        ) from e
    noted = {key: patch.get(key, "not noted") for key in ("concepts", "method", "versions")}
    return [
        "## What was erased, and how\n",
        f"- concepts: {noted['concepts']}",
        f"- method: {noted['method']}",
        f"- base: {base}, fingerprint of what was trained {patch['base_fingerprint']}",
        f"- versions: {noted['versions']}\n",
        "Settings of `train.py`:\n",
        f"```json\n{json.dumps(settings, indent=1, ensure_ascii=False)}\n```\n",
        "## Figures\n",
        *(figures(patch_file) or ["None were measured.\n"]),
        LIMITS,
    ]


def card(model, layout, dtype, patch_file=None, patch=None):
    """The card, in Markdown. `layout`: "diffusers" or "single-file"; `patch`: its metadata, where there is one."""
    base = Path(model).name if Path(model).exists() else model  # no path of this machine
    tag, licence = LICENCES.get(model, (None, f"As the base weights', {base}: look there"))
    front = [f"license: {tag}"] * bool(tag) + [f"base_model: {model}"] * (
        model == base and "/" in model
    )
    folder = layout == "diffusers"
    title = (
        f"{base} without {patch.get('concepts', 'concepts that its patch does not name')}"
        if patch
        else f"{base}, converted"
    )
    what = (
        erased(base, patch_file, patch)
        if patch
        else [f"No patch was applied: these are the tensors of {base}.\n"]
    )
    about = (
        "a folder in diffusers' layout" if folder else "one file in the original (CompVis) layout"
    )
    text = [
        "---",
        *front,
        "pipeline_tag: text-to-image",
        *["library_name: diffusers"] * folder,
        f"---\n# {title}\n",
        f"Written by `convert.py` of SDD (safe self-distillation, arXiv 2307.05977): {about}, {dtype}. Base model: {base}.\n",
        *[USE] * folder,
        *what,
        f"## Licence\n\n{licence}. Converting and erasing do not change it.\n",
    ]
    return "\n".join(text)
