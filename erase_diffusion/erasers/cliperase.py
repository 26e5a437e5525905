"""CLIPErase (arXiv 2410.23330): forgetting, retention and consistency, on the text tower alone or on both.

The paper's three modules see a text only through its pooled end-of-text vector. A Stable Diffusion pipeline
reads every position, and the empty prompt too. Two sequence terms hold and move those: with their weights at
zero this is the paper's form. A frozen image tower's features are computed once, by the caller.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from erase_diffusion.concepts import PromptSets
from erase_diffusion.erasers.base import Erasure, Needs, Progress, silent
from erase_diffusion.erasers.losses import (
    consistency_loss,
    forgetting_loss,
    retention_loss,
    sequence_forgetting_loss,
    sequence_retention_loss,
)
from erase_diffusion.erasers.training import Batches, Schedule, make_batches, pick, train
from erase_diffusion.errors import ConfigError
from erase_diffusion.text_encoder import TextEncoder


@dataclass(frozen=True)
class CLIPEraseConfig(Schedule):
    """Weights of the terms, beside the schedule.

    retention, forgetting, consistency: the paper's λ1, λ2, λ3.
    sequence_forgetting, sequence_retention: weights of the two terms over all positions; the paper
    has neither (0 and 0, with `forgetting_form` "raw"). By default 10 and 300; 30 and 100 where the retain prompts say
    the very words that are forgotten, and otherwise hold them (red, on cats alone).
    forgetting_form: "cosine", or the paper's "raw" dot product.
    towers: "text" trains the text tower against a frozen image tower, all that a pipeline needs; "both" trains the
    two, as the paper does, and the whole CLIP is what is erased.
    """

    retention: float = 1.0
    forgetting: float = 3.0
    consistency: float = 3.0
    sequence_forgetting: float | None = None
    sequence_retention: float | None = None
    forgetting_form: Literal["raw", "cosine"] = "cosine"
    towers: Literal["text", "both"] = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.forgetting_form not in ("raw", "cosine"):
            raise ConfigError(f"forgetting_form must be raw or cosine, got {self.forgetting_form!r}")
        if self.towers not in ("text", "both"):
            raise ConfigError(f"towers must be text or both, got {self.towers!r}")


class CLIPErase:
    """Trains a copy of the text tower, or of both, with Adam; keeps the best held-out checkpoint."""

    name: ClassVar[str] = "cliperase"

    def __init__(self, config: CLIPEraseConfig | None = None):
        self.config = config or CLIPEraseConfig()

    @property
    def needs(self) -> Needs:
        """Features of pictures; the pictures themselves when the image tower changes under way."""
        return "pixels" if self.config.towers == "both" else "features"

    def erase(
        self,
        encoder: TextEncoder,
        sets: PromptSets,
        images: Mapping[str, Tensor],
        *,
        seed: int = 0,
        progress: Progress = silent,
    ) -> Erasure:
        """Erase from a copy of `encoder`. Raises ConfigError when the loss stops being finite."""
        given = self.config
        forgetting, holding = (30.0, 100.0) if sets.near else (10.0, 300.0)
        config = replace(
            given,
            sequence_forgetting=forgetting if given.sequence_forgetting is None else given.sequence_forgetting,
            sequence_retention=holding if given.sequence_retention is None else given.sequence_retention,
        )
        # The paper's form sees only what has a picture.
        paper = not (config.sequence_forgetting or config.sequence_retention)
        batches = make_batches(encoder, sets, images, pictures_only=paper)
        variance = batches[0].retain_states.flatten(0, 1).var(0).clamp_min(1e-6)
        tower = encoder.image_tower.copy() if config.towers == "both" and encoder.image_tower else None

        def see(pictures: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            """The image features, and the original's where they are no longer the same."""
            if tower is None or pictures is None:
                return pictures, None
            assert encoder.image_tower is not None
            return tower.embed(pictures), encoder.image_tower.features(pictures)

        def both(work: TextEncoder) -> nn.Module:
            return nn.ModuleList([work.model, tower.model] if tower else [work.model]).requires_grad_(True)

        def losses(
            work: TextEncoder, batch: Batches, forget: list[int], retain: list[int], rng: random.Random
        ) -> dict[str, Tensor]:
            ids = torch.cat([batch.forget_ids[forget], batch.retain_ids[retain]])
            states = work.hidden(ids)
            text = work.project(work.pooled(states, ids))
            n = len(forget)
            terms: dict[str, Tensor] = {}
            pictured, image = pick(batch.forget_images, forget, rng)
            image, _ = see(image)
            if image is not None:
                terms["forgetting"] = forgetting_loss(text[:n][pictured], image, config.forgetting_form)
            kept, image = pick(batch.retain_images, retain, rng)
            image, original = see(image)
            if image is not None and len(kept) > 1:
                before = batch.retain_text[[retain[i] for i in kept]]
                terms["retention"] = retention_loss(text[n:][kept], image, work.logit_scale)
                terms["consistency"] = consistency_loss(before, text[n:][kept], image, work.logit_scale, original)
            if config.sequence_forgetting:
                terms["sequence_forgetting"] = sequence_forgetting_loss(
                    states[:n], batch.anchor_states[forget], batch.apart[forget]
                )
            if config.sequence_retention:
                terms["sequence_retention"] = sequence_retention_loss(states[n:], batch.retain_states[retain], variance)
            total = torch.stack([getattr(config, name) * value for name, value in terms.items()]).sum()
            return {"total": total, **terms}

        erasure = train(self.name, encoder, batches, losses, config, seed=seed, progress=progress, prepare=both)
        return erasure if tower is None else replace(erasure, encoder=replace(erasure.encoder, image_tower=tower))
