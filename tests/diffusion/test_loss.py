"""The training loss against the papers' algorithms, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.testing import assert_close

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.loss import diffusion_loss, min_snr, offset_noise, uniform
from latentdiff.diffusion.parameterization import PARAMETERIZATIONS, edm
from latentdiff.diffusion.schedule import Schedule

DDPM = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SCHEDULE = Schedule(DDPM.alphas_cumprod)
TIMESTEPS = torch.tensor([0, 120, 500, 999])
SIGMA = SCHEDULE.sigmas[TIMESTEPS]
NAMES = ["epsilon", "v_prediction", "sample", "flow_prediction"]
names = pytest.mark.parametrize("name", NAMES)


def draw(number: int) -> Tensor:
    return torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(number))


X0, NOISE, COND = 0.8 * draw(0) + 0.3, draw(1), draw(2)


def network(x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
    return torch.tanh(1.5 * x.roll(1, -1) + 0.3 * cond + timestep[:, None, None, None] / 500)


def loss(name: str, weighting: Any = uniform, net: Any = network) -> Tensor:
    denoiser = Denoiser(net, SCHEDULE, PARAMETERIZATIONS[name])
    return diffusion_loss(denoiser, X0, SIGMA, NOISE, COND, weighting)


def exact_output(name: str) -> Tensor:
    """What each paper says the network predicts."""
    velocity = DDPM.get_velocity(X0, NOISE, TIMESTEPS)
    flow = NOISE - X0
    return dict(zip(NAMES, (NOISE, velocity, X0, flow), strict=True))[name]


def test_epsilon_is_algorithm_1_of_ho_et_al() -> None:
    """|| eps - eps_theta(sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, t) ||^2, its mean."""
    alpha_bar = DDPM.alphas_cumprod[TIMESTEPS][:, None, None, None]
    x_t = alpha_bar.sqrt() * X0 + (1 - alpha_bar).sqrt() * NOISE
    predicted = network(x_t, TIMESTEPS.float(), COND)
    expected = (NOISE - predicted).square().mean(dim=(1, 2, 3))
    assert_close(loss("epsilon"), expected, rtol=1e-4, atol=1e-5)


def test_v_is_the_error_of_the_velocity() -> None:
    """Salimans & Ho (2022), appendix D, through diffusers' add_noise and get_velocity."""
    x_t = DDPM.add_noise(X0, NOISE, TIMESTEPS)
    velocity = DDPM.get_velocity(X0, NOISE, TIMESTEPS)
    predicted = network(x_t, TIMESTEPS.float(), COND)
    expected = (velocity - predicted).square().mean(dim=(1, 2, 3))
    assert_close(loss("v_prediction"), expected, rtol=1e-4, atol=1e-5)


def test_sample_is_the_error_of_x0() -> None:
    predicted = network(DDPM.add_noise(X0, NOISE, TIMESTEPS), TIMESTEPS.float(), COND)
    expected = (X0 - predicted).square().mean(dim=(1, 2, 3))
    assert_close(loss("sample"), expected, rtol=1e-4, atol=1e-5)


