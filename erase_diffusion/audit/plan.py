"""The plan of an audit: everything that decides its images, written down before the first is drawn."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from erase_diffusion.artifact import read_record, recorded_concept
from erase_diffusion.audit import ledger
from erase_diffusion.audit.samples import Sample, check_cases, name_of, samples_hash
from erase_diffusion.concepts import Concept
from erase_diffusion.errors import ConfigError, DataError, ModelError, OutputError
from erase_diffusion.image_store import ImageStore, image_key, writing
from erase_diffusion.metrics import Rate
from erase_diffusion.models import Model

SCHEMA_VERSION = 1
ORIGINAL = "original"


@dataclass(frozen=True)
class Audited:
    """A concept that an encoder has forgotten.

    preserve: names of what had to stay.  calibration: the checker's threshold and error rates as the erasure recorded
    them, with the judge's hash, or None.
    """

    concept: Concept
    preserve: tuple[str, ...]
    calibration: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        return name_of(self.concept)

    def to_dict(self) -> dict[str, Any]:
        calibration = dict(self.calibration) if self.calibration else None
        return {**vars(self.concept), "preserve": list(self.preserve), "calibration": calibration}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Audited:
        return cls(recorded_concept(row, "audit.json"), tuple(row["preserve"]), row["calibration"])


@dataclass(frozen=True)
class ErasedEncoder:
    """A drop-in folder under audit: its name in this audit, where it lies, its hashes, and what it has forgotten."""

    name: str
    folder: Path
    sha256: str
    source: str
    method: str
    concepts: tuple[Audited, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "folder": str(self.folder),
            "sha256": self.sha256,
            "source": self.source,
            "method": self.method,
            "concepts": [a.to_dict() for a in self.concepts],
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> ErasedEncoder:
        concepts = tuple(Audited.from_dict(c) for c in row["concepts"])
        return cls(row["name"], Path(row["folder"]), row["sha256"], row["source"], row["method"], concepts)


def read_erased(folders: Sequence[Path]) -> tuple[ErasedEncoder, ...]:
    """The drop-ins to audit, from their records; a name that two folders share gets a number.

    Raises ModelError for a folder that is no drop-in, ConfigError for one that is given twice.
    """
    found: list[ErasedEncoder] = []
    for folder in folders:
        record = read_record(folder)
        try:
            concepts = _recorded(record, folder)
            sha, source, method = record["erased"]["sha256"], record["source"]["sha256"], str(record["method"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ModelError(
                f"{folder / 'erasure.json'} is no record of an erasure: {type(error).__name__}: {str(error)[:80]}"
            ) from None
        if not concepts:
            raise ModelError(f"{folder / 'erasure.json'} names no concept")
        if any(f.sha256 == sha for f in found):
            raise ConfigError(f"{folder} is the same encoder as {next(f.folder for f in found if f.sha256 == sha)}")
        stem = folder.resolve().name[:60] or "erased"
        taken = {ORIGINAL, *(f.name for f in found)}
        name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, len(found) + 3))) if n not in taken)
        found.append(ErasedEncoder(name, folder, str(sha), str(source), method, tuple(concepts)))
    return tuple(found)


def _recorded(record: Mapping[str, Any], folder: Path) -> list[Audited]:
    """The concepts of a record, its own first, then the earlier ones, with their calibrations."""
    rows = [row for r in (record, *(record.get("earlier") or ())) for row in r["concepts"]]
    checks = list(record.get("verification") or ())
    concepts = []
    for i, row in enumerate(rows):
        keep = tuple(str(n) for n in row.get("preserve") or rows[0].get("preserve") or ())
        calibration = None
        if len(checks) == len(rows):  # in the same order
            calibration = {**checks[i]["checker"], "judge_sha256": checks[i]["images"]["judge_sha256"]}
            check_calibration(calibration)
        concepts.append(Audited(recorded_concept(row, folder), keep, calibration))
    return concepts


@dataclass(frozen=True)
class Plan:
    """What is drawn, by which encoders, and how.

    settings: everything that decides the images, as plain values.  reused: keys of the original's images that were in
    the cache when the plan was made; so batches are the same however often the work is interrupted.
    """

    folder: Path
    settings: Mapping[str, Any]
    samples: tuple[Sample, ...]
    reused: frozenset[str] = field(default=frozenset(), repr=False)

    @cached_property
    def erased(self) -> tuple[ErasedEncoder, ...]:
        """The encoders under audit, as they were when the plan was made."""
        return tuple(ErasedEncoder.from_dict(e) for e in self.settings["encoders"])

    @cached_property
    def audited(self) -> tuple[Audited, ...]:
        """Every concept that any of them has forgotten, once."""
        first: dict[str, Audited] = {}
        for audited in (a for e in self.erased for a in e.concepts):
            first.setdefault(audited.name, audited)
        return tuple(first.values())

    @property
    def store(self) -> ImageStore:
        return ImageStore(self.folder / "images")

    @cached_property
    def encoders(self) -> tuple[str, ...]:
        """The names of all encoders, the original's first."""
        return (ORIGINAL, *(e["name"] for e in self.settings["encoders"]))

    def made(self, encoder: str, sample: Sample) -> dict[str, Any]:
        """Everything that makes the image of a sample."""
        s = self.settings
        hashes = {ORIGINAL: s["model"]["text_encoder"], **{e["name"]: e["sha256"] for e in s["encoders"]}}
        return {
            "model": s["model"]["sha256"],
            "encoder": hashes[encoder],
            "prompt": sample.text,
            "seed": sample.seed,
            "guidance": sample.guidance,
            **{name: s[name] for name in ("steps", "scheduler", "size", "dtype")},
        }

    @cached_property
    def keys(self) -> dict[str, tuple[str, ...]]:
        """Encoder → the key of each sample's image."""
        return {e: tuple(image_key(self.made(e, s)) for s in self.samples) for e in self.encoders}


