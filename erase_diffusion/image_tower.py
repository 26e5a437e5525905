"""CLIP's other half: the image tower with its projection, for methods that look at pictures or edit both towers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ImageTower:
    """The image tower of the CLIP that a text encoder comes from.

    model: CLIP's vision transformer.  projection: its linear map into the joint space.
    """

    model: nn.Module
    projection: nn.Linear

    @property
    def size(self) -> int:
        """Height and width of the pictures it takes, in pixels."""
        config: Any = self.model.config
        return int(config.image_size)

    def embed(self, pixels: Tensor) -> Tensor:
        """Joint space, not normalised: normalised pixel values (n, 3, size, size) → (n, d_proj)."""
        vectors: Tensor = self.projection(self.model(pixel_values=pixels).pooler_output)
        return vectors

    @torch.no_grad()
    def features(self, pixels: Tensor, batch_size: int = 64) -> Tensor:
        """`embed` without gradient, in batches."""
        return torch.cat([self.embed(part) for part in torch.split(pixels, batch_size)])

    def copy(self) -> ImageTower:
        """An independent copy that can be edited."""
        return ImageTower(copy.deepcopy(self.model), copy.deepcopy(self.projection))
