"""Files of metadata, here or at any URL that fsspec knows, read batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from latentdiff.data.store import Store
from latentdiff.errors import InputError
from latentdiff.model_files import one_line

BATCH = 1 << 16
"""Rows read at once, of tables of text as many as fit BLOCK."""
BLOCK = 8 << 20
"""Bytes read at once."""
SEPARATORS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".parquet", *SEPARATORS)


@dataclass(frozen=True)
class MetadataFile:
    """One table."""

    url: str
    """Where it is: a path on this machine, or a URL."""
    name: str
    """The end of it, for people."""
    bytes: int
    here: bool
    """Whether it is on this machine's disk."""

    def columns(self) -> list[str]:
        """As the file calls them. Raises InputError when it is no such table."""
        with self._reading(), self._open() as file:
            if self.url.endswith(".parquet"):
                return pq.read_schema(file).names
            return self._rows_of_text(file).schema.names

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Its rows in order. A remote file is fetched first: see Store.

        Raises InputError when it is damaged.
        """
        if not self.here:
            folder, _, name = self.url.rpartition("/")
            path = str(Store(folder).local(name))
        else:
            path = self.url
        with self._reading():
            if self.url.endswith(".parquet"):
                with pq.ParquetFile(path, buffer_size=1 << 20) as table:
                    yield from table.iter_batches(BATCH, columns=list(columns))
            else:
                with open(path, "rb") as file:
                    for batch in self._rows_of_text(file):
                        yield batch.select(list(columns))

    def _rows_of_text(self, file: Any) -> pa_csv.CSVStreamingReader:
        """Every value as text, for the columns' own types to be made of it later."""
        layout = pa_csv.ParseOptions(
            delimiter=SEPARATORS[PurePosixPath(self.url).suffix], newlines_in_values=True
        )
        blocks = pa_csv.ReadOptions(block_size=BLOCK)
        start = file.tell()
        names = pa_csv.open_csv(file, read_options=blocks, parse_options=layout).schema.names
        file.seek(start)
        as_text = pa_csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            strings_can_be_null=True,
            null_values=[""],
        )
        return pa_csv.open_csv(file, blocks, layout, as_text)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        import fsspec

        with fsspec.open(self.url, "rb") as file:
            yield file

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            raise InputError(
                f"{self.url} is damaged or no table ({one_line(error)}); fetch it again, or "
                "leave it out of the metadata."
            ) from None


def find(patterns: Sequence[str]) -> list[MetadataFile]:
    """The tables that paths, folders, patterns or URLs name, those of each in the order of names.

    What is hidden in a folder (.part-0.crc, _SUCCESS) or in folders below it is left out. Raises
    InputError when one names none, or a file system is not installed.
    """
    found: dict[str, MetadataFile] = {}
    for pattern in patterns:
        files = _found(pattern)
        if not files:
            raise InputError(
                f"There are no files {', '.join(SUFFIXES)} at {pattern}; correct select.metadata."
            )
        found |= {file.url: file for file in files}
    return list(found.values())


def _found(pattern: str) -> list[MetadataFile]:
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        fs, root = url_to_fs(pattern)
        here = isinstance(fs, LocalFileSystem)
        if any(sign in root for sign in "*?["):
            paths = fs.glob(root)
        elif fs.isdir(root):
            paths = fs.find(root, maxdepth=1)
        else:
            paths = [root]
        tables = sorted(path for path in paths if _is_table(path))
        sizes = [int(fs.info(path)["size"] or 0) for path in tables]
    except FileNotFoundError:
        return []
    except (ImportError, OSError, ValueError) as error:
        raise InputError(f"{pattern} cannot be read: {one_line(error)}.") from None
    return [
        MetadataFile(
            path if here else fs.unstrip_protocol(path), PurePosixPath(path).name, size, here
        )
        for path, size in zip(tables, sizes, strict=True)
    ]


def _is_table(path: str) -> bool:
    file = PurePosixPath(path)
    return file.suffix in SUFFIXES and not file.name.startswith((".", "_"))
