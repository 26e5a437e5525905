"""Save and load the drop-in folder: an erased text encoder that any Stable Diffusion pipeline takes.

<folder>/text_encoder/   config.json, model.safetensors with `text_model.*` keys, in the source's dtype
<folder>/tokenizer/      the source's own
<folder>/erasure.json    what was erased, how, from what, and what was measured
<folder>/README.md       a model card;  before-after.png when the erasure was verified
<folder>/clip/           the whole CLIP, when its image tower was erased as well
<folder>/whole.safetensors  what a closed form changed, at full strength, when it was asked for less
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from erase_diffusion.concepts import Concept
from erase_diffusion.errors import ConfigError, ModelError, OutputError
from erase_diffusion.models import Model, check_weights, from_pretrained, read_json, source_hash
from erase_diffusion.text_encoder import TextEncoder, weights_hash

if TYPE_CHECKING:
    from transformers import CLIPTextModel

SCHEMA_VERSION = 1
WHOLE, RESTORED = "whole.safetensors", "restored.json"


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raise OutputError now, not after the work, when `folder` could not be written later."""
    try:
        exists = folder.exists()
    except OSError as error:
        raise OutputError(f"{str(folder)[:80]}… cannot be a folder's name: {error.strerror}") from None
    if exists:
        if not folder.is_dir():
            raise OutputError(f"{folder} is a file; give a folder for --output")
        if not overwrite:
            raise OutputError(f"{folder} exists; pass --overwrite to replace it, or choose another --output")
        try:
            ours = any((folder / name).exists() for name in ("erasure.json", RESTORED))
            foreign = any(folder.iterdir()) and not ours
        except OSError as error:
            raise OutputError(f"{folder} cannot be read, so it cannot be replaced: {error.strerror}") from None
        if foreign:
            raise OutputError(f"{folder} is not an erasure (no erasure.json), so --overwrite will not replace it")
    parent = folder.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} is not writable, so {folder} cannot be made")


