"""Closed-form erasure, no images and no training: at CLIP's projection, or layer by layer in the encoder.

At the projection it is the method of arXiv 2512.14137: zero-shot forgets, and no Stable Diffusion 1.x picture
changes, since no such pipeline reads the projection. In the encoder the idea becomes value editing (UCE, arXiv
2308.14761) with updates that leave the retain prompts' keys where they are (AlphaEdit, arXiv 2410.02355).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erase_diffusion.concepts import PromptSets
from erase_diffusion.erasers.base import Erasure, Needs, Progress, align_all, anchored_states, check_strength, silent
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


def solve_values(
    keys: Tensor, change: Tensor, retain_gram: Tensor, *, retain: float, ridge: float, free: Tensor | None = None
) -> Tensor:
    """The update ΔW that changes values at `keys` by `change` and as little as can be at the retain keys.

    argmin ‖K ΔWᵀ − D‖²/n + λ ΔW R ΔWᵀ + μ‖ΔW‖², so ΔWᵀ = (KᵀK/n + λR + μI)⁻¹ KᵀD/n; with a projector P on free
    directions, for K P in place of K, and then ΔW P.
    keys K: (n, m), change D: (n, d), retain_gram R: (m, m) the mean outer product of retain keys, free P: (m, m).
    Returns ΔW (d, m), in retain_gram's dtype.
    """
    n, m = keys.shape
    gram, cross = ((keys.T @ x / n).to(retain_gram.dtype) for x in (keys, change))
    if free is not None:
        gram, cross = free @ gram @ free, free @ cross
    eye = torch.eye(m, dtype=gram.dtype, device=gram.device)
    system = gram + retain * retain_gram + ridge * gram.diagonal().mean().clamp_min(1e-12) * eye
    update: Tensor = torch.linalg.solve(system, cross)
    return update.T if free is None else update.T @ free


def null_space(gram: Tensor, share: float) -> Tensor:
    """Projector (m, m) on the small eigenspace of a Gram matrix: the directions that hold `share` of its trace."""
    values, vectors = torch.linalg.eigh(gram)
    small = values.clamp_min(0).cumsum(0) <= share * values.clamp_min(0).sum()
    basis: Tensor = vectors[:, small]
    return basis @ basis.T


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
        config, work = self.config, encoder.copy()
        if config.site == "projection":
            return self._project(work, sets)
        assert config.retain is not None
        pairs = (*sets.forget, *sets.forget_held_out)
        forget_ids, anchor_ids = encoder.tokenize([p for p, _ in pairs]), encoder.tokenize([a for _, a in pairs])
        where = align_all(forget_ids, anchor_ids, encoder.end_of_text(forget_ids))
        # Before the first different word causal attention leaves both prompts alike: nothing to move there.
        moved = torch.cumsum((forget_ids != anchor_ids).int(), 1) > 0
        forget, anchor = _Walk(work, forget_ids), _Walk(encoder, anchor_ids)
        retain = _Walk(work, encoder.tokenize((*sets.retain, *sets.retain_held_out)))
        for i, (layer, original) in enumerate(zip(work.layers, encoder.layers, strict=True)):
            anchor.step(original)
            keys, kept = forget.step(layer), retain.step(layer)
            gram = _gram(kept)
            change = anchored_states(anchor.states, where) - forget.states
            # Relative, so that a prompt whose one word differs counts as much as one that differs everywhere.
            apart = (change.square().sum(-1) * moved).sum(1) / moved.sum(1).clamp_min(1)
            weight = (apart.clamp_min(1e-6).rsqrt()[:, None].expand_as(moved))[moved][:, None]
            weight = weight / weight.square().mean().sqrt()
            update = solve_values(
                keys[moved] * weight,
                change[moved] * weight,
                gram,
                retain=config.retain,
                ridge=config.ridge,
                free=null_space(gram, config.null) if config.null < 1 else None,
            )
            update = (config.strength * update).to(keys.dtype)
            _fc2(layer).weight += update
            for walk, inputs in ((forget, keys), (retain, kept)):
                walk.states += inputs @ update.T
            progress(i + 1, len(work.layers), f"block {i + 1}")
        return Erasure(work, self.name, asdict(config), "closed form")

    def _project(self, work: TextEncoder, sets: PromptSets) -> Erasure:
        config = self.config
        assert config.retain is not None

        def embed(prompts: tuple[str, ...]) -> Tensor:
            ids = work.tokenize(prompts)
            return F.normalize(work.project(work.pooled(work.encode(prompts), ids)), dim=-1)

        retain = embed(tuple(p for p in (*sets.retain, *sets.retain_held_out) if p))
        forget = embed(sets.plain or tuple(p for p, _ in sets.forget))
        whole = project_to_mean(forget, retain, weight=config.retain, ridge=config.ridge).to(forget.dtype)
        assert work.projection is not None  # `project` has used it
        edited = torch.lerp(work.projection, whole @ work.projection, config.strength)
        return Erasure(replace(work, projection=edited), self.name, asdict(config), "closed form, the projection alone")


def _gram(keys: Tensor) -> Tensor:
    """Mean outer product (m, m) of keys (n, T, m), in float64."""
    flat = keys.flatten(0, 1)
    return (flat.T @ flat).double() / len(flat)


def _fc2(layer: nn.Module) -> nn.Linear:
    module: Any = layer
    linear: nn.Linear = module.mlp.fc2
    return linear


class _Walk:
    """Prompts on their way through the blocks: each block is run once, whatever was edited before it.

    states: (n, T, d), the input of the next block.
    """

    def __init__(self, encoder: TextEncoder, ids: Tensor):
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

        def arrive(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._call = (args, kwargs)
            raise _Arrived

        hook = encoder.layers[0].register_forward_pre_hook(arrive, with_kwargs=True)
        try:
            encoder.hidden(ids)
        except _Arrived:
            pass
        finally:
            hook.remove()
        args, kwargs = self._call
        self.states: Tensor = args[0] if args else kwargs.pop("hidden_states")
        self._call = (args[1:], kwargs)

    def step(self, layer: nn.Module) -> Tensor:
        """Run one block; returns the inputs of its last matrix (n, T, m)."""
        keys: list[Tensor] = []
        hook = _fc2(layer).register_forward_hook(lambda _m, args, _out: keys.append(args[0]))
        try:
            out = layer(self.states, *self._call[0], **self._call[1])
        finally:
            hook.remove()
        self.states = out[0] if isinstance(out, tuple) else out
        return keys[0]


class _Arrived(Exception):
    """Stops a pass at the first block."""
