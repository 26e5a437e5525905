"""What every erasure needs before a method comes in: what to forget, what to keep, and pictures of both."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from erase_diffusion.concepts import (
    Concept,
    PromptSets,
    PromptWriter,
    Vocabulary,
    article,
    asks_for,
    normalise,
    preserved,
    resolve_concept,
)
from erase_diffusion.erasers.base import check_rank
from erase_diffusion.errors import ConfigError, DataError
from erase_diffusion.generation import draw, noise_seeds
from erase_diffusion.imagefolder import ImageFolder, read_image_folder
from erase_diffusion.models import Model
from erase_diffusion.text_encoder import TextEncoder
from erase_diffusion.triggers import find_triggers

if TYPE_CHECKING:
    from transformers import CLIPTextModel

# Stage, done, total: what a progress display is told.
Progress = Callable[[str, int, int], None]


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
        gone = erased | {normalise(w) for w in concept.words}
        candidates = [a for a in vocabulary.attributes if normalise(a) not in gone]
    else:
        candidates = [n for n in preserve if n in vocabulary.objects] or list(preserve)
    if not candidates:
        raise ConfigError(f"nothing is left that {concept.name!r} could become; name it with --anchor")
    return dataclasses.replace(concept, anchor=nearest(concept.name, candidates, encoder)[0])


@torch.no_grad()
def nearest(word: str, candidates: Sequence[str], encoder: TextEncoder) -> list[str]:
    """The candidates by how near the text tower holds them to the word, the nearest first (cosine, centred)."""
    ids = encoder.tokenize([article(w) for w in (word, *candidates)])
    pooled = encoder.pooled(encoder.hidden(ids), ids)
    centred = F.normalize(pooled - pooled.mean(0), dim=-1)
    return [candidates[i] for i in (centred[1:] @ centred[0]).argsort(descending=True).tolist()]


@dataclass(frozen=True)
class Preparation:
    """Concepts with their anchors and prompts, and the encoder to erase them from: what every method starts with.

    clip: the paired CLIP's model, tokenizer and processor, or None where no method asked for it.
    original: the unedited encoder, `encoder` itself unless the erasure goes on from an earlier one.
    writers: of the prompts, one a concept.  own: the user's images.
    earlier: writers of what `encoder` has forgotten already, and has to go on forgetting; `held` are those that go on
    as what they became, which the others cannot, since it goes now.
    """

    model: Model
    original: TextEncoder
    encoder: TextEncoder
    clip: Any
    writers: tuple[PromptWriter, ...]
    own: OwnImages
    seed: int
    earlier: tuple[PromptWriter, ...] = ()
    held: tuple[Concept, ...] = ()

    @property
    def concepts(self) -> tuple[Concept, ...]:
        return tuple(w.concept for w in self.writers)

    def prompt_sets(self) -> tuple[PromptSets, dict[str, list[str]]]:
        """The forget pairs of all concepts together, retain prompts that name none of them, and the words that were
        found to ask for each concept without naming it."""
        parts, triggers, many = [], {}, len(self.writers)
        known: dict[str, Tensor] = {}
        erased = {normalise(w) for concept in self.concepts for w in concept.words}
        for writer in self.writers:
            concept, v = writer.concept, writer.vocabulary
            found: list[str] = []
            if concept.kind in ("object", "character"):
                # All that the vocabulary holds competes, whatever is preserved: between two words anything is a
                # trigger.
                others = {**v.objects, **v.characters, **writer.preserve}
                rest = [words for words in others.values() if not erased & {normalise(w) for w in words}]
                found = find_triggers(self.encoder, v, concept.words, rest, known=known)
            triggers[concept.name] = found
            parts.append(writer.training_sets(*share(many), found))

        def clean(prompts: Sequence[str]) -> tuple[str, ...]:
            # With several concepts, one's retain prompts may name another (a style beside an object).
            alone = many == 1 and not self.earlier
            return tuple(p for p in dict.fromkeys(prompts) if alone or not any(asks_for(p, c) for c in self.concepts))

        # What is forgotten already is held where it is now, at its anchor; unless that goes too.
        told = [w.training_sets(-(-320 // len(self.earlier)), 1) for w in self.earlier]
        held = [
            p
            for w, part in zip(self.earlier, told, strict=True)
            for p, _ in (part.forget if w.concept in self.held else ())
            if not any(asks_for(p, c) for c in self.concepts)
        ]
        parts += [part for w, part in zip(self.earlier, told, strict=True) if w.concept not in self.held]
        return PromptSets(
            tuple(pair for part in parts for pair in part.forget),
            clean([*(p for part in parts for p in part.retain), *held]),
            tuple(pair for part in parts for pair in part.forget_held_out),
            clean([p for part in parts for p in part.retain_held_out]),
            tuple(word for part in parts for word in part.words),
            tuple(prompt for part in parts for prompt in part.plain),
            (classes := tuple(c for part in parts for c in part.forget_classes)),
            tuple(c for c in dict.fromkeys(c for part in parts for c in part.retain_classes) if c not in classes),
            near=any(part.near for part in parts),
        ), triggers

    def pictures(
        self, sets: PromptSets, pipe: Any, progress: Progress, *, drawn: int = 32
    ) -> tuple[PromptSets, dict[str, Tensor]]:
        """The prompt sets with the user's captions among them, and prompt → pixel values (k, 3, size, size).

        Pictures of a side that the user brings none of are drawn by `pipe` with the encoder to erase from, `drawn` to
        train on and a quarter of that to stop by.
        """
        pixels: dict[str, Tensor] = {}
        rng = random.Random(self.seed)
        to_draw: list[str] = []
        if self.own.forget is not None:
            pairs = tuple((caption, to_anchor(caption, self.concepts)) for caption, _ in self.own.forget.items)
            sets = dataclasses.replace(sets, forget=tuple(dict.fromkeys((*pairs, *sets.forget))))
            self._add(pixels, self.own.forget.items)
        else:
            to_draw += rng.sample([p for p, _ in sets.forget], min(drawn, len(sets.forget)))
            to_draw += [p for p, _ in sets.forget_held_out[: drawn // 4]]
        if self.own.retain is not None:
            captions = tuple(caption for caption, _ in self.own.retain.items)
            sets = dataclasses.replace(sets, retain=tuple(dict.fromkeys((*sets.retain, *captions))))
            self._add(pixels, self.own.retain.items)
        else:
            pool = [p for p in sets.retain if p]
            to_draw += rng.sample(pool, min(drawn, len(pool)))
            to_draw += [p for p in sets.retain_held_out[: drawn // 4] if p]
        if to_draw:
            spec = self.model.spec
            images = draw(
                pipe,
                self.encoder,
                to_draw,
                noise_seeds("training", self.seed, len(to_draw)),
                steps=min(spec.steps, 10),
                guidance=spec.guidance,
                progress=counter(progress, "drawing for the eraser", len(to_draw)),
            )
            self._add(pixels, [(p, Image.fromarray(i)) for p, i in zip(to_draw, images, strict=True)])
        return sets, pixels

    def _add(self, pixels: dict[str, Tensor], items: Sequence[tuple[str, Image.Image]]) -> None:
        """Add captioned images as the image tower takes them."""
        processor = self.clip[2]
        for caption, image in items:
            one = processor(images=image, return_tensors="pt").pixel_values.to(self.model.device)
            known = pixels.get(caption)
            pixels[caption] = one if known is None else torch.cat([known, one])


def share(concepts: int) -> tuple[int, int]:
    """How many forget pairs and retain prompts each of so many concepts gets: together not many more than one alone."""
    return max(8, min(320, 1280 // concepts)), max(8, 640 // concepts)


def prepare(
    concepts: Sequence[Concept],
    model: Model,
    *,
    preserve: Sequence[str] = (),
    needs_clip: bool = True,
    own: OwnImages | None = None,
    seed: int = 0,
    start: CLIPTextModel | None = None,
    earlier: Sequence[Concept] = (),
) -> Preparation:
    """Settle what is erased (aliases, anchors), what stays, and who writes their prompts; no picture is drawn.

    start: the erased text tower to go on from, and `earlier` what it has forgotten, with anchors.
    Raises ConfigError for words that contradict each other, ModelError, and DataError for a bad caption.
    """
    if not concepts:
        raise ConfigError("no concept given; name at least one to erase")
    concepts = [resolve_concept(c, model.vocabulary) for c in concepts]
    for c in concepts:
        if any(asks_for(c.name, e) or asks_for(e.name, c) for e in earlier if e.within is None and c.within is None):
            raise ConfigError(f"{c.name!r} is erased already from the encoder to go on from")
    together = [*concepts, *earlier]
    words = [
        [w for other in together if other is not c and other.within is None for w in other.words] for c in together
    ]
    keeps = [preserved(c, model.vocabulary, preserve, w) for c, w in zip(together, words, strict=True)]
    # A closed form needs no CLIP: it is worth a look when it is on disk, but not a download.
    clip = model.clip() if needs_clip or Path(model.spec.clip).is_dir() else None
    original = model.paired_text_encoder(clip[0]) if clip else model.text_encoder()
    encoder = original if start is None else dataclasses.replace(original, model=start.to(model.device))
    check_rank("an erasure", len(together), encoder)
    erased = {normalise(w) for c in together if c.within is None for w in c.words}
    writers: list[PromptWriter] = []
    for one, keep in zip(together, keeps, strict=True):
        becomes = [w.concept.anchor for w in writers if normalise(one.anchor or "") in map(normalise, w.concept.words)]
        if becomes and one in earlier:
            # What an earlier concept became goes now: both become the same.
            one = dataclasses.replace(one, anchor=becomes[0])
        anchored = resolve_anchor(one, model.vocabulary, keep, encoder, erased)
        if anchored.anchor and normalise(anchored.anchor) in erased:
            raise ConfigError(f"{one.name!r} cannot become {anchored.anchor!r}, which is to be erased as well")
        writers.append(PromptWriter(anchored, model.vocabulary, keep, seed, [c for c in together if c != one]))
    own = own or OwnImages(None, None)
    _check_captions(own, [w.concept for w in writers[: len(concepts)]], encoder)
    count = len(concepts)
    return Preparation(
        model, original, encoder, clip, tuple(writers[:count]), own, seed, tuple(writers[count:]), tuple(earlier)
    )


@dataclass(frozen=True)
class OwnImages:
    """The user's images, read and checked before any work; None for a side that is drawn instead."""

    forget: ImageFolder | None
    retain: ImageFolder | None

    @property
    def skipped(self) -> int:
        return sum(side.skipped for side in (self.forget, self.retain) if side is not None)


