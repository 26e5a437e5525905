"""Read a list of concepts from a CSV file, checked row by row."""

from __future__ import annotations

import csv
from pathlib import Path

from erase_diffusion.concepts import Concept, normalise
from erase_diffusion.errors import ConfigError, DataError

COLUMNS = ("concept", "kind", "alias", "anchor", "within")
MAX_ROWS = 10_000


def read_concepts(path: Path, *, kind: str | None = None) -> tuple[Concept, ...]:
    """The concepts of a CSV file with the column `concept`, and any of `kind`, `alias` (several parted by |), `anchor`
    and `within`; an empty cell is a value not given, and `kind` what a row without one has (else object, or attribute
    for a look within a thing).

    Raises DataError, with file and line, for a file that cannot be read, a header without `concept` or with other
    columns, a row of another length, a concept that is none, and one that is there twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a UTF-8 text file: {error}") from None
    rows = csv.reader(text.splitlines())
    found: dict[tuple[str, str, str], tuple[int, Concept]] = {}
    try:
        header = [h.strip().lower() for h in next(rows, [])]
        unknown = [h for h in header if h not in COLUMNS]
        if "concept" not in header or unknown or len(set(header)) != len(header):
            raise DataError(
                f"{path}, line 1: the header must name the column concept, and may name {', '.join(COLUMNS[1:])}; "
                f"got {', '.join(header)[:80] or 'nothing'}"
            )
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(header):
                raise DataError(f"{where}: {len(row)} cells, the header has {len(header)}")
            cells = dict(zip(header, (cell.strip() for cell in row), strict=True))
            aliases = tuple(a.strip() for a in cells.get("alias", "").split("|") if a.strip())
            try:
                concept = Concept(
                    cells["concept"],
                    # Checked by Concept.
                    cells.get("kind") or kind or ("attribute" if cells.get("within") else "object"),  # type: ignore[arg-type]
                    aliases,
                    cells.get("anchor") or None,
                    cells.get("within") or None,
                )
            except ConfigError as error:
                raise DataError(f"{where}: {error}") from None
            key = (normalise(concept.name), concept.kind, normalise(concept.within or ""))
            if key in found:
                raise DataError(f"{where}: {concept.name!r} is there already, on line {found[key][0]}")
            found[key] = (rows.line_num, concept)
            if len(found) > MAX_ROWS:
                raise DataError(f"{where}: more than {MAX_ROWS} concepts")
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: {error}") from None
    if not found:
        raise DataError(f"{path} names no concept")
    return tuple(concept for _, concept in found.values())
