"""Consistency distillation against diffusers' DDIM, closed forms and a student that learns it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.testing import assert_close

from latentdiff.diffusion.consistency import HUBER, consistency_loss, pseudo_huber
from latentdiff.diffusion.denoiser import Denoiser, DenoiserFunction, like
from latentdiff.diffusion.loss import diffusion_loss
from latentdiff.diffusion.parameterization import PARAMETERIZATIONS
from latentdiff.diffusion.schedule import Schedule

DDIM = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    timestep_spacing="trailing",
    prediction_type="v_prediction",
)
SCHEDULE = Schedule(DDIM.alphas_cumprod)
STEPS = 50
STD = 0.7


def draw(number: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number))


def network(shift: int) -> Any:
    def predict(x: Tensor, timestep: Tensor, cond: Tensor) -> Tensor:
        return torch.tanh(1.5 * x.roll(shift, -1) + cond + timestep[:, None, None, None] / 500)

    return predict


def test_a_step_is_diffusers_ddim_and_the_target_the_students_estimate_after_it() -> None:
    """Algorithm 1 of Luo et al. (2023), lines 6 to 9, in x_t's own coordinates."""
    timestep = torch.tensor([19, 39, 499, 999])
    x0, noise, cond = (draw(number, 4, 3, 5, 6) for number in range(3))
    learner, guide = network(1), network(2)
    parameterization = PARAMETERIZATIONS["v_prediction"]
    before = (timestep - 20).clamp(min=0)
    following = torch.where(timestep > 19, SCHEDULE.sigmas[before], torch.zeros(4))
    ours = consistency_loss(
        Denoiser(learner, SCHEDULE, parameterization),
        Denoiser(guide, SCHEDULE, parameterization),
        x0,
        SCHEDULE.sigmas[timestep],
        following,
        noise,
        cond,
    )

    DDIM.set_timesteps(STEPS)
    alphas = DDIM.alphas_cumprod[:, None, None, None]

    def estimate(x_t: Tensor, t: int, row: slice) -> Tensor:
        """x0 by the velocity: Salimans & Ho (2022), appendix D."""
        velocity = learner(x_t, torch.tensor([float(t)]), cond[row])
        return alphas[t].sqrt() * x_t - (1 - alphas[t]).sqrt() * velocity

    expected = []
    for index, t in enumerate(timestep.tolist()):
        row = slice(index, index + 1)
        x_t = DDIM.add_noise(x0[row], noise[row], timestep[row])
        output = guide(x_t, torch.tensor([float(t)]), cond[row])
        earlier = DDIM.step(output, t, x_t).prev_sample
        target = estimate(earlier, t - 20, row) if t > 19 else earlier
        distance = (estimate(x_t, t, row) - target).square().sum()
        c = 0.00054 * math.sqrt(x0[0].numel())
        velocity = (1 - DDIM.alphas_cumprod[t]).sqrt()  # x0 changes by so much of its change
        expected.append(((distance + c**2).sqrt() - c) / velocity)
    assert_close(ours, torch.stack(expected), rtol=1e-3, atol=1e-4)


def gaussian(x: Tensor, sigma: Tensor, cond: None) -> Tensor:
    """E[x0 | x] of data N(0, STD^2)."""
    return x * like(STD**2 / (STD**2 + sigma**2), x)


def end_of_the_flow(x: Tensor, sigma: Tensor, cond: None) -> Tensor:
    """f(x, sigma) of such data: Song et al. (2023), definition 1."""
    return x * like(STD / (STD**2 + sigma**2).sqrt(), x)


