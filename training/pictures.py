"""Grids of pictures for the eye."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image


def grid(pictures: Sequence[Image.Image], columns: int, scale: int = 1) -> Image.Image:
    """Pictures of one size in rows of `columns`, each enlarged `scale` times without smoothing."""
    width, height = (side * scale for side in pictures[0].size)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for number, picture in enumerate(pictures):
        place = (number % columns * (width + 2), number // columns * (height + 2))
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), place)
    return sheet
