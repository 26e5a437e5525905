"""Forget, remind, restore: targeted forgetting of a subgroup inside a class, after arXiv 2506.03117, on the text tower.

Forget: low-rank updates of the matrices that matter more to the forget set than to the rest, by the cosine of forget
prompts with their pictures. Remind: the same updates fine-tuned contrastively on the retain set. Restore: the weights
blended with the original's, the share α chosen on held-out prompts. The paper's stage on batch norms has no place in
a text tower. At its place in a pipeline all positions count: both sequence terms stand beside the paper's, with
weights that can be set to zero.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from erase_diffusion.concepts import PromptSets
from erase_diffusion.erasers.base import Erasure, Needs, Progress, blend_into, silent
from erase_diffusion.erasers.losses import (
    forgetting_loss,
    retention_loss,
    sequence_forgetting_loss,
    sequence_retention_loss,
)
from erase_diffusion.erasers.training import Batches, Losses, Schedule, make_batches, pick, train
from erase_diffusion.errors import ConfigError
from erase_diffusion.text_encoder import TextEncoder


@dataclass(frozen=True)
class SubgroupConfig(Schedule):
    """The schedule of either training stage, and what is trained.

    matrices: how many matrices of the blocks are updated, those of the highest importance ratio.  rank: of an update.
    sequence_forgetting, sequence_retention: weights of the terms over all positions beside the paper's cosine and
    contrastive loss; 0 and 0 are the paper's form.
    ema: decay of the average of the weights in the second stage.  blends: how many values of α in (0, 1] are tried.
    """

    rate: ClassVar[float] = 10.0

    steps: int = 100
    matrices: int = 12
    rank: int = 16
    sequence_forgetting: float = 30.0
    sequence_retention: float = 100.0
    ema: float = 0.9
    blends: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.matrices, self.rank, self.blends) < 1:
            raise ConfigError(
                f"matrices, rank and blends must be at least 1, got {self.matrices}, {self.rank} and {self.blends}"
            )
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema must lie in [0, 1), got {self.ema}")


class LowRank(nn.Module):
    """A matrix plus a trained update of low rank, nothing at first (LoRA, arXiv 2106.09685)."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        out, inputs = weight.shape
        self.down = nn.Parameter(torch.randn(rank, inputs, device=weight.device) * inputs**-0.5)
        self.up = nn.Parameter(torch.zeros(out, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


class Subgroup:
    """Trains low-rank updates in two stages and blends the result with the original."""

    name: ClassVar[str] = "subgroup"
    needs: ClassVar[Needs] = "features"

    def __init__(self, config: SubgroupConfig | None = None):
        self.config = config or SubgroupConfig()

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
        config = self.config
        paper = not (config.sequence_forgetting or config.sequence_retention)
        batches = make_batches(encoder, sets, images, pictures_only=paper)
        variance = batches[0].retain_states.flatten(0, 1).var(0).clamp_min(1e-6)
        work = encoder.copy()
        chosen = _important(work, batches[0], config.matrices, seed)
        torch.manual_seed(seed)
        for name in chosen:
            module = work.model.get_submodule(name)
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, config.rank))

        def adapters(copy: TextEncoder) -> nn.Module:
            model: nn.Module = copy.model.requires_grad_(False)
            for module in model.modules():
                if isinstance(module, LowRank):
                    module.requires_grad_(True)
            return model

        stages = 2 * config.steps
        full = replace(config, strength=1.0)  # of blending there is enough in the last stage
        first = train(
            self.name,
            work,
            batches,
            _stage(config, variance, reminds=False),
            full,
            seed=seed,
            progress=lambda step, _, text: progress(step, stages, f"forget: {text}"),
            prepare=adapters,
        )
        second = train(
            self.name,
            first.encoder,
            batches,
            _stage(config, variance, reminds=True),
            full,
            seed=seed + 1,
            progress=lambda step, _, text: progress(config.steps + step, stages, f"remind: {text}"),
            prepare=adapters,
            ema=config.ema,
        )
        work = second.encoder
        for name in chosen:
            parametrize.remove_parametrizations(work.model.get_submodule(name), "weight", leave_parametrized=True)
        work.model.requires_grad_(False)
        share, tried = _restore(encoder, work, batches[1], config, variance)
        blend_into(work, encoder, share * config.strength)
        return Erasure(
            work,
            self.name,
            asdict(config),
            f"forget: {first.stopped}; remind: {second.stopped}; restore: α = {share:.1f}",
            (*first.history, *second.history, *tried),
        )


