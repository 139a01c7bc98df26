"""c_skip, c_out and c_in against the papers' formulas and diffusers' get_velocity."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from latentdiff.diffusion.parameterization import PARAMETERIZATIONS

names = pytest.mark.parametrize("name", ["epsilon", "v_prediction"])
sigmas = st.floats(1e-3, 1e3)
values = st.floats(-10, 10)


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def exact_output(name: str, x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What each paper says the network predicts, from x0 and noise."""
    if name == "epsilon":
        return noise
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0


def test_the_names_are_those_of_diffusers() -> None:
    """Its schedulers refuse any other prediction_type in their step."""
    assert set(PARAMETERIZATIONS) == {"epsilon", "v_prediction"}


@names
@settings(deadline=None)
@given(sigmas, values, values)
def test_the_exact_output_denoises_exactly(
    name: str, sigma: float, clean: float, drawn: float
) -> None:
    parameterization = PARAMETERIZATIONS[name]
    level, x0, noise = double(sigma), double(clean), double(drawn)
    x = x0 + level * noise
    output = exact_output(name, x0, noise, 1 / (1 + level**2))
    denoised = parameterization.c_skip(level) * x + parameterization.c_out(level) * output
    assert_close(denoised, x0, rtol=1e-9, atol=1e-9)


@names
@settings(deadline=None)
@given(sigmas, values, values)
def test_the_training_target_is_what_the_paper_says(
    name: str, sigma: float, clean: float, drawn: float
) -> None:
    parameterization = PARAMETERIZATIONS[name]
    level, x0, noise = double(sigma), double(clean), double(drawn)
    x = x0 + level * noise
    target = (x0 - parameterization.c_skip(level) * x) / parameterization.c_out(level)
    expected = exact_output(name, x0, noise, 1 / (1 + level**2))
    assert_close(target, expected, rtol=1e-7, atol=1e-7)


@names
@settings(deadline=None)
@given(sigmas, values, values)
def test_the_network_sees_x_t_of_the_ddpm_papers(
    name: str, sigma: float, clean: float, drawn: float
) -> None:
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) noise: Ho et al. (2020), equation 4."""
    level, x0, noise = double(sigma), double(clean), double(drawn)
    alpha_bar = 1 / (1 + level**2)
    expected = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
    seen = PARAMETERIZATIONS[name].c_in(level) * (x0 + level * noise)
    assert_close(seen, expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=8))
def test_v_is_diffusers_velocity(timesteps: list[int]) -> None:
    """Each row of a batch at its own timestep."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    steps = torch.tensor(timesteps)
    draw = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(steps), 3, generator=draw)
    expected = scheduler.get_velocity(x0, noise, steps)

    alpha_bar = scheduler.alphas_cumprod[steps].double()
    sigma = torch.sqrt((1 - alpha_bar) / alpha_bar)[:, None]
    v = PARAMETERIZATIONS["v_prediction"]
    x = x0 + sigma * noise
    target = (x0 - v.c_skip(sigma) * x) / v.c_out(sigma)
    assert_close(target.float(), expected, rtol=1e-4, atol=1e-5)


@names
def test_coefficients_keep_shape_and_dtype(name: str) -> None:
    parameterization = PARAMETERIZATIONS[name]
    sigma = torch.tensor([[0.03, 1.0], [5.0, 1e4]])
    for coefficient in (parameterization.c_skip, parameterization.c_out, parameterization.c_in):
        result = coefficient(sigma)
        assert result.shape == sigma.shape
        assert result.dtype == sigma.dtype
        assert result.isfinite().all()
