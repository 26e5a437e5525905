"""Three baselines that every table of erasures shows: CLIP's own contrastive loss, up on the forget set, down on the
retain set, or both. They know nothing of what a diffusion pipeline reads, which is what the table shows.

`retain-finetune` trains on the retain set alone: what a fine-tune without any forgetting does to the figures.
`gradient-ascent` and `gradient-difference` are the usual baselines of the unlearning papers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from erase_diffusion.concepts import PromptSets
from erase_diffusion.erasers.base import Erasure, Needs, Progress, silent
from erase_diffusion.erasers.losses import contrastive_loss
from erase_diffusion.erasers.training import Batches, Schedule, make_batches, pick, train
from erase_diffusion.text_encoder import TextEncoder


class _Contrastive:
    """Ascent on forget pairs, descent on retain pairs, in one batch with each other as negatives."""

    name: ClassVar[str]
    needs: ClassVar[Needs] = "features"
    forget: ClassVar[bool]
    retain: ClassVar[bool]

    def __init__(self, config: Schedule | None = None):
        self.config = config or Schedule()

    def erase(
        self,
        encoder: TextEncoder,
        sets: PromptSets,
        images: Mapping[str, Tensor],
        *,
        seed: int = 0,
        progress: Progress = silent,
    ) -> Erasure:
        """Train a copy of `encoder`. Raises ConfigError when the loss stops being finite."""

        def losses(
            work: TextEncoder, batch: Batches, forget: list[int], retain: list[int], rng: random.Random
        ) -> dict[str, Tensor]:
            chosen, image = pick(batch.forget_images, forget, rng)
            kept, other = pick(batch.retain_images, retain, rng)
            assert image is not None and other is not None  # the caller draws for both sides
            ids = torch.cat([batch.forget_ids[forget][chosen], batch.retain_ids[retain][kept]])
            text = work.embed(ids)
            loss = contrastive_loss(text, torch.cat([image, other]), work.logit_scale)
            terms = {}
            if self.forget:
                # A pair at chance is forgotten: beyond it ascent has no end, and only breaks the rest.
                terms["ascent"] = -loss[: len(chosen)].clamp_max(math.log(len(loss))).mean()
            if self.retain:
                terms["descent"] = loss[len(chosen) :].mean()
            return {"total": torch.stack(list(terms.values())).sum(), **terms}

        batches = make_batches(encoder, sets, images, pictures_only=True)
        return train(self.name, encoder, batches, losses, self.config, seed=seed, progress=progress)


class RetainFinetune(_Contrastive):
    """Descent on the retain set alone."""

    name = "retain-finetune"
    forget, retain = False, True


class GradientAscent(_Contrastive):
    """Ascent on the forget set alone."""

    name = "gradient-ascent"
    forget, retain = True, False


class GradientDifference(_Contrastive):
    """Ascent on the forget set and descent on the retain set."""

    name = "gradient-difference"
    forget, retain = True, True
