"""What training.clip learns from: captions and pictures that belong together."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from transformers import CLIPTokenizer

from latentdiff.config import Config, load_yaml
from latentdiff.data.buckets import fit
from latentdiff.data.held_out import HeldOut, first_pairs
from latentdiff.data.images import ImageTextSource, SourceConfig, open_source
from latentdiff.data.order import Plan, Share, substitute
from latentdiff.data.scenes import EmojiScenes, Scene, ScenesConfig
from latentdiff.rng import keyed_uniform
from training.data import (
    MicroBatch,
    StepDataset,
    StepOrder,
    endless_orders,
    loader,
    planned_orders,
)


class Pairs(Protocol):
    """Captions and pictures, in the order that a run takes them."""

    inputs: dict[str, str]
    """Their digest, by name."""
    resolution: int
    """Side of the pictures in pixels."""
    unreadable: dict[int, str]
    """What could not be read so far, with the reasons."""

    def captions(self, count: int) -> Iterable[str]:
        """The first `count` captions, fewer where there are no more."""

    def batches(
        self, steps: range, batch_size: int, share: Share, tokenizer: CLIPTokenizer, workers: int
    ) -> Generator[list[MicroBatch], None, None]:
        """Micro-batches of image uint8 [B, 3, H, W] and ids [B, L]."""

    def held_out(self, count: int) -> HeldOut:
        """At most `count` pairs that no batch holds."""


def tokens(tokenizer: CLIPTokenizer, caption: str) -> Tensor:
    return torch.tensor(tokenizer(caption, padding="max_length", truncation=True)["input_ids"])


class NearMisses(StepDataset):
    """Scenes in fours: sample 4n is a scene, the three after it are near misses of it.

    One has its objects in exchanged places, or another background; in the other two an object is
    replaced by one of like colours. Without such neighbours in its batch a CLIP learns a bag of
    words (Yuksekgonul et al. 2023), and of objects hardly more than their colour.
    """

    def __init__(self, scenes: EmojiScenes, tokenizer: CLIPTokenizer) -> None:
        self.scenes, self.tokenizer = scenes, tokenizer

    def scene(self, index: int) -> Scene:
        number, variant = divmod(index, 4)
        scene = self.scenes.scene(number)
        if variant == 0:
            return scene
        if variant == 1:
            swap = scene.relation is not None and number % 2 == 0
            change = self.scenes.swapped if swap else self.scenes.recoloured
            return change(scene, index)
        return self.scenes.replaced(scene, variant % len(scene.objects), index)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene = self.scene(index)
        image = torch.from_numpy(self.scenes.render(scene)).permute(2, 0, 1)
        return {"image": image, "ids": tokens(self.tokenizer, scene.caption)}


class ScenePairs:
    """Scenes with near misses of each, without end."""

    def __init__(self, file: Path) -> None:
        self.scenes = EmojiScenes(load_yaml(ScenesConfig, file))
        self.inputs = {"scenes": self.scenes.digest}
        self.resolution = self.scenes.config.resolution
        self.unreadable: dict[int, str] = {}

    def captions(self, count: int) -> Iterator[str]:
        return (self.scenes.scene(index).caption for index in range(count))

    def batches(
        self, steps: range, batch_size: int, share: Share, tokenizer: CLIPTokenizer, workers: int
    ) -> Generator[list[MicroBatch], None, None]:
        orders = endless_orders(steps, batch_size, share)
        return loader(NearMisses(self.scenes, tokenizer), orders, workers)

    def held_out(self, count: int) -> HeldOut:
        scenes = EmojiScenes(self.scenes.config, "held_out")
        shown = [scenes.scene(index) for index in range(count)]
        images = np.stack([scenes.render(scene) for scene in shown])
        captions = [scene.caption for scene in shown]
        return HeldOut(captions, torch.from_numpy(images).permute(0, 3, 1, 2))


class PicturesConfig(Config):
    """Pictures and captions of files, one size, cut and mirrored anew in each epoch."""

    source: SourceConfig
    """What is learned from."""
    held_out: SourceConfig
    """What retrieval is measured on."""
    resolution: int = Field(gt=0, multiple_of=8)
    """Side in pixels of what the picture tower sees: as buckets bring pictures to a square."""
    smallest_cut: float = Field(default=1.0, gt=0, le=1)
    """Side of the smallest square cut out of a picture, as a share of its own; 1 cuts nothing."""
    flip: bool = False
    """Whether every second picture is mirrored."""


class CutPictures(StepDataset):
    """Sample e * N + n is picture n of N as epoch e sees it: uint8 [3, side, side]."""

    def __init__(self, source: ImageTextSource, config: PicturesConfig, seed: int) -> None:
        self.source, self.config, self.seed = source, config, seed

    def __getitem__(self, index: int) -> Tensor:
        epoch, row = divmod(index, len(self.source))
        side = self.config.resolution
        square, _, _ = fit(self.source.image(row), (side, side))

        def drawn(stream: str) -> float:
            return float(keyed_uniform(self.seed, f"clip {stream}", epoch, [row]))

        smallest = self.config.smallest_cut
        kept = side * (smallest + (1 - smallest) * drawn("cut"))
        left, top = (drawn(edge) * (side - kept) for edge in ("left", "top"))
        box = left, top, left + kept, top + kept
        cut = square.resize(square.size, Image.Resampling.BICUBIC, box)
        if self.config.flip and drawn("flip") < 0.5:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(cut)).permute(2, 0, 1).contiguous()


class CaptionedCuts(StepDataset):
    """The same with the captions' tokens."""

    def __init__(self, cuts: CutPictures, tokenizer: CLIPTokenizer) -> None:
        self.cuts, self.tokenizer = cuts, tokenizer

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        caption = self.cuts.source.caption(index % len(self.cuts.source))
        return {"image": self.cuts[index], "ids": tokens(self.tokenizer, caption)}


class FilePictures:
    """A source's pictures, in another order each epoch; for an unreadable one another is taken."""

    def __init__(self, config: PicturesConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.source = open_source(config.source)
        self.cuts = CutPictures(self.source, config, seed)
        self.inputs = {"pictures": self.source.digest}
        self.resolution = config.resolution
        self.unreadable: dict[int, str] = {}

    def take(
        self, samples: StepDataset, steps: range, batch_size: int, share: Share, workers: int
    ) -> Generator[list[MicroBatch], None, None]:
        """The micro-batches of what is numbered as `cuts` is."""
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


class FilePairs(FilePictures):
    """The same with their captions."""

    def captions(self, count: int) -> Iterator[str]:
        return (self.source.caption(row) for row in range(min(count, len(self.source))))

    def batches(
        self, steps: range, batch_size: int, share: Share, tokenizer: CLIPTokenizer, workers: int
    ) -> Generator[list[MicroBatch], None, None]:
        pairs = CaptionedCuts(self.cuts, tokenizer)
        return self.take(pairs, steps, batch_size, share, workers)

    def held_out(self, count: int) -> HeldOut:
        return first_pairs(open_source(self.config.held_out), count, self.resolution)
