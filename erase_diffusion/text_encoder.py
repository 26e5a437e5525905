"""Tokenise, run and read a CLIP text encoder at the place its pipeline reads it.

The one place that knows transformers' versions: since 5.6 `CLIPTextModel` is flat, before it kept its
layers under `.text_model`; on disk every published checkpoint has `text_model.*` keys, and so do ours.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from erase_diffusion.errors import ModelError
from erase_diffusion.image_tower import ImageTower

PREFIX = "text_model."


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text encoder in float32 with its tokenizer.

    model: `CLIPTextModel`, in eval mode.
    dtype: the dtype its weights have on disk, in which an edited copy is saved.
    projection: CLIP's text projection (d_proj, d), or None when the paired CLIP is not at hand.
    logit_scale: exp of CLIP's temperature, 1 without the paired CLIP.
    image_tower: the paired CLIP's other half, or None.
    """

    model: CLIPTextModel
    tokenizer: CLIPTokenizer
    dtype: torch.dtype
    projection: Tensor | None = None
    logit_scale: float = 1.0
    image_tower: ImageTower | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (n, T): begin, words, end, padded to the tower's T positions; longer prompts are cut."""
        batch = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.model.config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = batch.input_ids
        return ids.to(self.device)

    def cut(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the tower reads."""
        lengths = map(len, self.tokenizer(list(prompts), truncation=False, verbose=False).input_ids)
        return sum(n > self.model.config.max_position_embeddings for n in lengths)

    def hidden(self, ids: Tensor) -> Tensor:
        """What SD 1.x and 2.x read: the last hidden state after the final norm, (n, T) → (n, T, d)."""
        state: Tensor = self.model(input_ids=ids).last_hidden_state
        return state

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Hidden states (n, T, d) of prompts, without gradient."""
        ids = self.tokenize(prompts)
        return torch.cat([self.hidden(chunk) for chunk in torch.split(ids, batch_size)])

    def end_of_text(self, ids: Tensor) -> Tensor:
        """Position (n,) of the end-of-text token, by transformers' rule: legacy configs name id 2 and mean argmax."""
        end = self.model.config.eos_token_id
        return ids.argmax(-1) if end == 2 else (ids == end).int().argmax(-1)

    def pooled(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The state at end-of-text, (n, T, d) → (n, d)."""
        return hidden[torch.arange(len(ids), device=ids.device), self.end_of_text(ids)]

    def project(self, pooled: Tensor) -> Tensor:
        """CLIP's joint space, not normalised: (n, d) → (n, d_proj). Raises ModelError without the paired CLIP."""
        if self.projection is None:
            raise ModelError("this text encoder came without its CLIP, so it has no text projection")
        return pooled @ self.projection.T

    def embed(self, ids: Tensor) -> Tensor:
        """CLIP's joint space, not normalised: token ids (n, T) → (n, d_proj), with gradient."""
        return self.project(self.pooled(self.hidden(ids), ids))

    def features(self, prompts: Sequence[str]) -> Tensor:
        """`embed` of prompts, without gradient, in batches."""
        with torch.no_grad():
            return self.project(self.pooled(self.encode(prompts), self.tokenize(prompts)))

    def copy(self) -> TextEncoder:
        """An independent copy that can be edited; the original is never touched. The image tower is shared."""
        return replace(self, model=copy.deepcopy(self.model))

    @property
    def transformer(self) -> Any:
        """The module that holds `embeddings`, `encoder.layers` and `final_layer_norm`, in any transformers."""
        return getattr(self.model, "text_model", self.model)

    @property
    def layers(self) -> list[nn.Module]:
        """The transformer blocks, first to last."""
        return list(self.transformer.encoder.layers)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights in the source's dtype under the published `text_model.*` keys, contiguous, on the CPU."""
        return {
            key if key.startswith(PREFIX) else PREFIX + key: value.detach().to("cpu", self.dtype).contiguous()
            for key, value in self.model.state_dict().items()
            if not key.endswith("position_ids")
        }


def weights_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: the same for the same weights however they are filed."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
