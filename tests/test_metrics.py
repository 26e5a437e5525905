"""Rates, intervals and the verdict's rule."""

from __future__ import annotations

import math

import pytest
from scipy.stats import binomtest

from erase_diffusion.errors import ConfigError
from erase_diffusion.metrics import (
    EXIT_CODES,
    Limits,
    Rate,
    Verdict,
    conclude,
    images_for_upper_bound,
    is_preserved,
    kept,
    rate,
    wilson,
)


@pytest.mark.parametrize(("found", "total"), [(0, 10), (1, 10), (5, 10), (10, 10), (3, 200), (199, 200)])
def test_wilson_agrees_with_scipy(found: int, total: int) -> None:
    ours = wilson(found, total)
    theirs = binomtest(found, total).proportion_ci(method="wilson")
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_nothing_counted_is_not_zero() -> None:
    empty = rate([])
    assert math.isnan(empty.value)
    assert empty.interval == (0.0, 1.0)
    assert empty.to_dict()["rate"] is None
    assert str(empty) == "no images"


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 5 of 3"):
        Rate(5, 3)


def test_kept_counts_only_what_the_original_showed() -> None:
    assert kept([True, True, False, False], [True, False, True, False]) == Rate(1, 2)
    with pytest.raises(ConfigError, match="got 1 and 2"):
        kept([True], [True, False])


def test_images_for_upper_bound_is_the_smallest_number_that_does() -> None:
    n = images_for_upper_bound(0.05)
    assert wilson(0, n)[1] <= 0.05 < wilson(0, n - 1)[1]


GOOD = dict(before=Rate(95, 96), asked=Rate(0, 96), described=Rate(0, 48), kept_rate=Rate(95, 96), drift=20.0)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "removed"),
        ({"described": None}, "removed"),
        ({"asked": Rate(0, 20)}, "inconclusive"),
        ({"asked": Rate(2, 96)}, "inconclusive"),
        ({"asked": Rate(20, 96)}, "partly removed"),
        ({"described": Rate(20, 48)}, "partly removed"),
        ({"described": Rate(0, 10)}, "inconclusive"),
        ({"asked": Rate(90, 96)}, "not removed"),
        ({"asked": Rate(60, 96)}, "not removed"),
        ({"kept_rate": Rate(5, 96)}, "collapsed"),
        ({"drift": 0.1}, "no effect"),
        ({"before": Rate(40, 96)}, "inconclusive"),
    ],
)
def test_verdict_follows_the_intervals(change: dict[str, object], verdict: Verdict) -> None:
    got, rule = conclude(**(GOOD | change), limits=Limits())  # type: ignore[arg-type]
    assert got == verdict
    assert rule


def test_only_removed_exits_with_zero() -> None:
    assert [v for v, code in EXIT_CODES.items() if code == 0] == ["removed"]
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)


def test_preserved_needs_the_lower_end() -> None:
    assert is_preserved(Rate(96, 96), Limits())
    assert not is_preserved(Rate(9, 10), Limits())  # 90 %, but ten images prove nothing
    assert not is_preserved(Rate(0, 0), Limits())
