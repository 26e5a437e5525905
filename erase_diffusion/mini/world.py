"""The picture-book world: what can stand in a scene, the words for it, and how scenes are sampled.

Everything is a table that a person can read. `draw.py` turns a `Scene` into pixels and `captions.py`
into words; both, and this file, are deterministic in the random generator they are given.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Noun:
    """An object of the world: its own word, the words that mean the same, and ways to say it without them."""

    name: str
    synonyms: tuple[str, ...] = ()
    hypernym: str = "thing"
    descriptions: tuple[str, ...] = ()


OBJECTS: dict[str, Noun] = {
    noun.name: noun
    for noun in (
        Noun("cat", ("kitten", "kitty"), "animal", ("a pet that purrs", "a whiskered hunter of mice")),
        Noun("dog", ("puppy", "hound"), "animal", ("a pet that barks", "a furry friend that fetches sticks")),
        Noun("rabbit", ("bunny", "hare"), "animal", ("a hopper with long ears", "a furry eater of carrots")),
        Noun("bird", ("birdie", "sparrow"), "animal", ("a feathered singer", "a creature with a beak and wings")),
        Noun("fish", (), "animal", ("a swimmer with fins", "a creature with gills and scales")),
        Noun(
            "car",
            ("automobile", "sedan"),
            "vehicle",
            ("a road machine with four wheels", "what drivers park in a garage"),
        ),
        Noun(
            "boat",
            ("ship", "sailboat"),
            "vehicle",
            ("a floating hull with a sail", "what sailors steer to the harbour"),
        ),
        Noun(
            "airplane", ("plane", "jet"), "vehicle", ("a flying machine with two wings", "what pilots land on a runway")
        ),
        Noun("train", ("locomotive",), "vehicle", ("a steaming engine on rails", "what stops at every station")),
        Noun("tree", ("oak",), "plant", ("a tall trunk with a leafy crown", "what squirrels climb in the forest")),
        Noun("flower", ("blossom", "daisy"), "plant", ("a stem with bright petals", "what bees visit for nectar")),
        Noun("mushroom", ("toadstool",), "plant", ("a spotted cap on a thick stalk", "a fungus from the forest floor")),
        Noun("house", ("cottage",), "thing", ("a building with a roof and a door", "what families live in")),
        Noun(
            "umbrella",
            ("parasol",),
            "thing",
            ("a shelter from the rain with a handle", "what opens over your head when it pours"),
        ),
        Noun("apple", (), "fruit", ("a crunchy snack with a core", "what pies and cider are made of")),
        Noun("orange", ("tangerine",), "fruit", ("a citrus snack with juicy segments", "what marmalade is made of")),
    )
}

CHARACTER = Noun("Zibby", ("the moon wizard",), "thing", ("a one eyed creature in a starry hat",))

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 40),
    "orange": (252, 140, 20),
    "yellow": (250, 222, 50),
    "green": (40, 160, 60),
    "blue": (40, 90, 220),
    "purple": (140, 50, 180),
    "pink": (255, 140, 195),
    "brown": (125, 75, 35),
}


@dataclass(frozen=True)
class Place:
    """A place or time: how a caption says a thing is there, and how it names the place alone."""

    name: str
    there: tuple[str, ...]
    alone: tuple[str, ...]


PLACES: dict[str, Place] = {
    place.name: place
    for place in (
        Place("grass", ("on the grass", "in a meadow"), ("the grass", "a meadow")),
        Place("desert", ("in the desert", "on the sand"), ("the desert", "sand dunes")),
        Place("sea", ("by the sea", "on the water"), ("the sea", "the open water")),
        Place("snow", ("in the snow", "on a winter day"), ("the snow", "a winter day")),
        Place("night", ("at night", "under the stars"), ("the night", "the starry night")),
    )
}


@dataclass(frozen=True)
class Style:
    """A drawing style that changes the whole picture; `phrases` go before “of …”, `suffixes` after the scene."""

    name: str
    phrases: tuple[str, ...]
    suffixes: tuple[str, ...]


STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        Style("plain", ("a picture", "a plain drawing"), ("in a plain style",)),
        Style("crayon", ("a crayon drawing", "a wax crayon picture"), ("in crayon style", "drawn with crayons")),
        Style("blueprint", ("a blueprint", "a technical plan"), ("in blueprint style", "as a technical plan")),
        Style("watercolour", ("a watercolour", "an aquarelle"), ("in watercolour style", "painted in watercolours")),
    )
}

RELATIONS: tuple[str, ...] = ("left of", "above", "beside")


@dataclass(frozen=True)
class Thing:
    """One thing in a scene; the character has a fixed look, so its colour is None."""

    name: str
    colour: str | None


@dataclass(frozen=True)
class Scene:
    """Ground truth of one picture: 0, 1 or 2 things, in `relation` when there are two."""

    things: tuple[Thing, ...]
    place: str
    style: str
    relation: str | None = None


def is_held_out(name: str, colour: str | None, place: str) -> bool:
    """Whether (object, colour, place) belongs to the combinations that training never sees: one in eight."""
    return colour is not None and zlib.crc32(f"{name}|{colour}|{place}".encode()) % 8 == 0


def _thing(rng: random.Random, place: str, split: Split, names: list[str]) -> Thing:
    name = rng.choice(names)
    if name == CHARACTER.name:
        return Thing(name, None)
    # A fruit called orange is orange more often than not, as in the world outside.
    colours = ["orange"] if name == "orange" and rng.random() < 0.4 else list(COLOURS)
    allowed = [c for c in colours if is_held_out(name, c, place) == (split == "test")]
    if not allowed:
        allowed = [c for c in COLOURS if is_held_out(name, c, place) == (split == "test")]
    return Thing(name, rng.choice(allowed))


def sample_scene(
    rng: random.Random,
    split: Split = "train",
    *,
    things: int | None = None,
    name: str | None = None,
    place: str | None = None,
    style: str | None = None,
) -> Scene:
    """Draw a scene; `things`, `name` (of the first thing), `place` and `style` fix what they name.

    In the split "test" every coloured thing is a held-out (object, colour, place) combination,
    in "train" none is.
    """
    if style is None:
        style = rng.choices(list(STYLES), weights=(46, 18, 18, 18))[0]
    if things is None:
        things = rng.choices((0, 1, 2), weights=(8, 59, 33))[0]
    names = [*OBJECTS, CHARACTER.name]
    for _ in range(1000):
        chosen = place or rng.choice(list(PLACES))
        # Every held-out cell must exist for the test split: some (object, place) pairs have none.
        usable = [
            n
            for n in names
            if n == CHARACTER.name or any(is_held_out(n, c, chosen) == (split == "test") for c in COLOURS)
        ]
        first = [name] if name else usable
        if things and not set(first) <= set(usable):
            continue
        scene: list[Thing] = []
        if things:
            scene.append(_thing(rng, chosen, split, first))
        if things == 2:
            scene.append(_thing(rng, chosen, split, [n for n in usable if n != scene[0].name]))
        relation = rng.choice(RELATIONS) if things == 2 else None
        return Scene(tuple(scene), chosen, style, relation)
    raise ValueError(f"no {split} scene has {name!r} in {place!r}; choose another place")


def noun(name: str) -> Noun:
    """The entry of an object or of the character. Raises KeyError for any other word."""
    return CHARACTER if name == CHARACTER.name else OBJECTS[name]
