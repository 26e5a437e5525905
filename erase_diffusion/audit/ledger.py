"""Append-only files of JSON lines: what one batch has done is there after any kill, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from erase_diffusion.image_store import writing


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


def read(path: Path, fields: Iterable[str]) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file that are whole and have all `fields`, and how many lines are not; a missing file has none."""
    rows: list[dict[str, Any]] = []
    bad, wanted = 0, set(fields)
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and wanted <= row.keys():
            rows.append(row)
        else:
            bad += 1
    return rows, bad


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
    return folder / f"{name}.rank-{rank:05d}.jsonl"


def read_all(folder: Path, name: str, fields: Iterable[str]) -> tuple[list[dict[str, Any]], int]:
    """The rows of all shards, and how many lines were bad."""
    parts = [read(path, fields) for path in shards(folder, name)]
    return [row for rows, _ in parts for row in rows], sum(bad for _, bad in parts)


def merge(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write `rows` as `name.jsonl` and take the shards away. Raises OutputError."""
    replace_with(folder / f"{name}.jsonl", rows)
    for path in shards(folder, name)[1:]:
        path.unlink(missing_ok=True)
