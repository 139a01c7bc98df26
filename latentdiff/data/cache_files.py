"""Writing a latent cache: shard by shard, by any number of processes that never wait."""

from __future__ import annotations

import io
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

from latentdiff.data.cache import (
    INDEX,
    KEY,
    MANIFEST,
    CacheKey,
    LatentCache,
    damaged,
    open_shard,
    part_name,
    read_object,
)
from latentdiff.data.scan import Scan
from latentdiff.data.store import Store, UnusableFileError
from latentdiff.errors import InputError

READABLE = "ok"
"""Status of a picture that has a record; of others it is the reason."""
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.int64()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("bucket", pa.int32()),
        ("source", pa.int64()),
        ("caption", pa.string()),
        ("cut", pa.int32()),
        ("sha256", pa.string()),
        ("status", pa.string()),
    ]
)
"""key is the sample's number, none where the status says why there is no record."""


@dataclass(frozen=True)
class ShardRecords:
    """What is written of a shard: the records of its readable pictures, and a row of all."""

    moments: np.ndarray
    """fp16 [N, flips, 2, C, h, w]."""
    ids: np.ndarray
    """int32 [N, towers, L]."""
    sizes: np.ndarray
    """int32 [N, 6], SDXL's size conditioning."""
    source: list[int]
    """The source's number of each picture, unreadable ones too, like the next four."""
    captions: list[str]
    cut: list[int]
    """Tokens of the caption that did not fit."""
    sha256: list[str | None]
    """Of the picture's file; None where it was drawn."""
    status: list[str]
    """READABLE, or why there is no record."""


def prepare(store: Store, key: CacheKey) -> None:
    """Begin a cache, or accept one begun with the same key.

    Raises InputError when there is another.
    """
    mine = json.loads(json.dumps(asdict(key)))
    if not store.exists(KEY):
        store.write(KEY, _dumped(mine))
    theirs = read_object(store.read_bytes(KEY), store, KEY)  # maybe of one who wrote meanwhile
    if differing := sorted(name for name in mine if mine[name] != theirs.get(name)):
        raise InputError(
            f"{store.url} holds a cache with another {', '.join(differing)}; "
            "delete it or choose another run_dir."
        )


def missing_shards(store: Store, shards: int) -> list[int]:
    """Which of so many shards are still to be written, or lack one of their files."""
    names = set(store.names())
    return [number for number in range(shards) if not names.issuperset(_parts(number))]


def is_written(store: Store, number: int) -> bool:
    """Whether both files of a shard are there."""
    return all(map(store.exists, _parts(number)))


def _parts(number: int) -> tuple[str, str]:
    return part_name(number, "safetensors"), part_name(number, "parquet")


def is_whole(store: Store) -> bool:
    """Whether the cache is finished and no file of it is missing.

    Raises InputError when its manifest is damaged.
    """
    if not (store.exists(MANIFEST) and store.exists(INDEX)):
        return False
    return not missing_shards(store, LatentCache(store.url).shards)


def write_shard(store: Store, key: CacheKey, number: int, records: ShardRecords) -> None:
    """Write one shard's two files, each whole or not at all, the table last."""
    arrays = {"moments": records.moments, "ids": records.ids, "sizes": records.sizes}
    store.write(part_name(number, "safetensors"), save(arrays, {"key": key.digest}))
    table = pa.table(
        {
            "source": pa.array(records.source, pa.int64()),
            "caption": pa.array(records.captions, pa.string()),
            "cut": pa.array(records.cut, pa.int32()),
            "sha256": pa.array(records.sha256, pa.string()),
            "status": pa.array(records.status, pa.string()),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    store.write(part_name(number, "parquet"), sink.getvalue())


def check_readable(reasons: Counter[str], count: int, max_unreadable: float) -> None:
    """Raises InputError when more than a share of `count` pictures cannot be used."""
    if reasons.total() > max_unreadable * count:
        counted = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
        raise InputError(
            f"{reasons.total()} of {count} pictures cannot be read ({counted}), more than the "
            f"share max_unreadable, {max_unreadable:g}; mend the data or raise max_unreadable."
        )


def finish(store: Store, key: CacheKey, scan: Scan, max_unreadable: float = 1.0) -> None:
    """Write the index and, last, the manifest; done twice, their bytes are the same.

    Raises InputError while shards are missing, when one on this disk is damaged, and when too many
    pictures are unreadable.
    """
    shards = key.shards(scan.counts)
    if left := missing_shards(store, len(shards)):
        raise InputError(f"{store.url} lacks {len(left)} of {len(shards)} shards; run again.")
    rows: list[list[int]] = [[] for _ in key.shapes]
    reasons, samples, cut = scan.reasons(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / INDEX
        with pq.ParquetWriter(path, INDEX_SCHEMA) as index:
            for number, shard in enumerate(shards):
                table = _read_table(store, number, shard.last - shard.first)
                status = np.array(table["status"].to_pylist())
                readable = status == READABLE
                count = int(readable.sum())
                if store.folder is not None:  # elsewhere it would be fetched for that
                    open_shard(store, key, number, shard.bucket, count)
                ordinal = np.cumsum(readable) - 1
                index.write_table(
                    _indexed(
                        table,
                        key=pa.array(ordinal + samples, pa.int64(), mask=~readable),
                        shard=pa.array(np.full(len(status), number), pa.int32(), mask=~readable),
                        row=pa.array(ordinal, pa.int32(), mask=~readable),
                        bucket=pa.array(np.full(len(status), shard.bucket), pa.int32()),
                    )
                )
                rows[shard.bucket].append(count)
                reasons.update(status[~readable].tolist())
                cut += int(np.sum(table["cut"].to_numpy()[readable] > 0))
                samples += count
            for chunk in _chunks(scan.unreadable(), 1 << 16):
                index.write_table(_indexed(_headers(chunk)))
        check_readable(reasons, key.count, max_unreadable)
        if not samples:
            raise InputError(f"{store.url}: none of {key.count} pictures can be used.")
        store.write(INDEX, path)
    manifest = {
        "key": asdict(key),
        "rows": rows,
        "unreadable": dict(sorted(reasons.items())),
        "cut": cut,
    }
    store.write(MANIFEST, _dumped(manifest))


def _read_table(store: Store, number: int, pictures: int) -> pa.Table:
    name = part_name(number, "parquet")
    try:
        table = store.read_table(name)
    except UnusableFileError:
        raise damaged(store, name) from None
    if len(table) != pictures or table.column_names != INDEX_SCHEMA.names[4:]:
        raise damaged(store, name)
    return table


def _headers(unreadable: Sequence[tuple[int, str]]) -> pa.Table:
    """Rows of pictures that no shard has, because their headers cannot be used."""
    return pa.table(
        {
            "source": pa.array([row for row, _ in unreadable], pa.int64()),
            "status": pa.array([reason for _, reason in unreadable], pa.string()),
        }
    )


def _indexed(table: pa.Table, **columns: pa.Array) -> pa.Table:
    """The columns of the index; null where neither argument has one."""
    known = {name: table[name] for name in table.column_names} | columns
    return pa.table(
        {
            field.name: known.get(field.name, pa.nulls(len(table), field.type))
            for field in INDEX_SCHEMA
        },
        INDEX_SCHEMA,
    )


def _chunks(items: Iterator[tuple[int, str]], size: int) -> Iterator[list[tuple[int, str]]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def _dumped(values: dict[str, Any]) -> bytes:
    return (json.dumps(values) + "\n").encode()
