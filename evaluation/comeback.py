"""How a concept comes back under attack, over several seeds; and what a training costs."""

import json

from evaluation.attacks import steps_until
from evaluation.columns import HALVES

WORD_STEP = 160  # the column `word` counts the images after this step of the attack
RELEARN_STEP = 10


def pooled(series):
    """The points of several attacks, added up: [{"step", "hits", "n"}].

    series: the points of each attack. Steps that are not in all of them are left out.
    """
    points = []
    for first in series[0]:
        same = [point for one in series for point in one if point["step"] == first["step"]]
        if len(same) == len(series):
            hits, n = (sum(point[key] for point in same) for key in ("hits", "n"))
            points.append({"step": first["step"], "hits": hits, "n": n})
    return points


def at_step(points, step):
    """(hits, n) after a step; None if nothing was counted then."""
    for point in points:
        if point["step"] == step:
            return point["hits"], point["n"]
    return None


def last(points):
    """(hits, n) of the last point."""
    return points[-1]["hits"], points[-1]["n"]


def comeback(results):
    """(figures, attacks) of a row.

    results: {kind: [the content of results.json, one for each seed]}. figures: {column: figure}, of
    evaluation.columns.COMEBACK. attacks: {kind: {"points", "halves"}} with the points of all seeds
    together, and for each seed the steps until the concept is back in half of the images.
    """
    figures, attacks = {}, {}
    for kind, contents in results.items():
        contents = [content for content in contents if content["detected"]]
        if not contents:
            continue
        points = pooled([content["points"] for content in contents])
        halves = [steps_until(content["points"]) for content in contents]
        attacks[kind] = {"points": points, "halves": halves}
        chance = pooled([content["chance"] for content in contents])
        figures |= figures_of(kind, points, chance)
    return figures, attacks


def figures_of(kind, points, chance):
    """The figures of one kind of attack. chance: the points of the empty prompt."""
    match kind:
        case "word":
            found = {"word_half": steps_until(points), "word": at_step(points, WORD_STEP)}
        case "tokens":
            found = {"tokens": last(points)}
        case "relearn":
            found = {"relearn_half": steps_until(points), "relearn": at_step(points, RELEARN_STEP)}
        case "noise":
            found = {"noise": last(points), "noise_chance": last(chance)}
    # A half is None if the concept did not come back. Any other None was not measured.
    return {key: value for key, value in found.items() if value is not None or key in HALVES}


def cost(patches):
    """{"seconds": the shortest time of a training, "megabytes": size of a patch}.

    Without "seconds" if no training was timed, because a stop fell into its last iteration.

    patches: files erased.safetensors, each next to the run.json of its training. After a stop,
    run.json has the time of the iterations since then: the rest is taken to be as fast.
    """
    seconds = []
    for file in patches:
        about = json.loads((file.parent / "run.json").read_text(encoding="utf-8"))
        if timed := about.get("training"):
            share = timed["iterations"] / about["args"]["iters"]
            seconds.append(timed["seconds"] / share)
    figures = {"megabytes": patches[0].stat().st_size / 1e6}
    if seconds:
        figures["seconds"] = round(min(seconds))
    return figures
