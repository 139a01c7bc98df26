"""What training.clip learns from: captions and pictures that belong together."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from latentdiff.config import load_yaml
from latentdiff.data.held_out import HeldOut, first_pairs
from latentdiff.data.order import Share
from latentdiff.data.scenes import EmojiScenes, Scene, ScenesConfig
from training.data import MicroBatch, StepDataset, endless_orders, loader
from training.file_pictures import CutPictures, FilePictures


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


class CaptionedCuts(StepDataset):
    """Cut pictures with their captions' tokens, numbered as the pictures are."""

    def __init__(self, cuts: CutPictures, tokenizer: CLIPTokenizer) -> None:
        self.cuts, self.tokenizer = cuts, tokenizer

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        caption = self.cuts.source.caption(index % len(self.cuts.source))
        return {"image": self.cuts[index], "ids": tokens(self.tokenizer, caption)}


class FilePairs(FilePictures):
    """Pictures of files with their captions."""

    def captions(self, count: int) -> Iterator[str]:
        return (self.source.caption(row) for row in range(min(count, len(self.source))))

    def batches(
        self, steps: range, batch_size: int, share: Share, tokenizer: CLIPTokenizer, workers: int
    ) -> Generator[list[MicroBatch], None, None]:
        pairs = CaptionedCuts(self.cuts, tokenizer)
        return self.micro_batches(pairs, steps, batch_size, share, workers)

    def held_out(self, count: int) -> HeldOut:
        return first_pairs(self.held_out_source, count, self.resolution)
