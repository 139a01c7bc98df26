"""Latents of a whole data set: fixed-size records in memory-mapped shards, one bucket to a shard.

A cache is a directory or an fsspec URL. Shard number n has shard-n.safetensors with the records and
shard-n.parquet with what is known of each picture, written last; key.json says what they are a
function of; index.parquet and, last of all, manifest.json make the cache whole.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.store import HELD, LOCAL_BYTES, Store, UnusableFileError
from latentdiff.errors import InputError

KEY = "key.json"
MANIFEST = "manifest.json"
INDEX = "index.parquet"
MAX_MANIFEST_BYTES = 256 << 20
MAX_HEADER_BYTES = 1 << 20
MAPPED = 64
"""Shards that a reader keeps open; of a URL HELD - 1, as the store holds them and the index."""


@dataclass(frozen=True)
class CacheKey:
    """What the records are a function of, and their shape. Two equal keys make equal caches."""

    encoder: str
    """sha256 of the autoencoder's encoder, its weights and scale."""
    tokenizers: str
    """sha256 of the tokenizers."""
    source: str
    """sha256 of what identifies the pictures and captions."""
    count: int
    """Pictures of the source, unreadable ones too."""
    preprocessing: str
    """How a picture is brought to its bucket's size."""
    shapes: tuple[tuple[int, int], ...]
    """The buckets, (width, height) in pixels."""
    flip: bool
    """Whether each picture is there mirrored, too."""
    precision: str
    """Arithmetic that it was encoded in: "no" is fp32."""
    shard_size: int
    """Pictures in each shard but a bucket's last."""
    channels: int
    """C of the latents."""
    scale_factor: int
    """Pixels per latent along each axis."""
    towers: int
    """Tokenizers of the model."""
    tokens: int
    """L, token ids of each caption and tokenizer."""

    @property
    def digest(self) -> str:
        """sha256 of the key."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def latent_shape(self, bucket: int) -> tuple[int, int, int]:
        """[C, h, w]."""
        width, height = self.shapes[bucket]
        return self.channels, height // self.scale_factor, width // self.scale_factor

    def record_shapes(self, bucket: int) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
        """Type and shape of one record's arrays: moments are [flips, (mean, logvar), C, h, w]."""
        return {
            "moments": (np.float16, (1 + self.flip, 2, *self.latent_shape(bucket))),
            "ids": (np.int32, (self.towers, self.tokens)),
            "sizes": (np.int32, (6,)),
        }

    def shards(self, counts: Sequence[int]) -> list[Shard]:
        """The shards of buckets with `counts` pictures, bucket by bucket."""
        return [
            Shard(bucket, first, min(first + self.shard_size, count))
            for bucket, count in enumerate(counts)
            for first in range(0, count, self.shard_size)
        ]


@dataclass(frozen=True)
class Shard:
    """Pictures first..last-1 of a bucket, in the source's order."""

    bucket: int
    first: int
    last: int


@dataclass(frozen=True)
class Records:
    """Samples of one bucket."""

    mean: Tensor
    """Posterior means [B, C, h, w] fp32, scaled as the autoencoder scales latents."""
    logvar: Tensor
    """Log-variances [B, C, h, w] fp32."""
    ids: Tensor
    """Token ids [B, towers, L] int64."""
    sizes: Tensor
    """[B, 6] int64: original height and width, crop's top and left, target height and width."""


