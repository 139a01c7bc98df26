"""Encode a data set once: posterior moments and token ids of every picture.

    accelerate launch -m training.cache_latents --config configs/emoji/cache_latents.yaml

Killed anywhere, the same command continues. Every process writes shards of its own, then what is
missing of the others', and never waits; the first to find all shards written makes the cache whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate.utils import get_int_from_env, parse_flag_from_env
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from latentdiff.config import Config, load_config
from latentdiff.data.buckets import SizesConfig, fit, size_conditioning
from latentdiff.data.cache import CacheKey, LatentCache, Shard
from latentdiff.data.cache_files import (
    READABLE,
    ShardRecords,
    check_readable,
    finish,
    is_whole,
    is_written,
    missing_shards,
    prepare,
    write_shard,
)
from latentdiff.data.decode import UnreadableImage, decode
from latentdiff.data.images import ImageTextSource, SourceConfig, open_source
from latentdiff.data.scan import Scan, scan
from latentdiff.data.store import Store
from latentdiff.data.tokens import tokenize, tokenizers_digest
from latentdiff.errors import InputError, run_command
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.threads import warn_of_idle_cores
from training.config import DTYPES, Precision
from training.data import launched, to_network
from training.encoder import encoder_digest, load_encoder

PREPROCESSING = "Lanczos, centre crop"


class CacheConfig(Config):
    """A run of training.cache_latents."""

    run_dir: str
    """The cache: a directory, or an fsspec URL such as s3://bucket/latents."""
    source: SourceConfig
    """The pictures and captions."""
    sizes: SizesConfig
    """The sizes that pictures are brought to."""
    model: str | None = None
    """The model whose VAE and tokenizers are used: a directory, a name on the hub, one .safetensors
    file, or "emoji". What is named below replaces its parts; without it both are needed."""
    autoencoder: Path | None = None
    """Directory with vae/, written by training.autoencoder."""
    text_encoder: Path | None = None
    """Directory with tokenizer/, written by training.clip."""
    flip: bool = False
    """Whether to encode each picture mirrored, too: twice the time and disk."""
    max_unreadable: float = Field(default=0.01, ge=0, le=1)
    """Share of unreadable pictures above which it stops; fewer are left out and listed."""
    shard_size: int = Field(default=4096, gt=0)
    """Pictures in a shard: what a process loses at most when it is stopped, and keeps in memory."""
    batch_size: int = Field(default=64, gt=0)
    """Pictures encoded together, by each process."""
    workers: int = Field(default=0, ge=0)
    """Processes that read or draw pictures ahead, for each process that encodes."""
    mixed_precision: Precision = "no"
    """Arithmetic of the encoder."""

    @model_validator(mode="after")
    def _whole(self) -> CacheConfig:
        if self.model is None and None in (self.autoencoder, self.text_encoder):
            raise ValueError("name autoencoder and text_encoder, or a model")
        return self


@dataclass(frozen=True)
class Picture:
    """What becomes of one picture of a shard."""

    row: int
    """Its number in the source."""
    caption: str
    sha256: str | None
    status: str
    """READABLE, or why there is no image."""
    image: Tensor | None = None
    """uint8 [3, H, W]."""
    size: tuple[int, ...] = ()
    """SDXL's six numbers."""


@dataclass(frozen=True)
class Batch:
    """Some of a shard's pictures; the images of the readable ones in one tensor."""

    rows: list[int]
    captions: list[str]
    sha256: list[str | None]
    status: list[str]
    images: Tensor | None
    """uint8 [R, 3, H, W]; None where none is readable."""
    sizes: list[tuple[int, ...]]
    """R times SDXL's six numbers."""


class Pictures(Dataset):  # type: ignore[type-arg]
    """Pictures by (number in the source, bucket's shape)."""

    def __init__(self, source: ImageTextSource) -> None:
        self.source = source

    def __getitem__(self, place: tuple[int, tuple[int, int]]) -> Picture:
        row, shape = place
        caption, digest = self.source.caption(row), None
        try:
            raw = self.source.raw(row)
            if raw is None:
                picture = self.source.image(row)
            else:
                digest = hashlib.sha256(raw).hexdigest()
                picture = decode(raw)
        except UnreadableImage as error:
            return Picture(row, caption, digest, error.reason)
        image, top, left = fit(picture, shape)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        size = size_conditioning(picture.size, top, left, shape)
        return Picture(row, caption, digest, READABLE, pixels, size)


