"""Read the prompts of an audit from a file of the field's columns, checked row by row with the line number."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from erase_diffusion.errors import DataError

MAX_LINE = 100_000  # characters; a prompt is a sentence
MAX_PROMPTS = 1_000_000
MAX_SEED = 2**64 - 1

# What the field calls the same thing: I2P's and Hugging Face's names beside those of ESD, UCE and UnlearnDiffAtk.
NAMES = {
    "case": ("case_number", "case", "id"),
    "prompt": ("prompt", "text", "caption"),
    "seed": ("evaluation_seed", "seed", "sd_seed"),
    "guidance": ("evaluation_guidance", "guidance", "guidance_scale", "sd_guidance_scale"),
    "label": ("class", "label"),
    "artist": ("artist",),
}


@dataclass(frozen=True)
class CasePrompt:
    """One prompt of an audit.

    case: its number or name in the file.  seed: of its initial noise.  guidance: its own, or None for the audit's.
    label, artist: what it is a prompt of (`class`) and in whose style, where the file says it.
    other: further columns, as text.
    """

    case: str
    text: str
    seed: int
    guidance: float | None = None
    label: str | None = None
    artist: str | None = None
    other: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, and how many of them had no seed of their own."""

    prompts: tuple[CasePrompt, ...]
    unseeded: int


