"""Frechet distances between features, and what they would be of infinitely many pictures.

Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule" (FID); Dowson and Landau 1982
(the distance between two Gaussians); Chong and Forsyth 2020, "Effectively Unbiased FID and
Inception Score and where to find them" (FID at infinity).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from latentdiff.errors import InputError
from latentdiff.metrics.arrays import Features, Taken, blocks


@dataclass(frozen=True, eq=False)
class Moments:
    """What the Frechet distance asks of features: their number, mean and scatter, in float64.

    scatter [D, D] is the sum over rows of (x - mean)(x - mean)^T. Published statistics (mu, sigma)
    of n pictures are Moments(n, mu, (n - 1) * sigma).
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: Features, chunk: int = 4096) -> Moments:
        """The moments of features [N, D], read once, in order.

        Time 2 N D^2 flops; memory two blocks of chunk x D and four of D x D in float64, whatever
        N. Raises InputError for values that are not finite.
        """
        width = features.shape[1]
        total = cls(0, np.zeros(width), np.zeros((width, width)))
        for block in blocks(features, chunk):
            mean = block.mean(axis=0)
            centred = block - mean
            total = total.merge(cls(len(block), mean, centred.T @ centred))
        return total

    def merge(self, other: Moments) -> Moments:
        """The moments of both lots of rows together: Chan, Golub and LeVeque 1979.

        Raises InputError when the rows are of different lengths.
        """
        _check_one_space(self, other)
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = np.outer(shift, shift * (self.count * other.count / count))
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased estimate, [D, D], as np.cov has it; raises InputError for under two rows."""
        if self.count < 2:
            raise InputError(
                f"A Frechet distance takes two pictures or more on each side, not {self.count}."
            )
        return self.scatter / (self.count - 1)

    @cached_property
    def root(self) -> np.ndarray:
        """[D, rank] with root root^T = covariance: an eigendecomposition, kept once computed.

        Eigenvalues that rounding cannot tell from 0 are left out: the square root of one such
        error, 1e-16 of the largest, would be 1e-8 of it, and with fewer rows than dimensions there
        are D - N + 1 of them.
        """
        values, vectors = np.linalg.eigh(self.covariance)
        kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return np.sqrt(values[kept]) * vectors[:, kept]


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), Heusel 2017 eq. 6; at least 0.

    With S = R R^T the eigenvalues of S_a S_b are the squared singular values of R_a^T R_b, so the
    trace of the root is their plain sum (torchmetrics sums roots of eigenvalues of S_a S_b,
    clean-fid takes scipy's sqrtm of it and adds 1e-6 to the diagonals of singular ones). Nothing
    is complex, no matrix needs to be regular, and ranks may be low: fewer rows than dimensions
    are as exact as more.

    Time of the order of 20 D^3 flops, less what `Moments.root` has kept; memory about six D x D in
    float64. Raises InputError for fewer than two rows or different lengths of them.
    """
    _check_one_space(a, b)
    between = np.square(a.mean - b.mean).sum()
    within = np.trace(a.covariance) + np.trace(b.covariance)
    shared = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum()
    return max(float(between + within - 2 * shared), 0.0)


@dataclass(frozen=True)
class Point:
    """The Frechet distance of a subset of so many rows."""

    count: int
    distance: float


@dataclass(frozen=True)
class Infinite:
    """The line distance = value + slope / N through points: `value` is FID at infinity."""

    value: float
    slope: float
    points: tuple[Point, ...]


def frechet_bias(
    features: Features, reference: Moments, sizes: Sequence[int] | None = None, seed: int = 0
) -> tuple[Point, ...]:
    """The distance of features [N, D] from the reference at growing subset sizes: FID_N.

    Each subset is drawn anew without replacement, keyed by (seed, size); rows are read from the
    file in order. sizes: None for 15 even steps from N / 10 to N, which are the paper's own 5,000
    to 50,000. Time: that of `Moments.of` for sum(sizes) rows and of one `frechet_distance` a size;
    memory as theirs and 8 N bytes. Raises InputError for sizes below 2 or above N.
    """
    total = features.shape[0]
    chosen = np.linspace(total / 10, total, 15).astype(int).tolist() if sizes is None else sizes
    points = []
    for size in sorted({int(size) for size in chosen}):
        if not 2 <= size <= total:
            raise InputError(
                f"There is no subset of {size} of {total} pictures to take a Frechet distance of; "
                f"give sizes from 2 to {total}."
            )
        rng = np.random.Generator(np.random.PCG64([seed, size]))
        rows = np.sort(rng.choice(total, size, replace=False, shuffle=False))
        moments = Moments.of(Taken(features, rows))
        points.append(Point(size, frechet_distance(moments, reference)))
    return tuple(points)


def frechet_at_infinity(
    features: Features, reference: Moments, sizes: Sequence[int] | None = None, seed: int = 0
) -> Infinite:
    """FID of infinitely many pictures: least squares of FID_N against 1/N, at 1/N = 0.

    Chong and Forsyth 2020 and their score_infinity.py: FID_N is biased upwards by
    slope / N, and the slope depends on the model, so models compare by the intercept. The law holds
    where N is well above D; the reference's own finite number is not corrected for. Arguments, cost
    and errors are `frechet_bias`'s; at least two different sizes, or InputError.
    """
    points = frechet_bias(features, reference, sizes, seed)
    if len(points) < 2:
        raise InputError("A line through FID against 1/N takes two sizes or more.")
    inverse = [1 / point.count for point in points]
    slope, value = np.polyfit(inverse, [point.distance for point in points], 1)
    return Infinite(float(value), float(slope), points)


def _check_one_space(a: Moments, b: Moments) -> None:
    if a.mean.shape != b.mean.shape:
        raise InputError(
            f"Features of {len(a.mean)} and of {len(b.mean)} dimensions do not compare; both must "
            "come from one extractor."
        )