class LatentCache:
    """A finished cache, read by sample number.

    Samples are numbered bucket by bucket, unreadable pictures left out. Opening reads the manifest
    alone, and reading maps shards as they are needed, the one mapped first giving way.

    Args:
        url: a directory or an fsspec URL.
        local, local_bytes: where shards of a URL are kept, and how many bytes of them; see Store.

    Raises InputError when there is no finished cache, and on reading a shard that is missing or
    damaged.
    """

    def __init__(
        self, url: str | Path, local: Path | None = None, local_bytes: int = LOCAL_BYTES
    ) -> None:
        self.store = Store(url, local, local_bytes)
        if not self.store.exists(MANIFEST):
            raise InputError(f"{url} holds no finished latent cache; run training.cache_latents.")
        values = read_object(self.store.read_bytes(MANIFEST), self.store, MANIFEST)
        try:
            shapes = tuple((int(width), int(height)) for width, height in values["key"]["shapes"])
            self.key = CacheKey(**{**values["key"], "shapes": shapes})
            rows = [np.array(counts, dtype=np.int64) for counts in values["rows"]]
            self.unreadable: dict[str, int] = dict(values["unreadable"])
            """How many pictures were left out for each reason."""
            self.cut = int(values["cut"])
            """How many captions are longer than the tokenizer's limit."""
            if len(rows) != len(shapes) or any(counts.ndim != 1 for counts in rows):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise damaged(self.store, MANIFEST) from None
        self.buckets = list(shapes)
        """(width, height) in pixels of each bucket."""
        self.counts: list[int] = [int(counts.sum()) for counts in rows]
        """Samples of each bucket."""
        self.latent_shapes = [self.key.latent_shape(bucket) for bucket in range(len(shapes))]
        """[C, h, w] of each bucket."""
        self._rows, self._ends = rows, [np.cumsum(counts) for counts in rows]
        self._starts = [end - count for end, count in zip(self._ends, rows, strict=True)]
        self._offsets = np.cumsum([0, *self.counts])
        self._first = np.cumsum([0, *map(len, rows)]).tolist()
        self._most = MAPPED if self.store.folder is not None else HELD - 1
        self._mapped: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self._guard = threading.Lock()

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def read(self, samples: Sequence[int], flipped: Sequence[bool] | None = None) -> Records:
        """Samples of one bucket, those mirrored that `flipped` says; B is their number.

        Raises IndexError for a number outside range(len(self)), ValueError for samples of several
        buckets, and InputError when mirrored ones are asked of a cache without them.
        """
        numbers = np.asarray(samples, dtype=np.int64)
        if not ((numbers >= 0) & (numbers < len(self))).all():
            raise IndexError(f"The cache holds samples 0 to {len(self) - 1}.")
        buckets = np.searchsorted(self._offsets, numbers, side="right") - 1
        bucket = int(buckets[0])
        if (buckets != bucket).any():
            raise ValueError("These samples lie in several buckets.")
        mirrored = np.zeros(len(numbers), dtype=np.int64)
        if flipped is not None and any(flipped):
            if not self.key.flip:
                raise InputError("The latent cache has no mirrored pictures; make it with flip.")
            mirrored[:] = flipped
        places = numbers - self._offsets[bucket]
        shards = np.searchsorted(self._ends[bucket], places, side="right")
        rows = places - self._starts[bucket][shards]
        shapes = self.key.record_shapes(bucket)
        moments = np.empty((len(numbers), *shapes["moments"][1][1:]), np.float16)
        ids = np.empty((len(numbers), *shapes["ids"][1]), np.int32)
        sizes = np.empty((len(numbers), *shapes["sizes"][1]), np.int32)
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            arrays = self._shard(bucket, shard)
            moments[here] = arrays["moments"][rows[here], mirrored[here]]
            ids[here] = arrays["ids"][rows[here]]
            sizes[here] = arrays["sizes"][rows[here]]
            del arrays  # what is mapped keeps its disk space
        mean, logvar = torch.from_numpy(moments).float().unbind(dim=1)
        return Records(mean, logvar, torch.from_numpy(ids).long(), torch.from_numpy(sizes).long())

    def captions(self) -> list[str]:
        """Every caption in sample order; reads the whole index."""
        try:
            table = self.store.read_table(INDEX, ["key", "caption"])
        except UnusableFileError:
            raise damaged(self.store, INDEX) from None
        captions: list[str] = table.filter(table["key"].is_valid())["caption"].to_pylist()
        return captions

    @property
    def shards(self) -> int:
        """How many there are."""
        return int(self._first[-1])

    def _shard(self, bucket: int, shard: int) -> dict[str, np.ndarray]:
        place = bucket, shard
        with self._guard:
            if place not in self._mapped:
                while len(self._mapped) >= self._most:
                    del self._mapped[next(iter(self._mapped))]
                number, count = self._first[bucket] + shard, int(self._rows[bucket][shard])
                self._mapped[place] = open_shard(self.store, self.key, number, bucket, count)
            return self._mapped[place]


def open_shard(
    store: Store, key: CacheKey, number: int, bucket: int, count: int
) -> dict[str, np.ndarray]:
    """The arrays of a shard with `count` records, memory-mapped.

    Raises InputError when it is missing, damaged or of another key.
    """
    name = part_name(number, "safetensors")
    try:
        path = store.local(name)
    except UnusableFileError:
        raise damaged(store, name) from None
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
        if header["__metadata__"]["key"] != key.digest:
            raise ValueError
        data = np.memmap(path, np.uint8, "r")[8 + length :]
        arrays = {}
        for field, (dtype, shape) in key.record_shapes(bucket).items():
            values = header[field]
            begin, end = values["data_offsets"]
            if values["dtype"] != STORED[dtype] or values["shape"] != [count, *shape]:
                raise ValueError
            arrays[field] = data[begin:end].view(dtype).reshape(count, *shape)
    except PARSING:
        raise damaged(store, name) from None
    return arrays


PARSING = (
    FileNotFoundError,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    RecursionError,
)
"""What reading a damaged file raises; other errors of the system are not the file's."""
STORED: dict[type[np.generic], str] = {np.float16: "F16", np.int32: "I32"}


def read_object(content: bytes, store: Store, name: str) -> dict[str, Any]:
    try:
        values = json.loads(content) if len(content) <= MAX_MANIFEST_BYTES else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise damaged(store, name)
    return values


def damaged(store: Store, name: str) -> InputError:
    whole = {KEY: "the cache", INDEX: INDEX, MANIFEST: MANIFEST}.get(
        name, f"{name.split('.')[0]}.*"
    )
    return InputError(
        f"{store.url}: {name} is missing or damaged; delete {whole} and run training.cache_latents "
        "again."
    )


def part_name(number: int, ending: str) -> str:
    return f"shard-{number:06d}.{ending}"
