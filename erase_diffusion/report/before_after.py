"""The before/after picture: original over erased, each pair from the same noise."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Pair = tuple[str, str, np.ndarray, np.ndarray]


def before_after(pairs: Sequence[Pair], *, title: str, tile: int = 128, columns: int = 7) -> Image.Image:
    """Lay out (group, prompt, before, after) pairs, `columns` a row; images are uint8 (h, w, 3)."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    margin, gap, text, label = 14, 8, 58, 74
    columns = min(columns, max(1, len(pairs)))
    rows = -(-len(pairs) // columns)
    row_height = 2 * tile + 4 + text
    width = label + columns * (tile + gap) + margin
    canvas = Image.new("RGB", (width, 44 + rows * (row_height + gap) + margin), (252, 252, 253))
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, 13), title, fill=(25, 25, 30), font=font)
    for i, (group, prompt, before, after) in enumerate(pairs):
        x = label + (i % columns) * (tile + gap)
        y = 44 + (i // columns) * (row_height + gap)
        if i % columns == 0:
            draw.text((margin, y + tile // 2 - 6), "original", fill=(90, 90, 100), font=small)
            draw.text((margin, y + tile + 4 + tile // 2 - 6), "erased", fill=(90, 90, 100), font=small)
        for j, pixels in enumerate((before, after)):
            picture = Image.fromarray(pixels).resize((tile, tile), Image.Resampling.LANCZOS)
            canvas.paste(picture, (x, y + j * (tile + 4)))
        draw.text(
            (x, y + 2 * tile + 8), group, fill=(150, 60, 20) if group != "preserved" else (30, 110, 60), font=small
        )
        for k, line in enumerate(textwrap.wrap(prompt, 22)[:3]):
            draw.text((x, y + 2 * tile + 21 + 12 * k), line, fill=(60, 60, 70), font=small)
    return canvas
