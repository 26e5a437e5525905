"""The typed, versioned result of an audit: what the HTML, the Markdown and the JSON say. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from erase_diffusion.metrics import EXIT_CODES, EXIT_NOT_PRESERVED, Limits, Rate, Verdict
from erase_diffusion.significance import Corrected

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Group:
    """One group of prompts that ask for the concept.

    before, after: found by the checker in the original's and the erased pictures.  corrected: the share of the erased
    that truly show it, the checker's errors taken out, or None without calibration.  p: McNemar's exact test on the
    pairs.  p_adjusted: the same after Holm over all groups of this audit, None for groups taken together.
    verdict: of this group alone.
    """

    before: Rate
    after: Rate
    corrected: Corrected | None
    p: float
    p_adjusted: float | None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "corrected": self.corrected.to_dict() if self.corrected else None,
            "mcnemar_p": self.p,
            "mcnemar_p_holm": self.p_adjusted,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Checked:
    """How the checker decides on one concept.

    threshold: probability from which it counts as found.  misses, false_alarms: its error rates, or None.
    source: where the three come from, in words.
    """

    threshold: float
    misses: Rate | None
    false_alarms: Rate | None
    source: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "threshold": round(self.threshold, 6),
            "misses": self.misses.to_dict() if self.misses else None,
            "false_alarms": self.false_alarms.to_dict() if self.false_alarms else None,
            "source": self.source,
        }


@dataclass(frozen=True)
class ConceptResult:
    """What one erased encoder does to one concept that it should have forgotten.

    groups: prompts that ask for it, by group.  asked: named and synonym prompts together, on which the verdict rests.
    kept: rows of what must stay → share kept of what the original showed.  neighbours: the same by single thing.
    changed: of the concept's own prompts, those whose picture is another one.
    histogram: counts of the checker's probability over 20 equal bins, for the concept's own prompts, before and after.
    """

    concept: str
    verdict: Verdict
    rule: str
    damaged: tuple[str, ...]
    checked: Checked
    asked: Group | None
    groups: Mapping[str, Group]
    kept: Mapping[str, Rate]
    neighbours: Mapping[str, Rate]
    changed: Rate
    histogram: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def exit_code(self) -> int:
        """0 only when the concept is removed and the rest preserved."""
        code = EXIT_CODES[self.verdict]
        return EXIT_NOT_PRESERVED if code == 0 and self.damaged else code

    def to_dict(self) -> dict[str, Any]:
        return {
            "concept": self.concept,
            "verdict": self.verdict,
            "rule": self.rule,
            "preserved": not self.damaged,
            "not_proven_kept": list(self.damaged),
            "exit_code": self.exit_code,
            "checker": self.checked.to_dict(),
            "asked": self.asked.to_dict() if self.asked else None,
            "groups": {name: g.to_dict() for name, g in self.groups.items()},
            "kept": {name: r.to_dict() for name, r in self.kept.items()},
            "neighbours": {name: r.to_dict() for name, r in self.neighbours.items()},
            "pictures_changed": self.changed.to_dict(),
            "histogram": {"before": list(self.histogram[0]), "after": list(self.histogram[1])},
        }


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt from the same noise, to be shown.

    why: "leak" (still found), "damage" (something the original showed is gone), or "random".
    before, after: keys of the images.  found: the checker's probability of the concept in each.
    """

    why: str
    concept: str
    group: str
    case: str
    prompt: str
    before: str
    after: str
    found: tuple[float, float]
    clip_score: tuple[float, float]
    distance: float
    lost: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncoderResult:
    """All of one erased encoder. clip_score: mean over prompts that don't ask for what it forgot, before and after;
    flags: how many of its pictures are blank, noise, or repeat one another."""

    name: str
    folder: str
    method: str
    sha256: str
    concepts: tuple[ConceptResult, ...]
    clip_score: tuple[float, float] | None
    distance: float | None
    flags: Mapping[str, int]
    utility: Mapping[str, Any]
    pairs: tuple[Pair, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        scores = self.clip_score
        return {
            "name": self.name,
            "folder": self.folder,
            "method": self.method,
            "sha256": self.sha256,
            "concepts": [c.to_dict() for c in self.concepts],
            "clip_score": {"before": round(scores[0], 3), "after": round(scores[1], 3)} if scores else None,
            "distance": None if self.distance is None else round(self.distance, 5),
            "flags": dict(self.flags),
            "utility": dict(self.utility),
        }


@dataclass(frozen=True)
class AuditReport:
    """Everything an audit says.

    settings: what decided the images.  made: versions, device, counts, the command.  unscored: images that could not be
    judged, with the reason of the first: they are in no rate.
    """

    encoders: tuple[EncoderResult, ...]
    settings: Mapping[str, Any]
    made: Mapping[str, Any]
    limits: Limits
    unscored: tuple[int, str] = (0, "")
    shortfalls: Sequence[str] = ()

    @property
    def exit_code(self) -> int:
        """The highest of all concepts' codes: 0 only when every one is removed and the rest preserved, and every image
        was judged."""
        codes = [c.exit_code for e in self.encoders for c in e.concepts]
        return max([*codes, EXIT_CODES["inconclusive"] if self.unscored[0] else 0])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "exit_code": self.exit_code,
            "encoders": [e.to_dict() for e in self.encoders],
            "limits": dict(vars(self.limits)),
            "unscored": {"images": self.unscored[0], "first_reason": self.unscored[1] or None},
            "does_not_show": list(self.shortfalls),
            "made": dict(self.made),
            "settings": dict(self.settings),
        }
