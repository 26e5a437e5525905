"""Training pictures with their labels."""

from __future__ import annotations

import itertools
import random

import numpy as np
import torch
from tqdm import tqdm

from erase_diffusion.mini.draw import draw_malformed, draw_with_boxes
from erase_diffusion.mini.world import CHARACTER, COLOURS, OBJECTS, Scene, sample_scene

NAMES, COLOUR_NAMES = [*OBJECTS, CHARACTER.name], list(COLOURS)
PAIRS = list(itertools.combinations(range(len(NAMES)), 2))
IMAGES = 60_000  # drawings per stage, made in half a minute


def draw_many(
    count: int, seed: int, malformed: int = 0, things: int | None = None
) -> tuple[list[Scene], torch.Tensor, torch.Tensor]:
    """`count` training scenes, their pictures, uint8 (count, 3, 64, 64), and which thing covers each 8×8 patch.

    The first `malformed` are drawn as such; `things` fixes how many things a scene has. The labels are uint8
    (count, 2, 64): object and colour by index,
    with the number of objects (colours) for none.
    """
    rng = random.Random(seed)
    scenes = [sample_scene(rng, things=1 if i < malformed else things) for i in range(count)]
    pictures = np.empty((count, 64, 64, 3), dtype=np.uint8)
    labels = np.empty((count, 2, 8, 8), dtype=np.uint8)
    labels[:, 0], labels[:, 1] = len(NAMES), len(COLOUR_NAMES)
    centre = np.arange(8) * 8 + 4
    for i, scene in enumerate(tqdm(scenes, desc="drawing", mininterval=5)):
        if i < malformed:
            pictures[i] = np.asarray(draw_malformed(scene, rng))
            continue
        image, boxes = draw_with_boxes(scene, rng)
        pictures[i] = np.asarray(image)
        for thing, (left, top, side) in zip(scene.things, boxes, strict=True):
            inside = ((centre > top) & (centre < top + side))[:, None] & ((centre > left) & (centre < left + side))[
                None
            ]
            labels[i, 0][inside] = NAMES.index(thing.name)
            if thing.colour is not None:
                labels[i, 1][inside] = COLOUR_NAMES.index(thing.colour)
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    return scenes, images, torch.from_numpy(labels).flatten(2)


def to_float(pictures: torch.Tensor, device: str) -> torch.Tensor:
    """uint8 pictures to [-1, 1]."""
    return pictures.to(device).float() / 127.5 - 1
