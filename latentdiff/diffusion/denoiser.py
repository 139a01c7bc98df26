"""D(x, sigma, cond) -> clean latents: the one function that loss and samplers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from latentdiff.diffusion.parameterization import Parameterization
from latentdiff.diffusion.schedule import Schedule

DenoiserFunction = Callable[[Tensor, Tensor, Any], Tensor]
"""(x [B, C, h, w], sigma [B], cond) -> denoised [B, C, h, w]."""


def like(values: Tensor, x: Tensor) -> Tensor:
    """values [B] with the axes of x [B, ...], to multiply it."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


class Denoiser:
    """An estimate of E[x0 | x = x0 + sigma * noise] made from a trained network.

    network: (scaled x [B, C, h, w], timestep [B], cond) -> F [B, C, h, w], where timestep is the
    parameterization's c_noise. A plain object: the network's parameters keep their own names.
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor, Any], Tensor],
        schedule: Schedule,
        parameterization: Parameterization,
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.parameterization = parameterization

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """x [B, C, h, w] with noise of standard deviation sigma [B] > 0 -> denoised, fp32."""
        c_skip = like(self.parameterization.c_skip(sigma), x)
        c_out = like(self.parameterization.c_out(sigma), x)
        return c_skip * x + c_out * self.network_output(x, sigma, cond)

    def network_output(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """F(c_in x, c_noise, cond) in x's dtype."""
        c_in = like(self.parameterization.c_in(sigma), x)
        c_noise = self.parameterization.c_noise or self.schedule.timestep
        return self.network(c_in * x, c_noise(sigma), cond).to(x.dtype)
