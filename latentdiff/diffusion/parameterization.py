"""What the network predicts, as the three coefficients of a preconditioned denoiser.

D(x) = c_skip x + c_out F(c_in x), in the form of Karras et al. (2022), equation 7, with the
variance-preserving c_in = 1 / sqrt(sigma^2 + 1) that DDPM-trained networks expect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Coefficient = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parameterization:
    """Each coefficient is a function of sigma, elementwise."""

    c_skip: Coefficient
    c_out: Coefficient
    c_in: Coefficient


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
}
"""By the names that diffusers gives them as prediction_type."""
