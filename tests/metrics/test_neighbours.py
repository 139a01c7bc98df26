"""Nearest neighbours against scipy's tree; memorization against the Mann-Whitney test."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import KDTree
from scipy.stats import mannwhitneyu

from latentdiff.errors import InputError
from latentdiff.metrics import neighbours
from latentdiff.metrics.neighbours import memorization, nearest


@given(
    st.integers(0, 25), st.integers(1, 25), st.integers(1, 6), st.integers(1, 60), st.integers(0)
)
def test_the_nearest_is_a_trees_whatever_the_block(
    count: int, total: int, width: int, block: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    queries = rng.normal(100, 1, (count, width)).astype(np.float32)
    training = rng.normal(100, 1, (total, width)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "BLOCK_VALUES", block)
        found = nearest(queries, training)
    distances, rows = KDTree(training).query(queries)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-12)


def test_pictures_and_memory_maps_are_searched_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    training = np.memmap(tmp_path / "pictures", np.uint8, "w+", shape=(40, 3, 8, 8))
    training[:] = rng.integers(0, 256, training.shape)
    pictures = training[[7, 31]].copy()
    pictures[1, 0, 0, 0] ^= 3
    found = nearest(pictures, training)
    assert found.rows.tolist() == [7, 31]
    changed = abs(int(pictures[1, 0, 0, 0]) - int(training[31, 0, 0, 0]))
    assert found.distances.tolist() == [0, changed]


def test_memory_is_that_of_blocks_however_many_rows_and_few_values() -> None:
    queries = np.random.default_rng(0).normal(size=(3000, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "BLOCK_VALUES", 1 << 14)
        tracemalloc.start()
        found = nearest(queries, queries)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert found.distances.max() == 0
    # Numbers and distances of the rows, in parts and whole; three blocks of 128 KiB; and change.
    assert peak < 6 * 8 * 3000 + 4 * 8 * (1 << 14) + 100_000


def test_the_first_of_equals_is_named() -> None:
    training = np.array([[1.0], [0.0], [2.0], [0.0]])
    assert nearest(np.array([[0.0], [2.0]]), training).rows.tolist() == [1, 2]


def test_rows_that_do_not_compare_are_refused() -> None:
    with pytest.raises(InputError, match=r"\[2, 3\] and \[2, 4\] do not compare"):
        nearest(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(InputError, match="there must be training rows"):
        nearest(np.ones((2, 3)), np.ones((0, 3)))
    with pytest.raises(InputError, match="not finite"):
        nearest(np.ones((2, 3)), np.full((2, 3), np.inf))


distances = st.lists(st.integers(0, 12), min_size=1, max_size=30)


@given(distances, distances)
def test_closer_is_the_mann_whitney_statistic(drawn: list[int], real: list[int]) -> None:
    found = memorization(np.array(drawn, float), np.array(real, float))
    pairs = len(drawn) * len(real)
    assert found.closer == pytest.approx(float(mannwhitneyu(real, drawn).statistic) / pairs)
    naive = sum(d < np.percentile(real, 1) for d in drawn) / len(drawn)
    assert found.near == pytest.approx(naive)


def test_copies_are_told_from_a_model_that_draws_like_the_data() -> None:
    rng = np.random.default_rng(0)
    training, held_out, drawn = (rng.normal(size=(n, 8)) for n in (3000, 1000, 1000))
    real = nearest(held_out, training).distances
    honest = memorization(nearest(drawn, training).distances, real)
    # Under the null Delta_T has the deviation sqrt((n + m + 1) / (12 n m)), and the share a
    # binomial's, with the quantile's own: four of each.
    assert honest.closer == pytest.approx(0.5, abs=4 * (2001 / 12e6) ** 0.5)
    assert honest.near == pytest.approx(0.01, abs=4 * (2 * 0.01 * 0.99 / 1000) ** 0.5)
    drawn[:50] = training[:50]
    some = memorization(nearest(drawn, training).distances, real)
    assert some.near >= 0.05
    assert memorization(nearest(training[:100], training).distances, real).closer == 1.0


def test_distances_are_needed_of_both() -> None:
    with pytest.raises(InputError, match="held-out"):
        memorization(np.ones(3), np.empty(0))
