"""Images by the key of everything that made them, as PNG files that carry that within them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from erase_diffusion.errors import OutputError

CHUNK = "erase-diffusion"  # the PNG text chunk that holds how the image was made


def image_key(made: Mapping[str, Any]) -> str:
    """The SHA-256 of what makes an image: model, encoder, prompt, seed, steps, guidance, scheduler, size, dtype."""
    return hashlib.sha256(json.dumps(made, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()


@dataclass(frozen=True)
class ImageStore:
    """A folder of images, `ab/abcd….png`. No part of a name comes from outside."""

    folder: Path

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.png"

    def write(self, key: str, image: np.ndarray, made: Mapping[str, Any]) -> str:
        """Save a uint8 (h, w, 3) image whole or not at all; returns the SHA-256 of the file.

        Raises OutputError when it can't be written.
        """
        info = PngImagePlugin.PngInfo()
        info.add_itxt(CHUNK, json.dumps({"key": key, **made}, sort_keys=True, ensure_ascii=False))
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG", pnginfo=info)
        path = self.path(key)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            try:
                temporary.write_bytes(buffer.getvalue())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return hashlib.sha256(buffer.getvalue()).hexdigest()

    def read(self, key: str, sha256: str | None = None) -> np.ndarray | None:
        """The image, uint8 (h, w, 3), or None when there is none that is whole, of this key and, if given, hash."""
        try:
            data = self.path(key).read_bytes()
            if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
                return None
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                image.load()
                if json.loads(image.info.get(CHUNK, "{}")).get("key") != key:
                    return None
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, RecursionError, UnidentifiedImageError, Image.DecompressionBombError):
            return None

    def take(self, key: str, other: ImageStore) -> str | None:
        """Bring an image over from another store by a link, or a copy where none can be made; returns its SHA-256.

        None when the other has no whole one. Raises OutputError when it can't be written.
        """
        if other.read(key) is None:
            return None
        path = self.path(key)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            try:
                try:
                    os.link(other.path(key), temporary)
                except OSError:
                    shutil.copyfile(other.path(key), temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def writing(path: Path) -> Any:
    """Turn a failed write (a full disk, a folder that is read-only) into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path} could not be written: {error.strerror or error}; mend that and start again: what is done is kept"
        ) from error