def read_prompts(path: Path, *, seed: int = 0) -> PromptFile:
    """Prompts of a `.csv` (`case_number, prompt, evaluation_seed`, optional `class`, `artist`, `evaluation_guidance`),
    a `.jsonl` (an object a line, the same names) or a text file (a prompt a line).

    seed: from it and the case comes the seed of a prompt that has none. Other columns are carried along.

    Raises DataError, with file and line, for a file that cannot be read, is not UTF-8 (UTF-16 with its mark is read
    too), or holds NUL bytes or a line over 100,000 characters; a header without `prompt` or with a name twice; a row
    of another length; an empty prompt; a case number that is there twice; a seed outside 64 bits; a guidance that is
    no number of at least 0.
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".jsonl", ".json", ".txt"):
        raise DataError(f"{path}: prompts are read from .csv, .jsonl and .txt files")
    lines = _Lines(path)
    rows = _csv_rows(lines) if kind == ".csv" else _json_rows(lines) if kind in (".jsonl", ".json") else _text(lines)
    prompts: list[CasePrompt] = []
    seen: dict[str, int] = {}
    unseeded = 0
    for number, row in rows:
        where = f"{path}, line {number}"
        one, had_seed = _case(row, where, str(len(prompts)), seed)
        if one.case in seen:
            raise DataError(f"{where}: case number {one.case!r} is there already, on line {seen[one.case]}")
        seen[one.case] = number
        unseeded += not had_seed
        prompts.append(one)
        if len(prompts) > MAX_PROMPTS:
            raise DataError(f"{where}: more than {MAX_PROMPTS} prompts; split the file")
    if not prompts:
        raise DataError(f"{path} holds no prompt")
    return PromptFile(tuple(prompts), unseeded)


def derived_seed(seed: int, case: str) -> int:
    """The seed of a prompt that has none: the same for the same case, whatever stands around it."""
    return int.from_bytes(hashlib.sha256(f"audit {seed} {case}".encode()).digest()[:7], "big")


class _Lines:
    """The decoded lines of a file, one at a time, each checked; `number` is that of the last."""

    def __init__(self, path: Path):
        self.path, self.number = path, 0

    def __iter__(self) -> Iterator[str]:
        try:
            with self.path.open("rb") as file:
                mark = file.read(4)
                utf16 = mark.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
                file.seek(len(codecs.BOM_UTF8) if mark.startswith(codecs.BOM_UTF8) else 0)
                yield from self._decoded_utf16() if utf16 else self._decoded(file)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from None

    def _decoded(self, file: Any) -> Iterator[str]:
        while line := file.readline(4 * MAX_LINE + 1):
            self.number += 1
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                # A line that was cut at the limit may end within a character; it is too long in any case.
                if len(line) <= 4 * MAX_LINE:
                    raise DataError(
                        f"{self.path}, line {self.number}: byte {error.start + 1} ({line[error.start]:#04x}) is not "
                        "UTF-8; save the file as UTF-8"
                    ) from None
                text = line.decode("utf-8", "replace")
            yield self._checked(text)

    def _decoded_utf16(self) -> Iterator[str]:
        with self.path.open(encoding="utf-16", newline="") as file:
            try:
                while line := file.readline(MAX_LINE + 1):
                    self.number += 1
                    yield self._checked(line)
            except UnicodeError:
                raise DataError(f"{self.path}, line {self.number + 1}: not UTF-16, though it begins so") from None

    def _checked(self, text: str) -> str:
        if "\0" in text:
            raise DataError(f"{self.path}, line {self.number}: holds a NUL byte; this is no text file")
        if len(text) > MAX_LINE:
            raise DataError(f"{self.path}, line {self.number}: longer than {MAX_LINE} characters")
        return text


def _csv_rows(lines: _Lines) -> Iterator[tuple[int, dict[str, str]]]:
    rows = csv.reader(iter(lines), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for row in rows:
            where, start = start, rows.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = [name.strip() for name in row]
                lower = [name.lower() for name in header]
                twice = {name for name in lower if lower.count(name) > 1}
                if twice or not set(lower) & set(NAMES["prompt"]):
                    fault = f"names {sorted(twice)[0]!r} twice" if twice else "has no column prompt"
                    raise DataError(f"{lines.path}, line {where}: the header {fault}; got {', '.join(header)[:120]}")
                continue
            if len(row) != len(header):
                hint = "; a prompt with a comma needs quotes" if len(row) > len(header) else ""
                raise DataError(f"{lines.path}, line {where}: {len(row)} cells, the header has {len(header)}{hint}")
            yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{lines.path}, line {rows.line_num or 1}: {error}") from None


def _json_rows(lines: _Lines) -> Iterator[tuple[int, dict[str, str]]]:
    for line in lines:
        if not line.strip():
            continue
        where = f"{lines.path}, line {lines.number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: no JSON object on a line of its own ({str(error)[:80]})") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: must be an object with a prompt, it is a {type(row).__name__}")
        if any(n in row and not isinstance(row[n], str) for n in NAMES["prompt"]):
            raise DataError(f"{where}: the prompt must be text")
        yield (
            lines.number,
            {
                str(k): v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)
                for k, v in row.items()
                if v is not None
            },
        )


def _text(lines: _Lines) -> Iterator[tuple[int, dict[str, str]]]:
    for line in lines:
        if line.strip():
            yield lines.number, {"prompt": line}


def _case(row: Mapping[str, str], where: str, fallback: str, seed: int) -> tuple[CasePrompt, bool]:
    """The checked prompt of a row, and whether it brought a seed."""
    for name, value in row.items():
        try:
            f"{name}{value}".encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: {name!r} holds half of a surrogate pair, which is no text") from None
    lower = {name.lower(): name for name in row}
    taken = {f: next((lower[n] for n in names if n in lower), None) for f, names in NAMES.items()}
    found = {f: row[name].strip() for f, name in taken.items() if name is not None}
    other = {name: value for name, value in row.items() if name not in taken.values()}
    text = found.get("prompt", "")
    if not text:
        raise DataError(f"{where}: the prompt is {'empty' if 'prompt' in found else 'missing'}")
    case = found.get("case") or fallback
    if len(case) > 200:
        raise DataError(f"{where}: a case number of {len(case)} characters, at most 200 are allowed")
    given, guidance = found.get("seed", ""), found.get("guidance", "")
    one = CasePrompt(
        case,
        text,
        _seed(given, where) if given else derived_seed(seed, case),
        _guidance(guidance, where) if guidance else None,
        found.get("label") or None,
        found.get("artist") or None,
        other,
    )
    return one, bool(given)


def _seed(text: str, where: str) -> int:
    # A column with a gap in it comes out of pandas as 1174.0.
    digits = text.removesuffix(".0")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 20 or int(digits) > MAX_SEED:
        raise DataError(f"{where}: the seed must be a whole number from 0 to 2^64 − 1, got {text[:40]!r}")
    return int(digits)


def _guidance(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise DataError(f"{where}: the guidance must be a number from 0 to 100, got {text[:40]!r}")
    return value
