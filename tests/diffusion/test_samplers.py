"""The samplers on Gaussian data, where every solution has a closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from latentdiff.diffusion.samplers import SAMPLERS, Sampler, ddim, ddpm, dpmpp_2m, euler
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
    ("sampler", "tolerance"), [(ddim, 0.003), (euler, 0.003), (dpmpp_2m, 5e-6)]
)
def test_the_probability_flow_of_a_gaussian_is_followed(sampler: Sampler, tolerance: float) -> None:
    """Every state on the way, 1000 steps."""
    x = 10 * NOISE.double()
    for step in sampler(gaussian, x, levels(10.0, 0.1, 1000)):
        assert_close(step.x, probability_flow(x, 10.0, step.sigma), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (euler, 1), (dpmpp_2m, 2)])
def test_order_of_convergence(sampler: Sampler, order: int) -> None:
    """The error over 10, 20, 40 and 80 steps falls by 2 to the power of the order each time.

    Euler's method is of first order, and so is DDIM, which is Euler's method in these coordinates;
    DPM-Solver++(2M) of second (Lu et al. 2022). With few steps higher orders still show:
    the measured order rises to the true one.
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
    assert abs(measured[-1] - order) < 0.1
    assert (measured.diff() > 0).all()


@pytest.mark.parametrize(("sampler", "tolerance"), [(ddim, 0.03), (euler, 0.03), (dpmpp_2m, 0.012)])
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


def beginning(count: int) -> tuple[Tensor, Tensor]:
    sigmas = SCHEDULE.sampling_sigmas(count)
    return (1 + sigmas[0] ** 2).sqrt() * NOISE, sigmas


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
    assert_close(torch.stack([sigma for sigma, _ in calls]), sigmas[:-1, None].expand(-1, 2))
    assert all(passed is cond for _, passed in calls)
    assert_close(steps[-1].x, steps[-1].denoised)
    assert asked == (list(range(5)) if name == "ddpm" else [])
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


def test_stochastic_ddim_without_noise_is_refused() -> None:
    """It would take noise out and put none in: blurred pictures and no error."""
    x, sigmas = beginning(4)
    with pytest.raises(ValueError, match="pass noise"):
        next(ddim(gaussian, x, sigmas, eta=0.5))
