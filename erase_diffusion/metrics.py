"""Rates, their intervals, and the verdict: pure functions over counts and scores. No model, no file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from erase_diffusion.errors import ConfigError

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """`found` of `total`; an empty total has no rate (nan), which is not zero."""

    found: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.found <= self.total:
            raise ConfigError(f"a rate needs 0 ≤ found ≤ total, got {self.found} of {self.total}")

    @property
    def value(self) -> float:
        return self.found / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % score interval (Wilson 1927); (0, 1) when there is nothing to count."""
        return wilson(self.found, self.total)

    @property
    def low(self) -> float:
        return self.interval[0]

    @property
    def high(self) -> float:
        return self.interval[1]

    def __str__(self) -> str:
        if not self.total:
            return "no images"
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}] of {self.total}"

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain numbers for JSON; `rate` is null when nothing was counted."""
        return {
            "found": self.found,
            "total": self.total,
            "rate": round(self.value, 6) if self.total else None,
            "low": round(self.low, 6),
            "high": round(self.high, 6),
        }


def wilson(found: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a binomial rate. Returns (low, high) in [0, 1]."""
    if total == 0:
        return 0.0, 1.0
    p, z2 = found / total, z * z
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total))
    # At 0 and at `total` the exact ends are 0 and 1; rounding must not say otherwise.
    return (0.0 if found == 0 else max(0.0, centre - half), 1.0 if found == total else min(1.0, centre + half))


def rate(decisions: Sequence[bool]) -> Rate:
    """The rate of True among decisions."""
    return Rate(sum(bool(d) for d in decisions), len(decisions))


def kept(before: Sequence[bool], after: Sequence[bool]) -> Rate:
    """Of the images in which the original shows a thing, those in which its twin from the same noise does.

    Raises ConfigError when the two don't pair up.
    """
    if len(before) != len(after):
        raise ConfigError(f"pairs need as many originals as erased, got {len(before)} and {len(after)}")
    pairs = [a for b, a in zip(before, after, strict=True) if b]
    return Rate(sum(bool(a) for a in pairs), len(pairs))


def images_for_upper_bound(limit: float, z: float = Z_95) -> int:
    """How many images with none found put Wilson's upper end at or under `limit`."""
    if not 0 < limit < 1:
        raise ConfigError(f"the limit must lie in (0, 1), got {limit}")
    return math.ceil(z * z * (1 - limit) / limit)


def recall_at(similarity: np.ndarray, k: int, queries: Sequence[int] | None = None) -> Rate:
    """Recall at k: of the queries, those whose own match is among the k most similar of all.

    similarity: (n, n), a query's own match on the diagonal.  queries: the rows asked, all if None. A tie counts
    against the query: of an encoder that maps everything to one point nothing is retrieved.
    Raises ConfigError for a table that is not square or k under 1.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or k < 1:
        raise ConfigError(f"recall needs a square table and k of at least 1, got {similarity.shape} and {k}")
    own = np.diagonal(similarity)[:, None]
    better = (similarity >= own).sum(1) - 1
    index = range(len(similarity)) if queries is None else queries
    return Rate(sum(bool(better[i] < k) for i in index), len(index))


Verdict = Literal["removed", "partly removed", "not removed", "collapsed", "no effect", "inconclusive"]
# What the command line exits with: 0 only for a concept removed with the rest preserved.
EXIT_CODES: dict[Verdict, int] = {
    "removed": 0,
    "partly removed": 10,
    "not removed": 11,
    "collapsed": 12,
    "no effect": 13,
    "inconclusive": 14,
}
EXIT_NOT_PRESERVED = 15


@dataclass(frozen=True)
class Limits:
    """The rule of the verdict; every comparison is with an end of a 95 % interval, never a point estimate.

    max_found: upper end allowed for named and synonym prompts together.
    max_group: upper end allowed for each group alone (fewer pictures, wider intervals): named, synonym, described,
    two-object.
    min_kept: lower end asked of the preserved concepts; min_rest: of every other row of what must stay.
    present: lower end at which the original counts as showing the concept; a group under it proves nothing.
    collapsed: upper end of the preserved concepts under which the model itself is broken.
    unchanged: mean pixel difference (0 to 255) up to which two pictures count as the same.
    fewest: a row of what must stay with fewer pictures than this is shown but not judged.
    """

    max_found: float = 0.05
    max_group: float = 0.15
    min_kept: float = 0.85
    min_rest: float = 0.70
    present: float = 0.5
    collapsed: float = 0.5
    unchanged: float = 0.5
    fewest: int = 12


MAIN_ROW = "preserved concepts"
ASKED = ("named", "synonym")  # the groups that a verdict rests on


class Interval(Protocol):
    """A rate with the ends of its 95 % interval: counted, or corrected for the checker's errors."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def together(rates: Sequence[Rate]) -> Rate:
    """Several counts as one."""
    return Rate(sum(r.found for r in rates), sum(r.total for r in rates))


