"""Prompts × seeds → images, drawn by a stock pipeline from embeddings that were made once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from erase_diffusion.text_encoder import TextEncoder

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def noise_seeds(role: str, seed: int, count: int) -> list[int]:
    """Seeds for `count` pictures that depend on what they are for: calibration and verification never share noise."""
    digests = (hashlib.sha256(f"{role} {seed} {i}".encode()).digest() for i in range(count))
    return [int.from_bytes(d[:7], "big") for d in digests]


def initial_noise(pipe: StableDiffusionPipeline, seeds: Sequence[int]) -> Tensor:
    """One latent (c, h, w) of standard normal noise per seed, drawn on the CPU: the same on every device."""
    config = pipe.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def draw(
    pipe: StableDiffusionPipeline,
    encoder: TextEncoder,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    batch_size: int = 32,
    stop_at: int | None = None,
    progress: Callable[[int], Any] = lambda done: None,
) -> np.ndarray:
    """Draw one image for each (prompt, seed); returns uint8 (n, height, width, 3).

    The same seed gives the same initial noise whatever encoder is passed. Every different prompt is encoded
    once, the empty one (for guidance) included. stop_at: leave the denoising after so many steps, for
    half-drawn pictures.
    """
    different = list(dict.fromkeys(("", *prompts)))
    states = dict(zip(different, encoder.encode(different), strict=True))
    images = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        embeddings = torch.stack([states[p] for p in prompts[part]])
        images.append(paint(pipe, embeddings, states[""], seeds[part], steps=steps, guidance=guidance, stop_at=stop_at))
        progress(len(embeddings))
    return np.concatenate(images)


@torch.no_grad()
def paint(
    pipe: StableDiffusionPipeline,
    embeddings: Tensor,
    empty: Tensor,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    stop_at: int | None = None,
) -> np.ndarray:
    """One batch of images, uint8 (n, height, width, 3), from prompt embeddings (n, T, d), the empty prompt's (T, d)
    and a seed each."""
    embeddings = embeddings.to(pipe.device, pipe.unet.dtype)
    output = pipe(
        prompt_embeds=embeddings,
        negative_prompt_embeds=empty.to(pipe.device, pipe.unet.dtype).expand_as(embeddings),
        latents=initial_noise(pipe, seeds).to(pipe.device, pipe.unet.dtype),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="np",
        callback_on_step_end=_interrupt(stop_at) if stop_at is not None else None,
    )
    images: np.ndarray = (output.images * 255).round().astype(np.uint8)
    return images


def _interrupt(stop_at: int) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step + 1 >= stop_at:
            pipe._interrupt = True
        return kwargs

    return callback
