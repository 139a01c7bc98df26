"""Grids of pictures for the eye."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor


def to_pictures(images: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in about [-1, 1] -> 8-bit pictures."""
    pixels = images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def grid(pictures: Sequence[Image.Image], columns: int, scale: int = 1) -> Image.Image:
    """Pictures of one size in rows of `columns`, each enlarged `scale` times without smoothing."""
    width, height = (side * scale for side in pictures[0].size)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for number, picture in enumerate(pictures):
        place = (number % columns * (width + 2), number // columns * (height + 2))
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), place)
    return sheet
