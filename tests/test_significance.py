"""Paired tests, corrections and sample sizes against known values and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from erase_diffusion.errors import ConfigError
from erase_diffusion.metrics import Rate, wilson
from erase_diffusion.significance import corrected, holm, images_for_margin, mcnemar


def test_mcnemar_counts_the_pairs_that_differ() -> None:
    assert mcnemar([True] * 10 + [False] * 50, [False] * 10 + [False] * 50) == pytest.approx(2 * 0.5**10)
    assert mcnemar([True, False] * 20, [False, True] * 20) == pytest.approx(1.0)
    assert mcnemar([True] * 30, [True] * 30) == 1.0
    with pytest.raises(ConfigError):
        mcnemar([True], [])


def test_holm_steps_down() -> None:
    # Holm's own procedure: 0.01·3, then max(0.03, 0.03·2), then max(…, 0.04).
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert holm({"one": 0.2}) == {"one": 0.2}
    assert holm({}) == {}
    assert max(holm({"a": 0.9, "b": 0.8}).values()) == 1.0


def test_a_perfect_checker_corrects_nothing() -> None:
    true = corrected(Rate(20, 100), Rate(0, 100_000), Rate(0, 100_000))
    assert true is not None and true.value == pytest.approx(0.2)
    low, high = wilson(20, 100)
    assert (true.low, true.high) == pytest.approx((low, high), abs=0.01)


def test_errors_of_the_checker_are_taken_out_and_widen_the_interval() -> None:
    # Rogan and Gladen: (0.2 + 0.9 - 1) / (0.8 + 0.9 - 1)
    true = corrected(Rate(20, 100), Rate(20, 100), Rate(10, 100))
    assert true is not None and true.value == pytest.approx(0.1 / 0.7)
    surer = corrected(Rate(20, 100), Rate(2000, 10_000), Rate(1000, 10_000))
    assert surer is not None and surer.high - surer.low < true.high - true.low
    assert true.low <= true.value <= true.high


def test_without_calibration_nothing_is_corrected() -> None:
    assert corrected(Rate(1, 10), Rate(0, 0), Rate(0, 10)) is None
    assert corrected(Rate(1, 10), Rate(8, 10), Rate(3, 10)) is None  # a checker that is wrong more often than right


@pytest.mark.parametrize("truth", [0.02, 0.2, 0.9])
def test_the_interval_holds_the_truth_as_often_as_it_says(truth: float) -> None:
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(400):
        found = rng.binomial(300, truth * 0.95 + (1 - truth) * 0.02)
        true = corrected(Rate(int(found), 300), Rate(rng.binomial(100, 0.05), 100), Rate(rng.binomial(200, 0.02), 200))
        assert true is not None
        held += true.low <= truth <= true.high
    assert 0.91 <= held / 400 <= 0.99


def test_images_for_a_margin() -> None:
    # The textbook's z²/4m² at one half, and few where a concept is gone.
    assert images_for_margin(0.02) == pytest.approx(1.96**2 / 4 / 0.02**2, rel=0.01)
    for margin, expected in ((0.02, 0.0), (0.05, 0.3), (0.01, 0.01)):
        n = images_for_margin(margin, expected)
        low, high = wilson(round(expected * n), n)
        assert (high - low) / 2 <= margin
        low, high = wilson(round(expected * (n // 2)), n // 2)
        assert (high - low) / 2 > margin
    for margin in (0.0, 0.5, math.nan):
        with pytest.raises(ConfigError):
            images_for_margin(margin)
