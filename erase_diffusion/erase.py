"""The main job: erase concepts from a model's text encoder and verify it, as one call."""

from __future__ import annotations

import dataclasses
import math
import platform
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from erase_diffusion.artifact import SCHEMA_VERSION, save_drop_in
from erase_diffusion.concepts import (
    Concept,
    Kind,
    PromptSets,
    PromptWriter,
    Vocabulary,
    article,
    asks_for,
    normalise,
    preserved,
    resolve_concept,
)
from erase_diffusion.erasers import ERASERS, Erasure
from erase_diffusion.errors import ConfigError, DataError
from erase_diffusion.generation import draw, noise_seeds
from erase_diffusion.imagefolder import ImageFolder, read_image_folder
from erase_diffusion.metrics import Limits
from erase_diffusion.models import Model, source_hash
from erase_diffusion.report.before_after import before_after
from erase_diffusion.report.model_card import model_card
from erase_diffusion.text_encoder import TextEncoder
from erase_diffusion.triggers import find_triggers
from erase_diffusion.verification import Verification, Verifier, make_checker

DEFAULT_METHOD = "cliperase"
# Stage, done, total: what a progress display is told.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ErasedConcept:
    """An erased encoder, how it was made, and what was measured of it.

    verifications: one a concept, in order; empty when verification was turned off.
    record: what `erasure.json` will hold.
    """

    concepts: tuple[Concept, ...]
    erasure: Erasure
    verifications: tuple[Verification, ...]
    record: dict[str, Any]

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
            path, self.erasure.encoder, self.record, model_card(self.record), self.picture(), overwrite=overwrite
        )
        return path


def resolve_anchor(
    concept: Concept,
    vocabulary: Vocabulary,
    preserve: Mapping[str, tuple[str, ...]],
    encoder: TextEncoder,
    erased: set[str],
) -> Concept:
    """Choose what a concept becomes when the user didn't say.

    A style becomes the neutral style. An object or character becomes the preserved object, an attribute the
    other attribute, that the text tower holds nearest: a near anchor moves the encoder least (AGE, ICLR 2025).
    """
    if concept.anchor is not None:
        return concept
    if concept.kind == "style":
        return dataclasses.replace(concept, anchor=vocabulary.neutral_style)
    if concept.kind == "attribute":
        candidates = [a for a in vocabulary.attributes if normalise(a) not in erased]
    else:
        candidates = [n for n in preserve if n in vocabulary.objects] or list(preserve)
    if not candidates:
        raise ConfigError(f"nothing is left that {concept.name!r} could become; name it with --anchor")
    ids = encoder.tokenize([article(w) for w in (concept.name, *candidates)])
    with torch.no_grad():
        pooled = encoder.pooled(encoder.hidden(ids), ids)
    centred = F.normalize(pooled - pooled.mean(0), dim=-1)
    return dataclasses.replace(concept, anchor=candidates[int((centred[1:] @ centred[0]).argmax())])


def method_config(method: str, **given: Any) -> Any:
    """The config of a method with what was given; a setting that the method doesn't have is refused by name."""
    if method not in ERASERS:
        raise ConfigError(f"unknown method {method!r}: give one of {', '.join(ERASERS)}")
    config_class = ERASERS[method][1]
    fields = {f.name for f in dataclasses.fields(config_class)}
    given = {k: v for k, v in given.items() if v is not None}
    unknown = sorted(set(given) - fields)
    if unknown:
        raise ConfigError(f"{method} has no setting {unknown[0]!r}; it has {', '.join(sorted(fields))}")
    return config_class(**given)


