"""The step `dedup`: which of the downloaded pictures stay, their splits, and the lockfile."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator
from tqdm.auto import tqdm

import latentdiff
from latentdiff.config import Config
from latentdiff.data.buckets import SizesConfig, assign
from latentdiff.data.lockfile import (
    CLIP,
    EXACT,
    KEPT,
    LOCKFILE,
    NEAR,
    SCHEMA,
    TAKEN_DOWN,
    TOO_SMALL,
    LockInfo,
    write_lockfile,
)
from latentdiff.errors import InputError
from training.laion import features
from training.laion.duplicates import Map, Pictures, alike, as_pairs, exact, groups, near, stay
from training.laion.lists import NAMES, Takedown, read_takedown
from training.laion.phash import RADIUS, VIEWS, candidates, near_any
from training.laion.selection import check_download, identity, read_manifest


class DedupConfig(Config):
    """What counts as one picture twice, and what is held out."""

    processes: int = Field(default=1, gt=0)
    """That decode and compare; the lockfile does not depend on how many."""
    min_side: int = Field(default=0, ge=0)
    """Pixels of the shorter side below which a picture is too small."""
    takedown: tuple[Path, ...] = ()
    """Lists of keys, sample_ids, sha256, URLs or domains, one per line: these pictures, and those
    that look like them, are not kept."""
    hash_bits: int = Field(default=24, ge=0, le=32)
    """Of 64, in how many the hashes of one picture may differ; from 10 on that is common for
    different ones, too, and thumbnails decide."""
    max_difference: float = Field(default=0.008, ge=0, le=1)
    """How much of one thumbnail the other may leave unexplained; see phash.difference."""
    window: int = Field(default=32, gt=0)
    """Hashes next to a hash, in each of 16 orders, that it is compared with."""
    clip_model: str | None = None
    """open_clip's name of a model whose embeddings are compared, too: every one with every other,
    for up to a million pictures or so. None by default."""
    clip_weights: Path | None = None
    """Its weights, .safetensors."""
    clip_cosine: float = Field(default=0.96, gt=0, le=1)
    """Cosine of two embeddings from which on the pictures count as one."""
    clip_batch_size: int = Field(default=64, gt=0)
    """Pictures embedded together."""
    validation_share: float = Field(default=0.01, ge=0, lt=1)
    """Of the kept pictures, held out; those that look alike go together."""
    sizes: SizesConfig | None = None
    """The sizes that training will bring pictures to, for the column bucket; none by default."""

    @model_validator(mode="after")
    def _both(self) -> DedupConfig:
        if (self.clip_model is None) != (self.clip_weights is None):
            raise ValueError("clip_model and clip_weights go together")
        return self


STATUSES = (KEPT, EXACT, NEAR, CLIP, TOO_SMALL, TAKEN_DOWN)
DUPLICATE = (1, 2, 3)
"""Which of STATUSES name another picture."""
LINKED = 6
"""Times max_difference: what differs less goes into one split, though it may be no duplicate."""
MANY = 1000
"""Linked pictures beyond which they are never held out: a chain of unlike ones."""


@dataclass(frozen=True)
class Verdicts:
    """What becomes of each picture that can be used, [N], in the order of their keys."""

    keys: list[str]
    status: np.ndarray
    """int8, into STATUSES."""
    stays: np.ndarray
    """int64, the picture that stays in its place; itself where it stays."""
    validation: np.ndarray
    """bool: which split it is of, where it stays."""


def dedup(config: DedupConfig, name: str, directory: Path) -> LockInfo:
    """Write directory/lock.parquet, a row for every selected sample, and print what became of them.

    The same pictures and configuration make the same bytes. Killed, it goes on with the shards that
    it has not yet decoded. In memory it holds about 400 bytes a picture, 300 more for each pair
    that looks alike, and 200 MB. Raises InputError when the download is not finished or of another
    selection, or a list or weights cannot be used.
    """
    listed = read_takedown(config.takedown)
    manifest = read_manifest(directory)
    check_download(directory)
    rows = manifest["rows"]
    names = features.shards(directory)
    downloaded = sum(features.count_rows(directory, shard) for shard in names)
    if downloaded != rows:
        raise InputError(
            f"{directory} has the outcome of {downloaded:,} of {rows:,} selected samples; run the "
            "step download until it is finished."
        )
    with _pool(config.processes) as mapped:
        made = mapped(features.describe, [directory] * len(names), names)
        for _ in tqdm(made, total=len(names), unit="shards", desc="pictures"):
            pass
        pictures, keys, small = _read(config, directory, names, listed)
        verdicts = _judged(config, directory, names, pictures, keys, small, mapped)
    counts: Counter[str] = Counter()
    tables = _rows(config, directory, names, listed, verdicts, counts)
    versions = {
        "latentdiff": latentdiff.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "pyarrow": pa.__version__,
    }
    info = write_lockfile(directory / LOCKFILE, tables, name, identity(manifest), versions)
    print(f"{counts[KEPT]:,} of {rows:,} selected samples are kept. What became of all:")
    for status, count in counts.most_common():
        print(f"  {status:<20} {count:>12,} {count / rows:>7.2%}")
    held_out = int((verdicts.validation & (verdicts.status == 0)).sum())
    print(f"split: {counts[KEPT] - held_out:,} train, {held_out:,} validation")
    print(f"written: {directory / LOCKFILE}")
    return info


@contextmanager
def _pool(processes: int) -> Iterator[Map]:
    if processes == 1:
        yield map
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield pool.map


def _read(
    config: DedupConfig, directory: Path, names: list[str], listed: Takedown
) -> tuple[Pictures, list[str], np.ndarray]:
    """The pictures that can be used, their keys, and which are too small."""
    keys: list[str] = []
    columns: dict[str, list[np.ndarray]] = {}
    for number, shard in enumerate(names):
        table = features.read_features(directory, shard)
        usable = np.array([reason is None for reason in table["reason"].to_pylist()], dtype=bool)
        downloaded = features.read_shard(directory, shard, (*NAMES, "status"))
        downloaded = downloaded.filter(pc.equal(downloaded["status"], features.SUCCESS))
        digests = [bytes.fromhex(each) for each in table["sha256"].to_pylist()]
        found = {
            "shard": np.full(len(table), number),
            "row": np.arange(len(table)),
            "sha256": np.array(digests, dtype="S32"),
            "size": np.stack([table["width"].to_numpy(), table["height"].to_numpy()], axis=1),
            "hashes": _flat(table["hashes"]).reshape(-1, VIEWS),
            "aspects": _flat(table["aspects"]).reshape(-1, VIEWS),
            "taken": listed.holds(downloaded),
        }
        for name, values in found.items():
            columns.setdefault(name, []).append(values[usable])
        keys += table["key"].filter(pa.array(usable)).to_pylist()
    pictures = Pictures(**{name: np.concatenate(parts) for name, parts in columns.items()})
    return pictures, keys, pictures.size.min(axis=1) < config.min_side


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    values: np.ndarray = pc.list_flatten(column).to_numpy()
    return values


def _judged(
    config: DedupConfig,
    directory: Path,
    names: list[str],
    pictures: Pictures,
    keys: list[str],
    small: np.ndarray,
    mapped: Map,
) -> Verdicts:
    ranks = pictures.ranks()
    stays = exact(pictures, ranks)
    itself = np.arange(len(pictures))
    among = np.flatnonzero((stays == itself) & (~small | pictures.taken))
    linked, differences = near(
        pictures,
        among,
        names,
        directory,
        config.hash_bits,
        config.window,
        LINKED * config.max_difference,
        mapped,
    )
    by_kind = [stay(linked[differences <= config.max_difference], ranks)]
    if config.clip_model is not None and config.clip_weights is not None:
        from training.laion.clip_duplicates import embed  # and with it torch

        left = among[~np.isin(among, list(by_kind[0]))]
        vectors = embed(
            directory,
            [keys[each] for each in left],
            config.clip_model,
            config.clip_weights,
            config.clip_batch_size,
        )
        by_clip = left[alike(vectors, config.clip_cosine)]
        by_kind.append(stay(by_clip, ranks))
        linked = np.concatenate([linked, by_clip])
    status = np.where(stays == itself, 0, STATUSES.index(EXACT)).astype(np.int8)
    for kind, gone in zip((NEAR, CLIP), by_kind, strict=False):
        for each in gone:
            status[each] = STATUSES.index(kind)
        replaced = itself.copy()
        replaced[list(gone)] = list(gone.values())
        stays = replaced[stays]
    status[small] = STATUSES.index(TOO_SMALL)
    status[pictures.taken | pictures.taken[stays]] = STATUSES.index(TAKEN_DOWN)
    return Verdicts(keys, status, stays, _validation(config, pictures, linked))


def _validation(config: DedupConfig, pictures: Pictures, linked: np.ndarray) -> np.ndarray:
    """Which pictures are held out, bool [N], drawn by the least sha256 of those that are linked:
    pairs, and pictures that share a sha256 or nearly the hash of a view. None of them has a hash
    within RADIUS of that of a picture to train on.
    """
    links = [linked]
    for values in (pictures.sha256, *pictures.hashes.T):
        _, first, which = np.unique(values, return_index=True, return_inverse=True)
        again = np.setdiff1d(np.arange(len(values)), first, assume_unique=True)
        links.append(np.stack([first[which[again]], again], axis=1))
    for view in pictures.hashes.T:
        different, first = np.unique(view, return_index=True)
        codes = [np.empty(0, dtype=np.int64)]
        for i, j in candidates(different, RADIUS, config.window):
            codes.append(np.unique(np.minimum(i, j) * len(different) + np.maximum(i, j)))
        links.append(first[as_pairs(np.unique(np.concatenate(codes)), len(different))])
    group = groups(len(pictures), np.concatenate(links))
    order = np.argsort(pictures.sha256, kind="stable")
    roots, least = np.unique(group[order], return_index=True)
    bound = int(config.validation_share * 2**64)
    drawn = [_drawn(sha256) < bound for sha256 in pictures.sha256[order[least]].tolist()]
    held_out = np.zeros(len(pictures), dtype=bool)
    held_out[roots[np.array(drawn, dtype=bool)]] = True
    held_out = held_out[group] & (np.bincount(group, minlength=1)[group] <= MANY)
    hashes = pictures.hashes[:, 0]
    while (crossing := near_any(hashes[held_out], hashes[~held_out])).any():
        held_out &= ~np.isin(group, group[np.flatnonzero(held_out)[crossing]])
    return held_out


def _drawn(sha256: bytes) -> int:
    digest = hashlib.blake2b(b"split|" + sha256, digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _rows(
    config: DedupConfig,
    directory: Path,
    names: list[str],
    listed: Takedown,
    verdicts: Verdicts,
    counts: Counter[str],
) -> Iterator[pa.Table]:
    """The lockfile's rows, shard by shard; counts them by status."""
    shapes = None if config.sizes is None else config.sizes.shapes()
    picture = 0
    for shard in names:
        downloaded = features.read_shard(directory, shard)
        described = {
            row["key"]: row for row in features.read_features(directory, shard).to_pylist()
        }
        taken = listed.holds(downloaded).tolist()
        rows = []
        for given, is_taken in zip(downloaded.to_pylist(), taken, strict=True):
            row = {name: given.get(name) for name in SCHEMA.names} | EMPTY
            seen = described.get(given["key"])
            if seen is None or seen["reason"] is not None:
                reason = given["error_message"] if seen is None else seen["reason"]
                row["status"] = TAKEN_DOWN if is_taken else reason
            else:
                row |= {"width": seen["width"], "height": seen["height"]}
                row["phash"] = f"{seen['hashes'][0]:016x}"
                row["status"] = STATUSES[verdicts.status[picture]]
                if verdicts.status[picture] in DUPLICATE:
                    row["duplicate_of"] = verdicts.keys[verdicts.stays[picture]]
                if row["status"] == KEPT:
                    row["split"] = "validation" if verdicts.validation[picture] else "train"
                    if shapes is not None:
                        bucket = int(assign(row["width"], row["height"], shapes))
                        row["bucket"] = f"{shapes[bucket][0]}x{shapes[bucket][1]}"
                picture += 1
            counts[row["status"]] += 1
            rows.append(row)
        yield pa.Table.from_pylist(rows, SCHEMA)


EMPTY = dict.fromkeys(("phash", "duplicate_of", "split", "bucket", "width", "height"))
