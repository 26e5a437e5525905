"""Every (class, domain) cell apart: what an erasure of a class, of a domain, or of a class in one domain takes where.

The three paradigms of arXiv 2512.14113 are judged by cell: what is erased is one cell, a row or a column of the
table, and everything else must stay.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from evaluate_mini import prompt_of

from erase_diffusion.checker import CLIPChecker
from erase_diffusion.concepts import article
from erase_diffusion.generation import draw, noise_seeds
from erase_diffusion.metrics import rate
from erase_diffusion.mini.draw import draw_scene
from erase_diffusion.mini.world import STYLES, sample_scene
from erase_diffusion.models import Model
from erase_diffusion.text_encoder import TextEncoder

SEED = 9_000_000  # apart from the other tasks' scenes
CLASSES = ("cat", "dog", "bird", "car", "flower", "house")


def name(cell: tuple[str, str]) -> str:
    return ", ".join(cell)


@dataclass
class Cells:
    """Held-out scenes of each (class, domain), made once: drawings for the CLIP's accuracy, prompts for pictures."""

    model: Model
    pipe: Any
    checker: CLIPChecker
    drawn: int = 24
    asked: int = 12
    table: list[tuple[str, str]] = field(default_factory=lambda: [(c, d) for c in CLASSES for d in STYLES])

    def __post_init__(self) -> None:
        rng, processor = random.Random(SEED), self.model.clip()[2]
        scenes = [
            (cell, sample_scene(rng, "test", things=1, name=cell[0], style=cell[1]))
            for cell in self.table
            for _ in range(self.drawn)
        ]
        self.truth = [cell for cell, _ in scenes]
        drawings = [draw_scene(scene, random.Random(SEED + i)) for i, (_, scene) in enumerate(scenes)]
        self.pixels = processor(images=drawings, return_tensors="pt").pixel_values
        self.prompts = [
            (cell, prompt_of(sample_scene(rng, "test", things=1, name=cell[0], style=cell[1]), rng))
            for cell in self.table
            for _ in range(self.asked)
        ]

    def measure(self, encoder: TextEncoder, *, pictures: bool) -> dict[str, Any]:
        """Cell → the CLIP's zero-shot accuracy among all cells, and with `pictures` how often prompts for the cell give
        a picture in which the judge sees that class (p ≥ 0.5) and that domain (the likeliest)."""
        figures = {"zero-shot": self._by_cell(self.truth, self._answers(encoder))}
        if pictures:
            figures["pictures"] = self._by_cell([cell for cell, _ in self.prompts], self._shown(encoder))
        return figures

    def _by_cell(self, cells: Sequence[tuple[str, str]], right: Sequence[bool]) -> dict[str, Any]:
        return {
            name(cell): rate([r for r, c in zip(right, cells, strict=True) if c == cell]).to_dict()
            for cell in self.table
        }

    @torch.no_grad()
    def _answers(self, encoder: TextEncoder) -> list[bool]:
        assert encoder.image_tower is not None
        images = F.normalize(encoder.image_tower.features(self.pixels), dim=-1)
        prototypes = [
            F.normalize(encoder.features([f"{p} of {article(c)}" for p in STYLES[d].phrases]), dim=-1).mean(0)
            for c, d in self.table
        ]
        best = (images @ F.normalize(torch.stack(prototypes), dim=-1).T).argmax(1).tolist()
        return [self.table[b] == cell for b, cell in zip(best, self.truth, strict=True)]

    def _shown(self, encoder: TextEncoder) -> list[bool]:
        spec, prompts = self.model.spec, [p for _, p in self.prompts]
        seeds = noise_seeds("cells", 0, len(prompts))
        images = draw(self.pipe, encoder, prompts, seeds, steps=spec.steps, guidance=spec.guidance)
        embeddings = self.checker.embed_images(images)
        things, styles = self.checker.things(embeddings), self.checker.styles(embeddings)
        names = list(styles)
        style = [names[i] for i in torch.stack(list(styles.values())).argmax(0).tolist()]
        return [bool(things[c][i] >= 0.5) and style[i] == d for i, ((c, d), _) in enumerate(self.prompts)]
