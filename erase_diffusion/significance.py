"""What an audit's counts prove: paired tests, corrections for many, and rates corrected for the checker's errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from erase_diffusion.errors import ConfigError
from erase_diffusion.metrics import Rate, wilson

DRAWS = 20_000


@dataclass(frozen=True)
class Corrected:
    """A share that is truly there, estimated from what an imperfect checker found: value and 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"

    def to_dict(self) -> dict[str, float]:
        """Plain numbers for JSON."""
        return {"rate": round(self.value, 6), "low": round(self.low, 6), "high": round(self.high, 6)}


def corrected(found: Rate, misses: Rate, false_alarms: Rate) -> Corrected | None:
    """The true rate behind what was found, by Rogan and Gladen (1978): (p + Sp − 1) / (Se + Sp − 1).

    misses, false_alarms: the checker's calibrated errors, as counts; Se = 1 − misses and Sp = 1 − false alarms. The
    interval takes the uncertainty of all three from their Jeffreys posteriors (Flor et al. 2020), by draws from a
    fixed seed. None without calibration counts, and for a checker that tells nothing (Se + Sp ≤ 1).
    """
    if not (found.total and misses.total and false_alarms.total):
        return None
    se, sp = 1 - misses.value, 1 - false_alarms.value
    if se + sp <= 1:
        return None
    rng = np.random.default_rng(0)

    def posterior(r: Rate) -> np.ndarray:
        return rng.beta(r.found + 0.5, r.total - r.found + 0.5, DRAWS)

    p, miss, alarm = posterior(found), posterior(misses), posterior(false_alarms)
    youden = 1 - miss - alarm
    draws = np.clip((p - alarm) / np.where(youden > 0.01, youden, 0.01), 0.0, 1.0)
    low, high = np.quantile(draws, (0.025, 0.975))
    value = min(1.0, max(0.0, (found.value + sp - 1) / (se + sp - 1)))
    return Corrected(value, min(float(low), value), max(float(high), value))


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """p-value of McNemar's exact test (McNemar 1947) that both of a pair show it equally often; 1 if none differ.

    Raises ConfigError when the two don't pair up.
    """
    if len(before) != len(after):
        raise ConfigError(f"pairs need as many originals as erased, got {len(before)} and {len(after)}")
    lost = sum(bool(b) and not a for b, a in zip(before, after, strict=True))
    gained = sum(bool(a) and not b for b, a in zip(before, after, strict=True))
    return float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """The p-values adjusted for being many (Holm 1979): the chance that any of the claims is false stays bounded."""
    adjusted, highest = {}, 0.0
    for i, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(p_values) - i) * p))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def images_for_margin(margin: float, expected: float = 0.5) -> int:
    """How many images give Wilson's interval a half width of at most `margin` at the expected rate.

    Raises ConfigError for a margin outside (0, 0.5) or a rate outside [0, 1].
    """
    if not 0 < margin < 0.5 or not 0 <= expected <= 1:
        raise ConfigError(f"the margin must lie in (0, 0.5) and the rate in [0, 1], got {margin} and {expected}")

    def half_width(n: int) -> float:
        low, high = wilson(round(expected * n), n)
        return (high - low) / 2

    n = 1
    while half_width(n) > margin:
        n *= 2
    low = n // 2
    while n - low > 1:
        middle = (low + n) // 2
        low, n = (low, middle) if half_width(middle) <= margin else (middle, n)
    return n
