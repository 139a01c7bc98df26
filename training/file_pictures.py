"""Pictures of files as training.clip and training.autoencoder learn from them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from latentdiff.config import Config
from latentdiff.data.buckets import fit
from latentdiff.data.images import ImageTextSource, SourceConfig, open_source
from latentdiff.data.order import Plan, Share, substitute
from latentdiff.rng import keyed_uniform
from training.config import RunConfig
from training.data import MicroBatch, StepDataset, StepOrder, loader, planned_orders


class PicturesConfig(Config):
    """Pictures of files, one size, cut and mirrored anew in each epoch."""

    source: SourceConfig
    """What is learned from."""
    held_out: SourceConfig
    """What is measured on."""
    resolution: int = Field(gt=0, multiple_of=8)
    """Side of the pictures in pixels: they are brought to a square as buckets do it."""
    smallest_cut: float = Field(default=1.0, gt=0, le=1)
    """Side of the smallest square cut out of a picture, as a share of its own; 1 cuts nothing."""
    flip: bool = False
    """Whether every second picture is mirrored."""


class PicturesRunConfig(RunConfig):
    """A run that learns from scenes or from pictures of files."""

    scenes: Path | None = None
    """The scenes' YAML file, or"""
    pictures: PicturesConfig | None = None
    """pictures of files, which have captions."""
    workers: int = Field(default=0, ge=0)
    """Processes that draw scenes or read pictures ahead."""

    @model_validator(mode="after")
    def _one_source(self) -> PicturesRunConfig:
        if (self.scenes is None) == (self.pictures is None):
            raise ValueError("name either scenes or pictures to learn from")
        return self


class CutPictures(StepDataset):
    """Sample e * N + n is picture n of N as epoch e sees it: uint8 [3, side, side]."""

    def __init__(self, source: ImageTextSource, config: PicturesConfig, seed: int) -> None:
        self.source, self.config, self.seed = source, config, seed

    def __getitem__(self, index: int) -> Tensor:
        epoch, row = divmod(index, len(self.source))
        side = self.config.resolution
        square, _, _ = fit(self.source.image(row), (side, side))

        def drawn(stream: str) -> float:
            return float(keyed_uniform(self.seed, f"cut {stream}", epoch, [row]))

        smallest = self.config.smallest_cut
        kept = side * (smallest + (1 - smallest) * drawn("side"))
        left, top = (drawn(edge) * (side - kept) for edge in ("left", "top"))
        box = left, top, left + kept, top + kept
        cut = square.resize(square.size, Image.Resampling.BICUBIC, box)
        if self.config.flip and drawn("flip") < 0.5:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(cut)).permute(2, 0, 1).contiguous()


class FilePictures:
    """A source's pictures, in another order each epoch; for an unreadable one another is taken."""

    def __init__(self, config: PicturesConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.source = open_source(config.source)
        self.held_out_source = open_source(config.held_out)
        self.cuts = CutPictures(self.source, config, seed)
        self.inputs = {"pictures": self.source.digest}
        self.resolution = config.resolution
        self.unreadable: dict[int, str] = {}

    def micro_batches(
        self, samples: StepDataset, steps: range, batch_size: int, share: Share, workers: int
    ) -> Generator[list[MicroBatch], None, None]:
        """Of each step; samples: what is numbered as CutPictures are."""
        count = len(self.source)
        plan = Plan(self.seed, [count], batch_size)

        def in_epochs() -> Iterator[StepOrder]:
            for epoch, pieces in planned_orders(steps, plan, share):
                yield StepOrder(epoch, [[epoch * count + row for row in rows] for rows in pieces])

        def another(epoch: int, sample: int, attempt: int) -> int:
            first = epoch * count
            return substitute(self.seed, epoch, sample, attempt, first, count)

        def cannot_read(sample: int, reason: str) -> None:
            row = sample % count
            self.unreadable[row] = f"{reason}: picture {row} of {self.config.source.path}"

        return loader(samples, in_epochs(), workers, another, cannot_read)
