"""The training loss and its weightings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser, like

Weighting = Callable[[Tensor, Tensor], Tensor]
"""(sigma [B], c_out [B]) -> weight [B] of the squared error of F."""


def uniform(sigma: Tensor, c_out: Tensor) -> Tensor:
    """L_simple, equation 14 of Ho et al. (2020): every timestep's F counts alike."""
    return torch.ones_like(sigma)


def min_snr(gamma: float, floor: float = 0.0) -> Weighting:
    """min(SNR, gamma) on the error of x0, SNR = 1 / sigma^2: Hang et al. (2023), section 3.4.

    The error of x0 is c_out times that of F, so F's weight is min(SNR, gamma) c_out^2: for epsilon
    min(SNR, gamma) / SNR, for v min(SNR, gamma) / (SNR + 1).

    Where the SNR ends at zero, so does that weight, though sampling starts there. A floor of 1 is
    the truncation of Salimans & Ho (2022), section 4: max(SNR, 1) on the error of x0. It raises no
    weight of F above the uniform one: epsilon's weights, finite at SNR 0, stay what they are.

    gamma: > 0, and >= floor.
    """

    def weighting(sigma: Tensor, c_out: Tensor) -> Tensor:
        of_x0 = (sigma**-2).clamp(max=gamma)
        return torch.maximum(of_x0 * c_out**2, (floor * c_out**2).clamp(max=1))

    return weighting


def offset_noise(noise: Tensor, offset: Tensor, strength: float) -> Tensor:
    """Noise [B, C, h, w] whose mean varies, too, so that a picture's brightness is learned.

    Guttenberg (2023), "Diffusion with Offset Noise".

    Args:
        offset: N(0, I) noise [B, C, 1, 1].
        strength: its standard deviation, 0.1 there.
    """
    return noise + strength * offset


def diffusion_loss(
    denoiser: Denoiser,
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    cond: Any,
    weighting: Weighting = uniform,
    perturbation: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the network's prediction for each sample, [B], fp32.

    With epsilon and uniform weights, one gradient step on it is Algorithm 1 of Ho et al. (2020).
    Nothing is drawn here.

    Args:
        x0, noise: clean latents and N(0, I) noise [B, C, h, w].
        sigma: noise level of each sample [B], > 0.
        cond: what the network is conditioned on, passed through.
        perturbation: further noise [B, C, h, w] that the network sees and does not learn to
            predict, 0.1 N(0, I) in Ning et al. (2023), Algorithm 1.
    """
    x0, noise, sigma = x0.float(), noise.float(), sigma.float()
    x = x0 + like(sigma, x0) * noise
    c_skip = denoiser.parameterization.c_skip(sigma)
    c_out = denoiser.parameterization.c_out(sigma)
    target = (x0 - like(c_skip, x) * x) / like(c_out, x)
    if perturbation is not None:
        x = x + like(sigma, x) * perturbation
    error = (denoiser.network_output(x, sigma, cond) - target).square().flatten(1).mean(dim=1)
    return weighting(sigma, c_out) * error
