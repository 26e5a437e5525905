"""The papers' own tasks, on the CLIP itself: zero-shot classification and retrieval, on drawings of held-out scenes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from evaluate_mini import prompt_of
from PIL import Image
from torch import Tensor

from erase_diffusion.checker import THING_ENSEMBLE
from erase_diffusion.concepts import PromptSets, PromptWriter, article, says
from erase_diffusion.image_tower import ImageTower
from erase_diffusion.metrics import rate, recall_at
from erase_diffusion.mini.captions import caption
from erase_diffusion.mini.draw import draw_scene
from erase_diffusion.mini.world import CHARACTER, OBJECTS, STYLES, Scene, sample_scene
from erase_diffusion.preparation import to_anchor
from erase_diffusion.text_encoder import TextEncoder

SEED = 8_000_000  # apart from training, evaluation of the model, calibration and verification
KS = (1, 5, 10)


def training_pairs(
    writer: PromptWriter, processor: Any, *, forget: int = 80, retain: int = 640
) -> tuple[PromptSets, dict[str, Tensor]]:
    """Captioned drawings to train on as the papers do, and prompt → pixel values: scenes, combinations and captions of
    the training side, none of which the tasks ask about. A fifth of each side is for stopping."""
    rng = random.Random(f"pairs {writer.seed}")
    style = writer.concept.kind == "style"
    fixed = {"style": writer.name} if style else {"name": writer.name}
    sides: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def add(side: dict[str, Tensor], scene: Scene, wanted: bool) -> None:
        said = caption(scene, rng)
        if said not in side and any(says(said, w) for w in writer.concept.words) == wanted:
            side[said] = processor(images=draw_scene(scene, rng), return_tensors="pt").pixel_values

    while len(sides[0]) < forget:
        add(sides[0], sample_scene(rng, "train", things=1, **fixed), True)
    while len(sides[1]) < retain:
        scene = sample_scene(rng, "train")
        if scene.style != writer.name and writer.name not in {t.name for t in scene.things}:
            add(sides[1], scene, False)
    pairs, kept = [(c, to_anchor(c, [writer.concept])) for c in sides[0]], list(sides[1])
    a, b = forget * 4 // 5, retain * 4 // 5
    return PromptSets(tuple(pairs[:a]), ("", *kept[:b]), tuple(pairs[a:]), tuple(kept[b:])), sides[0] | sides[1]


@dataclass
class ClipTasks:
    """Drawings with their classes and captions, made once; `measure` asks an encoder about them.

    drawn: drawings for each thing, for each style, and for the retrieval (with no two captions the same).
    """

    processor: Any
    drawn: int = 20
    pairs: int = 300
    _features: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        rng = random.Random(SEED)
        things = [n for n in (*OBJECTS, CHARACTER.name) for _ in range(self.drawn)]
        styles = [s for s in STYLES for _ in range(3 * self.drawn)]
        scenes: dict[str, Scene] = {}
        while len(scenes) < self.pairs:
            scene = sample_scene(rng, "test", things=rng.choice((1, 1, 2)))
            scenes.setdefault(prompt_of(scene, rng), scene)
        self.classes = {"thing": things, "style": styles}
        self.captions = scenes
        drawings = {
            "thing": [sample_scene(rng, "test", things=1, name=n) for n in things],
            "style": [sample_scene(rng, "test", things=1, style=s) for s in styles],
            "retrieval": list(scenes.values()),
        }
        self.pixels = {
            task: torch.cat([self._pixels(draw_scene(s, random.Random(SEED + i))) for i, s in enumerate(some)])
            for task, some in drawings.items()
        }

    def _pixels(self, drawing: Image.Image) -> Tensor:
        pixels: Tensor = self.processor(images=drawing, return_tensors="pt").pixel_values
        return pixels

    def _images(self, tower: ImageTower, frozen: bool) -> dict[str, Tensor]:
        """Normalised features of all drawings; those of a frozen tower are kept."""
        key = id(tower)
        if key not in self._features:
            features = {task: F.normalize(tower.features(p), dim=-1) for task, p in self.pixels.items()}
            if not frozen:
                return features
            self._features = {key: features}
        return self._features[key]

    @torch.no_grad()
    def measure(self, encoder: TextEncoder, writer: PromptWriter, original: TextEncoder) -> dict[str, Any]:
        """Zero-shot accuracy on the forget class and the others, and recall at 1, 5, 10 both ways, by whether the
        caption asks for the concept; None for a concept that is no class of the drawings."""
        tower = encoder.image_tower
        assert tower is not None
        images = self._images(tower, tower is original.image_tower)
        task = "style" if writer.concept.kind == "style" else "thing"
        truth = self.classes[task]
        names = list(dict.fromkeys(truth))
        prototypes = []
        for name in names:
            said = (
                [f"{p} of a thing" for p in STYLES[name].phrases]
                if task == "style"
                else [t.format(s=article(name)) for t in THING_ENSEMBLE]
            )
            prototypes.append(F.normalize(_embed(encoder, said).mean(0), dim=-1))
        answers = [names[i] for i in (images[task] @ torch.stack(prototypes).T).argmax(1).tolist()]
        right = [a == t for a, t in zip(answers, truth, strict=True)]
        forget = [r for r, t in zip(right, truth, strict=True) if t == writer.name]
        retain = [r for r, t in zip(right, truth, strict=True) if t != writer.name]
        text = _embed(encoder, list(self.captions))
        similarity = text @ images["retrieval"].T
        asks = [
            s.style == writer.name if task == "style" else writer.name in {t.name for t in s.things}
            for s in self.captions.values()
        ]
        recall: dict[str, Any] = {}
        for side, wanted in (("forget", True), ("retain", False)):
            index = [i for i, a in enumerate(asks) if a == wanted]
            for way, table in (("text to image", similarity), ("image to text", similarity.T)):
                recall[f"{side}, {way}"] = {f"R@{k}": recall_at(table.cpu().numpy(), k, index).to_dict() for k in KS}
        return {
            "zero-shot forget": rate(forget).to_dict() if forget else None,
            "zero-shot retain": rate(retain).to_dict(),
            "retrieval": recall,
        }


def _embed(encoder: TextEncoder, texts: list[str]) -> Tensor:
    return F.normalize(encoder.features(texts), dim=-1)
