"""A selection on the disk: selected/part-*.parquet and selected/manifest.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentdiff.errors import InputError
from latentdiff.model_files import file_digest, read_json, sync
from training.laion.columns import METADATA, SCHEMA
from training.laion.filters import ID, hexadecimal

SELECTED = "selected"
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
OF_PLACES = ("config", "inputs")
"""Entries of the manifest that change with where the metadata lie."""
DOWNLOAD = "download.json"
"""What the step download notes of the selection that images/ is of."""
ROW_GROUP = 1 << 16


def read_manifest(directory: Path) -> dict[str, Any]:
    """What select says of its selection. Raises InputError when there is none that is finished."""
    manifest = finished(directory)
    if manifest is None:
        raise InputError(f"{directory} holds no finished selection; run select first.")
    return manifest


def finished(directory: Path) -> dict[str, Any] | None:
    """The manifest of a selection all of whose files are there."""
    path = directory / SELECTED / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path, MAX_MANIFEST_BYTES)
    files = [(directory / SELECTED / part["name"], part["bytes"]) for part in manifest["parts"]]
    whole = all(file.is_file() and file.stat().st_size == size for file, size in files)
    return manifest if whole else None


def identity(manifest: Mapping[str, Any]) -> str:
    """sha256 of what was selected, wherever it lies."""
    values = {name: value for name, value in manifest.items() if name not in OF_PLACES}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def downloaded(directory: Path) -> str | None:
    """sha256 of the manifest that the pictures in images/ were downloaded by, if any were."""
    path = directory / DOWNLOAD
    return read_json(path).get("selected") if path.is_file() else None


def check_download(directory: Path) -> None:
    """Raises InputError where images/ is of another selection."""
    if downloaded(directory) not in (None, file_digest(directory / SELECTED / MANIFEST)):
        raise other_pictures(directory)


def other_pictures(directory: Path) -> InputError:
    return InputError(
        f"{directory / 'images'} holds pictures of another selection; choose another directory, or "
        f"delete images/, selected/ and {DOWNLOAD} in it and run select and download again."
    )


def write_parts(
    batches: Iterable[pa.RecordBatch], folder: Path, rows_per_part: int, limit: int | None = None
) -> int:
    """Write the first `limit` rows of SIFTED, ROW_GROUP to a row group; returns how many."""
    written, writer = 0, None
    for group in _grouped(batches, rows_per_part, limit):
        if written % rows_per_part == 0:
            if writer is not None:
                writer.close()
            path = folder / f"part-{written // rows_per_part:05d}.parquet"
            writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        assert writer is not None
        writer.write_table(group)
        written += len(group)
    if writer is not None:
        writer.close()
    return written


def _grouped(batches: Iterable[pa.RecordBatch], part: int, limit: int | None) -> Iterator[pa.Table]:
    """Rows of SCHEMA, ROW_GROUP at a time, fewer where a part or all ends."""
    waiting: list[pa.RecordBatch] = []
    done = 0

    def size() -> int:
        room = min(ROW_GROUP, part - done % part)
        return room if limit is None else min(room, limit - done)

    for batch in batches:
        ids = hexadecimal(batch[ID].to_numpy())
        arrays = [ids, *batch.select(METADATA.names).columns]
        waiting.append(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
        while size() and sum(map(len, waiting)) >= size():
            table = pa.Table.from_batches(waiting, SCHEMA)
            count = size()
            yield table.slice(0, count).combine_chunks()
            waiting = table.slice(count).to_batches()
            done += count
        if not size():
            return
    if sum(map(len, waiting)):
        yield pa.Table.from_batches(waiting, SCHEMA).combine_chunks()


def described_part(path: Path) -> dict[str, Any]:
    """What the manifest says of one file, which is on the disk thereafter."""
    sync(path)
    return {
        "name": path.name,
        "rows": pq.read_metadata(path).num_rows,
        "bytes": path.stat().st_size,
        "sha256": file_digest(path),
    }


def digest(parts: list[dict[str, Any]]) -> str:
    """sha256 of a selection: the same for the same rows in the same files."""
    lines = "".join(f"{part['rows']}|{part['sha256']}\n" for part in parts)
    return hashlib.sha256(lines.encode()).hexdigest()


def describe(manifest: dict[str, Any]) -> str:
    """The funnel of a selection, and what could not be read, for people."""
    width = max(len(line["filter"]) for line in manifest["funnel"])
    lines = [f"{'':{width}}  {'taken':>13}  {'unknown':>13}  {'left':>13}"]
    for line in manifest["funnel"]:
        counts = "".join(f"  {line[name]:>13,}" for name in ("taken", "unknown", "left"))
        lines.append(f"{line['filter']:{width}}{counts}")
    lines += [
        f"{count:,} values of {column} could not be read and count as unknown"
        for column, count in manifest["unusable"].items()
    ]
    return "\n".join(lines)


def publish(staging: Path, directory: Path) -> None:
    """The new selection in the place of an earlier one, each whole."""
    sync(staging / SELECTED / MANIFEST)
    sync(staging / SELECTED)
    target = directory / SELECTED
    if target.exists():
        target.rename(staging / "earlier")
    (staging / SELECTED).rename(target)
    sync(directory)
