"""The main job: erase concepts from a model's text encoder and verify it, as one call."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from erase_diffusion.artifact import (
    SCHEMA_VERSION,
    load_erased_text_encoder,
    read_record,
    recorded_concept,
    save_drop_in,
    versions,
)
from erase_diffusion.concepts import Concept, Kind, PromptSets, default_kind
from erase_diffusion.erasers import ERASERS, Eraser, Erasure, TokenSwap
from erase_diffusion.errors import ConfigError, ModelError
from erase_diffusion.metrics import Limits
from erase_diffusion.models import Model, source_hash
from erase_diffusion.preparation import Preparation, Progress, counter, prepare, read_own_images
from erase_diffusion.report.before_after import before_after
from erase_diffusion.report.model_card import model_card
from erase_diffusion.text_encoder import PREFIX, TextEncoder, weights_hash
from erase_diffusion.verification import Verification, Verifier, make_checker

if TYPE_CHECKING:
    from transformers import CLIPTextModel

DEFAULT_METHOD = "cliperase"


@dataclass(frozen=True)
class ErasedConcept:
    """An erased encoder, how it was made, and what was measured of it.

    verifications: one a concept, in order; empty when verification was turned off.
    record: what `erasure.json` will hold.
    clip: the whole CLIP with its tokenizer and processor, when its image tower was erased too.
    """

    concepts: tuple[Concept, ...]
    erasure: Erasure
    verifications: tuple[Verification, ...]
    record: dict[str, Any]
    clip: tuple[Any, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 when every verified concept is removed with the rest preserved, else the first other code."""
        return next((v.exit_code for v in self.verifications if v.exit_code), 0)

    def picture(self) -> Image.Image | None:
        """The before/after picture, None without a verification."""
        if not self.verifications:
            return None
        pairs = [(p.group, p.text, b, a) for v in self.verifications for p, b, a in v.samples]
        names = ", ".join(c.name for c in self.concepts)
        verdicts = ", ".join(dict.fromkeys(v.verdict for v in self.verifications))
        return before_after(pairs, title=f"{self.record['source']['model']}: “{names}”: {verdicts}")

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the drop-in folder, whole or not at all. Raises OutputError."""
        path = Path(folder)
        save_drop_in(
            path,
            self.erasure.encoder,
            self.record,
            model_card(self.record),
            self.picture(),
            overwrite=overwrite,
            whole=self.erasure.whole,
            clip=self.clip,
        )
        return path


def method_config(method: str, **given: Any) -> Any:
    """The config of a method with what was given; a setting that the method doesn't have is refused by name."""
    if method not in ERASERS:
        raise ConfigError(f"unknown method {method!r}: give one of {', '.join(ERASERS)}")
    config_class = ERASERS[method][1]
    fields = {f.name: f.default for f in dataclasses.fields(config_class)}
    given = {k: v for k, v in given.items() if v is not None}
    unknown = sorted(set(given) - set(fields))
    if unknown:
        raise ConfigError(f"{method} has no setting {unknown[0]!r}; it has {', '.join(sorted(fields))}")
    return config_class(**{name: _like(f"{method}: {name}", value, fields[name]) for name, value in given.items()})


def _like(label: str, value: Any, default: Any) -> Any:
    """A setting's value when it is of its default's sort: a whole number, a number (None as well), a word, numbers."""
    if isinstance(default, tuple):
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(_like(label, v, 0.0) for v in values)
    whole = isinstance(default, int)
    sort = "a word" if isinstance(default, str) else "a whole number" if whole else "a number"
    fits = isinstance(value, str if sort == "a word" else int if whole else (int, float)) and not isinstance(
        value, bool
    )
    if not fits or (sort != "a word" and not math.isfinite(value)):
        raise ConfigError(f"{label} must be {sort}, got {value!r}")
    return value


