"""KID by torchmetrics and by the definition, CMMD by its authors' formula."""

from __future__ import annotations

import tracemalloc
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from latentdiff.errors import InputError
from latentdiff.metrics.kernel import cmmd, kid

# KID


def two_sets(size: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, size, width))
    return x.astype(np.float32), (0.8 * y + 0.3).astype(np.float32)


def naive_kid(x: np.ndarray, y: np.ndarray) -> float:
    """Gretton et al. 2012, eq. 3, pair by pair, with Binkowski et al.'s kernel."""
    size, width = x.shape

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a.astype(np.float64) @ b.astype(np.float64)) / width + 1) ** 3

    within = sum(
        kernel(z[i], z[j]) for z in (x, y) for i in range(size) for j in range(size) if i != j
    )
    between = sum(kernel(a, b) for a, b in product(x, y))
    return within / (size * (size - 1)) - 2 * between / size**2


def test_kid_is_the_definition() -> None:
    """With subsets of everything, each is the same."""
    x, y = two_sets(30, 7)
    mean, deviation = kid(x, y, subsets=3, subset_size=30)
    np.testing.assert_allclose(mean, naive_kid(x, y), rtol=1e-11)
    assert deviation < 1e-12


class Itself(nn.Module):
    """The feature extractor of what are features already."""

    num_features = 48

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all:UserWarning")
def test_kid_equals_torchmetrics() -> None:
    x, y = two_sets(200, 48)
    with torch.random.fork_rng():
        metric = KernelInceptionDistance(feature=Itself(), subsets=1, subset_size=200)
        metric.update(torch.from_numpy(x).double(), real=True)
        metric.update(torch.from_numpy(y).double(), real=False)
        expected, _ = metric.compute()
    mean, _ = kid(x, y, subsets=1, subset_size=200)
    np.testing.assert_allclose(mean, float(expected), rtol=1e-9)


def test_kid_of_subsets() -> None:
    """Subsets keyed by their number: the first two give each other's mean and deviation."""
    x, y = two_sets(60, 5)
    first, _ = kid(x, y, subsets=1, subset_size=20, seed=4)
    mean, deviation = kid(x, y, subsets=2, subset_size=20, seed=4)
    np.testing.assert_allclose(deviation, abs(first - mean), rtol=1e-9)
    assert deviation > 0
    assert kid(x, y, subsets=2, subset_size=20, seed=5) != (mean, deviation)
    # An unbiased estimate of the whole sample's, a sample's mean of 400 draws.
    mean, deviation = kid(x, y, subsets=400, subset_size=20)
    assert abs(mean - naive_kid(x, y)) < 4 * deviation / np.sqrt(400)


def test_kid_of_gaussians_in_closed_form() -> None:
    """In one dimension MMD^2 = 3 d1^2 + 3 d2^2 + d3^2 with d_j the differences of raw moments."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20_000, 1)), rng.normal(loc=1, size=(20_000, 1))
    mean, _ = kid(x, y, subsets=60, subset_size=250)
    assert abs(mean - (3 * 1**2 + 3 * 1**2 + 4**2)) < 2


def test_kid_of_one_distribution_is_0_on_average() -> None:
    rng = np.random.default_rng(0)
    values = [kid(*rng.normal(size=(2, 40, 6)), subsets=1, subset_size=40)[0] for _ in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(200)
    assert min(values) < 0


def test_kid_of_files(tmp_path: Path) -> None:
    x, y = two_sets(50, 6)
    files = []
    for name, array in (("x", x), ("y", y)):
        file = np.memmap(tmp_path / name, np.float32, "w+", shape=array.shape)
        file[:] = array
        files.append(file)
    assert kid(files[0], files[1], 3, 20) == kid(x, y, 3, 20)


def test_kid_refuses_subsets_larger_than_the_sets() -> None:
    x, y = two_sets(50, 6)
    with pytest.raises(InputError, match="at least 51"):
        kid(x, y, subset_size=51)
    with pytest.raises(InputError, match="at least 50"):
        kid(x, y[:49], subset_size=50)
    with pytest.raises(InputError, match="two rows or more"):
        kid(x, y, subset_size=1)
    with pytest.raises(InputError, match="one subset or more"):
        kid(x, y, subsets=0, subset_size=10)


# CMMD


def naive_cmmd(x: np.ndarray, y: np.ndarray, sigma: float = 10, scale: float = 1000) -> float:
    """google-research/cmmd/distance.py: whole matrices of squared distances."""
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))

    def mean_kernel(a: np.ndarray, b: np.ndarray) -> float:
        squares = np.square(a[:, None] - b[None]).sum(axis=2)
        return float(np.exp(-squares / (2 * sigma**2)).mean())

    return scale * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(1, 40),
    st.sampled_from([0.5, 10.0]),
    st.integers(0, 2**32),
)
def test_cmmd_is_its_authors(rows: int, others: int, chunk: int, sigma: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(rows, 12)), rng.normal(loc=0.3, size=(others, 12))
    found = cmmd(x, y, sigma=sigma, chunk=chunk)
    np.testing.assert_allclose(found, naive_cmmd(x, y, sigma), rtol=1e-9, atol=1e-9)


def test_cmmd_by_hand() -> None:
    """Orthogonal vectors are sqrt(2) apart and opposite ones 2, whatever their lengths."""
    east, north, west = np.array([[3.0, 0.0]]), np.array([[0.0, 0.1]]), np.array([[-7.0, 0.0]])
    np.testing.assert_allclose(cmmd(east, north), 2000 * (1 - np.exp(-0.01)))
    np.testing.assert_allclose(cmmd(east, west), 2000 * (1 - np.exp(-0.02)))
    np.testing.assert_allclose(cmmd(east, 2 * east), 0, atol=1e-12)


def test_cmmd_keeps_no_matrix_of_all_pairs() -> None:
    x, y = two_sets(2000, 4)
    tracemalloc.start()
    cmmd(x, y, chunk=100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000  # of 32,000,000 bytes for one


def test_cmmd_refuses_what_has_no_direction() -> None:
    x, y = two_sets(5, 4)
    y[3] = 0
    with pytest.raises(InputError, match="length 0"):
        cmmd(x, y)
    with pytest.raises(InputError, match="too few"):
        cmmd(x, y[:0])
