"""The model card of an exported model: base, what was erased and how, figures, limits, licence."""

import hashlib
import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

import weights
from support.errors import UserError
from toy import worlds

LICENCES = {  # (name on the hub, name for people)
    weights.DEFAULT_MODEL: ("creativeml-openrail-m", "CreativeML OpenRAIL-M"),
    **{name: world.LICENCE for name, world in worlds.MODELS.items()},
}
LAYOUTS = {
    "diffusers": "a folder in diffusers' layout",
    "single-file": "one file in the original (CompVis) layout",
}
DETAILS = {  # arguments of train.py that are elsewhere in the card, or do not change the result
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
    "show_uncensored",
}
EVAL_SETTINGS = ("suite", "limit", "scheduler", "steps", "guidance_scale", "seed")  # of eval.py

CARD = """---
{{ card_data }}
---

# {{ title }}

Written by SDD (safe self-distillation, arXiv 2307.05977).

- base model: {{ base }}
- format: {{ layout }}, {{ dtype }}
{% if library_name %}
```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("THIS FOLDER")
pipeline("a prompt").images[0].save("image.png")
```
{% endif %}
{{ changes }}

## Licence

{{ licence }}. Converting and erasing do not change it.
"""
UNPATCHED = "No patch was applied: these are the tensors of {base}."
PATCHED = """## What was erased, and how

- concepts: {concepts}
- method: {method}
- base: {base}, fingerprint of the tensors before training {base_fingerprint}
- versions: {versions}

Settings of `train.py`:

```json
{settings}
```

## Figures

{figures}

## Limits

For a prompt with an erased concept, the model answers about as it does for the empty prompt. So the
concept can still appear as often as it does without being asked for. Other words for it, other
languages, other samplers, images as input or further training can bring it back, and similar
concepts may suffer. It is a safer default, not a proof of safety: measure what you rely on."""


def figures(patch_file):
    """The tables that eval.py wrote about this patch: next to it, one folder below, or in tables/.

    eval.py notes the file's hash in its settings.
    """
    digest = hashlib.sha256(patch_file.read_bytes()).hexdigest()[:16]
    folder = patch_file.parent
    tables = []
    places = [*folder.glob("results.json"), *folder.glob("*/results.json")]
    for file in sorted([*places, *Path("tables").glob("*/results.json")]):
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))["settings"]
            if digest not in settings["files"].values():
                continue
            about = ", ".join(f"{key} {settings[key]}" for key in EVAL_SETTINGS)
            table = file.with_name("table.md").read_text(encoding="utf-8").strip()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not eval.py's, or of an older version without hashes
        tables.append(f"`eval.py` ({about}):\n\n{table}")
    return "\n\n".join(tables) or "No table of `eval.py` about this patch was found."


def about_patch(base, patch_file, metadata):
    """The card's sections about a patch. UserError if the metadata is damaged."""
    settings = {}
    try:
        for key, value in json.loads(metadata.get("args", "{}")).items():
            if key == "loss" and value:
                value = Path(value).name  # no path of this machine
            if key not in DETAILS:
                settings[key] = value
    except (ValueError, AttributeError) as e:
        raise UserError(
            f"{patch_file}: its metadata is damaged ({e}): make it again with train.py."
        ) from e
    return PATCHED.format(
        concepts=metadata.get("concepts", "not noted"),
        method=metadata.get("method", "not noted"),
        versions=metadata.get("versions", "not noted"),
        base=base,
        base_fingerprint=metadata["base_fingerprint"],
        settings=json.dumps(settings, indent=1, ensure_ascii=False),
        figures=figures(patch_file),
    )


def card(model, layout, dtype, patch_file=None, metadata=None):
    """The card, in Markdown. layout: a key of LAYOUTS; metadata: the patch's, if there is one."""
    base = Path(model).name if Path(model).exists() else model  # no path of this machine
    is_hub_id = model == base and "/" in model
    tag, licence = LICENCES.get(model, (None, f"That of the base model, {base}"))
    library_name = "diffusers" if layout == "diffusers" else None
    title = f"{base}, converted"
    changes = UNPATCHED.format(base=base)
    if metadata is not None:
        title = (
            f"{base} without {metadata.get('concepts', 'concepts that its patch does not name')}"
        )
        changes = about_patch(base, patch_file, metadata)
    card_data = ModelCardData(
        license=tag,
        base_model=model if is_hub_id else None,
        pipeline_tag="text-to-image",
        library_name=library_name,
    )
    made = ModelCard.from_template(
        card_data,
        template_str=CARD,
        title=title,
        layout=LAYOUTS[layout],
        dtype=dtype,
        base=base,
        changes=changes,
        licence=licence,
    )
    return made.content
