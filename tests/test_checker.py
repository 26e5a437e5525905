"""The judge: right on drawings, calibrated, silent on blobs, and never the generator's own tower."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from erase_diffusion.checker import CLIPChecker, calibrate
from erase_diffusion.errors import ConfigError, ModelError
from erase_diffusion.mini.draw import draw_malformed, draw_scene
from erase_diffusion.mini.world import Scene, Thing, sample_scene
from erase_diffusion.models import Model
from erase_diffusion.text_encoder import TextEncoder
from erase_diffusion.verification import blobs


def pictures(scenes: list[Scene], seed: int = 0) -> np.ndarray:
    rng = random.Random(seed)
    return np.stack([np.asarray(draw_scene(s, rng)) for s in scenes])


def test_finds_what_is_drawn_and_not_what_is_not(checker: CLIPChecker) -> None:
    rng = random.Random(11)
    scenes = [sample_scene(rng, "test", things=1) for _ in range(100)]
    things = checker.things(checker.embed_images(pictures(scenes)))
    there = [bool(things[s.things[0].name][i] >= 0.5) for i, s in enumerate(scenes)]
    assert np.mean(there) > 0.95
    absent = [bool(things["cat"][i] >= 0.5) for i, s in enumerate(scenes) if s.things[0].name != "cat"]
    assert np.mean(absent) < 0.02


def test_finds_both_of_two(checker: CLIPChecker) -> None:
    rng = random.Random(12)
    scenes = [sample_scene(rng, "test", things=2) for _ in range(60)]
    things = checker.things(checker.embed_images(pictures(scenes)))
    both = [all(bool(things[t.name][i] >= 0.5) for t in s.things) for i, s in enumerate(scenes)]
    assert np.mean(both) > 0.85


def test_finds_nothing_in_blobs_and_empty_scenes(checker: CLIPChecker) -> None:
    rng = random.Random(13)
    images = [np.asarray(draw_malformed(sample_scene(rng, "test", things=1), rng)) for _ in range(40)]
    images += list(pictures([sample_scene(rng, "test", things=0) for _ in range(40)]))
    images += list(blobs(40, (64, 64), seed=3))
    things = torch.stack(list(checker.things(checker.embed_images(np.stack(images))).values()))
    assert (things.amax(0) >= 0.5).float().mean() < 0.2


def test_sees_colour_place_and_style(checker: CLIPChecker) -> None:
    scene = Scene((Thing("car", "purple"),), "desert", "crayon")
    seen = checker.embed_images(pictures([scene] * 8))
    for table, truth in (
        (checker.attributes(seen), "purple"),
        (checker.places(seen), "desert"),
        (checker.styles(seen), "crayon"),
    ):
        total = torch.stack(list(table.values())).sum(0)
        # A colour needs a thing to have it: 'nothing there' is one more answer, which is not in the table.
        assert (total <= 1 + 1e-4).all() if truth == "purple" else total.allclose(torch.ones(8), atol=1e-4)
        assert (table[truth] > 0.5).float().mean() >= 0.75


def test_the_generators_own_tower_is_refused(mini: Model, checker: CLIPChecker, encoder: TextEncoder) -> None:
    clip, tokenizer, processor = mini.clip()
    own = CLIPChecker(clip, tokenizer, processor, mini.vocabulary)
    with pytest.raises(ModelError, match="own homework"):
        own.refuse_generator(encoder)
    clip.half()
    with pytest.raises(ModelError, match="own homework"):
        own.refuse_generator(encoder)
    checker.refuse_generator(encoder)  # control: the real judge passes


def test_clip_score_prefers_the_true_caption(checker: CLIPChecker) -> None:
    image = checker.embed_images(pictures([Scene((Thing("boat", "red"),), "sea", "plain")]))
    true, wrong = (
        float(checker.clip_score(image, [t])[0]) for t in ("a red boat by the sea", "a green cat in the desert")
    )
    assert 0 <= wrong < true <= 100


def test_calibration_is_measured_on_what_it_was_not_set_on() -> None:
    # Even places set the threshold, odd ones measure it.
    negatives = [0.1, 0.99] * 50
    result = calibrate([0.999] * 90 + [0.2] * 10, negatives)
    assert result.threshold == 0.5
    assert result.false_alarms.value == 1.0
    assert result.misses.value == pytest.approx(0.1)
    higher = calibrate([0.9], [0.8, 0.1] * 50)
    assert higher.threshold > 0.8
    assert higher.false_alarms.found == 0


def test_calibration_allows_the_wished_share_and_no_more() -> None:
    negatives = [x for n in range(200) for x in (n / 400 + (0.45 if n >= 198 else 0), 0.0)]
    assert (
        calibrate([0.9], negatives, false_alarms=0.01).threshold
        < 0.95
        < calibrate([0.9], negatives, false_alarms=0.0).threshold + 0.01
    )
    with pytest.raises(ConfigError, match="got 1"):
        calibrate([0.9], [0.3])
