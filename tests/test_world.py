"""The picture-book world: deterministic, labelled truthfully, and with a held-out part."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from erase_diffusion.mini.captions import EMPTY_TEMPLATES, SUBJECT_TEMPLATES, caption, misspell
from erase_diffusion.mini.draw import draw_malformed, draw_scene
from erase_diffusion.mini.world import (
    CHARACTER,
    COLOURS,
    OBJECTS,
    PLACES,
    STYLES,
    Scene,
    Thing,
    is_held_out,
    sample_scene,
)


def test_the_world_is_as_rich_as_promised() -> None:
    assert len(OBJECTS) >= 14
    assert len(COLOURS) == 8
    assert len(PLACES) == 5
    assert len(STYLES) >= 4
    assert sum(bool(n.synonyms) for n in OBJECTS.values()) >= 6
    assert all(n.descriptions for n in (*OBJECTS.values(), CHARACTER))
    for noun in OBJECTS.values():
        for text in noun.descriptions:
            assert not {noun.name, *noun.synonyms} & set(text.split()), text
    assert "orange" in OBJECTS
    assert "orange" in COLOURS


def test_scenes_and_pictures_are_deterministic() -> None:
    def picture(seed: int) -> bytes:
        rng = random.Random(seed)
        return draw_scene(sample_scene(rng), rng).tobytes()

    assert picture(5) == picture(5)
    assert len({picture(s) for s in range(20)}) == 20


@pytest.mark.parametrize("name", [*OBJECTS, CHARACTER.name])
def test_every_object_is_drawn_in_its_colour_and_differs_from_the_empty_scene(name: str) -> None:
    colour = None if name == CHARACTER.name else "red"
    with_it = np.asarray(draw_scene(Scene((Thing(name, colour),), "grass", "plain"), random.Random(3)), dtype=int)
    without = np.asarray(draw_scene(Scene((), "grass", "plain"), random.Random(3)), dtype=int)
    assert with_it.shape == (64, 64, 3)
    assert (np.abs(with_it - without).sum(-1) > 60).mean() > 0.04
    if colour:
        close = np.abs(with_it - np.array(COLOURS["red"])).sum(-1) < 30
        assert close.sum() > 20


@pytest.mark.parametrize("style", [s for s in STYLES if s != "plain"])
def test_a_style_changes_the_whole_picture(style: str) -> None:
    for place in PLACES:
        plain, styled = (
            np.asarray(draw_scene(Scene((Thing("car", "red"),), place, s), random.Random(1)), dtype=int)
            for s in ("plain", style)
        )
        assert (np.abs(plain - styled).sum(-1) > 12).mean() > 0.5


def test_training_never_sees_a_held_out_combination() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        for split in ("train", "test"):
            scene = sample_scene(rng, split)
            for thing in scene.things:
                if thing.colour is not None:
                    assert is_held_out(thing.name, thing.colour, scene.place) == (split == "test")


def test_held_out_templates_hold_no_word_that_training_never_saw() -> None:
    words = {
        split: {w for t in (*SUBJECT_TEMPLATES[split], *EMPTY_TEMPLATES[split]) for w in re.findall(r"\w+", t)}
        for split in ("train", "test")
    }
    assert words["test"] <= words["train"]


def test_templates_of_the_splits_are_apart() -> None:
    for table in (SUBJECT_TEMPLATES, EMPTY_TEMPLATES):
        assert not set(table["train"]) & set(table["test"])


def test_about_a_third_of_the_scenes_hold_two_things_and_some_none() -> None:
    rng = random.Random(0)
    counts = np.bincount([len(sample_scene(rng).things) for _ in range(3000)], minlength=3) / 3000
    assert counts[2] == pytest.approx(0.33, abs=0.05)
    assert 0.04 < counts[0] < 0.12


def test_captions_are_true_of_the_scene() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        scene = sample_scene(rng)
        words = caption(scene, rng).replace(",", " ").split()
        present = {t.name for t in scene.things} | {t.colour for t in scene.things}
        for name in OBJECTS:
            if name in words and name != "orange":
                assert name in present, (words, scene)
        for colour in set(COLOURS) - {"orange"}:
            if colour in words:
                assert colour in present, (words, scene)


def test_relations_are_drawn_as_said() -> None:
    for seed in range(10):
        scene = Scene((Thing("apple", "red"), Thing("apple", "blue")), "snow", "plain", "left of")
        pixels = np.asarray(draw_scene(scene, random.Random(seed)), dtype=int)
        red, blue = (np.abs(pixels - np.array(COLOURS[c])).sum(-1) < 40 for c in ("red", "blue"))
        assert np.nonzero(red)[1].mean() < np.nonzero(blue)[1].mean()


def test_malformed_pictures_are_not_the_scene() -> None:
    rng = random.Random(0)
    scene = sample_scene(rng, things=1)
    whole, broken = draw_scene(scene, random.Random(2)), draw_malformed(scene, random.Random(2))
    assert broken.size == (64, 64)
    assert whole.tobytes() != broken.tobytes()


def test_a_misspelling_is_another_word() -> None:
    rng = random.Random(0)
    slips = {misspell("rabbit", rng) for _ in range(50)}
    assert len(slips - {"rabbit"}) > 5
    assert misspell("at", rng) == "at"
