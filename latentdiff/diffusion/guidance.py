"""Guidance rules as wrappers with the denoiser's own signature.

All take x [B, C, h, w], sigma [B] and a cond of batch 2B, the unconditional half first, of which
`cond[B:]` is the conditional half. Outside their interval of sigma, and with scale 1, they are the
conditional denoiser, and nothing unconditional is computed. A row depends on no other row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import DenoiserFunction, like

EVERYWHERE = (0.0, math.inf)


class Guidance:
    """What the rules have in common; each says in `guide` how it joins the two halves."""

    def __init__(
        self,
        denoiser: DenoiserFunction,
        guidance_scale: float,
        interval: tuple[float, float] = EVERYWHERE,
    ) -> None:
        self.denoiser = denoiser
        self.guidance_scale = guidance_scale
        self.interval = interval

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """The guided denoised [B, C, h, w]."""
        low, high = self.interval
        on = (sigma > low) & (sigma <= high)
        if self.guidance_scale == 1 or not on.any():
            return self.denoiser(x, sigma, cond[len(x) :])
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cond)
        uncond, conditional = both.chunk(2)
        on = like(on, x)
        guided = self.guide(x, like(sigma, x), uncond, conditional, on)
        return torch.where(on, guided, conditional)

    def guide(
        self, x: Tensor, sigma: Tensor, uncond: Tensor, conditional: Tensor, on: Tensor
    ) -> Tensor:
        """The guided denoised; sigma and `on`, the rows that are guided, are [B, 1, 1, 1]."""
        raise NotImplementedError


class ClassifierFreeGuidance(Guidance):
    """D_uncond + w (D_cond - D_uncond): Ho & Salimans (2022), equation 6, on denoised latents.

    D is affine in the network's output, so guiding D and guiding epsilon or v are the same.

    Args:
        guidance_scale: w; 1 is no guidance.
        rescale: phi of Lin et al. (2023), section 3.4, from 0 to 1: how far the guided velocity is
            brought back to the conditional one's standard deviation.
        interval: the noise levels, low < sigma <= high, at which to guide: Kynkaanniemi et al.
            (2024), section 3.
    """

    def __init__(
        self,
        denoiser: DenoiserFunction,
        guidance_scale: float,
        *,
        rescale: float = 0.0,
        interval: tuple[float, float] = EVERYWHERE,
    ) -> None:
        super().__init__(denoiser, guidance_scale, interval)
        self.rescale = rescale

    def guide(
        self, x: Tensor, sigma: Tensor, uncond: Tensor, conditional: Tensor, on: Tensor
    ) -> Tensor:
        guided = torch.lerp(uncond, conditional, self.guidance_scale)
        if self.rescale == 0:
            return guided
        # D - x / (sigma^2 + 1) is the velocity of Salimans & Ho (2022) times a factor of sigma.
        still = x / (sigma**2 + 1)
        velocity, target = guided - still, conditional - still
        spread = _per_row(torch.std, velocity).clamp(min=torch.finfo(x.dtype).tiny)
        ratio = _per_row(torch.std, target) / spread
        return still + (self.rescale * ratio + 1 - self.rescale) * velocity


class AdaptiveProjectedGuidance(Guidance):
    """Classifier-free guidance less what saturates colours: Sadat et al. (2024), on the denoised.

    It remembers: make a new one for each batch of pictures. The defaults are the paper's for
    Stable Diffusion XL.

    Args:
        guidance_scale: w of classifier-free guidance.
        eta: how much is kept of the part of the guidance that is parallel to D_cond.
        norm_threshold: r, the largest Euclidean norm of a picture's guidance; infinity is no limit.
        momentum: beta, the weight of the guidance before in each; below 0 it is pushed away from.
        interval: as for ClassifierFreeGuidance.
    """

    def __init__(
        self,
        denoiser: DenoiserFunction,
        guidance_scale: float,
        *,
        eta: float = 0.0,
        norm_threshold: float = 15.0,
        momentum: float = -0.5,
        interval: tuple[float, float] = EVERYWHERE,
    ) -> None:
        super().__init__(denoiser, guidance_scale, interval)
        self.eta = eta
        self.norm_threshold = norm_threshold
        self.momentum = momentum
        self._average: Tensor | None = None

    def guide(
        self, x: Tensor, sigma: Tensor, uncond: Tensor, conditional: Tensor, on: Tensor
    ) -> Tensor:
        difference = conditional - uncond
        average = torch.zeros_like(x) if self._average is None else self._average
        self._average = torch.where(on, difference + self.momentum * average, average)
        norm = _per_row(torch.sum, self._average**2).sqrt()
        update = self._average * (self.norm_threshold / norm).clamp(max=1)
        length = _per_row(torch.sum, conditional**2).clamp(min=torch.finfo(x.dtype).tiny)
        parallel = _per_row(torch.sum, update * conditional) / length * conditional
        return conditional + (self.guidance_scale - 1) * (update + (self.eta - 1) * parallel)


def _per_row(reduce: Any, values: Tensor) -> Tensor:
    """`reduce` over all axes but the first, which stay as axes of length 1."""
    return reduce(values, dim=tuple(range(1, values.ndim)), keepdim=True)