def _stage(config: SubgroupConfig, variance: Tensor, *, reminds: bool) -> Losses:
    """The losses of the first stage, or of the second, which reminds.

    The sequence terms stand in both: without the forgetting one, reminding brings the concept back.
    """

    def losses(
        work: TextEncoder, batch: Batches, forget: list[int], retain: list[int], rng: random.Random
    ) -> dict[str, Tensor]:
        ids = torch.cat([batch.forget_ids[forget], batch.retain_ids[retain]])
        states, n = work.hidden(ids), len(forget)
        text = work.project(work.pooled(states, ids))
        terms: dict[str, Tensor] = {}
        if reminds:
            kept, image = pick(batch.retain_images, retain, rng)
            if image is not None and len(kept) > 1:
                terms["retention"] = retention_loss(text[n:][kept], image, work.logit_scale)
        else:
            pictured, image = pick(batch.forget_images, forget, rng)
            if image is not None:
                terms["forgetting"] = forgetting_loss(text[:n][pictured], image)
        if config.sequence_forgetting:
            terms["sequence_forgetting"] = config.sequence_forgetting * sequence_forgetting_loss(
                states[:n], batch.anchor_states[forget], batch.apart[forget]
            )
        if config.sequence_retention:
            terms["sequence_retention"] = config.sequence_retention * sequence_retention_loss(
                states[n:], batch.retain_states[retain], variance
            )
        return {"total": torch.stack(list(terms.values())).sum(), **terms}

    return losses


def _important(encoder: TextEncoder, batch: Batches, count: int, seed: int) -> list[str]:
    """Names of the linear layers of the blocks with the highest ratio of mean |gradient|, forget over retain."""
    rng = random.Random(seed)
    layers = {n: m for n, m in encoder.model.named_modules() if isinstance(m, nn.Linear) and "layers." in n}
    weights = [m.weight.requires_grad_(True) for m in layers.values()]
    gradients = []
    for ids, pictures, retain in (
        (batch.forget_ids, batch.forget_images, False),
        (batch.retain_ids, batch.retain_images, True),
    ):
        chosen, image = pick(pictures, list(range(len(ids))), rng)
        assert image is not None  # the caller draws for both sides
        text = encoder.embed(ids[chosen])
        loss = retention_loss(text, image, encoder.logit_scale) if retain else forgetting_loss(text, image)
        gradients.append([float(g.abs().mean()) for g in torch.autograd.grad(loss, weights)])
    encoder.model.requires_grad_(False)
    ratio = {n: f / max(r, 1e-12) for n, f, r in zip(layers, *gradients, strict=True)}
    return sorted(sorted(ratio, key=lambda n: -ratio[n])[:count])


@torch.no_grad()
def _restore(
    original: TextEncoder, edited: TextEncoder, batch: Batches, config: SubgroupConfig, variance: Tensor
) -> tuple[float, list[dict[str, float]]]:
    """The share α of the edit that serves the held-out prompts best, and what each that was tried gave."""
    tried: list[dict[str, float]] = []
    for i in range(1, config.blends + 1):
        share = i / config.blends
        soup = edited.copy()
        blend_into(soup, original, share)
        forgotten = sequence_forgetting_loss(soup.hidden(batch.forget_ids), batch.anchor_states, batch.apart)
        moved = sequence_retention_loss(soup.hidden(batch.retain_ids), batch.retain_states, variance)
        weight = config.sequence_retention or SubgroupConfig.sequence_retention
        total = (config.sequence_forgetting or SubgroupConfig.sequence_forgetting) * forgotten + weight * moved
        tried.append({"share": share, "total": float(total), "left": float(forgotten), "moved": float(moved)})
    return min(tried, key=lambda t: t["total"])["share"], tried
