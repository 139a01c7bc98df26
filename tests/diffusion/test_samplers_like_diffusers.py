"""The samplers step by step against diffusers' schedulers, with a fixed nonlinear network."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor
from torch.testing import assert_close

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.parameterization import PARAMETERIZATIONS
from latentdiff.diffusion.samplers import (
    Sampler,
    ddim,
    ddpm,
    dpm2,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_sde,
    euler,
    euler_ancestral,
    heun,
    lcm,
    unipc,
)
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


def toy_denoiser(prediction: str, schedule: Schedule = SCHEDULE) -> Denoiser:
    return Denoiser(toy_network, schedule, PARAMETERIZATIONS[prediction])


def generator(index: int) -> dict[str, Any]:
    """What makes a scheduler draw fresh_noise(index)."""
    return {"generator": torch.Generator().manual_seed(100 + index)}


def theirs(
    scheduler: Any, x: Tensor, sigmas: Tensor, step: Callable[..., Any] | None = None
) -> list[Tensor]:
    """x after each step of a diffusers scheduler, in the coordinates x0 + sigma noise.

    The schedulers of variance-preserving coordinates are given x / sqrt(1 + sigma^2) instead of
    their own first draw; Euler works in ours, and would begin at sigma_max noise with "trailing",
    where x_T ~ N(0, I) begins at sqrt(1 + sigma_max^2) noise.
    """
    exploding = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler)
    preserving = not isinstance(scheduler, exploding)
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
    expected = theirs(scheduler, x, sigmas, generator)
    ours = ddpm(toy_denoiser(prediction), x, sigmas, noise=fresh_noise)
    assert_same_steps(ours, expected)


@predictions
@pytest.mark.parametrize(("count", "spacing", "offset"), [*CASES, (7, "trailing", 0)])
def test_euler_ancestral_is_diffusers_euler_ancestral(
    prediction: str, count: int, spacing: Spacing, offset: int
) -> None:
    scheduler = EulerAncestralDiscreteScheduler(
        **SD, prediction_type=prediction, timestep_spacing=spacing, steps_offset=offset
    )
    scheduler.set_timesteps(count)
    x, sigmas = start(count, spacing, offset)
    ours = euler_ancestral(toy_denoiser(prediction), x, sigmas, noise=fresh_noise)
    assert_same_steps(ours, theirs(scheduler, x, sigmas, generator))


def theirs_in_two_stages(scheduler: Any, x: Tensor) -> list[Tensor]:
    """x after each pair of steps of a diffusers scheduler that takes two for one, and the last."""
    sample, states = x, []
    for timestep in scheduler.timesteps:
        output = toy_network(scheduler.scale_model_input(sample, timestep), timestep.float())
        sample = scheduler.step(output, timestep, sample).prev_sample
        states.append(sample)
    return [*states[1::2], states[-1]]


TWO_STAGES = [(heun, HeunDiscreteScheduler), (dpm2, KDPM2DiscreteScheduler)]


@predictions
@pytest.mark.parametrize(("sampler", "scheduler"), TWO_STAGES)
@pytest.mark.parametrize(("count", "spacing", "offset"), [*CASES, (7, "trailing", 0)])
def test_second_order_samplers_are_diffusers(
    prediction: str,
    sampler: Sampler,
    scheduler: type[Any],
    count: int,
    spacing: Spacing,
    offset: int,
) -> None:
    """Heun, and k-diffusion's DPM2, which is DPM-Solver-2 (Lu et al. 2022a)."""
    oracle = scheduler(
        **SD, prediction_type=prediction, timestep_spacing=spacing, steps_offset=offset
    )
    oracle.set_timesteps(count)
    x, sigmas = start(count, spacing, offset)
    ours = sampler(toy_denoiser(prediction), x, sigmas)
    assert_same_steps(ours, theirs_in_two_stages(oracle, x))


@predictions
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_samplers_between_timesteps(prediction: str, spacing: Spacing) -> None:
    """Of fractions of timesteps diffusers tells the network as we do in its Euler and Heun; its
    DPM-Solver, DPM2 and UniPC round them for Karras's spacing, and show the network another level
    than x has.
    """
    options: dict[str, Any] = {**SD, "prediction_type": prediction}
    options[f"use_{spacing}_sigmas"] = True
    x, sigmas = start(12, spacing)
    one, two = EulerDiscreteScheduler(**options), HeunDiscreteScheduler(**options)
    for scheduler in (one, two):
        scheduler.set_timesteps(12)
    denoiser = toy_denoiser(prediction)
    assert_same_steps(euler(denoiser, x, sigmas), theirs(one, x, sigmas))
    assert_same_steps(heun(denoiser, x, sigmas), theirs_in_two_stages(two, x))


