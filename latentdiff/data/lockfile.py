"""The lockfile of a downloaded data set: what became of every selected sample, one row each.

A parquet file sorted by key. It says which pictures there are, by sha256, with their captions,
scores and split, and of the others why they are not there. No times are in it: the same pictures
make the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentdiff.errors import InputError
from latentdiff.model_files import staged_file

LOCKFILE = "lock.parquet"
"""Its usual name; the pictures lie in images/*.tar beside it."""

KEPT = "kept"
"""Status of a sample that is there to be trained on. Of others it is the reason why not: what
went wrong with the download, or one of"""
EXACT = "duplicate: exact"
NEAR = "duplicate: near"
CLIP = "duplicate: clip"
TOO_SMALL = "too small"
TAKEN_DOWN = "taken down"
DUPLICATES = (EXACT, NEAR, CLIP)
SPLITS = ("train", "validation")

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("sample_id", pa.string()),
        ("url", pa.string()),
        ("sha256", pa.string()),
        ("phash", pa.string()),
        ("status", pa.string()),
        ("duplicate_of", pa.string()),
        ("split", pa.string()),
        ("opt_out", pa.string()),
        ("caption", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),
        ("format", pa.string()),
        ("similarity", pa.float32()),
        ("punsafe", pa.float32()),
        ("nsfw", pa.string()),
        ("pwatermark", pa.float32()),
        ("aesthetic_v1", pa.float32()),
        ("aesthetic_v2", pa.float32()),
        ("language", pa.string()),
        ("license", pa.string()),
        ("bucket", pa.string()),
    ]
)
"""key: img2dataset's, decimal digits of one length. phash: 16 hexadecimal digits. width, height:
pixels as decoded and turned upright. bucket: such as 512x704."""
IDENTITY = ("key", "sha256", "status", "split", "caption")
"""What the digest is of."""
CARRIED = ("sample_id", "url", "sha256", "phash", "split", "opt_out", "width", "height", "bytes")
"""What every kept sample has, besides its format."""
MAX_DIGITS = 18
"""Of a key."""
ROW_GROUP = 1 << 16
MAX_METADATA_BYTES = 1 << 20
METADATA = "latentdiff"


@dataclass(frozen=True)
class LockInfo:
    """What a lockfile says of itself."""

    name: str
    """The data set's."""
    rows: int
    digest: str
    """sha256 of every row's key, sha256, status, split and caption."""
    selected: str
    """sha256 of the manifest of what was selected, without where that lies."""
    versions: dict[str, str]
    """Of the programs that made it, by name."""


def write_lockfile(
    path: Path, tables: Iterable[pa.Table], name: str, selected: str, versions: dict[str, str]
) -> LockInfo:
    """Write it whole or not at all; tables of SCHEMA, in the order of their keys.

    The bytes do not depend on how the rows are parted into tables. Raises ValueError when rows
    contradict themselves or each other, as `check_rows` says.
    """
    digest, rows, last = hashlib.sha256(), 0, ""
    with (
        staged_file(path) as staged,
        pq.ParquetWriter(staged, SCHEMA, compression="zstd", write_page_checksum=True) as writer,
    ):
        for table in _regrouped(tables):
            check_rows(table, last)
            _add(digest, table)
            writer.write_table(table)
            rows, last = rows + len(table), table["key"][-1].as_py()
        info = LockInfo(name, rows, digest.hexdigest(), selected, dict(sorted(versions.items())))
        writer.add_key_value_metadata({METADATA: json.dumps(asdict(info), sort_keys=True)})
    return info


def check_rows(table: pa.Table, after: str = "") -> None:
    """Raises ValueError when rows do not follow the key `after` in order, a kept one lacks what it
    must carry, or one that is not kept has a split.
    """
    if table.schema != SCHEMA:
        raise ValueError("these are no rows of a lockfile")
    keys = table["key"].to_pylist()
    for before, key in zip([after, *keys], keys, strict=False):
        number_of(key or "")
        if key <= before:
            raise ValueError(f"the key {key!r} does not follow {before!r}")
        if before and len(key) != len(before):
            raise ValueError(f"the keys {before!r} and {key!r} differ in length")
    if table["status"].null_count:
        raise ValueError("a row has no status")
    kept = pc.equal(table["status"], KEPT)
    for name in (*CARRIED, "format"):
        if pc.any(pc.and_(kept, pc.is_null(table[name]))).as_py():
            raise ValueError(f"a kept sample has no {name}")
    if pc.any(pc.and_(pc.invert(kept), pc.is_valid(table["split"]))).as_py():
        raise ValueError("a sample that is not kept has a split")
    if not set(table["split"].unique().to_pylist()) <= {*SPLITS, None}:
        raise ValueError(f"a split is neither {' nor '.join(SPLITS)}")
    duplicates = pc.is_in(table["status"], pa.array(DUPLICATES))
    if not pc.all(pc.equal(duplicates, pc.is_valid(table["duplicate_of"])), min_count=0).as_py():
        raise ValueError("duplicates, and no other rows, name another in duplicate_of")


def number_of(key: str) -> int:
    """A key as a number below 2**63. Raises ValueError where it is none."""
    if not (key.isascii() and key.isdecimal() and len(key) <= MAX_DIGITS):
        raise ValueError(f"{key!r} is no key")
    return int(key)


def read_info(path: str | Path) -> LockInfo:
    """What a lockfile says of itself, read from its end alone.

    Raises InputError when there is none or it is damaged.
    """
    with _opened(path) as file:
        return _info(file, path)


def read_batches(
    path: str | Path, columns: Sequence[str] | None = None, status: str | None = None
) -> Iterator[pa.Table]:
    """The rows in the order of their keys, piece by piece, all columns or some.

    status: only rows with this one. Raises InputError when there is no lockfile or it is damaged.
    """
    names = SCHEMA.names if columns is None else list(columns)
    wanted = names if status is None else [*names, "status"]
    with _opened(path) as file:
        _info(file, path)
        batches = file.iter_batches(ROW_GROUP, columns=list(dict.fromkeys(wanted)))
        while True:
            try:
                batch = next(batches, None)
            except (OSError, pa.ArrowException):
                raise _damaged(path) from None
            if batch is None:
                return
            table = pa.Table.from_batches([batch])
            if status is not None:
                table = table.filter(pc.equal(table["status"], status))
            yield table.select(names)


def read_rows(
    path: str | Path, columns: Sequence[str] | None = None, status: str | None = None
) -> pa.Table:
    """The same in one table, which is held in memory."""
    names = SCHEMA.names if columns is None else list(columns)
    schema = pa.schema([SCHEMA.field(name) for name in names])
    return pa.concat_tables([schema.empty_table(), *read_batches(path, columns, status)])


def check_lockfile(path: str | Path) -> LockInfo:
    """Read all of it. Raises InputError unless every row is sound and the digest is theirs."""
    info, digest, rows, last = read_info(path), hashlib.sha256(), 0, ""
    for table in read_batches(path):
        try:
            check_rows(table, last)
        except ValueError as error:
            raise InputError(f"{path} contradicts itself: {error}; make it again.") from None
        _add(digest, table)
        rows, last = rows + len(table), table["key"][-1].as_py()
    if (rows, digest.hexdigest()) != (info.rows, info.digest):
        raise _damaged(path)
    return info


def _add(digest: Any, table: pa.Table) -> None:
    columns = [table[name].to_pylist() for name in IDENTITY]
    digest.update("".join(json.dumps(row) + "\n" for row in zip(*columns, strict=True)).encode())


def _regrouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, ROW_GROUP at a time."""
    rest = SCHEMA.empty_table()
    for table in tables:
        rest = pa.concat_tables([rest, table])
        while len(rest) >= ROW_GROUP:
            yield rest[:ROW_GROUP].combine_chunks()
            rest = rest[ROW_GROUP:]
    if len(rest):
        yield rest.combine_chunks()


def _opened(path: str | Path) -> pq.ParquetFile:
    if not Path(path).is_file():
        raise InputError(
            f"There is no lockfile at {path}; make it with python -m training.laion dedup."
        )
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        raise _damaged(path) from None


def _info(file: pq.ParquetFile, path: str | Path) -> LockInfo:
    content = (file.metadata.metadata or {}).get(METADATA.encode(), b"")
    try:
        if len(content) > MAX_METADATA_BYTES or not file.schema_arrow.equals(SCHEMA):
            raise ValueError
        values = json.loads(content)
        info = LockInfo(**values)
        if any(
            not isinstance(values[field.name], str)
            for field in fields(info)
            if field.name not in ("rows", "versions")
        ):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise InputError(
            f"{path} is no lockfile of this version; make it with python -m training.laion dedup."
        ) from None
    return info


def _damaged(path: str | Path) -> InputError:
    return InputError(f"{path} is damaged; make it again with python -m training.laion dedup.")
