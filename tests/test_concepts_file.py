"""Lists of concepts: what is read, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from erase_diffusion.concepts_file import read_concepts
from erase_diffusion.errors import DataError


def write(folder: Path, text: str) -> Path:
    path = folder / "concepts.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_list_with_every_column(tmp_path: Path) -> None:
    path = write(tmp_path, "concept,kind,alias,anchor,within\ncat,,kitten|kitty,dog,\n\nred,attribute,,,car\n")
    cat, red = read_concepts(path)
    assert (cat.name, cat.kind, cat.aliases, cat.anchor, cat.within) == (
        "cat",
        "object",
        ("kitten", "kitty"),
        "dog",
        None,
    )
    assert (red.name, red.kind, red.within) == ("red", "attribute", "car")


def test_a_plain_list_takes_the_kind_that_is_given(tmp_path: Path) -> None:
    assert [c.kind for c in read_concepts(write(tmp_path, "concept\ncrayon\nblueprint\n"), kind="style")] == [
        "style"
    ] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the header must name the column concept"),
        ("name\ncat\n", "line 1: .*got name"),
        ("concept,colour\ncat,red\n", "line 1: .*got concept, colour"),
        ("concept,kind\ncat\n", "line 2: 1 cells, the header has 2"),
        ("concept,kind\ncat,animal\n", "line 2: kind must be one of .* got 'animal'"),
        ("concept\ncat\n\n  CAT \n", "line 4: 'CAT' is there already, on line 2"),
        ("concept\n" + "x" * 61 + "\n", "line 2: .*61 characters"),
        ("concept,anchor\ncat,cat\n", "line 2: the anchor 'cat' is the concept itself"),
        ("concept\n\n", "names no concept"),
    ],
)
def test_bad_lists_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_concepts(write(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "concepts.csv"
    path.write_bytes(b"\xff\xfe\x00concept")
    with pytest.raises(DataError, match="cannot be read"):
        read_concepts(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_concepts(tmp_path / "none.csv")