def loss_of_the_true_function(steps: int) -> float:
    levels = SCHEDULE.sampling_sigmas(steps)
    sigma, following = levels[steps // 2][None].expand(256), levels[steps // 2 + 1]
    following = following[None].expand(256)
    x0, noise = STD * draw(0, 256, 1, 4, 4), draw(1, 256, 1, 4, 4)
    losses = consistency_loss(end_of_the_flow, gaussian, x0, sigma, following, noise, None)
    losses, c = losses / (1 + sigma**-2).sqrt(), HUBER * 4
    return float(((losses + c) ** 2 - c**2).clamp(min=0).sqrt().mean())


def test_the_true_consistency_function_is_consistent_to_the_order_of_ddim() -> None:
    """A step of Euler's method of length h is wrong by h^2, so half of it by a quarter."""
    errors = [loss_of_the_true_function(steps) for steps in (20, 40, 80)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.2)


def test_gradients_come_from_the_noisy_end_alone() -> None:
    gain = nn.Parameter(torch.ones(()))
    seen: list[tuple[bool, float]] = []

    def learner(x: Tensor, sigma: Tensor, cond: None) -> Tensor:
        seen.append((torch.is_grad_enabled(), float(sigma[0])))
        return gain * gaussian(x, sigma, cond)

    def teacher(x: Tensor, sigma: Tensor, cond: None) -> Tensor:
        assert not torch.is_grad_enabled()
        return gain * gaussian(x, sigma, cond)

    x0, noise = draw(0, 2, 1, 4, 4), draw(1, 2, 1, 4, 4)
    sigma, following = torch.full((2,), 3.0), torch.full((2,), 2.0)
    consistency_loss(learner, teacher, x0, sigma, following, noise, None).sum().backward()
    assert seen == [(False, 2.0), (True, 3.0)]
    assert gain.grad is not None
    x = x0 + 3 * noise
    target = gaussian(
        gaussian(x, sigma, None) + 2 / 3 * (x - gaussian(x, sigma, None)), following, None
    )
    own = gain * gaussian(x, sigma, None)
    (expected,) = torch.autograd.grad(pseudo_huber(own, target.detach()).sum(), gain)
    assert_close(gain.grad, (10 / 9) ** 0.5 * expected)


def test_pseudo_huber_is_a_square_nearby_and_the_distance_far_away() -> None:
    zero, c = torch.zeros(1, 2, 5, 10), HUBER * 10
    far, near = torch.full_like(zero, 3.0), torch.full_like(zero, 1e-6)
    assert float(pseudo_huber(far, zero)) == pytest.approx(30 - c, rel=1e-5)
    assert float(pseudo_huber(near.double(), zero.double())) == pytest.approx(
        1e-10 / (2 * c), rel=1e-3
    )
    assert float(pseudo_huber(far, far)) == 0


def test_a_student_that_learns_it_goes_to_the_end_of_its_teachers_flow_at_once() -> None:
    """One evaluation against 10 steps of DDIM from the same noise, for data in two places; the
    student begins, as it does in training, with what a diffusion model knows.
    """
    levels, channels, count = SCHEDULE.sampling_sigmas(10), 16, 256

    def teacher(x: Tensor, sigma: Tensor, cond: None) -> Tensor:
        """E[x0 | x] of data that is 1 everywhere or -1 everywhere."""
        return torch.tanh(x.sum(dim=1, keepdim=True) / like(sigma, x) ** 2).expand_as(x)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(channels + 1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        layers.append(nn.Linear(64, channels))
        student = Denoiser(
            lambda x, timestep, cond: layers(torch.cat([x, timestep[:, None] / 500 - 1], dim=1)),
            SCHEDULE,
            PARAMETERIZATIONS["v_prediction"],
        )
        optimizer = torch.optim.Adam(layers.parameters(), lr=3e-3, betas=(0.9, 0.99))
        cooldown = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=1500)
        for step in range(1500):
            index = torch.randint(0, 10, (count,))
            x0 = (torch.randint(0, 2, (count, 1)) * 2.0 - 1).expand(-1, channels)
            sigma, noise = levels[index], torch.randn(count, channels)
            if step < 500:
                losses = diffusion_loss(student, x0, sigma, noise, None)
            else:
                following = levels[index + 1]
                losses = consistency_loss(student, teacher, x0, sigma, following, noise, None)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            cooldown.step()
        start = (1 + levels[0] ** 2).sqrt() * torch.randn(1000, channels)
    end, first = ddim(teacher, start, levels), levels[0].expand(1000)
    with torch.no_grad():
        at_once = (student(start, first, None) - end).abs().mean()
    assert at_once < 0.5 * (teacher(start, first, None) - end).abs().mean()


def ddim(denoiser: DenoiserFunction, x: Tensor, levels: Tensor) -> Tensor:
    for sigma, following in itertools.pairwise(levels):
        denoised = denoiser(x, sigma.expand(len(x)), None)
        x = denoised + following / sigma * (x - denoised)
    return x
