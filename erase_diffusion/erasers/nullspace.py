"""Closed-form erasure, no images and no training: at CLIP's projection, or layer by layer in the encoder.

At the projection it is the method of arXiv 2512.14137: zero-shot forgets, and no Stable Diffusion 1.x picture
changes, since no such pipeline reads the projection. In the encoder the idea becomes value editing, see `values.py`.
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
class NullspaceConfig:
    """Closed-form removal of a concept from a text encoder.

    strength: 0 leaves the encoder as it is, 1 moves the forget prompts the whole way to their anchors.
    site: "hidden" edits the blocks, "projection" CLIP's text projection alone.
    retain: weight λ of what stays; by default 10 in the blocks, 1 at the projection.
    ridge: weight μ of the update's own size, relative to the keys' mean square.
    null: share of the retain keys' energy that counts as empty; directions under it may move freely, others not
    at all. 1 turns the confinement off and leaves λ alone to hold the retain prompts. Not used at the projection.
    """

    strength: float = 1.0
    site: Literal["hidden", "projection"] = "hidden"
    retain: float | None = None
    ridge: float = 1e-3
    null: float = 0.1

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.site not in ("hidden", "projection"):
            raise ConfigError(f"site must be hidden or projection, got {self.site!r}")
        if self.retain is None:
            object.__setattr__(self, "retain", {"hidden": 10.0, "projection": 1.0}[self.site])
        assert self.retain is not None
        if self.retain < 0 or self.ridge <= 0:
            raise ConfigError(f"retain must be at least 0 and ridge over 0, got {self.retain} and {self.ridge}")
        if not 0.0 < self.null <= 1.0:
            raise ConfigError(f"null must lie in (0, 1], got {self.null}")


def project_to_mean(forget: Tensor, retain: Tensor, *, weight: float, ridge: float) -> Tensor:
    """The map P (d, d) of CLIP's joint space that sends what is forgotten to the mean of what stays, and keeps that.

    argmin ‖P T_f − m‖²/n + λ‖P T_r − T_r‖²/n_r + μ‖P − I‖², so P = (m t̄_fᵀ + λB + μI)(A + λB + μI)⁻¹, with
    A and B the mean outer products of T_f and T_r, m the mean of T_r, t̄_f that of T_f. After arXiv 2512.14137's
    P = (λB + μI)(A + λB + μI)⁻¹, which sends it to zero: embeddings share a mean direction, without which a
    class is as near to every picture as to none.
    forget, retain: (n, d), (n_r, d), normalised; ridge relative to the mean square of T_r.
    """
    forget, retain = forget.double(), retain.double()
    mean, d = retain.mean(0), retain.shape[1]
    kept = weight * retain.T @ retain / len(retain)
    kept = kept + ridge * retain.square().mean() * torch.eye(d, dtype=kept.dtype, device=kept.device)
    system = forget.T @ forget / len(forget) + kept
    solved: Tensor = torch.linalg.solve(system, torch.outer(forget.mean(0), mean) + kept)
    return solved.T


class Nullspace:
    """Edits the last matrix of every block in turn, each seeing the blocks before it already edited; or one matrix,
    the projection."""

    name: ClassVar[str] = "nullspace"
    needs: ClassVar[Needs] = "prompts"

    def __init__(self, config: NullspaceConfig | None = None):
        self.config = config or NullspaceConfig()

    @torch.no_grad()
    def erase(
        self,
        encoder: TextEncoder,
        sets: PromptSets,
        images: Mapping[str, Tensor],
        *,
        seed: int = 0,
        progress: Progress = silent,
    ) -> Erasure:
        """Erase from a copy of `encoder`; deterministic, `images` and `seed` are not used."""
        config = self.config
        check_rank(self.name, len(sets.forget_classes), encoder)
        work = encoder.copy()
        if config.site == "projection":
            return self._project(work, sets)
        assert config.retain is not None
        edit_values(
            work,
            encoder,
            (*sets.forget, *sets.forget_held_out),
            (*sets.retain, *sets.retain_held_out),
            retain=config.retain,
            ridge=config.ridge,
            null=config.null,
            progress=progress,
        )
        whole = blend_into(work, encoder, config.strength)
        return Erasure(work, self.name, asdict(config), "closed form", whole=whole)

    def _project(self, work: TextEncoder, sets: PromptSets) -> Erasure:
        config = self.config
        assert config.retain is not None

        def embed(prompts: tuple[str, ...]) -> Tensor:
            return F.normalize(work.features(prompts), dim=-1)

        retain = embed(tuple(p for p in (*sets.retain, *sets.retain_held_out) if p))
        forget = embed(sets.plain or tuple(p for p, _ in sets.forget))
        whole = project_to_mean(forget, retain, weight=config.retain, ridge=config.ridge).to(forget.dtype)
        assert work.projection is not None  # `project` has used it
        edited = torch.lerp(work.projection, whole @ work.projection, config.strength)
        return Erasure(replace(work, projection=edited), self.name, asdict(config), "closed form, the projection alone")
