"""Loading: what is refused, with which words, and that nothing is ever loaded from a pickle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from erase_diffusion.errors import ConfigError, ModelError
from erase_diffusion.mini.vocabulary import WEIGHTS
from erase_diffusion.models import MODELS, Model, check_weights
from erase_diffusion.text_encoder import TextEncoder, weights_hash

LAYOUTS = Path(__file__).parent.parent.parent / "shared" / "data" / "layouts"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of mini's pipeline that a test may damage."""
    return Path(shutil.copytree(WEIGHTS / "pipeline", tmp_path / "model"))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'stable'.*mini, sd-1\.4"):
        Model("stable")
    assert {"mini", "sd-1.4", "sd-1.5", "sd-2.1"} <= set(MODELS)


def test_a_folder_loads_like_the_name(folder: Path, encoder: TextEncoder) -> None:
    loaded = Model(str(folder)).text_encoder()
    assert weights_hash(loaded.state_dict()) == weights_hash(encoder.state_dict())


def test_a_folder_without_an_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    with pytest.raises(ModelError, match=r"model_index\.json is missing"):
        Model(str(folder))


def test_an_index_that_is_no_json(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match=r"model_index\.json cannot be read as JSON"):
        Model(str(folder))


def test_missing_weights_and_config(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no \.safetensors weights"):
        Model(str(folder)).text_encoder()
    (folder / "text_encoder" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        Model(str(folder)).text_encoder()


def test_a_pickle_is_named_and_never_opened(folder: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle"):
        Model(str(folder)).text_encoder()


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file"):
        Model(str(folder)).text_encoder()


def test_nan_weights_name_the_tensor(folder: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    state["text_model.final_layer_norm.weight"][3] = float("nan")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"final_layer_norm\.weight holds NaN"):
        Model(str(folder)).text_encoder()


def test_a_missing_tensor_is_an_error_not_a_random_one(folder: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    del state["text_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing.*fc1"):
        Model(str(folder)).text_encoder()


def test_two_text_encoders_are_not_erased_by_half(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="only pipelines with one CLIP text encoder"):
        Model(str(folder))


def test_the_shipped_weights_are_light_half_precision_and_published_keys() -> None:
    files = list(WEIGHTS.rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) <= 24 * 2**20
    for file in files:
        assert check_weights(file.parent) == torch.float16
    keys = load_file(WEIGHTS / "pipeline" / "text_encoder" / "model.safetensors")
    assert all(k.startswith("text_model.") for k in keys)


def test_stock_diffusers_loads_mini_and_its_text_tower_is_the_clips(encoder: TextEncoder) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPModel, CLIPTextModel

    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["a red car on the grass"], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    clip = CLIPModel.from_pretrained(WEIGHTS / "clip")
    ids = encoder.tokenize(["a red car on the grass"])
    with torch.no_grad():
        expected = clip.text_model(input_ids=ids).last_hidden_state
    assert torch.allclose(encoder.hidden(ids), expected, atol=1e-3)
    assert isinstance(pipe.text_encoder, CLIPTextModel)


def test_a_folder_finds_its_companions_by_the_encoders_width(folder: Path) -> None:
    model = Model(str(folder))
    assert model.spec.judge == MODELS["mini"].judge
    assert model.paired_text_encoder(model.clip()[0]).projection is not None
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 131}))
    with pytest.raises(ModelError, match="hidden size 131"):
        Model(str(folder))


def test_a_clip_that_is_not_the_encoders_is_refused(folder: Path) -> None:
    weights = folder / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    save_file(
        {k: torch.randn_like(v.float()).to(v.dtype) for k, v in state.items()}, weights, metadata={"format": "pt"}
    )
    model = Model(str(folder))
    with pytest.raises(ModelError, match="is not the text tower of"):
        model.paired_text_encoder(model.clip()[0])


def test_a_missing_tokenizer_is_an_error_not_an_empty_one(folder: Path) -> None:
    for file in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / "tokenizer" / file).unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        Model(str(folder)).text_encoder()


@pytest.mark.parametrize(
    "scheduler",
    [None, ["diffusers", "NoSuchScheduler"], ["diffusers", "DiffusionPipeline"], ["diffusers", "AutoencoderKL"], "x"],
)
def test_a_strange_scheduler_is_named(folder: Path, scheduler: object) -> None:
    index = json.loads((folder / "model_index.json").read_text()) | {"scheduler": scheduler}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="no scheduler"):
        Model(str(folder)).painter()


@pytest.mark.skipif(not LAYOUTS.exists(), reason="the published layouts are not at hand")
@pytest.mark.parametrize("name", ["sd-1.5", "sd-2.1"])
def test_a_published_layout_with_random_weights_is_read_at_the_right_place(name: str, tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    target = tmp_path / name
    shutil.copytree(LAYOUTS / name, target)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(LAYOUTS / "sd-1.5" / "tokenizer" / file, target / "tokenizer" / file)
    config = CLIPTextConfig.from_pretrained(target / "text_encoder")
    config.num_hidden_layers = 2  # the published width, fewer blocks
    model = CLIPTextModel(config)
    state = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in model.state_dict().items()}
    save_file(
        {k: v.contiguous() for k, v in state.items()},
        target / "text_encoder" / "model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(target / "text_encoder")
    loaded = Model(str(target)).text_encoder()
    ids = loaded.tokenize(["a photo of a cat"])
    assert ids.shape == (1, 77)
    assert int(loaded.end_of_text(ids)[0]) == 6  # begin, five words, end
    with torch.no_grad():
        assert torch.allclose(loaded.hidden(ids), model.eval()(input_ids=ids).last_hidden_state, atol=1e-5)
