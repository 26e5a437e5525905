"""An erasure taken back, made weaker, and gone on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_cli
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from erase_diffusion import erase_concept
from erase_diffusion.artifact import load_erased_text_encoder
from erase_diffusion.errors import ConfigError, ModelError
from erase_diffusion.models import Model
from erase_diffusion.restore import restore
from erase_diffusion.text_encoder import TextEncoder, weights_hash


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "text_encoder" / "model.safetensors")


@pytest.fixture(scope="module")
def drop_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cat erased by a closed form, the whole way and half of it."""
    work = tmp_path_factory.mktemp("restore")
    erase_concept("cat", method="nullspace", verify=False).save_pretrained(work / "whole")
    erase_concept("cat", method="nullspace", strength=0.5, verify=False).save_pretrained(work / "half")
    return work


@pytest.mark.parametrize("name", ["whole", "half"])
def test_the_original_comes_back_bit_for_bit(drop_ins: Path, tmp_path: Path, mini: Model, name: str) -> None:
    run = run_cli("restore", str(drop_ins / name), "--output", "original", "--json", cwd=tmp_path, group=True)
    assert run.code == 0, run.err
    source = mini.text_encoder().state_dict()
    assert weights_hash(weights(drop_ins / name)) != weights_hash(source)  # control
    assert weights_hash(weights(tmp_path / "original")) == weights_hash(source) == json.loads(run.out)["sha256"]
    assert not (tmp_path / "original" / "erasure.json").exists()


def test_the_strength_is_changed_without_doing_the_work_again(drop_ins: Path, tmp_path: Path) -> None:
    restore(drop_ins / "half", strength=1.0).save_pretrained(tmp_path / "whole")
    assert weights_hash(weights(tmp_path / "whole")) == weights_hash(weights(drop_ins / "whole"))
    restore(drop_ins / "whole", strength=0.5).save_pretrained(tmp_path / "half")
    made, asked = weights(tmp_path / "half"), weights(drop_ins / "half")
    # mini is stored in float16: half of a rounded edit is half of the edit but for the last bit.
    assert max(float((made[k].float() - asked[k].float()).abs().max()) for k in made) < 1e-3
    record = json.loads((tmp_path / "half" / "erasure.json").read_text())
    assert record["parameters"]["strength"] == 0.5
    assert record["verification"] == []
    load_erased_text_encoder(tmp_path / "half", base="mini")
    # And from there on to another one.
    restore(tmp_path / "half", strength=1.0).save_pretrained(tmp_path / "again")
    assert weights_hash(weights(tmp_path / "again")) == weights_hash(weights(drop_ins / "whole"))


def test_what_cannot_be_restored_is_refused(drop_ins: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"strength must lie in \[0, 1\], got 1\.5"):
        restore(drop_ins / "half", strength=1.5)
    with pytest.raises(ModelError, match=r"erasure\.json is missing"):
        restore(tmp_path)
    erase_concept("cat", method="retain-finetune", steps=1, verify=False).save_pretrained(tmp_path / "trained")
    with pytest.raises(ConfigError, match="made by retain-finetune, which trains"):
        restore(tmp_path / "trained", strength=0.5)
    restore(tmp_path / "trained")  # control: the original is there for all


def test_going_on_from_an_erasure_keeps_it_and_tells_of_it(
    drop_ins: Path, tmp_path: Path, encoder: TextEncoder
) -> None:
    result = erase_concept("car", method="nullspace", start=drop_ins / "whole", verify=False)
    result.save_pretrained(tmp_path / "both")
    record = json.loads((tmp_path / "both" / "erasure.json").read_text())
    assert [c["name"] for c in record["concepts"]] == ["car"]
    assert [c["name"] for r in record["earlier"] for c in r["concepts"]] == ["cat"]
    assert record["source"]["sha256"] == weights_hash(encoder.state_dict())
    prompts = ["see a cat here in the snow", "see a car here in the snow", "see a flower here in the snow"]
    source, both = encoder.encode(prompts), result.erasure.encoder.encode(prompts)
    moved = (both - source).square().sum((1, 2))
    assert min(moved[0], moved[1]) > 10 * moved[2]  # both concepts have left, the rest has not
    anchors = [record["earlier"][0]["concepts"][0]["anchor"], record["concepts"][0]["anchor"]]
    wished = encoder.encode([f"see a {a} here in the snow" for a in anchors])
    left = (both[:2] - wished).square().sum((1, 2)) / (source[:2] - wished).square().sum((1, 2))
    assert float(left.max()) < 0.3
    with pytest.raises(ConfigError, match="'kitten' is erased already"):
        erase_concept("kitten", method="nullspace", start=drop_ins / "whole", verify=False)
    with pytest.raises(ConfigError, match="erased before"):
        restore(tmp_path / "both", strength=0.5)
    assert weights_hash(restore(tmp_path / "both").encoder.state_dict()) == weights_hash(encoder.state_dict())