def test_flow_is_conditional_flow_matching() -> None:
    """|| noise - x0 - F((1 - t) x0 + t noise, 1000 t) ||^2: Esser et al. (2024), section 2."""
    t = (SIGMA / (1 + SIGMA))[:, None, None, None]
    predicted = network((1 - t) * X0 + t * NOISE, 1000 * t.flatten(), COND)
    expected = (NOISE - X0 - predicted).square().mean(dim=(1, 2, 3))
    assert_close(loss("flow_prediction"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_is_karras_s_weighted_error_of_the_denoised(sigma_data: float) -> None:
    """Karras et al. (2022), equation 2 with lambda(sigma) of table 1, which is 1 / c_out^2."""
    denoiser = Denoiser(network, SCHEDULE, edm(sigma_data))
    level = SIGMA[:, None, None, None]
    error = (denoiser(X0 + level * NOISE, SIGMA, COND) - X0).square().mean(dim=(1, 2, 3))
    weight = (SIGMA**2 + sigma_data**2) / (SIGMA * sigma_data) ** 2
    ours = diffusion_loss(denoiser, X0, SIGMA, NOISE, COND)
    assert_close(ours, weight * error, rtol=1e-3, atol=1e-4)


@names
def test_zero_terminal_snr_is_as_finite_as_any(name: str) -> None:
    """At T of Lin et al.'s schedule, sigma = 3.2e4: the target is what the paper says,
    and min-SNR's weight of the error of x0 is the SNR, 1e-9.
    """
    schedule = SCHEDULE.zero_terminal_snr()
    sigma = schedule.sigmas[[999]].expand(4)
    denoiser = Denoiser(network, schedule, PARAMETERIZATIONS[name])
    t = sigma[0].item() / (1 + sigma[0].item())
    seen = (1 - t) * X0 + t * NOISE if name == "flow_prediction" else 1e-9**0.5 * X0 + NOISE
    told = torch.full((4,), 1000 * t if name == "flow_prediction" else 999.0)
    target = {"epsilon": NOISE, "sample": X0, "flow_prediction": NOISE - X0}.get(name, -X0)
    expected = (target - network(seen, told, COND)).square().mean(dim=(1, 2, 3))
    plain = diffusion_loss(denoiser, X0, sigma, NOISE, COND)
    assert_close(plain, expected, rtol=1e-3, atol=1e-3)
    weighted = diffusion_loss(denoiser, X0, sigma, NOISE, COND, min_snr(5.0))
    weight = 1.0 if name == "epsilon" else 1e-9
    assert_close(weighted, weight * plain, rtol=1e-3, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@names
def test_min_snr_weights(name: str, gamma: float) -> None:
    """Hang et al. (2023), section 3.4; the SNR is diffusers' compute_snr.

    The error of x0 is c_out times that of F, sigma / (1 + sigma) for a flow. Among the timesteps
    are SNRs on both sides of gamma.
    """
    snr = compute_snr(DDPM, TIMESTEPS)
    assert snr.min() < gamma < snr.max()
    error_of_x0 = {
        "epsilon": 1 / snr,
        "v_prediction": 1 / (snr + 1),
        "sample": torch.ones(4),
        "flow_prediction": 1 / (snr.sqrt() + 1) ** 2,
    }
    weight = snr.clamp(max=gamma) * error_of_x0[name]
    assert_close(loss(name, min_snr(gamma)), weight * loss(name), rtol=1e-4, atol=1e-7)


@names
def test_a_huge_gamma_weighs_the_error_of_x0_by_the_snr(name: str) -> None:
    """SNR || x0 - D ||^2 is the error of epsilon, for every parameterization."""
    denoiser = Denoiser(network, SCHEDULE, PARAMETERIZATIONS[name])
    x = X0 + SIGMA[:, None, None, None] * NOISE
    error = (X0 - denoiser(x, SIGMA, COND)).square().mean(dim=(1, 2, 3))
    assert_close(loss(name, min_snr(1e12)), error / SIGMA**2, rtol=1e-2, atol=1e-6)


@names
def test_a_floor_trains_where_the_snr_is_zero(name: str) -> None:
    """max(SNR, 1) of Salimans & Ho (2022) under min(SNR, gamma) of Hang et al. (2023).

    With F's own weight on the error of x0, 1 / c_out^2, as its ceiling: SNR for epsilon, SNR + 1
    for v, 1 for x0, (1 + sqrt(SNR))^2 for a flow.
    """
    schedule = SCHEDULE.zero_terminal_snr()
    snr = (schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)).double()
    own = {
        "epsilon": snr,
        "v_prediction": snr + 1,
        "sample": torch.ones_like(snr),
        "flow_prediction": (1 + snr.sqrt()) ** 2,
    }[name]
    expected = torch.maximum(snr.clamp(max=5), own.clamp(max=1)) / own
    c_out = PARAMETERIZATIONS[name].c_out(schedule.sigmas)
    weights = min_snr(5.0, floor=1.0)(schedule.sigmas, c_out)
    assert_close(weights.double(), expected, rtol=1e-4, atol=0)
    assert weights[-1].item() == pytest.approx(1, rel=1e-3)
    assert_close(weights[snr > 1], min_snr(5.0)(schedule.sigmas, c_out)[snr > 1])


def test_epsilon_keeps_its_weights_whatever_the_floor() -> None:
    sigma = SCHEDULE.zero_terminal_snr().sigmas
    plain, floored = (min_snr(5.0, floor)(sigma, -sigma) for floor in (0.0, 1.0))
    assert_close(floored, plain)


@names
def test_the_perturbation_is_seen_and_not_predicted(name: str) -> None:
    """Ning et al. (2023), Algorithm 1: through diffusers' add_noise as its training example does,
    and by hand for a flow.
    """
    extra = draw(5)
    if name == "flow_prediction":
        t = SIGMA / (1 + SIGMA)
        seen, told = torch.lerp(X0, NOISE + extra, t[:, None, None, None]), 1000 * t
    else:
        seen, told = DDPM.add_noise(X0, NOISE + extra, TIMESTEPS), TIMESTEPS.float()
    expected = (exact_output(name) - network(seen, told, COND)).square().mean(dim=(1, 2, 3))
    denoiser = Denoiser(network, SCHEDULE, PARAMETERIZATIONS[name])
    ours = diffusion_loss(denoiser, X0, SIGMA, NOISE, COND, perturbation=extra)
    assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(ours, loss(name), rtol=1e-2)


def test_offset_noise_has_a_mean_of_its_own_in_each_channel() -> None:
    offset = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(7))
    shifted = offset_noise(NOISE, offset, 0.1)
    means = (shifted - NOISE).mean(dim=(2, 3), keepdim=True)
    assert_close(means, 0.1 * offset)
    assert_close(shifted - means, NOISE)


@names
def test_a_network_that_knows_the_answer_has_no_loss(name: str) -> None:
    """However large the weight; and one that is off by 1 everywhere has loss 1."""
    answer = exact_output(name)
    assert_close(loss(name, min_snr(5.0), lambda *_: answer), torch.zeros(4), rtol=0, atol=1e-7)
    assert_close(loss(name, uniform, lambda *_: answer + 1), torch.ones(4), rtol=1e-3, atol=0)


@names
def test_nothing_is_drawn(name: str) -> None:
    state = torch.get_rng_state()
    first = loss(name)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(loss(name), first, rtol=0, atol=0)


@names
def test_each_sample_has_its_own_loss(name: str) -> None:
    denoiser = Denoiser(network, SCHEDULE, PARAMETERIZATIONS[name])
    together = loss(name, min_snr(5.0))
    assert together.shape == (4,)
    for row in range(4):
        one = slice(row, row + 1)
        alone = diffusion_loss(denoiser, X0[one], SIGMA[one], NOISE[one], COND[one], min_snr(5.0))
        assert_close(alone, together[one])


@names
def test_a_bfloat16_network_is_judged_in_fp32(name: str) -> None:
    """Under autocast; what comes as bfloat16 is widened before noise is added."""
    seen: list[Tensor] = []
    returned: list[Tensor] = []

    def cast(x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        seen.append(x)
        with torch.autocast("cpu", torch.bfloat16):
            returned.append(x @ COND[0, 0, :1].T @ COND[0, 0, :1])
        return returned[-1]

    def judged(net: Any, *inputs: Tensor) -> Tensor:
        denoiser = Denoiser(net, SCHEDULE, PARAMETERIZATIONS[name])
        return diffusion_loss(denoiser, *inputs, COND, min_snr(5.0))

    half = [values.bfloat16() for values in (X0, SIGMA, NOISE)]
    result = judged(cast, *half)
    assert returned[0].dtype == torch.bfloat16
    assert seen[0].dtype == result.dtype == torch.float32
    widened = judged(lambda *_: returned[0].float(), *(values.float() for values in half))
    assert_close(result, widened, rtol=0, atol=0)


@names
def test_gradients_are_those_of_the_mean_squared_error(name: str) -> None:
    """Of the target nothing depends on the network, and nothing is detached from it."""
    bias = torch.zeros((), requires_grad=True)
    loss(name, uniform, lambda *inputs: network(*inputs) + bias).sum().backward()
    x_t, timestep = DDPM.add_noise(X0, NOISE, TIMESTEPS), TIMESTEPS.float()
    if name == "flow_prediction":
        t = SIGMA / (1 + SIGMA)
        x_t, timestep = torch.lerp(X0, NOISE, t[:, None, None, None]), 1000 * t
    output, target = network(x_t, timestep, COND), exact_output(name)
    assert_close(bias.grad, 2 * (output - target).mean(dim=(1, 2, 3)).sum(), rtol=1e-3, atol=1e-4)
