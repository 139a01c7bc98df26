"""Latents of a whole data set on disk: fixed-size records in memory-mapped shards."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from latentdiff.errors import InputError

MANIFEST = "manifest.json"
INDEX = "index.parquet"


@dataclass(frozen=True)
class CacheKey:
    """What the records are a function of, and their shape. Two equal keys make equal caches."""

    encoder: str
    """sha256 of the autoencoder's weights and configuration."""
    tokenizer: str
    """sha256 of the tokenizer's file."""
    source: str
    """sha256 of the data set's description and preprocessing."""
    precision: str
    """Arithmetic that it was encoded in: "no" is fp32."""
    count: int
    """Samples."""
    shard_size: int
    """Samples in each shard but the last."""
    latent_shape: tuple[int, int, int]
    """[C, h, w]."""
    tokens: int
    """Token ids of each caption."""

    @property
    def digest(self) -> str:
        """sha256 of the key."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def samples(self, shard: int) -> range:
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.count))


@dataclass(frozen=True)
class Records:
    """Some samples: posterior mean and log-variance [B, C, h, w] fp16, token ids [B, L] int32."""

    mean: np.ndarray
    logvar: np.ndarray
    ids: np.ndarray
    captions: list[str]


def prepare(directory: Path, key: CacheKey) -> None:
    """Make the directory, or accept one begun with the same key.

    Raises InputError when it holds another cache.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "key.json"
    mine = json.loads(json.dumps(asdict(key)))
    if path.exists():
        theirs = _read_json(path)
        if differing := sorted(name for name in mine if mine[name] != theirs.get(name)):
            raise InputError(
                f"{directory} holds a cache with another {', '.join(differing)}; "
                "delete it or choose another run_dir."
            )
        return
    _write(path, (json.dumps(mine, indent=1) + "\n").encode())


def missing_shards(directory: Path, key: CacheKey) -> list[int]:
    """Shards that are still to be written."""
    return [n for n in range(key.shards) if not _part(directory, n, "captions.parquet").exists()]


def write_shard(directory: Path, number: int, records: Records) -> None:
    """Write one shard's files, each staged and renamed, the captions last: they mark it whole."""
    moments = np.stack([records.mean, records.logvar], axis=1)
    _save_array(_part(directory, number, "moments.npy"), moments)
    _save_array(_part(directory, number, "ids.npy"), records.ids)
    target = _part(directory, number, "captions.parquet")
    staged = target.with_suffix(f".{os.getpid()}")
    pq.write_table(pa.table({"caption": records.captions}), staged)
    _publish(staged, target)


def finish(directory: Path, key: CacheKey) -> None:
    """Write the index and, last, the manifest.

    Raises InputError while shards are missing, and when one is damaged.
    """
    if left := missing_shards(directory, key):
        raise InputError(f"{directory} lacks {len(left)} of {key.shards} shards; run again.")
    tables = []
    for number in range(key.shards):
        _open_shard(directory, key, number)
        captions = _read_captions(_part(directory, number, "captions.parquet"))
        samples = key.samples(number)
        if len(captions) != len(samples):
            raise _damaged(_part(directory, number, "captions.parquet"))
        tables.append(
            pa.table(
                {
                    "key": pa.array(samples, pa.int64()),
                    "shard": pa.array([number] * len(samples), pa.int32()),
                    "row": pa.array(range(len(samples)), pa.int32()),
                    "caption": captions,
                }
            )
        )
    staged = directory / f"{INDEX}.{os.getpid()}"
    pq.write_table(pa.concat_tables(tables), staged)
    _publish(staged, directory / INDEX)
    _write(directory / MANIFEST, (json.dumps(asdict(key), indent=1) + "\n").encode())


class LatentCache:
    """A finished cache, read by sample number.

    Raises InputError when the directory holds no finished cache, and on reading a shard that is
    missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        if not (directory / MANIFEST).is_file():
            raise InputError(
                f"{directory} holds no finished latent cache; run training.cache_latents."
            )
        values = _read_json(directory / MANIFEST)
        try:
            key = CacheKey(**{**values, "latent_shape": tuple(values["latent_shape"])})
        except (KeyError, TypeError):
            raise _damaged(directory / MANIFEST) from None
        self.directory, self.key = directory, key
        self._shard = functools.lru_cache(maxsize=None)(
            functools.partial(_open_shard, directory, key)
        )

    def __len__(self) -> int:
        return self.key.count

    def read(self, samples: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """mean and log-variance [B, C, h, w] fp32, token ids [B, L] int64.

        Raises IndexError for a number outside range(len(self)).
        """
        if not all(0 <= sample < len(self) for sample in samples):
            raise IndexError(f"The cache holds samples 0 to {len(self) - 1}.")
        places = [divmod(sample, self.key.shard_size) for sample in samples]
        moments = np.stack([self._shard(shard)[0][row] for shard, row in places])
        ids = np.stack([self._shard(shard)[1][row] for shard, row in places])
        mean, logvar = torch.from_numpy(moments).float().unbind(dim=1)
        return mean, logvar, torch.from_numpy(ids).long()

    def captions(self) -> list[str]:
        """Every caption in sample order."""
        captions: list[str] = _read_captions(self.directory / INDEX).to_pylist()
        return captions


def _open_shard(directory: Path, key: CacheKey, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Posterior moments [N, 2, C, h, w] fp16 and token ids [N, L] int32, memory-mapped."""
    count = len(key.samples(number))
    moments, ids = _part(directory, number, "moments.npy"), _part(directory, number, "ids.npy")
    return (
        _open_array(moments, (count, 2, *key.latent_shape), np.float16),
        _open_array(ids, (count, key.tokens), np.int32),
    )


def _open_array(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    try:
        values: np.ndarray = np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
    except Exception:  # NumPy parses headers with Python's own parser: its errors are of any kind
        raise _damaged(path) from None
    if (values.shape, values.dtype) != (shape, np.dtype(dtype)):
        raise _damaged(path)
    return values


def _read_captions(path: Path) -> pa.ChunkedArray:
    try:
        return pq.read_table(path)["caption"]
    except (OSError, pa.ArrowException, KeyError):
        raise _damaged(path) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise _damaged(path)
    return values


def _damaged(path: Path) -> InputError:
    shard = path.name.startswith("shard-")
    whole = path.with_name(path.name.split(".")[0] + ".*") if shard else path.parent
    return InputError(
        f"{path} is missing or damaged; delete {whole} and run training.cache_latents again."
    )


def _part(directory: Path, number: int, name: str) -> Path:
    return directory / f"shard-{number:05d}.{name}"


def _save_array(target: Path, values: np.ndarray) -> None:
    staged = target.with_suffix(f".{os.getpid()}")
    with staged.open("wb") as file:
        np.save(file, values, allow_pickle=False)
    _publish(staged, target)


def _write(target: Path, content: bytes) -> None:
    staged = target.with_suffix(f".{os.getpid()}")
    staged.write_bytes(content)
    _publish(staged, target)


def _publish(staged: Path, target: Path) -> None:
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(staged, target)
