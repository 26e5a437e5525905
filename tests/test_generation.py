"""Drawing: the same noise for the same seed, whatever the encoder or the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from erase_diffusion.generation import draw, initial_noise
from erase_diffusion.text_encoder import TextEncoder

PROMPTS = ["a red car on the grass", "a cat", "the desert", "a blue boat by the sea", "a house"]


def test_noise_depends_on_the_seed_alone(painter: Any) -> None:
    a, b = initial_noise(painter, [1, 2, 3]), initial_noise(painter, [3, 1])
    assert torch.equal(a[0], b[1])
    assert torch.equal(a[2], b[0])
    assert not torch.equal(a[0], a[1])


def test_batches_don_t_change_the_pictures(painter: Any, encoder: TextEncoder) -> None:
    seeds = [7, 8, 9, 10, 11]
    options: dict[str, Any] = dict(steps=4, guidance=4.0)
    one, many = (draw(painter, encoder, PROMPTS, seeds, batch_size=n, **options).astype(int) for n in (2, 5))
    assert one.shape == (5, 64, 64, 3)
    assert np.abs(one - many).max() <= 2


def test_the_same_as_the_stock_pipelines_call(painter: Any, encoder: TextEncoder) -> None:
    from diffusers import StableDiffusionPipeline

    from erase_diffusion.mini.vocabulary import WEIGHTS

    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS / "pipeline", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        PROMPTS[:2], latents=initial_noise(painter, [7, 8]), num_inference_steps=4, guidance_scale=4.0, output_type="np"
    ).images
    ours = draw(painter, encoder, PROMPTS[:2], [7, 8], steps=4, guidance=4.0)
    assert np.abs((theirs * 255).round() - ours).max() <= 2


def test_a_half_drawn_picture_differs_and_the_pipeline_goes_on_working(painter: Any, encoder: TextEncoder) -> None:
    options: dict[str, Any] = dict(steps=8, guidance=4.0)
    whole = draw(painter, encoder, PROMPTS[:1], [7], **options).astype(int)
    half = draw(painter, encoder, PROMPTS[:1], [7], stop_at=2, **options).astype(int)
    again = draw(painter, encoder, PROMPTS[:1], [7], **options).astype(int)
    assert np.abs(whole - half).mean() > 5
    assert np.array_equal(whole, again)
