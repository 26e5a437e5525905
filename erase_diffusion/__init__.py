"""Erase concepts from Stable Diffusion's text encoder, and prove what is gone and what is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from erase_diffusion.artifact import load_erased_text_encoder
    from erase_diffusion.audit.run import Asked, run_audit
    from erase_diffusion.concepts import Concept
    from erase_diffusion.erase import ErasedConcept, erase_concept
    from erase_diffusion.errors import EraseDiffusionError

__all__ = [
    "Asked",
    "Concept",
    "EraseDiffusionError",
    "ErasedConcept",
    "erase_concept",
    "load_erased_text_encoder",
    "run_audit",
]

_HOMES = {
    "Asked": "audit.run",
    "run_audit": "audit.run",
    "Concept": "concepts",
    "EraseDiffusionError": "errors",
    "ErasedConcept": "erase",
    "erase_concept": "erase",
    "load_erased_text_encoder": "artifact",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are asked for: `--help` must not wait for torch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
