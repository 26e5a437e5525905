"""A user's own images: every bad entry is named by file and line, or skipped and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from erase_diffusion.errors import DataError
from erase_diffusion.imagefolder import read_image_folder


def make(folder: Path, lines: list[str], names: tuple[str, ...] = ("a.png", "b.png")) -> Path:
    folder.mkdir()
    for name in names:
        Image.new("RGB", (8, 8), "red").save(folder / name)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


GOOD = json.dumps({"file_name": "a.png", "text": "a cat"})


def test_reads_captions_and_images(tmp_path: Path) -> None:
    folder = make(tmp_path / "f", [GOOD, "", json.dumps({"file_name": "b.png", "text": "ein Kätzchen"})])
    read = read_image_folder(folder, default_caption="x")
    assert [c for c, _ in read.items] == ["a cat", "ein Kätzchen"]
    assert read.skipped == 0
    assert read.items[0][1].size == (8, 8)


def test_without_metadata_the_default_caption_stands(tmp_path: Path) -> None:
    folder = make(tmp_path / "f", [])
    (folder / "metadata.jsonl").unlink()
    assert [c for c, _ in read_image_folder(folder, default_caption="a cat").items] == ["a cat", "a cat"]


def test_captions_can_be_compulsory(tmp_path: Path) -> None:
    folder = make(tmp_path / "f", [])
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match="need captions"):
        read_image_folder(folder, default_caption=None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"metadata\.jsonl, line 2: no JSON"),
        ("[1, 2]", "line 2: an entry needs"),
        ("[" * 100_000, "line 2: no JSON"),
        ('{"file_name": ' + "1" * 5000 + "}", "line 2: no JSON"),
        ('{"file_name": "\\ud800.png", "text": "x"}', "line 2: .*leads out of the folder"),
        ('{"file_name": "b.png"}', "line 2: an entry needs"),
        ('{"file_name": "b.png", "text": "  "}', "line 2: an entry needs"),
        ('{"file_name": "../../etc/passwd", "text": "x"}', "leads out of the folder"),
        ('{"file_name": "gone.png", "text": "x"}', r"line 2: .*gone\.png is missing"),
    ],
)
def test_a_bad_line_is_named_or_skipped(tmp_path: Path, line: str, message: str) -> None:
    folder = make(tmp_path / "f", [GOOD, line])
    with pytest.raises(DataError, match=message):
        read_image_folder(folder, default_caption="x")
    read = read_image_folder(folder, default_caption="x", skip_bad=True)
    assert len(read.items) == 1
    assert read.skipped == 1


def test_a_line_that_is_not_utf8_is_named_and_the_rest_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "f", [])
    (folder / "metadata.jsonl").write_bytes(
        b"\xef\xbb\xbf" + GOOD.encode() + b'\n{"file_name": "b.png", "text": "\xff"}\n'
    )
    with pytest.raises(DataError, match="line 2: no JSON"):
        read_image_folder(folder, default_caption="x")
    read = read_image_folder(folder, default_caption="x", skip_bad=True)
    assert [c for c, _ in read.items] == ["a cat"]


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "f", [GOOD])
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"line 1: .*a\.png is no readable image"):
        read_image_folder(folder, default_caption="x")
    with pytest.raises(DataError, match="holds no usable image"):
        read_image_folder(folder, default_caption="x", skip_bad=True)


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no usable image"):
        read_image_folder(tmp_path / "empty", default_caption="x")
    with pytest.raises(DataError, match="is not a folder"):
        read_image_folder(tmp_path / "none", default_caption="x")
