"""The coefficients against the papers' formulas and diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from latentdiff.diffusion.parameterization import PARAMETERIZATIONS, Parameterization, edm

NAMES = ["epsilon", "v_prediction", "sample", "flow_prediction"]
names = pytest.mark.parametrize("name", NAMES)
sigmas = st.floats(1e-3, 1e3)
values = st.floats(-10, 10)


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def exact_output(name: str, x0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """What each paper says the network predicts, from x0 and noise."""
    if name in ("epsilon", "sample"):
        return noise if name == "epsilon" else x0
    if name == "flow_prediction":
        return noise - x0
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0


def test_the_names_are_those_of_diffusers() -> None:
    """Its schedulers refuse any other prediction_type in their step."""
    assert list(PARAMETERIZATIONS) == NAMES


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


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sample"])
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
@given(st.integers(1, 999), values, values)
def test_a_flow_s_network_sees_what_diffusers_shows_it(
    step: int, clean: float, drawn: float
) -> None:
    """x between data and noise, and 1000 t: FlowMatchEulerDiscreteScheduler.scale_noise."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    timestep = scheduler.timesteps[1000 - step : 1001 - step]
    x0, noise = double(clean)[None], double(drawn)[None]
    expected = scheduler.scale_noise(x0, timestep, noise)

    time = timestep.double() / 1000
    sigma = time / (1 - time)
    flow = PARAMETERIZATIONS["flow_prediction"]
    assert flow.c_noise is not None
    assert_close(flow.c_noise(sigma).float(), timestep)
    assert_close(flow.c_in(sigma) * (x0 + sigma * noise), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(st.floats(2e-3, 80), values, values, st.sampled_from([0.5, 1.0, 0.3]))
def test_edm_is_diffusers_edm(sigma: float, value: float, output: float, sigma_data: float) -> None:
    theirs = EDMEulerScheduler(sigma_data=sigma_data)
    ours = edm(sigma_data)
    level, x, f = double(sigma), double(value), double(output)
    assert ours.c_noise is not None
    assert_close(ours.c_in(level) * x, theirs.precondition_inputs(x, level))
    assert_close(ours.c_noise(level), theirs.precondition_noise(level))
    denoised = ours.c_skip(level) * x + ours.c_out(level) * f
    assert_close(denoised, theirs.precondition_outputs(x, f, level))


@pytest.mark.parametrize("sigma_data", [0.5, 1.7])
@pytest.mark.parametrize("sigma", [0.01, 0.5, 30.0])
def test_edm_s_input_and_target_have_unit_variance(sigma: float, sigma_data: float) -> None:
    """Karras et al. (2022), appendix B.6, from the weights of x0 and noise in each."""
    level, parameterization = double(sigma), edm(sigma_data)
    c_skip, c_out = parameterization.c_skip(level), parameterization.c_out(level)
    spread = double(sigma_data)
    variance_of_input = parameterization.c_in(level) ** 2 * (spread**2 + level**2)
    of_x0, of_noise = (1 - c_skip) / c_out * spread, -c_skip / c_out * level
    assert_close(variance_of_input, double(1.0))
    assert_close(of_x0**2 + of_noise**2, double(1.0))


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


@pytest.mark.parametrize("parameterization", [*PARAMETERIZATIONS.values(), edm()])
def test_coefficients_keep_shape_and_dtype(parameterization: Parameterization) -> None:
    """As far as 3.2e4, where zero-terminal-SNR schedules end."""
    sigma = torch.tensor([[0.03, 1.0], [5.0, 3.2e4]])
    coefficients = [parameterization.c_skip, parameterization.c_out, parameterization.c_in]
    if parameterization.c_noise is not None:
        coefficients.append(parameterization.c_noise)
    for coefficient in coefficients:
        result = coefficient(sigma)
        assert result.shape == sigma.shape
        assert result.dtype == sigma.dtype
        assert result.isfinite().all()
