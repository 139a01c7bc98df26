"""Precision, recall, density and coverage by the papers' definitions and closed forms."""

from __future__ import annotations

import tracemalloc
from dataclasses import astuple
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.errors import InputError
from latentdiff.metrics.manifold import PRDC, prdc


def naive(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """Whole matrices of distances, as clovaai/generative-evaluation-prdc has them."""

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        differences = a[:, None].astype(np.float64) - b[None].astype(np.float64)
        return np.sqrt(np.square(differences).sum(axis=2))

    real_radii = np.sort(distances(real, real), axis=1)[:, k]
    fake_radii = np.sort(distances(fake, fake), axis=1)[:, k]
    between = distances(real, fake)
    return (
        (between < real_radii[:, None]).any(axis=0).mean(),
        (between < fake_radii[None]).any(axis=1).mean(),
        (between < real_radii[:, None]).sum(axis=0).mean() / k,
        (between.min(axis=1) < real_radii).mean(),
    )


@settings(max_examples=80, deadline=None)
@given(
    rows=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    k=st.integers(1, 6),
    chunk=st.integers(1, 50),
    shift=st.floats(0, 3),
    seed=st.integers(0, 2**32),
)
def test_equals_the_definition(
    rows: tuple[int, int], k: int, chunk: int, shift: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    k = min(k, min(rows) - 1)
    real = rng.normal(size=(rows[0], 5)).astype(np.float32)
    fake = rng.normal(loc=shift, scale=0.8, size=(rows[1], 5)).astype(np.float32)
    np.testing.assert_allclose(astuple(prdc(real, fake, k, chunk)), naive(real, fake, k))


@settings(max_examples=80, deadline=None)
@given(
    rows=st.tuples(st.integers(7, 30), st.integers(7, 30)),
    k=st.integers(1, 6),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_equals_the_definition_where_ties_and_copies_abound(
    rows: tuple[int, int], k: int, chunk: int, seed: int
) -> None:
    """Places on a small grid: every distance is exact in the oracle."""
    rng = np.random.default_rng(seed)
    real, fake = (rng.integers(-2, 3, size=(count, 2)).astype(np.float32) for count in rows)
    np.testing.assert_allclose(astuple(prdc(real, fake, k, chunk)), naive(real, fake, k))


@pytest.mark.parametrize("chunk", [13, 64, 2048])
def test_a_set_against_its_own_copy(chunk: int) -> None:
    """Itself and k - 1 neighbours lie within each open ball, the k-th on its edge: density 1.

    Rounding differs from block to block, and from pair to copied pair.
    """
    rng = np.random.default_rng(0)
    real = (rng.exponential(size=(150, 300)) + 5).astype(np.float32)
    assert prdc(real, rng.permutation(real), 4, chunk) == PRDC(1.0, 1.0, 1.0, 1.0)


def test_balls_around_copies_are_empty() -> None:
    rng = np.random.default_rng(0)
    real = np.repeat((rng.exponential(size=(6, 300)) + 5).astype(np.float32), 5, axis=0)
    assert prdc(real, real, k=4, chunk=8) == PRDC(0.0, 0.0, 0.0, 0.0)


def test_modes_left_out_and_modes_made_up() -> None:
    rng = np.random.default_rng(0)
    here, there = rng.normal(size=(2, 100, 3)), rng.normal(loc=50, size=(2, 100, 3))
    both = np.concatenate([here[0], there[0]])
    dropped, invented = prdc(both, here[1]), prdc(here[1], both)
    assert dropped.precision > 0.9
    assert 0.4 < dropped.recall <= 0.5
    assert 0.4 < dropped.coverage <= 0.5
    assert 0.4 < invented.precision <= 0.5
    assert invented.recall > 0.9
    assert invented.coverage > 0.8
    assert prdc(here[0], there[0]) == PRDC(0.0, 0.0, 0.0, 0.0)


def test_an_outlier_raises_precision_more_than_density() -> None:
    """Naeem et al. 2020, figure 2: its ball reaches over everything."""
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(200, 3)), rng.normal(loc=9, size=(200, 3))
    before = prdc(real, fake)
    after = prdc(np.concatenate([real, [[18.0, 18.0, 18.0]]]), fake)
    assert before == PRDC(0.0, 0.0, 0.0, 0.0)
    assert after.precision > 0.95
    assert after.density <= 1 / 5


def test_expectations_of_one_distribution() -> None:
    """Naeem et al. 2020, section 3: density 1 and coverage 1 - prod (N - i) / (N + M - i)."""
    rng = np.random.default_rng(0)
    rows, others, k = 60, 40, 3
    found = [prdc(rng.normal(size=(rows, 3)), rng.normal(size=(others, 3)), k) for _ in range(150)]
    coverage = 1 - prod((rows - i) / (rows + others - i) for i in range(1, k + 1))
    for values, expected in (
        ([each.density for each in found], 1.0),
        ([each.coverage for each in found], coverage),
    ):
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / np.sqrt(len(found))


def test_files_and_no_matrix_of_all_pairs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(2, 2000, 4)).astype(np.float32)
    files = np.memmap(tmp_path / "features", np.float32, "w+", shape=arrays.shape)
    files[:] = arrays
    tracemalloc.start()
    found = prdc(files[0], files[1], chunk=100)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_500_000  # of 32,000,000 bytes for one
    np.testing.assert_allclose(astuple(found), astuple(prdc(arrays[0], arrays[1])))


def test_too_few_rows_are_refused() -> None:
    x = np.zeros((6, 2))
    with pytest.raises(InputError, match="at least 7"):
        prdc(x, x, k=6)
    with pytest.raises(InputError, match="1 or more"):
        prdc(x, x, k=0)
    with pytest.raises(InputError, match="shapes"):
        prdc(x, x[:, 1:], k=2)
