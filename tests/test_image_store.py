"""Images by content: whole or not there, with how they were made inside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erase_diffusion.errors import OutputError
from erase_diffusion.image_store import CHUNK, ImageStore, image_key

PICTURE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
MADE = {"prompt": "../../etc <script>", "seed": 3, "steps": 12}


def test_an_image_comes_back_with_how_it_was_made(tmp_path: Path) -> None:
    store, key = ImageStore(tmp_path), image_key(MADE)
    sha = store.write(key, PICTURE, MADE)
    assert np.array_equal(store.read(key, sha), PICTURE)
    with Image.open(store.path(key)) as image:
        assert json.loads(image.info[CHUNK]) == {"key": key, **MADE}
    assert [p.name for p in tmp_path.rglob("*.tmp")] == []


def test_everything_that_makes_an_image_is_in_its_key() -> None:
    keys = {image_key(MADE | change) for change in ({}, {"seed": 4}, {"prompt": "a cat"}, {"steps": 13})}
    assert len(keys) == 4
    assert image_key(dict(reversed(MADE.items()))) == image_key(MADE)
    image_key({"prompt": "half a pair \ud800"})


@pytest.mark.parametrize("damage", ["gone", "cut", "other picture", "no picture", "other key"])
def test_a_damaged_image_is_none(tmp_path: Path, damage: str) -> None:
    store, key = ImageStore(tmp_path), image_key(MADE)
    sha = store.write(key, PICTURE, MADE)
    path = store.path(key)
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "no picture":
        path.write_bytes(b"x")
    elif damage == "other key":
        store.write(image_key({}), PICTURE, {})
        path.write_bytes(store.path(image_key({})).read_bytes())
    else:
        store.write(key, 255 - PICTURE, MADE)
    assert store.read(key, sha) is None


def test_images_are_taken_from_another_store(tmp_path: Path) -> None:
    one, other, key = ImageStore(tmp_path / "one"), ImageStore(tmp_path / "other"), image_key(MADE)
    assert one.take(key, other) is None
    sha = other.write(key, PICTURE, MADE)
    assert one.take(key, other) == sha
    other.path(key).unlink()
    assert np.array_equal(one.read(key, sha), PICTURE)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    store = ImageStore(tmp_path)
    with pytest.raises(OutputError, match=r"No space left.*what is done is kept"):
        store.write(image_key(MADE), PICTURE, MADE)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
