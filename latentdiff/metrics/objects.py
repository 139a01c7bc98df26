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

EXTRA = 0.25
"""Of |S|^2, what an object that nobody asked for gains at least. One that is there as it is gains
1; what a VAE blurs of objects that were asked for gains -0.6 at most; models' blurs gain 0.1."""
CHUNK = 64
"""Sprites that are correlated at a time, which bounds the memory beside the spectra."""


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
    a cross-correlation, computed for all places at once in the frequency domain. A sprite that is
    there as it is gains |S|^2.
    """

    def __init__(self, scenes: EmojiScenes) -> None:
        self.scenes = scenes
        self.side = scenes.config.resolution
        self._concepts = list(scenes.concepts)
        sizes = {*scenes.config.sizes, *scenes.config.pair_sizes}
        self._banks = {size: self._bank(size) for size in sorted(sizes)}

    def _bank(self, size: int) -> _Bank:
        drawn = [self.scenes.sprite(concept, size) for concept in self._concepts]
        sprites = torch.from_numpy(np.stack([np.concatenate(pair, axis=-1) for pair in drawn]))
        planes = sprites.permute(0, 3, 1, 2)
        spectra = [torch.fft.rfft2(some, (self.side, self.side)) for some in planes.split(CHUNK)]
        exact = planes.double().flatten(2)
        return _Bank(torch.cat(spectra).conj(), exact @ exact.mT)

    @torch.inference_mode()
    def find(self, picture: np.ndarray, count: int) -> tuple[list[Found], Found | None]:
        """The `count` (1 or 2) objects that explain most of a picture, and one too many, if any.

        Each is sought in what those before it, once painted, leave unexplained. One too many is
        sought at every size: it gains at least EXTRA of what it would if it were there as it is,
        and its box and each of theirs share less than half of the smaller.

        picture: uint8 [H, W, 3].
        """
        config = self.scenes.config
        name = find_background(picture, config.backgrounds)
        ground = torch.tensor(config.backgrounds[name]) / 255
        residual = torch.from_numpy(picture.astype(np.float32) / 255).permute(2, 0, 1)
        residual = residual - ground[:, None, None]
        found: list[Found] = []
        for _ in range(count):
            best = self._best(residual, ground, config.sizes if count == 1 else config.pair_sizes)
            assert best is not None
            self._paint_out(residual, ground, best)
            found.append(best)
        return found, self._best(residual, ground, tuple(self._banks), found)

    def _best(
        self,
        residual: Tensor,
        ground: Tensor,
        sizes: Sequence[int],
        beside: Sequence[Found] | None = None,
    ) -> Found | None:
        """What gains most; of what is too many `beside` these objects, where they are given."""
        spectrum = torch.fft.rfft2(residual)
        over = torch.cat([spectrum, -(ground[:, None, None] * spectrum).sum(dim=0, keepdim=True)])
        best, most = None, -torch.inf
        for size in sizes:
            bank, places = self._banks[size], self.side - size + 1
            for first in range(0, len(self._concepts), CHUNK):
                product = (bank.spectra[first : first + CHUNK] * over).sum(dim=1)
                correlation = torch.fft.irfft2(product, s=(self.side, self.side))
                energy = bank.energies(ground)[first : first + CHUNK, None, None]
                gain = 2 * correlation[:, :places, :places] - energy
                if beside is not None:
                    extra = (gain >= EXTRA * energy) & _apart(places, size, beside)
                    gain = gain.where(extra, -torch.inf)
                if gain.max() > most:
                    most = float(gain.max())
                    number, place = divmod(int(gain.argmax()), places**2)
                    y, x = divmod(place, places)
                    concept = self._concepts[first + number]
                    best = Found(concept, x + size / 2, y + size / 2, size)
        return best

    def _paint_out(self, residual: Tensor, ground: Tensor, item: Found) -> None:
        """Take the object out of the residual [3, H, W], in place."""
        colour, alpha = map(torch.from_numpy, self.scenes.sprite(item.concept, item.size))
        x, y = int(item.x - item.size / 2), int(item.y - item.size / 2)
        window = residual[:, y : y + item.size, x : x + item.size]
        window -= (colour - alpha * ground).permute(2, 0, 1)


@dataclass(frozen=True)
class _Bank:
    """The sprites of one size: premultiplied colour and coverage, four planes each."""

    spectra: Tensor
    """[N, 4, H, W // 2 + 1], conjugate."""
    products: Tensor
    """[N, 4, 4]: the inner product of each plane with each, float64."""

    def energies(self, ground: Tensor) -> Tensor:
        """|S|^2 over a background [3]: float32 [N]."""
        weights = torch.cat([torch.eye(3), -ground[:, None]], dim=1).double()
        return torch.einsum("kc,ncd,kd->n", weights, self.products, weights).float()


def _apart(places: int, size: int, others: Sequence[Found]) -> Tensor:
    """At which places, bool [places, places], a box shares less than half with each of others."""
    start = torch.arange(places)
    apart = torch.ones(places, places, dtype=torch.bool)
    for other in others:
        across, down = (
            (start + size).clamp(max=centre + other.size / 2)
            - start.clamp(min=centre - other.size / 2)
            for centre in (other.x, other.y)
        )
        shared = down.clamp(min=0)[:, None] * across.clamp(min=0)
        apart &= shared < min(size, other.size) ** 2 / 2
    return apart


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
