"""Where training.diffusion takes latents from: a cache, or pictures encoded in every step."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from pydantic import Field
from torch import Tensor

from latentdiff.checkpoint import ModelParts
from latentdiff.config import Config
from latentdiff.data.buckets import SizesConfig
from latentdiff.data.cache import LatentCache
from latentdiff.data.images import SourceConfig, open_source
from latentdiff.data.live import LiveImages
from latentdiff.data.order import substitute
from latentdiff.data.store import Store
from latentdiff.data.tokens import tokenizers_digest
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import Autoencoder, Posterior
from latentdiff.rng import keyed_normal, keyed_uniform
from training.data import StepOrder, launched, loader, to_network
from training.encoder import encoder_digest

if TYPE_CHECKING:
    from training.takedown import Removal


class LiveConfig(Config):
    """Pictures that are read and encoded in every step."""

    source: SourceConfig
    """The pictures and captions."""
    sizes: SizesConfig
    """The sizes that pictures are brought to."""
    flip: bool = False
    """Whether every second picture is mirrored, others in each epoch."""
    workers: int = Field(default=0, ge=0)
    """Processes that read pictures ahead, for each process that trains."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch and all that is known of it before anything is computed."""

    seed: int
    epoch: int
    samples: list[int]
    """Numbers in the data set: with seed and epoch they key everything that is drawn, also where
    another took a sample's place."""
    ids: Tensor
    """Token ids [B, N, L] for N text encoders."""
    sizes: Tensor
    """[B, 6], pixels; see network.Text."""
    images: Tensor | None = None
    """uint8 [B, 3, H, W], or"""
    moments: Posterior | None = None
    """what the cache holds of them, on the CPU."""
    drawn: dict[str, Tensor] = field(default_factory=dict)
    """What was drawn already, by stream."""

    def draw(self, stream: str, shape: tuple[int, ...] | None) -> Tensor:
        """N(0, 1) numbers [B, *shape], or without a shape uniform ones in [0, 1), [B]."""
        if stream not in self.drawn:
            key = self.seed, stream, self.epoch, self.samples
            numbers = keyed_uniform(*key) if shape is None else keyed_normal(*key, shape)
            self.drawn[stream] = numbers
        return self.drawn[stream]

    def x0(self, autoencoder: Autoencoder, device: torch.device) -> Tensor:
        """Clean latents [B, C, h, w], a sample of the posterior, channels_last."""
        posterior = self.moments
        if posterior is None:
            assert self.images is not None
            with torch.no_grad():
                posterior = autoencoder.to(device).encode(to_network(self.images, device))
        noise = self.draw("posterior", tuple(posterior.mean.shape[1:]))
        x0 = posterior.sample(noise.to(posterior.mean.device)).to(device)
        return x0.contiguous(memory_format=torch.channels_last)


class Latents(Protocol):
    """A data set by sample number."""

    removal: Removal | None
    """What others take the place of; nothing at first."""

    @property
    def counts(self) -> list[int]:
        """Samples of each bucket."""

    @property
    def digest(self) -> str:
        """sha256 of what the samples and their numbers are a function of."""

    @property
    def unreadable(self) -> dict[int, str]:
        """Samples that could not be read so far and were replaced by others, with the reasons.

        Pictures that have no number because not even their headers could be read are there, too:
        number n of the source as -1 - n.
        """

    @property
    def cut(self) -> tuple[float, int]:
        """Which share of the captions is longer than the text encoder's tokens; how many it has."""

    def batches(self, orders: Iterable[StepOrder]) -> Generator[list[Batch], None, None]:
        """The micro-batches of each step."""


def numbered(words: object, counts: Sequence[int]) -> str:
    """sha256 of what samples are a function of, and of how many each bucket has: which pictures
    were readable when it was looked decides what all numbers mean.
    """
    return hashlib.sha256(repr((words, list(counts))).encode()).hexdigest()


def mirrored(seed: int, epoch: int, samples: Sequence[int]) -> Tensor:
    """Which samples are flipped left to right, [B]."""
    return keyed_uniform(seed, "flip", epoch, samples) < 0.5


