"""What the two worlds, shapes and emoji, have in common.

A world is a module (`toy/shapes.py`, `toy/emoji.py`) with the same few names:

    NAME, MODEL, PROBE, SIZE       the files that belong to it, and the side of an image in pixels
    PROBE_STEPS                    of the probe's training
    LICENCE, CREDIT                of the model: (name on the hub, name for people); whose drawings
                                   it has learned
    ATTRIBUTES                     {attribute: its words}; what a scene has and what the probe reads
    WORDS                          all words that a caption may use; with the comma, the vocabulary
    RARE                           {word: its share of the scenes without a place} of what is meant
                                   to be erased
    PLACES, CONTROL                {place: the word that it implies, or None}; the place for control
    IMPLIED                        {word that may be erased: the place that implies it}
    MEMBERS                        {kind: the words that belong to it}
    RELATED                        {word that may be erased: words that are near to it}. For other
                                   words, all words of the same attribute are near
    UNSEEN                         the combinations of words {attribute: word} that no scene has
    Scene, scene(rng, **words)     a named tuple of words, and a random one (that has these words)
    draw(scene, rng)               -> uint8 (64, 64, 3)
    caption(scene, rng)            -> a true caption, more or less complete
    sentence(asked, rng)           {attribute: word} -> a caption that says exactly this
    view(place, rng)               -> a caption that names only the place
    agree(asked, word="")          {attribute: word} without contradictions; `word` has to stay

and what the commands use with the model of this world:

    PREVIEW_PROMPTS                train.py shows them in addition to the concepts
    TEMPLATES, KEEP                closed forms: prompts with {} for concept and anchor; words to
                                   keep
    KEEP_PROMPTS                   prompts that the preset toy-hold keeps
    RATES, RATE                    {training method: its share of the toy presets' learning rate};
                                   the share of the other methods
    INIT                           attack.py: the word that a learned word begins as
    GUIDANCE_SCALE                 of the images in the workflow's tables; None: the default

Everything that needs a world takes this module as an argument. This file, shapes.py and emoji.py
import nothing else of the project.
"""

import numpy as np

from toy import emoji, shapes

MODELS = {"toy": shapes, "emoji": emoji}  # {--model: the world that it draws}
WORLDS = {world.NAME: world for world in MODELS.values()}


def of(model):
    """The world that a model is examined with: its own, and the shapes for every other model."""
    return MODELS.get(model, shapes)


def batch(world, rng: np.random.Generator, n: int):
    """n scenes, their images (uint8, (n, 64, 64, 3)) and their captions."""
    scenes = [world.scene(rng) for _ in range(n)]
    images = np.stack([world.draw(s, rng) for s in scenes])
    return scenes, images, [world.caption(s, rng) for s in scenes]


def prompts(world, kind, value, n, seed):
    """n prompts to test a model with: [(prompt, {attribute: word that the image should show})].

    kind       the prompts
    naming     name the word `value`
    shuffled   name the word `value` and often a place, with all words in a random order. Captions
               of a place never name the thing, and captions have few orders. So most are new
    members    name a thing of the kind `value`, and not the kind
    place      name the place `value`, which implies a word
    other      name words that are not in the tuple `value`
    unseen     name a combination that the world never shows
    empty      are empty
    """
    rng, found = np.random.default_rng([seed, *f"{kind} {value}".encode()]), []
    while len(found) < n:
        words = dict(zip(world.ATTRIBUTES, world.scene(rng)))
        asked = {name: word for name, word in words.items() if rng.random() < 0.7}
        if kind == "empty":
            found.append(("", {}))
        elif kind == "place":
            word = world.PLACES[value]
            found.append((world.view(value, rng), {_attribute(world, word): word}))
        elif kind in ("naming", "members", "shuffled"):
            word = str(rng.choice(world.MEMBERS[value])) if kind == "members" else value
            asked = world.agree(asked | {_attribute(world, word): word}, word)
            text = world.sentence(asked, rng)
            if kind == "shuffled":
                text = shuffled(text, list(world.PLACES), rng)
            found.append((text, asked))
        elif kind == "unseen":
            asked = world.agree(asked | world.UNSEEN[rng.integers(len(world.UNSEEN))])
            found.append((world.sentence(asked, rng), asked))
        elif kind == "other":
            asked = world.agree(asked)
            if asked and set(asked.values()).isdisjoint(value):
                found.append((world.sentence(asked, rng), asked))
        else:
            raise ValueError(f"there are no prompts of the kind {kind!r}")
    return found


def shuffled(text, places, rng):
    """The words of `text`, and in two of three cases a place, in a random order."""
    words = text.replace(",", "").split()
    if rng.random() < 2 / 3:
        words.append(str(rng.choice(places)))
    return " ".join(rng.permutation(words))


def near(world, name, word, concepts):
    """Is `word`, of the attribute `name`, near to one of the erased concepts?"""
    for concept in concepts:
        if concept in world.RELATED:
            if word in world.RELATED[concept]:
                return True
        elif name == _attribute(world, concept):
            return True
    return False


def words_in(world, text):
    """{attribute: word} of the words in `text` that the probe can see."""
    found = {}
    for word in text.lower().replace(",", " ").split():
        for name, words in world.ATTRIBUTES.items():
            if word in words:
                found[name] = word
    return found


def _attribute(world, word):
    return next(name for name, words in world.ATTRIBUTES.items() if word in words)
