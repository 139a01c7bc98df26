"""What dedup knows of each downloaded picture: size, hashes and thumbnails, kept shard by shard."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentdiff.data.decode import UnreadableImage, decode
from latentdiff.data.locked import IMAGES, Tars
from latentdiff.errors import InputError
from latentdiff.model_files import staged_file
from training.laion.phash import SIDE, VIEWS, difference, phash, views

FEATURES = "dedup"
"""Folder of what is kept, beside images/. It may be deleted, and is made again."""
VERSION = 1
"""Of how features are computed."""
SUCCESS = "success"
"""img2dataset's status of a sample whose picture is in the tar."""
OPENED = 256
"""Files of thumbnails that a process keeps mapped."""
MAX_ASPECT_STEP = 0.2
"""Difference of log aspect ratios above which two views are not compared."""
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("sha256", pa.string()),
        ("reason", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("hashes", pa.list_(pa.uint64(), VIEWS)),
        ("aspects", pa.list_(pa.float32(), VIEWS)),
    ]
)
"""reason: why a picture that was downloaded cannot be used; none for others."""


def shards(directory: Path) -> list[str]:
    """Names of the shards that are downloaded. Raises InputError when there are none."""
    stats = (directory / IMAGES).glob("*_stats.json")
    found = sorted(path.name.removesuffix("_stats.json") for path in stats)
    if not found:
        raise InputError(f"{directory / IMAGES} holds no pictures; run the step download first.")
    return found


def read_shard(directory: Path, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The downloader's table of a shard, by key. Raises InputError when it is damaged."""
    try:
        path = directory / IMAGES / f"{shard}.parquet"
        table = pq.read_table(path, columns=None if columns is None else list(columns))
        return table.sort_by("key")
    except (OSError, KeyError, pa.ArrowException):
        raise _damaged(directory, shard) from None


def _damaged(directory: Path, shard: str) -> InputError:
    return InputError(
        f"{directory / IMAGES}/{shard}.parquet is missing or damaged; delete {shard}_stats.json "
        "beside it and run the step download again."
    )


def count_rows(directory: Path, shard: str) -> int:
    """Samples of a shard, downloaded or not. Raises InputError when its table is damaged."""
    try:
        return pq.read_metadata(directory / IMAGES / f"{shard}.parquet").num_rows
    except (OSError, pa.ArrowException):
        raise _damaged(directory, shard) from None


def read_features(directory: Path, shard: str) -> pa.Table:
    """Of SCHEMA, a row for each picture that was downloaded."""
    return pq.read_table(_path(directory, shard))


def describe(directory: Path, shard: str) -> None:
    """Write a shard's features, unless they are there."""
    table = read_shard(directory, shard, ("key", "status", "sha256"))
    table = table.filter(pc.equal(table["status"], SUCCESS)).select(["key", "sha256"])
    rows = list(zip(table["key"].to_pylist(), table["sha256"].to_pylist(), strict=True))
    identity = hashlib.sha256(repr((VERSION, rows)).encode()).hexdigest()
    path = _path(directory, shard)
    if path.is_file() and _thumbnails_path(directory, shard).is_file():
        if (pq.read_schema(path).metadata or {}).get(b"of") == identity.encode():
            return
    tars = Tars(directory / IMAGES) if rows else None
    described = [_of(tars, key, sha256) for key, sha256 in rows]  # type: ignore[arg-type]
    thumbnails = np.zeros((len(rows), VIEWS, SIDE, SIDE, 3), np.uint8)
    for row, (seen, *_) in enumerate(described):
        thumbnails[row] = seen
    features = pa.table(
        {
            "key": [key for key, _ in rows],
            "sha256": [sha256 for _, sha256 in rows],
            "reason": [reason for *_, reason in described],
            "width": [width for _, _, width, _, _ in described],
            "height": [height for _, _, _, height, _ in described],
            "hashes": phash(thumbnails).tolist(),
            "aspects": [aspects.tolist() for _, aspects, *_ in described],
        },
        SCHEMA.with_metadata({"of": identity}),
    )
    with (
        staged_file(_thumbnails_path(directory, shard)) as staged,
        staged.open("wb") as file,
    ):
        np.save(file, thumbnails)
    with staged_file(path) as staged:
        pq.write_table(features, staged)


def _of(tars: Tars, key: str, sha256: str) -> tuple[np.ndarray, np.ndarray, int, int, str | None]:
    """Thumbnails, aspects, width, height, and why there are none."""
    try:
        data = tars.read(key)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise UnreadableImage("damaged")
        image = decode(data)
    except UnreadableImage as error:
        empty = np.zeros((VIEWS, SIDE, SIDE, 3), np.uint8)
        return empty, np.zeros(VIEWS, np.float32), 0, 0, error.reason
    return *views(image), *image.size, None


class Thumbnails:
    """The thumbnails of all shards, mapped as they are needed, by shard and row."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self.directory, self.names = directory, list(names)
        self._mapped = functools.lru_cache(maxsize=OPENED)(self._map)

    def _map(self, shard: int) -> np.ndarray:
        mapped: np.ndarray = np.load(
            _thumbnails_path(self.directory, self.names[shard]), mmap_mode="r"
        )
        return mapped

    def read(self, shard: np.ndarray, row: np.ndarray) -> np.ndarray:
        """uint8 [N, VIEWS, SIDE, SIDE, 3]."""
        found = np.empty((len(shard), VIEWS, SIDE, SIDE, 3), np.uint8)
        for number in np.unique(shard).tolist():
            here = np.flatnonzero(shard == number)
            found[here] = self._mapped(number)[row[here]]
        return found


def differences(
    directory: Path, names: Sequence[str], first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """phash.difference in each view, [P, VIEWS], of pictures (shard, row) int64 [P, 2]."""
    thumbnails = Thumbnails(directory, names)
    found = np.empty((len(first), VIEWS), np.float32)
    for start in range(0, len(first), 4096):
        here = slice(start, start + 4096)
        a, b = (thumbnails.read(*each[here].T) for each in (first, second))
        for view in range(VIEWS):
            found[here, view] = difference(a[:, view], b[:, view])
    return found


def _path(directory: Path, shard: str) -> Path:
    return directory / FEATURES / f"{shard}.parquet"


def _thumbnails_path(directory: Path, shard: str) -> Path:
    return directory / FEATURES / f"{shard}.npy"