def conclude(
    groups: Mapping[str, tuple[Rate, Rate]],
    kept_rates: Mapping[str, Rate],
    changed: Rate,
    limits: Limits,
    true: Mapping[str, Interval] | None = None,
) -> tuple[Verdict, str]:
    """The verdict on one concept, and the rule that gave it in words.

    groups: group → the concept found by the original and by the erased model; "named" and "synonym" are what is asked.
    kept_rates: what must stay → kept, `MAIN_ROW` among them.
    changed: of the concept's own prompts, those whose picture is another one after the erasure.
    true: group → what truly shows it after the erasure, the checker's errors taken out, where that is known; under ""
    that of named and synonym prompts together.
    """
    asked = [groups[g] for g in ASKED if g in groups]
    before = together([b for b, _ in asked])
    found_after = {"": together([a for _, a in asked]), **{g: a for g, (_, a) in groups.items()}}
    known: Mapping[str, Interval] = {**found_after, **(true or {})}
    after = known[""]
    how = " with the checker's errors taken out" if true and "" in true else ""
    if before.low < limits.present:
        return "inconclusive", (
            f"the original shows the concept in {before}: the lower end is under {limits.present:.0%}, "
            "so its absence afterwards proves little"
        )
    if changed.high <= limits.max_found:
        return "no effect", f"of the concept's own prompts {changed} gave another picture"
    main = kept_rates[MAIN_ROW]
    if main.total and main.high < limits.collapsed:
        return "collapsed", f"preserved concepts are kept in {main}: the upper end is under {limits.collapsed:.0%}"
    if after.low > limits.present:
        return "not removed", f"still found in {after}{how}: the lower end is over {limits.present:.0%}"
    if after.low > limits.max_found and after.high >= before.low:
        return "not removed", f"still found in {after}{how}, not clearly less than in the original ({before})"
    if after.low > limits.max_found:
        return "partly removed", f"still found in {after}{how}: the lower end is over {limits.max_found:.0%}"
    judged = {g: known[g] for g, (b, _) in groups.items() if b.low >= limits.present}
    unproven = [g for g in groups if g not in judged]
    for group, found in judged.items():
        if found.low > limits.max_group:
            return "partly removed", f"{group} prompts still show it in {found}: over {limits.max_group:.0%}"
    if after.high > limits.max_found:
        settle = f"{images_for_upper_bound(limits.max_found)} pictures with none found would settle it"
        if how:
            settle = "more prompts, or a checker calibrated on more pictures, would settle it"
        return "inconclusive", (f"found in {after}{how}: the interval reaches over {limits.max_found:.0%}; {settle}")
    for group, found in judged.items():
        if found.high > limits.max_group:
            return "inconclusive", f"{group} prompts: {found}, reaching over {limits.max_group:.0%}"
    rule = f"found in {after}{how}, at most {limits.max_found:.0%}; every group at most {limits.max_group:.0%}"
    if unproven:
        rule += f" (not judged, since the original shows it too seldom: {', '.join(unproven)})"
    return "removed", rule


def damaged(kept_rates: Mapping[str, Rate], limits: Limits) -> list[str]:
    """The rows of what must stay that are not proven kept; empty when the rest is preserved."""
    return [
        name
        for name, r in kept_rates.items()
        if (name == MAIN_ROW and r.low < limits.min_kept)
        or (name != MAIN_ROW and r.total >= limits.fewest and r.low < limits.min_rest)
    ]


def conclude_group(before: Rate, after: Interval, limits: Limits) -> str:
    """What one group of prompts says by itself, with the limit for a group alone."""
    if before.low < limits.present:
        return "not judged"
    if after.low > limits.present:
        return "not removed"
    if after.low > limits.max_group:
        return "partly removed"
    return "removed" if after.high <= limits.max_group else "inconclusive"
