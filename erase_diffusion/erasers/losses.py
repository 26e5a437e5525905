"""The trained methods' losses, each a function with its equation: over CLIP's joint space, and over whole sequences."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def forgetting_loss(text: Tensor, image: Tensor, form: Literal["raw", "cosine"] = "cosine") -> Tensor:
    """Forgetting module, L_FM = 1/N_f Σ f_img(x_i)·f_txt(t_i) over forget pairs (CLIPErase, eq. of L_FM).

    text, image: (N_f, d_proj), not normalised. "raw" is the paper's dot product, unbounded below;
    "cosine" the same of the normalised vectors, in [-1, 1].
    """
    if form == "cosine":
        text, image = F.normalize(text, dim=-1), F.normalize(image, dim=-1)
    return (text * image).sum(-1).mean()


def contrastive_loss(text: Tensor, image: Tensor, logit_scale: float) -> Tensor:
    """Each pair's contrastive loss, half by text and half by image, (n,) (Radford et al. 2021, figure 3).

    text, image: (n, d_proj), not normalised; every other pair of the batch is a negative.
    """
    logits = logit_scale * F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")) / 2


def retention_loss(text: Tensor, image: Tensor, logit_scale: float) -> Tensor:
    """Retention module, L_RM: the contrastive loss of retain pairs, ½ [CE(s·T·Iᵀ, 1…N_r) + CE(s·I·Tᵀ, 1…N_r)].

    text, image: (N_r, d_proj), not normalised.
    """
    return contrastive_loss(text, image, logit_scale).mean()


def consistency_loss(
    original: Tensor, text: Tensor, image: Tensor, logit_scale: float, original_image: Tensor | None = None
) -> Tensor:
    """Consistency module, L_CM = 1/N_r Σ KL(p_o^img ‖ p_u^img) + KL(p_o^txt ‖ p_u^txt) on retain pairs.

    p is the softmax of the batch's logits, by image and by text, of the original (o) and unlearned (u) model.
    original, text, image: (N_r, d_proj); original_image likewise, where the image tower is unlearned as well.
    """
    image = F.normalize(image, dim=-1)
    seen = image if original_image is None else F.normalize(original_image, dim=-1)
    before = logit_scale * F.normalize(original, dim=-1) @ seen.T
    after = logit_scale * F.normalize(text, dim=-1) @ image.T
    by_text = F.kl_div(after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean")
    by_image = F.kl_div(after.T.log_softmax(1), before.T.log_softmax(1), log_target=True, reduction="batchmean")
    return by_image + by_text


def sequence_retention_loss(states: Tensor, original: Tensor, variance: Tensor) -> Tensor:
    """Mean squared movement of retain prompts over all positions, in units of the states' variance.

    L = 1/(n·T·d) Σ (h_u − h_o)² / σ²; states, original: (n, T, d), variance σ²: (d,). Derived for Stable Diffusion,
    which reads every position and not only the pooled one.
    """
    return ((states - original).square() / variance).mean()


def sequence_forgetting_loss(states: Tensor, anchor: Tensor, apart: Tensor) -> Tensor:
    """How much of the way from the concept to its anchor is left, over all positions: 1 at first, 0 at the anchor.

    L = 1/n Σ_i ‖h_u − h*‖² / ‖h_o − h*‖²; states, anchor: (n, T, d), the anchor prompt's original states h* at aligned
    positions; apart: (n,) the original's squared distances. Relative, so that a prompt whose one word differs counts
    as much as one that differs everywhere.
    """
    return ((states - anchor).square().sum((1, 2)) / apart.clamp_min(1e-6)).mean()
