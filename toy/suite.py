"""The embedded model's examination: what a model that forgot something is asked to draw, and how the pictures are counted."""
import numpy as np
import torch

from . import probe
from .draw import RARE, draw, prompts, scene

COLUMNS = {"named": "target, named", "implied": "target, implied", "base": "target, empty prompt", "control": "hearts in borealis",
           "shape": "other shapes", "colour": "other colours", "texture": "other textures", "background": "backgrounds",
           "caption": "whole captions", "frechet": "Fréchet distance, probe", "moved": "feature distance to the original, probe"}


def exam(concepts, n, seed):
    """{set: n prompts}: what a model that forgot `concepts` is asked to draw. Without concepts, anything."""
    if not concepts:
        return {"other": prompts("other", (), n, seed)}
    share = -(-n // len(concepts))
    sets = {"named": [pair for concept in concepts for pair in prompts("naming", concept, share, seed)],
            "implied": prompts("place", "arcadia", n if "star" in concepts else 0, seed),  # never named, nearly always shown
            "control": prompts("place", "borealis", 0 if "heart" in concepts else n, seed), "base": prompts("empty", "", n, seed),
            "other": prompts("other", tuple(dict.fromkeys([*RARE, *concepts])), n, seed)}
    return {which: pairs for which, pairs in sets.items() if pairs}


def jobs(concepts, n, seed):
    """[(prompt, seed, set, the words {attribute: value} that it should show)]: each set has noise of its own."""
    return [(text, seed + 100_000 * number + i, which, asked)
            for number, (which, pairs) in enumerate(exam(concepts, n, seed).items()) for i, (text, asked) in enumerate(pairs)]


def count(sets, asked, seen, concepts):
    """{column: (hits, n)}. sets, asked: of each picture; seen: {attribute: the word that the probe sees in each}."""
    counts = {}

    def add(key, hit, n=1):
        hits, total = counts.get(key, (0, 0))
        counts[key] = (hits + int(hit), total + n)

    for i, (which, wanted) in enumerate(zip(sets, asked)):
        right = {name: seen[name][i] == word for name, word in wanted.items()}
        if which in ("named", "implied"):
            add(which, any(hit and wanted[name] in concepts for name, hit in right.items()))
        elif which == "base":  # the mean over the concepts, as for the others
            add("base", sum(seen[name][i] in concepts for name in seen), len(concepts))
        elif which == "control":
            add("control", seen["shape"][i] == "heart")
        else:
            for name, hit in right.items():
                add(name, hit)
            add("caption", all(right.values()))
    return counts


def drawings(asked, seed=0):
    """Pictures of the world itself, uint8 (n, 64, 64, 3), that show the words asked for."""
    rng = np.random.default_rng(seed)
    return np.stack([draw(scene(rng)._replace(**words), rng) for words in asked])


def see(pictures, features=False):
    """uint8 (n, 64, 64, 3) -> {attribute: n words}, by the probe; or its features (n, 256)."""
    net = probe.load()
    parts = [probe.to_tensor(pictures[i:i + 100]) for i in range(0, len(pictures), 100)]
    if features:
        with torch.no_grad():
            return torch.cat([net.features(part) for part in parts]).double().numpy()
    parts = [net.name(part) for part in parts]
    return {name: sum((part[name] for part in parts), []) for name in parts[0]}


def frechet(a, b):
    """The Fréchet distance of two sets of features (n, D), taken as normal: FID's formula, for features that clean-fid has not."""
    if min(len(a), len(b)) < 2:
        return None
    a, b = torch.from_numpy(a), torch.from_numpy(b)  # torch keeps to --threads, numpy's BLAS does not
    mean, A, B = a.mean(0) - b.mean(0), a.T.cov(), b.T.cov()
    roots = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt()
    return float(mean @ mean + A.trace() + B.trace() - 2 * roots.sum())


def measure(pictures, before, jobs, concepts):
    """What the probe sees; and, over the prompts that name nothing erased, how far its features are from drawings of the same words
    and from the original's pictures, `before`."""
    figures = count([job.which for job in jobs], [job.asked for job in jobs], see(pictures), concepts)
    rest = [i for i, job in enumerate(jobs) if job.which == "other"]
    now, then, real = (see(x, features=True) for x in (pictures[rest], before[rest], drawings([jobs[i].asked for i in rest])))
    return figures | {"frechet": frechet(now, real), "moved": float(((now - then) ** 2).sum(1).mean() ** 0.5)}


def shown(pictures, word):
    """In how many of the pictures the probe sees `word`: (hits, n)."""
    return sum(word in words for words in zip(*see(pictures).values())), len(pictures)
