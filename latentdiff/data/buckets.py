"""Aspect-ratio buckets: the few sizes that pictures are brought to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from pydantic import Field, model_validator

from latentdiff.config import Config


class SizesConfig(Config):
    """The sizes that pictures are brought to: scaled until they cover one, then cropped."""

    resolution: int = Field(gt=0, multiple_of=8)
    """Side in pixels of the square; no bucket has a larger area."""
    buckets: bool = False
    """Whether there are other shapes than the square."""
    step: int = Field(default=64, gt=0, multiple_of=8)
    """Sides of the other shapes are multiples of it, in pixels."""
    max_aspect: float = Field(default=2.0, ge=1)
    """The longer side over the shorter, at most."""

    @model_validator(mode="after")
    def _some(self) -> SizesConfig:
        if self.buckets and self.step > self.resolution:
            raise ValueError(f"step must be at most the resolution, {self.resolution}")
        return self

    def shapes(self) -> list[tuple[int, int]]:
        """The buckets, (width, height) in pixels; a bucket's number is its place."""
        if not self.buckets:
            return [(self.resolution, self.resolution)]
        return make_buckets(self.resolution, self.step, self.max_aspect)


def make_buckets(resolution: int, step: int = 64, max_aspect: float = 2.0) -> list[tuple[int, int]]:
    """Every (width, height) of as large an area as fits into that of the square.

    For each side that is a multiple of `step`, the longest other one (NovelAI 2022, "Aspect ratio
    bucketing"; SDXL's are such, Podell et al. 2023, appendix I). From narrow to wide.
    """
    found = {(resolution, resolution)}
    for side in range(step, int(resolution * max_aspect) + 1, step):
        other = resolution**2 // side // step * step
        if other and max(side, other) <= max_aspect * min(side, other):
            found |= {(side, other), (other, side)}
    return sorted(found, key=lambda shape: (shape[0] / shape[1], shape))


def assign(width: ArrayLike, height: ArrayLike, shapes: Sequence[tuple[int, int]]) -> np.ndarray:
    """The number of the bucket nearest in log aspect for each picture; the larger one of two.

    width, height: pixels, [...] -> int64 [...].
    """
    sides = np.array(shapes, dtype=np.float64)
    by_area = np.argsort(-sides.prod(axis=1), kind="stable")
    aspects = np.log(sides[by_area, 0] / sides[by_area, 1])
    aspect = np.log(np.asarray(width, dtype=np.float64) / np.asarray(height, dtype=np.float64))
    return by_area[np.abs(aspect[..., None] - aspects).argmin(axis=-1)]


def fit(
    image: Image.Image,
    shape: tuple[int, int],
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> tuple[Image.Image, int, int]:
    """(picture of `shape`, top, left): scaled to cover it, its middle cut out.

    top, left: where the cut begins, in pixels of the scaled picture. resample: Pillow's filter.
    Only the cut is computed, however long the picture is.
    """
    (width, height), (w, h) = image.size, shape
    scale = max(w / width, h / height)
    covering = max(w, round(width * scale)), max(h, round(height * scale))
    left, top = (covering[0] - w) // 2, (covering[1] - h) // 2
    x, y = width / covering[0], height / covering[1]
    box = (left * x, top * y, min((left + w) * x, width), min((top + h) * y, height))
    return image.resize(shape, resample, box), top, left


def size_conditioning(
    size: tuple[int, int], top: int, left: int, shape: tuple[int, int]
) -> tuple[int, int, int, int, int, int]:
    """SDXL's six numbers: original height and width, crop's top and left, target height and width.

    size, shape: (width, height) of the picture as it was and as it is now (Podell et al. 2023,
    section 2.2).
    """
    return size[1], size[0], top, left, shape[1], shape[0]
