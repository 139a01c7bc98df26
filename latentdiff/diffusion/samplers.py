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
"""N(0, I) noise of x's shape for step number i."""


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


def dpmpp_2m(
    denoiser: DenoiserFunction,
    x: Tensor,
    sigmas: Tensor,
    cond: Any = None,
    *,
    noise: FreshNoise | None = None,
) -> Iterator[Step]:
    """DPM-Solver++(2M), Algorithm 2 of Lu et al. (2022), with lambda = -log sigma.

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


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "dpmpp_2m": dpmpp_2m,
}
"""Every sampler by the name that `generate` takes."""
