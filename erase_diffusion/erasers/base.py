"""What every eraser takes and gives, and the alignment of a forget prompt with its anchor prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from erase_diffusion.concepts import PromptSets
from erase_diffusion.errors import ConfigError
from erase_diffusion.text_encoder import TextEncoder

Progress = Callable[[int, int, str], None]
# What a method works from, each with all before it: prompts alone, the paired CLIP, features of pictures by its frozen
# image tower, or the pictures themselves.
Needs = Literal["prompts", "clip", "features", "pixels"]


def check_strength(strength: float) -> None:
    """Raise ConfigError for a strength outside [0, 1]: 0 leaves an encoder as it is, 1 edits it the whole way."""
    if not 0.0 <= strength <= 1.0:
        raise ConfigError(f"strength must lie in [0, 1], got {strength}")


def check_rank(name: str, count: int, encoder: TextEncoder) -> None:
    """Raise ConfigError for more concepts than an encoder has dimensions to tell apart."""
    width = int(encoder.model.config.hidden_size)
    if count >= width:
        raise ConfigError(
            f"{name} can remove fewer concepts at once than the text encoder is wide ({width}), got {count}"
        )


def blend(source: Mapping[str, Tensor], edited: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
    """θ = (1 − s)·θ_source + s·θ_edited, tensor by tensor; at 0 and at 1 it is one of them bit for bit."""
    return {k: torch.lerp(source[k], v, strength) if v.is_floating_point() else v for k, v in edited.items()}


def blend_into(work: TextEncoder, source: TextEncoder, strength: float) -> dict[str, Tensor]:
    """Take back from `work` all but `strength` of its way from `source`, in place.

    Returns what differed before, as `Erasure.whole` has it; nothing at full strength, where `work` itself is that.
    """
    if strength == 1.0:
        return {}
    before, edited = source.state_dict(), work.state_dict()
    work.model.load_state_dict(blend(source.model.state_dict(), work.model.state_dict(), strength))
    return {k: v for k, v in edited.items() if not torch.equal(v, before[k])}


def silent(step: int, total: int, text: str) -> None:
    """A progress that shows nothing."""


@dataclass(frozen=True)
class Erasure:
    """An erased encoder and how it came about.

    parameters: every setting of the method.  history: one dict of losses per evaluation (empty for closed forms).
    stopped: why the method ended, in words.
    whole: of a closed form that was asked for less than its full strength, the tensors that it changed at full
    strength, under the names of `TextEncoder.state_dict`; with them the strength can be changed afterwards.
    """

    encoder: TextEncoder
    method: str
    parameters: dict[str, Any]
    stopped: str
    history: tuple[dict[str, float], ...] = field(default=())
    whole: Mapping[str, Tensor] = field(default_factory=dict)


class Eraser(Protocol):
    """One method. The given encoder is never changed; the result holds an edited copy."""

    name: ClassVar[str]

    @property
    def needs(self) -> Needs: ...

    def erase(
        self, encoder: TextEncoder, sets: PromptSets, images: Mapping[str, Tensor], *, seed: int, progress: Progress
    ) -> Erasure:
        """Erase from a copy of `encoder`.

        images: prompt → pictures of it, for a method that needs "features" their image features (k, d_proj), for
        one that needs "pixels" pixel values (k, 3, size, size); empty for the others.
        """
        ...


def align(prompt: Tensor, anchor: Tensor, end: int) -> Tensor:
    """For each position of a forget prompt, the position of its anchor prompt that says the same.

    Both are token ids (T,), `end` the end-of-text id, which also pads. The words before and after the
    replaced ones map to themselves, the replaced ones to the last word of the replacement (where causal
    attention has heard all of it), padding to padding. Returns (T,) long.
    """
    total = len(prompt)
    n, m = (int((ids == end).int().argmax()) for ids in (prompt, anchor))
    before = 0
    while before < min(n, m) and prompt[before] == anchor[before]:
        before += 1
    after = 0
    while after < min(n, m) - before and prompt[n - 1 - after] == anchor[m - 1 - after]:
        after += 1
    where = torch.arange(total)
    where[before : n - after] = max(m - after - 1, 0)
    where[n - after :] = torch.arange(n - after, total) + (m - n)
    return where.clamp_(0, total - 1)


def align_all(prompts: Tensor, anchors: Tensor, ends: Tensor) -> Tensor:
    """`align` for a batch (n, T); `ends` (n,) are the end-of-text positions of the prompts."""
    end_ids = prompts.gather(1, ends[:, None])[:, 0]
    rows = [align(p, a, int(e)) for p, a, e in zip(prompts.cpu(), anchors.cpu(), end_ids, strict=True)]
    return torch.stack(rows).to(prompts.device)


def anchored_states(states: Tensor, where: Tensor) -> Tensor:
    """The anchor's states at the aligned positions: (n, T, d) and (n, T) → (n, T, d)."""
    return states.gather(1, where[..., None].expand(-1, -1, states.shape[-1]))
