"""Rates, their intervals, and the verdict: pure functions over counts and scores. No model, no file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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

    max_found: the concept is gone from named and synonym prompts when the interval's upper end is at most this.
    max_described: the same for descriptions without the word (fewer images are drawn of them).
    min_kept: preserved concepts are kept when the interval's lower end is at least this.
    present: the original shows the concept when the interval's lower end is at least this.
    collapsed: below this upper end of the kept rate, the model itself is broken.
    unchanged: mean pixel difference (0 to 255) under which two images count as the same.
    """

    max_found: float = 0.05
    max_described: float = 0.15
    min_kept: float = 0.85
    present: float = 0.5
    collapsed: float = 0.5
    unchanged: float = 0.5


def conclude(
    *, before: Rate, asked: Rate, described: Rate | None, kept_rate: Rate, drift: float, limits: Limits
) -> tuple[Verdict, str]:
    """The verdict on one concept, and the rule that gave it in words.

    before / asked: found by the original / the erased model on named and synonym prompts.
    described: found by the erased model on descriptions, None where there are none to ask.
    kept_rate: preserved concepts kept.  drift: mean pixel difference on the concept's own prompts, 0 to 255.
    """
    if before.low < limits.present:
        return "inconclusive", (
            f"the original shows the concept in {before}: its lower end is under {limits.present:.0%}, "
            "so its absence afterwards proves little"
        )
    if drift <= limits.unchanged:
        return "no effect", f"original and erased differ by {drift:.2f} of 255 on the concept's own prompts"
    if kept_rate.total and kept_rate.high < limits.collapsed:
        return "collapsed", f"preserved concepts are kept in {kept_rate}: the upper end is under {limits.collapsed:.0%}"
    if asked.low >= before.low:
        return "not removed", f"still found in {asked}, as in the original ({before})"
    if asked.low > limits.present:
        return "not removed", f"still found in {asked}: the lower end is over {limits.present:.0%}"
    if asked.low > limits.max_found:
        return "partly removed", f"still found in {asked}: the lower end is over {limits.max_found:.0%}"
    if described is not None and described.low > limits.max_described:
        return "partly removed", f"descriptions without the word still find it in {described}"
    if asked.high > limits.max_found:
        needed = images_for_upper_bound(limits.max_found)
        return "inconclusive", (
            f"found in {asked}: the interval reaches over {limits.max_found:.0%}; "
            f"with none found, {needed} images would settle it"
        )
    if described is not None and described.high > limits.max_described:
        return "inconclusive", f"descriptions without the word: {described}, reaching over {limits.max_described:.0%}"
    words = f"found in {asked}: the upper end is at most {limits.max_found:.0%}"
    return "removed", words if described is None else f"{words}; described: {described}"


def is_preserved(kept_rate: Rate, limits: Limits) -> bool:
    """Whether the lower end of the kept rate reaches `min_kept`; False when nothing was counted."""
    return kept_rate.total > 0 and kept_rate.low >= limits.min_kept
