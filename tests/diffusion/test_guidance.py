"""Classifier-free guidance: its formula, its signature, and that it commutes with the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.diffusion.parameterization import PARAMETERIZATIONS
from latentdiff.diffusion.samplers import euler
from latentdiff.diffusion.schedule import Schedule

SCHEDULE = Schedule.scaled_linear(0.00085, 0.012, 1000)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, SIGMA = draw(3, 4, 5, 6), torch.tensor([0.1, 1.0, 10.0])
UNCOND, COND = draw(3, 4, 1, 1), draw(3, 4, 1, 6)
BOTH = torch.cat([UNCOND.expand_as(COND), COND])


def denoiser(x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
    return torch.tanh(x * cond + sigma[:, None, None, None])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, 7.5, -1.0])
def test_from_the_unconditional_through_the_conditional(scale: float) -> None:
    """Ho & Salimans (2022), equation 6, with s = 1 + w."""
    uncond, conditional = denoiser(X, SIGMA, UNCOND), denoiser(X, SIGMA, COND)
    guided = ClassifierFreeGuidance(denoiser, scale)(X, SIGMA, BOTH)
    assert_close(guided, uncond + scale * (conditional - uncond), rtol=1e-5, atol=1e-6)


def test_scale_1_is_the_conditional_and_0_the_unconditional() -> None:
    """To the last bit."""
    conditional = ClassifierFreeGuidance(denoiser, 1.0)(X, SIGMA, BOTH)
    assert_close(conditional, denoiser(X, SIGMA, COND), rtol=0, atol=0)
    uncond = ClassifierFreeGuidance(denoiser, 0.0)(X, SIGMA, BOTH)
    assert_close(uncond, denoiser(X, SIGMA, UNCOND), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction"])
def test_guiding_the_denoised_is_guiding_the_network(name: str) -> None:
    """diffusers' pipelines combine the network's two outputs, as the paper does with epsilon."""
    scale = 4.0

    def network(x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        return torch.sin(2 * x + cond) + timestep[:, None, None, None] / 1000

    def guided_network(x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        twice = network(torch.cat([x, x]), torch.cat([timestep, timestep]), cond)
        uncond, conditional = twice.chunk(2)
        return uncond + scale * (conditional - uncond)

    parameterization = PARAMETERIZATIONS[name]
    expected = Denoiser(guided_network, SCHEDULE, parameterization)(X, SIGMA, BOTH)
    guided = ClassifierFreeGuidance(Denoiser(network, SCHEDULE, parameterization), scale)
    assert_close(guided(X, SIGMA, BOTH), expected, rtol=1e-4, atol=1e-4)


def test_one_call_with_everything_doubled_and_cond_untouched() -> None:
    calls: list[tuple[Tensor, Tensor, Any]] = []

    def recorder(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        calls.append((x, sigma, cond))
        return x

    cond = [(BOTH, BOTH)]
    ClassifierFreeGuidance(recorder, 3.0)(X, SIGMA, cond)
    ((x, sigma, passed),) = calls
    assert_close(x, torch.cat([X, X]))
    assert_close(sigma, torch.cat([SIGMA, SIGMA]))
    assert passed is cond


def test_it_is_a_denoiser() -> None:
    """A sampler takes it, and it can be wrapped again."""
    sigmas = torch.tensor([10.0, 1.0, 0.0])
    plain = [step.x for step in euler(denoiser, X, sigmas, COND)]
    guided = [step.x for step in euler(ClassifierFreeGuidance(denoiser, 1.0), X, sigmas, BOTH)]
    assert_close(guided, plain)
    nested = ClassifierFreeGuidance(ClassifierFreeGuidance(denoiser, 1.0), 0.0)
    quarters = torch.cat([COND, COND, UNCOND.expand_as(COND), COND])
    assert_close(nested(X, SIGMA, quarters), denoiser(X, SIGMA, UNCOND))
