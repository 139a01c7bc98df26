"""Guidance rules as wrappers with the denoiser's own signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import DenoiserFunction


class ClassifierFreeGuidance:
    """D_uncond + w (D_cond - D_uncond): Ho & Salimans (2022), equation 6, on denoised latents.

    D is affine in the network's output, so guiding D and guiding epsilon or v are the same.
    """

    def __init__(self, denoiser: DenoiserFunction, guidance_scale: float) -> None:
        self.denoiser = denoiser
        self.guidance_scale = guidance_scale

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """x [B, C, h, w], sigma [B]; cond has batch 2B, the unconditional half first."""
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cond)
        uncond, conditional = both.chunk(2)
        return torch.lerp(uncond, conditional, self.guidance_scale)
