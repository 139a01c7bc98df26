"""What samplers are given for a request: noise levels, noise, guidance; and pixels at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdiff.checkpoint import ModelParts
from latentdiff.diffusion.denoiser import DenoiserFunction
from latentdiff.diffusion.guidance import (
    EVERYWHERE,
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
)
from latentdiff.errors import InputError
from latentdiff.inputs import Start
from latentdiff.request import Picture, Settings
from latentdiff.rng import keyed_normal, picture_noise


def noise_levels(parts: ModelParts, settings: Settings, start: Start | None) -> Tensor:
    """The noise levels [N + 1] that sampling visits, descending; from a picture, the last of them.

    SDEdit's t_0 (Meng et al. 2022) is `strength` of the way.
    """
    config, schedule = parts.scheduler_config, parts.schedule
    spacing: Any = settings.spacing or config.spacing
    if settings.spacing is None and settings.sampler == "lcm":
        spacing = "trailing"  # what consistency models are distilled to start from
    count = settings.num_inference_steps
    sigmas = schedule.sampling_sigmas(count, spacing, config.steps_offset)
    if settings.sampler == "ddim" and not config.set_alpha_to_one:
        sigmas[-1] = schedule.sigmas[0]
    return sigmas if start is None else sigmas[count - int(count * (settings.strength or 1)) :]


def initial_noise(parts: ModelParts, pictures: Sequence[Picture], settings: Settings) -> Tensor:
    """N(0, I) noise [B, C, h, w], one generator for each picture."""
    factor = parts.autoencoder.scale_factor
    shape = (settings.height // factor, settings.width // factor)
    seeds = [picture.seed for picture in pictures]
    return picture_noise(seeds, (parts.autoencoder.latent_channels, *shape))


def fresh_noise(pictures: Sequence[Picture], x: Tensor, index: int) -> Tensor:
    """Noise [B, C, h, w] number `index` of a stochastic sampler, keyed by each picture's seed."""
    rows = [keyed_normal(p.seed, "sampler", index, [0], tuple(x.shape[1:])) for p in pictures]
    return torch.cat(rows).to(x.device)


def guided(denoiser: DenoiserFunction, settings: Settings) -> DenoiserFunction:
    """The guidance rule that is asked for, made anew for each batch: some remember."""
    interval = settings.guidance_interval or EVERYWHERE
    if settings.guidance == "apg":
        return AdaptiveProjectedGuidance(denoiser, settings.guidance_scale, interval=interval)
    return ClassifierFreeGuidance(
        denoiser, settings.guidance_scale, rescale=settings.guidance_rescale, interval=interval
    )


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images [B, 3, H, W] in [-1, 1] to 8-bit RGB. Raises InputError where they are not finite."""
    if not torch.isfinite(images).all():
        raise InputError(
            "The model computed values that are not finite; its weights are damaged, or they "
            "overflow in this dtype and need float32."
        )
    pixels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]
