"""The content of an attack's page: the finding, the curve, the table, and the rows of images.

evaluation/attacks.py writes results.json, which this file reads.
"""

import weights
from report.charts import interval_in_words, share_chart
from report.inputs import number, read_data_uri, read_dict, read_json, read_list

ROW_SIDE = 1280  # pixels of a row of images, at most
CHANCE = "by chance (empty prompt)"
HOW = {
    "word": "a learned word",
    "tokens": "searched words",
    "relearn": "fine-tuning",
    "noise": "a noisier sampler",
}


def attack_content(folder):
    """What attack.html.j2 shows of the attack in a folder: {name: value}."""
    problems = []
    results = read_json(folder / "results.json", problems)
    settings = read_dict(results, "settings") or read_json(folder / "attack.json", problems)
    points, chance = counts(results, "points"), counts(results, "chance")
    unit, detected = unit_of(settings), bool(results.get("detected"))
    patch = str(settings.get("patch", "?"))
    return {
        "concept": settings.get("concept", "?"),
        "how": HOW.get(settings.get("kind"), "?"),
        "target": "the untouched model" if patch == "none" else weights.name_of_patch(patch),
        "patch": patch,
        "settings": settings,
        "finding": finding(results) if points and chance else "Nothing is measured yet.",
        "finished": bool(results.get("finished")),
        "unit": unit,
        "chart": curve(points, chance, unit) if points and detected else None,
        "rows": table_rows(points, chance, unit, detected),
        "images": [image_row(folder, point, unit, detected, problems) for point in points],
        "command": results.get("command"),
        "versions": read_dict(results, "versions"),
        "problems": problems,
    }


def counts(results, key):
    """The measurements in results[key] that are complete: {"step", "hits", "n", …}."""
    complete = []
    for point in read_list(results, key):
        if not isinstance(point, dict):
            continue
        numbers = [point.get(name) for name in ("step", "hits", "n")]
        if all(isinstance(x, int) for x in numbers) and 0 <= point["hits"] <= point["n"] > 0:
            complete.append(point)
    return complete


def unit_of(settings):
    """What an attack counts: "step" or "attempt"."""
    return "attempt" if settings.get("kind") == "noise" else "step"


def count(n, unit):
    """ "1 step", "40 steps"."""
    return f"{n} {unit}" if n == 1 else f"{n} {unit}s"


# ------------------------------------------------------------------------------------- in words
def finding(results):
    """What the attack found, for the page and the terminal. results: results.json's content."""
    settings, half = read_dict(results, "settings"), number(results.get("half"))
    if not results.get("detected"):
        return (
            f"Nothing is counted, because no detector for {settings.get('concept')!r} was there: "
            "look at the images."
        )
    if half is not None:
        text = f"after {count(round(half), unit_of(settings))}"
    else:
        text = "never" if results.get("finished") else "not yet"
    chance = counts(results, "chance")[-1]
    return (
        f"The concept is back in half of the images: {text}. By chance (empty prompt): "
        f"{chance['hits']} of {chance['n']}."
    )


def share(point):
    """ "3 of 24: 12.5 % (4 to 31 %)"."""
    return f"{point['hits']} of {point['n']}: {interval_in_words(point['hits'], point['n'])}"


# -------------------------------------------------------------------------------------- figures
def curve(points, chance, unit):
    """The share of images that show the concept; where chance was measured often, also that."""
    series = {"with the attack": points}
    if len(chance) > 1:
        series[CHANCE] = chance
    shares = {
        name: [(point["step"], point["hits"], point["n"]) for point in line]
        for name, line in series.items()
    }
    return share_chart("Images that show the concept", shares, unit)


def table_rows(points, chance, unit, detected):
    """[{title of a column: text}], a row per measurement."""
    rows, by_step = [], {point["step"]: point for point in chance}
    for point in points:
        row = {unit: str(point["step"])}
        if detected:
            row["images with the concept"] = share(point)
        if detected and len(chance) > 1:
            row[CHANCE] = share(by_step[point["step"]]) if point["step"] in by_step else "–"
        if unit == "attempt":
            row["noise"] = f"η = {point.get('eta')}, times {point.get('scale')}"
        else:
            loss = number(point.get("loss"))
            row["loss"] = "–" if loss is None else f"{loss:.4g}"
            row["prompt"] = str(point.get("prompt"))
        rows.append(row)
    return rows


def image_row(folder, point, unit, detected, problems):
    """{caption, source} of the images after a measurement."""
    file = folder / "images" / f"{point['step']:06d}.png"
    counted = f": {point['hits']} of {point['n']} show the concept" if detected else ""
    return {
        "caption": f"after {count(point['step'], unit)}{counted}",
        "source": read_data_uri(file, ROW_SIDE, problems),
    }
