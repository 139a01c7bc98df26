"""Samplers: plain generators over sigmas, in the coordinates x = x0 + sigma * noise.

Each takes x [B, C, h, w] = x0 + sigmas[0] * noise and sigmas [N + 1], descending, the last one
usually 0; it yields N steps, the last of which holds the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import DenoiserFunction

FreshNoise = Callable[[int], Tensor]
"""N(0, I) noise of x's shape, number i: one for each step, or two."""


@dataclass(frozen=True)
class Step:
    """After step `index`: x [B, C, h, w] at noise level `sigma`, and the denoised it came from."""

    index: int
    sigma: float
    x: Tensor
    denoised: Tensor


Sampler = Callable[..., Iterator[Step]]


def _levels(x: Tensor, sigmas: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(index, sigma, next sigma, sigma [B]) of each step."""
    for index, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        yield index, sigma, following, sigma.expand(len(x))


def ddpm(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    *,
    noise: FreshNoise,
) -> Iterator[Step]:
    """Algorithm 2 of Ho et al. (2020) with the posterior variance of equation 7.

    In these coordinates q(x_s | x_t, x0) for s < t has mean x0 + (s/t)^2 (x_t - x0) and standard
    deviation s sqrt(1 - (s/t)^2), whatever steps are left out.
    """
    return ddim(denoiser, x, sigmas, cond, noise=noise, eta=1.0)


def euler_ancestral(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    *,
    noise: FreshNoise,
) -> Iterator[Step]:
    """Euler's method down past the next level, and fresh noise up to it, as k-diffusion has it.

    Its sigma_down and sigma_up are DDIM's at eta 1, and in these coordinates DDIM is Euler's method
    (Song et al. 2021, section 4.3): it is Algorithm 2 of Ho et al. (2020) under another name.
    """
    return ddim(denoiser, x, sigmas, cond, noise=noise, eta=1.0)


def ddim(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    *,
    noise: FreshNoise | None = None,
    eta: float = 0.0,
) -> Iterator[Step]:
    """Song et al. (2021), equations 12 and 16: eta 0 is deterministic, 1 is DDPM's posterior.

    Their sigma_t, divided by sqrt(alphas_cumprod), is `up` here; `down` is the rest of the level.
    Raises ValueError at the first step if eta > 0 and there is no noise.
    """
    if eta > 0 and noise is None:
        raise ValueError("ddim with eta > 0 takes out noise to put fresh noise in: pass noise.")
    for index, sigma, following, level in _levels(x, sigmas):
        denoised = denoiser(x, level, cond)
        up = eta * following * torch.sqrt(1 - (following / sigma) ** 2)
        down = torch.sqrt(following**2 - up**2)
        x = denoised + (down / sigma) * (x - denoised)
        if noise is not None and eta > 0 and following > 0:
            x = x + up * noise(index)
        yield Step(index, float(following), x, denoised)


def euler(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    *,
    noise: FreshNoise | None = None,
) -> Iterator[Step]:
    """Euler's method on dx/dsigma = (x - D) / sigma: Karras et al. (2022), equation 3."""
    for index, sigma, following, level in _levels(x, sigmas):
        denoised = denoiser(x, level, cond)
        x = x + (following - sigma) * (x - denoised) / sigma
        yield Step(index, float(following), x, denoised)


def heun(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    *,
    noise: FreshNoise | None = None,
) -> Iterator[Step]:
    """Algorithm 1 of Karras et al. (2022), the mean of the slopes at both ends; second order.

    Two calls of the denoiser a step, and one in the step to sigma = 0.
    """
    for index, sigma, following, level in _levels(x, sigmas):
        denoised = denoiser(x, level, cond)
        slope = (x - denoised) / sigma
        ahead = x + (following - sigma) * slope
        if following > 0:
            denoised = denoiser(ahead, following.expand(len(x)), cond)
            slope = (slope + (ahead - denoised) / following) / 2
        x = x + (following - sigma) * slope
        yield Step(index, float(following), x, denoised)


def dpm2(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    *,
    noise: FreshNoise | None = None,
) -> Iterator[Step]:
    """DPM-Solver-2, Algorithm 1 of Lu et al. (2022a): the slope halfway in lambda = -log sigma.

    Two calls of the denoiser a step, and one in the step to sigma = 0.
    """
    for index, sigma, following, level in _levels(x, sigmas):
        denoised = denoiser(x, level, cond)
        slope = (x - denoised) / sigma
        if following > 0:
            middle = torch.sqrt(sigma * following)
            halfway = x + (middle - sigma) * slope
            denoised = denoiser(halfway, middle.expand(len(x)), cond)
            slope = (halfway - denoised) / middle
        x = x + (following - sigma) * slope
        yield Step(index, float(following), x, denoised)


def dpmpp_2m(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    *,
    noise: FreshNoise | None = None,
) -> Iterator[Step]:
    """DPM-Solver++(2M), Algorithm 2 of Lu et al. (2022b), with lambda = -log sigma.

    The step to sigma = 0 is of first order, where lambda is infinite.
    """
    previous, last_h = None, torch.zeros(())
    for index, sigma, following, level in _levels(x, sigmas):
        denoised = denoiser(x, level, cond)
        h = torch.log(sigma / following)
        direction = denoised
        if previous is not None and following > 0:
            r = last_h / h
            direction = denoised + (denoised - previous) / (2 * r)
        x = (following / sigma) * x - torch.expm1(-h) * direction
        previous, last_h = denoised, h
        yield Step(index, float(following), x, denoised)


def dpmpp_2m_sde(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    *,
    noise: FreshNoise,
) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M), Lu et al. (2022b): dpmpp_2m on the reverse SDE, whose drift is doubled.

    Without its term of second order it is ddpm, and so it is in the first step and the one to
    sigma = 0.
    """
    previous, last_h = None, torch.zeros(())
    for index, sigma, following, level in _levels(x, sigmas):
        denoised = denoiser(x, level, cond)
        h = torch.log(sigma / following)
        direction = denoised
        if previous is not None and following > 0:
            direction = denoised + (denoised - previous) * h / (2 * last_h)
        x = (following / sigma) ** 2 * x - torch.expm1(-2 * h) * direction
        if following > 0:
            x = x + following * torch.sqrt(-torch.expm1(-2 * h)) * noise(index)
        previous, last_h = denoised, h
        yield Step(index, float(following), x, denoised)


def dpmpp_sde(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    *,
    noise: FreshNoise,
) -> Iterator[Step]:
    """k-diffusion's DPM-Solver++ (stochastic): ddpm with the denoised of halfway in log sigma.

    Halfway is reached by ddpm too, on the same path of the noise: the second half's noise is added
    to what the first half's has become. Two calls of the denoiser and noise(2i), noise(2i + 1) in
    step i, and one call in the step to sigma = 0.
    """
    for index, sigma, following, level in _levels(x, sigmas):
        denoised = denoiser(x, level, cond)
        path: Tensor | float = 0.0
        if following > 0:
            middle = torch.sqrt(sigma * following)
            ratio = following / middle  # = middle / sigma
            up = torch.sqrt(1 - ratio**2)
            path = middle * up * noise(2 * index)
            halfway = denoised + ratio**2 * (x - denoised) + path
            denoised = denoiser(halfway, middle.expand(len(x)), cond)
            path = ratio**2 * path + following * up * noise(2 * index + 1)
        x = denoised + (following / sigma) ** 2 * (x - denoised) + path
        yield Step(index, float(following), x, denoised)


def unipc(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    *,
    noise: FreshNoise | None = None,
) -> Iterator[Step]:
    """UniPC-2 of Zhao et al. (2023), section 3, on data predictions with B(h) = e^h - 1.

    The predictor is dpmpp_2m. Before each step the corrector takes the last one again, knowing the
    denoised of where it led, and makes it of third order; the denoiser is not called for that.
    """
    start, h, last_h = x, torch.zeros(()), torch.zeros(())
    previous, before = None, None
    for index, sigma, following, level in _levels(x, sigmas):
        denoised = denoiser(x, level, cond)
        if previous is not None:
            direction = _unic(denoised, previous, before, h, last_h)
            x = torch.exp(-h) * start - torch.expm1(-h) * direction
        last_h, h = h, torch.log(sigma.double() / following)
        direction = denoised
        if previous is not None and following > 0:
            direction = denoised + (denoised - previous) * h / (2 * last_h)
        start, x = x, torch.exp(-h) * x - torch.expm1(-h) * direction
        before, previous = previous, denoised
        yield Step(index, float(following), x, denoised)


def _unic(
    denoised: Tensor, previous: Tensor, before: Tensor | None, h: Tensor, last_h: Tensor
) -> Tensor:
    """UniC-2's estimate of the denoised over the step of h from `previous` to `denoised`.

    The weights solve R a = b of the paper; UniC-1, its 1/2, where nothing was before.
    """
    if before is None:
        return (previous + denoised) / 2
    r, full = -last_h / h, torch.expm1(-h)
    phi_2 = -full / h - 1
    phi_3 = -phi_2 / h - 1 / 2
    b_1, b_2 = phi_2 / full, 2 * phi_3 / full
    a_1 = (b_1 - b_2) / (1 - r)
    return previous + (before - previous) * a_1 / r + (denoised - previous) * (b_1 - a_1)


def lcm(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    *,
    noise: FreshNoise,
) -> Iterator[Step]:
    """Multistep sampling of a latent consistency model, Algorithm 3 of Luo et al. (2023).

    Each step takes the denoised for the data and adds noise anew; only a network distilled for it,
    or with an LCM-LoRA, gives sharp pictures. The paper's c_skip and c_out are 0 and 1 here, as
    they are to 1e-5 at the timesteps, 19 and up, that such networks are distilled at.
    """
    for index, _, following, level in _levels(x, sigmas):
        denoised = denoiser(x, level, cond)
        x = denoised
        if following > 0:
            x = x + following * noise(index)
        yield Step(index, float(following), x, denoised)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpm2": dpm2,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_sde": dpmpp_sde,
    "unipc": unipc,
    "lcm": lcm,
}
"""Every sampler by the name that `generate` takes."""
