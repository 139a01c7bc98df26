"""The samplers on Gaussian data, where every solution has a closed form."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from latentdiff.diffusion.samplers import (
    SAMPLERS,
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
from latentdiff.diffusion.schedule import Schedule

SCHEDULE = Schedule.scaled_linear(0.00085, 0.012, 1000)
SHAPE = (2, 3, 4, 5)


def fresh_noise(index: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + index))


NOISE = fresh_noise(-1)

# Data N(MEAN, STD^2), for which everything is known.
MEAN, STD = 0.7, 0.5


def gaussian(x: Tensor, sigma: Tensor, cond: None) -> Tensor:
    """E[x0 | x] for x = x0 + sigma noise."""
    level = sigma[:, None, None, None]
    return (STD**2 * x + level**2 * MEAN) / (STD**2 + level**2)


def probability_flow(x: Tensor, start: float, end: float) -> Tensor:
    """dx/dsigma = (x - D) / sigma = sigma (x - mean) / (std^2 + sigma^2), solved by separation."""
    return MEAN + (x - MEAN) * ((STD**2 + end**2) / (STD**2 + start**2)) ** 0.5


def levels(start: float, end: float, steps: int) -> Tensor:
    """Evenly spaced in log sigma, [steps + 1]."""
    return torch.logspace(
        torch.tensor(start).log10(), torch.tensor(end).log10(), steps + 1, dtype=torch.float64
    )


def last(steps: Any) -> Tensor:
    *_, final = steps
    return final.x


@pytest.mark.parametrize(
    ("sampler", "tolerance"),
    [(ddim, 3e-3), (euler, 3e-3), (heun, 5e-6), (dpm2, 5e-6), (dpmpp_2m, 5e-6), (unipc, 2e-6)],
)
def test_the_probability_flow_of_a_gaussian_is_followed(sampler: Sampler, tolerance: float) -> None:
    """Every state on the way, 1000 steps."""
    x = 10 * NOISE.double()
    for step in sampler(gaussian, x, levels(10.0, 0.1, 1000)):
        assert_close(step.x, probability_flow(x, 10.0, step.sigma), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("sampler", "order"), [(ddim, 1), (euler, 1), (heun, 2), (dpm2, 2), (dpmpp_2m, 2), (unipc, 3)]
)
def test_order_of_convergence(sampler: Sampler, order: int) -> None:
    """The error over 10, 20, 40 and 80 steps falls by 2 to the power of the order each time.

    Euler's method is of first order, and so is DDIM, which is Euler's method in these coordinates;
    Heun's, DPM-Solver-2 and DPM-Solver++(2M) of second, and UniPC-2 of third, one more than its
    predictor (Zhao et al. 2023).
    """
    x = 10 * NOISE.double()
    errors = torch.stack(
        [
            (last(sampler(gaussian, x, levels(10.0, 0.1, steps))) - probability_flow(x, 10.0, 0.1))
            .abs()
            .max()
            for steps in (10, 20, 40, 80)
        ]
    )
    measured = torch.log2(errors[:-1] / errors[1:])
    assert abs(measured[-1] - order) < 0.1, measured


@pytest.mark.parametrize(
    ("sampler", "tolerance"),
    [(ddim, 0.03), (euler, 0.03), (heun, 0.012), (dpm2, 0.012), (dpmpp_2m, 0.012), (unipc, 0.012)],
)
def test_from_pure_noise_to_the_data(sampler: Sampler, tolerance: float) -> None:
    """250 steps of Stable Diffusion's schedule, down to sigma 0, value by value.

    The probability flow takes N(MEAN, STD^2 + sigma^2) to N(MEAN, STD^2) by a linear map. The last
    step is of first order for every sampler, and most of the error.
    """
    sigmas = SCHEDULE.sampling_sigmas(250)
    start = float(sigmas[0])
    x = (1 + start**2) ** 0.5 * NOISE
    expected = probability_flow(x, start, 0.0)
    assert_close(last(sampler(gaussian, x, sigmas)), expected, rtol=0, atol=tolerance)


def test_ddpm_s_mean_and_variance_step_by_step() -> None:
    """Against the moments of Algorithm 2 of Ho et al. (2020), computed without sampling.

    Equation 7 in the paper's own coordinates, x_t = sqrt(abar) x, for each of 50 steps: the mean
    and the variance of x_{t-1} are linear in those of x_t, because gaussian() is. The bounds are
    five standard errors of 40,000 samples.
    """
    count = 40_000
    generator = torch.Generator().manual_seed(0)

    def noise(index: int) -> Tensor:
        return torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64)

    sigmas = SCHEDULE.sampling_sigmas(50).double()
    start = sigmas[0]
    x = (1 + start**2).sqrt() * noise(-1)
    abar = 1 / (1 + sigmas**2)
    mean, variance = torch.zeros(()).double(), torch.ones(()).double()
    for step in ddpm(gaussian, x, sigmas, noise=noise):
        now, then = abar[step.index], abar[step.index + 1]
        alpha = now / then
        gain = now.sqrt() * STD**2 / (now * STD**2 + 1 - now)
        offset = (1 - now) * MEAN / (now * STD**2 + 1 - now)
        from_x0 = then.sqrt() * (1 - alpha) / (1 - now)
        from_x = alpha.sqrt() * (1 - then) / (1 - now)
        mean = (from_x0 * gain + from_x) * mean + from_x0 * offset
        beta_tilde = (1 - then) / (1 - now) * (1 - alpha)
        variance = (from_x0 * gain + from_x) ** 2 * variance + beta_tilde
        x_t = then.sqrt() * step.x
        assert abs(x_t.mean() - mean) < 5 * (variance / count).sqrt()
        assert abs(x_t.var() - variance) < 5 * variance * (2 / count) ** 0.5


def test_ddpm_with_every_timestep_samples_the_data() -> None:
    """Mean MEAN and variance STD^2, less about 2%: D has no spread of its own."""
    count = 20_000
    generator = torch.Generator().manual_seed(0)

    def noise(index: int) -> Tensor:
        return torch.randn(count, 1, 1, 1, generator=generator)

    sigmas = SCHEDULE.sampling_sigmas(1000)
    x = (1 + sigmas[0] ** 2).sqrt() * noise(-1)
    result = last(ddpm(gaussian, x, sigmas, noise=noise))
    assert abs(result.mean() - MEAN) < 0.02
    assert_close(result.var().item(), STD**2, rtol=0.04, atol=0)
    standard = (result - result.mean()) / result.std()
    assert abs((standard**4).mean() - 3) < 0.2


def spread(sampler: Sampler, sigmas: Tensor, denoiser: Any = None) -> Tensor:
    """The standard deviation after each step, [N], of data N(0, STD^2), without sampling.

    gaussian() without its mean is linear, so the result is a weighted sum of the noise it began
    with and every noise that was asked for. Row k of x carries the weight of the k-th of them.
    """
    unit = torch.eye(1 + 2 * len(sigmas), dtype=torch.float64)[:, :, None, None, None]

    def centred(x: Tensor, sigma: Tensor, cond: None) -> Tensor:
        level = sigma[:, None, None, None]
        return STD**2 * x / (STD**2 + level**2)

    x = (STD**2 + sigmas[0] ** 2).sqrt() * unit[0]
    steps = sampler(denoiser or centred, x, sigmas, noise=lambda i: unit[1 + i])
    return torch.stack([step.x.square().sum().sqrt() for step in steps])


@pytest.mark.parametrize(
    ("sampler", "order"), [(ddpm, 1), (euler_ancestral, 1), (dpmpp_2m_sde, 2), (dpmpp_sde, 2)]
)
def test_stochastic_samplers_reach_the_data_s_variance(sampler: Sampler, order: int) -> None:
    """The variance is STD^2 + sigma^2 at every level; the error over 40, 80, 160 and 320 steps."""
    errors = []
    for steps in (40, 80, 160, 320):
        sigmas = levels(10.0, 0.1, steps)
        exact = (STD**2 + sigmas[1:] ** 2).sqrt()
        errors.append((spread(sampler, sigmas) / exact - 1).abs()[-1])
    measured = torch.tensor([a / b for a, b in itertools.pairwise(errors)]).log2()
    assert errors[-1] < 0.01
    assert abs(measured[-1] - order) < 0.15, measured


def test_the_two_halves_of_a_step_of_dpmpp_sde_are_one_path() -> None:
    """With a denoiser that does not look at x, a step is the posterior q(x_s | x_t, x0): variance
    s^2 (1 - (s/t)^2), of which the noise at halfway, m, has the share that is left of it at s.
    """
    t, s = 3.0, 0.8
    m = (t * s) ** 0.5
    unit = torch.eye(3, dtype=torch.float64)[:, :, None, None, None]
    sigmas = torch.tensor([t, s], dtype=torch.float64)
    (step,) = dpmpp_sde(
        lambda x, *_: torch.zeros_like(x), unit[0], sigmas, noise=lambda i: unit[1 + i]
    )
    kept, first, second = step.x.flatten().tolist()
    assert kept == pytest.approx((s / t) ** 2)
    assert first**2 + second**2 == pytest.approx(s**2 * (1 - (s / t) ** 2))
    assert first**2 == pytest.approx((s / m) ** 4 * m**2 * (1 - (m / t) ** 2))


@pytest.mark.parametrize("count", [1, 2, 4, 8, 50])
def test_lcm_with_the_true_consistency_function_samples_the_data(count: int) -> None:
    """f(x, sigma) is where the probability flow ends: Song et al. (2023), definition 1. For a
    Gaussian it is linear, and every level's variance is exact for any number of steps.
    """

    def consistency(x: Tensor, sigma: Tensor, cond: None) -> Tensor:
        return x * STD / (STD**2 + sigma[:, None, None, None] ** 2).sqrt()

    sigmas = SCHEDULE.sampling_sigmas(count).double()
    expected = (STD**2 + sigmas[1:] ** 2).sqrt()
    assert_close(spread(lcm, sigmas, consistency), expected)


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde"])
def test_200_steps_from_noise_to_data_lose_little_of_its_variance(name: str) -> None:
    """On Stable Diffusion's schedule, down to sigma 0, where D has no spread of its own."""
    result = spread(SAMPLERS[name], SCHEDULE.sampling_sigmas(200).double())[-1]
    assert_close(result.item(), STD, rtol=0.06, atol=0)


