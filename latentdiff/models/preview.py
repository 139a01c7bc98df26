"""What latents look like, without the VAE's decoder: pictures to watch while sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentdiff.errors import InputError
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.rng import generator

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

PICTURES = 32
SIDE = 8
"""Of the pictures that a map is fitted to, in latents."""
BATCH = 4


@dataclass(frozen=True)
class LatentPreview:
    """Quick pictures of latents, as good as those of a denoised estimate need to be."""

    latent_channels: int
    to_images: Callable[[Tensor], Tensor]
    """Latents [B, C, h, w], scaled as the U-Net sees them, to RGB about [-1, 1]."""

    @classmethod
    @torch.no_grad()
    def fit(cls, autoencoder: Autoencoder) -> LatentPreview:
        """The affine map from a latent to the mean colour of its pixels, one pixel for each.

        It is the least-squares solution over random pictures and the means of their posteriors,
        which a few channels of every such VAE nearly allow. The same VAE gives the same map.
        """
        factor = autoencoder.scale_factor
        device = next(autoencoder.parameters()).device
        latents, colours = [], []
        for images in _pictures(PICTURES, SIDE * factor).split(BATCH):
            latents.append(autoencoder.encode(images.to(device)).mean.cpu())
            colours.append(F.avg_pool2d(images, factor))
        known = F.pad(_positions(torch.cat(latents)), (0, 1), value=1.0)
        wanted = _positions(torch.cat(colours))
        weight, bias = (
            torch.linalg.lstsq(known, wanted, driver="gelsd")
            .solution.float()
            .split([known.shape[1] - 1, 1])
        )

        def to_images(latents: Tensor) -> Tensor:
            rgb = latents.float().movedim(1, -1) @ weight.to(latents.device)
            return (rgb + bias.to(latents.device)).movedim(-1, 1)

        return cls(autoencoder.latent_channels, to_images)

    @classmethod
    def tiny(cls, taesd: AutoencoderTiny) -> LatentPreview:
        """A distilled decoder, made for the latents of one VAE; its pictures have full size."""
        config = taesd.config

        @torch.no_grad()
        def to_images(latents: Tensor) -> Tensor:
            latents = latents / config.scaling_factor + config.shift_factor
            return taesd.decode(latents.to(taesd.device, taesd.dtype)).sample.float()

        return cls(config.latent_channels, to_images)

    def __call__(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] -> RGB, uint8 on the CPU: [B, h, w, 3], or larger from `tiny`.

        Values that are not finite become black. Raises InputError for latents with another
        number of channels.
        """
        if latents.shape[1] != self.latent_channels:
            raise InputError(
                f"The latents have {latents.shape[1]} channels but the preview reads "
                f"{self.latent_channels}; it belongs to another VAE."
            )
        images = torch.nan_to_num(self.to_images(latents), -1.0, -1.0, -1.0)
        pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu()

    def pictures(self, latents: Tensor, width: int, height: int) -> list[Image.Image]:
        """The same, scaled to `width` x `height` pixels."""
        size = (width, height)
        return [
            Image.fromarray(array).resize(size, Image.Resampling.BILINEAR)
            for array in self(latents).numpy()
        ]


def _positions(maps: Tensor) -> Tensor:
    """[B, C, h, w] -> [B * h * w, C] in fp64."""
    return maps.double().movedim(1, -1).flatten(0, 2)


def _pictures(count: int, side: int) -> Tensor:
    """Random pictures [count, 3, side, side] in [-1, 1]: two fields of colour that change slowly,
    a curved edge between them, and grain of any strength over both.
    """
    random = generator(0, "preview")

    def field(channels: int, cells: int) -> Tensor:
        values = torch.rand(count, channels, cells, cells, generator=random)
        return F.interpolate(2 * values - 1, size=(side, side), mode="bilinear")

    edge = field(1, 4) > 0
    grain = field(1, side // 2) * torch.rand(count, 1, 1, 1, generator=random)
    return (torch.where(edge, 1.5 * field(3, 2), 1.5 * field(3, 3)) + grain).clamp(-1, 1)
