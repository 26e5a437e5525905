"""The drop-in folder: loads in stock libraries, is written whole or not at all, and knows its base."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erase_diffusion import artifact
from erase_diffusion.artifact import check_output, load_erased_text_encoder, read_record, save_drop_in
from erase_diffusion.errors import ModelError, OutputError
from erase_diffusion.mini.vocabulary import WEIGHTS
from erase_diffusion.report.model_card import model_card
from erase_diffusion.text_encoder import TextEncoder

DropIn = tuple[Path, Run, dict[str, Any]]


@pytest.fixture
def copy(drop_in: DropIn, tmp_path: Path) -> Path:
    """A copy of the erased folder that a test may damage."""
    return Path(shutil.copytree(drop_in[0], tmp_path / "copy"))


def test_the_folder_is_complete(drop_in: DropIn) -> None:
    folder = drop_in[0]
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "erasure.json",
        "README.md",
    } <= files
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"} <= files


def test_keys_and_dtype_are_the_published_ones(drop_in: DropIn) -> None:
    source = load_file(WEIGHTS / "pipeline" / "text_encoder" / "model.safetensors")
    with safe_open(drop_in[0] / "text_encoder" / "model.safetensors", framework="pt") as erased:
        assert set(erased.keys()) == set(source)
        assert erased.metadata() == {"format": "pt"}
        for key in erased.keys():  # noqa: SIM118 - not a dict
            assert erased.get_tensor(key).dtype == source[key].dtype
            assert erased.get_tensor(key).shape == source[key].shape


def test_stock_diffusers_draws_with_it_and_something_changed(drop_in: DropIn) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    erased = CLIPTextModel.from_pretrained(drop_in[0], subfolder="text_encoder", dtype=torch.float32)
    images = []
    for options in ({}, {"text_encoder": erased}):
        pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS / "pipeline", torch_dtype=torch.float32, **options)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(["a cat in the snow"], num_inference_steps=4, generator=generator, output_type="np").images)
    assert abs(images[0] - images[1]).max() > 0.1


def test_the_config_names_no_path_of_this_machine(drop_in: DropIn) -> None:
    for file in ("text_encoder/config.json", "erasure.json", "README.md", "tokenizer/tokenizer_config.json"):
        assert str(Path(WEIGHTS).parent.parent.parent) not in (drop_in[0] / file).read_text(), file


def test_load_checks_the_base(drop_in: DropIn, tmp_path: Path) -> None:
    model = load_erased_text_encoder(drop_in[0], base="mini", dtype=torch.float32)
    assert next(model.parameters()).dtype == torch.float32
    assert next(load_erased_text_encoder(drop_in[0]).parameters()).dtype == torch.float32
    assert next(load_erased_text_encoder(drop_in[0], dtype=torch.float16).parameters()).dtype == torch.float16
    other = Path(shutil.copytree(WEIGHTS / "pipeline", tmp_path / "other"))
    weights = other / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    state["text_model.final_layer_norm.bias"] += 0.5
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="was erased from 'mini'"):
        load_erased_text_encoder(drop_in[0], base=str(other))


def test_changed_weights_are_noticed(copy: Path) -> None:
    weights = copy / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    state["text_model.final_layer_norm.bias"] += 0.5
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not the ones that erasure\.json records"):
        load_erased_text_encoder(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "must hold a JSON object"),
        ("{}", "schema version None"),
        ('{"schema_version": 99}', "99"),
    ],
)
def test_a_broken_record_is_refused(copy: Path, text: str, message: str) -> None:
    (copy / "erasure.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_record(copy)
    (copy / "erasure.json").unlink()
    with pytest.raises(ModelError, match=r"erasure\.json is missing"):
        read_record(copy)


def test_an_existing_folder_needs_overwrite_and_a_strange_one_is_never_replaced(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists; pass --overwrite"):
        check_output(copy, overwrite=False)
    check_output(copy, overwrite=True)
    strange = tmp_path / "photos"
    strange.mkdir()
    (strange / "holiday.jpg").write_text("x")
    with pytest.raises(OutputError, match="is not an erasure"):
        check_output(strange, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_parent_is_said_before_the_work(tmp_path: Path) -> None:
    parent = tmp_path / "locked"
    parent.mkdir()
    parent.chmod(0o500)
    with pytest.raises(OutputError, match="not writable"):
        check_output(parent / "out", overwrite=False)


def test_a_parent_that_is_a_file_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not writable"):
        check_output(tmp_path / "file" / "out", overwrite=False)


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_half_written(
    drop_in: DropIn, encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    target = tmp_path / "out"
    if existing:
        shutil.copytree(drop_in[0], target)
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "save_file", full)
    record = drop_in[2]
    with pytest.raises(OutputError, match=r"No space left on device.*nothing was left behind"):
        save_drop_in(target, encoder, record, model_card(record), None, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    if existing:
        load_erased_text_encoder(target)  # the old one is still whole


def test_parents_that_were_made_go_with_a_failure(
    drop_in: DropIn, encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        save_drop_in(tmp_path / "new" / "deep" / "out", encoder, drop_in[2], "", None, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_overwriting_through_a_link_replaces_what_it_points_to(
    copy: Path, drop_in: DropIn, encoder: TextEncoder
) -> None:
    link = copy.parent / "link"
    link.symlink_to(copy)
    save_drop_in(link, encoder, drop_in[2], "new", None, overwrite=True)
    assert link.is_symlink()
    assert (copy / "README.md").read_text() == "new"
    assert sorted(p.name for p in copy.parent.iterdir()) == ["copy", "link"]


def test_broken_weights_are_not_saved(drop_in: DropIn, encoder: TextEncoder, tmp_path: Path) -> None:
    broken = encoder.copy()
    with torch.no_grad():
        broken.transformer.final_layer_norm.bias[0] = float("inf")
    with pytest.raises(ModelError, match="NaN or infinite"):
        save_drop_in(tmp_path / "out", broken, drop_in[2], "", None, overwrite=False)
    assert not (tmp_path / "out").exists()


def test_the_card_escapes_what_the_user_wrote(drop_in: DropIn) -> None:
    record = json.loads(json.dumps(drop_in[2]))
    record["concepts"][0]["name"] = "<script>alert(1)</script>|`x`"
    card = model_card(record)
    assert "<script>" not in card
    assert "\\|" in card
