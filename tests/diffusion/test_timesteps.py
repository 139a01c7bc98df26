"""Training timesteps against SciPy's distributions and diffusers' sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import special, stats
from torch.testing import assert_close

from latentdiff.diffusion.timesteps import TimestepConfig, timesteps

GRID = (torch.arange(100_000) + 0.5) / 100_000


@settings(deadline=None)
@given(
    count=st.integers(1, 2000),
    first=st.integers(0, 2100),
    extra=st.none() | st.integers(0, 2100),
    distribution=st.sampled_from(["uniform", "logit_normal"]),
    mean=st.floats(-3, 3),
    std=st.floats(0.05, 5),
    u=st.floats(0, 1, exclude_max=True, width=32),
)
def test_they_stay_in_their_limits(
    count: int,
    first: int,
    extra: int | None,
    distribution: str,
    mean: float,
    std: float,
    u: float,
) -> None:
    last = None if extra is None else first + extra
    config = TimestepConfig(
        distribution=distribution,  # type: ignore[arg-type]
        mean=mean,
        std=std,
        first=first,
        last=last,
    )
    uniform = torch.tensor([u, 0.0, 1 - 2**-24])
    t = timesteps(uniform, count, config)
    assert t.dtype == torch.int64
    top = count - 1 if last is None else min(last, count - 1)
    assert t.min() >= min(first, top)
    assert t.max() <= top
    assert t[1] <= t[0] <= t[2]


def test_uniform_takes_every_timestep_alike() -> None:
    counts = torch.bincount(timesteps(GRID, 1000, TimestepConfig()), minlength=1000)
    assert_close(counts, torch.full((1000,), 100), atol=1, rtol=0)
    some = torch.bincount(timesteps(GRID, 1000, TimestepConfig(first=200, last=699)))
    assert len(some) == 700
    assert not some[:200].any()
    assert_close(some[200:], torch.full((500,), 200), atol=1, rtol=0)


@pytest.mark.parametrize(
    ("mean", "std", "first", "last"),
    [(0.0, 1.0, 0, 999), (-0.5, 0.7, 0, 999), (1.2, 1.6, 0, 999), (0.4, 1.0, 100, 799)],
)
def test_logit_normal_has_the_density_of_esser_et_al(
    mean: float, std: float, first: int, last: int
) -> None:
    """Equation 19 integrated over each tenth of the schedule, given the limits."""
    config = TimestepConfig(distribution="logit_normal", mean=mean, std=std, first=first, last=last)
    t = timesteps(GRID, 1000, config).numpy()
    points = (np.arange(100_000) + 0.5) / 100_000
    density = np.exp(-((special.logit(points) - mean) ** 2) / (2 * std**2))
    density /= points * (1 - points)
    density[(points < first / 1000) | (points >= (last + 1) / 1000)] = 0
    expected = density.reshape(10, -1).sum(axis=1) / density.sum()
    found = np.histogram(t, bins=10, range=(0, 1000))[0] / len(t)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_logit_normal_is_diffusers_density_for_the_same_normal_numbers() -> None:
    """sigmoid(normal) of compute_density_for_timestep_sampling, by the normal's distribution."""
    z = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (torch.sigmoid(0.3 + 1.1 * z) * 1000).long()
    config = TimestepConfig(distribution="logit_normal", mean=0.3, std=1.1)
    found = timesteps(torch.from_numpy(stats.norm.cdf(z.numpy())), 1000, config)
    assert (found - expected).abs().max() <= 1
    assert (found == expected).double().mean() > 0.999


def test_limits_out_of_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="last is 3, less than first, 5"):
        TimestepConfig(first=5, last=3)
