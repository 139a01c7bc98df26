"""Precision, recall, density and coverage: how far two sets of features lie within each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from latentdiff.errors import InputError
from latentdiff.metrics.arrays import Features, blocks, check_alike

# Of the largest squared length: a hundred times what rounding does to a squared distance.
TIE = 1e-12


@dataclass(frozen=True)
class PRDC:
    """Precision, recall and coverage are shares; density is at least 0 and may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: Features, fake: Features, k: int = 5, chunk: int = 2048) -> PRDC:
    """Each vector's ball reaches to the k-th nearest other vector of its own set. Then

    precision: the share of fake vectors in some real ball (Kynkaanniemi et al. 2019, eq. 2);
    recall: the share of real vectors in some fake ball (same);
    density: the real balls around a fake vector, on average, divided by k (Naeem et al. 2020),
        which one outlier among the real vectors cannot raise much;
    coverage: the share of real vectors whose ball holds a fake vector (same).

    Balls are open and k is 5, as in clovaai/generative-evaluation-prdc, so ties count as outside;
    the code of Kynkaanniemi et al. has closed balls and k = 3. Distances are exact in float64 but
    for rounding, within which they count as tied: copies of a vector are at distance 0.

    real, fake: [N, D] and [M, D]. Time 2 (N^2 + N M + M^2) D flops and as many sweeps of the
    blocks' distances; memory three blocks of chunk x D, three of chunk x chunk in float64
    and 10 (N + M) bytes. Raises InputError unless both have more than k rows.
    """
    if k < 1:
        raise InputError(f"k counts nearest neighbours: 1 or more, not {k}.")
    check_alike(real, fake, k + 1)
    real_radii, fake_radii = _squared_radii(real, k, chunk), _squared_radii(fake, k, chunk)
    tie = TIE * max(_largest_square(real, chunk), _largest_square(fake, chunk))
    precise = np.zeros(fake.shape[0], dtype=bool)
    recalled, covered = (np.zeros(real.shape[0], dtype=bool) for _ in range(2))
    dense = 0
    for rows, columns, squares in _squared_distances(real, fake, chunk):
        in_real = squares < real_radii[rows, None] - tie
        in_fake = squares < fake_radii[None, columns] - tie
        precise[columns] |= in_real.any(axis=0)
        covered[rows] |= in_real.any(axis=1)
        recalled[rows] |= in_fake.any(axis=1)
        dense += int(in_real.sum())
    return PRDC(
        precision=float(precise.mean()),
        recall=float(recalled.mean()),
        density=dense / (k * fake.shape[0]),
        coverage=float(covered.mean()),
    )


def _squared_radii(features: Features, k: int, chunk: int) -> np.ndarray:
    """The squared distance of each row [N] to the k-th nearest other row."""
    radii = np.empty(features.shape[0])
    nearest = np.empty((0, k))
    for rows, columns, squares in _squared_distances(features, features, chunk):
        if columns.start == 0:
            nearest = np.full((len(squares), k), np.inf)
        if rows == columns:
            np.fill_diagonal(squares, np.inf)
        nearest = np.partition(np.hstack([nearest, squares]), k - 1, axis=1)[:, :k]
        radii[rows] = nearest[:, -1]
    return radii


def _squared_distances(
    x: Features, y: Features, chunk: int
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """|x_i - y_j|^2 in blocks: rows of x, rows of y, and the block; y runs fastest."""
    row = 0
    for a in blocks(x, chunk):
        column = 0
        for b in blocks(y, chunk):
            squares = a @ b.T
            squares *= -2
            squares += _squares(a)[:, None]
            squares += _squares(b)
            yield slice(row, row + len(a)), slice(column, column + len(b)), squares
            column += len(b)
        row += len(a)


def _squares(rows: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", rows, rows)


def _largest_square(features: Features, chunk: int) -> float:
    return max(float(_squares(block).max()) for block in blocks(features, chunk))
