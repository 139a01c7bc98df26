"""The samplers step by step against diffusers' schedulers, with a fixed nonlinear network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from torch import Tensor
from torch.testing import assert_close

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.parameterization import PARAMETERIZATIONS
from latentdiff.diffusion.samplers import ddim, ddpm, dpmpp_2m, euler
from latentdiff.diffusion.schedule import Schedule, Spacing

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = Schedule(DDPMScheduler(**SD).alphas_cumprod)
SHAPE = (2, 3, 4, 5)
predictions = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])


def fresh_noise(index: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + index))


NOISE = fresh_noise(-1)


def toy_network(x: Tensor, timestep: Tensor, cond: Any = None) -> Tensor:
    """Fixed and nonlinear; every output depends on three places of x and on the timestep."""
    time = timestep.reshape(-1, 1, 1, 1) / 1000
    return torch.tanh(1.3 * x + 0.5 * x.roll(1, -1) * torch.cos(3 * time) - 0.4 * x.roll(1, 1))


def toy_denoiser(prediction: str) -> Denoiser:
    return Denoiser(toy_network, SCHEDULE, PARAMETERIZATIONS[prediction])


def theirs(
    scheduler: Any, x: Tensor, sigmas: Tensor, step: Callable[..., Any] | None = None
) -> list[Tensor]:
    """x after each step of a diffusers scheduler, in the coordinates x0 + sigma noise.

    The schedulers of variance-preserving coordinates are given x / sqrt(1 + sigma^2) instead of
    their own first draw; Euler works in ours, and would begin at sigma_max noise with "trailing",
    where x_T ~ N(0, I) begins at sqrt(1 + sigma_max^2) noise.
    """
    preserving = not isinstance(scheduler, EulerDiscreteScheduler)
    scale = (1 + sigmas**2).sqrt() if preserving else torch.ones_like(sigmas)
    sample = x / scale[0]
    states = []
    assert len(scheduler.timesteps) == len(sigmas) - 1
    for index, timestep in enumerate(scheduler.timesteps):
        output = toy_network(scheduler.scale_model_input(sample, timestep), timestep)
        extra = {} if step is None else step(index)
        sample = scheduler.step(output, timestep, sample, **extra).prev_sample
        states.append(sample * scale[index + 1])
    return states


def assert_same_steps(ours: Any, expected: list[Tensor]) -> None:
    for step, state in zip(ours, expected, strict=True):
        assert_close(step.x, state, rtol=2e-4, atol=2e-4)


def start(count: int, spacing: Spacing = "trailing", offset: int = 0) -> tuple[Tensor, Tensor]:
    sigmas = SCHEDULE.sampling_sigmas(count, spacing, offset)
    return (1 + sigmas[0] ** 2).sqrt() * NOISE, sigmas


CASES = [
    (20, "trailing", 0),
    (25, "trailing", 0),
    (40, "trailing", 0),
    (50, "trailing", 0),
    (30, "leading", 1),
    (25, "leading", 0),
]


@predictions
@pytest.mark.parametrize(("count", "spacing", "offset"), CASES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_diffusers_ddim(
    prediction: str, count: int, spacing: Spacing, offset: int, eta: float
) -> None:
    """Its last step ends at alphas_cumprod 1, as equation 12 of Song et al. (2021) defines it."""
    scheduler = DDIMScheduler(
        **SD,
        prediction_type=prediction,
        timestep_spacing=spacing,
        steps_offset=offset,
        clip_sample=False,
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(count)
    x, sigmas = start(count, spacing, offset)
    expected = theirs(
        scheduler, x, sigmas, lambda i: {"eta": eta, "variance_noise": fresh_noise(i)}
    )
    ours = ddim(toy_denoiser(prediction), x, sigmas, noise=fresh_noise, eta=eta)
    assert_same_steps(ours, expected)


@predictions
@pytest.mark.parametrize("count", [7, 30, 48])
def test_ddim_where_the_steps_do_not_divide_the_schedule(prediction: str, count: int) -> None:
    """diffusers' DDIM steps from t to t - T // N, which then is not the timestep it visits next.

    The paper steps from tau_i to tau_{i-1}, the timesteps visited (Song et al. 2021, section 4.2).
    So does the first-order DPM-Solver++, which is DDIM (Lu et al. 2022).
    """
    x, sigmas = start(count)
    scheduler = DPMSolverMultistepScheduler(
        **SD, prediction_type=prediction, solver_order=1, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(timesteps=SCHEDULE.sampling_timesteps(count).tolist())
    assert_same_steps(ddim(toy_denoiser(prediction), x, sigmas), theirs(scheduler, x, sigmas))


@predictions
@pytest.mark.parametrize(("count", "spacing", "offset"), [*CASES, (7, "trailing", 0)])
def test_euler_is_diffusers_euler(
    prediction: str, count: int, spacing: Spacing, offset: int
) -> None:
    scheduler = EulerDiscreteScheduler(
        **SD, prediction_type=prediction, timestep_spacing=spacing, steps_offset=offset
    )
    scheduler.set_timesteps(count)
    x, sigmas = start(count, spacing, offset)
    assert_same_steps(euler(toy_denoiser(prediction), x, sigmas), theirs(scheduler, x, sigmas))


@predictions
@pytest.mark.parametrize("count", [2, 7, 10, 20, 25, 30, 50])
def test_dpmpp_2m_is_diffusers_dpm_solver(prediction: str, count: int) -> None:
    """With final_sigmas_type "zero" its last step is of first order for any number of steps."""
    scheduler = DPMSolverMultistepScheduler(
        **SD,
        prediction_type=prediction,
        timestep_spacing="trailing",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(count)
    x, sigmas = start(count)
    assert_same_steps(dpmpp_2m(toy_denoiser(prediction), x, sigmas), theirs(scheduler, x, sigmas))


@predictions
@pytest.mark.parametrize(("count", "offset"), [(10, 0), (25, 1)])
def test_dpmpp_2m_on_leading_timesteps(prediction: str, count: int, offset: int) -> None:
    """diffusers' DPM-Solver divides T by N + 1 for "leading", unlike its other schedulers and
    Table 2 of Lin et al. (2023); given our timesteps, it takes our steps.
    """
    scheduler = DPMSolverMultistepScheduler(
        **SD, prediction_type=prediction, final_sigmas_type="zero"
    )
    x, sigmas = start(count, "leading", offset)
    timesteps = SCHEDULE.sampling_timesteps(count, "leading", offset)
    scheduler.set_timesteps(timesteps=timesteps.tolist())
    assert_same_steps(dpmpp_2m(toy_denoiser(prediction), x, sigmas), theirs(scheduler, x, sigmas))


@predictions
@pytest.mark.parametrize(("count", "spacing", "offset"), [*CASES, (30, "trailing", 0)])
def test_ddpm_is_diffusers_ddpm(prediction: str, count: int, spacing: Spacing, offset: int) -> None:
    """With the same noise. Its variance is "fixed_small", equation 7 of Ho et al. (2020)."""
    scheduler = DDPMScheduler(
        **SD,
        prediction_type=prediction,
        timestep_spacing=spacing,
        steps_offset=offset,
        clip_sample=False,
        variance_type="fixed_small",
    )
    scheduler.set_timesteps(count)
    x, sigmas = start(count, spacing, offset)
    expected = theirs(
        scheduler, x, sigmas, lambda i: {"generator": torch.Generator().manual_seed(100 + i)}
    )
    ours = ddpm(toy_denoiser(prediction), x, sigmas, noise=fresh_noise)
    assert_same_steps(ours, expected)
