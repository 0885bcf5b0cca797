"""The model card of an exported model: base, what was erased and how, figures, limits, licence."""

import json
from pathlib import Path

import jinja2

import weights
from support.own_loss import sha256
from support.runs import read_json
from toy import worlds

LICENCES = {  # (name on the hub, name for people)
    weights.DEFAULT_MODEL: ("creativeml-openrail-m", "CreativeML OpenRAIL-M"),
    weights.SDXL: ("openrail++", "CreativeML Open RAIL++-M"),
    **{name: world.LICENCE for name, world in worlds.MODELS.items()},
}
# Arguments of train.py that are elsewhere in the card, or do not change the result.
DETAILS = """
    concept method model device preview preview_every preview_steps preview_guidance_scale
    save_every export_every show_uncensored
""".split()
EVAL_SETTINGS = "suite limit scheduler steps guidance_scale seed".split()  # of eval.py

CARD = """---
{% if "/" in base %}
base_model: {{ base }}
{% endif %}
{% if layout == "diffusers" %}
library_name: diffusers
{% endif %}
{% if tag %}
license: {{ tag }}
{% endif %}
pipeline_tag: text-to-image
---

{% if patch %}
# {{ base }} without {{ patch.concepts or "concepts that its patch does not name" }}
{% else %}
# {{ base }}, converted
{% endif %}

Written by SDD (safe self-distillation, arXiv 2307.05977).

- base model: {{ base }}
{% if layout == "diffusers" %}
- format: a folder in diffusers' layout, {{ dtype }}

```python
from diffusers import {{ pipeline }}

pipeline = {{ pipeline }}.from_pretrained("THIS FOLDER")
pipeline("a prompt").images[0].save("image.png")
```
{% else %}
- format: one file in the original (CompVis) layout, {{ dtype }}
{% endif %}

{% if patch %}
## What was erased, and how

- concepts: {{ patch.concepts or "not noted" }}
- method: {{ patch.method or "not noted" }}
- base: {{ base }}, fingerprint of the tensors before training {{ patch.base_fingerprint }}
- versions: {{ patch.versions or "not noted" }}

Settings of `train.py`:

```json
{{ settings }}
```

## Figures

{{ figures }}

## Limits

For a prompt with an erased concept, the model answers about as it does for the empty prompt. So the
concept can still appear as often as it does without being asked for. Other words for it, other
languages, other samplers, images as input or further training can bring it back, and similar
concepts may suffer. It is a safer default, not a proof of safety: measure what you rely on.
{% else %}
No patch was applied: these are the tensors of {{ base }}.
{% endif %}

## Licence

{{ licence }}. Converting and erasing do not change it.
"""


def figures(patch_file):
    """The tables that eval.py wrote about this patch: next to it, one folder below, or in tables/.

    eval.py notes the file's hash in its settings, eval.json.
    """
    digest, folder, tables = sha256(patch_file)[:16], patch_file.parent, []
    files = {*folder.glob("eval.json"), *folder.glob("*/eval.json")}
    for file in sorted(files | {*Path("tables").glob("*/eval.json")}):
        settings, table = read_json(file), file.with_name("table.md")
        if digest in settings["files"].values() and table.exists():
            about = ", ".join(f"{key} {settings[key]}" for key in EVAL_SETTINGS)
            text = table.read_text(encoding="utf-8").strip()
            tables.append(f"`eval.py` ({about}):\n\n{text}")
    return "\n\n".join(tables) or "No table of `eval.py` about this patch was found."


def card(model, layout, dtype, patch_file=None, metadata=None, pipeline=None):
    """The card, in Markdown. layout: of --format; metadata: of the patch, if there is one.

    pipeline: diffusers' class that loads the folder.
    """
    base = Path(model).name if Path(model).exists() else model  # no path of this machine
    tag, licence = LICENCES.get(model, (None, f"That of the base model, {base}"))
    facts = dict(base=base, tag=tag, licence=licence, layout=layout, dtype=dtype, patch=metadata)
    facts["pipeline"] = pipeline
    if patch_file:
        facts["patch"] = {"base_fingerprint": "not noted"} | metadata
        settings = weights.patch_settings(patch_file, metadata)
        if settings.get("loss"):
            settings["loss"] = Path(settings["loss"]).name  # no path of this machine
        shown = {key: value for key, value in settings.items() if key not in DETAILS}
        facts["settings"] = json.dumps(shown, indent=1, ensure_ascii=False)
        facts["figures"] = figures(patch_file)
    template = jinja2.Template(CARD, trim_blocks=True, keep_trailing_newline=True)
    return template.render(facts)
