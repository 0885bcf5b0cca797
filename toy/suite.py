"""The toy models' exam: what to ask of a model that forgot something, and how to count."""

import numpy as np
import torch

from toy import probe, worlds


def columns(world):
    """{column of the table: its title}; "" where evaluation/columns.py has the title."""
    common = ("named", "shuffled", "members", "implied", "base", "near", "far", "caption", "unseen")
    titles = dict.fromkeys((*common, "frechet", "moved"), "")
    titles["control"] = f"{plural(world.PLACES[world.CONTROL])} in {world.CONTROL}"
    for name in world.ATTRIBUTES:
        titles[name] = "backgrounds" if name == "background" else f"other {plural(name)}"
    return titles


def plural(word):
    return word if word == "fruit" else f"{word}s"


def exam(world, concepts, n, seed):
    """{set: at least n prompts} for a model that forgot `concepts`.

    Without concepts, the prompts are about anything.
    """

    def spread(kind, values):
        """At least n prompts, the same number about each of the values."""
        found = []
        for value in values:
            found += worlds.prompts(world, kind, value, -(-n // len(values)), seed)
        return found

    if not concepts:
        sets = {
            "other": spread("other", [()]),
            "unseen": spread("unseen", [""] if world.UNSEEN else []),
        }
        return {which: pairs for which, pairs in sets.items() if pairs}
    kinds = [word for word in concepts if word in world.MEMBERS]
    implying = [place for word, place in world.IMPLIED.items() if word in concepts]
    control = [world.CONTROL] if world.PLACES[world.CONTROL] not in concepts else []
    related = [word for concept in concepts for word in world.RELATED.get(concept, ())]
    related = [word for word in dict.fromkeys(related) if word not in concepts]
    sets = {
        "named": spread("naming", concepts),
        "members": spread("members", kinds),
        "implied": spread("place", implying),
        "control": spread("place", control),
        "base": spread("empty", [""]),
        "other": spread("other", [tuple(dict.fromkeys([*world.RARE, *concepts]))]),
        "shuffled": spread("shuffled", concepts),
        "near": spread("naming", related),
    }
    return {which: pairs for which, pairs in sets.items() if pairs}


def jobs(world, concepts, n, seed):
    """[(prompt, seed, set, the words {attribute: value} that it should show)].

    Each set has noise of its own.
    """
    return [
        (text, seed + 100_000 * number + i, which, asked)
        for number, (which, pairs) in enumerate(exam(world, concepts, n, seed).items())
        for i, (text, asked) in enumerate(pairs)
    ]


def count(world, sets, asked, seen, concepts):
    """{column: (hits, n)}.

    sets, asked: of each image. seen: {attribute: the word that the probe sees in each}.
    """
    counts = {}

    def add(key, hit, n=1):
        hits, total = counts.get(key, (0, 0))
        counts[key] = (hits + int(hit), total + n)

    for i, (which, wanted) in enumerate(zip(sets, asked)):
        right = {name: seen[name][i] == word for name, word in wanted.items()}
        if which in ("named", "shuffled", "members", "implied"):
            add(which, any(hit and wanted[name] in concepts for name, hit in right.items()))
        elif which == "base":  # the mean over the concepts, as for the others
            add("base", sum(seen[name][i] in concepts for name in seen), len(concepts))
        elif which in ("control", "unseen"):
            add(which, all(right.values()))
        elif which == "near":
            close = [name for name in right if worlds.near(world, name, wanted[name], concepts)]
            add("near", all(right[name] for name in close))
        else:
            for name, hit in right.items():
                add(name, hit)
                if concepts:
                    near = worlds.near(world, name, wanted[name], concepts)
                    add("near" if near else "far", hit)
            add("caption", all(right.values()))
    return counts


def drawings(world, asked, seed=0):
    """Images of the world itself, uint8 (n, 64, 64, 3), that show the words asked for."""
    rng = np.random.default_rng(seed)
    return np.stack([world.draw(world.scene(rng, **words), rng) for words in asked])


def parts(images, size=100):
    """Images, uint8 (n, 64, 64, 3), as tensors for the probe, `size` at a time."""
    for i in range(0, len(images), size):
        yield probe.to_tensor(images[i : i + size])


def see(world, images):
    """What the probe sees in images, uint8 (n, 64, 64, 3): {attribute: n words}."""
    net = probe.load(world.PROBE)
    seen = {name: [] for name in world.ATTRIBUTES}
    for part in parts(images):
        for name, words in net.name(part).items():
            seen[name] += words
    return seen


def features(world, images):
    """The probe's features of images, uint8 (n, 64, 64, 3): float64 (n, 256)."""
    net = probe.load(world.PROBE)
    with torch.no_grad():
        return torch.cat([net.features(part) for part in parts(images)]).double().numpy()


def shows(world, images, word):
    """Does the probe see `word`, of any attribute, in each image? n booleans."""
    return [word in words for words in zip(*see(world, images).values())]


def frechet(a, b):
    """The Fréchet distance of two sets of features (n, D), taken as normal.

    This is FID's formula, for features that clean-fid does not have.
    """
    if min(len(a), len(b)) < 2:
        return None
    # torch keeps to --threads, numpy's BLAS does not
    a, b = torch.from_numpy(a), torch.from_numpy(b)
    mean, A, B = a.mean(0) - b.mean(0), a.T.cov(), b.T.cov()
    roots = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt()
    return float(mean @ mean + A.trace() + B.trace() - 2 * roots.sum())


def distances(world, images, before, jobs):
    """{column: distance} of a row.

    images, before: the row's and the original's, uint8 (n, 64, 64, 3). frechet: from the
    features of the images to those of drawings of the same words. moved: to the original's
    images. Both use only the prompts that name nothing erased.
    """
    rest = [i for i, job in enumerate(jobs) if job.which == "other"]
    drawn = drawings(world, [jobs[i].asked for i in rest])
    now, then, real = (features(world, x) for x in (images[rest], before[rest], drawn))
    moved = float(((now - then) ** 2).sum(1).mean() ** 0.5)
    return {"frechet": frechet(now, real), "moved": moved}


def matrix(world, images, jobs):
    """A row of Figure 2: {name: (hits, n)}.

    For each name that is asked for (job.which), the images that show it. "rest" counts the
    images that show all other words of their prompt (job.asked).
    """
    seen = see(world, images)
    figures, right = {}, 0
    for i, job in enumerate(jobs):
        hits, n = figures.get(job.which, (0, 0))
        visible = any(words[i] == job.which for words in seen.values())
        figures[job.which] = (hits + visible, n + 1)
        right += all(seen[name][i] == word for name, word in job.asked.items())
    return figures | {"rest": (right, len(jobs))}