def test_what_an_earlier_concept_became_can_go_as_well(drop_ins: Path, tmp_path: Path, encoder: TextEncoder) -> None:
    became = json.loads((drop_ins / "whole" / "erasure.json").read_text())["concepts"][0]["anchor"]
    result = erase_concept(became, method="nullspace", start=drop_ins / "whole", verify=False)
    new = result.record["concepts"][0]["anchor"]
    assert new not in ("cat", became)
    assert result.record["earlier"][0]["concepts"][0]["anchor"] == new  # the record says what it is now
    result.save_pretrained(tmp_path / "both")
    third = erase_concept("train", method="nullspace", start=tmp_path / "both", verify=False)
    assert [c["name"] for r in third.record["earlier"] for c in r["concepts"]] == ["cat", became]
    prompts = ["see a cat here in the snow", f"see a {became} here in the snow"]
    wished = encoder.encode([f"see a {new} here in the snow"])
    source, erased = encoder.encode(prompts), result.erasure.encoder.encode(prompts)
    left = (erased - wished).square().sum((1, 2)) / (source - wished).square().sum((1, 2))
    assert float(left.max()) < 0.4


def test_a_damaged_record_is_refused(drop_ins: Path, tmp_path: Path) -> None:
    shutil.copytree(drop_ins / "whole", tmp_path / "bad")
    record = json.loads((tmp_path / "bad" / "erasure.json").read_text())
    record["concepts"] = [{"name": "cat", "kind": "magic", "aliases": [], "anchor": "dog"}]
    (tmp_path / "bad" / "erasure.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="its record names a concept that is none"):
        erase_concept("car", method="nullspace", start=tmp_path / "bad", verify=False)


def test_a_look_within_a_thing_becomes_another_look(encoder: TextEncoder) -> None:
    result = erase_concept("red", within="cat", method="nullspace", verify=False)
    concept = result.record["concepts"][0]
    assert (concept["kind"], concept["within"]) == ("attribute", "cat")
    assert concept["anchor"] != "red"
    prompts = ["see a red cat here in the snow", "see a red car here in the snow", "see a blue cat here in the snow"]
    moved = (result.erasure.encoder.encode(prompts) - encoder.encode(prompts)).square().sum((1, 2))
    assert float(moved[0]) > 3 * float(moved[1:].max())


def test_weights_that_are_not_the_recorded_ones_are_refused(drop_ins: Path, tmp_path: Path) -> None:
    shutil.copytree(drop_ins / "half", tmp_path / "half")
    file = tmp_path / "half" / "whole.safetensors"
    save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    with pytest.raises(ModelError, match=r"whole\.safetensors: the weights are not the ones"):
        restore(tmp_path / "half", strength=1.0)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="is not a whole safetensors file"):
        restore(tmp_path / "half", strength=1.0)
    restore(tmp_path / "half").save_pretrained(tmp_path / "original")  # control: the original needs none of it
    restore(tmp_path / "half").save_pretrained(tmp_path / "original", overwrite=True)


def test_a_whole_clip_is_saved_when_both_towers_are_erased(tmp_path: Path, mini: Model) -> None:
    settings = {"towers": "both", "steps": 2}
    result = erase_concept("cat", settings=settings, verify=False)
    result.save_pretrained(tmp_path / "both")
    clip = CLIPModel.from_pretrained(tmp_path / "both" / "clip")
    erased = weights(tmp_path / "both")
    text = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in clip.text_model.state_dict().items()}
    assert max(float((text[k].float() - v.float()).abs().max()) for k, v in erased.items()) < 1e-2
    source = mini.clip()[0].vision_model.state_dict()
    assert any(not torch.equal(v, source[k]) for k, v in clip.vision_model.state_dict().items())
    with pytest.raises(ConfigError, match="image tower as well"):
        erase_concept("car", method="nullspace", start=tmp_path / "both", verify=False)
