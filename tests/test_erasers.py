"""One contract for every eraser: it forgets, it keeps, and the input is untouched. The judge is text-side here;
what the pictures show is asked in test_main_job.py."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from erase_diffusion.concepts import Concept, PromptWriter, preserved, resolve_concept
from erase_diffusion.erase import method_config
from erase_diffusion.erasers import ERASERS, CLIPErase, CLIPEraseConfig, Eraser
from erase_diffusion.erasers.base import silent
from erase_diffusion.erasers.lipschitz import LipschitzConfig, lipschitz_loss, synthesise
from erase_diffusion.erasers.multimodal_nullspace import (
    MultimodalNullspace,
    MultimodalNullspaceConfig,
    removed_span,
    visual_prototypes,
)
from erase_diffusion.erasers.single_layer import pareto
from erase_diffusion.errors import ConfigError
from erase_diffusion.models import Model
from erase_diffusion.preparation import resolve_anchor
from erase_diffusion.text_encoder import TextEncoder, weights_hash
from erase_diffusion.triggers import find_triggers


@pytest.fixture(scope="module")
def writer(mini: Model, encoder: TextEncoder) -> PromptWriter:
    vocabulary = mini.vocabulary
    concept = resolve_concept(Concept("cat"), vocabulary)
    keep = preserved(concept, vocabulary)
    return PromptWriter(resolve_anchor(concept, vocabulary, keep, encoder, set()), vocabulary, keep)


def images_of(encoder: TextEncoder, prompts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Stand-in image features: the text's own embedding, slightly off. Deterministic."""
    noise = torch.Generator().manual_seed(0)
    ids = encoder.tokenize(prompts)
    with torch.no_grad():
        text = encoder.project(encoder.pooled(encoder.hidden(ids), ids))
    vectors = text + 0.3 * text.std() * torch.randn(text.shape, generator=noise)
    return {p: v[None] for p, v in zip(prompts, vectors, strict=True)}


def distance(states: torch.Tensor, other: torch.Tensor) -> float:
    return float((states - other).square().mean())


def short(name: str, mini: Model, steps: int, **settings: float) -> Eraser:
    """A method by name, at `mini`'s learning rate and with few steps where it trains."""
    if "steps" in {f.name for f in dataclasses.fields(ERASERS[name][1])}:
        settings = {"steps": steps, "learning_rate": mini.spec.learning_rate * ERASERS[name][1].rate, **settings}
    if name == "lipschitz":
        # Few samples, and the first step is taken.
        settings = {"samples": 8, "iterations": 80, "epochs": 3, "learning_rate": 0.05, "forgotten": 1.0, **settings}
    eraser: Eraser = ERASERS[name][0](method_config(name, **settings))
    return eraser


@pytest.mark.parametrize("name", ["cliperase", "nullspace", "multimodal-nullspace", "subgroup", "token-swap"])
def test_the_concept_reads_as_its_anchor_and_the_rest_as_before(
    name: str, mini: Model, encoder: TextEncoder, writer: PromptWriter
) -> None:
    sets = writer.training_sets(160, 320)
    eraser = short(name, mini, 60)
    images = images_of(encoder, (*(p for p, _ in sets.forget[:40]), *sets.retain[1:41]))
    result = eraser.erase(encoder, sets, images if eraser.needs == "features" else {}, seed=0)
    # Held-out sentences with words of equal length, so that positions agree without alignment.
    named, anchored = "see a cat here in the snow", f"see a {writer.concept.anchor} here in the snow"
    original = encoder.encode([named, anchored])
    erased = result.encoder.encode([named, anchored])
    apart = distance(original[0], original[1])
    assert apart > 0.01 * float(original.var())  # control: the encoder told them apart
    assert distance(erased[0], original[1]) < 0.25 * apart  # the concept now reads as its anchor
    kept = ["here is a red car on the sand", "see a flower here at night", ""]
    moved = [distance(a, b) for a, b in zip(result.encoder.encode(kept), encoder.encode(kept), strict=True)]
    assert max(moved) < 0.25 * apart