def settings_of(
    model: Model,
    erased: Sequence[ErasedEncoder],
    samples: Sequence[Sample],
    source: Mapping[str, Any],
    *,
    text_encoder: str,
    steps: int,
    size: tuple[int, int],
    scheduler: str,
    device: str,
    attention: str,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """The settings of a plan. text_encoder: the hash of the original's.

    Raises ModelError for an encoder that was not erased from this model, ConfigError for a case that is there twice.
    """
    for e in erased:
        if e.source != text_encoder:
            raise ModelError(
                f"{e.folder} was erased from another text encoder (sha256 {e.source[:12]}…) than {model.name!r} "
                f"has (sha256 {text_encoder[:12]}…)"
            )
    check_cases(samples)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {"name": model.name, "sha256": model.picture_hash(), "text_encoder": text_encoder},
        "encoders": [e.to_dict() for e in erased],
        "prompts": {**source, "count": len(samples), "sha256": samples_hash(samples)},
        "steps": steps,
        "size": list(size),
        "scheduler": scheduler,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.device(device).type,
        "attention": attention,
        "batch_size": batch_size,
        "seed": seed,
    }


def write_plan(plan: Plan) -> Plan:
    """Put a plan into its folder; when one is there already it must be the same, and its reused images stay.

    Raises OutputError for a folder of something else, or of an audit with other settings, naming the first difference.
    """
    path = plan.folder / "audit.json"
    if path.exists():
        there = read_plan(plan.folder)
        difference = _difference(there.settings, json.loads(json.dumps(plan.settings)))
        if difference:
            raise OutputError(
                f"{plan.folder} is an audit of other settings: {difference}; ask as before, or choose another --output"
            )
        moved = dataclasses.replace(there, settings=plan.settings)  # the same encoders may lie elsewhere by now
        _write(moved)
        return moved
    known = (".lock", "images", "samples.jsonl", "samples.tmp", "audit.tmp")
    try:
        others = [p.name for p in plan.folder.iterdir() if p.name not in known]
    except FileNotFoundError:
        others = []
    except OSError as error:
        raise OutputError(f"{plan.folder} cannot be used for --output: {error.strerror}") from None
    if others:
        raise OutputError(f"{plan.folder} holds other things ({others[0]}) and no audit; choose another --output")
    ledger.replace_with(plan.folder / "samples.jsonl", (s.to_dict() for s in plan.samples))
    _write(plan)
    return plan


def _write(plan: Plan) -> None:
    path = plan.folder / "audit.json"
    text = json.dumps({**plan.settings, "reused": sorted(plan.reused)}, indent=1, ensure_ascii=False) + "\n"
    with writing(path):
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def planned_batch(folder: Path) -> int | None:
    """The batch size of the audit that was begun in a folder: what fits now may be another."""
    return int(read_plan(folder).settings["batch_size"]) if (folder / "audit.json").exists() else None


def read_plan(folder: Path) -> Plan:
    """The plan of an audit's folder. Raises DataError when there is none, or it is damaged or of another version."""
    path = folder / "audit.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("schema_version") != SCHEMA_VERSION:
            raise DataError(
                f"{path} has schema version {settings.get('schema_version')!r}, this program reads {SCHEMA_VERSION}"
            )
        reused = frozenset(settings.pop("reused"))
        bad: list[ledger.Place] = []
        rows = ledger.scan(folder, "samples", ("case", "text", "shows"), bad)
        samples = tuple(Sample.from_dict(row) for row, _ in rows)
        whole = not bad and samples_hash(samples) == settings["prompts"]["sha256"]
        plan = Plan(folder, settings, samples, reused)
        # Whatever somebody may have written into it shows now, not after hours.
        if not plan.erased or any(not e.concepts for e in plan.erased) or int(settings["batch_size"]) < 1:
            raise ValueError("it names no encoder, no concept or no batch")
        _ = plan.keys, settings["model"]["name"], settings["device"], settings["seed"], [*settings["size"]]
        for audited in plan.audited:
            if audited.calibration is not None:
                check_calibration(audited.calibration)
    except FileNotFoundError:
        raise DataError(f"{folder} is no audit: {path.name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ModelError) as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {str(error)[:120]}") from None
    if not whole:
        raise DataError(f"{folder / 'samples.jsonl'} is damaged: it is not what the audit was begun with")
    return plan


def check_calibration(row: Mapping[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError for a calibration that is none."""
    if not 0 < float(row["threshold"]) < 1 or not isinstance(row["judge_sha256"], str):
        raise ValueError("a calibration needs a threshold between 0 and 1 and the judge's hash")
    for name in ("misses", "false_alarms"):
        Rate(int(row[name]["found"]), int(row[name]["total"]))


def _difference(there: Any, asked: Any, where: str = "") -> str | None:
    """The first setting in which two plans differ, in words."""
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in (*there, *(k for k in asked if k not in there)):
            if key == "folder":  # the same encoder may lie elsewhere by now
                continue
            found = _difference(there.get(key), asked.get(key), f"{where}{'.' if where else ''}{key}")
            if found:
                return found
        return None
    if isinstance(there, list) and isinstance(asked, list) and len(there) == len(asked):
        return next(filter(None, (_difference(t, a, where) for t, a in zip(there, asked, strict=True))), None)
    return None if there == asked else f"{where} is {str(there)[:60]}, now asked {str(asked)[:60]}"
