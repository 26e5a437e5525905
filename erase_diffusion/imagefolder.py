"""Read a user's own images in the Hugging Face imagefolder layout, checked file by file and line by line."""

from __future__ import annotations

import codecs
import json
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from erase_diffusion.errors import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class ImageFolder:
    """Captioned images and how many entries were skipped as bad."""

    items: tuple[tuple[str, Image.Image], ...]
    skipped: int


def read_image_folder(folder: Path, *, default_caption: str | None, skip_bad: bool = False) -> ImageFolder:
    """Images of `folder` with the captions (`text`) of its `metadata.jsonl`; without that file, `default_caption`.

    default_caption: None makes the captions compulsory.

    Raises DataError, with file and line, for a missing or empty folder, a line that is no JSON object with
    `file_name` and `text`, a name that leaves the folder, and an image that can't be decoded; with `skip_bad`
    bad entries are counted instead, and it is an error only when none is left.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of images")
    items: list[tuple[str, Image.Image]] = []
    problems: list[str] = []
    for where, name, caption, problem in _entries(folder, default_caption):
        if problem is None:
            try:
                with Image.open(folder / name) as image:
                    items.append((caption, image.convert("RGB")))
                continue
            except FileNotFoundError:
                problem = f"{folder / name} is missing"
            except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                problem = f"{folder / name} is no readable image: {error}"
        if not skip_bad:
            raise DataError(f"{where}{problem}; mend it, or pass --skip-bad to go on without")
        problems.append(problem)
    if not items:
        raise DataError(
            f"{folder} holds no usable image"
            + (f" ({len(problems)} bad, the first: {problems[0]})" if problems else "")
        )
    return ImageFolder(tuple(items), len(problems))


def _inside(folder: Path, name: str) -> bool:
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # a NUL, half a surrogate pair, links in a circle, a name too long
        return False


def _entries(folder: Path, default_caption: str | None) -> list[tuple[str, str, str, str | None]]:
    """(where, file name, caption, problem) of every entry."""
    metadata = folder / "metadata.jsonl"
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DataError(f"{folder} cannot be read")
    if not metadata.exists():
        if default_caption is None:
            raise DataError(f"{metadata} is missing: these images need captions, one JSON line each")
        names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        return [("", name, default_caption, None) for name in names]
    try:
        lines = metadata.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise DataError(f"{metadata} cannot be read: {error}") from error
    entries: list[tuple[str, str, str, str | None]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{metadata}, line {number}: "
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            # Not UTF-8, no JSON, a number of thousands of digits, or brackets nested without end.
            entries.append((where, "", "", f"no JSON ({str(error)[:80]})"))
            continue
        name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
            entries.append((where, "", "", "an entry needs 'file_name' and a non-empty 'text'"))
        elif not _inside(folder, name):
            entries.append((where, "", "", f"{name!r} leads out of the folder"))
        else:
            entries.append((where, name, text, None))
    return entries
