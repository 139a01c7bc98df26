"""Reading features a block at a time and row numbers at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.errors import InputError
from latentdiff.metrics.arrays import Taken, blocks, check_alike, unit


@given(st.integers(0, 20), st.integers(1, 25))
def test_blocks_are_the_rows_in_order(count: int, size: int) -> None:
    features = np.random.default_rng(count).normal(size=(count, 3)).astype(np.float32)
    read = list(blocks(features, size))
    assert all(1 <= len(block) <= size and block.dtype == np.float64 for block in read)
    np.testing.assert_array_equal(np.concatenate([np.empty((0, 3)), *read]), features)


def test_taken_rows_of_a_file(tmp_path: Path) -> None:
    features = np.memmap(tmp_path / "features", np.float32, "w+", shape=(7, 2))
    features[:] = np.arange(14).reshape(7, 2)
    rows = np.array([6, 0, 0, 3])
    taken = Taken(features, rows)
    assert taken.shape == (4, 2)
    np.testing.assert_array_equal(taken[1:], features[[0, 0, 3]])
    np.testing.assert_array_equal(taken[np.array([3, 0])], features[[3, 6]])
    np.testing.assert_array_equal(np.asarray(taken), features[rows])
    np.testing.assert_array_equal(np.asarray(Taken(taken, np.array([2, 3]))), features[[0, 3]])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    features = np.zeros((10, 2), dtype=np.float32)
    features[7, 1] = value
    with pytest.raises(InputError, match="Rows 6 to 8 "):
        list(blocks(features, 3))


def test_what_does_not_compare_is_refused() -> None:
    check_alike(np.zeros((3, 2)), np.zeros((4, 2)), 3)
    with pytest.raises(InputError, match="shapes"):
        check_alike(np.zeros((3, 2)), np.zeros((3, 4)), 1)
    with pytest.raises(InputError, match="shapes"):
        check_alike(np.zeros(3), np.zeros(3), 1)
    with pytest.raises(InputError, match="too few"):
        check_alike(np.zeros((3, 2)), np.zeros((2, 2)), 3)


def test_unit_rows_keep_their_direction() -> None:
    rows = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_allclose(np.linalg.norm(unit(rows), axis=1), 1, rtol=1e-15)
    np.testing.assert_allclose(unit(rows) * np.linalg.norm(rows, axis=1)[:, None], rows, rtol=1e-14)
    with pytest.raises(InputError, match="length 0"):
        unit(np.zeros((1, 3)))
