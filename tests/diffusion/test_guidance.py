"""The guidance rules: their formulas, their signature, and what they do not compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor
from torch.testing import assert_close

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.guidance import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    Guidance,
)
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


RULES: list[Callable[..., Guidance]] = [
    ClassifierFreeGuidance,
    lambda *args, **options: ClassifierFreeGuidance(*args, rescale=0.7, **options),
    AdaptiveProjectedGuidance,
]
rules = pytest.mark.parametrize("rule", RULES, ids=["cfg", "rescale", "apg"])


class Recorder:
    """A denoiser that keeps the batch size and the levels of each call."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        assert len(x) == len(sigma) == len(cond)
        self.batches.append(len(x))
        return denoiser(x, sigma, cond)


@pytest.mark.parametrize("scale", [0.0, 2.0, 7.5])
@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
def test_rescale_is_diffusers_guidance_rescale_of_v(scale: float, rescale: float) -> None:
    """Lin et al. (2023), section 3.4, as diffusers' pipelines compute it on the network's v."""

    def network(x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        return torch.sin(2 * x + cond) + timestep[:, None, None, None] / 1000

    def guided_network(x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        twice = network(torch.cat([x, x]), torch.cat([timestep, timestep]), cond)
        uncond, conditional = twice.chunk(2)
        guided = uncond + scale * (conditional - uncond)
        return rescale_noise_cfg(guided, conditional, rescale)

    v = PARAMETERIZATIONS["v_prediction"]
    expected = Denoiser(guided_network, SCHEDULE, v)(X, SIGMA, BOTH)
    guided = ClassifierFreeGuidance(Denoiser(network, SCHEDULE, v), scale, rescale=rescale)
    assert_close(guided(X, SIGMA, BOTH), expected, rtol=1e-4, atol=1e-4)


def test_a_network_that_has_learned_nothing_is_rescaled_without_dividing_by_zero() -> None:
    """Zero from the U-Net's closed last layer, as at the start of training, has no spread."""
    zero = Denoiser(lambda x, *_: 0 * x, SCHEDULE, PARAMETERIZATIONS["v_prediction"])
    guided = ClassifierFreeGuidance(zero, 4.0, rescale=0.7)(X, SIGMA, BOTH)
    assert_close(guided, zero(X, SIGMA, COND))
    nothing = AdaptiveProjectedGuidance(lambda x, *_: 0 * x, 4.0)(X, SIGMA, BOTH)
    assert_close(nothing, torch.zeros_like(X))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("norm_threshold", [2.0, 8.0, math.inf])
@pytest.mark.parametrize("momentum", [0.0, -0.5])
def test_apg_is_diffusers_normalized_guidance(
    eta: float, norm_threshold: float, momentum: float
) -> None:
    """Three steps of the rule by Sadat et al. (2024), the first author's code in diffusers.

    From D_cond with w - 1 as the paper has it, which diffusers calls the original formulation.
    Some norms are on each side of a finite threshold.
    """
    scale = 5.0
    guidance = AdaptiveProjectedGuidance(
        denoiser, scale, eta=eta, norm_threshold=norm_threshold, momentum=momentum
    )
    buffer = MomentumBuffer(momentum)
    norms = []
    for step in range(3):
        x = X * (3 - step)
        uncond, conditional = denoiser(x, SIGMA, UNCOND), denoiser(x, SIGMA, COND)
        expected = normalized_guidance(
            conditional,
            uncond,
            scale - 1,
            buffer,
            eta,
            0.0 if math.isinf(norm_threshold) else norm_threshold,
            use_original_formulation=True,
        )
        norms += buffer.running_average.flatten(1).norm(dim=1).tolist()
        assert_close(guidance(x, SIGMA, BOTH), expected, rtol=1e-4, atol=1e-5)
    assert min(norms) < norm_threshold
    assert max(norms) > norm_threshold or math.isinf(norm_threshold)


@pytest.mark.parametrize("scale", [0.0, 2.0, 7.5])
def test_apg_that_holds_nothing_back_is_classifier_free_guidance(scale: float) -> None:
    apg = AdaptiveProjectedGuidance(denoiser, scale, eta=1.0, norm_threshold=math.inf, momentum=0.0)
    plain = ClassifierFreeGuidance(denoiser, scale)
    for x in (X, 2 * X):
        assert_close(apg(x, SIGMA, BOTH), plain(x, SIGMA, BOTH), rtol=1e-4, atol=1e-5)


def test_apg_leaves_the_length_along_the_conditional_alone() -> None:
    """With eta 0 the guidance is orthogonal to D_cond, picture by picture, and no longer than r."""
    sigma = torch.tensor([0.1, 0.5, 1.0])
    guided = AdaptiveProjectedGuidance(denoiser, 3.0, norm_threshold=1.5)(X, sigma, BOTH)
    conditional = denoiser(X, sigma, COND)
    update = (guided - conditional) / 2
    assert_close((update * conditional).sum(dim=(1, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    assert (update.flatten(1).norm(dim=1) <= 1.5 + 1e-4).all()
    assert (update.flatten(1).norm(dim=1) > 0.1).all()


@rules
def test_a_limited_interval_guides_at_its_levels_alone(rule: Callable[..., Guidance]) -> None:
    """low < sigma <= high of Kynkaanniemi et al. (2024); elsewhere half the work is not done."""
    recorder = Recorder()
    guidance = rule(recorder, 4.0, interval=(0.5, 2.0))
    for level, on in ((14.6, False), (2.0, True), (1.0, True), (0.5, False), (0.03, False)):
        sigma = torch.full((3,), level)
        guided = guidance(X, sigma, BOTH)
        assert recorder.batches.pop() == (6 if on else 3)
        assert not recorder.batches
        conditional = denoiser(X, sigma, COND)
        if on:
            assert (guided - conditional).abs().max() > 0.01
        else:
            assert_close(guided, conditional, rtol=0, atol=0)


@rules
def test_scale_1_computes_no_unconditional_half(rule: Callable[..., Guidance]) -> None:
    recorder = Recorder()
    guided = rule(recorder, 1.0)(X, SIGMA, BOTH)
    assert recorder.batches == [3]
    assert_close(guided, denoiser(X, SIGMA, COND), rtol=0, atol=0)


@rules
def test_the_conditional_half_is_taken_by_slicing(rule: Callable[..., Guidance]) -> None:
    """Whatever cond is, cond[B:] is all that is asked of it, and only where guidance is off."""

    class Sliced:
        def __getitem__(self, rows: slice) -> Tensor:
            assert rows == slice(3, None)
            return COND

    assert_close(rule(denoiser, 1.0)(X, SIGMA, Sliced()), denoiser(X, SIGMA, COND))


@rules
@pytest.mark.parametrize("interval", [(0.0, math.inf), (0.5, 5.0), (2.0, 50.0)])
def test_a_picture_does_not_depend_on_its_neighbours(
    rule: Callable[..., Guidance], interval: tuple[float, float]
) -> None:
    """In any step, also where its neighbours stand at levels that are guided and it does not."""
    together = rule(denoiser, 4.0, interval=interval)
    alone = [rule(denoiser, 4.0, interval=interval) for _ in range(3)]
    for sigma in (SIGMA, SIGMA.flip(0), SIGMA.roll(1)):
        guided = together(X * sigma.mean(), sigma, BOTH)
        for row, rule_of_row in enumerate(alone):
            one = slice(row, row + 1)
            cond = torch.cat([BOTH[:3][one], BOTH[3:][one]])
            result = rule_of_row((X * sigma.mean())[one], sigma[one], cond)
            assert_close(result, guided[one], rtol=1e-5, atol=1e-6)
