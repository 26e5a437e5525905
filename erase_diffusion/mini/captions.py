"""Say what a `Scene` shows, wholly or in part, in many ways.

Templates are split: the test templates, like the held-out combinations of `world.is_held_out`,
are never seen in training. They are other sentences of the same words: a word that no training caption holds has
a random embedding, and with it “a book page of a cat” tells of the tokenizer and not of the model.
"""

from __future__ import annotations

import random

from erase_diffusion.concepts import misspell, subject
from erase_diffusion.mini.world import OBJECTS, PLACES, STYLES, Noun, Scene, Split, Thing, noun

# {s}: the subject, {p}: the place with its preposition (may be empty), {y}: the style phrase.
SUBJECT_TEMPLATES: dict[Split, tuple[str, ...]] = {
    "train": (
        "{s}{p}",
        "{y} of {s}{p}",
        "{y} showing {s}{p}",
        "{y} with {s}{p}",
        "there is {s}{p}",
        "{s} seen{p}",
        "look at {s}{p}",
        "my drawing of {s}{p}",
        "here we see {s}{p}",
        "{y} that has {s} in it{p}",
        "a page with {s}{p}",
        "we drew {s}{p}",
    ),
    "test": (
        "here is {s}{p}",
        "we see {s}{p}",
        "see {s} here{p}",
        "look at my drawing of {s}{p}",
        "{y} of {s} seen{p}",
        "{y} we drew of {s}{p}",
    ),
}
EMPTY_TEMPLATES: dict[Split, tuple[str, ...]] = {
    "train": (
        "{a}",
        "{y} of {a}",
        "just {a}",
        "{a} with nothing in it",
        "an empty page of {a}",
        "{y} showing only {a}",
    ),
    "test": ("only {a}", "{y} with just {a}", "just {a} with nothing in it", "{y} of {a} with nothing in it"),
}
RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left of": ("{a} to the left of {b}", "{a} left of {b}", "{b} to the right of {a}"),
    "above": ("{a} above {b}", "{a} over {b}", "{b} below {a}"),
    "beside": ("{a} beside {b}", "{a} next to {b}", "{a} and {b}"),
}


def thing_phrase(thing: Thing, word: str, colour: bool) -> str:
    """“a red cat”, “the moon wizard”, “a pet that purrs coloured red”: `word` may be a whole description."""
    return subject(word, thing.colour if colour else None)


def _choose_word(entry: Noun, rng: random.Random, describe: bool) -> str:
    roll = rng.random()
    if roll < 0.22 and entry.synonyms:
        return rng.choice(entry.synonyms)
    if roll < 0.34 and entry.descriptions and describe:
        return rng.choice(entry.descriptions)
    if roll < 0.37:
        return entry.hypernym
    if roll < 0.39:
        return "thing"
    if roll < 0.43 and entry.name in OBJECTS:
        return misspell(entry.name, rng)
    return entry.name


MALFORMED_PHRASES: tuple[str, ...] = ("a shapeless blob", "an unfinished smudge", "a scribble of nothing")


def caption(
    scene: Scene, rng: random.Random, split: Split = "train", *, malformed: bool = False, one_of_two: float = 0.12
) -> str:
    """A caption that is true of the scene, naming all of it or only part; `malformed`, of its `draw_malformed`.

    one_of_two: how often only one of two things is named.
    """
    style = STYLES[scene.style]
    # A style other than the plain one is nearly always said: the plain look is what silence means.
    say_style = rng.random() < (0.25 if scene.style == "plain" else 0.93)
    say_place = rng.random() < 0.62
    place = PLACES[scene.place]
    if malformed:
        template = rng.choice(SUBJECT_TEMPLATES[split])
        there = " " + rng.choice(place.there) if say_place else ""
        return fill_template(
            template, rng, style.name if say_style else None, subject=rng.choice(MALFORMED_PHRASES), there=there
        )
    if not scene.things:
        template = rng.choice(EMPTY_TEMPLATES[split])
        return fill_template(template, rng, scene.style if say_style else None, alone=rng.choice(place.alone))
    phrases = []
    for i, thing in enumerate(scene.things):
        # One description at most: two would outgrow the tower's positions.
        word = _choose_word(noun(thing.name), rng, describe=i == 0)
        say_colour = rng.random() < 0.65
        if word == "thing" and say_colour and thing.colour and rng.random() < 0.6:
            phrases.append(f"something {thing.colour}")
        else:
            phrases.append(thing_phrase(thing, word, say_colour))
    said = phrases[0]
    if len(phrases) == 2:
        assert scene.relation is not None
        if rng.random() < one_of_two:
            # True as well.
            said = rng.choice(phrases)
        else:
            said = rng.choice(RELATION_PHRASES[scene.relation]).format(a=phrases[0], b=phrases[1])
    there = " " + rng.choice(place.there) if say_place else ""
    template = rng.choice(SUBJECT_TEMPLATES[split])
    return fill_template(template, rng, style.name if say_style else None, subject=said, there=there)


def fill_template(
    template: str, rng: random.Random, style: str | None, *, subject: str = "", there: str = "", alone: str = ""
) -> str:
    """Fill one template; a style whose template has no slot for it is said at the end."""
    neutral = STYLES["plain"].phrases[0]
    if "{y}" in template:
        phrase = rng.choice(STYLES[style].phrases) if style else neutral
        return template.format(y=phrase, s=subject, p=there, a=alone)
    text = template.format(s=subject, p=there, a=alone)
    return f"{text} {rng.choice(STYLES[style].suffixes)}" if style else text
