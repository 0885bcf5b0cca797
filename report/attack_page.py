"""The page of an attack: the finding, the curve, the table, and the rows of images.

evaluation/attacks.py writes results.json, which this file reads.
"""

from report.blocks import SDD, made, read_image
from report.charts import line_chart
from support.runs import read_json
from support.statistics import cell, counted, in_words

ROW_SIDE = 1280  # pixels of a row of images, at most
CHANCE = "by chance (empty prompt)"
ABOUT_IMAGES = (
    "Each column has the same seed. A row shows the first of the images that were counted."
)
FIRST_ATTEMPT = "An image counts from the first attempt on that shows the concept."
GOES_ON = "Reload this page to see the newest state. After a stop, the same command continues."
HOW = {
    "word": "a learned word",
    "tokens": "searched words",
    "relearn": "fine-tuning",
    "noise": "a noisier sampler",
}


def attack_page(folder):
    """The page of the attack in a folder; see blocks.py."""
    settings, results = read_json(folder / "attack.json"), read_json(folder / "results.json")
    patch, finished = settings["patch"], results.get("finished")
    target, with_patch = settings["name"], f"patch {patch}"
    if patch == "none":
        target, with_patch = "the untouched model", "without a patch"
    state = (
        f"{'Finished' if finished else 'Not finished'}. Model {settings['model']}, {with_patch}."
    )
    return {
        "heading": f"Attack on {target}: {settings['concept']} with {HOW[settings['kind']]}",
        "subtitle": results.get("finding", "Nothing is measured yet."),
        "intro": [{"text": state if finished else f"{state} {GOES_ON}"}],
        "sections": [
            *(measurements(folder, results) if results else []),
            made(results, settings),
        ],
        "model": settings["model"],
        "paper": SDD,
    }


def measurements(folder, results):
    """The curve, the table, and the images after each measurement."""
    points, chance, detected = results["points"], results["chance"], results["detected"]
    unit = "attempt" if results["args"]["kind"] == "noise" else "step"
    chance = {point["step"]: point for point in chance} if len(chance) > 1 else {}
    rows, images = [], [{"text": ABOUT_IMAGES}]
    for point in points:
        step = point["step"]
        row, after = {unit: str(step)}, f"after {step} {unit}{'' if step == 1 else 's'}"
        if detected:
            row["images with the concept"] = share(point)
            after += f": {point['hits']} of {point['n']} show the concept"
        if detected and chance:
            row[CHANCE] = share(chance[step]) if step in chance else "–"
        if unit == "attempt":
            row["noise"] = f"η = {point['eta']}, times {point['scale']}"
        else:
            row |= {"loss": cell(point["loss"]), "prompt": point["prompt"]}
        rows.append(row)
        image = read_image(folder / "images" / f"{step:06d}.png", f"images {after}", ROW_SIDE)
        images.append({"sheet": image, "title": after})
    lines = [list(row.values()) for row in rows]
    table = [{"table": lines, "head": list(rows[0]), "style": "figures", "label": "Table"}]
    if unit == "attempt":
        table.append({"text": FIRST_ATTEMPT, "style": "soft"})
    series = {"with the attack": points} | ({CHANCE: chance.values()} if chance else {})
    for name, line in series.items():
        series[name] = [(point["step"], counted(point["hits"], point["n"])) for point in line]
    curve = line_chart("Images that show the concept", series, unit)
    return [
        ("curve", "Curve", [{"charts": [curve]}] if detected else []),
        ("table", "Table", table),
        ("images", "Images", images),
    ]


def share(point):
    """ "3 of 24: 12.5 % (4 to 31 %)"."""
    return f"{point['hits']} of {point['n']}: {in_words(counted(point['hits'], point['n']))}"
