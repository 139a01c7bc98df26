"""Confidence intervals of figures: what other pictures from the same model would have given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from latentdiff.errors import InputError
from latentdiff.metrics.arrays import Features, Taken


@dataclass(frozen=True)
class Interval:
    """The figure's true value lies between these with the asked probability, about."""

    low: float
    high: float


def interval(
    statistic: Callable[..., float],
    *samples: Features,
    level: float = 0.95,
    resamples: int = 50,
    seed: int = 0,
    value: float | None = None,
    groups: Sequence[range] = (),
) -> Interval:
    """statistic(*samples) plus and minus z standard errors by the bootstrap.

    Efron and Tibshirani 1993, "An Introduction to the Bootstrap": the standard normal interval
    with the bootstrap's standard error (algorithm 6.1), for which 25 to 200 resamples do. Not the
    percentile interval, because a resample holds two thirds of the rows, some of them often: a
    Frechet distance is biased upwards by slope / N, a resample's by about twice that, and the
    percentiles of resamples may lie wholly above the figure that they are to surround. The interval
    is for the figure at this N; the bias in N is `frechet_at_infinity`'s to show. (KID's unbiased
    sums are not for resampling either: a row and its copy are no two rows. Its deviation is between
    subsets, which is no interval of KID: it depends on how large they are, and not on N.)

    samples: arrays [N, ...] of N of their own, each resampled by itself; the statistic is given
    views that slice as the samples do (`Moments.of` takes one), keyed by (seed, resample), so
    memory is the statistic's own and 8 bytes a row. value: statistic(*samples), where it is known.
    groups: the rows of each kind, together all of a sample's, which are resampled by themselves
    (strata): how many there are of a kind is the protocol's choice and does not vary. Time:
    `resamples` statistics, and one for the value. Raises InputError for a level outside (0, 1),
    fewer than two resamples or an empty sample.
    """
    _check(level, resamples, samples)
    if value is None:
        value = statistic(*samples)
    spread = NormalDist().inv_cdf((1 + level) / 2) * float(
        np.std(_resampled(statistic, samples, resamples, seed, groups), ddof=1)
    )
    return Interval(value - spread, value + spread)


def mean_interval(
    values: np.ndarray,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    groups: Sequence[range] = (),
) -> Interval:
    """The percentile bootstrap interval of the mean of values [N] (a CLIP score, a PSNR in dB).

    Efron and Tibshirani 1993, chapter 13; scipy.stats.bootstrap's method="percentile". groups:
    as `interval` takes them. Time `resamples` draws of N; memory 24 N bytes. Raises InputError
    as `interval`.
    """
    _check(level, resamples, (values,))
    means = _resampled(np.mean, (values,), resamples, seed, groups)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def share_interval(successes: int, count: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share (an accuracy): exact arithmetic, nothing drawn.

    Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4. A bootstrap of 500 right of 500 would say
    [1, 1]; this says [0.992, 1]. Raises InputError unless 0 <= successes <= count and count > 0.
    """
    _check_level(level)
    if not 0 <= successes <= count or count == 0:
        raise InputError(f"{successes} of {count} is not a share.")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, weight = successes / count, z**2 / count
    centre = (share + weight / 2) / (1 + weight)
    spread = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    # The share lies between them; where it is 0 or 1 it is one of them, but for rounding.
    return Interval(max(min(centre - spread, share), 0.0), min(max(centre + spread, share), 1.0))


def _resampled(
    statistic: Callable[..., float],
    samples: tuple[Any, ...],
    resamples: int,
    seed: int,
    groups: Sequence[range],
) -> np.ndarray:
    """The statistic of each resample, [resamples]."""
    values = np.empty(resamples)
    for number in range(resamples):
        rng = np.random.Generator(np.random.PCG64([seed, number]))
        taken = [_resample(sample, rng, groups) for sample in samples]
        values[number] = statistic(*taken)
    return values


def _resample(sample: Features, rng: np.random.Generator, groups: Sequence[range]) -> Taken:
    parts = groups or [range(sample.shape[0])]
    rows = [rng.integers(part.start, part.stop, size=len(part)) for part in parts]
    return Taken(sample, np.sort(np.concatenate(rows)))


def _check(level: float, resamples: int, samples: tuple[Any, ...]) -> None:
    _check_level(level)
    if resamples < 2:
        raise InputError(f"A bootstrap takes two resamples or more, not {resamples}.")
    if any(sample.shape[0] == 0 for sample in samples):
        raise InputError("There is no interval of a figure of no pictures.")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"A confidence level lies between 0 and 1, as 0.95 does, not {level}.")
