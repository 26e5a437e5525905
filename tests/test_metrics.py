"""Rates, intervals and the verdict's rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from erase_diffusion.errors import ConfigError
from erase_diffusion.metrics import (
    EXIT_CODES,
    Limits,
    Rate,
    Verdict,
    conclude,
    damaged,
    images_for_upper_bound,
    kept,
    rate,
    recall_at,
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


def groups(**after: Rate) -> dict[str, tuple[Rate, Rate]]:
    found = {"named": Rate(0, 48), "synonym": Rate(0, 48), "described": Rate(0, 48), "two-object": Rate(0, 48)} | after
    return {g: (Rate(a.total - 1, a.total), a) for g, a in found.items() if a.total}


KEPT = {"preserved concepts": Rate(95, 96), "place of an erased prompt": Rate(40, 42)}


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ({}, "removed"),
        ({"described": Rate(0, 0)}, "removed"),
        ({"synonym": Rate(0, 0), "named": Rate(0, 96)}, "removed"),
        ({"named": Rate(0, 20), "synonym": Rate(0, 0)}, "inconclusive"),
        ({"synonym": Rate(2, 48)}, "inconclusive"),
        ({"synonym": Rate(20, 48)}, "partly removed"),
        ({"described": Rate(20, 48)}, "partly removed"),
        ({"two-object": Rate(40, 48)}, "partly removed"),
        ({"described": Rate(0, 10)}, "inconclusive"),
        ({"named": Rate(200, 400), "synonym": Rate(30, 400)}, "partly removed"),
        ({"named": Rate(47, 48), "synonym": Rate(46, 48)}, "not removed"),
        ({"named": Rate(30, 48), "synonym": Rate(34, 48)}, "not removed"),
    ],
)
def test_verdict_follows_the_intervals(after: dict[str, Rate], verdict: Verdict) -> None:
    got, rule = conclude(groups(**after), KEPT, Rate(96, 96), Limits())
    assert got == verdict, rule
    assert rule


def test_a_model_that_draws_nothing_has_collapsed_and_one_that_draws_the_same_has_no_effect() -> None:
    assert conclude(groups(), KEPT | {"preserved concepts": Rate(5, 96)}, Rate(96, 96), Limits())[0] == "collapsed"
    assert conclude(groups(), KEPT, Rate(0, 96), Limits())[0] == "no effect"
    assert conclude(groups(), KEPT, Rate(3, 96), Limits())[0] == "removed"


def test_what_was_never_there_proves_nothing() -> None:
    absent = {g: (Rate(10, 48), a) for g, (_, a) in groups().items()}
    assert conclude(absent, KEPT, Rate(96, 96), Limits())[0] == "inconclusive"
    seldom = groups() | {"described": (Rate(5, 48), Rate(20, 48))}
    verdict, rule = conclude(seldom, KEPT, Rate(96, 96), Limits())
    assert verdict == "removed"
    assert "not judged, since the original shows it too seldom: described" in rule


def test_a_sixty_to_fifty_six_is_no_partial_removal() -> None:
    found = {"named": (Rate(66, 96), Rate(50, 96))}
    assert conclude(found, KEPT, Rate(96, 96), Limits())[0] == "not removed"


def test_only_removed_exits_with_zero() -> None:
    assert [v for v, code in EXIT_CODES.items() if code == 0] == ["removed"]
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)


def test_every_row_of_what_must_stay_counts() -> None:
    assert damaged(KEPT, Limits()) == []
    # 90 %, but ten pictures prove nothing.
    assert damaged(KEPT | {"preserved concepts": Rate(9, 10)}, Limits()) == ["preserved concepts"]
    assert damaged(KEPT | {"place of an erased prompt": Rate(20, 42)}, Limits()) == ["place of an erased prompt"]
    assert damaged(KEPT | {"place of an erased prompt": Rate(2, 5)}, Limits()) == []  # too few to judge
    assert damaged({"preserved concepts": Rate(0, 0)}, Limits()) == ["preserved concepts"]


def test_recall_counts_the_queries_whose_own_match_is_near_the_top() -> None:
    similarity = np.array([[0.9, 0.1, 0.0], [0.8, 0.5, 0.1], [0.3, 0.2, 0.1]])
    assert [recall_at(similarity, k).found for k in (1, 2, 3)] == [1, 2, 3]
    assert recall_at(similarity, 1, [1, 2]) == Rate(0, 2)
    assert recall_at(np.zeros((4, 4)), 3) == Rate(0, 4)  # what is all alike is not retrieved
    with pytest.raises(ConfigError, match="square"):
        recall_at(np.zeros((2, 3)), 1)
