"""What training.autoencoder learns from: windows of scenes, or of the pictures of files."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from latentdiff.config import load_yaml
from latentdiff.data.images import ImageTextSource, squares
from latentdiff.data.order import Share
from latentdiff.data.scenes import EmojiScenes, ScenesConfig
from latentdiff.errors import InputError
from latentdiff.rng import generator
from training.data import MicroBatch, StepDataset, endless_orders, loader
from training.file_pictures import FilePictures


class CropSource(Protocol):
    """Pictures of one size, in the order that a run takes windows of them."""

    inputs: dict[str, str]
    """Their digest, by name."""
    resolution: int
    """Their side in pixels."""
    unreadable: dict[int, str]
    """What could not be read so far, with the reasons."""

    def crops(
        self, steps: range, batch_size: int, share: Share, side: int, workers: int
    ) -> Generator[list[MicroBatch], None, None]:
        """Micro-batches of windows, uint8 [B, 3, side, side]."""

    def whole(self, count: int) -> Iterator[np.ndarray]:
        """`count` of what is learned from, or what can be read of them, uint8 [H, W, 3]."""

    def unseen(self, count: int) -> np.ndarray:
        """uint8 [count, H, W, 3]: pictures that no training sees, or what can be read of them."""


class Crops(StepDataset):
    """Sample `index` is a random window of picture `index`: uint8 [3, side, side]."""

    def __init__(self, pictures: StepDataset, side: int, seed: int) -> None:
        self.pictures, self.side, self.seed = pictures, side, seed

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.pictures[index]
        room = image.shape[-1] - self.side
        y, x = torch.randint(
            room + 1, (2,), generator=generator(self.seed, "crop", 0, index)
        ).tolist()
        return image[:, y : y + self.side, x : x + self.side].contiguous()


class SceneImages(StepDataset):
    """Sample `index` is scene `index`: uint8 [3, H, W]."""

    def __init__(self, scenes: EmojiScenes) -> None:
        self.scenes = scenes

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.scenes[index]["image"]).permute(2, 0, 1)


class SceneCrops:
    """Windows of scenes, without end."""

    def __init__(self, file: Path, seed: int) -> None:
        self.scenes, self.seed = EmojiScenes(load_yaml(ScenesConfig, file)), seed
        self.inputs = {"scenes": self.scenes.digest}
        self.resolution = self.scenes.config.resolution
        self.unreadable: dict[int, str] = {}

    def crops(
        self, steps: range, batch_size: int, share: Share, side: int, workers: int
    ) -> Generator[list[MicroBatch], None, None]:
        samples = Crops(SceneImages(self.scenes), side, self.seed)
        return loader(samples, endless_orders(steps, batch_size, share), workers)

    def whole(self, count: int) -> Iterator[np.ndarray]:
        return (self.scenes[index]["image"] for index in range(count))

    def unseen(self, count: int) -> np.ndarray:
        scenes = EmojiScenes(self.scenes.config, "held_out")
        return np.stack([scenes[index]["image"] for index in range(count)])


class FileCrops(FilePictures):
    """Windows of pictures of files, which were cut as `CutPictures` cuts them."""

    def crops(
        self, steps: range, batch_size: int, share: Share, side: int, workers: int
    ) -> Generator[list[MicroBatch], None, None]:
        samples = Crops(self.cuts, side, self.seed)
        return self.micro_batches(samples, steps, batch_size, share, workers)

    def whole(self, count: int) -> Iterator[np.ndarray]:
        return self._spread(self.source, count)

    def unseen(self, count: int) -> np.ndarray:
        pictures = list(self._spread(self.held_out_source, count))
        if not pictures:
            raise InputError("There is no readable picture among the held-out ones.")
        return np.stack(pictures)

    def _spread(self, source: ImageTextSource, count: int) -> Iterator[np.ndarray]:
        """From all over a source, whose neighbours may be alike."""
        rows = np.linspace(0, len(source), min(count, len(source)), endpoint=False).astype(int)
        return (picture for _, picture in squares(source, self.resolution, rows.tolist()))
