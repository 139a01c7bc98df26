"""Which pictures are one: pairs that look alike, and who of them stays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.laion.features import MAX_ASPECT_STEP, differences
from training.laion.phash import VIEWS, candidates

PIECE = 1 << 14
"""Pairs that a process compares at a time."""
MANY = 1 << 20
"""Candidates after which they are measured; a search may add as many as there are pictures."""

Map = Callable[..., Iterator[np.ndarray]]
"""map, or that of a pool of processes."""


@dataclass(frozen=True)
class Pictures:
    """All pictures that can be used, in the order of their keys, [N] each."""

    shard: np.ndarray
    row: np.ndarray
    """In the shard's features."""
    sha256: np.ndarray
    """Of 32 bytes."""
    size: np.ndarray
    """int64 [N, 2], width and height in pixels."""
    hashes: np.ndarray
    """uint64 [N, VIEWS]."""
    aspects: np.ndarray
    """float32 [N, VIEWS]."""
    taken: np.ndarray
    """bool: what must not be used."""

    def __len__(self) -> int:
        return len(self.shard)

    def ranks(self) -> np.ndarray:
        """int64 [N]: of two that are one, that of the lower rank stays. What was taken down, so
        that it takes its copies along; the larger; the earlier key.
        """
        order = np.lexsort((np.arange(len(self)), -self.size.prod(axis=1), ~self.taken))
        ranks = np.empty(len(self), dtype=np.int64)
        ranks[order] = np.arange(len(self))
        return ranks


def exact(pictures: Pictures, ranks: np.ndarray) -> np.ndarray:
    """For each picture the one of the same sha256 that stays, [N]; itself where it does."""
    order = np.lexsort((ranks, pictures.sha256))
    ordered = pictures.sha256[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = ordered[1:] != ordered[:-1]
    stays = np.empty(len(order), dtype=np.int64)
    stays[order] = order[np.flatnonzero(first)[np.cumsum(first) - 1]] if len(order) else order
    return stays


def near(
    pictures: Pictures,
    among: np.ndarray,
    names: list[str],
    directory: Path,
    most_bits: int,
    window: int,
    most_difference: float,
    mapped: Map = map,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of `among` whose hashes are near in some view, int64 [P, 2], and how much the pictures
    differ in such a view, float32 [P], at most most_difference.
    """
    codes, measured = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.float32)]
    for block in _candidates(pictures, among, most_bits, window):
        found = as_pairs(block, len(pictures))
        differing = _differences(pictures, found, names, directory, most_bits, mapped)
        alike = differing <= most_difference
        codes.append(block[alike])
        measured.append(differing[alike])
    found, first = np.unique(np.concatenate(codes), return_index=True)
    return as_pairs(found, len(pictures)), np.concatenate(measured)[first]


def as_pairs(codes: np.ndarray, count: int) -> np.ndarray:
    """[P, 2] from first * count + second, [P]."""
    return np.stack(np.divmod(codes, max(count, 1)), axis=1)


def _differences(
    pictures: Pictures,
    pairs: np.ndarray,
    names: list[str],
    directory: Path,
    most_bits: int,
    mapped: Map,
) -> np.ndarray:
    """Of each pair in that view, of those whose hashes are near, in which it is least."""
    places = np.stack([pictures.shard, pictures.row], axis=1)
    pieces = [pairs[start : start + PIECE] for start in range(0, len(pairs), PIECE)]
    measured = mapped(
        differences,
        [directory] * len(pieces),
        [names] * len(pieces),
        [places[piece[:, 0]] for piece in pieces],
        [places[piece[:, 1]] for piece in pieces],
    )
    first, second = pairs.T
    bits = np.bitwise_count(pictures.hashes[first] ^ pictures.hashes[second])
    aspects = np.abs(pictures.aspects[first] - pictures.aspects[second])
    comparable = (bits <= most_bits) & (aspects <= MAX_ASPECT_STEP)
    least: np.ndarray = np.where(comparable, np.concatenate(list(measured)), np.inf).min(axis=1)
    return least


def _candidates(
    pictures: Pictures, among: np.ndarray, most_bits: int, window: int
) -> Iterator[np.ndarray]:
    """Pairs of `among` with near hashes in a view of like shape, first * N + second, int64 [P]: in
    blocks, in none of which a pair is twice.
    """
    waiting: list[np.ndarray] = []
    for view in range(VIEWS):
        for i, j in candidates(pictures.hashes[among, view], most_bits, window):
            first, second = among[np.minimum(i, j)], among[np.maximum(i, j)]
            aspects = np.abs(pictures.aspects[first, view] - pictures.aspects[second, view])
            waiting.append((first * len(pictures) + second)[aspects <= MAX_ASPECT_STEP])
            if sum(map(len, waiting)) > MANY:
                yield np.unique(np.concatenate(waiting))
                waiting = []
    if any(map(len, waiting)):
        yield np.unique(np.concatenate(waiting))


def alike(embeddings: np.ndarray, cosine: float, block: int = 4096) -> np.ndarray:
    """Pairs of unit vectors float32 [N, D] whose cosine is at least so large, int64 [P, 2].

    Every pair is looked at, block by block: the time goes with N squared.
    """
    found = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(embeddings), block):
        rows = embeddings[start : start + block]
        for other in range(start, len(embeddings), block):
            i, j = np.nonzero(rows @ embeddings[other : other + block].T >= cosine)
            pairs = np.stack([i + start, j + other], axis=1)
            found.append(pairs[pairs[:, 0] < pairs[:, 1]])
    return np.concatenate(found)


def stay(pairs: np.ndarray, ranks: np.ndarray) -> dict[int, int]:
    """{picture that goes: the one that stays}; no two of those that stay are a pair.

    By rank, each stays unless it goes for an earlier one: with which it is a pair, or with a pair
    of which it is one. Copies that were changed in two ways are like their original rather than
    like each other; longer chains lead to other pictures.
    """
    neighbours: dict[int, list[int]] = {}
    for i, j in pairs.tolist():
        neighbours.setdefault(i, []).append(j)
        neighbours.setdefault(j, []).append(i)
    gone: dict[int, int] = {}
    for picture in sorted(neighbours, key=lambda each: int(ranks[each])):
        if picture not in gone:
            near = neighbours[picture]
            for other in itertools.chain(near, *(neighbours[each] for each in near)):
                if other != picture:
                    gone.setdefault(other, picture)
    return gone


def groups(count: int, pairs: np.ndarray) -> np.ndarray:
    """For each of so many pictures the least one that a chain of pairs leads to, int64 [N]."""
    least: dict[int, int] = {}

    def root(each: int) -> int:
        while (above := least.get(each, each)) != each:
            least[each] = least.get(above, above)
            each = least[each]
        return each

    for i, j in pairs.tolist():
        low, high = sorted((root(i), root(j)))
        least[high] = low
    found = np.arange(count, dtype=np.int64)
    for each in list(least):
        found[each] = root(each)
    return found