def erase_concept(
    concept: str | Concept | Sequence[str | Concept],
    *,
    model: str | Model = "mini",
    kind: Kind | None = None,
    aliases: Sequence[str] = (),
    anchor: str | None = None,
    within: str | None = None,
    preserve: Sequence[str] = (),
    method: str = DEFAULT_METHOD,
    strength: float | None = None,
    steps: int | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    forget_images: str | Path | None = None,
    retain_images: str | Path | None = None,
    skip_bad: bool = False,
    start: str | Path | None = None,
    verify: bool = True,
    images_per_group: int = 60,
    limits: Limits | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> ErasedConcept:
    """Erase concepts from a model's text encoder, then draw and judge before and after.

    concept: a word, a `Concept`, or several of either; `kind` (by default object; within a thing what the vocabulary
    knows the word as), `aliases`, `anchor` and `within` belong to the words.
    model: a name of `MODELS`, a folder, a hub id, or a loaded `Model`.
    settings: further fields of the method's config.
    forget_images, retain_images: folders of the user's own (imagefolder layout) instead of pictures drawn here.
    start: a drop-in folder to go on from: what it has forgotten stays forgotten, is verified again, and the record
    tells of all.
    images_per_group: pictures drawn for each group of the verification, and as many for its calibration. With 60 a
    verdict bears a stray find of the judge: 1 of 120 named and synonym prompts ends under 5 %, 1 of 80 would not.

    Raises ConfigError, ModelError, DataError, and NothingToEraseError when the model never draws the concept.
    """
    given_settings = {"strength": strength, "steps": steps, **(settings or {})}
    config = method_config(method, **given_settings)  # before anything is fetched
    if getattr(config, "site", "") == "projection":
        raise ConfigError(
            f"{method} at site 'projection' edits CLIP's text projection, which the pipelines of Stable Diffusion 1.x "
            "and 2.x never read: no picture would change; use site 'hidden'"
        )
    loaded = Model(model, device=device, dtype=dtype) if isinstance(model, str) else model
    if hasattr(config, "learning_rate") and given_settings.get("learning_rate") is None:
        config = dataclasses.replace(config, learning_rate=loaded.spec.learning_rate * config.rate)
    given = [concept] if isinstance(concept, (str, Concept)) else list(concept)
    concepts = [
        c
        if isinstance(c, Concept)
        else Concept(c, kind or default_kind(c, within, loaded.vocabulary), tuple(aliases), anchor, within)
        for c in given
    ]
    eraser = ERASERS[method][0](config)
    if (forget_images or retain_images) and eraser.needs not in ("features", "pixels"):
        raise ConfigError(
            f"{method} uses no images; leave out --forget-images and --retain-images, or choose cliperase"
        )
    if method == TokenSwap.name and any(c.within for c in concepts):
        raise ConfigError(f"{method} swaps a word wherever it stands, not within a thing alone; choose another method")
    own = read_own_images(concepts, forget_images, retain_images, skip_bad) if concepts else None
    lineage, tower = _go_on_from(start, loaded) if start is not None else ([], None)
    job = prepare(
        concepts,
        loaded,
        preserve=preserve,
        needs_clip=eraser.needs != "prompts",
        own=own,
        seed=seed,
        start=tower,
        earlier=[recorded_concept(c, start) for record in lineage for c in record["concepts"]],
    )

    verifier, calibrations = None, []
    judged = (*job.writers, *job.earlier)
    if verify:
        checker = make_checker(loaded)
        checker.refuse_generator(job.original)
        verifier = Verifier(loaded, job.original, loaded.painter(), checker)
        total = len(judged) * (3 * images_per_group + images_per_group // 2)
        count = counter(progress, "calibrating the judge", total)
        calibrations = [verifier.calibrate(w, images=images_per_group, progress=count) for w in judged]

    started = time.perf_counter()
    sets, triggers = job.prompt_sets()  # counted: the search for words that ask without naming is part of it
    images: dict[str, Tensor] = {}
    if eraser.needs in ("features", "pixels"):
        sets, images = job.pictures(sets, verifier.pipe if verifier else loaded.painter(), progress)
    erasure = run_eraser(eraser, job.encoder, sets, images, seed=seed, progress=progress)
    seconds = time.perf_counter() - started

    verifications: list[Verification] = []
    if verifier:
        # The drop-in is saved in the source's dtype: what is verified is what is saved.
        shipped = _rounded(erasure.encoder)
        total = sum(2 * len(w.verification_prompts(images_per_group)) for w in judged)
        count = counter(progress, "verifying", total)
        for writer, calibration in zip(judged, calibrations, strict=True):
            verifications.append(
                verifier.verify(writer, shipped, calibration, per_group=images_per_group, limits=limits, progress=count)
            )
    record = _record(job, erasure, triggers, sets, seconds, verifications, lineage)
    concepts = [w.concept for w in judged]
    return ErasedConcept(tuple(concepts), erasure, tuple(verifications), record, _whole_clip(job, erasure))


def _go_on_from(folder: str | Path, model: Model) -> tuple[list[dict[str, Any]], CLIPTextModel]:
    """The records of what a drop-in has forgotten, the oldest first, and its text tower in float32, checked."""
    tower = load_erased_text_encoder(folder, base=model)
    record = read_record(Path(folder))
    if (Path(folder) / "clip").exists():
        raise ConfigError(f"{folder} erased its CLIP's image tower as well: no erasure can go on from it")
    earlier = record.get("earlier", [])
    keep = ("concepts", "method", "parameters", "stopped", "erased", "versions", "seconds")
    lineage = [*earlier, {k: record[k] for k in keep if k in record}] if isinstance(earlier, list) else None
    if not lineage or not all(isinstance(r, dict) and isinstance(r.get("concepts"), list) for r in lineage):
        raise ModelError(f"{Path(folder) / 'erasure.json'} does not say what was erased before")
    return lineage, tower


def _as_they_are_now(lineage: Sequence[Mapping[str, Any]], concepts: Sequence[Concept]) -> list[dict[str, Any]]:
    """The lineage with each concept's anchor as it is after this erasure: what it became may have been erased since."""
    anchors = iter(concepts)
    return [{**r, "concepts": [{**c, "anchor": next(anchors).anchor} for c in r["concepts"]]} for r in lineage]


def _whole_clip(job: Preparation, erasure: Erasure) -> tuple[Any, ...]:
    """The whole CLIP with its tokenizer and processor, when more than the text tower was erased; else nothing."""
    encoder = erasure.encoder
    if encoder.image_tower is None or encoder.image_tower is job.original.image_tower:
        return ()
    clip, tokenizer, processor = job.clip
    whole = copy.deepcopy(clip)
    text = {k.removeprefix(PREFIX): v for k, v in encoder.model.state_dict().items()}
    whole.text_model.load_state_dict(text)
    whole.vision_model.load_state_dict(encoder.image_tower.model.state_dict())
    whole.visual_projection.load_state_dict(encoder.image_tower.projection.state_dict())
    return whole, tokenizer, processor


def run_eraser(
    eraser: Eraser,
    encoder: TextEncoder,
    sets: PromptSets,
    pixels: Mapping[str, Tensor],
    *,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Erasure:
    """Run a method on prompt sets and their pictures, which a frozen image tower looks at once and for all."""
    images = pixels
    if eraser.needs == "features":
        assert encoder.image_tower is not None
        prompts, counts = list(pixels), [len(p) for p in pixels.values()]
        features = encoder.image_tower.features(torch.cat(list(pixels.values())))
        images = dict(zip(prompts, torch.split(features, counts), strict=True))
    return eraser.erase(
        encoder, sets, images, seed=seed, progress=lambda step, of, text: progress(f"erasing ({eraser.name})", step, of)
    )


def _rounded(encoder: TextEncoder) -> TextEncoder:
    """A float32 copy whose weights have been through the dtype they are saved in."""
    copy = encoder.copy()
    copy.model.load_state_dict(
        {k: v.to(encoder.dtype).float() if v.is_floating_point() else v for k, v in copy.model.state_dict().items()}
    )
    return copy


def _record(
    job: Preparation,
    erasure: Erasure,
    triggers: Mapping[str, Sequence[str]],
    sets: PromptSets,
    seconds: float,
    verifications: Sequence[Verification],
    lineage: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    model, own = job.model, job.own
    return {
        "schema_version": SCHEMA_VERSION,
        "concepts": [
            {
                "name": w.concept.name,
                "kind": w.concept.kind,
                "aliases": list(w.concept.aliases),
                "anchor": w.concept.anchor,
                "within": w.concept.within,
                "triggers": list(triggers.get(w.concept.name, ())),
                "preserve": list(w.preserve),
            }
            for w in job.writers
        ],
        # What the encoder had forgotten before this erasure, the oldest first.
        "earlier": _as_they_are_now(lineage, [w.concept for w in job.earlier]),
        "method": erasure.method,
        "parameters": erasure.parameters | {"seed": job.seed},
        "stopped": erasure.stopped,
        "history": [{k: round(v, 6) for k, v in row.items() if math.isfinite(v)} for row in erasure.history],
        "prompts": {"forget": len(sets.forget), "retain": len(sets.retain)},
        "own_images": {
            "forget": len(own.forget.items) if own.forget else None,
            "retain": len(own.retain.items) if own.retain else None,
            "skipped_files": own.skipped,
        },
        "source": {
            "model": model.name,
            "load_from": model.load_from,
            "sha256": source_hash(job.original),
            "class": "CLIPTextModel",
        },
        "erased": {
            "sha256": source_hash(erasure.encoder),
            "whole_sha256": weights_hash(dict(erasure.whole)) if erasure.whole else None,
            "dtype": str(erasure.encoder.dtype).removeprefix("torch."),
        },
        "versions": versions(),
        "device": model.device,
        "picture_dtype": str(model.dtype).removeprefix("torch."),
        "seconds": round(seconds, 3),
        "verification": [
            {"concept": w.name, **v.to_dict()}
            for w, v in zip((*job.writers, *job.earlier), verifications, strict=False)
        ],
    }
