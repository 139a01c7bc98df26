"""Feature vectors of pictures: what the Frechet distance and its kin compare.

An extractor's digest stands for all of its configuration: figures of extractors whose digests
differ do not compare, and where its weights lie on a disk plays no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol, TypeAlias, runtime_checkable

import numpy as np
from pydantic import Field
from torch import Tensor

from latentdiff.metrics.clip_features import (
    ClipConfig,
    ClipExtractor,
    OpenClipConfig,
    OpenClipExtractor,
)
from latentdiff.metrics.inception import InceptionConfig, InceptionExtractor


class Extractor(Protocol):
    """A function from pictures to vectors."""

    name: str
    """What its features and figures are called; a file name."""
    digest: str
    """sha256 of weights, architecture and preprocessing."""
    dimensions: int
    """D."""

    def __call__(self, images: Tensor) -> np.ndarray:
        """float32 [B, D] of pictures uint8 [B, 3, H, W] of any size, all in one batch."""


@runtime_checkable
class TextExtractor(Extractor, Protocol):
    """An extractor with a second one that maps captions into the same space: a CLIP."""

    def text(self, captions: Sequence[str]) -> np.ndarray:
        """float32 [B, D] of captions, all in one batch."""


FeatureConfig: TypeAlias = Annotated[
    InceptionConfig | ClipConfig | OpenClipConfig, Field(discriminator="type")
]
"""Which features: {type: inception}, {type: clip} or {type: open_clip} and its other fields."""


def open_extractor(config: FeatureConfig, device: str = "cpu") -> Extractor:
    """The extractor that is configured, with its network on `device`, in float32.

    Raises InputError when its weights or its library are not here.
    """
    if isinstance(config, InceptionConfig):
        return InceptionExtractor(config, device)
    if isinstance(config, ClipConfig):
        return ClipExtractor(config, device)
    return OpenClipExtractor(config, device)
