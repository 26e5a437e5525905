"""The generation checker: calibrated zero-shot detection of a concept by a CLIP that is not the generator's.

An image is compared with every hypothesis of what is in it: one thing, two things, or none. The probability of
a concept is the sum over the hypotheses that hold it, so that a cat beside a car is found as both. Whether that
counts as 'found' is decided by a threshold calibrated on the unedited model's own pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from erase_diffusion.concepts import Vocabulary, article
from erase_diffusion.errors import ConfigError, ModelError
from erase_diffusion.metrics import Rate
from erase_diffusion.text_encoder import PREFIX, TextEncoder

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

THING_ENSEMBLE = ("{s}", "a picture of {s}", "there is {s}", "here we see {s}")
NOTHING = ("nothing", "a shapeless blob", "an unfinished smudge", "a picture of nothing")
NOTHING_THERE = ""  # the name of an attribute question's answer that there is nothing to have one
MAX_PAIRED = 24  # beyond this many things, pairs are formed only with those named to `things`


@dataclass(frozen=True)
class Calibration:
    """A concept's threshold and the error rates that were measured with it.

    false_alarms: on pictures that the threshold was not set on, the share without the concept (other things, empty
    scenes, malformed drawings) in which it is found.
    misses: share of pictures asked to show it in which it is not found (the model's own failures included).
    """

    threshold: float
    false_alarms: Rate
    misses: Rate

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "threshold": round(self.threshold, 6),
            "false_alarms": self.false_alarms.to_dict(),
            "misses": self.misses.to_dict(),
        }


@dataclass
class CLIPChecker:
    """Detects what a picture shows, among everything the vocabulary holds and 'none of these'.

    model, tokenizer, processor: the judge.  Raises ModelError from `refuse_generator` for the generator's own tower.
    """

    model: CLIPModel
    tokenizer: CLIPTokenizer
    processor: CLIPImageProcessor
    vocabulary: Vocabulary
    _texts: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def refuse_generator(self, encoder: TextEncoder) -> None:
        """Raise ModelError when the judge's text tower is the one that is erased: it would grade its own homework."""
        mine = {k.removeprefix(PREFIX): v for k, v in self.model.text_model.state_dict().items()}
        theirs = {k.removeprefix(PREFIX): v for k, v in encoder.state_dict().items()}
        shared = [k for k in mine if k in theirs and not k.endswith("position_ids")]
        # Stored in another dtype it is still the same tower.
        same = all(
            mine[k].shape == theirs[k].shape and torch.allclose(mine[k].cpu().float(), theirs[k].float(), atol=1e-2)
            for k in shared
        )
        if shared and same:
            raise ModelError(
                "the judge is the generator's own CLIP tower, which would grade its own homework; use another CLIP"
            )

    @torch.no_grad()
    def embed_images(self, images: np.ndarray | Sequence[Image.Image], batch_size: int = 128) -> Tensor:
        """Normalised image embeddings (n, d) of uint8 arrays (n, h, w, 3) or PIL images."""
        chunks = []
        for start in range(0, len(images), batch_size):
            batch = [Image.fromarray(i) if isinstance(i, np.ndarray) else i for i in images[start : start + batch_size]]
            pixels = self.processor(images=batch, return_tensors="pt").pixel_values.to(self.model.device)
            vectors = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
            chunks.append(F.normalize(vectors, dim=-1))
        return torch.cat(chunks)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Normalised text embeddings (n, d)."""
        length = self.model.config.text_config.max_position_embeddings
        batch = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        pooled = self.model.text_model(input_ids=batch.input_ids.to(self.model.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)

    def _ensemble(self, texts: Sequence[str]) -> Tensor:
        """The normalised mean (d,) of the embeddings of several wordings, computed once."""
        missing = [t for t in texts if t not in self._texts]
        if missing:
            self._texts.update(zip(missing, self.embed_texts(missing), strict=True))
        return F.normalize(torch.stack([self._texts[t] for t in texts]).mean(0), dim=-1)

    def _probabilities(self, embeddings: Tensor, hypotheses: Sequence[Sequence[str]]) -> Tensor:
        """Softmax (n, k) over hypotheses, each an ensemble of wordings."""
        labels = torch.stack([self._ensemble(h) for h in hypotheses])
        return (float(self.model.logit_scale.detach().exp()) * embeddings @ labels.T).softmax(-1)

    def things(
        self, embeddings: Tensor, names: Mapping[str, str] | None = None, *, paired: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Probability (n,) that each object or character is in the picture.

        names: extra name → word to look for beside the vocabulary's.  paired: with which names pairs are formed when
        there are too many for all; `names` if None.
        """
        words = {n: n for n in (*self.vocabulary.objects, *self.vocabulary.characters)} | dict(names or {})
        if len(words) < 2:
            raise ConfigError(f"zero-shot detection needs at least two concepts to choose from, got {list(words)}")
        single = [(n,) for n in words]
        some = list(names or {}) if paired is None else paired
        pairs = [p for p in itertools.combinations(words, 2) if len(words) <= MAX_PAIRED or set(p) & set(some)]
        held: list[tuple[str, ...]] = [(), *single, *pairs]
        wordings: list[list[str]] = [self._nothing()]
        for combination in held[1:]:
            said = " and ".join(article(words[n]) for n in combination)
            wordings.append([t.format(s=said) for t in THING_ENSEMBLE])
        p = self._probabilities(embeddings, wordings)
        return {n: p[:, [i for i, h in enumerate(held) if n in h]].sum(1) for n in words}

    def _nothing(self) -> list[str]:
        return [*NOTHING, *(phrase for phrases in self.vocabulary.alone.values() for phrase in phrases)]

    def attributes(self, embeddings: Tensor, extra: str | None = None) -> dict[str, Tensor]:
        """Probability (n,) of each attribute, and under `NOTHING_THERE` of nothing that could have one."""
        names = list(dict.fromkeys((*self.vocabulary.attributes, *([extra] if extra else []))))
        wordings = [[f"something {n}", f"a {n} thing"] for n in names]
        p = self._probabilities(embeddings, [*wordings, self._nothing()])
        return dict(zip([*names, NOTHING_THERE], p.T, strict=True))

    def places(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Probability (n,) of each place."""
        v = self.vocabulary
        wordings = [[*v.alone.get(n, ()), *(f"a thing {phrase}" for phrase in v.places[n])] for n in v.places]
        return dict(zip(v.places, self._probabilities(embeddings, wordings).T, strict=True))

    def styles(self, embeddings: Tensor, extra: Mapping[str, tuple[str, ...]] | None = None) -> dict[str, Tensor]:
        """Probability (n,) of each drawing style, the neutral one included."""
        styles = {**self.vocabulary.styles, **(extra or {})}
        p = self._probabilities(
            embeddings, [[f"{phrase} of a thing" for phrase in phrases] + list(phrases) for phrases in styles.values()]
        )
        return dict(zip(styles, p.T, strict=True))

    def clip_score(self, embeddings: Tensor, texts: Sequence[str]) -> Tensor:
        """CLIPScore (n,) = 100·max(cos, 0) of each image with its own text (Hessel et al. 2021, with w = 100)."""
        return 100 * (embeddings * self.embed_texts(texts)).sum(-1).clamp_min(0)


def calibrate(positives: Sequence[float], negatives: Sequence[float], *, false_alarms: float = 0.01) -> Calibration:
    """The lowest threshold of at least 0.5 whose false alarms stay at or under the wished share.

    positives, negatives: concept probabilities of pictures that should and should not show it. The threshold is
    set on every other negative, and its false alarms are counted on the rest, which it has never seen.
    Raises ConfigError with fewer than two negatives: a threshold that no picture could fail is none.
    """
    if len(negatives) < 2:
        raise ConfigError(f"calibration needs pictures without the concept, got {len(negatives)}")
    fit, held_out = np.sort(np.asarray(negatives[0::2], dtype=np.float64)), negatives[1::2]
    allowed = int(false_alarms * len(fit))
    threshold = float(max(0.5, np.nextafter(fit[len(fit) - 1 - allowed], 2.0)))
    alarms = Rate(sum(n >= threshold for n in held_out), len(held_out))
    missed = Rate(sum(p < threshold for p in positives), len(positives))
    return Calibration(threshold, alarms, missed)
