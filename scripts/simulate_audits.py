"""Simulated audits with a known truth and a checker that errs: do the intervals hold it, is a leak ever called removed?

    python scripts/simulate_audits.py

Coverage of the corrected 95 % interval over truths, sizes and checkers; near a rate of none at all a count cannot fall
below zero, so that an interval there holds the truth more often than it says. Then how often a concept that still shows
in 5 % of the pictures is called removed under a rule of 2 %, by the verdict's comparison with the corrected interval.
"""

from __future__ import annotations

import click
import numpy as np

from erase_diffusion.metrics import Limits, Rate, conclude
from erase_diffusion.significance import corrected

TRUTHS = (0.0, 0.01, 0.02, 0.05, 0.2, 0.5, 0.9)
# Pictures asked, calibration pictures with and without the concept, the checker's misses and false alarms.
CASES = ((120, 60, 90, 0.05, 0.01), (512, 120, 300, 0.05, 0.01), (1000, 200, 500, 0.10, 0.03))


def audit(rng: np.random.Generator, truth: float, case: tuple[int, int, int, float, float]) -> tuple[Rate, Rate, Rate]:
    """What the checker finds, and the misses and false alarms that its calibration counts."""
    n, with_it, without, miss, alarm = case
    found = Rate(int(rng.binomial(n, truth * (1 - miss) + (1 - truth) * alarm)), n)
    return found, Rate(int(rng.binomial(with_it, miss)), with_it), Rate(int(rng.binomial(without, alarm)), without)


def removed(found: Rate, misses: Rate, alarms: Rate, limits: Limits) -> bool:
    """The verdict's rule on one concept whose rest is kept."""
    everything = Rate(found.total, found.total)
    true = corrected(found, misses, alarms)
    known = {"": true, "named": true} if true else None
    kept = {"preserved concepts": everything}
    verdict, _ = conclude({"named": (everything, found)}, kept, everything, limits, known)
    return verdict == "removed"


@click.command(help=__doc__)
@click.option("--audits", default=2000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(audits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    click.echo("| pictures, calibration, misses, false alarms | truth | interval holds it | uncorrected does |")
    click.echo("| --- | --- | --- | --- |")
    inside, outside = [], []
    for case in CASES:
        for truth in TRUTHS:
            held = plain = 0
            for _ in range(audits):
                found, misses, alarms = audit(rng, truth, case)
                true = corrected(found, misses, alarms)
                held += true is not None and true.low <= truth <= true.high
                plain += found.low <= truth <= found.high
            n, with_it, without, miss, alarm = case
            (inside if truth else outside).append(held / audits)
            name = f"{n}, {with_it} + {without}, {miss:.0%}, {alarm:.0%}"
            click.echo(f"| {name} | {truth:.0%} | {held / audits:.1%} | {plain / audits:.1%} |")
    click.echo(
        f"\ncoverage over all with something there: {np.mean(inside):.1%} ({min(inside):.1%} to {max(inside):.1%})"
    )
    click.echo(f"coverage where nothing is there: {np.mean(outside):.1%}")
    limits = Limits(max_found=0.02)
    for case in CASES:
        for truth in (0.05, 0.0):
            called = sum(removed(*audit(rng, truth, case), limits) for _ in range(audits))
            click.echo(
                f"{case[0]} pictures, {truth:.0%} still leaks, rule 2 %: called removed in {called / audits:.2%}"
            )


if __name__ == "__main__":
    main()
