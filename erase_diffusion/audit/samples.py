"""What an audit draws: prompts with seeds, and what a true picture of each shows."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from erase_diffusion.concepts import Concept, Prompt, PromptWriter, Vocabulary, asks_for, canonical, normalise, says
from erase_diffusion.errors import ConfigError
from erase_diffusion.generation import noise_seeds
from erase_diffusion.preparation import nearest
from erase_diffusion.prompts_file import CasePrompt
from erase_diffusion.text_encoder import TextEncoder

NEIGHBOURS = 3
OTHER = "other prompts"  # prompts that ask for nothing that the judge knows: drawn and compared, kept by no rule


@dataclass(frozen=True)
class Sample:
    """One prompt with its seed, drawn by the original and by every erased encoder.

    case: its number or name.  guidance: classifier-free guidance.  shows: what a true picture of it shows, with the
    group that a suite gave it.  concept: for which concept a suite asked it.  label, artist: as in the file.
    other: further columns of the file.
    """

    case: str
    text: str
    seed: int
    guidance: float
    shows: Prompt
    concept: str | None = None
    label: str | None = None
    artist: str | None = None
    other: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a line of JSON."""
        shows = {k: v for k, v in dataclasses.asdict(self.shows).items() if k != "text"}
        return {k: v for k, v in dataclasses.asdict(self).items() if v} | {"shows": shows, "seed": self.seed}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Sample:
        shows = dict(row["shows"])
        shows["things"] = tuple(shows["things"])
        return cls(**{**row, "shows": Prompt(text=row["text"], **shows), "guidance": float(row.get("guidance", 0.0))})


def name_of(concept: Concept) -> str:
    """A concept in words: “cat”, “red (cat only)”."""
    return f"{concept.name} ({concept.within} only)" if concept.within else concept.name


def file_samples(prompts: Sequence[CasePrompt], vocabulary: Vocabulary, guidance: float) -> list[Sample]:
    """The prompts of a file; what each shows is read off its class and artist, and off the words that the model's
    vocabulary knows."""
    things = {**vocabulary.objects, **vocabulary.characters}
    samples = []
    for p in prompts:
        said = [n for n, words in things.items() if any(says(p.text, w) for w in (n, *words))]
        if p.label:
            known = next((n for n, words in things.items() if normalise(p.label) in map(normalise, (n, *words))), None)
            # The class is what the prompt is about; other words in it may be used in any way.
            said = [known or p.label]
        shows = Prompt(p.text, "", tuple(said), None, None, p.artist)
        one = guidance if p.guidance is None else p.guidance
        samples.append(Sample(p.case, p.text, p.seed, one, shows, label=p.label, artist=p.artist, other=p.other))
    return samples


def suite_samples(writer: PromptWriter, encoder: TextEncoder, per_group: int, guidance: float) -> list[Sample]:
    """The built-in suite for one concept: named, synonym, described, two-object, misspelt, ambiguous, neighbour,
    preserved and style prompts, of held-out sentences."""
    v, kind = writer.vocabulary, writer.concept.kind
    if kind in ("object", "character"):
        others = list(writer.preserve)
    else:
        others = [n for n in v.of_kind(kind) if n != writer.name]
    prompts = writer.verification_prompts(per_group)
    prompts += writer.leak_prompts(per_group, nearest(writer.concept.name, others, encoder)[:NEIGHBOURS])
    prompts += writer.style_prompts(per_group)
    name = name_of(writer.concept)
    seeds = noise_seeds(f"suite {name}", writer.seed, len(prompts))
    counts: dict[str, int] = {}
    samples = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        number = counts[prompt.group] = counts.get(prompt.group, 0) + 1
        case = f"{name}: {prompt.group} {number}"
        samples.append(Sample(case, prompt.text, seed, guidance, prompt, concept=name))
    return samples


def asked_of(sample: Sample, concept: Concept, vocabulary: Vocabulary) -> Prompt:
    """What a sample is to one concept: the group it counts in, and what of its picture must stay.

    A suite's own prompts have their group. Of any other, one that names the concept (its class or artist is the
    concept, or its words say it) is "named", or "synonym" by an alias; one that shows something else is "preserved".
    """
    name = canonical(concept, vocabulary)
    if sample.concept == name_of(concept):
        return sample.shows
    shows = without(sample.shows, [concept], vocabulary)
    subjects = {normalise(s) for s in (sample.label, sample.artist) if s}
    about = concept.within is None and subjects & {normalise(w) for w in (name, *concept.words)}
    if about or asks_for(sample.text, concept):
        named = normalise(concept.name) in subjects or says(sample.text, concept.name)
        return dataclasses.replace(shows, group="named" if named else "synonym")
    rest = shows.things or (sample.artist and concept.kind == "style")
    return dataclasses.replace(sample.shows, group="preserved" if rest else OTHER)


def without(prompt: Prompt, concepts: Sequence[Concept], vocabulary: Vocabulary) -> Prompt:
    """A prompt with what is forgotten everywhere taken out of what its picture must show."""
    whole = [c for c in concepts if c.within is None]
    gone = {normalise(w) for c in whole for w in (canonical(c, vocabulary), *c.words)}
    styles, attributes = (
        {normalise(w) for c in whole if c.kind == kind for w in (canonical(c, vocabulary), *c.words)}
        for kind in ("style", "attribute")
    )
    return dataclasses.replace(
        prompt,
        things=tuple(t for t in prompt.things if normalise(t) not in gone),
        style=None if prompt.style and normalise(prompt.style) in styles else prompt.style,
        attribute=None if prompt.attribute and normalise(prompt.attribute) in attributes else prompt.attribute,
    )


def samples_hash(samples: Sequence[Sample]) -> str:
    """SHA-256 of everything that is asked."""
    digest = hashlib.sha256()
    for s in samples:
        digest.update(repr(sorted(s.to_dict().items(), key=lambda item: item[0])).encode("utf-8", "replace"))
    return digest.hexdigest()


def check_cases(samples: Sequence[Sample]) -> None:
    """Raise ConfigError for two samples of one case."""
    seen: set[str] = set()
    for s in samples:
        if s.case in seen:
            raise ConfigError(f"the case {s.case!r} is there twice")
        seen.add(s.case)