def collate(pictures: list[Picture]) -> Batch:
    images = [picture.image for picture in pictures if picture.image is not None]
    return Batch(
        [picture.row for picture in pictures],
        [picture.caption for picture in pictures],
        [picture.sha256 for picture in pictures],
        [picture.status for picture in pictures],
        torch.stack(images) if images else None,
        [picture.size for picture in pictures if picture.image is not None],
    )


class Encoder:
    """The networks' side: pictures and captions to records."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        tokenizers: list[PreTrainedTokenizerBase],
        key: CacheKey,
        device: torch.device,
    ) -> None:
        self.tokenizers, self.key, self.device = tokenizers, key, device
        self.autoencoder = autoencoder.to(device)
        self.autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def moments(self, images: Tensor) -> np.ndarray:
        """uint8 [B, 3, H, W] -> fp16 [B, flips, (mean, logvar), C, h, w].

        Raises InputError where the encoder's arithmetic overflows.
        """
        pixels = to_network(images, self.device)
        views = [pixels, pixels.flip(-1)] if self.key.flip else [pixels]
        dtype = DTYPES[self.key.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            posteriors = [self.autoencoder.encode(view) for view in views]
        both = [torch.stack([each.mean, each.logvar], dim=1) for each in posteriors]
        values = torch.stack(both, dim=1).half()
        if not values.isfinite().all():
            raise InputError(
                f"The VAE's latents are not finite with mixed_precision {self.key.precision}; "
                "choose bf16 or no."
            )
        return values.cpu().numpy()

    def records(
        self, shard: Shard, batches: Iterable[Batch], progress: Callable[[int], object]
    ) -> ShardRecords:
        """Encode one shard's pictures, as they come in."""
        pictures = shard.last - shard.first
        arrays = {
            name: np.empty((pictures, *shape), dtype)
            for name, (dtype, shape) in self.key.record_shapes(shard.bucket).items()
        }
        count = 0
        seen: list[Batch] = []
        cut: list[int] = []
        for batch in batches:
            ids, too_many = tokenize(self.tokenizers, batch.captions)
            cut += too_many.tolist()
            if batch.images is not None:
                here = slice(count, count + len(batch.images))
                arrays["moments"][here] = self.moments(batch.images)
                arrays["ids"][here] = ids[[status == READABLE for status in batch.status]]
                arrays["sizes"][here] = batch.sizes
                count = here.stop
            seen.append(dataclasses.replace(batch, images=None))
            progress(len(batch.rows))
        return ShardRecords(
            moments=arrays["moments"][:count],
            ids=arrays["ids"][:count],
            sizes=arrays["sizes"][:count],
            source=[row for batch in seen for row in batch.rows],
            captions=[caption for batch in seen for caption in batch.captions],
            cut=cut,
            sha256=[digest for batch in seen for digest in batch.sha256],
            status=[status for batch in seen for status in batch.status],
        )


def cache_key(
    config: CacheConfig,
    source: ImageTextSource,
    autoencoder: Autoencoder,
    tokenizers: list[PreTrainedTokenizerBase],
) -> CacheKey:
    """Raises InputError when the sizes are none of the VAE's."""
    factor, shapes = autoencoder.scale_factor, config.sizes.shapes()
    if odd := [side for shape in shapes for side in shape if side % factor]:
        raise InputError(
            f"A side of {odd[0]} pixels is no multiple of the VAE's factor, {factor}; change "
            "sizes.resolution or sizes.step."
        )
    return CacheKey(
        encoder=encoder_digest(autoencoder),
        tokenizers=tokenizers_digest(tokenizers),
        source=source.digest,
        count=len(source),
        preprocessing=PREPROCESSING,
        shapes=tuple(shapes),
        flip=config.flip,
        precision=config.mixed_precision,
        shard_size=config.shard_size,
        channels=autoencoder.latent_channels,
        scale_factor=factor,
        towers=len(tokenizers),
        tokens=tokenizers[0].model_max_length,
    )


