"""The erasers by name. A dict is the whole registry."""

from __future__ import annotations

from typing import Any

from erase_diffusion.erasers.base import Eraser, Erasure
from erase_diffusion.erasers.cliperase import CLIPErase, CLIPEraseConfig
from erase_diffusion.erasers.nullspace import Nullspace, NullspaceConfig

ERASERS: dict[str, tuple[type[Any], type[Any]]] = {
    CLIPErase.name: (CLIPErase, CLIPEraseConfig),
    Nullspace.name: (Nullspace, NullspaceConfig),
}

__all__ = ["ERASERS", "CLIPErase", "CLIPEraseConfig", "Eraser", "Erasure", "Nullspace", "NullspaceConfig"]
