"""The denoiser made from a network that knows the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.parameterization import PARAMETERIZATIONS, edm
from latentdiff.diffusion.schedule import Schedule

SCHEDULE = Schedule.scaled_linear(0.00085, 0.012, 1000)
names = pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sample"])


def gaussian_network(name: str, mean: float, std: float) -> Any:
    """The best network for data N(mean, std^2): x_t and what it hides are jointly Gaussian.

    x_t = a x0 + b noise with a = sqrt(abar), b = sqrt(1 - abar), so E[noise | x_t] is
    b (x_t - a mean) / (a^2 std^2 + b^2), and E[x0 | x_t] is mean + a std^2 (x_t - a mean) / (same).
    """

    def network(x_t: Tensor, timestep: Tensor, cond: Any) -> Tensor:
        step = timestep.round().long()
        assert_close(timestep, step.float(), rtol=0, atol=1e-3)
        alpha_bar = SCHEDULE.alphas_cumprod[step][:, None, None, None]
        a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        slope = (x_t - a * mean) / (a**2 * std**2 + b**2)
        noise, x0 = b * slope, mean + a * std**2 * slope
        return {"epsilon": noise, "sample": x0, "v_prediction": a * noise - b * x0}[name]

    return network


@names
def test_the_best_network_gives_the_posterior_mean(name: str) -> None:
    """E[x0 | x] of x = x0 + sigma noise: (std^2 x + sigma^2 mean) / (std^2 + sigma^2)."""
    mean, std = 0.7, 0.4
    sigma = SCHEDULE.sigmas[[0, 100, 500, 999]].double()
    x = 3 * torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    denoise = Denoiser(gaussian_network(name, mean, std), SCHEDULE, PARAMETERIZATIONS[name])
    level = sigma[:, None, None, None]
    expected = (std**2 * x + level**2 * mean) / (std**2 + level**2)
    assert_close(denoise(x, sigma, None), expected, rtol=1e-5, atol=1e-5)


def test_a_flow_s_best_network_gives_the_posterior_mean() -> None:
    """E[noise - x0 | (1 - t) x0 + t noise] with t from the timestep, whatever the schedule."""
    mean, std = 0.7, 0.4

    def network(x_t: Tensor, timestep: Tensor, cond: Any) -> Tensor:
        t = timestep[:, None, None, None] / 1000
        slope = (x_t - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
        return t * slope - (mean + (1 - t) * std**2 * slope)

    sigma = torch.tensor([1e-3, 0.5, 3.0, 3.2e4], dtype=torch.float64)
    x = (1 + sigma[:, None, None, None]) * torch.linspace(-2, 2, 5, dtype=torch.float64)
    denoise = Denoiser(network, SCHEDULE, PARAMETERIZATIONS["flow_prediction"])
    level = sigma[:, None, None, None]
    expected = (std**2 * x + level**2 * mean) / (std**2 + level**2)
    assert_close(denoise(x, sigma, None), expected, rtol=1e-7, atol=1e-7)


def test_an_edm_network_is_told_a_quarter_of_log_sigma() -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, timestep: Tensor, cond: Any) -> Tensor:
        seen.append(timestep)
        return x

    sigma = torch.tensor([0.002, 1.0, 80.0])
    Denoiser(network, SCHEDULE, edm())(torch.ones(3, 1, 2, 2), sigma, None)
    assert_close(seen[0], sigma.log() / 4)


@names
def test_the_network_is_called_once_with_x_t_timesteps_and_cond_untouched(name: str) -> None:
    calls: list[tuple[Tensor, Tensor, Any]] = []

    def network(scaled: Tensor, timestep: Tensor, cond: Any) -> Tensor:
        calls.append((scaled, timestep, cond))
        return torch.zeros_like(scaled)

    timesteps = torch.tensor([3, 998])
    sigma = SCHEDULE.sigmas[timesteps]
    x, cond = torch.ones(2, 1, 2, 2), [(object(), object())]
    Denoiser(network, SCHEDULE, PARAMETERIZATIONS[name])(x, sigma, cond)
    ((scaled, timestep, passed),) = calls
    expected = SCHEDULE.alphas_cumprod[timesteps].sqrt().float()
    assert_close(scaled[:, 0, 0, 0], expected)
    assert_close(timestep, timesteps.float(), rtol=0, atol=1e-3)
    assert passed is cond


@names
def test_network_output_is_f_itself(name: str) -> None:
    output = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    denoise = Denoiser(lambda *_: output, SCHEDULE, PARAMETERIZATIONS[name])
    x, sigma = torch.ones(2, 1, 2, 2), torch.tensor([0.5, 2.0])
    assert_close(denoise.network_output(x, sigma, None), output)


@names
def test_a_half_precision_network_leaves_x_s_dtype(name: str) -> None:
    """What is kept of x must not be rounded to bfloat16 on the way."""
    denoise = Denoiser(
        lambda x, *_: torch.zeros_like(x, dtype=torch.bfloat16), SCHEDULE, PARAMETERIZATIONS[name]
    )
    x = torch.full((1, 1, 2, 2), 1.2345678)
    sigma = torch.tensor([0.5])
    kept = {"epsilon": 1.0, "v_prediction": 0.8, "sample": 0.0}[name]
    assert_close(denoise(x, sigma, None), kept * x)
    assert denoise.network_output(x, sigma, None).dtype == torch.float32
