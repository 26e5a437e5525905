"""CLIPErase's losses against values computed by hand, and the trainer's own promises."""

from __future__ import annotations

import math

import pytest
import torch

from erase_diffusion.erasers.cliperase import CLIPEraseConfig
from erase_diffusion.erasers.losses import (
    consistency_loss,
    forgetting_loss,
    retention_loss,
    sequence_forgetting_loss,
    sequence_retention_loss,
)
from erase_diffusion.errors import ConfigError


def test_forgetting_is_the_mean_dot_product() -> None:
    text = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    image = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert forgetting_loss(text, image, "raw").item() == pytest.approx((2 + 4) / 2)
    assert forgetting_loss(text, image, "cosine").item() == pytest.approx((1 / math.sqrt(5) + 4 / 5) / 2)


def test_the_cosine_form_is_bounded_and_the_raw_form_is_not() -> None:
    text, image = torch.randn(8, 4), torch.randn(8, 4)
    assert forgetting_loss(100 * text, image, "cosine").item() == pytest.approx(
        forgetting_loss(text, image, "cosine").item(), abs=1e-5
    )
    assert forgetting_loss(100 * text, image, "raw").item() == pytest.approx(
        100 * forgetting_loss(text, image, "raw").item(), rel=1e-4
    )


def test_retention_is_clips_contrastive_loss() -> None:
    text = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    image = torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    # Normalised logits are s·I: each row's cross-entropy is log(1 + e^-s).
    assert retention_loss(text, image, 4.0).item() == pytest.approx(math.log(1 + math.exp(-4)), rel=1e-5)
    # The wrong way round: log(1 + e^s).
    assert retention_loss(text.flip(0), image, 4.0).item() == pytest.approx(math.log(1 + math.exp(4)), rel=1e-5)


def test_consistency_is_the_two_kl_divergences() -> None:
    image = torch.eye(2)
    original = torch.eye(2)
    moved = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert consistency_loss(original, original, image, 3.0).item() == pytest.approx(0, abs=1e-6)
    p = math.exp(3) / (math.exp(3) + 1)
    q = 1 - p
    # By text: row 0 agrees; row 1 was (q, p) and is (p, q).
    by_text = (q * math.log(q / p) + p * math.log(p / q)) / 2
    # By image: column 0 was (p, q) and is uniform; column 1 likewise.
    by_image = (2 * (p * math.log(p / 0.5) + q * math.log(q / 0.5))) / 2
    assert consistency_loss(original, moved, image, 3.0).item() == pytest.approx(by_text + by_image, rel=1e-4)


def test_sequence_retention_is_in_units_of_the_variance() -> None:
    states, original = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)
    original[..., 1] = 4.0
    assert sequence_retention_loss(states, original, torch.tensor([1.0, 16.0])).item() == pytest.approx(1.0)
    assert sequence_retention_loss(states, original, torch.tensor([2.0, 8.0])).item() == pytest.approx((0.5 + 2) / 2)


def test_sequence_forgetting_is_the_share_of_the_way_left() -> None:
    anchor = torch.zeros(2, 3, 2)
    original = torch.stack([torch.full((3, 2), 1.0), torch.full((3, 2), 100.0)])
    apart = original.square().sum((1, 2))
    assert sequence_forgetting_loss(original, anchor, apart).item() == pytest.approx(1.0)
    assert sequence_forgetting_loss(anchor, anchor, apart).item() == 0
    # Half of the way for both, near or far: a quarter of the squared distance.
    assert sequence_forgetting_loss(original / 2, anchor, apart).item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": 1.1}, "got 1.1"),
        ({"strength": -0.1}, "got -0.1"),
        ({"steps": 0}, "got 0"),
        ({"forgetting_form": "dot"}, "got 'dot'"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CLIPEraseConfig(**given)  # type: ignore[arg-type]


def test_the_papers_weights_are_the_defaults() -> None:
    config = CLIPEraseConfig()
    assert (config.retention, config.forgetting, config.consistency) == (1.0, 3.0, 3.0)
