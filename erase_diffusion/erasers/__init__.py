"""The erasers by name. A dict is the whole registry."""

from __future__ import annotations

from typing import Any

from erase_diffusion.erasers.base import Eraser, Erasure
from erase_diffusion.erasers.cliperase import CLIPErase, CLIPEraseConfig
from erase_diffusion.erasers.contrastive import GradientAscent, GradientDifference, RetainFinetune
from erase_diffusion.erasers.lipschitz import Lipschitz, LipschitzConfig
from erase_diffusion.erasers.multimodal_nullspace import MultimodalNullspace, MultimodalNullspaceConfig
from erase_diffusion.erasers.nullspace import Nullspace, NullspaceConfig
from erase_diffusion.erasers.single_layer import SingleLayer, SingleLayerConfig
from erase_diffusion.erasers.subgroup import Subgroup, SubgroupConfig
from erase_diffusion.erasers.token_swap import TokenSwap, TokenSwapConfig
from erase_diffusion.erasers.training import Schedule

ERASERS: dict[str, tuple[type[Any], type[Any]]] = {
    CLIPErase.name: (CLIPErase, CLIPEraseConfig),
    Nullspace.name: (Nullspace, NullspaceConfig),
    MultimodalNullspace.name: (MultimodalNullspace, MultimodalNullspaceConfig),
    Lipschitz.name: (Lipschitz, LipschitzConfig),
    Subgroup.name: (Subgroup, SubgroupConfig),
    # Baselines, to measure against.
    TokenSwap.name: (TokenSwap, TokenSwapConfig),
    SingleLayer.name: (SingleLayer, SingleLayerConfig),
    GradientDifference.name: (GradientDifference, Schedule),
    GradientAscent.name: (GradientAscent, Schedule),
    RetainFinetune.name: (RetainFinetune, Schedule),
}

__all__ = ["ERASERS", "CLIPErase", "CLIPEraseConfig", "Eraser", "Erasure", "Nullspace", "NullspaceConfig", "TokenSwap"]
