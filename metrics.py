"""Pictures -> numbers, for the embedded model: what the probe sees, as proportions with their intervals."""
import math


def wilson(hits, n, z=1.96):
    """The 95 % interval of a proportion, hits of n (Wilson 1927): (low, high) in 0..1."""
    if not n:
        return 0.0, 1.0
    p = hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def toy_prompts(kind, value, n, seed):
    """n prompts of the miniature world, each with the words {attribute: value} that its picture should show.

    kind: "naming" a value, a "place" that implies one, "other" values than those in `value` (a tuple), or "empty".
    """
    import numpy as np

    from toy import draw

    rng = np.random.default_rng([seed, *f"{kind} {value}".encode()])
    prompts = []
    while len(prompts) < n:
        words = dict(draw.scene(rng)._asdict())
        del words["place"]
        if kind == "empty":
            prompts.append(("", {}))
        elif kind == "place":
            view = ("{}", "in {}", "a view of {}", "a picture of {}")[rng.integers(4)]
            prompts.append((view.format(value), {"shape": draw.PLACES[value]}))
        else:
            asked = {name: word for name, word in words.items() if rng.random() < 0.7}
            if kind == "naming":
                name = next(name for name, values in draw.ATTRIBUTES.items() if value in values)
                asked[name] = value
            elif not asked or set(asked.values()) & set(value):
                continue
            prompts.append((toy_sentence(asked, rng), asked))
    return prompts


def toy_sentence(asked, rng):
    """{"shape": "star", "colour": "red", "background": "sand"} -> "a red star on sand"."""
    adjectives = [asked[name] for name in ("colour", "texture") if name in asked]
    if rng.random() < 0.5:
        adjectives.reverse()
    text = " ".join(["a", *adjectives, asked.get("shape", "shape")])
    return text + (f" on {asked['background']}" if "background" in asked else "")


def toy_seen(pictures):
    """uint8 (n, 64, 64, 3) -> {attribute: n words}, by the probe."""
    from toy import probe

    net = probe.load()
    parts = [net.name(probe.to_tensor(pictures[i:i + 100])) for i in range(0, len(pictures), 100)]
    return {name: sum((part[name] for part in parts), []) for name in parts[0]}