def erase_concept(
    concept: str | Concept | Sequence[str | Concept],
    *,
    model: str | Model = "mini",
    kind: Kind = "object",
    aliases: Sequence[str] = (),
    anchor: str | None = None,
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
    verify: bool = True,
    images_per_group: int = 60,
    limits: Limits | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> ErasedConcept:
    """Erase concepts from a model's text encoder, then draw and judge before and after.

    concept: a word, a `Concept`, or several of either; `kind`, `aliases` and `anchor` belong to the words.
    model: a name of `MODELS`, a folder, a hub id, or a loaded `Model`.
    settings: further fields of the method's config.
    forget_images, retain_images: folders of the user's own (imagefolder layout) instead of pictures drawn here.
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
    if hasattr(config, "learning_rate") and "learning_rate" not in given_settings:
        config = dataclasses.replace(config, learning_rate=loaded.spec.learning_rate)
    vocabulary = loaded.vocabulary
    given = [concept] if isinstance(concept, (str, Concept)) else list(concept)
    if not given:
        raise ConfigError("no concept given; name at least one to erase")
    concepts = [c if isinstance(c, Concept) else Concept(c, kind, tuple(aliases), anchor) for c in given]
    eraser = ERASERS[method][0](config)
    concepts = [resolve_concept(c, vocabulary) for c in concepts]
    words = [[w for other in concepts if other is not c for w in other.words] for c in concepts]
    keeps = [preserved(c, vocabulary, preserve, w) for c, w in zip(concepts, words, strict=True)]
    if (forget_images or retain_images) and not eraser.needs_images:
        raise ConfigError(
            f"{method} uses no images; leave out --forget-images and --retain-images, or choose cliperase"
        )
    own = _own_images(concepts, forget_images, retain_images, skip_bad)

    # A closed form needs no CLIP: it is worth a look when it is on disk, but not a download.
    needs_clip = eraser.needs_images or Path(loaded.spec.clip).is_dir()
    clip = loaded.clip() if needs_clip else None
    encoder = loaded.paired_text_encoder(clip[0]) if clip else loaded.text_encoder()
    erased_words = {normalise(w) for c in concepts for w in c.words}
    writers = []
    for one, keep in zip(concepts, keeps, strict=True):
        anchored = resolve_anchor(one, vocabulary, keep, encoder, erased_words)
        if anchored.anchor and normalise(anchored.anchor) in erased_words:
            raise ConfigError(f"{one.name!r} cannot become {anchored.anchor!r}, which is to be erased as well")
        others = [c for c in concepts if c is not one]
        writers.append(PromptWriter(anchored, vocabulary, keep, seed, others))
    concepts = [w.concept for w in writers]
    _check_captions(own, concepts, encoder)

    verifier, calibrations = None, []
    if verify:
        checker = make_checker(loaded)
        checker.refuse_generator(encoder)
        verifier = Verifier(loaded, encoder, loaded.painter(), checker)
        total = len(writers) * (3 * images_per_group + images_per_group // 2)
        count = _counter(progress, "calibrating the judge", total)
        calibrations = [verifier.calibrate(w, images=images_per_group, progress=count) for w in writers]

    started = time.perf_counter()
    sets, triggers = _prompt_sets(writers, encoder)
    features: dict[str, Tensor] = {}
    if eraser.needs_images:
        assert clip is not None
        pipe = verifier.pipe if verifier else loaded.painter()
        sets, features = _Pictures(loaded, pipe, encoder, clip, seed, progress).features(sets, own, concepts)
    erasure: Erasure = eraser.erase(
        encoder,
        sets,
        features,
        seed=seed,
        progress=lambda step, of, text: progress(f"erasing ({method})", step, of),
    )
    seconds = time.perf_counter() - started

    verifications: list[Verification] = []
    if verifier:
        # The drop-in is saved in the source's dtype: what is verified is what is saved.
        shipped = _rounded(erasure.encoder)
        count = _counter(progress, "verifying", sum(2 * len(w.verification_prompts(images_per_group)) for w in writers))
        for writer, calibration in zip(writers, calibrations, strict=True):
            verifications.append(
                verifier.verify(writer, shipped, calibration, per_group=images_per_group, limits=limits, progress=count)
            )
    record = _record(loaded, encoder, writers, erasure, triggers, sets, own, seed, seconds, verifications)
    return ErasedConcept(tuple(concepts), erasure, tuple(verifications), record)


def _counter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(stage, min(done, total), total)

    return count


def _rounded(encoder: TextEncoder) -> TextEncoder:
    """A float32 copy whose weights have been through the dtype they are saved in."""
    copy = encoder.copy()
    copy.model.load_state_dict(
        {k: v.to(encoder.dtype).float() if v.is_floating_point() else v for k, v in copy.model.state_dict().items()}
    )
    return copy


def _prompt_sets(writers: Sequence[PromptWriter], encoder: TextEncoder) -> tuple[PromptSets, dict[str, list[str]]]:
    """The forget pairs of all concepts together, and retain prompts that name none of them."""
    parts, triggers = [], {}
    erased = {normalise(w) for writer in writers for w in writer.concept.words}
    for writer in writers:
        concept, v = writer.concept, writer.vocabulary
        found: list[str] = []
        if concept.kind in ("object", "character"):
            # All that the vocabulary holds competes, whatever is preserved: between two words anything is a trigger.
            others = {**v.objects, **v.characters, **writer.preserve}
            rest = [words for words in others.values() if not erased & {normalise(w) for w in words}]
            found = find_triggers(encoder, v, concept.words, rest)
        triggers[concept.name] = found
        parts.append(writer.training_sets(320, 640 // len(writers), found))

    def clean(prompts: Sequence[str]) -> tuple[str, ...]:
        # With several concepts, one's retain prompts may name another (a style beside an object).
        concepts = [writer.concept for writer in writers]
        return tuple(
            p for p in dict.fromkeys(prompts) if len(writers) == 1 or not any(asks_for(p, c) for c in concepts)
        )

    return PromptSets(
        tuple(pair for part in parts for pair in part.forget),
        clean([p for part in parts for p in part.retain]),
        tuple(pair for part in parts for pair in part.forget_held_out),
        clean([p for part in parts for p in part.retain_held_out]),
        tuple(word for part in parts for word in part.words),
        tuple(prompt for part in parts for prompt in part.plain),
    ), triggers


@dataclass(frozen=True)
class _OwnImages:
    """The user's images, read and checked before any work; None for a side that is drawn instead."""

    forget: ImageFolder | None
    retain: ImageFolder | None

    @property
    def skipped(self) -> int:
        return sum(side.skipped for side in (self.forget, self.retain) if side is not None)


def _own_images(
    concepts: Sequence[Concept], forget: str | Path | None, retain: str | Path | None, skip_bad: bool
) -> _OwnImages:
    first = concepts[0]
    caption = f"a picture in {first.name} style" if first.kind == "style" else article(first.name)
    return _OwnImages(
        # Of several concepts a picture without a caption could show any.
        read_image_folder(Path(forget), default_caption=caption if len(concepts) == 1 else None, skip_bad=skip_bad)
        if forget
        else None,
        read_image_folder(Path(retain), default_caption=None, skip_bad=skip_bad) if retain else None,
    )


def _check_captions(own: _OwnImages, concepts: Sequence[Concept], encoder: TextEncoder) -> None:
    """Raise DataError for a forget caption that is cut off before the concept and a retain caption that names it."""
    for caption, _ in own.forget.items if own.forget else ():
        if torch.equal(*encoder.tokenize([caption, _to_anchor(caption, concepts)])):
            raise DataError(
                f"--forget-images: the caption {caption[:60]!r} names the concept only after the encoder's last "
                "position; shorten it"
            )
    for caption, _ in own.retain.items if own.retain else ():
        named = [c.name for c in concepts if asks_for(caption, c)]
        if named:
            raise DataError(
                f"--retain-images: the caption {caption[:60]!r} names {named[0]!r}, which is to be erased; take the "
                "picture out, or caption what else it shows"
            )


@dataclass
class _Pictures:
    """Image features of forget and retain prompts: drawn by the pipeline itself, or the user's own."""

    model: Model
    pipe: Any
    encoder: TextEncoder
    clip: Any
    seed: int
    progress: Progress
    drawn: int = 32

    def features(
        self, sets: PromptSets, own: _OwnImages, concepts: Sequence[Concept]
    ) -> tuple[PromptSets, dict[str, Tensor]]:
        """The prompt sets (with the user's captions among them) and prompt → features (k, d_proj)."""
        features: dict[str, Tensor] = {}
        rng = random.Random(self.seed)
        to_draw: list[str] = []
        if own.forget is not None:
            pairs = tuple((caption, _to_anchor(caption, concepts)) for caption, _ in own.forget.items)
            sets = dataclasses.replace(sets, forget=tuple(dict.fromkeys((*pairs, *sets.forget))))
            self._add(features, own.forget.items)
        else:
            to_draw += rng.sample([p for p, _ in sets.forget], min(self.drawn, len(sets.forget)))
            to_draw += [p for p, _ in sets.forget_held_out[: self.drawn // 4]]
        if own.retain is not None:
            sets = dataclasses.replace(
                sets, retain=tuple(dict.fromkeys((*sets.retain, *(c for c, _ in own.retain.items))))
            )
            self._add(features, own.retain.items)
        else:
            pool = [p for p in sets.retain if p]
            to_draw += rng.sample(pool, min(self.drawn, len(pool)))
            to_draw += [p for p in sets.retain_held_out[: self.drawn // 4] if p]
        if to_draw:
            spec = self.model.spec
            images = draw(
                self.pipe,
                self.encoder,
                to_draw,
                noise_seeds("training", self.seed, len(to_draw)),
                steps=min(spec.steps, 10),
                guidance=spec.guidance,
                progress=_counter(self.progress, "drawing for the eraser", len(to_draw)),
            )
            self._add(features, [(p, Image.fromarray(i)) for p, i in zip(to_draw, images, strict=True)])
        return sets, features

    @torch.no_grad()
    def _add(self, features: dict[str, Tensor], items: Sequence[tuple[str, Image.Image]]) -> None:
        """Run the frozen image tower once over captioned images."""
        clip, _, processor = self.clip
        for start in range(0, len(items), 64):
            captions, images = zip(*items[start : start + 64], strict=True)
            pixels = processor(images=list(images), return_tensors="pt").pixel_values.to(self.model.device)
            vectors = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
            for caption, vector in zip(captions, vectors, strict=True):
                known = features.get(caption)
                features[caption] = vector[None] if known is None else torch.cat([known, vector[None]])


def _to_anchor(caption: str, concepts: Sequence[Concept]) -> str:
    """The caption with every erased word replaced by its anchor; a caption without any becomes the anchor itself."""
    text = normalise(caption)
    for concept in concepts:
        anchor = (concept.anchor or "thing").replace("\\", "")
        for word in sorted(concept.words, key=len, reverse=True):
            # With its plural, as `says` has it.
            text = re.sub(rf"\b{re.escape(normalise(word))}(s?)\b", rf"{anchor}\1", text)
    return text if text != normalise(caption) else article(concepts[0].anchor or "thing")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("erase-diffusion", "torch", "transformers", "diffusers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _record(
    model: Model,
    encoder: TextEncoder,
    writers: Sequence[PromptWriter],
    erasure: Erasure,
    triggers: Mapping[str, Sequence[str]],
    sets: PromptSets,
    own: _OwnImages,
    seed: int,
    seconds: float,
    verifications: Sequence[Verification],
) -> dict[str, Any]:
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
            for w in writers
        ],
        "method": erasure.method,
        "parameters": erasure.parameters | {"seed": seed},
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
            "sha256": source_hash(encoder),
            "class": "CLIPTextModel",
        },
        "erased": {"sha256": source_hash(erasure.encoder), "dtype": str(erasure.encoder.dtype).removeprefix("torch.")},
        "versions": _versions(),
        "device": model.device,
        "picture_dtype": str(model.dtype).removeprefix("torch."),
        "seconds": round(seconds, 3),
        "verification": [{"concept": w.name, **v.to_dict()} for w, v in zip(writers, verifications, strict=False)],
    }
