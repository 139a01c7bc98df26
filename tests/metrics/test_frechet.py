"""Frechet distances by scipy, by torchmetrics, from the features' own singular values, by hand."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from latentdiff.errors import InputError
from latentdiff.metrics.frechet import (
    Moments,
    frechet_at_infinity,
    frechet_bias,
    frechet_distance,
)

DIMENSIONS = 64
SIZES = [(300, 400), (20, 30), (20, 300), (300, 20)]


def two_sets(x_rows: int, y_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features with the wide spectrum that networks' have, off the origin, float32."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(DIMENSIONS, DIMENSIONS)) * np.geomspace(1, 1e-3, DIMENSIONS)[:, None]
    x = rng.normal(size=(x_rows, DIMENSIONS)) @ mix + 1
    y = rng.normal(size=(y_rows, DIMENSIONS)) @ mix * 1.2 + 1.1
    return x.astype(np.float32), y.astype(np.float32)


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    """A sample with exactly these moments."""
    return Moments(101, mean, 100 * covariance)


def distance(x: np.ndarray, y: np.ndarray) -> float:
    return frechet_distance(Moments.of(x), Moments.of(y))


# The distance


def by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    """As clean-fid writes it."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * np.real(root))


class Itself(nn.Module):
    """The feature extractor of what are features already."""

    num_features = DIMENSIONS

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def by_torchmetrics(x: np.ndarray, y: np.ndarray) -> float:
    metric = FrechetInceptionDistance(feature=Itself())
    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(x).double(), real=True)
    metric.update(torch.from_numpy(y).double(), real=False)
    return float(metric.compute())


def by_singular_values(x: np.ndarray, y: np.ndarray) -> float:
    """From the centred features: no covariance is formed, no small eigenvalue rooted."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    between = np.square(x.mean(0) - y.mean(0)).sum()
    return between + np.square(a).sum() + np.square(b).sum() - 2 * shared


@pytest.mark.parametrize("sizes", SIZES)
def test_equals_scipy_and_torchmetrics(sizes: tuple[int, int]) -> None:
    x, y = two_sets(*sizes)
    found = distance(x, y)
    np.testing.assert_allclose(found, by_scipy(x, y), rtol=1e-6)
    np.testing.assert_allclose(found, by_torchmetrics(x, y), rtol=1e-6)
    np.testing.assert_allclose(found, by_singular_values(x, y), rtol=1e-11)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_closed_form_where_covariances_commute(seed: int, width: int) -> None:
    """|mu_a - mu_b|^2 + sum of (sqrt a_i - sqrt b_i)^2, in any basis; some variances are 0."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(width, width)))[0]
    a, b = rng.exponential(size=(2, width)) * rng.integers(0, 2, size=(2, width))
    shift = rng.normal(size=width)
    found = frechet_distance(
        gaussian(np.zeros(width), basis * a @ basis.T),
        gaussian(shift, basis * b @ basis.T),
    )
    expected = np.square(shift).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_closed_form_in_two_dimensions_where_they_do_not_commute() -> None:
    """Of 2 x 2 matrices the root's trace is sqrt(tr M + 2 sqrt(det M))."""
    a, b = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -0.5], [-0.5, 0.7]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    found = frechet_distance(gaussian(np.zeros(2), a), gaussian(np.array([3.0, 4.0]), b))
    np.testing.assert_allclose(found, 25 + np.trace(a + b) - 2 * root)


@pytest.mark.parametrize("sizes", SIZES)
def test_is_a_distance(sizes: tuple[int, int]) -> None:
    """0 to itself in whatever order, the same both ways, the mean's shift added."""
    x, y = two_sets(*sizes)
    scale = np.trace(Moments.of(x).covariance)
    assert 0 <= distance(x, x[::-1]) < 1e-12 * scale
    np.testing.assert_allclose(distance(x, y), distance(y, x), rtol=1e-12)
    np.testing.assert_allclose(distance(x, x + np.float32(0.5)), DIMENSIONS / 4, rtol=1e-5)


def test_pictures_that_are_all_alike() -> None:
    x, y = two_sets(50, 60)
    collapsed = np.repeat(y[:1], 60, axis=0)
    moments = Moments.of(x)
    expected = np.square(moments.mean - y[0]).sum() + np.trace(moments.covariance)
    np.testing.assert_allclose(distance(x, collapsed), expected)
    assert distance(collapsed, collapsed) == 0


# Moments


