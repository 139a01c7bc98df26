"""Which objects a picture of an emoji scene shows, and where: analysis by synthesis.

Nothing here is learned. The picture's residual over its background is compared with every sprite at
every size and place by least squares; under white noise that is the maximum-likelihood answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.scenes import EmojiScenes, Relation


@dataclass(frozen=True)
class Found:
    """One object: its canonical noun, the centre and size of its box in pixels."""

    concept: str
    x: float
    y: float
    size: int


def find_background(picture: np.ndarray, backgrounds: dict[str, tuple[int, int, int]]) -> str:
    """The named colour nearest to the median of the picture's outermost pixels.

    picture: uint8 [H, W, 3].
    """
    rim = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    colour = np.median(rim.astype(np.float32), axis=0)
    distances = {
        name: float(np.square(colour - np.array(value)).sum())
        for name, value in backgrounds.items()
    }
    return min(distances, key=distances.__getitem__)


class Recogniser:
    """Finds the objects of scenes like `scenes` in pictures.

    Placing sprite S = alpha (c - b) of colour c and coverage alpha over a background b at place p
    lowers the squared error of the residual R = picture - b by
        gain(p) = 2 <R, S_p> - <S_p, S_p>,
    a cross-correlation, computed for all places at once in the frequency domain.
    """

    def __init__(self, scenes: EmojiScenes) -> None:
        self.scenes = scenes
        self.side = scenes.config.resolution
        self._banks = {1: self._bank(scenes.config.sizes), 2: self._bank(scenes.config.pair_sizes)}

    def _bank(self, sizes: Sequence[int]) -> _Bank:
        items = [(concept, size) for concept in self.scenes.concepts for size in sizes]
        planes = torch.zeros(len(items), 4, self.side, self.side)
        for plane, (concept, size) in zip(planes, items, strict=True):
            colour, alpha = self.scenes.sprite(concept, size)
            sprite = np.concatenate([colour, alpha], axis=-1)
            plane[:, :size, :size] = torch.from_numpy(sprite).permute(2, 0, 1)
        return _Bank(items, planes, torch.fft.rfft2(planes).conj())

    @torch.inference_mode()
    def find(self, picture: np.ndarray, count: int) -> list[Found]:
        """The `count` (1 or 2) objects that explain most of a picture, uint8 [H, W, 3].

        The second is sought in what the first, once painted, leaves unexplained.
        """
        name = find_background(picture, self.scenes.config.backgrounds)
        ground = torch.tensor(self.scenes.config.backgrounds[name]) / 255
        residual = torch.from_numpy(picture.astype(np.float32) / 255).permute(2, 0, 1)
        residual = residual - ground[:, None, None]
        found = []
        for _ in range(count):
            best, sprite = self._best(residual, ground, self._banks[count])
            residual = residual - sprite
            found.append(best)
        return found

    def _best(self, residual: Tensor, ground: Tensor, bank: _Bank) -> tuple[Found, Tensor]:
        spectrum = torch.fft.rfft2(residual)
        over = (ground[:, None, None] * spectrum).sum(dim=0)
        product = (bank.spectra[:, :3] * spectrum).sum(dim=1) - bank.spectra[:, 3] * over
        correlation = torch.fft.irfft2(product, s=(self.side, self.side))
        sprites = bank.planes[:, :3] - bank.planes[:, 3:] * ground[:, None, None]
        gain = 2 * correlation - sprites.square().sum(dim=(1, 2, 3))[:, None, None]
        for row, (_, size) in zip(gain, bank.items, strict=True):
            row[self.side - size + 1 :] = -torch.inf
            row[:, self.side - size + 1 :] = -torch.inf
        number, place = divmod(int(gain.argmax()), self.side**2)
        y, x = divmod(place, self.side)
        concept, size = bank.items[number]
        drawn = torch.roll(sprites[number], (y, x), dims=(1, 2))
        return Found(concept, x + size / 2, y + size / 2, size), drawn


@dataclass(frozen=True)
class _Bank:
    """Sprites at some sizes: (concept, size), colour and coverage [N, 4, H, W], their spectra."""

    items: list[tuple[str, int]]
    planes: Tensor
    spectra: Tensor


def relation_holds(first: Found, second: Found, relation: Relation) -> bool:
    """Whether the first object's centre lies to the named side of the second's, mostly."""
    right, down = first.x - second.x, first.y - second.y
    along, across = (right, down) if relation in ("left", "right") else (down, right)
    towards = along if relation in ("right", "below") else -along
    return towards > abs(across)


def both_in_place(found: Sequence[Found], wanted: Sequence[str], relation: Relation) -> bool:
    """Whether the two objects are the wanted ones and the first is `relation` of the second."""
    if sorted(item.concept for item in found) != sorted(wanted):
        return False
    first, second = sorted(found, key=lambda item: item.concept != wanted[0])
    return relation_holds(first, second, relation)
