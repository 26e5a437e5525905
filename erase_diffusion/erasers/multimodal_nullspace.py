"""Closed-form erasure from text prompts and visual prototypes, a class, a class in a domain, or a domain.

After arXiv 2512.14113: the span of what is forgotten, with what the retained combinations of class and domain take
of it removed, is projected out of CLIP's joint space, `P = I − α V Vᵀ`, folded into both projections. The three
paradigms are three prompt sets: a class in every domain (“cat”), a class in one domain only (“crayon” within “cat”),
everything in a domain (“crayon”). The prototypes stand for the pictures that nobody has to bring: points of the
joint space that CLIP's zero-shot classification takes for the class, found by ascent from noise.

No Stable Diffusion 1.x picture changes by that. In the blocks the same combinations are taken apart by value editing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from erase_diffusion.concepts import PromptSets
from erase_diffusion.erasers.base import Erasure, Needs, Progress, blend_into, check_rank, check_strength, silent
from erase_diffusion.erasers.values import edit_values
from erase_diffusion.errors import ConfigError
from erase_diffusion.text_encoder import TextEncoder


@dataclass(frozen=True)
class MultimodalNullspaceConfig:
    """strength: at the projections the α of `I − α V Vᵀ`, in the blocks the share of the edit that is kept.

    site: "hidden" edits the blocks, "projection" both of CLIP's projections.
    prototypes: visual prototypes of each class.  held: share of the retained embeddings' energy whose span is left
    alone; 0 leaves none alone.  rank: dimensions removed a class, at most. All three at the projections.
    retain, ridge, null: of the value editing in the blocks, as in `nullspace`.
    """

    strength: float = 1.0
    site: Literal["hidden", "projection"] = "hidden"
    prototypes: int = 16
    held: float = 0.0
    rank: int = 1
    retain: float = 10.0
    ridge: float = 1e-3
    null: float = 0.1

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.site not in ("hidden", "projection"):
            raise ConfigError(f"site must be hidden or projection, got {self.site!r}")
        if not 0 < self.null <= 1 or self.retain < 0 or self.ridge <= 0:
            raise ConfigError(
                "null must lie in (0, 1], retain be at least 0 and ridge over 0, got "
                f"{self.null}, {self.retain} and {self.ridge}"
            )
        if self.prototypes < 0 or self.rank < 1 or not 0 <= self.held < 1:
            raise ConfigError(
                "prototypes must be at least 0, rank at least 1 and held lie in [0, 1), got "
                f"{self.prototypes}, {self.rank} and {self.held}"
            )


def visual_prototypes(classes: Tensor, index: int, count: int, scale: float, seed: int) -> Tensor:
    """Normalised points (count, d) of the joint space that zero-shot classification takes for one class.

    classes: (c, d), normalised text embeddings, `index` the wished one. Gradient ascent of its log-probability from
    normal noise on the sphere: each ends elsewhere on the class's side, as its pictures do.
    """
    noise = torch.randn((count, classes.shape[1]), generator=torch.Generator().manual_seed(seed))
    points = F.normalize(noise.to(classes.device), dim=-1)
    for _ in range(200):
        points.requires_grad_(True)
        surprise = -(scale * points @ classes.T).log_softmax(-1)[:, index]
        gradient = torch.autograd.grad(surprise.sum(), points)[0]
        points = F.normalize(points.detach() - 0.05 * F.normalize(gradient, dim=-1), dim=-1)
        if float(surprise.detach().max()) < 0.05:
            break
    return points


def removed_span(forget: Tensor, retain: Tensor, *, held: float, rank: int) -> Tensor:
    """V (d, r), orthonormal: the chief directions of what is forgotten outside the retained span.

    forget, retain: (n, d), (n_r, d), normalised. The retained span holds `held` of its energy.
    Raises ConfigError when the retained span leaves no room.
    """
    _, values, vectors = torch.linalg.svd(retain.double(), full_matrices=False)
    energy = values.square().cumsum(0) / values.square().sum()
    basis = vectors[: int((energy < held).sum()) + 1 if held else 0]
    outside = forget.double() - forget.double() @ basis.T @ basis
    _, values, vectors = torch.linalg.svd(outside, full_matrices=False)
    room = forget.shape[1] - len(basis)
    strong = int((values > 1e-6 * values[0].clamp_min(1e-12)).sum())
    if room < 1 or not strong or float(outside.norm(dim=1).max()) < 1e-3:
        raise ConfigError(
            f"what must stay spans {len(basis)} of the joint space's {forget.shape[1]} dimensions and leaves no room "
            "to forget in; lower `held`, or preserve less"
        )
    span: Tensor = vectors[: min(rank, strong, room)].T
    return span


class MultimodalNullspace:
    """Removes the span of prompts and prototypes from both projections, or edits the blocks' values."""

    name: ClassVar[str] = "multimodal-nullspace"

    def __init__(self, config: MultimodalNullspaceConfig | None = None):
        self.config = config or MultimodalNullspaceConfig()

    @property
    def needs(self) -> Needs:
        """The CLIP at its projections; in the blocks prompts alone."""
        return "clip" if self.config.site == "projection" else "prompts"

    def erase(
        self,
        encoder: TextEncoder,
        sets: PromptSets,
        images: Mapping[str, Tensor],
        *,
        seed: int = 0,
        progress: Progress = silent,
    ) -> Erasure:
        """Erase from a copy of `encoder`; at the projections, from its image tower's copy too. `images` are not used.

        Raises ConfigError when what must stay leaves no room, or for more concepts than there are dimensions.
        """
        config = self.config
        check_rank(self.name, len(sets.forget_classes), encoder)
        if config.site == "projection":
            return self._project(encoder, sets, seed)
        work = encoder.copy()
        edit_values(
            work,
            encoder,
            (*sets.forget, *sets.forget_held_out),
            (*sets.retain, *sets.retain_held_out, *sets.retain_classes),
            retain=config.retain,
            ridge=config.ridge,
            null=config.null,
            progress=progress,
        )
        whole = blend_into(work, encoder, config.strength)
        return Erasure(work, self.name, asdict(config), "closed form", whole=whole)

    def _project(self, encoder: TextEncoder, sets: PromptSets, seed: int) -> Erasure:
        config = self.config
        if not sets.forget_classes or not sets.retain_classes:
            raise ConfigError(f"{self.name} needs the classes to forget and those that stay; the prompt sets name none")

        def embed(prompts: tuple[str, ...]) -> Tensor:
            return F.normalize(encoder.features(prompts), dim=-1)

        classes = embed((*sets.forget_classes, *sets.retain_classes))
        scale = max(encoder.logit_scale, 20.0)
        count = len(sets.forget_classes)
        seen = [
            visual_prototypes(classes, i, config.prototypes, scale, seed + i)
            for i in range(len(classes) if config.prototypes else 0)
        ]
        forget = torch.cat([embed((*sets.plain, *(p for p, _ in sets.forget))), classes[:count], *seen[:count]])
        retain = torch.cat([embed(tuple(p for p in sets.retain if p)), classes[count:], *seen[count:]])
        v = removed_span(forget, retain, held=config.held, rank=config.rank * count)
        p = torch.eye(len(v), dtype=v.dtype, device=v.device) - config.strength * v @ v.T
        assert encoder.projection is not None and encoder.image_tower is not None
        tower = encoder.image_tower.copy()
        with torch.no_grad():
            tower.projection.weight.copy_(p @ tower.projection.weight.double())
        projection = (p @ encoder.projection.double()).to(encoder.projection.dtype)
        work = replace(encoder.copy(), projection=projection, image_tower=tower)
        return Erasure(
            work,
            self.name,
            asdict(config),
            f"closed form, both projections; {v.shape[1]} of {len(v)} dimensions removed",
        )