def save_drop_in(
    folder: Path,
    encoder: TextEncoder,
    record: dict[str, Any],
    card: str,
    picture: Image.Image | None,
    *,
    overwrite: bool,
    whole: Mapping[str, torch.Tensor] | None = None,
    clip: Sequence[Any] = (),
) -> None:
    """Write the whole folder into a temporary sibling, prove it by a strict reload, then rename it.

    whole: `Erasure.whole`.  clip: a CLIPModel, its tokenizer and its processor, to be saved whole.
    Raises OutputError when it cannot be written, leaving nothing half-written, and ModelError when the
    weights are not finite.
    """
    tower = {f"clip: {k}": v for k, v in clip[0].state_dict().items()} if clip else {}
    state = {**tower, **(whole or {}), **encoder.state_dict()}
    broken = [k for k, v in state.items() if not torch.isfinite(v).all()]
    if broken:
        raise ModelError(f"the erased encoder holds NaN or infinite values ({broken[0]}); nothing was saved")

    def write(temporary: Path) -> None:
        write_encoder(temporary, encoder)
        (temporary / "erasure.json").write_text(
            json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if picture is not None:
            picture.save(temporary / "before-after.png", optimize=True)
        try:
            for part in clip:
                part.save_pretrained(temporary / "clip")
            if whole:
                save_file(dict(whole), temporary / WHOLE, metadata={"format": "pt"})
        except Exception as error:  # as in `write_encoder`
            raise OSError(str(error)) from error

    write_folder(folder, write, overwrite=overwrite)


def write_folder(folder: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Let `write` fill a temporary sibling, then rename it to `folder`: it is there whole or not at all.

    Raises OutputError when it cannot be written, leaving nothing half-written.
    """
    check_output(folder, overwrite=overwrite)
    folder = folder.resolve()  # what a link points to is replaced, not the link
    temporary = None
    missing = [p for p in folder.parents if not p.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        write(temporary)
        temporary.chmod(0o755)
        if folder.exists():
            old = temporary.with_suffix(".old")
            os.rename(folder, old)
            try:
                os.rename(temporary, folder)
            except BaseException:
                os.rename(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, folder)
    except OSError as error:
        raise OutputError(
            f"{folder} could not be written: {error.strerror or error}; nothing was left behind"
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing if not folder.exists() else ():
            with contextlib.suppress(OSError):
                parent.rmdir()


def write_encoder(folder: Path, encoder: TextEncoder) -> None:
    """Write `text_encoder/` and `tokenizer/`, and prove the weights by reading them back. Raises OSError."""
    state = encoder.state_dict()
    target = folder / "text_encoder"
    target.mkdir()
    config = encoder.model.config.to_dict()
    config["architectures"] = ["CLIPTextModel"]
    # transformers loads in the dtype that a config names and diffusers in float32: the two must agree, whatever
    # the weights are stored in. transformers 4 reads `torch_dtype`, 5 reads either.
    config["torch_dtype"] = "float32"
    for private in ("dtype", "_name_or_path"):
        config.pop(private, None)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    try:
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        encoder.tokenizer.save_pretrained(folder / "tokenizer")
    except Exception as error:
        # safetensors and tokenizers report a full disk as errors of their own; to the caller it is one of writing.
        raise OSError(str(error)) from error
    vocab = encoder.tokenizer.get_vocab()
    # transformers 5 saves tokenizer.json alone; the slow tokenizers of other tools read these two.
    _write_vocabulary(folder / "tokenizer", encoder, vocab)
    reloaded = load_file(target / "model.safetensors")
    if weights_hash(reloaded) != weights_hash(state):
        raise OSError("the weights read back differ from those written")


def _write_vocabulary(folder: Path, encoder: TextEncoder, vocab: dict[str, int]) -> None:
    if (folder / "merges.txt").exists():
        return
    backend = json.loads(encoder.tokenizer.backend_tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in backend["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{m}\n" for m in merges), encoding="utf-8")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide a result, for records and reports."""
    found = {"python": platform.python_version()}
    for package in ("erase-diffusion", "torch", "transformers", "diffusers", "accelerate", "safetensors", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def read_record(folder: Path) -> dict[str, Any]:
    """The checked `erasure.json` of a drop-in folder.

    Raises ModelError when it is missing, broken or of another version.
    """
    path = folder / "erasure.json"
    record = read_json(path, "a drop-in encoder")
    if record.get("schema_version") != SCHEMA_VERSION:
        raise ModelError(
            f"{path} has schema version {record.get('schema_version')!r}, this program reads {SCHEMA_VERSION}"
        )
    return record


def recorded_concept(row: Any, folder: str | Path | None) -> Concept:
    """A concept as a record has it. Raises ModelError when it is none."""
    try:
        return Concept(row["name"], row["kind"], tuple(row["aliases"]), row["anchor"], row.get("within"))
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise ModelError(f"{folder}: its record names a concept that is none: {error}") from None


def check_source(folder: Path, record: Mapping[str, Any], base: Model) -> TextEncoder:
    """The text encoder of `base`, when it is the one that the erasure started from. Raises ModelError."""
    encoder = base.text_encoder()
    found, origin = source_hash(encoder), str(record["source"]["sha256"])
    if found != origin:
        raise ModelError(
            f"{folder} was erased from {record['source'].get('model')!r} (sha256 {origin[:12]}…), "
            f"the text encoder of {base.name!r} is another (sha256 {found[:12]}…)"
        )
    return encoder


def load_erased_text_encoder(
    folder: str | Path, *, base: str | Model | None = None, dtype: torch.dtype | None = None
) -> CLIPTextModel:
    """Load a drop-in's `CLIPTextModel`, checked.

    base: a model name, folder, hub id, or a `Model`; its text encoder must be the one that the erasure started from.
    dtype: what to load as; float32 if None, as diffusers does. A pipeline's components must share one.

    Raises ModelError when files are missing or damaged, when the weights are not those the record hashes, or
    when the base is another model.
    """
    from transformers import CLIPTextModel

    folder = Path(folder)
    record = read_record(folder)
    check_weights(folder / "text_encoder")
    weights = folder / "text_encoder" / "model.safetensors"
    if not weights.exists():
        raise ModelError(f"{weights} is missing")
    found = weights_hash(load_file(weights))
    try:
        expected, _ = record["erased"]["sha256"], record["source"]["sha256"]
    except (KeyError, TypeError):
        raise ModelError(f"{folder / 'erasure.json'} lacks the hashes of its weights") from None
    if found != expected:
        raise ModelError(f"{folder}: the weights are not the ones that erasure.json records (sha256 {found[:12]}…)")
    if base is not None:
        check_source(folder, record, Model(base) if isinstance(base, str) else base)
    model: CLIPTextModel = from_pretrained(CLIPTextModel, folder / "text_encoder", dtype=dtype or torch.float32)
    return model.eval()