def similarity(encoder: TextEncoder, prompts: Sequence[str], images: dict[str, torch.Tensor]) -> float:
    """Mean cosine of prompts with their pictures."""
    ids = encoder.tokenize(prompts)
    with torch.no_grad():
        text = encoder.project(encoder.pooled(encoder.hidden(ids), ids))
    return float(F.cosine_similarity(text, torch.cat([images[p] for p in prompts])).mean())


PAPER = {"sequence_forgetting": 0, "sequence_retention": 0, "forgetting_form": "raw", "learning_rate": 5e-4}


@pytest.mark.parametrize(
    ("name", "settings", "forgets"),
    [
        (
            "cliperase",
            {"sequence_forgetting": 0, "sequence_retention": 0, "forgetting_form": "raw", "learning_rate": 5e-4},
            True,
        ),
        ("gradient-ascent", {}, True),
        ("gradient-difference", {}, True),
        ("single-layer", {}, True),
        ("retain-finetune", {}, False),
    ],
)
def test_methods_of_the_joint_space_forget_there(
    name: str, settings: dict[str, Any], forgets: bool, mini: Model, encoder: TextEncoder, writer: PromptWriter
) -> None:
    sets = writer.training_sets(80, 160)
    images = images_of(encoder, (*(p for p, _ in sets.forget[:48]), *sets.retain[1:49]))
    erased = short(name, mini, 30, **settings).erase(encoder, sets, images, seed=0).encoder
    forget, retain = [p for p, _ in sets.forget[:48]], sets.retain[1:49]
    before, after = (similarity(e, forget, images) for e in (encoder, erased))
    assert before > 0.8  # control
    assert (after < 0.5 * before) == forgets
    if name in ("gradient-difference", "retain-finetune"):  # the others hold nothing
        assert similarity(erased, retain, images) > 0.6


@pytest.mark.parametrize("name", sorted(ERASERS))
def test_strength_zero_changes_nothing(name: str, mini: Model, encoder: TextEncoder, writer: PromptWriter) -> None:
    sets = writer.training_sets(40, 40)
    images = images_of(encoder, (*(p for p, _ in sets.forget[:20]), *sets.retain[1:20]))
    result = short(name, mini, 2, strength=0.0).erase(encoder, sets, images, seed=0)
    assert weights_hash(result.encoder.state_dict()) == weights_hash(encoder.state_dict())
    assert result.method == name


@pytest.mark.parametrize("name", sorted(ERASERS))
def test_the_same_seed_gives_the_same_encoder_and_the_input_is_untouched(
    name: str, mini: Model, encoder: TextEncoder, writer: PromptWriter
) -> None:
    sets = writer.training_sets(40, 40)
    images = images_of(encoder, (*(p for p, _ in sets.forget[:20]), *sets.retain[1:20]))
    before = weights_hash(encoder.state_dict())
    hashes = {
        weights_hash(short(name, mini, 3).erase(encoder, sets, images, seed=7).encoder.state_dict()) for _ in range(2)
    }
    assert len(hashes) == 1
    assert before not in hashes
    assert weights_hash(encoder.state_dict()) == before


def test_the_trainer_stops_early_and_says_why(mini: Model, encoder: TextEncoder, writer: PromptWriter) -> None:
    sets = writer.training_sets(20, 20)
    # A rate this high only makes things worse: no evaluation beats the first.
    config = CLIPEraseConfig(learning_rate=0.5, steps=200, evaluate_every=2, patience=2)
    result = CLIPErase(config).erase(encoder, sets, images_of(encoder, sets.retain[1:20]), seed=0)
    assert "no better held-out loss" in result.stopped
    assert len(result.history) < 60