@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
def test_moments_of_a_file_are_numpys(chunk: int, tmp_path: Path) -> None:
    x, _ = two_sets(64, 2)
    file = np.memmap(tmp_path / "features", np.float32, "w+", shape=x.shape)
    file[:] = x
    moments = Moments.of(file, chunk)
    assert moments.count == 64
    np.testing.assert_allclose(moments.mean, x.mean(0, dtype=np.float64), rtol=1e-12)
    expected = np.cov(x.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(moments.covariance, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(moments.root @ moments.root.T, expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 2**32))
def test_merged_moments_of_any_split_are_those_of_the_whole(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(loc=100, scale=rng.exponential(size=5), size=(sum(sizes), 5))
    parts = [Moments.of(part) for part in np.split(x, np.cumsum(sizes)[:-1])]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    whole = Moments.of(x)
    assert merged.count == whole.count == len(x)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-9, atol=1e-9)


def test_moments_leave_the_features_as_they_were() -> None:
    x = np.random.default_rng(0).normal(size=(9, 3))
    before = x.copy()
    Moments.of(x)
    np.testing.assert_array_equal(x, before)


def test_a_large_mean_costs_no_digits() -> None:
    """Sums of squares less the square of sums, as torchmetrics keeps them, would lose them all."""
    x = np.random.default_rng(0).normal(size=(500, 4))
    far = Moments.of(x + 1e8, chunk=100).covariance
    np.testing.assert_allclose(far, np.cov(x, rowvar=False), atol=1e-6)


# Subsets


POPULATION = gaussian(np.zeros(32), np.eye(32))
SHIFTED = gaussian(np.full(32, 0.1), np.diag(np.linspace(0.5, 2, 32)))
TRUE_DISTANCE = 0.32 + np.square(1 - np.sqrt(np.linspace(0.5, 2, 32))).sum()


def sample(rows: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(rows, 32))
    return (SHIFTED.mean + noise * np.sqrt(np.diag(SHIFTED.covariance))).astype(np.float32)


def test_the_bias_falls_with_the_number_of_pictures() -> None:
    points = frechet_bias(sample(1000, 0), POPULATION)
    assert [point.count for point in points] == np.linspace(100, 1000, 15).astype(int).tolist()
    assert all(first.distance > second.distance for first, second in pairwise(points[::4]))
    assert points[-1].distance == frechet_distance(Moments.of(sample(1000, 0)), POPULATION)
    assert points[-1].distance > TRUE_DISTANCE


@pytest.mark.parametrize("seed", range(6))
def test_at_infinity_it_is_nearer_to_the_truth(seed: int) -> None:
    np.testing.assert_allclose(frechet_distance(POPULATION, SHIFTED), TRUE_DISTANCE)
    sizes = np.linspace(300, 1000, 8).astype(int).tolist()
    infinite = frechet_at_infinity(sample(1000, seed), POPULATION, sizes, seed)
    biased = infinite.points[-1]
    assert biased.count == 1000
    assert abs(infinite.value - TRUE_DISTANCE) < 0.6 * abs(biased.distance - TRUE_DISTANCE)


def test_the_line_is_that_of_least_squares() -> None:
    infinite = frechet_at_infinity(sample(300, 0), POPULATION, [100, 200, 150, 300, 100], seed=3)
    assert [point.count for point in infinite.points] == [100, 150, 200, 300]
    design = np.array([[1, 1 / point.count] for point in infinite.points])
    distances = [point.distance for point in infinite.points]
    line, *_ = np.linalg.lstsq(design, distances)
    np.testing.assert_allclose([infinite.value, infinite.slope], line, rtol=1e-9)


def test_subsets_are_keyed_by_seed_and_size() -> None:
    x = sample(300, 0)
    both = frechet_bias(x, POPULATION, [100, 200], seed=1)
    assert frechet_bias(x, POPULATION, [200], seed=1) == both[1:]
    assert frechet_bias(x, POPULATION, [100, 200], seed=2) != both


# Refusals


def test_what_has_no_distance_is_refused() -> None:
    x = sample(50, 0)
    moments = Moments.of(x)
    with pytest.raises(InputError, match="32 and of 31 dimensions"):
        frechet_distance(moments, Moments.of(x[:, 1:]))
    with pytest.raises(InputError, match="dimensions"):
        moments.merge(Moments.of(x[:, :1]))
    with pytest.raises(InputError, match="two pictures or more"):
        frechet_distance(moments, Moments.of(x[:1]))
    for sizes in ([1, 50], [20, 51]):
        with pytest.raises(InputError, match="from 2 to 50"):
            frechet_bias(x, moments, sizes)
    with pytest.raises(InputError, match="two sizes"):
        frechet_at_infinity(x, moments, [50, 50])