class CachedLatents:
    """Samples of a latent cache; mirrored every second time where the cache holds both.

    local, local_bytes: where shards of a cache at a URL are kept, and how many bytes of them.
    Raises InputError when it was made with another autoencoder or other tokenizers.
    """

    def __init__(
        self, url: str, parts: ModelParts, seed: int, local: Path | None, local_bytes: int
    ) -> None:
        self.cache, self.seed = LatentCache(url, local, local_bytes), seed
        self.removal: Removal | None = None
        self.counts = self.cache.counts
        self.digest = numbered(self.cache.key.digest, self.counts)
        if self.cache.key.encoder != encoder_digest(parts.autoencoder):
            raise InputError(
                f"{url} was not made with this autoencoder; make the cache again or name its own."
            )
        tokenizers = [tower.tokenizer for tower in parts.towers.values()]
        if self.cache.key.tokenizers != tokenizers_digest(tokenizers):
            raise InputError(
                f"{url} was not made with this text encoder's tokenizer; make the cache again or "
                "name its own text encoder."
            )

    @property
    def unreadable(self) -> dict[int, str]:
        """None: what could not be read is not in a cache."""
        return {}

    @property
    def cut(self) -> tuple[float, int]:
        """As every caption was when the cache was made."""
        return self.cache.cut / max(1, len(self.cache)), self.cache.key.tokens

    def batches(self, orders: Iterable[StepOrder]) -> Generator[list[Batch], None, None]:
        """Raises InputError when a shard is missing or damaged."""
        for epoch, micro_batches in orders:
            yield [self.read(epoch, samples) for samples in micro_batches]

    def read(self, epoch: int, samples: list[int]) -> Batch:
        flipped = mirrored(self.seed, epoch, samples).tolist() if self.cache.key.flip else None
        taken = samples
        if self.removal is not None:
            taken = [self.removal.instead(epoch, sample) for sample in samples]
        records = self.cache.read(taken, flipped)
        moments = Posterior(records.mean, records.logvar)
        return Batch(self.seed, epoch, samples, records.ids, records.sizes, moments=moments)


class LiveLatents:
    """Samples of picture files, encoded as they are needed.

    scanned: a directory that keeps what the files' headers say, so that they are read once.
    Raises InputError when there is no such data.
    """

    def __init__(self, config: LiveConfig, parts: ModelParts, seed: int, scanned: Path) -> None:
        self.config, self.seed = config, seed
        self.removal: Removal | None = None
        self.images = LiveImages(
            open_source(config.source),
            config.sizes,
            [tower.tokenizer for tower in parts.towers.values()],
            Store(scanned),
            *launched(),
        )
        self.counts = self.images.counts
        words = (self.images.digest, encoder_digest(parts.autoencoder), config.flip)
        self.digest = numbered(words, self.counts)
        self.unreadable: dict[int, str] = {
            -1 - row: self.listed(row, reason) for row, reason in self.images.unreadable
        }

    @property
    def cut(self) -> tuple[float, int]:
        """As some thousand captions, evenly taken, say."""
        return self.images.cut()

    def batches(self, orders: Iterable[StepOrder]) -> Generator[list[Batch], None, None]:
        """Raises InputError when no sample of a bucket can be read."""
        instead = None if self.removal is None else self.removal.instead
        workers = self.config.workers
        read = loader(self.images, orders, workers, self.substitute, self.cannot_read, instead)
        for step in read:
            yield [self.batch(*micro_batch) for micro_batch in step]

    def cannot_read(self, sample: int, reason: str) -> None:
        """Keep what will be listed."""
        self.unreadable[sample] = self.listed(self.images.source_row(sample), reason)

    def listed(self, row: int, reason: str) -> str:
        return f"{reason}: picture {row} of {self.config.source.path}"

    def substitute(self, epoch: int, sample: int, attempt: int) -> int:
        """Another sample of the same bucket."""
        if self.removal is not None:
            return next(itertools.islice(self.removal.others(epoch, sample), attempt, None))
        ends = list(itertools.accumulate(self.counts))
        bucket = bisect.bisect_right(ends, sample)
        first = ends[bucket] - self.counts[bucket]
        return substitute(self.seed, epoch, sample, attempt, first, self.counts[bucket])

    def batch(self, epoch: int, samples: list[int], data: dict[str, Tensor]) -> Batch:
        images = data["image"]
        if self.config.flip:
            flipped = mirrored(self.seed, epoch, samples)[:, None, None, None]
            images = torch.where(flipped, images.flip(-1), images)
        return Batch(self.seed, epoch, samples, data["ids"], data["size"], images=images)
