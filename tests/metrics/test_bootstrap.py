"""Intervals by scipy's bootstrap and Wilson interval, and how often they hold the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.errors import InputError
from latentdiff.metrics.bootstrap import Interval, interval, mean_interval, share_interval
from latentdiff.metrics.frechet import Moments, frechet_distance

# Statistics


def mean_difference(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean(x) - np.mean(y))


def test_a_statistic_of_two_samples() -> None:
    """Each is resampled by itself: variances add."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=400), rng.normal(loc=3, scale=2, size=900)
    found = interval(mean_difference, x, y, level=0.9, resamples=400)
    error = np.sqrt(x.var() / 400 + y.var() / 900)
    np.testing.assert_allclose((found.low + found.high) / 2, x.mean() - y.mean())
    np.testing.assert_allclose(found.high - found.low, 2 * 1.6449 * error, rtol=0.12)


def reference() -> Moments:
    return Moments(1000, np.zeros(12), 999 * np.eye(12))


def distance(features: np.ndarray) -> float:
    return frechet_distance(Moments.of(features), reference())


def test_features_of_a_file_are_resampled_by_rows(tmp_path: Path) -> None:
    file = np.memmap(tmp_path / "features", np.float32, "w+", shape=(80, 12))
    file[:] = np.random.default_rng(0).normal(size=(80, 12))
    held = np.array(file)
    drawn: list[np.ndarray] = []

    def kept(features: np.ndarray) -> float:
        drawn.append(np.asarray(features))
        return distance(features)

    found = interval(kept, file, resamples=5, seed=2)
    assert len(drawn) == 6
    np.testing.assert_array_equal(drawn[0], held)
    rows = {row.tobytes() for row in held}
    for resample in drawn[1:]:
        assert resample.shape == held.shape
        distinct = {row.tobytes() for row in resample}
        assert distinct < rows
        assert 0.45 < len(distinct) / 80 < 0.8  # 1 - 1/e
    error = np.std([distance(resample) for resample in drawn[1:]], ddof=1)
    np.testing.assert_allclose(found.high - found.low, 2 * 1.959964 * error, rtol=1e-6)


def test_resamples_of_a_frechet_distance_lie_above_it_and_its_interval_holds_the_truth() -> None:
    """The truth: the mean of the figure over many samples of the same size."""
    rng = np.random.default_rng(0)
    truth = np.mean([distance(rng.normal(size=(100, 12))) for _ in range(400)])
    held, percentiles_hold = 0, 0
    for seed in range(60):
        features = rng.normal(size=(100, 12))
        values: list[float] = []

        def kept(taken: np.ndarray, values: list[float] = values) -> float:
            values.append(distance(taken))
            return values[-1]

        found = interval(kept, features, resamples=25, seed=seed)
        held += found.low < truth < found.high
        percentiles_hold += np.quantile(values[1:], 0.025) < truth
    assert held >= 0.85 * 60
    assert percentiles_hold <= 0.3 * 60


def test_a_known_value_is_not_computed_again() -> None:
    values = np.random.default_rng(0).normal(size=30)
    counted: list[int] = []

    def mean(taken: np.ndarray) -> float:
        counted.append(len(taken[:]))
        return float(np.mean(taken))

    found = interval(mean, values, resamples=4, value=float(values.mean()))
    assert len(counted) == 4
    assert found == interval(mean, values, resamples=4)


def test_groups_keep_their_numbers() -> None:
    """Strata: the error is that within groups, and each is resampled by itself."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 300), rng.normal(50, 3, 100)])
    groups = [range(300), range(300, 400)]
    shares: list[float] = []

    def mean(taken: np.ndarray) -> float:
        shares.append(float((taken[:] > 25).mean()))
        return float(np.mean(taken))

    found = interval(mean, values, resamples=400, groups=groups)
    assert set(shares) == {0.25}
    error = np.sqrt(300 * values[:300].var() + 100 * values[300:].var()) / 400
    np.testing.assert_allclose(found.high - found.low, 2 * 1.96 * error, rtol=0.12)
    percentile = mean_interval(values, resamples=1000, groups=groups)
    np.testing.assert_allclose(percentile.high - percentile.low, 2 * 1.96 * error, rtol=0.12)


# Means


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32))
def test_means_like_scipy(seed: int) -> None:
    values = np.random.default_rng(seed).exponential(size=60)
    found = mean_interval(values, level=0.8, resamples=1000)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, confidence_level=0.8, n_resamples=1000, method="percentile", rng=seed
    ).confidence_interval
    tolerance = 0.25 * values.std() / np.sqrt(60)
    np.testing.assert_allclose([found.low, found.high], expected, atol=tolerance)


def test_means_are_keyed_by_their_seed() -> None:
    values = np.random.default_rng(0).normal(size=50)
    found = mean_interval(values, resamples=100, seed=1)
    assert mean_interval(values, resamples=100, seed=1) == found
    assert mean_interval(values, resamples=100, seed=2) != found
    assert found.low < values.mean() < found.high
    assert mean_interval(np.full(9, 2.5), resamples=10) == Interval(2.5, 2.5)


# Shares


@given(st.integers(1, 3000), st.floats(0, 1), st.floats(0.5, 0.999))
def test_shares_are_wilsons(count: int, share: float, level: float) -> None:
    successes = round(share * count)
    found = share_interval(successes, count, level)
    expected = scipy.stats.binomtest(successes, count).proportion_ci(level, method="wilson")
    np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-9, atol=1e-12)
    assert 0 <= found.low <= successes / count <= found.high <= 1


def test_all_right_leaves_room_for_doubt() -> None:
    assert share_interval(500, 500) == Interval(pytest.approx(0.99237, abs=1e-5), 1.0)


# Refusals


def test_what_has_no_interval_is_refused() -> None:
    values = np.arange(4.0)
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(InputError, match="between 0 and 1"):
            mean_interval(values, level)
        with pytest.raises(InputError, match="between 0 and 1"):
            share_interval(1, 2, level)
    with pytest.raises(InputError, match="two resamples"):
        interval(np.mean, values, resamples=1)
    with pytest.raises(InputError, match="no pictures"):
        interval(mean_difference, values, values[:0])
    for successes, count in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(InputError, match="not a share"):
            share_interval(successes, count)
