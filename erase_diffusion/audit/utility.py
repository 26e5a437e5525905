"""Whether erased pictures of what must stay are, as a set, still the original's: the kernel inception distance (KID,
Bińkowski et al. 2018) by torchmetrics, over the checker's features or Inception's own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from erase_diffusion.audit.conclude import asks_for_none, different
from erase_diffusion.audit.plan import ORIGINAL, Plan
from erase_diffusion.checker import CLIPChecker
from erase_diffusion.errors import ConfigError, ModelError
from erase_diffusion.image_store import ImageStore, writing

FEATURES = ("judge", "inception")
FEWEST = 40  # pictures on each side, under which the distance says nothing
FILE = "utility.json"


def utility(
    plan: Plan,
    checker: CLIPChecker,
    features: str,
    *,
    progress: Callable[[str, int, int], Any] = lambda stage, done, total: None,
) -> dict[str, dict[str, str]]:
    """Erased encoder → the KID between half of the original's pictures and its own of the other half, over prompts that
    ask for nothing it forgot, beside that of the original's two halves; written to `utility.json`, for the reports.

    features: "judge", the checker's image embeddings, or "inception", as in the paper (torch-fidelity's weights).
    Raises ConfigError without torchmetrics, ModelError when Inception cannot be had.
    """
    distance = kid(features, checker)
    found: dict[str, dict[str, str]] = {}
    for i, encoder in enumerate(plan.erased):
        progress("measuring utility", i, len(plan.erased))
        numbers = [n for n in different(plan) if asks_for_none(plan.samples[n], encoder, checker.vocabulary)]
        keys = plan.keys[ORIGINAL], plan.keys[encoder.name]
        name = f"KID over {features} features"
        if len(numbers) < FEWEST:
            found[encoder.name] = {name: f"not measured, {len(numbers)} pictures are too few ({FEWEST} are needed)"}
            continue
        before, after = ([k[n] for n in numbers] for k in keys)
        # Twins from the same noise are no independent samples: one half of the prompts against the other half's.
        value, error = distance(before[0::2], after[1::2], plan.store)
        own, own_error = distance(before[0::2], before[1::2], plan.store)
        found[encoder.name] = {
            name: f"{value:.4f} ± {error:.4f}, where the original's own halves are {own:.4f} ± {own_error:.4f} apart "
            f"({len(numbers)} pictures)"
        }
    progress("measuring utility", len(plan.erased), len(plan.erased))
    path = plan.folder / FILE
    with writing(path):
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


class _Judge(nn.Module):
    """The checker's image tower as torchmetrics wants features: uint8 images (n, 3, h, w) → (n, d)."""

    def __init__(self, checker: CLIPChecker):
        super().__init__()
        self.checker = checker

    def forward(self, images: Tensor) -> Tensor:
        vectors = self.checker.embed_images([Image.fromarray(i) for i in images.permute(0, 2, 3, 1).numpy()])
        # KID's kernel divides dot products by d: so of these it takes the cosine.
        scaled: Tensor = vectors * vectors.shape[1] ** 0.5
        return scaled


def kid(
    features: str, checker: CLIPChecker
) -> Callable[[Sequence[str], Sequence[str], ImageStore], tuple[float, float]]:
    """KID of two sets of a store's images, by their keys: mean and standard deviation over subsets. Images that cannot
    be read are left out."""
    if features not in FEATURES:
        raise ConfigError(f"features must be one of {', '.join(FEATURES)}, got {features!r}")
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError:
        raise ConfigError("utility needs torchmetrics: pip install 'erase-diffusion[utility]'") from None

    def measure(one: Sequence[str], other: Sequence[str], store: ImageStore) -> tuple[float, float]:
        size = min(len(one), len(other))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it keeps all features: they are few
                kid = KernelInceptionDistance(
                    feature=_Judge(checker) if features == "judge" else 2048,
                    subsets=50,
                    subset_size=max(2, min(1000, size // 2)),
                )
        except Exception as error:  # torch-fidelity missing, or its weights not to be had: whatever it raises
            first = " ".join(str(error).split())[:120]
            raise ModelError(f"Inception cannot be had here ({first}); use the judge's features") from None
        torch.manual_seed(0)  # it draws its subsets from the global generator
        for images, real in ((one, True), (other, False)):
            for start in range(0, len(images), 64):
                batch = [image for k in images[start : start + 64] if (image := store.read(k)) is not None]
                if batch:
                    kid.update(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2), real=real)
        mean, deviation = kid.compute()
        return float(mean), float(deviation)

    return measure


def read_utility(plan: Plan) -> dict[str, dict[str, str]]:
    """What was measured of this audit; nothing when nothing was, or it cannot be read."""
    try:
        found = json.loads((plan.folder / FILE).read_text(encoding="utf-8"))
        return {str(e): {str(n): str(v) for n, v in values.items()} for e, values in found.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
