"""The noise schedule against diffusers' schedulers and Table 2 of Lin et al. (2023)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from latentdiff.diffusion.schedule import Schedule, Spacing

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDPM = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
SCHEDULE = Schedule.scaled_linear(0.00085, 0.012, 1000)
SPACINGS: tuple[Spacing, ...] = ("trailing", "leading", "linspace")


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("betas", [SD, DDPM], ids=["scaled_linear", "linear"])
@pytest.mark.parametrize("length", [1000, 50])
def test_alphas_cumprod_are_those_of_diffusers(
    scheduler: type[Any], betas: dict[str, Any], length: int
) -> None:
    theirs = scheduler(num_train_timesteps=length, **betas).alphas_cumprod
    make = getattr(Schedule, betas["beta_schedule"])
    ours = make(betas["beta_start"], betas["beta_end"], length)
    assert len(ours) == length
    assert_close(ours.alphas_cumprod.float(), theirs, rtol=1e-5, atol=0)


def test_sigma_is_the_noise_over_the_signal() -> None:
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) eps, divided by the factor of x0."""
    alphas_cumprod = torch.tensor([0.9, 0.5, 0.1])
    assert_close(Schedule(alphas_cumprod).sigmas, torch.tensor([1 / 3, 1.0, 3.0]))


def test_stable_diffusion_spans_the_sigmas_everyone_knows() -> None:
    """0.0292 to 14.6146: sigma_min and sigma_max of Stable Diffusion 1.x in k-diffusion."""
    ends = SCHEDULE.sigmas[[0, -1]]
    assert_close(ends, torch.tensor([0.0292, 14.6146]), rtol=1e-5, atol=5e-5)
    assert (SCHEDULE.sigmas.diff() > 0).all()


def test_zero_terminal_snr_stays_finite() -> None:
    """Lin et al. (2023) rescale until alphas_cumprod ends at 0, where sigma is infinite."""
    theirs = DDIMScheduler(**SD, rescale_betas_zero_snr=True).alphas_cumprod
    assert theirs[-1] == 0
    sigmas = Schedule(theirs).sigmas
    assert sigmas.isfinite().all()
    assert (sigmas.diff() > 0).all()
    assert_close(sigmas[:-1], torch.sqrt((1 - theirs) / theirs)[:-1])
    assert_close(sigmas[-1], torch.tensor(1e4))


@settings(deadline=None)
@given(st.floats(0, 999))
def test_timestep_inverts_sigma(timestep: float) -> None:
    exact = torch.tensor([timestep], dtype=torch.float64)
    assert_close(SCHEDULE.timestep(SCHEDULE.sigma(exact)), exact.float(), rtol=0, atol=1e-3)


@settings(deadline=None)
@given(st.floats(0.0292, 14.61))
def test_sigma_inverts_timestep(sigma: float) -> None:
    exact = torch.tensor([sigma], dtype=torch.float64)
    assert_close(SCHEDULE.sigma(SCHEDULE.timestep(exact)), exact.float(), rtol=1e-5, atol=0)


def test_whole_timesteps_give_their_own_sigma() -> None:
    assert_close(SCHEDULE.sigma(torch.arange(1000.0)), SCHEDULE.sigmas)
    timesteps = SCHEDULE.timestep(SCHEDULE.sigmas.reshape(10, 100))
    assert_close(timesteps, torch.arange(1000.0).reshape(10, 100), rtol=0, atol=1e-3)


def test_between_two_timesteps_the_logarithm_of_sigma_is_linear() -> None:
    for step in (0, 500, 998):
        below, above = SCHEDULE.sigmas[step], SCHEDULE.sigmas[step + 1]
        middle = torch.sqrt(below * above)
        assert_close(SCHEDULE.sigma(torch.tensor([step + 0.5])), middle[None])


@settings(deadline=None)
@given(st.floats(0.03, 14.6))
def test_timesteps_of_any_sigma_are_those_of_diffusers(sigma: float) -> None:
    """_sigma_to_t of diffusers, which is k-diffusion's; it works in fp32."""
    scheduler = EulerDiscreteScheduler(**SD)
    alphas_cumprod = scheduler.alphas_cumprod
    log_sigmas = torch.sqrt((1 - alphas_cumprod) / alphas_cumprod).log().numpy()
    theirs = float(scheduler._sigma_to_t(torch.tensor(sigma).numpy(), log_sigmas))
    assert_close(SCHEDULE.timestep(torch.tensor(sigma)).item(), theirs, rtol=0, atol=5e-3)