def place() -> tuple[int, int, torch.device]:
    """(rank, processes, device) as accelerate's launcher says; the processes do not meet."""
    rank, processes = launched()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None or parse_flag_from_env("ACCELERATE_USE_CPU"):
        warn_of_idle_cores("cpu")
        return rank, processes, torch.device("cpu")
    local = get_int_from_env(["LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK"], 0)
    return rank, processes, torch.device(device.type, local)


def batches(
    source: ImageTextSource, scanned: Scan, shards: Iterable[Shard], config: CacheConfig
) -> Iterator[Batch]:
    """The pictures of the shards, in pieces of batch_size that never span two."""

    def places() -> Iterator[list[tuple[int, tuple[int, int]]]]:
        for shard in shards:
            rows = scanned.rows(shard.bucket, shard.first, shard.last).tolist()
            shape = scanned.shapes[shard.bucket]
            for first in range(0, len(rows), config.batch_size):
                yield [(row, shape) for row in rows[first : first + config.batch_size]]

    return iter(
        DataLoader(
            Pictures(source),
            batch_sampler=places(),  # type: ignore[arg-type]
            num_workers=config.workers,
            collate_fn=collate,
        )
    )


def in_turn(missing: list[int], rank: int, processes: int) -> list[int]:
    """A process's own of the missing shards, then the others': from the end, which their owners
    come to last, and begun elsewhere by each process, so that idle ones take different ones.
    """
    mine = [number for number in missing if number % processes == rank]
    others = [number for number in reversed(missing) if number % processes != rank]
    start = len(others) * rank // processes
    return mine + others[start:] + others[:start]


def encode_missing(
    encoder: Encoder,
    source: ImageTextSource,
    scanned: Scan,
    store: Store,
    config: CacheConfig,
    rank: int,
    processes: int,
) -> None:
    """Write this process's share of the shards that are still missing, then what others lack.

    Raises InputError as soon as too many pictures are unreadable.
    """
    shards = encoder.key.shards(scanned.counts)
    begun: deque[int] = deque()

    def missing() -> Iterator[Shard]:
        for number in in_turn(missing_shards(store, len(shards)), rank, processes):
            if not is_written(store, number):  # by another process meanwhile
                begun.append(number)
                yield shards[number]

    made = batches(source, scanned, missing(), config)
    reasons = scanned.reasons()
    with tqdm(unit="images", disable=rank > 0) as bar:
        for first in made:
            number = begun.popleft()
            size = shards[number].last - shards[number].first
            rest = itertools.islice(made, -(-size // config.batch_size) - 1)
            records = encoder.records(shards[number], itertools.chain([first], rest), bar.update)
            write_shard(store, encoder.key, number, records)
            reasons.update(status for status in records.status if status != READABLE)
            check_readable(reasons, len(source), config.max_unreadable)


def summary(cache: LatentCache) -> str:
    """What a finished cache holds, for people."""
    lines = [f"{len(cache)} pictures"]
    lines += [
        f"  {count} of {width} x {height}"
        for (width, height), count in zip(cache.buckets, cache.counts, strict=True)
        if count
    ]
    lines += [f"left out: {count} {reason}" for reason, count in cache.unreadable.items()]
    tokens, share = cache.key.tokens, cache.cut / len(cache)
    lines.append(f"captions longer than {tokens} tokens, and cut: {share:.2%}")
    return "\n".join(lines)


def main() -> None:
    config = load_config(CacheConfig)
    rank, processes, device = place()
    source = open_source(config.source)
    autoencoder, tokenizers = load_encoder(config.model, config.autoencoder, config.text_encoder)
    key = cache_key(config, source, autoencoder, tokenizers)
    store = Store(config.run_dir)
    prepare(store, key)
    if rank == 0:
        values = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        store.write("config.yaml", values.encode())
    if not is_whole(store):
        with tqdm(total=len(source), unit="headers", disable=rank > 0) as bar:
            scan(source, store, rank, processes, bar.update)
        scanned = Scan(source, store, key.shapes)
        check_readable(scanned.reasons(), len(source), config.max_unreadable)
        encoder = Encoder(autoencoder, tokenizers, key, device)
        encode_missing(encoder, source, scanned, store, config, rank, processes)
        if is_whole(store):
            return  # another process was faster
        finish(store, key, scanned, config.max_unreadable)
    elif rank > 0:
        return
    print(summary(LatentCache(config.run_dir)))
    print(f"finished: {config.run_dir}")


if __name__ == "__main__":
    run_command(main)
