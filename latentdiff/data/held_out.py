"""Held-out captions and their pictures, to measure on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.images import ImageTextSource, squares
from latentdiff.errors import InputError


class HeldOut(NamedTuple):
    """Captions, each another, and the picture of each."""

    captions: list[str]
    images: Tensor
    """uint8 [N, 3, H, W]."""


def first_pairs(source: ImageTextSource, count: int, side: int) -> HeldOut:
    """The first `count` readable pictures with a caption, as squares of `side` pixels.

    Of pictures with one caption only the first is taken: what is found for it would be right for
    either. Fewer where there are no more. Raises InputError when there are none.
    """
    found: dict[str, np.ndarray] = {}
    captions = ((row, source.caption(row)) for row in range(len(source)))
    rows = (row for row, caption in captions if caption and caption not in found)
    for row, square in squares(source, side, rows):
        found[source.caption(row)] = square
        if len(found) == count:
            break
    if not found:
        raise InputError("There is no readable picture with a caption among the held-out ones.")
    images = torch.from_numpy(np.stack(list(found.values())))
    return HeldOut(list(found), images.permute(0, 3, 1, 2))