def read_own_images(
    concepts: Sequence[Concept], forget: str | Path | None, retain: str | Path | None, skip_bad: bool
) -> OwnImages:
    """Read the folders of --forget-images and --retain-images. Raises DataError."""
    first = concepts[0]
    caption = f"a picture in {first.name} style" if first.kind == "style" else article(first.name)
    return OwnImages(
        # Of several concepts a picture without a caption could show any.
        read_image_folder(Path(forget), default_caption=caption if len(concepts) == 1 else None, skip_bad=skip_bad)
        if forget
        else None,
        read_image_folder(Path(retain), default_caption=None, skip_bad=skip_bad) if retain else None,
    )


def _check_captions(own: OwnImages, concepts: Sequence[Concept], encoder: TextEncoder) -> None:
    """Raise DataError for a forget caption that is cut off before the concept and a retain caption that names it."""
    for caption, _ in own.forget.items if own.forget else ():
        if torch.equal(*encoder.tokenize([caption, to_anchor(caption, concepts)])):
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


def to_anchor(caption: str, concepts: Sequence[Concept]) -> str:
    """The caption with every erased word replaced by its anchor; a caption without any becomes the anchor itself."""
    text = normalise(caption)
    for concept in concepts:
        anchor = (concept.anchor or "thing").replace("\\", "")
        for word in sorted(concept.words, key=len, reverse=True):
            # With its plural, as `says` has it.
            text = re.sub(rf"\b{re.escape(normalise(word))}(s?)\b", rf"{anchor}\1", text)
    return text if text != normalise(caption) else article(concepts[0].anchor or "thing")


def counter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """A count of finished pieces that tells `progress` of each."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(stage, min(done, total), total)

    return count