def beginning(count: int) -> tuple[Tensor, Tensor]:
    sigmas = SCHEDULE.sampling_sigmas(count)
    return (1 + sigmas[0] ** 2).sqrt() * NOISE, sigmas


HALFWAY = {
    "heun": lambda sigma, following: following,
    "dpm2": lambda sigma, following: (sigma * following) ** 0.5,
    "dpmpp_sde": lambda sigma, following: (sigma * following) ** 0.5,
}
"""Where those that call the denoiser twice a step do so the second time."""
FRESH = {"ddpm": 5, "euler_ancestral": 5, "dpmpp_2m_sde": 5, "dpmpp_sde": 10, "lcm": 5}
"""How many noises are asked for in 6 steps, the last of which goes to 0."""


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_one_step_per_level_and_nothing_but_data_at_the_end(name: str) -> None:
    x, sigmas = beginning(6)
    kept, cond = x.clone(), object()
    calls: list[tuple[Tensor, Any]] = []
    asked: list[int] = []

    def denoiser(x: Tensor, sigma: Tensor, passed: Any) -> Tensor:
        calls.append((sigma, passed))
        return gaussian(x, sigma, None)

    def noise(index: int) -> Tensor:
        asked.append(index)
        return fresh_noise(index)

    steps = list(SAMPLERS[name](denoiser, x, sigmas, cond, noise=noise))
    assert [step.index for step in steps] == list(range(6))
    assert [step.sigma for step in steps] == sigmas[1:].tolist()
    visited = sigmas[:-1].tolist()
    if name in HALFWAY:  # and back: no second call in the step to 0
        between = [HALFWAY[name](sigma, after) for sigma, after in itertools.pairwise(visited)]
        visited = [level for pair in zip(visited, between, strict=False) for level in pair]
        visited.append(sigmas[-2].item())
    levels_of_calls = torch.stack([sigma for sigma, _ in calls])
    assert_close(levels_of_calls, torch.tensor(visited)[:, None].expand(-1, 2))
    assert all(passed is cond for _, passed in calls)
    assert_close(steps[-1].x, steps[-1].denoised)
    assert asked == list(range(FRESH.get(name, 0)))
    assert_close(x, kept, rtol=0, atol=0)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_picture_does_not_depend_on_its_neighbours(name: str) -> None:
    x, sigmas = beginning(6)
    together = last(SAMPLERS[name](gaussian, x, sigmas, noise=fresh_noise))
    alone = last(SAMPLERS[name](gaussian, x[1:], sigmas, noise=lambda i: fresh_noise(i)[1:]))
    assert_close(alone, together[1:])


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_nothing_is_kept_between_two_calls(name: str) -> None:
    """Not even by a sampler that remembers its last step, and was left in the middle."""
    x, sigmas = beginning(8)
    sampler = SAMPLERS[name]
    first = last(sampler(gaussian, x, sigmas, noise=fresh_noise))
    next(sampler(gaussian, -x, sigmas, noise=fresh_noise))
    assert_close(last(sampler(gaussian, x, sigmas, noise=fresh_noise)), first, rtol=0, atol=0)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_one_step_and_two_steps_and_an_end_above_zero(name: str) -> None:
    """The first step and the last have no step before and after, and Stable Diffusion 1.x's DDIM
    ends at the first timestep's sigma.
    """
    for sigmas in ([14.6, 0.0], [14.6, 0.7, 0.0], [14.6, 0.7, 0.03], [3.2e4, 90.0, 0.03]):
        steps = list(SAMPLERS[name](gaussian, NOISE, torch.tensor(sigmas), noise=fresh_noise))
        assert len(steps) == len(sigmas) - 1
        assert all(step.x.isfinite().all() for step in steps)
        assert all(step.x.dtype == torch.float32 for step in steps)


@pytest.mark.parametrize("name", list(FRESH))
def test_a_stochastic_sampler_must_be_given_noise(name: str) -> None:
    x, sigmas = beginning(4)
    with pytest.raises(TypeError, match="noise"):
        SAMPLERS[name](gaussian, x, sigmas)


def test_stochastic_ddim_without_noise_is_refused() -> None:
    """It would take noise out and put none in: blurred pictures and no error."""
    x, sigmas = beginning(4)
    with pytest.raises(ValueError, match="pass noise"):
        next(ddim(gaussian, x, sigmas, eta=0.5))
