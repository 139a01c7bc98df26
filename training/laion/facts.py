"""What a data card says in numbers, all of it counted from the lockfile and the selection."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.lockfile import KEPT, LOCKFILE, SPLITS, check_lockfile, read_batches
from latentdiff.errors import InputError
from latentdiff.model_files import file_digest
from training.laion.histograms import binned
from training.laion.lists import host_of
from training.laion.phash import near_any
from training.laion.selection import SELECTED, identity, read_manifest

SCORES = ("similarity", "punsafe", "pwatermark", "aesthetic_v1", "aesthetic_v2")
LOGARITHMIC = ("width", "height", "shorter_side", "aspect", "bytes")
CATEGORIES = ("format", "nsfw", "language", "license", "bucket", "opt_out", "split")
UNKNOWN = "unknown"
OPEN = ("language", "license", "domain")
"""Categories of which there may be any number."""
NAMED = 25
"""Of those, the commonest ones are counted by name."""
OTHERS = "others"
COUNTED = 1 << 20
"""Names that are counted at once; beyond twice as many the rarest are counted together."""
Columns = dict[str, pa.ChunkedArray]


def facts(directory: Path) -> dict[str, Any]:
    """Every number of the card of `directory`/lock.parquet, as plain JSON values.

    The same lockfile and selection give the same facts. Reads the lockfile column by column and
    holds at most 32 bytes a kept sample. Raises InputError when a file is missing or damaged, or
    the selection is not the one that the lockfile was made from.
    """
    path = directory / LOCKFILE
    info = check_lockfile(path)
    return {
        "name": info.name,
        "digest": info.digest,
        "versions": info.versions,
        "lockfile": {"bytes": path.stat().st_size, "sha256": file_digest(path)},
        "selection": _selection(directory, info.selected),
        "samples": info.rows,
        **_counts(path),
        "numbers": {name: _about(values, name in LOGARITHMIC) for name, values in _numbers(path)},
        "distinct_captions": _distinct(_column(path, "caption", _hashed)),
        "distinct_pictures": _distinct(_column(path, "sha256", _prefixes)),
        "domains": _distinct(_column(path, "url", lambda urls: _hashed(hosts(urls)))),
        "in_both_splits": {
            "sha256": _shared(*_by_split(path, "sha256")),
            "phash": _near(*_by_split(path, "phash")),
        },
    }


def _selection(directory: Path, sha256: str) -> dict[str, Any]:
    """What the manifest says of the selection; of the metadata files the names alone."""
    manifest = read_manifest(directory)
    if identity(manifest) != sha256:
        raise InputError(
            f"{directory / SELECTED} is not the selection that the lockfile was made from; run the "
            "steps download and dedup again."
        )
    return {
        "rows": manifest["rows"],
        "funnel": manifest["funnel"],
        "unusable": manifest["unusable"],
        "preset": manifest["preset"],
        "metadata": [
            {"name": Path(each["name"]).name, "bytes": each["bytes"], "family": each["family"]}
            for each in manifest["metadata"]
        ],
    }


def _counts(path: Path) -> dict[str, Any]:
    """How many samples there are of each kind."""
    status: Counter[str] = Counter()
    kept: dict[str, Counter[str]] = {name: Counter() for name in (*CATEGORIES, "domain")}
    carried: Counter[str] = Counter()
    size = 0
    columns = ("status", "url", "sha256", "bytes", *SCORES, *CATEGORIES)
    for table in read_batches(path, columns):
        status += _tally(table["status"])
        table = table.filter(pc.equal(table["status"], KEPT))
        for name in CATEGORIES:
            kept[name] += _tally(table[name])
        kept["domain"] += _tally(hosts(table["url"]))
        for name in OPEN:
            _bounded(kept[name])
        for name in ("sha256", "status", "opt_out", *SCORES):
            carried[name] += len(table) - table[name].null_count
        size += pc.sum(table["bytes"]).as_py() or 0
    for name in OPEN:
        kept[name] = _commonest(kept[name])
    return {
        "status": _ordered(status),
        "kept": {
            "samples": status[KEPT],
            "bytes": size,
            "carried": dict(carried),
            **{name: _ordered(counts) for name, counts in kept.items()},
        },
    }


def _numbers(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, the values known of kept samples) of each quantity, one at a time."""
    width, height = (_column(path, name, _plain) for name in ("width", "height"))
    yield "width", width
    yield "height", height
    yield "shorter_side", np.minimum(width, height)
    yield "aspect", width / height
    del width, height
    yield "bytes", _column(path, "bytes", _plain)
    yield "caption_words", _column(path, "caption", words)
    yield "caption_characters", _column(path, "caption", pc.utf8_length)
    for name in SCORES:
        yield name, _column(path, name, _plain)


