"""What the network predicts, as the coefficients of a preconditioned denoiser.

D(x) = c_skip x + c_out F(c_in x, c_noise), in the form of Karras et al. (2022), equation 7.
Networks trained as in DDPM expect the variance-preserving c_in = 1 / sqrt(sigma^2 + 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Coefficient = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parameterization:
    """Each coefficient is a function of sigma, elementwise.

    c_noise is what the network is told of sigma; None means the timestep in the schedule that it
    was trained on.
    """

    c_skip: Coefficient
    c_out: Coefficient
    c_in: Coefficient
    c_noise: Coefficient | None = None


def variance_preserving(sigma: Tensor) -> Tensor:
    """1 / sqrt(sigma^2 + 1) = sqrt(alphas_cumprod)."""
    return (sigma**2 + 1).rsqrt()


PARAMETERIZATIONS = {
    # Ho et al. (2020): F is the noise.
    "epsilon": Parameterization(
        c_skip=lambda sigma: sigma**0,
        c_out=lambda sigma: -sigma,
        c_in=variance_preserving,
    ),
    # Salimans & Ho (2022), appendix D: F is sqrt(abar) noise - sqrt(1 - abar) x0.
    "v_prediction": Parameterization(
        c_skip=lambda sigma: 1 / (sigma**2 + 1),
        c_out=lambda sigma: -sigma * (sigma**2 + 1).rsqrt(),
        c_in=variance_preserving,
    ),
    # Ho et al. (2020), section 3.2: F is x0.
    "sample": Parameterization(
        c_skip=lambda sigma: 0 * sigma,
        c_out=lambda sigma: sigma**0,
        c_in=variance_preserving,
    ),
    # Liu et al. (2023), equation 1, and Esser et al. (2024), section 2: the network sees
    # (1 - t) x0 + t noise with t = sigma / (1 + sigma), and 1000 t; F is noise - x0.
    "flow_prediction": Parameterization(
        c_skip=lambda sigma: 1 / (1 + sigma),
        c_out=lambda sigma: -sigma / (1 + sigma),
        c_in=lambda sigma: 1 / (1 + sigma),
        c_noise=lambda sigma: 1000 * sigma / (1 + sigma),
    ),
}
"""By the names that diffusers gives them as prediction_type."""


def edm(sigma_data: float = 0.5) -> Parameterization:
    """The preconditioning of Karras et al. (2022), table 1: F has variance 1 at every sigma.

    sigma_data: the standard deviation of x0.
    """
    return Parameterization(
        c_skip=lambda sigma: sigma_data**2 / (sigma**2 + sigma_data**2),
        c_out=lambda sigma: sigma * sigma_data * (sigma**2 + sigma_data**2).rsqrt(),
        c_in=lambda sigma: (sigma**2 + sigma_data**2).rsqrt(),
        c_noise=lambda sigma: sigma.log() / 4,
    )