def test_unknown_methods_and_settings_are_refused_by_name(mini: Model) -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'magic'.*cliperase"):
        method_config("magic")
    with pytest.raises(ConfigError, match="nullspace has no setting 'steps'"):
        method_config("nullspace", steps=10)
    with pytest.raises(ConfigError, match=r"got 1\.5"):
        method_config("nullspace", strength=1.5)
    for name, value, message in (
        ("towers", "three", "towers must be text or both, got 'three'"),
        ("learning_rate", "fast", "learning_rate must be a number, got 'fast'"),
        ("steps", 1.5, r"steps must be a whole number, got 1\.5"),
        ("patience", 0, "patience must be at least 1, got 0"),
        ("forgetting_form", 3, "forgetting_form must be a word, got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            method_config("cliperase", **{name: value})
    assert method_config("lipschitz", sigmas=[0.5, 1]).sigmas == (0.5, 1)


def test_the_vocabulary_is_searched_for_words_that_ask_without_naming(
    mini: Model, encoder: TextEncoder, writer: PromptWriter
) -> None:
    kept = list(writer.preserve.values())
    triggers = find_triggers(encoder, mini.vocabulary, writer.concept.words, kept)
    assert {"purrs", "whiskered", "mice"} & set(triggers)
    # Control: another concept's words are not taken for the cat's.
    assert not {"barks", "wheels", "petals", "citrus"} & set(triggers)
    assert not {"cat", "kitten", "dog", "red", "snow"} & set(triggers)


def test_a_step_is_tried_on_the_layers_that_no_other_beats() -> None:
    assert pareto([3.0, 2.0, 1.0, 2.5], [0.5, 0.2, 0.1, 0.6]) == [0, 1, 2]
    assert pareto([1.0], [0.0]) == [0]


def test_a_loss_that_is_not_finite_stops_the_run(mini: Model, encoder: TextEncoder, writer: PromptWriter) -> None:
    sets = writer.training_sets(20, 20)
    images = {p: torch.full((1, 128), float("nan")) for p in (*(p for p, _ in sets.forget), *sets.retain)}
    with pytest.raises(ConfigError, match="the loss is nan at step 1"):
        short("cliperase", mini, 5).erase(encoder, sets, images, seed=0)


def test_both_towers_are_trained_when_asked(mini: Model, encoder: TextEncoder, writer: PromptWriter) -> None:
    sets = writer.training_sets(20, 20)
    eraser = short("cliperase", mini, 4, towers="both")
    assert eraser.needs == "pixels"
    noise = torch.Generator().manual_seed(0)
    prompts = (*(p for p, _ in sets.forget), *sets.retain)
    pixels = {p: torch.randn((1, 3, 64, 64), generator=noise) for p in prompts}
    assert encoder.image_tower is not None
    before = {k: v.clone() for k, v in encoder.image_tower.model.state_dict().items()}
    erased = eraser.erase(encoder, sets, pixels, seed=0, progress=silent).encoder
    assert erased.image_tower is not None
    after = erased.image_tower.model.state_dict()
    assert any(not torch.equal(after[k], before[k]) for k in before)
    # Control: the original's tower is as it was, and the text tower alone is trained without being asked.
    assert all(torch.equal(v, before[k]) for k, v in encoder.image_tower.model.state_dict().items())
    images = images_of(encoder, prompts)
    alone = short("cliperase", mini, 2).erase(encoder, sets, images, seed=0, progress=silent).encoder
    assert alone.image_tower is encoder.image_tower


def test_samples_of_a_class_are_made_from_noise(mini: Model, encoder: TextEncoder, writer: PromptWriter) -> None:
    sets = writer.training_sets(20, 20)
    classes = [*sets.forget_classes, *sets.retain_classes]
    ids = encoder.tokenize(classes)
    with torch.no_grad():
        prototypes = F.normalize(encoder.project(encoder.pooled(encoder.hidden(ids), ids)), dim=-1)
    config = LipschitzConfig(samples=8, iterations=200)
    generator = torch.Generator().manual_seed(0)
    made = synthesise(encoder, prototypes, 0, config, generator, random.Random(0), "a cat")
    assert encoder.image_tower is not None
    told = (F.normalize(encoder.image_tower.features(made), dim=-1) @ prototypes.T).argmax(1)
    assert len(made) >= 4
    assert (told == 0).all()
    noise = torch.randn(made.shape, generator=generator)
    told = (F.normalize(encoder.image_tower.features(noise), dim=-1) @ prototypes.T).argmax(1)
    assert not (told == 0).all()  # control: noise alone is not told as the class
    with pytest.raises(ConfigError, match="no sample of 'a cat' could be made in 1 iterations"):
        synthesise(
            encoder, prototypes, 0, dataclasses.replace(config, iterations=1), generator, random.Random(0), "a cat"
        )


def test_the_lipschitz_loss_is_the_papers() -> None:
    text, sample = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    noisy, noise = torch.tensor([[[0.0, 4.0]], [[3.0, 4.0]]]), torch.tensor([[2.0], [1.0]])
    # (5 + 4) / 4 and (4 + 5) / 2, the mean of both.
    assert float(lipschitz_loss(text, sample, noisy, noise)) == pytest.approx((9 / 4 + 9 / 2) / 2)


def test_the_span_that_is_removed_leaves_the_retained_span_alone() -> None:
    noise = torch.Generator().manual_seed(0)
    retain = F.normalize(torch.randn((30, 4), generator=noise) @ torch.randn((4, 16), generator=noise), dim=-1)
    forget = F.normalize(torch.randn((6, 16), generator=noise), dim=-1)
    v = removed_span(forget, retain, held=0.9999, rank=3)
    assert v.shape == (16, 3)
    assert torch.allclose(v.T @ v, torch.eye(3, dtype=v.dtype), atol=1e-6)
    assert float((retain.double() @ v).norm()) < 1e-3 * float(retain.norm())
    assert float((forget.double() @ v).norm()) > 0.5 * float(forget.norm())  # control: something is removed
    with pytest.raises(ConfigError, match="leaves no room"):
        removed_span(forget, torch.eye(16), held=0.9999, rank=1)


def test_prototypes_lie_where_zero_shot_sees_the_class() -> None:
    classes = F.normalize(torch.randn((5, 16), generator=torch.Generator().manual_seed(0)), dim=-1)
    points = visual_prototypes(classes, 2, 6, 20.0, seed=1)
    assert ((points @ classes.T).argmax(1) == 2).all()
    assert float((points @ points.T).min()) < 0.99  # and are not all the same


def test_a_projection_of_both_towers_forgets_the_class(mini: Model, encoder: TextEncoder, writer: PromptWriter) -> None:
    sets = writer.training_sets(80, 160)
    eraser = MultimodalNullspace(MultimodalNullspaceConfig(site="projection"))
    erased = eraser.erase(encoder, sets, {}, seed=0).encoder
    assert weights_hash(erased.state_dict()) == weights_hash(encoder.state_dict())  # no picture can change
    assert erased.projection is not None and erased.image_tower is not None and encoder.image_tower is not None
    assert not torch.equal(erased.image_tower.projection.weight, encoder.image_tower.projection.weight)
    named, other = ["a cat"], ["a car"]
    with torch.no_grad():
        lengths = []
        for tower in (encoder, erased):
            ids = tower.tokenize([*named, *other])
            lengths.append(tower.project(tower.pooled(tower.hidden(ids), ids)).norm(dim=1))
    shares = lengths[1] / lengths[0]
    assert float(shares[0]) < 0.7 * float(shares[1])


def test_more_concepts_than_dimensions_are_refused(mini: Model, encoder: TextEncoder, writer: PromptWriter) -> None:
    sets = dataclasses.replace(writer.training_sets(20, 20), forget_classes=tuple(f"a thing {i}" for i in range(128)))
    for name in ("nullspace", "multimodal-nullspace"):
        with pytest.raises(ConfigError, match=r"fewer concepts at once than the text encoder is wide \(128\), got 128"):
            short(name, mini, 1).erase(encoder, sets, {}, seed=0, progress=silent)
