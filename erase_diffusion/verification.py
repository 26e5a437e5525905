"""The quick check after an erasure: original and erased drawn from the same noise, judged by a separate CLIP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from erase_diffusion.checker import Calibration, CLIPChecker, calibrate
from erase_diffusion.concepts import Concept, Prompt, PromptWriter, canonical
from erase_diffusion.errors import NothingToEraseError
from erase_diffusion.generation import draw, noise_seeds
from erase_diffusion.metrics import (
    EXIT_CODES,
    EXIT_NOT_PRESERVED,
    MAIN_ROW,
    Limits,
    Rate,
    Verdict,
    conclude,
    damaged,
    kept,
    rate,
)
from erase_diffusion.models import Model
from erase_diffusion.text_encoder import TextEncoder, weights_hash

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Verification:
    """What was found before and after, group by group, and what follows from it.

    groups: group → the concept's found rate (before, after).  kept: what must stay → share kept of what the
    original showed.  calibration: the judge's threshold and error rates.  rule: the verdict's reason in words.
    clip_score: mean CLIPScore of preserved prompts (before, after).
    changed: of the concept's own prompts, those whose picture is another one.  images: how the pictures were drawn.
    """

    verdict: Verdict
    rule: str
    damaged: tuple[str, ...]
    groups: Mapping[str, tuple[Rate, Rate]]
    kept: Mapping[str, Rate]
    calibration: Calibration
    clip_score: tuple[float, float]
    changed: Rate
    limits: Limits
    images: Mapping[str, Any]
    samples: tuple[tuple[Prompt, np.ndarray, np.ndarray], ...] = field(default=(), repr=False)

    @property
    def preserved(self) -> bool:
        """Whether everything that must stay is proven kept."""
        return not self.damaged

    @property
    def exit_code(self) -> int:
        """0 only when the concept is removed and the rest preserved."""
        code = EXIT_CODES[self.verdict]
        return EXIT_NOT_PRESERVED if code == 0 and not self.preserved else code

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `erasure.json`."""
        return {
            "verdict": self.verdict,
            "rule": self.rule,
            "preserved": self.preserved,
            "not_proven_kept": list(self.damaged),
            "exit_code": self.exit_code,
            "found": {g: {"before": b.to_dict(), "after": a.to_dict()} for g, (b, a) in self.groups.items()},
            "kept": {name: r.to_dict() for name, r in self.kept.items()},
            "checker": self.calibration.to_dict(),
            "clip_score_preserved": {"before": round(self.clip_score[0], 3), "after": round(self.clip_score[1], 3)},
            "pictures_changed": self.changed.to_dict(),
            "limits": asdict(self.limits),
            "images": dict(self.images),
        }


@dataclass(frozen=True)
class Look:
    """Pictures of prompts by one encoder, uint8 (n, height, width, 3), what the judge sees in each (`judge`), and each
    one's CLIPScore with its own prompt (n,)."""

    images: np.ndarray
    judged: Mapping[str, list[Any]]
    clip_scores: np.ndarray

    def drift(self, other: Look) -> np.ndarray:
        """Mean pixel difference (n,), of 255, from the same prompts' pictures from the same noise."""
        apart: np.ndarray = np.abs(self.images.astype(np.float32) - other.images.astype(np.float32)).mean((1, 2, 3))
        return apart


