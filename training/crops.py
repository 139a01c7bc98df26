"""What training.autoencoder learns from: windows of scenes, or of the pictures of files."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from latentdiff.config import load_yaml
from latentdiff.data.held_out import squares
from latentdiff.data.images import ImageTextSource, open_source
from latentdiff.data.order import Share
from latentdiff.data.scenes import EmojiScenes, ScenesConfig
from latentdiff.errors import InputError
from latentdiff.rng import generator
from training.data import MicroBatch, StepDataset, endless_orders, loader
from training.pairs import FilePictures


class Pictures(Protocol):
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

    def first(self, count: int) -> Iterator[np.ndarray]:
        """The first `count` that are learned from, or what there are, uint8 [H, W, 3]."""

    def unseen(self, count: int) -> np.ndarray:
        """uint8 [count, H, W, 3]: pictures that no training sees, or what there are of them."""


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


class ScenePictures:
    """Scenes, without end."""

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

    def first(self, count: int) -> Iterator[np.ndarray]:
        return (self.scenes[index]["image"] for index in range(count))

    def unseen(self, count: int) -> np.ndarray:
        scenes = EmojiScenes(self.scenes.config, "held_out")
        return np.stack([scenes[index]["image"] for index in range(count)])


class CroppedFiles(FilePictures):
    """The pictures of a source, cut as `CutPictures` cuts them and then to windows."""

    def crops(
        self, steps: range, batch_size: int, share: Share, side: int, workers: int
    ) -> Generator[list[MicroBatch], None, None]:
        samples = Crops(self.cuts, side, self.seed)
        return self.take(samples, steps, batch_size, share, workers)

    def first(self, count: int) -> Iterator[np.ndarray]:
        return self._whole(self.source, count)

    def unseen(self, count: int) -> np.ndarray:
        pictures = list(self._whole(open_source(self.config.held_out), count))
        if not pictures:
            raise InputError("There is no readable picture among the held-out ones.")
        return np.stack(pictures)

    def _whole(self, source: ImageTextSource, count: int) -> Iterator[np.ndarray]:
        found = squares(source, self.resolution, range(len(source)))
        return (picture for _, picture in islice(found, count))
