"""Take an erasure back, bit for bit, or change how strong it is, without doing its work again."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from erase_diffusion.artifact import (
    RESTORED,
    WHOLE,
    check_source,
    load_erased_text_encoder,
    read_record,
    save_drop_in,
    write_encoder,
    write_folder,
)
from erase_diffusion.erasers.base import blend, check_strength
from erase_diffusion.errors import ConfigError, ModelError
from erase_diffusion.models import Model, source_hash
from erase_diffusion.report.model_card import model_card
from erase_diffusion.text_encoder import TextEncoder, weights_hash

CLOSED_FORMS = ("nullspace", "multimodal-nullspace", "token-swap")


@dataclass(frozen=True)
class Restored:
    """An encoder that was restored, or given another strength.

    record: of the erasure at its new strength; None for the original.
    """

    encoder: TextEncoder
    record: dict[str, Any] | None
    whole: dict[str, torch.Tensor]

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a folder with the encoder and its tokenizer, for the original without a record. Raises OutputError."""
        path = Path(folder)
        if self.record is None:
            write_folder(path, self._write_original, overwrite=overwrite)
        else:
            save_drop_in(
                path, self.encoder, self.record, model_card(self.record), None, overwrite=overwrite, whole=self.whole
            )
        return path

    def _write_original(self, folder: Path) -> None:
        write_encoder(folder, self.encoder)
        (folder / RESTORED).write_text(json.dumps({"sha256": source_hash(self.encoder)}) + "\n")


def restore(folder: str | Path, *, strength: float = 0.0, model: str | None = None) -> Restored:
    """The original text encoder of a drop-in, or at a strength over 0 the drop-in at that strength.

    strength: 0 gives back the original; closed forms take any other, a blend of the original and what the method gave
    at full strength.
    model: where the original lies, when it is no longer where the record says.

    Raises ModelError when the drop-in is damaged or the model is not the one that it was made from, and ConfigError for
    a strength that cannot be had without doing the work again.
    """
    check_strength(strength)
    folder = Path(folder)
    record = read_record(folder)
    erased = load_erased_text_encoder(folder)
    source = model or str(record["source"].get("model"))
    original = check_source(folder, record, Model(source))
    if strength == 0.0:
        return Restored(original, None, {})
    method, parameters = str(record.get("method")), record.get("parameters")
    if method not in CLOSED_FORMS:
        raise ConfigError(
            f"{folder} was made by {method}, which trains: only a closed form ({', '.join(CLOSED_FORMS)}) can be given "
            f"another strength afterwards; run erase-concept with --strength {strength}"
        )
    if record.get("earlier"):
        raise ConfigError(
            f"{folder} was erased from an encoder that had been erased before: its strength cannot be changed alone"
        )
    if not isinstance(parameters, dict) or not isinstance(parameters.get("strength"), int | float):
        raise ModelError(f"{folder / 'erasure.json'} does not say the strength")
    whole = replace(original, model=erased).state_dict()
    if parameters["strength"] != 1.0:
        whole |= _whole(folder, original, record["erased"].get("whole_sha256"))
    blended = original.copy()
    before = original.state_dict()
    mixed = {k: v.to(original.dtype) for k, v in blend(_float(before), _float(whole), strength).items()}
    target = blended.model.state_dict()
    blended.model.load_state_dict(
        {k: mixed[name] if (name := _published(k)) in mixed else v for k, v in target.items()}
    )
    changed = {k: v for k, v in whole.items() if not torch.equal(v, before[k])} if strength != 1.0 else {}
    made = record | {
        "parameters": parameters | {"strength": strength},
        "erased": record["erased"]
        | {"sha256": source_hash(blended), "whole_sha256": weights_hash(changed) if changed else None},
        "restored_from": {"sha256": record["erased"]["sha256"], "strength": parameters["strength"]},
        # What was measured was measured at another strength.
        "verification": [],
    }
    return Restored(blended, json.loads(json.dumps(made)), changed)


def _whole(folder: Path, original: TextEncoder, expected: Any) -> dict[str, torch.Tensor]:
    """The checked tensors that a closed form gave at full strength."""
    path = folder / WHOLE
    if not path.exists():
        raise ModelError(f"{path} is missing: without it the full strength is not known")
    known = original.state_dict()
    try:
        whole: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}") from None
    if weights_hash(whole) != expected:
        raise ModelError(f"{path}: the weights are not the ones that erasure.json records")
    for name, tensor in whole.items():
        if name not in known or tensor.shape != known[name].shape or not torch.isfinite(tensor).all():
            raise ModelError(f"{path}: {name} does not belong to this text encoder, or is not finite")
    return whole


def _float(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.float() for k, v in state.items()}


def _published(key: str) -> str:
    """A parameter's name as `TextEncoder.state_dict` has it."""
    return key if key.startswith("text_model.") else f"text_model.{key}"
