"""One contract for every eraser: it forgets, it keeps, and the input is untouched. The judge is text-side here;
what the pictures show is asked in test_main_job.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from erase_diffusion.concepts import Concept, PromptWriter, preserved, resolve_concept
from erase_diffusion.erase import method_config, resolve_anchor
from erase_diffusion.erasers import ERASERS, CLIPErase, CLIPEraseConfig
from erase_diffusion.errors import ConfigError
from erase_diffusion.models import Model
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


@pytest.mark.parametrize("name", sorted(ERASERS))
def test_forgets_keeps_and_leaves_the_input_alone(
    name: str, mini: Model, encoder: TextEncoder, writer: PromptWriter
) -> None:
    sets = writer.training_sets(160, 320)
    before = weights_hash(encoder.state_dict())
    settings = {"steps": 60, "learning_rate": mini.spec.learning_rate} if name == "cliperase" else {}
    eraser = ERASERS[name][0](method_config(name, **settings))
    images = images_of(encoder, (*(p for p, _ in sets.forget[:40]), *sets.retain[1:41]))
    result = eraser.erase(encoder, sets, images if eraser.needs_images else {}, seed=0)
    assert weights_hash(encoder.state_dict()) == before
    assert weights_hash(result.encoder.state_dict()) != before
    assert result.method == name
    assert result.stopped

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


@pytest.mark.parametrize("name", sorted(ERASERS))
def test_strength_zero_changes_nothing(name: str, mini: Model, encoder: TextEncoder, writer: PromptWriter) -> None:
    sets = writer.training_sets(40, 40)
    settings = {"steps": 2} if name == "cliperase" else {}
    eraser = ERASERS[name][0](method_config(name, strength=0.0, **settings))
    result = eraser.erase(encoder, sets, images_of(encoder, sets.retain[1:20]), seed=0)
    assert weights_hash(result.encoder.state_dict()) == weights_hash(encoder.state_dict())


@pytest.mark.parametrize("name", sorted(ERASERS))
def test_the_same_seed_gives_the_same_encoder(
    name: str, mini: Model, encoder: TextEncoder, writer: PromptWriter
) -> None:
    sets = writer.training_sets(40, 40)
    settings = {"steps": 3} if name == "cliperase" else {}
    images = images_of(encoder, (*(p for p, _ in sets.forget[:20]), *sets.retain[1:20]))
    hashes = set()
    for _ in range(2):
        eraser = ERASERS[name][0](method_config(name, **settings))
        hashes.add(weights_hash(eraser.erase(encoder, sets, images, seed=7).encoder.state_dict()))
    assert len(hashes) == 1


def test_the_papers_form_forgets_in_the_pooled_vector(mini: Model, encoder: TextEncoder, writer: PromptWriter) -> None:
    sets = writer.training_sets(80, 160)
    images = images_of(encoder, (*(p for p, _ in sets.forget[:48]), *sets.retain[1:49]))
    config = CLIPEraseConfig(
        sequence_forgetting=0, sequence_retention=0, forgetting_form="raw", learning_rate=5e-4, steps=30
    )
    erased = CLIPErase(config).erase(encoder, sets, images, seed=0).encoder

    def similarity(e: TextEncoder, prompts: list[str]) -> float:
        ids = e.tokenize(prompts)
        with torch.no_grad():
            text = e.project(e.pooled(e.hidden(ids), ids))
        target = torch.cat([images[p] for p in prompts])
        return float(F.cosine_similarity(text, target).mean())

    forget = [p for p, _ in sets.forget[:48]]
    assert similarity(encoder, forget) > 0.8  # control
    assert similarity(erased, forget) < 0.2


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


def test_the_vocabulary_is_searched_for_words_that_ask_without_naming(
    mini: Model, encoder: TextEncoder, writer: PromptWriter
) -> None:
    kept = list(writer.preserve.values())
    triggers = find_triggers(encoder, mini.vocabulary, writer.concept.words, kept)
    assert {"purrs", "whiskered", "mice"} & set(triggers)
    # Control: another concept's words are not taken for the cat's.
    assert not {"barks", "wheels", "petals", "citrus"} & set(triggers)
    assert not {"cat", "kitten", "dog", "red", "snow"} & set(triggers)
