"""Judge the images of an audit: apart from drawing them, and again with another checker if wished."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from erase_diffusion.audit import ledger
from erase_diffusion.audit.generate import Progress, manifest
from erase_diffusion.audit.plan import ORIGINAL, Plan
from erase_diffusion.audit.samples import Sample
from erase_diffusion.audit.work import Ranks
from erase_diffusion.checker import CLIPChecker
from erase_diffusion.errors import DataError
from erase_diffusion.image_store import writing
from erase_diffusion.verification import likeliest, presence

SCORES = "scores"
FIELDS = ("encoder", "case", "key", "sha256")
CHUNK = 64  # samples judged together

# A drawn or photographed picture is neither flat nor white noise: the measures of either are far from its own.
BLANK_SPREAD = 2.0  # standard deviation of grey values, of 255
NOISE_ROUGHNESS = 0.9  # neighbours' mean difference over the spread; independent pixels have 2/√π ≈ 1.13


@dataclass(frozen=True)
class Scored:
    """What a run of scoring did. failed: images that could not be judged, and why the first could not."""

    judged: int
    found: int
    failed: int
    bad_lines: int


def score(
    plan: Plan,
    checker: CLIPChecker,
    about: Mapping[str, Any],
    *,
    name: str = "judge",
    ranks: Ranks | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Scored:
    """Judge every image of a plan, one line an image, resumable like the drawing; at the end all lines in order.

    about: what the checker is (name, hash), written beside the scores; scores of another checker under the same name
    are done again.
    """
    ranks = ranks or Ranks()
    folder = plan.folder / SCORES / name
    wanted = {"schema_version": 1, **about, "concepts": [a.name for a in plan.audited]}
    ranks.first_on_main(lambda: _start(folder, wanted), lambda: None)
    hashes = manifest(plan)
    bad = ranks.first_on_main(lambda: ledger.consolidate(folder, SCORES, FIELDS, _key), then=lambda: 0)
    names = wanted["concepts"]
    done = {_key(r): r["sha256"] for r, _ in ledger.scan(folder, SCORES, FIELDS) if is_score(r, names)}
    chunks = [range(i, min(i + CHUNK, len(plan.samples))) for i in range(0, len(plan.samples), CHUNK)]
    mine = [chunk for n, chunk in enumerate(chunks) if ranks.has(n)]
    judge = Judge(checker, plan)
    path = ledger.shard(folder, SCORES, ranks.rank)
    total, seen, judged, failed = sum(map(len, mine)) * len(plan.encoders), 0, 0, 0
    progress("scoring", 0, total)
    for chunk in mine:
        # A chunk is judged whole or not at all: what is judged together can differ in the last digits.
        if any(
            done.get((e, plan.samples[i].case)) != hashes.get(plan.keys[e][i], "") for e in plan.encoders for i in chunk
        ):
            scores = judge.chunk(chunk, hashes)
            ledger.append(path, scores)
            judged += len(scores)
            failed += sum("failed" in s for s in scores)
        seen += len(chunk) * len(plan.encoders)
        progress("scoring", seen, total)
    ranks.wait()
    if ranks.main:
        places = {_key(r): place for r, place in ledger.scan(folder, SCORES, FIELDS)}
        order = [(e, s.case) for e in plan.encoders for s in plan.samples]
        ledger.merge(folder, SCORES, (places[key] for key in order if key in places))
    ranks.wait()
    return Scored(judged, total - judged, failed, bad)


def _start(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Write what the scores are of; scores of something else under this name go."""
    path = folder / "scoring.json"
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        there = None
    if there != wanted:
        with writing(path):
            for old in ledger.shards(folder, SCORES):
                old.unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(wanted, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return str(row["encoder"]), str(row["case"])


def is_score(row: Mapping[str, Any], concepts: Sequence[str] = ()) -> bool:
    """Whether a row is a score of all that is concluded from: not a failure, and not from anybody's hand."""

    def shares(table: Any) -> bool:
        return isinstance(table, dict) and all(_number(p) and 0 <= p <= 1 for p in table.values())

    concept, things, flags = row.get("concepts"), row.get("things"), row.get("flags")
    return (
        "failed" not in row
        and shares(concept)
        and shares(things)
        and all(c in concept for c in concepts)  # type: ignore[operator]  # it is a dict
        and isinstance(flags, list)
        and all(isinstance(f, str) for f in flags)
        and isinstance(row.get("print"), str)
        and _number(row.get("clip_score"))
        and _number(row.get("distance", 0.0))
        and all(row.get(n) in (None, True, False) for n in ("attribute", "place", "style"))
    )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_scores(plan: Plan, name: str = "judge") -> tuple[dict[str, Any], dict[tuple[str, str], dict[str, Any]]]:
    """What the scores are of, and (encoder, case) → score. Raises DataError when nothing was scored under this name."""
    folder = plan.folder / SCORES / name
    try:
        about = json.loads((folder / "scoring.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{plan.folder} has no scores under the name {name!r}; score it first") from None
    scores: dict[tuple[str, str], dict[str, Any]] = {}
    names = tuple(a.name for a in plan.audited)
    for row, _ in ledger.scan(folder, SCORES, FIELDS):
        if not is_score(row, names):
            scores[_key(row)] = {"failed": str(row.get("failed", "its score is damaged"))[:200]}
        else:
            scores[_key(row)] = {k: v for k, v in row.items() if k not in FIELDS}  # of ten thousands, no more
    if not scores or not isinstance(about, dict):
        raise DataError(f"{folder} holds no scores; score the audit again")
    return about, scores


class Judge:
    """A checker that looks at an audit's images, the original's and the erased ones of a prompt together."""

    def __init__(self, checker: CLIPChecker, plan: Plan):
        self.checker, self.plan, self.audited = checker, plan, plan.audited
        v = checker.vocabulary
        known = {**v.objects, **v.characters}
        # What a file's classes name beyond the vocabulary is looked for as well.
        self.labels = {t: t for s in plan.samples for t in s.shows.things if t not in known}
        self.artists = {
            s.artist: (f"a picture by {s.artist}", f"a picture in the style of {s.artist}")
            for s in plan.samples
            if s.artist and s.artist not in v.styles
        }

    def chunk(self, numbers: Sequence[int], hashes: Mapping[str, str]) -> list[dict[str, Any]]:
        """The scores of some samples' images, encoder by encoder."""
        originals: dict[int, np.ndarray | None] = {}

        def original(i: int) -> np.ndarray | None:
            if i not in originals:
                key = self.plan.keys[ORIGINAL][i]
                originals[i] = self.plan.store.read(key, hashes.get(key))
            return originals[i]

        scores: list[dict[str, Any]] = []
        for encoder in self.plan.encoders:
            rows, images, samples = [], [], []
            for i in numbers:
                sample, key = self.plan.samples[i], self.plan.keys[encoder][i]
                row: dict[str, Any] = {"encoder": encoder, "case": sample.case, "key": key}
                row["sha256"] = hashes.get(key, "")
                image = original(i) if encoder == ORIGINAL else self.plan.store.read(key, hashes.get(key))
                twin = original(i)
                scores.append(row)
                if image is None or key not in hashes:
                    row["failed"] = "the image is missing or damaged"
                    continue
                if encoder != ORIGINAL and twin is not None:
                    row["distance"] = round(distance(twin, image), 6)
                row |= describe(image)
                rows.append(row)
                images.append(image)
                samples.append(sample)
            if images:
                for row, seen in zip(rows, self.look(images, samples), strict=True):
                    row |= seen
        return scores

    def look(self, images: Sequence[np.ndarray], samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """What the checker sees in each image: every audited concept, and what its prompt names."""
        embeddings = self.checker.embed_images([Image.fromarray(i) for i in images])
        concepts = {a.name: presence(self.checker, a.concept, embeddings).tolist() for a in self.audited}
        things = self.checker.things(embeddings, self.labels, paired=())
        attributes = likeliest(self.checker.attributes(embeddings))
        places = likeliest(self.checker.places(embeddings)) if self.checker.vocabulary.places else [None] * len(images)
        styles = likeliest(self.checker.styles(embeddings, self.artists))
        clip_scores = self.checker.clip_score(embeddings, [s.text for s in samples]).tolist()
        seen = []
        for i, sample in enumerate(samples):
            shows = sample.shows
            row: dict[str, Any] = {"concepts": {n: round(p[i], 6) for n, p in concepts.items()}}
            row["things"] = {t: round(float(things[t][i]), 6) for t in shows.things if t in things}
            for field_name, best in (("attribute", attributes), ("place", places), ("style", styles)):
                expected = getattr(shows, field_name)
                if expected is not None:
                    row[field_name] = best[i] == expected
            row["clip_score"] = round(clip_scores[i], 4)
            seen.append(row)
        return seen


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute pixel difference of two uint8 images, of 255."""
    return float(np.abs(one.astype(np.int16) - other.astype(np.int16)).mean())


def describe(image: np.ndarray) -> dict[str, Any]:
    """`flags` ("blank", "noise") of a uint8 (h, w, 3) image, and its `print`, 256 bits by which copies are found."""
    grey = image.astype(np.float32).mean(-1)
    spread = float(grey.std())
    rough = float((np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2)
    flags = []
    if spread < BLANK_SPREAD:
        flags.append("blank")
    elif rough > NOISE_ROUGHNESS * spread:
        flags.append("noise")
    small = np.asarray(Image.fromarray(grey.astype(np.uint8)).resize((17, 16), Image.Resampling.BILINEAR), np.int16)
    bits = np.packbits(small[:, 1:] > small[:, :-1])
    return {"flags": flags, "print": bits.tobytes().hex()}
