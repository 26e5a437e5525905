"""The main job as a user has it: one command, and what it claims is what the pictures show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from conftest import Run
from PIL import Image

from erase_diffusion.artifact import load_erased_text_encoder
from erase_diffusion.checker import CLIPChecker
from erase_diffusion.generation import draw
from erase_diffusion.models import Model
from erase_diffusion.text_encoder import TextEncoder

ErasedCat = tuple[Path, Run, dict[str, Any]]


def test_the_cat_is_removed_and_the_exit_code_says_so(erased_cat: ErasedCat) -> None:
    _, run, record = erased_cat
    assert run.code == 0, run.err + run.out[-2000:]
    verification = record["verification"][0]
    assert verification["verdict"] == "removed"
    assert verification["preserved"] is True
    assert verification["found"]["named"]["before"]["low"] > 0.5  # control: it was there
    assert verification["found"]["named"]["after"]["rate"] < 0.1
    assert verification["kept"]["preserved concepts"]["rate"] > 0.9  # control: the rest is still there
    assert verification["checker"]["false_alarms"]["rate"] <= 0.05  # measured on pictures that set no threshold


def test_progress_goes_to_stderr_and_results_to_stdout(erased_cat: ErasedCat) -> None:
    _, run, record = erased_cat
    assert json.loads(run.out)["output"] == "no-cat"
    assert "verifying" in run.err
    assert "Traceback" not in run.err
    assert record["schema_version"] == 1


def test_the_record_says_what_was_done(erased_cat: ErasedCat) -> None:
    folder, _, record = erased_cat
    on_disk = json.loads((folder / "erasure.json").read_text())
    assert {k: v for k, v in record.items() if k != "output"} == on_disk
    assert on_disk["verification"][0]["images"]["judge_sha256"]
    concept = on_disk["concepts"][0]
    assert concept["name"] == "cat"
    assert set(concept["aliases"]) == {"kitten", "kitty"}
    assert concept["anchor"] in concept["preserve"]
    assert on_disk["source"]["model"] == "mini"
    assert len(on_disk["source"]["sha256"]) == 64
    assert on_disk["source"]["sha256"] != on_disk["erased"]["sha256"]
    assert {"torch", "transformers", "diffusers"} <= set(on_disk["versions"])
    assert on_disk["seconds"] > 0


def test_the_picture_shows_both(erased_cat: ErasedCat) -> None:
    with Image.open(erased_cat[0] / "before-after.png") as picture:
        assert picture.width > 500
        assert np.asarray(picture.convert("RGB")).std() > 20


def test_the_saved_folder_draws_no_cat_with_other_noise(
    erased_cat: ErasedCat, mini: Model, encoder: TextEncoder, painter: Any, checker: CLIPChecker
) -> None:
    model = load_erased_text_encoder(erased_cat[0], base="mini").float()
    erased = TextEncoder(model, encoder.tokenizer, encoder.dtype)
    prompts = [
        "here is a cat",
        "see a kitten here in the snow",
        "look at my drawing of a cat on the sand",
        "a cat beside a red car",
    ] * 6
    seeds = list(range(42, 42 + len(prompts)))
    found = []
    for tower in (encoder, erased):
        images = draw(painter, tower, prompts, seeds, steps=mini.spec.steps, guidance=mini.spec.guidance)
        things = checker.things(checker.embed_images(images))
        found.append(((things["cat"] >= 0.5).float().mean().item(), (things["car"][3::4] >= 0.5).float().mean().item()))
    assert found[0][0] > 0.8  # control: it was there
    assert found[1][0] < 0.15
    assert found[1][1] >= found[0][1] - 0.34  # and the car beside it stays
