"""The rows of numbers that are kept of each picture, drawn or real."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latentdiff.data.scenes import EmojiScenes
from latentdiff.drawing import drawn
from latentdiff.metrics.features import Extractor, TextExtractor
from latentdiff.metrics.figures import SCENE_COLUMNS
from latentdiff.metrics.prompts import Prompts
from latentdiff.metrics.protocol import Protocol, brought
from latentdiff.metrics.psnr import psnr, reconstruct
from latentdiff.metrics.references import Reference
from latentdiff.metrics.scene_accuracy import Judge
from latentdiff.model_files import staged_file
from latentdiff.pipeline import TextToImage

SHOWN = 48
"""Pictures of each group that are always kept, for its sheet."""
PIXELS = 32
"""Side of the pictures that are compared pixel by pixel."""


class Features:
    """What is taken of any picture: the vectors of the protocol's extractors and, where nearest
    neighbours are sought, its pixels.
    """

    def __init__(self, protocol: Protocol, extractors: Sequence[Extractor], batch: int) -> None:
        assert protocol.height is not None
        assert protocol.width is not None
        side = protocol.size
        self.shape = (protocol.width, protocol.height) if side is None else (side, side)
        self.resize, self.extractors, self.batch = protocol.resize, extractors, batch
        self.widths = {extractor.name: extractor.dimensions for extractor in extractors}
        if protocol.training is not None:
            self.widths["pixels"] = 3 * PIXELS**2

    def __call__(self, pictures: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Rows by name, float32 [n, D]; pixels in 0..1."""
        same = np.stack([brought(picture, self.shape, self.resize) for picture in pictures])
        batches = torch.from_numpy(same).permute(0, 3, 1, 2).split(self.batch)
        rows = {e.name: np.concatenate([e(batch) for batch in batches]) for e in self.extractors}
        if "pixels" in self.widths:
            small = [brought(Image.fromarray(p), (PIXELS, PIXELS), "box") for p in same]
            rows["pixels"] = np.stack(small).reshape(len(small), -1).astype(np.float32) / 255
        return rows


class RealRows:
    """The rows of real pictures."""

    def __init__(self, pictures: Reference, features: Features) -> None:
        self.pictures, self.features, self.widths = pictures, features, features.widths

    def __call__(self, numbers: range) -> dict[str, np.ndarray]:
        """Of the pictures of these numbers."""
        return self.features([self.pictures.image(number) for number in numbers])


class DrawnRows:
    """The rows of drawn pictures: those of all features, of their prompts, and of scenes.

    Those that are shown, or all if asked for, are kept as folder/NNNNNN.png.
    """

    def __init__(
        self,
        model: TextToImage,
        protocol: Protocol,
        prompts: Prompts,
        features: Features,
        folder: Path,
        keep_all: bool,
    ) -> None:
        self.model, self.protocol, self.prompts = model, protocol, prompts
        self.features, self.folder, self.keep_all = features, folder, keep_all
        texts = {f"{e.name}_text": e.dimensions for e in self._readers}
        scenes = {} if prompts.asked is None else {"scenes": len(SCENE_COLUMNS)}
        self.widths = features.widths | texts | scenes

    @property
    def _readers(self) -> list[TextExtractor]:
        return [e for e in self.features.extractors if isinstance(e, TextExtractor)]

    def __call__(self, numbers: range) -> dict[str, np.ndarray]:
        """Draw the pictures of these numbers."""
        pictures = [
            picture for some in self.prompts.stretches(numbers) for picture in self._draw(some)
        ]
        for number, picture in zip(numbers, pictures, strict=True):
            if self.keep_all or number in self.shown:
                with staged_file(picture_file(self.folder, number)) as path:
                    picture.save(path, "PNG")
        rows = self.features(pictures) if self.features.widths else {}
        texts = [self.prompts.texts[number] for number in numbers]
        for reader in self._readers:
            rows[f"{reader.name}_text"] = reader.text(texts)
        if self.prompts.asked is not None:
            rows["scenes"] = self._judge(numbers, pictures)
        return rows

    def _draw(self, numbers: range) -> list[Image.Image]:
        here, seed = slice(numbers.start, numbers.stop), self.protocol.seed
        return list(
            drawn(
                self.model,
                self.prompts.texts[here],
                self.protocol,
                [seed + offset for offset in self.prompts.offsets[here]],
                self.features.batch,
                self.protocol.height,
                self.protocol.width,
            )
        )

    def _judge(self, numbers: range, pictures: Sequence[Image.Image]) -> np.ndarray:
        asked = self.prompts.asked
        assert asked is not None
        scenes = asked.scenes[numbers.start : numbers.stop]
        shape = (asked.config.resolution, asked.config.resolution)
        seen = self.judge.all([brought(p, shape, self.protocol.resize) for p in pictures], scenes)
        real = np.stack([self.renderer.render(scene) for scene in scenes])
        through_vae = reconstruct(self.model.parts.autoencoder, real)
        columns = [
            [verdict.objects_right for verdict in seen],
            [verdict.in_place for verdict in seen],
            [verdict.background_right for verdict in seen],
            [verdict.in_place for verdict in self.judge.all(real, scenes)],
            [verdict.in_place for verdict in self.judge.all(through_vae, scenes)],
            psnr(through_vae, real),
        ]
        return np.stack([np.asarray(column, np.float32) for column in columns], axis=1)

    @cached_property
    def judge(self) -> Judge:
        """Of the prompts' scenes."""
        assert self.prompts.asked is not None
        return Judge(self.prompts.asked.config)

    @cached_property
    def renderer(self) -> EmojiScenes:
        """Of the prompts' scenes."""
        assert self.prompts.asked is not None
        return EmojiScenes(self.prompts.asked.config)

    @cached_property
    def shown(self) -> set[int]:
        """The numbers of the pictures that are kept in any case."""
        groups = self.prompts.groups.values() or [range(len(self.prompts.texts))]
        return {number for group in groups for number in group[:SHOWN]}


def picture_file(folder: Path, number: int) -> Path:
    """Where the picture of a number is kept."""
    return folder / f"{number:06d}.png"
