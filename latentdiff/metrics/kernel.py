"""Maximum mean discrepancies between features: KID and CMMD."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from latentdiff.errors import InputError
from latentdiff.metrics.arrays import Features, Taken, blocks, check_alike, unit


def kid(
    x: Features, y: Features, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel Inception distance: (mean, standard deviation) of MMD^2 over pairs of random subsets.

    Binkowski et al. 2018, "Demystifying MMD GANs": k(x, y) = (x . y / D + 1)^3 and the unbiased
    MMD^2 of Gretton et al. 2012, eq. 3, so values around and below 0 are those of like features.
    Subsets are drawn without replacement, keyed by (seed, subset); the deviation divides by
    `subsets`, as in torchmetrics' KernelInceptionDistance. It is between subsets and no interval of
    the mean: it depends on how large they are.

    x, y: [N, D] and [M, D]. Time 6 subset_size^2 D flops a subset, whatever N; memory two subsets
    and four kernels in float64: 65 MB at 1,000 x 2,048. Raises InputError when a side has fewer
    rows than subset_size.
    """
    if subset_size < 2 or subsets < 1:
        raise InputError("KID takes one subset or more, of two rows or more.")
    check_alike(x, y, subset_size)
    values = []
    for number in range(subsets):
        rng = np.random.Generator(np.random.PCG64([seed, number]))
        a, b = (_subset(features, subset_size, rng) for features in (x, y))
        values.append(_unbiased_mmd(a, b))
    return float(np.mean(values)), float(np.std(values))


def _subset(features: Features, size: int, rng: np.random.Generator) -> np.ndarray:
    rows = np.sort(rng.choice(features.shape[0], size, replace=False, shuffle=False))
    (block,) = blocks(Taken(features, rows), size)
    return block


def _unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    size, width = x.shape

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        base = a @ b.T / width + 1
        return base * base * base  # NumPy's ** 3 is slower than the product

    def off_diagonal(values: np.ndarray) -> float:
        return (values.sum() - np.trace(values)) / (size * (size - 1))

    return off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()


def cmmd(
    x: Features, y: Features, sigma: float = 10.0, scale: float = 1000.0, chunk: int = 2048
) -> float:
    """CLIP MMD: scale * MMD^2 of unit vectors under the kernel exp(-|x - y|^2 / (2 sigma^2)).

    Jayasumana et al. 2024, "Rethinking FID"; as in google-research/cmmd/distance.py the biased,
    minimum-variance estimator (Gretton et al. 2012, eq. 5): means over all pairs, each vector with
    itself among them. Their CLIP gives unit vectors; rows are scaled to length 1 here.

    x, y: [N, D] and [M, D]. Time 2 (N^2 + N M + M^2) D flops; memory four blocks of chunk x D and
    two kernels of chunk x chunk in float64, whatever N. Raises InputError for a vector of length 0.
    """
    check_alike(x, y, 1)

    def kernel(dots: np.ndarray) -> np.ndarray:
        return np.exp((dots - 1) / sigma**2)

    same = _mean_kernel(x, x, kernel, chunk) + _mean_kernel(y, y, kernel, chunk)
    return scale * (same - 2 * _mean_kernel(x, y, kernel, chunk))


def _mean_kernel(
    x: Features, y: Features, kernel: Callable[[np.ndarray], np.ndarray], chunk: int
) -> float:
    total = 0.0
    for a in blocks(x, chunk):
        rows = unit(a)
        for b in blocks(y, chunk):
            total += float(kernel(rows @ unit(b).T).sum())
    return total / (x.shape[0] * y.shape[0])
