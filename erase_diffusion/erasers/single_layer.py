"""One step on one layer, after SLUG (arXiv 2407.11867): the layer that matters to the forget set and least to the rest.

Of every matrix of the text tower the importance ‖g_f‖/‖θ‖ of the forget loss's gradient is set against its alignment
|cos(g_f, g_r)| with the retain loss's; the layers that no other beats on both are tried, each with a bisected step.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from erase_diffusion.concepts import PromptSets
from erase_diffusion.erasers.base import Erasure, Needs, Progress, check_strength, silent
from erase_diffusion.erasers.losses import forgetting_loss, retention_loss
from erase_diffusion.erasers.training import Batches, make_batches, pick
from erase_diffusion.errors import ConfigError
from erase_diffusion.text_encoder import TextEncoder


@dataclass(frozen=True)
class SingleLayerConfig:
    """strength: how much of the step is taken.  bisections: of the step's length, on each layer that is tried.

    forgotten: the cosine of forget prompts with their pictures, as a share of the original's, that the step is to
    reach.
    """

    strength: float = 1.0
    bisections: int = 8
    forgotten: float = 0.25

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.bisections < 1:
            raise ConfigError(f"bisections must be at least 1, got {self.bisections}")


def pareto(importance: list[float], alignment: list[float]) -> list[int]:
    """Indices that no other beats in both a higher importance and a lower alignment, most important first."""
    order = sorted(range(len(importance)), key=lambda i: (-importance[i], alignment[i]))
    front: list[int] = []
    for i in order:
        if not front or alignment[i] < alignment[front[-1]]:
            front.append(i)
    return front


class SingleLayer:
    """Takes the shortest step on one matrix after which the forget prompts have left their pictures."""

    name: ClassVar[str] = "single-layer"
    needs: ClassVar[Needs] = "features"

    def __init__(self, config: SingleLayerConfig | None = None):
        self.config = config or SingleLayerConfig()

    def erase(
        self,
        encoder: TextEncoder,
        sets: PromptSets,
        images: Mapping[str, Tensor],
        *,
        seed: int = 0,
        progress: Progress = silent,
    ) -> Erasure:
        """Erase from a copy of `encoder`; of the tried layers the one that leaves the retain pairs best is kept."""
        work = encoder.copy()
        train, held_out = make_batches(encoder, sets, images, pictures_only=True)
        matrices = {n: p for n, p in work.model.named_parameters() if "layers." in n and p.ndim == 2}
        work.model.requires_grad_(True)
        forget, retain = (
            torch.autograd.grad(loss, list(matrices.values())) for loss in _losses(work, train, random.Random(seed))
        )
        work.model.requires_grad_(False)
        importance = [float(g.norm() / p.norm()) for g, p in zip(forget, matrices.values(), strict=True)]
        alignment = [
            abs(float(torch.cosine_similarity(g.flatten(), r.flatten(), dim=0)))
            for g, r in zip(forget, retain, strict=True)
        ]
        names, front = list(matrices), pareto(importance, alignment)

        def measure() -> tuple[float, float]:
            with torch.no_grad():
                cosine, loss = _losses(work, held_out, random.Random(seed))
            return float(cosine), float(loss)

        target = self.config.forgotten * measure()[0]
        tried: list[dict[str, float]] = []
        for done, index in enumerate(front):
            weight, gradient = matrices[names[index]], forget[index]
            source = weight.detach().clone()
            whole = -gradient * (source.norm() / gradient.norm().clamp_min(1e-12))
            low, high = 0.0, 1.0
            for _ in range(self.config.bisections):
                length = (low + high) / 2
                weight.copy_(source + length * whole)
                low, high = (low, length) if measure()[0] <= target else (length, high)
            weight.copy_(source + high * whole)
            cosine, loss = measure()
            tried.append({"layer": index, "step": high, "forgetting": cosine, "retention": loss})
            weight.copy_(source)
            progress(done + 1, len(front), names[index])
        # Of the layers that reach the target the one that keeps most; when none does, the one that comes nearest.
        best = min(tried, key=lambda t: (max(t["forgetting"] - target, 0.0), t["retention"]))
        index = int(best["layer"])
        weight, gradient = matrices[names[index]], forget[index]
        weight.add_(gradient * (weight.norm() / gradient.norm()), alpha=-best["step"] * self.config.strength)
        return Erasure(
            work, self.name, asdict(self.config), f"a step of {best['step']:.3f} on {names[index]}", tuple(tried)
        )


def _losses(work: TextEncoder, batch: Batches, rng: random.Random) -> tuple[Tensor, Tensor]:
    """The forgetting and the retention loss over all pairs that have a picture."""
    means = []
    for ids, pictures in ((batch.forget_ids, batch.forget_images), (batch.retain_ids, batch.retain_images)):
        chosen, image = pick(pictures, list(range(len(ids))), rng)
        assert image is not None  # the caller draws for both sides
        text = work.embed(ids[chosen])
        forgetting = pictures is batch.forget_images
        means.append(forgetting_loss(text, image) if forgetting else retention_loss(text, image, work.logit_scale))
    return means[0], means[1]
