"""The noise schedule against diffusers' schedulers and Table 2 of Lin et al. (2023)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from latentdiff.diffusion.schedule import Schedule, Spacing, TimestepSpacing
from latentdiff.errors import InputError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDPM = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
SCHEDULE = Schedule.scaled_linear(0.00085, 0.012, 1000)
SPACINGS: tuple[TimestepSpacing, ...] = ("trailing", "leading", "linspace")
CONTINUOUS: tuple[Spacing, ...] = ("karras", "exponential")


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


def test_noising_in_one_shot_is_noising_step_by_step() -> None:
    """Equations 2 and 4 of Ho et al. (2020): the chain x_t = sqrt(1 - beta_t) x_{t-1} +
    sqrt(beta_t) noise_t leaves as much of x_0, and adds as much noise, as the closed form.
    """
    signal, variance = 1.0, 0.0
    for step, alpha in enumerate(SCHEDULE.alphas_cumprod.tolist()):
        beta = (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * step / 999) ** 2
        signal, variance = (1 - beta) ** 0.5 * signal, (1 - beta) * variance + beta
        assert signal == pytest.approx(alpha**0.5, rel=1e-12)
        assert variance == pytest.approx(1 - alpha, rel=1e-12)


@pytest.mark.parametrize("length", [1000, 50])
def test_squared_cosine_is_diffusers_squaredcos_cap_v2(length: int) -> None:
    """All of it: the last is 2.4e-9 for 1000 timesteps."""
    theirs = DDPMScheduler(num_train_timesteps=length, beta_schedule="squaredcos_cap_v2")
    ours = Schedule.squared_cosine(length).alphas_cumprod.float()
    assert_close(ours, theirs.alphas_cumprod, rtol=1e-3, atol=0)


@pytest.mark.parametrize("betas", [SD, DDPM], ids=["scaled_linear", "linear"])
def test_zero_terminal_snr_is_diffusers_rescaling(betas: dict[str, Any]) -> None:
    """Algorithm 1 of Lin et al. (2023), which diffusers computes on betas in fp32."""
    theirs = DDIMScheduler(**betas, rescale_betas_zero_snr=True).alphas_cumprod
    make = getattr(Schedule, betas["beta_schedule"])
    plain = make(betas["beta_start"], betas["beta_end"], 1000)
    ours = plain.zero_terminal_snr()
    assert_close(ours.alphas_cumprod.float()[:-1], theirs[:-1], rtol=1e-3, atol=0)
    assert_close(ours.alphas_cumprod[0], plain.alphas_cumprod[0])
    assert_close(ours.alphas_cumprod[-1].item(), 1e-9)
    assert len(plain.alphas_cumprod) == len(ours) == 1000


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_flow_is_diffusers_flow_matching(shift: float) -> None:
    """Its sigma is our t, sigma / (1 + sigma); its last is 1, ours 0.99997."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = Schedule.flow(shift, 1000).sigmas
    times = sigmas / (1 + sigmas)
    assert_close(times.flip(0), theirs.sigmas, rtol=0, atol=4e-5)
    assert_close(times.flip(0)[1:], theirs.sigmas[1:], rtol=1e-5, atol=0)
    assert sigmas.isfinite().all()


def test_a_flow_is_sampled_at_the_shift_of_even_times() -> None:
    """Esser et al. (2024), equation 23, as diffusers shifts the times that it is given."""
    even = torch.arange(20, 0, -1) / 20
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=even.tolist())
    sigmas = Schedule.flow(3.0, 1000).sampling_sigmas(20)
    assert_close((sigmas / (1 + sigmas))[1:], theirs.sigmas[1:], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "alphas_cumprod",
    [[0.9, 0.5, 0.5], [0.5, 0.9], [0.9, 1e-10, 0.0]],
    ids=["twice", "rising", "nothing left before the last"],
)
def test_what_does_not_fall_is_no_schedule(alphas_cumprod: list[float]) -> None:
    """Two timesteps of one sigma would leave timestep() nothing to divide by."""
    with pytest.raises(InputError, match="must fall at each timestep"):
        Schedule(torch.tensor(alphas_cumprod))


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
    assert_close(sigmas[-1], torch.tensor(31622.8))


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
def test_table_2_of_lin_et_al(spacing: TimestepSpacing, expected: list[int]) -> None:
    """T = 1000, S = 10; the paper counts timesteps from 1."""
    timesteps = SCHEDULE.sampling_timesteps(10, spacing)
    assert (timesteps.flip(0) + 1).tolist() == expected


def exact_timesteps(count: int, spacing: TimestepSpacing) -> list[Fraction]:
    """What the three spacings mean before they are rounded."""
    if spacing == "trailing":
        return [1000 - Fraction(1000 * step, count) - 1 for step in range(count)]
    if spacing == "leading":
        return [Fraction(1000 // count * step) for step in reversed(range(count))]
    return [Fraction(999 * step, max(count - 1, 1)) for step in reversed(range(count))]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_sampling_timesteps_are_those_of_diffusers(
    scheduler: type[Any], spacing: TimestepSpacing
) -> None:
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


@pytest.mark.parametrize("spacing", CONTINUOUS)
@pytest.mark.parametrize("count", [1, 2, 10, 37])
def test_continuous_spacings_are_those_of_diffusers(spacing: Spacing, count: int) -> None:
    """Over the whole schedule, as its DPM-Solver and k-diffusion have it.

    diffusers' Euler goes from the first to the last sigma of its timestep_spacing, which are the
    whole schedule's for "linspace" from two steps on.
    """
    option = {f"use_{spacing}_sigmas": True}
    solver = DPMSolverMultistepScheduler(**SD, **option, final_sigmas_type="zero")
    euler = EulerDiscreteScheduler(**SD, **option, timestep_spacing="linspace")
    ours = SCHEDULE.sampling_sigmas(count, spacing)
    for theirs in (solver, euler) if count > 1 else (solver,):
        theirs.set_timesteps(count)
        assert_close(ours, theirs.sigmas, rtol=3e-5, atol=0)


def test_karras_sigmas_are_equation_5_of_the_paper() -> None:
    """Its own range, 80 to 0.002, and rho = 7, from the schedule that has these ends."""
    ends = torch.tensor([0.002, 80.0], dtype=torch.float64)
    schedule = Schedule(1 / (1 + ends**2))
    step = torch.arange(18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + step / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert_close(schedule.sampling_sigmas(18, "karras")[:-1], expected.float())


@settings(deadline=None)
@given(st.integers(1, 1000), st.sampled_from([*SPACINGS, *CONTINUOUS]), st.integers(0, 1))
def test_sampling_sigmas_descend_to_zero(count: int, spacing: Spacing, offset: int) -> None:
    """No level twice: a multistep sampler divides by the step between two levels."""
    sigmas = SCHEDULE.sampling_sigmas(count, spacing, offset)
    assert sigmas.shape == (count + 1,)
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    assert sigmas[0] <= SCHEDULE.sigmas[-1] * (1 + 1e-6)


def test_the_offset_gives_way_where_it_leaves_the_schedule() -> None:
    """1000 steps of 1000 with steps_offset 1; diffusers asks for timestep 1000 and fails."""
    expected = torch.cat([SCHEDULE.sigmas.flip(0), torch.zeros(1)])
    assert_close(SCHEDULE.sampling_sigmas(1000, "leading", 1), expected)