def test_sigmas_beyond_the_schedule_get_its_ends() -> None:
    timesteps = SCHEDULE.timestep(torch.tensor([1e-6, 1e6]))
    assert_close(timesteps, torch.tensor([0.0, 999.0]))


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("trailing", [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]),
        ("leading", [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]),
        ("linspace", [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000]),
    ],
)
def test_table_2_of_lin_et_al(spacing: Spacing, expected: list[int]) -> None:
    """T = 1000, S = 10; the paper counts timesteps from 1."""
    timesteps = SCHEDULE.sampling_timesteps(10, spacing)
    assert (timesteps.flip(0) + 1).tolist() == expected


def exact_timesteps(count: int, spacing: Spacing) -> list[Fraction]:
    """What the three spacings mean before they are rounded."""
    if spacing == "trailing":
        return [1000 - Fraction(1000 * step, count) - 1 for step in range(count)]
    if spacing == "leading":
        return [Fraction(1000 // count * step) for step in reversed(range(count))]
    return [Fraction(999 * step, max(count - 1, 1)) for step in reversed(range(count))]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_sampling_timesteps_are_those_of_diffusers(scheduler: type[Any], spacing: Spacing) -> None:
    """Every number of steps up to 120, among them both of what follows.

    Two things of diffusers are not copied. Its "trailing" counts down in floating point and for
    some numbers of steps ends with one too many, timestep -1. And where a timestep falls halfway
    between two whole numbers, floating point decides which of them it takes.
    """
    theirs = scheduler(**SD, timestep_spacing=spacing)
    for count in range(1, 121):
        theirs.set_timesteps(count)
        ours = SCHEDULE.sampling_timesteps(count, spacing).tolist()
        exact = exact_timesteps(count, spacing)
        assert len(ours) == count
        for place, fraction in enumerate(exact):
            assert abs(ours[place] - fraction) <= Fraction(1, 2)
            if fraction.denominator != 2:
                assert ours[place] == theirs.timesteps[place]


@pytest.mark.parametrize("count", [1, 7, 20, 25, 50, 333, 999])
def test_leading_starts_at_steps_offset(count: int) -> None:
    """Stable Diffusion 1.x: steps_offset 1."""
    theirs = DDIMScheduler(**SD, timestep_spacing="leading", steps_offset=1)
    theirs.set_timesteps(count)
    assert_close(SCHEDULE.sampling_timesteps(count, "leading", 1), theirs.timesteps)


@pytest.mark.parametrize(("spacing", "offset"), [("trailing", 0), ("leading", 0), ("leading", 1)])
@pytest.mark.parametrize("count", [1, 10, 30, 50])
def test_sampling_sigmas_are_those_of_diffusers(spacing: Spacing, offset: int, count: int) -> None:
    theirs = EulerDiscreteScheduler(**SD, timestep_spacing=spacing, steps_offset=offset)
    theirs.set_timesteps(count)
    ours = SCHEDULE.sampling_sigmas(count, spacing, offset)
    assert_close(ours, theirs.sigmas, rtol=3e-5, atol=0)


@pytest.mark.parametrize("count", [2, 10, 38, 112])
def test_linspace_sigmas_are_those_of_diffusers_where_timesteps_are_whole(count: int) -> None:
    """999 is a multiple of count - 1. diffusers' Euler visits fractional timesteps elsewhere; Lin
    et al. round them, and so do its DDIM and DDPM.
    """
    theirs = EulerDiscreteScheduler(**SD, timestep_spacing="linspace")
    theirs.set_timesteps(count)
    ours = SCHEDULE.sampling_sigmas(count, "linspace")
    assert_close(ours, theirs.sigmas, rtol=3e-5, atol=0)


@settings(deadline=None)
@given(st.integers(1, 1000), st.sampled_from(SPACINGS), st.integers(0, 1))
def test_sampling_sigmas_descend_to_zero(count: int, spacing: Spacing, offset: int) -> None:
    """No level twice: a multistep sampler divides by the step between two levels."""
    sigmas = SCHEDULE.sampling_sigmas(count, spacing, offset)
    assert sigmas.shape == (count + 1,)
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    assert sigmas[0] <= SCHEDULE.sigmas[-1]


def test_the_offset_gives_way_where_it_leaves_the_schedule() -> None:
    """1000 steps of 1000 with steps_offset 1; diffusers asks for timestep 1000 and fails."""
    expected = torch.cat([SCHEDULE.sigmas.flip(0), torch.zeros(1)])
    assert_close(SCHEDULE.sampling_sigmas(1000, "leading", 1), expected)