def _about(values: np.ndarray, logarithmic: bool) -> dict[str, Any]:
    """Quantiles that are values themselves, to six digits, and the histogram."""
    if not len(values):
        return {"samples": 0}
    shares = {"minimum": 0.0, "low": 0.05, "median": 0.5, "high": 0.95, "maximum": 1.0}
    found = np.quantile(values, list(shares.values()), method="nearest").tolist()
    return {
        "samples": len(values),
        **{name: float(f"{value:.6g}") for name, value in zip(shares, found, strict=True)},
        "histogram": asdict(binned(values, logarithmic)),
    }


def words(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """How many words each caption has, parted by white space."""
    trimmed = pc.utf8_trim_whitespace(captions)
    counts = pc.list_value_length(pc.utf8_split_whitespace(trimmed))
    return pc.if_else(pc.equal(pc.utf8_length(trimmed), 0), 0, counts)


def hosts(urls: pa.ChunkedArray) -> pa.ChunkedArray:
    """The host of each URL, in small letters; UNKNOWN where there is none."""
    return pa.chunked_array([[host_of(url) or UNKNOWN for url in urls.to_pylist()]], pa.string())


def _column(
    path: Path,
    name: str,
    numbers: Callable[[pa.ChunkedArray], Any],
    split: str | None = None,
) -> np.ndarray:
    """Numbers of what is known in a column of the kept samples, all or those of a split."""
    found = [np.empty(0, dtype=np.int64)]
    for table in read_batches(path, list({name, "split"}), KEPT):
        if split is not None:
            table = table.filter(pc.equal(table["split"], split))
        if len(column := table[name].drop_null()):
            found.append(np.asarray(numbers(column)))
    return np.concatenate(found[1:] or found)


def _plain(column: pa.ChunkedArray) -> np.ndarray:
    values = column.to_numpy()
    return values[np.isfinite(values)]


def _hashed(texts: pa.ChunkedArray) -> np.ndarray:
    """64 bits of each text's hash."""
    hashes = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts.to_pylist())
    return np.frombuffer(b"".join(hashes), dtype=np.uint64)


def _prefixes(digits: pa.ChunkedArray) -> np.ndarray:
    """The first 64 bits of hexadecimal numbers."""
    first = pc.utf8_slice_codeunits(digits, 0, 16).to_pylist()
    return np.frombuffer(bytes.fromhex("".join(first)), dtype=np.uint64)


def _by_split(path: Path, name: str) -> list[np.ndarray]:
    return [_column(path, name, _prefixes, split).astype(np.uint64) for split in SPLITS]


def _shared(train: np.ndarray, validation: np.ndarray) -> int:
    """How many of the second hashes are among the first, which are sorted in place."""
    train.sort()
    ends = (np.searchsorted(train, validation, side) for side in ("left", "right"))
    return int(np.not_equal(*ends).sum())


def _near(train: np.ndarray, validation: np.ndarray) -> int:
    """How many of the second hashes are near one of the first."""
    return int(near_any(validation, train).sum())


def _distinct(values: np.ndarray) -> int:
    """How many are different. Sorts them in place, which is faster than hashing them."""
    values.sort()
    return int(np.count_nonzero(np.diff(values))) + bool(len(values))


def _tally(column: pa.ChunkedArray) -> Counter[str]:
    counts: Counter[str] = Counter()
    for entry in pc.value_counts(column.combine_chunks()).to_pylist():
        counts[UNKNOWN if entry["values"] is None else entry["values"]] += entry["counts"]
    return counts


def _ordered(counts: Counter[str]) -> dict[str, int]:
    """The commonest first, and by name among equals."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _bounded(counts: Counter[str]) -> None:
    """Keep the COUNTED commonest names, the rest as one."""
    if len(counts) > 2 * COUNTED:
        rarest = counts.most_common()[COUNTED:]
        for name, _ in rarest:
            del counts[name]
        counts[OTHERS] += sum(count for _, count in rarest)


def _commonest(counts: Counter[str]) -> Counter[str]:
    """The NAMED commonest names, and OTHERS."""
    ordered = list(_ordered(counts).items())
    found = Counter(dict(ordered[:NAMED]))
    if rest := sum(count for _, count in ordered[NAMED:]):
        found[OTHERS] += rest
    return found
