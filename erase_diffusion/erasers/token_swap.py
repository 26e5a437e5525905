"""The trivial baseline: the concept's token embeddings replaced by its anchor's.

Exact on the words it was given, blind to every other way of asking; a method that does not beat it does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from erase_diffusion.concepts import PromptSets
from erase_diffusion.erasers.base import Erasure, Needs, Progress, blend_into, check_strength, silent
from erase_diffusion.errors import ConfigError
from erase_diffusion.text_encoder import TextEncoder


@dataclass(frozen=True)
class TokenSwapConfig:
    """strength: 0 leaves the concept's embeddings as they are, 1 gives them the anchor's."""

    strength: float = 1.0

    def __post_init__(self) -> None:
        check_strength(self.strength)


class TokenSwap:
    """Every token of a forget word gets the embedding of the anchor's token at its place, the last one's beyond it."""

    name: ClassVar[str] = "token-swap"
    needs: ClassVar[Needs] = "prompts"

    def __init__(self, config: TokenSwapConfig | None = None):
        self.config = config or TokenSwapConfig()

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
        """Erase from a copy of `encoder`; deterministic, `images` and `seed` are not used.

        Raises ConfigError when the sets name no words.
        """
        if not sets.words:
            raise ConfigError(f"{self.name} needs the words to swap; the prompt sets name none")
        work = encoder.copy()
        source = encoder.transformer.embeddings.token_embedding.weight
        edited = work.transformer.embeddings.token_embedding.weight
        swapped: list[str] = []
        for i, (word, anchor) in enumerate(sets.words):
            ids, others = (encoder.tokenizer(w, add_special_tokens=False).input_ids for w in (word, anchor))
            for place, token in enumerate(ids):
                other = others[min(place, len(others) - 1)]
                if token not in others:
                    edited[token] = source[other]
            swapped.append(f"{word} → {anchor}")
            progress(i + 1, len(sets.words), word)
        whole = blend_into(work, encoder, self.config.strength)
        return Erasure(work, self.name, asdict(self.config), "swapped " + ", ".join(swapped), whole=whole)
