"""Append-only files of JSON lines: what one batch has done is there after any kill, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from erase_diffusion.image_store import writing

Row = dict[str, Any]


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows in one write and put them on the disk. Raises OutputError when that fails."""
    data = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a kill in the middle of a line: that line is lost, the next must not be
                    data = "\n" + data
            file.write(data.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Place:
    """Where a line stands: rows are read one at a time, and moved as the bytes they are."""

    path: Path
    start: int
    length: int


def scan(folder: Path, name: str, fields: Iterable[str], bad: list[Place] | None = None) -> Iterator[tuple[Row, Place]]:
    """The whole rows of all shards of `name.jsonl` that have all `fields`, one at a time, each with its place.

    bad: takes the places of lines that are none. A file that is missing has no rows.
    """
    wanted = set(fields)
    for path in shards(folder, name):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue
        with file:
            start = 0
            for line in file:
                place = Place(path, start, len(line))
                start += len(line)
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict) and wanted <= row.keys():
                    yield row, place
                elif bad is not None:
                    bad.append(place)


def replace_with(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as the whole file, at once. Raises OutputError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def shards(folder: Path, name: str) -> list[Path]:
    """The files in which processes wrote rows of `name.jsonl`, and that file itself first."""
    return [folder / f"{name}.jsonl", *sorted(folder.glob(f"{name}.rank-*.jsonl"))]


def shard(folder: Path, name: str, rank: int) -> Path:
    """The file in which one process writes rows of `name.jsonl`."""
    return folder / f"{name}.rank-{rank:05d}.jsonl"


def consolidate(folder: Path, name: str, fields: Iterable[str], key: Callable[[Row], Any]) -> int:
    """Merge what interrupted processes left into `name.jsonl`, of each key the last line; returns how many were bad.

    Raises OutputError.
    """
    bad: list[Place] = []
    places = {key(row): place for row, place in scan(folder, name, fields, bad)}
    if bad or any(path.exists() for path in shards(folder, name)[1:]):
        merge(folder, name, places.values())
    return len(bad)


def merge(folder: Path, name: str, places: Iterable[Place]) -> None:
    """Write the lines at `places` as `name.jsonl`, at once, and take the shards away. Raises OutputError."""
    path = folder / f"{name}.jsonl"
    with contextlib.ExitStack() as stack, writing(path):
        files: dict[Path, BinaryIO] = {}
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as merged:
            for place in places:
                file = files.get(place.path) or stack.enter_context(place.path.open("rb"))
                files[place.path] = file
                file.seek(place.start)
                merged.write(file.read(place.length).rstrip(b"\n") + b"\n")
            merged.flush()
            os.fsync(merged.fileno())
        os.replace(temporary, path)
    for other in shards(folder, name)[1:]:
        other.unlink(missing_ok=True)
