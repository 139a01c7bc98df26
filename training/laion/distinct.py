"""Rows laid down on the disk until it is known which of them came before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

PARTITIONS = 256
"""Files of ids. What one holds is sorted in memory: at a billion rows some 200 MB."""
ENTRY = np.dtype([("id", "<u8"), ("row", "<i8")])


class Spill:
    """Rows in order, and their ids in PARTITIONS files by the ids' first byte.

    Duplicates are found partition by partition, so memory is that of the largest of them and one
    bit a row; the disk holds every row once, and 16 bytes more.

    Args:
        folder: exists and is empty; who made it removes it.
        schema: of the rows; a column `id` is a uniform uint64.
        id_column: its name.
    """

    def __init__(self, folder: Path, schema: pa.Schema, id_column: str) -> None:
        self.rows = 0
        self._id = id_column
        self._path = folder / "rows.arrow"
        self._partitions = [folder / f"ids-{number:03d}" for number in range(PARTITIONS)]
        self._open = ExitStack()
        self._files = [self._open.enter_context(path.open("wb")) for path in self._partitions]
        sink = self._open.enter_context(pa.OSFile(str(self._path), "wb"))
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._writer = self._open.enter_context(pa.ipc.new_stream(sink, schema, options=options))

    def __enter__(self) -> Spill:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def append(self, batch: pa.RecordBatch) -> None:
        """Lay down the next rows."""
        if not len(batch):
            return
        self._writer.write_batch(batch)
        entries = np.empty(len(batch), ENTRY)
        entries["id"] = batch[self._id].to_numpy()
        entries["row"] = np.arange(self.rows, self.rows + len(batch))
        self.rows += len(batch)
        partition = (entries["id"] >> np.uint64(56)).astype(np.uint8)
        entries = entries[np.argsort(partition, kind="stable")]
        ends = np.cumsum(np.bincount(partition, minlength=PARTITIONS))
        for file, piece in zip(self._files, np.split(entries, ends[:-1]), strict=True):
            file.write(piece.tobytes())

    def repeated(self) -> tuple[np.ndarray, int]:
        """Which rows have the id of an earlier one: a bit for each, lowest first, and how many."""
        bits, count = np.zeros(-(-self.rows // 8), np.uint8), 0
        for file, path in zip(self._files, self._partitions, strict=True):
            file.flush()
            entries = np.fromfile(path, ENTRY)
            order = np.argsort(entries["id"], kind="stable")
            ids = entries["id"][order]
            rows = entries["row"][order[1:][ids[1:] == ids[:-1]]]
            np.bitwise_or.at(bits, rows >> 3, np.left_shift(1, rows & 7).astype(np.uint8))
            count += len(rows)
        return bits, count

    def distinct(self, repeated: np.ndarray) -> Iterator[pa.RecordBatch]:
        """The rows in order, without those; nothing can be appended any more."""
        self._open.close()
        first = 0
        with pa.OSFile(str(self._path), "rb") as source, pa.ipc.open_stream(source) as reader:
            for batch in reader:
                last = first + len(batch)
                bits = np.unpackbits(repeated[first >> 3 : -(-last // 8)], bitorder="little")
                drop = bits[first & 7 :][: len(batch)].astype(bool)
                yield batch.filter(pa.array(~drop)) if drop.any() else batch
                first = last