@dataclass
class Verifier:
    """Everything of a model that a verification needs, loaded and calibrated once."""

    model: Model
    original: TextEncoder
    pipe: StableDiffusionPipeline
    checker: CLIPChecker

    def draw(
        self, encoder: TextEncoder, prompts: Sequence[str], role: str, seed: int, progress: Progress, **options: Any
    ) -> np.ndarray:
        """Pictures of prompts, from noise that belongs to this role and seed and to nothing else."""
        spec = self.model.spec
        return draw(
            self.pipe,
            encoder,
            prompts,
            noise_seeds(role, seed, len(prompts)),
            steps=spec.steps,
            guidance=spec.guidance,
            progress=progress,
            **options,
        )

    def presence(self, writer: PromptWriter, embeddings: Tensor) -> Tensor:
        """Probability (n,) that the concept that `writer` writes of is in each picture."""
        return presence(self.checker, writer.concept, embeddings)

    def calibrate(self, writer: PromptWriter, *, images: int, progress: Progress = lambda n: None) -> Calibration:
        """Draw the unedited model's pictures with and without the concept and set the threshold on them.

        images: how many of each sort: with the concept, of other things, empty scenes, malformed.
        Raises NothingToEraseError when the model (almost) never draws the concept.
        """
        with_concept, others, empty = writer.calibration_prompts(images)
        early = max(1, self.model.spec.steps // 4)
        drawn = self.draw(self.original, [*with_concept, *others, *empty], "calibration", writer.seed, progress)
        half = self.draw(self.original, others[: images // 2], "half-drawn", writer.seed, progress, stop_at=early)
        malformed = np.concatenate([half, blobs(images - len(half), drawn.shape[1:3], seed=writer.seed)])
        scores = self.presence(writer, self.checker.embed_images(np.concatenate([drawn, malformed]))).cpu().numpy()
        calibration = calibrate(scores[: len(with_concept)].tolist(), scores[len(with_concept) :].tolist())
        found = Rate(calibration.misses.total - calibration.misses.found, calibration.misses.total)
        if found.high < 0.5:
            raise NothingToEraseError(
                f"{self.model.name} does not draw {writer.concept.name!r}: the judge finds it in {found} pictures that "
                "ask for it, so there is nothing to erase; check the spelling and --kind"
            )
        return calibration

    def look(
        self,
        writer: PromptWriter,
        encoder: TextEncoder,
        prompts: Sequence[Prompt],
        calibration: Calibration,
        *,
        progress: Progress = lambda n: None,
    ) -> Look:
        """Draw prompts with an encoder, from noise that is the same for every encoder, and judge the pictures."""
        texts = [p.text for p in prompts]
        images = self.draw(encoder, texts, "verification", writer.seed, progress)
        embeddings = self.checker.embed_images(images)
        judged = judge(self.checker, writer, prompts, embeddings, calibration)
        return Look(images, judged, self.checker.clip_score(embeddings, texts).cpu().numpy())

    def verify(
        self,
        writer: PromptWriter,
        erased: TextEncoder,
        calibration: Calibration,
        *,
        per_group: int,
        limits: Limits | None = None,
        progress: Progress = lambda n: None,
    ) -> Verification:
        """Ask original and erased with held-out prompts from the same noise, and conclude from the intervals."""
        limits = limits or Limits()
        prompts = writer.verification_prompts(per_group)
        before, after = (self.look(writer, e, prompts, calibration, progress=progress) for e in (self.original, erased))
        groups = found_table(prompts, before.judged, after.judged)
        kept_rates = keep_table(prompts, before.judged, after.judged)
        own = [i for i, p in enumerate(prompts) if p.group in ("named", "synonym")]
        changed = rate((after.drift(before)[own] > limits.unchanged).tolist())
        rest = [i for i, p in enumerate(prompts) if p.group == "preserved"]
        verdict, rule = conclude(groups, kept_rates, changed, limits)
        shown = sample_indices(prompts)
        return Verification(
            verdict=verdict,
            rule=rule,
            damaged=tuple(damaged(kept_rates, limits)),
            groups=groups,
            kept=kept_rates,
            calibration=calibration,
            clip_score=(float(before.clip_scores[rest].mean()), float(after.clip_scores[rest].mean())),
            changed=changed,
            limits=limits,
            images={
                "steps": self.model.spec.steps,
                "guidance": self.model.spec.guidance,
                "count": 2 * len(prompts),
                "seed": writer.seed,
                "judge": self.model.judge_name,
                "judge_sha256": weights_hash(dict(self.checker.model.state_dict())),
            },
            samples=tuple((prompts[i], before.images[i], after.images[i]) for i in shown),
        )


def sample_indices(prompts: Sequence[Prompt]) -> list[int]:
    """The first prompts of each group, for the before/after picture: chosen before anything is judged."""
    wanted = {"named": 4, "synonym": 2, "described": 2, "two-object": 2, "preserved": 4}
    chosen: list[int] = []
    for group, count in wanted.items():
        chosen += [i for i, p in enumerate(prompts) if p.group == group][:count]
    return chosen


def presence(checker: CLIPChecker, concept: Concept, embeddings: Tensor) -> Tensor:
    """Probability (n,) of a concept of any kind in each picture; within a thing, the lesser of look and thing."""
    if concept.within is not None:
        thing = checker.things(embeddings, {concept.within: concept.within})[concept.within]
        return torch.minimum(thing, presence(checker, replace(concept, within=None), embeddings))
    vocabulary = checker.vocabulary
    name = canonical(concept, vocabulary)
    if concept.kind == "style":
        phrases = (
            () if name in vocabulary.styles else (f"a {concept.name} picture", f"a picture in {concept.name} style")
        )
        return checker.styles(embeddings, {name: phrases} if phrases else None)[name]
    if concept.kind == "attribute":
        return checker.attributes(embeddings, extra=name)[name]
    # Named even when the vocabulary holds it: in a long vocabulary pairs are formed with the named things.
    word = name if name in {**vocabulary.objects, **vocabulary.characters} else concept.name
    return checker.things(embeddings, {name: word})[name]


def judge(
    checker: CLIPChecker, writer: PromptWriter, prompts: Sequence[Prompt], embeddings: Tensor, calibration: Calibration
) -> dict[str, list[Any]]:
    """What the judge sees in each picture: the concept (calibrated), and whether each thing, attribute, place and
    style that its prompt names is there (None where the prompt names none)."""
    concept = presence(checker, writer.concept, embeddings)
    # The preserved things by their own names; the user's own words for what the vocabulary doesn't hold.
    things = checker.things(embeddings, {n: n for n in writer.preserve})
    attributes = checker.attributes(embeddings)
    places, styles = checker.places(embeddings), checker.styles(embeddings)
    best = [likeliest(table) for table in (attributes, places, styles)]

    def named(i: int, expected: str | None, kind: int) -> bool | None:
        return None if expected is None else best[kind][i] == expected

    found = [bool(c >= calibration.threshold) for c in concept.tolist()]
    others: list[bool | None] = []
    attribute_there: list[bool | None] = []
    for i, p in enumerate(prompts):
        rest = [t for t in p.things if t != writer.name and t in things]
        others.append(all(bool(things[t][i] >= 0.5) for t in rest) if rest else None)
        attribute_there.append(named(i, p.attribute, 0))
    return {
        "concept": found,
        "others": others,
        "attribute": attribute_there,
        "place": [named(i, p.place, 1) for i, p in enumerate(prompts)],
        "style": [named(i, p.style, 2) for i, p in enumerate(prompts)],
    }


def likeliest(table: Mapping[str, Tensor]) -> list[str]:
    """The name of the highest probability for each picture, of a table of name → (n,)."""
    names = list(table)
    return [names[i] for i in torch.stack(list(table.values())).argmax(0).tolist()]


# Groups of prompts that don't ask for the concept, and what of their pictures must stay: by its row, the fields of
# `judge` that count (None where a prompt doesn't say it).
KEPT_GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "preserved": (MAIN_ROW, ("others",)),
    "same thing": ("same thing, other looks", ("others", "attribute", "style")),
    "same look": ("same look, other things", ("others", "attribute", "style")),
    "neighbour thing": ("nearest concepts", ("others",)),
    "neighbour attribute": ("nearest concepts", ("attribute",)),
    "neighbour style": ("nearest concepts", ("style",)),
    "other meaning": ("other meaning of the word", ("attribute",)),
    "styles": ("other styles", ("others", "style")),
}


def found_table(
    prompts: Sequence[Prompt], before: Mapping[str, list[Any]], after: Mapping[str, list[Any]]
) -> dict[str, tuple[Rate, Rate]]:
    """The concept's found rate before and after in each group of prompts that ask for it."""
    groups = {}
    for group in dict.fromkeys(p.group for p in prompts if p.group not in KEPT_GROUPS):
        index = [i for i, p in enumerate(prompts) if p.group == group]
        groups[group] = (rate([before["concept"][i] for i in index]), rate([after["concept"][i] for i in index]))
    return groups


def keep_table(
    prompts: Sequence[Prompt], before: Mapping[str, list[Any]], after: Mapping[str, list[Any]]
) -> dict[str, Rate]:
    """What must stay, as shares of what the original showed: preserved concepts, the other object of a pair,
    and the rest (attribute, place, style) of prompts that name the erased concept."""

    def share(field_name: str, groups: set[str]) -> Rate:
        index = [i for i, p in enumerate(prompts) if p.group in groups and before[field_name][i] is not None]
        return kept([before[field_name][i] for i in index], [after[field_name][i] for i in index])

    table: dict[str, Rate] = {}
    for group, (row, fields) in KEPT_GROUPS.items():
        index = [i for i, p in enumerate(prompts) if p.group == group]
        index = [i for i in index if any(before[f][i] is not None for f in fields)]
        if index or group == "preserved":
            table[row] = kept(*([all(j[f][i] is not False for f in fields) for i in index] for j in (before, after)))
    if any(p.group == "two-object" for p in prompts):
        table["other object of a pair"] = share("others", {"two-object"})
    asked = {"named", "synonym"}
    if any(
        p.group in asked and any(t for t in p.things) and before["others"][i] is not None for i, p in enumerate(prompts)
    ):
        table["object of an erased prompt"] = share("others", asked)
    for name in ("attribute", "place", "style"):
        table[f"{name} of an erased prompt"] = share(name, asked)
        table[f"{name} of a preserved prompt"] = share(name, {"preserved"})
    return {name: r for name, r in table.items() if r.total or name == MAIN_ROW}


def blobs(count: int, size: tuple[int, int], *, seed: int) -> np.ndarray:
    """Malformed pictures: soft coloured blobs on a soft ground, uint8 (count, height, width, 3)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand((count, 3, 5, 5), generator=generator)
    smooth = torch.nn.functional.interpolate(noise, size=size, mode="bicubic", align_corners=False).clamp(0, 1)
    return np.asarray((smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def make_checker(model: Model, source: str | None = None) -> CLIPChecker:
    """The model's independent judge, or another CLIP (folder or hub id), as a checker over the model's vocabulary."""
    judge_model, tokenizer, processor = model.judge(source)
    return CLIPChecker(judge_model, tokenizer, processor, model.vocabulary)
