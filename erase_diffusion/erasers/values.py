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

# Padding positions that are looked at behind a prompt, prompts in a chunk, and the width of keys from which float32
# does, and all eigenvectors are no longer computed: both cost their cube.
PADS, CHUNK, LARGE = 8, 64, 1024
MOST = 640


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
    `occupied`; 1 turns the confinement off.
    Of more than `MOST` pairs or retain prompts (half of that in a wide encoder) every other, third and so on is taken.
    """
    wide = int(encoder.model.config.intermediate_size) > LARGE
    most = MOST // 2 if wide else MOST
    pairs, keep = pairs[:: -(-len(pairs) // most)], keep[:: -(-len(keep) // most)]
    forget_ids, anchor_ids = encoder.tokenize([p for p, _ in pairs]), encoder.tokenize([a for _, a in pairs])
    where = align_all(forget_ids, anchor_ids, encoder.end_of_text(forget_ids))
    # Before the first different word causal attention leaves both prompts alike: nothing to move there.
    moved = torch.cumsum((forget_ids != anchor_ids).int(), 1) > 0
    kept_ids = encoder.tokenize(keep)
    both = _chunks(torch.maximum(encoder.end_of_text(forget_ids), encoder.end_of_text(anchor_ids)), forget_ids.shape[1])
    forget, anchor = _Walk(work, forget_ids, both), _Walk(encoder, anchor_ids, both)
    kept_walk = _Walk(work, kept_ids, _chunks(encoder.end_of_text(kept_ids), kept_ids.shape[1]))
    for i, (layer, original) in enumerate(zip(work.layers, encoder.layers, strict=True)):
        anchor.step(original)
        keys, kept = forget.step(layer), kept_walk.step(layer)
        gram = _gram(kept)
        at, by, weights = [], [], []
        for (index, length), key, now, wished in zip(both, keys, forget.states, anchor.states, strict=True):
            there = moved[index, :length]
            change = anchored_states(wished, where[index, :length].clamp_max(length - 1)) - now
            # Relative, so that a prompt whose one word differs counts as much as one that differs everywhere.
            apart = (change.square().sum(-1) * there).sum(1) / there.sum(1).clamp_min(1)
            at.append(key[there])
            by.append(change[there])
            weights.append(apart.clamp_min(1e-6).rsqrt()[:, None].expand_as(there)[there][:, None])
        weight = torch.cat(weights)
        weight = weight / weight.square().mean().sqrt()
        update = solve_values(
            torch.cat(at) * weight, torch.cat(by) * weight, gram, retain=retain, ridge=ridge, null=null
        ).to(weight.dtype)
        _fc2(layer).weight += update
        for walk, inputs in ((forget, keys), (kept_walk, kept)):
            for states, given in zip(walk.states, inputs, strict=True):
                states += given @ update.T
        progress(i + 1, len(work.layers), f"block {i + 1}")


def solve_values(
    keys: Tensor, change: Tensor, retain_gram: Tensor, *, retain: float, ridge: float, null: float = 1.0
) -> Tensor:
    """The update ΔW that changes values at `keys` by `change` and as little as can be at the retain keys.

    argmin ‖K ΔWᵀ − D‖²/n + λ ΔW R ΔWᵀ + μ‖ΔW‖², so ΔWᵀ = (KᵀK/n + λR + μI)⁻¹ KᵀD/n. With null < 1 the update is
    confined to the directions that are all but empty in R: with the projector P on them, which takes out what
    `occupied` gives, ΔWᵀ = P (PKᵀKP/n + λR + μI)⁻¹ PKᵀD/n.
    keys K: (n, m), change D: (n, d), retain_gram R: (m, m) the mean outer product of retain keys.
    Returns ΔW (d, m), in retain_gram's dtype.
    """
    n, m = keys.shape
    gram, cross = ((keys.T @ x / n).to(retain_gram.dtype) for x in (keys, change))
    held = occupied(retain_gram, null) if null < 1 else gram[:, :0]

    def free(x: Tensor) -> Tensor:
        return x - held @ (held.T @ x)

    gram, cross = free(free(gram).T), free(cross)
    eye = torch.eye(m, dtype=gram.dtype, device=gram.device)
    system = gram + retain * retain_gram + ridge * gram.diagonal().mean().clamp_min(1e-12) * eye
    return free(torch.linalg.solve(system, cross)).T


def occupied(gram: Tensor, share: float) -> Tensor:
    """Orthonormal basis (m, k) of a Gram matrix's large eigenspace: all but the directions that hold `share` of its
    trace, its null space in the sense of AlphaEdit. Of a wide matrix by subspace iteration: few directions hold most.
    """
    m, wanted = len(gram), (1 - share) * gram.diagonal().sum()
    width = 64
    while m > LARGE and width < m // 4:
        basis = torch.randn((m, width), generator=torch.Generator().manual_seed(0)).to(gram)
        for _ in range(6):
            basis, _ = torch.linalg.qr(gram @ basis)
        values, turn = torch.linalg.eigh(basis.T @ gram @ basis)
        if values.sum() >= wanted:
            return _largest(values, basis @ turn, wanted)
        width *= 2
    values, vectors = torch.linalg.eigh(gram)
    return _largest(values, vectors, wanted)


def _largest(values: Tensor, vectors: Tensor, wanted: Tensor) -> Tensor:
    """The vectors (m, k) of the largest values, as few as sum up to `wanted`; values (r,) in rising order."""
    values, vectors = values.clamp_min(0).flip(0), vectors.flip(1)
    few: Tensor = vectors[:, : int((values.cumsum(0) < wanted).sum()) + 1]
    return few


def _gram(keys: Sequence[Tensor]) -> Tensor:
    """Mean outer product (m, m) of keys, each (n, T, m); given in float64 where what follows is quick in it."""
    m = keys[0].shape[-1]
    total = torch.zeros((m, m), device=keys[0].device)
    for part in keys:
        flat = part.flatten(0, 1)
        total += flat.T @ flat
    return total.to(torch.float64 if m <= LARGE else torch.float32) / sum(
        part.shape[0] * part.shape[1] for part in keys
    )


def _chunks(ends: Tensor, longest: int) -> list[tuple[Tensor, int]]:
    """Prompts of about the same length together: (indices (n,), positions) of each chunk.

    ends: (n,) the end-of-text positions. Causal attention lets a prompt be cut after the padding that is looked at.
    """
    order = ends.argsort(stable=True)
    return [(part, min(longest, int(ends[part].max()) + 1 + PADS)) for part in torch.split(order, CHUNK)]


def _fc2(layer: nn.Module) -> nn.Linear:
    module: Any = layer
    linear: nn.Linear = module.mlp.fc2
    return linear


class _Walk:
    """Prompts on their way through the blocks: each block is run once, whatever was edited before it.

    states: of each chunk (n, T, d), the input of the next block.
    """

    def __init__(self, encoder: TextEncoder, ids: Tensor, chunks: Sequence[tuple[Tensor, int]]):
        arrived = [self._arrive(encoder, ids[index, :length]) for index, length in chunks]
        self.states = [states for states, _, _ in arrived]
        self._calls = [(args, kwargs) for _, args, kwargs in arrived]

    @staticmethod
    def _arrive(encoder: TextEncoder, ids: Tensor) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """What the first block is called with: its states, and all the rest."""
        call: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def arrive(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call.append((args, dict(kwargs)))
            raise _Arrived

        hook = encoder.layers[0].register_forward_pre_hook(arrive, with_kwargs=True)
        try:
            encoder.hidden(ids)
        except _Arrived:
            pass
        finally:
            hook.remove()
        args, kwargs = call[0]
        return (args[0], args[1:], kwargs) if args else (kwargs.pop("hidden_states"), (), kwargs)

    def step(self, layer: nn.Module) -> list[Tensor]:
        """Run one block; returns the inputs of its last matrix, of each chunk (n, T, m)."""
        keys: list[Tensor] = []
        hook = _fc2(layer).register_forward_hook(lambda _m, args, _out: keys.append(args[0]))
        try:
            for i, (args, kwargs) in enumerate(self._calls):
                out = layer(self.states[i], *args, **kwargs)
                self.states[i] = out[0] if isinstance(out, tuple) else out
        finally:
            hook.remove()
        return keys


class _Arrived(Exception):
    """Stops a pass at the first block."""