@predictions
@pytest.mark.parametrize("count", [1, 2, 7, 10, 20, 25, 50])
def test_dpmpp_2m_sde_is_diffusers_sde_dpm_solver(prediction: str, count: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        **SD,
        prediction_type=prediction,
        timestep_spacing="trailing",
        algorithm_type="sde-dpmsolver++",
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(count)
    x, sigmas = start(count)
    ours = dpmpp_2m_sde(toy_denoiser(prediction), x, sigmas, noise=fresh_noise)
    expected = theirs(scheduler, x, sigmas, lambda i: {"variance_noise": fresh_noise(i)})
    assert_same_steps(ours, expected)


@predictions
@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 20, 25, 50])
def test_unipc_is_diffusers_unipc(prediction: str, count: int) -> None:
    """Order 2 with B(h) = e^h - 1, its defaults, and a last step of first order."""
    scheduler = UniPCMultistepScheduler(
        **SD,
        prediction_type=prediction,
        timestep_spacing="trailing",
        solver_order=2,
        solver_type="bh2",
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(count)
    x, sigmas = start(count)
    assert_same_steps(unipc(toy_denoiser(prediction), x, sigmas), theirs(scheduler, x, sigmas))


@predictions
@pytest.mark.parametrize("count", [1, 2, 5, 10, 25, 50])
def test_lcm_is_diffusers_lcm(prediction: str, count: int) -> None:
    """Where the number of steps divides 50, the "trailing" timesteps are those it visits.

    Its c_skip and c_out, which differ from 0 and 1 by 7e-6 at timestep 19, are within the
    tolerance.
    """
    scheduler = LCMScheduler(**SD, prediction_type=prediction, original_inference_steps=50)
    scheduler.set_timesteps(count)
    assert scheduler.timesteps.tolist() == SCHEDULE.sampling_timesteps(count).tolist()
    x, sigmas = start(count)
    ours = lcm(toy_denoiser(prediction), x, sigmas, noise=fresh_noise)
    assert_same_steps(ours, theirs(scheduler, x, sigmas, generator))


@predictions
@pytest.mark.parametrize("count", [7, 20])
def test_dpmpp_sde_is_diffusers_dpm_solver_sde(
    prediction: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With our noise in place of torchsde's Brownian tree, which alone needs that package.

    There as here the noise of a whole step holds that of its first half. The tree gives both
    the shares they have of sigma; ours have those of the step's posterior variance, which is how
    the mean of Algorithm 2 of Ho et al. (2020) carries the first half's noise to the end.
    """
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    scheduler = module.DPMSolverSDEScheduler(
        **SD, prediction_type=prediction, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(count)
    x, sigmas = start(count)
    asked = iter(range(2 * count))

    def noise(sigma: Tensor, following: Tensor) -> Tensor:
        index = next(asked)
        if index % 2 == 0:
            return fresh_noise(index)
        first = (following / sigma) / (1 + following / sigma)
        return first.sqrt() * fresh_noise(index - 1) + (1 - first).sqrt() * fresh_noise(index)

    scheduler.noise_sampler = noise
    ours = dpmpp_sde(toy_denoiser(prediction), x, sigmas, noise=fresh_noise)
    assert_same_steps(ours, theirs_in_two_stages(scheduler, x))


@pytest.mark.parametrize("count", [10, 20, 40])
def test_ddim_from_zero_terminal_snr(count: int) -> None:
    """Lin et al. (2023). diffusers begins at SNR 0, we at 1e-9: c_in x differs by 3e-5 of x0."""
    scheduler = DDIMScheduler(
        **SD,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        rescale_betas_zero_snr=True,
    )
    scheduler.set_timesteps(count)
    schedule = SCHEDULE.zero_terminal_snr()
    sigmas = schedule.sampling_sigmas(count)
    x = (1 + sigmas[0] ** 2).sqrt() * NOISE
    ours = ddim(toy_denoiser("v_prediction", schedule), x, sigmas)
    for step, state in zip(ours, theirs(scheduler, x, sigmas), strict=True):
        scale = (1 + sigmas[step.index + 1] ** 2).sqrt()
        assert_close(step.x / scale, state / scale, rtol=1e-3, atol=1e-3)


FLOW = Schedule.flow(3.0, 1000)


def test_euler_on_a_flow_is_diffusers_flow_matching_euler() -> None:
    """x in the flow's coordinates is ours times 1 - t. A line there is a line here, so Euler's
    method takes the same steps; the first begins at t = 0.9999 where theirs begins at 1.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=(torch.arange(20, 0, -1) / 20).tolist())
    sigmas = FLOW.sampling_sigmas(20)
    scale = 1 + sigmas
    sample = NOISE
    steps = euler(toy_denoiser("flow_prediction", FLOW), scale[0] * NOISE, sigmas)
    for step, timestep in zip(steps, scheduler.timesteps, strict=True):
        output = toy_network(sample, timestep)
        sample = scheduler.step(output, timestep, sample).prev_sample
        assert_close(step.x / scale[step.index + 1], sample, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [(dpmpp_2m, DPMSolverMultistepScheduler), (unipc, UniPCMultistepScheduler)],
)
def test_multistep_samplers_on_a_flow_are_diffusers(sampler: Sampler, scheduler: Any) -> None:
    """At their times, and told of them in full: they round 1000 t down."""
    oracle = scheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    oracle.set_timesteps(20)
    times = oracle.sigmas.clamp(max=0.9999)
    oracle.sigmas = times
    sigmas = times / (1 - times)
    sample = NOISE
    steps = sampler(toy_denoiser("flow_prediction", FLOW), NOISE * (1 + sigmas[0]), sigmas)
    for step, timestep in zip(steps, oracle.timesteps, strict=True):
        output = toy_network(sample, 1000 * times[step.index])
        sample = oracle.step(output, timestep, sample).prev_sample
        assert_close(step.x / (1 + sigmas[step.index + 1]), sample, rtol=2e-4, atol=2e-4)
