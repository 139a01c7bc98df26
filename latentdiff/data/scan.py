"""The sizes of all pictures, read once from their headers: which bucket each belongs to."""

from __future__ import annotations

import functools
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentdiff.data.buckets import assign
from latentdiff.data.decode import UnreadableImage
from latentdiff.data.images import ImageTextSource
from latentdiff.data.store import Store, UnusableFileError
from latentdiff.errors import InputError

PART = 1 << 16
"""Pictures in one file of a scan."""
SCHEMA = pa.schema([("width", pa.int32()), ("height", pa.int32()), ("reason", pa.string())])


def scan(
    source: ImageTextSource,
    store: Store,
    rank: int = 0,
    processes: int = 1,
    progress: Callable[[int], object] = lambda pictures: None,
) -> None:
    """Write what is missing of the files scan-DIGEST-LENGTH-NNNNN.parquet: width, height, reason.

    A process takes its own share and then what is still missing of the others', so that none waits
    for another; written twice, a file has the same bytes. What a source raises but UnreadableImage
    ends it: a disk that fails is no property of a picture.
    """
    numbers = range(-(-len(source) // PART))
    mine = numbers[rank::processes]
    for number in (*mine, *(number for number in numbers if number not in mine)):
        if store.exists(_name(source, number)):
            continue
        widths, heights, reasons = [], [], []
        for index in _rows(source, number):
            try:
                (width, height), reason = source.size(index), ""
            except UnreadableImage as error:
                (width, height), reason = (0, 0), error.reason
            widths.append(width)
            heights.append(height)
            reasons.append(reason)
        table = pa.table({"width": widths, "height": heights, "reason": reasons}, SCHEMA)
        sink = io.BytesIO()
        pq.write_table(table, sink)
        store.write(_name(source, number), sink.getvalue())
        progress(len(reasons))


class Scan:
    """A finished scan, with the pictures parted into buckets of `shapes`, (width, height).

    Within a bucket pictures keep the source's order. Raises InputError when a file of the scan is
    missing or damaged.
    """

    def __init__(
        self, source: ImageTextSource, store: Store, shapes: Sequence[tuple[int, int]]
    ) -> None:
        self.source, self.store, self.shapes = source, store, list(shapes)
        self._part = functools.lru_cache(maxsize=8)(self._read)
        per_part = [
            np.bincount(self._part(number)[0] + 1, minlength=len(self.shapes) + 1)[1:]
            for number in range(-(-len(source) // PART))
        ]
        self._ends = np.cumsum(np.reshape(per_part, (-1, len(self.shapes))), axis=0)
        self.counts: list[int] = np.sum(per_part, axis=0, dtype=np.int64).reshape(-1).tolist()
        """Pictures of each bucket."""

    def rows(self, bucket: int, first: int, last: int) -> np.ndarray:
        """The source's numbers of a bucket's pictures first..last-1, int64."""
        if first >= last:
            return np.empty(0, dtype=np.int64)
        ends = self._ends[:, bucket]
        found = []
        low, high = np.searchsorted(ends, [first, last - 1], side="right").tolist()
        for number in range(low, high + 1):
            start = int(ends[number - 1]) if number else 0
            rows = np.flatnonzero(self._part(number)[0] == bucket) + number * PART
            found.append(rows[max(first - start, 0) : last - start])
        return np.concatenate(found)

    def unreadable(self) -> Iterator[tuple[int, str]]:
        """(the source's number, reason) of each picture whose header cannot be used."""
        for number in range(len(self._ends)):
            for row in np.flatnonzero(self._part(number)[0] < 0).tolist():
                yield number * PART + row, self._part(number)[1][row]

    def reasons(self) -> Counter[str]:
        """How many pictures cannot be used for each reason."""
        return Counter(reason for _, reason in self.unreadable())

    def _read(self, number: int) -> tuple[np.ndarray, list[str]]:
        """The bucket of each picture of a file, -1 for none, and the reasons."""
        name = _name(self.source, number)
        damaged = f"{self.store.url}/{name} is missing or damaged; delete it and run again."
        try:
            table = self.store.read_table(name)
        except UnusableFileError:
            raise InputError(damaged) from None
        if table.schema != SCHEMA or len(table) != len(_rows(self.source, number)):
            raise InputError(damaged)
        width, height = table["width"].to_numpy(), table["height"].to_numpy()
        reasons: list[str] = table["reason"].to_pylist()
        readable = np.array([reason == "" for reason in reasons])
        buckets = np.full(len(reasons), -1, dtype=np.int64)
        buckets[readable] = assign(width[readable], height[readable], self.shapes)
        return buckets, reasons


def _rows(source: ImageTextSource, number: int) -> range:
    return range(number * PART, min((number + 1) * PART, len(source)))


def _name(source: ImageTextSource, number: int) -> str:
    return f"scan-{source.digest[:16]}-{len(source)}-{number:05d}.parquet"
