"""Value editing in the encoder's blocks: what the closed forms that change pictures share.

The last matrix of every block is solved so that the forget prompts leave it as their anchor prompts do (UCE, arXiv
2308.14761), with updates that leave the retain prompts' keys where they are (AlphaEdit, arXiv 2410.02355).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from erase_diffusion.erasers.base import Progress, align_all, anchored_states
from erase_diffusion.text_encoder import TextEncoder


@torch.no_grad()
def edit_values(
    work: TextEncoder,
    encoder: TextEncoder,
    pairs: Sequence[tuple[str, str]],
    keep: Sequence[str],
    *,
    retain: float,
    ridge: float,
    null: float,
    progress: Progress,
) -> None:
    """Move the forget prompts of `pairs` to their anchors, block by block, each seeing the blocks before it edited.

    work: the copy of `encoder` that is edited in place.  keep: the retain prompts.
    retain λ, ridge μ: as in `solve_values`.  null: share of the retain keys' energy that counts as empty, see
    `null_space`; 1 turns the confinement off.
    """
    forget_ids, anchor_ids = encoder.tokenize([p for p, _ in pairs]), encoder.tokenize([a for _, a in pairs])
    where = align_all(forget_ids, anchor_ids, encoder.end_of_text(forget_ids))
    # Before the first different word causal attention leaves both prompts alike: nothing to move there.
    moved = torch.cumsum((forget_ids != anchor_ids).int(), 1) > 0
    forget, anchor = _Walk(work, forget_ids), _Walk(encoder, anchor_ids)
    kept_walk = _Walk(work, encoder.tokenize(keep))
    for i, (layer, original) in enumerate(zip(work.layers, encoder.layers, strict=True)):
        anchor.step(original)
        keys, kept = forget.step(layer), kept_walk.step(layer)
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
            retain=retain,
            ridge=ridge,
            free=null_space(gram, null) if null < 1 else None,
        ).to(keys.dtype)
        _fc2(layer).weight += update
        for walk, inputs in ((forget, keys), (kept_walk, kept)):
            walk.states += inputs @ update.T
        progress(i + 1, len(work.layers), f"block {i + 1}")


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
