"""The picture and the mask that a generation starts from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentdiff.checkpoint import ModelParts
from latentdiff.diffusion.denoiser import DenoiserFunction, like
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.pictures import ImageSource, middle, read_image, to_rgb
from latentdiff.recipe import InputPicture, picture_hash


@dataclass(frozen=True)
class Start:
    """A picture to start from, and where to paint it anew."""

    image: Tensor
    """[1, 3, H, W] in [-1, 1]."""
    mask: Tensor | None
    """[1, 1, H, W], 1 where it is painted; None paints everywhere."""
    inpainting: bool
    """Whether the U-Net reads the mask and the masked picture."""
    names: dict[str, Any]
    """What the recipe says of both."""
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    """[1, C, h, w] of the picture, once encoded."""
    extra: Tensor | None = None
    """[1, 1 + C, h, w]: mask and latents of the masked picture, for an inpainting U-Net."""
    held: Tensor | None = None
    """[1, 1, h, w], 1 where another U-Net is held to the picture."""

    @property
    def height(self) -> int:
        return self.image.shape[2]

    @property
    def width(self) -> int:
        return self.image.shape[3]

    def encoded(self, autoencoder: Autoencoder, device: torch.device, tile: int | None) -> Start:
        """The same with its latents, the posterior's mean, on `device`; `tile` as in encode."""
        image = self.image.to(device)
        latents = autoencoder.encode(image, tile).mean
        if self.mask is None:
            return dataclasses.replace(self, latents=latents)
        mask = shrink_mask(self.mask, autoencoder.scale_factor).to(device)
        if not self.inpainting:
            return dataclasses.replace(self, latents=latents, held=1 - mask)
        masked = autoencoder.encode(image * (self.mask.to(device) < 0.5), tile).mean
        return dataclasses.replace(self, latents=latents, extra=torch.cat([mask, masked], dim=1))

    def from_noise(self, strength: float | None) -> bool:
        """Whether nothing of the picture is in the first latents: inpainting at full strength."""
        return self.mask is not None and strength == 1

    def keep(self, decoded: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] whose pixels outside the mask are the picture's own."""
        if self.mask is None:
            return decoded
        return torch.where(self.mask > 0.5, decoded, self.image)


def read_start(image: ImageSource, mask: ImageSource | None, parts: ModelParts) -> Start:
    """Read what a generation starts from; its sides are cut to what the model makes.

    Raises InputError when a file cannot be read, the mask is of another size or paints nothing, or
    an inpainting model has no mask.
    """
    inpainting = parts.inpaints
    if inpainting and mask is None:
        raise InputError("This is an inpainting model; give mask= too.")
    picture = read_image(image)
    multiple = parts.autoencoder.scale_factor
    size = (picture.width // multiple * multiple, picture.height // multiple * multiple)
    if 0 in size:
        raise InputError(
            f"The image is {picture.width} x {picture.height} pixels; this model needs "
            f"{multiple} at least on each side."
        )
    names = {"image": _named(image, picture)}
    if mask is None:
        return Start(to_tensor(to_rgb(picture, size)), None, inpainting, names)
    painted = read_image(mask, "mask")
    if painted.size != picture.size:
        raise InputError(
            f"The mask is {painted.width} x {painted.height} pixels but the image is "
            f"{picture.width} x {picture.height}; make them equal."
        )
    where = to_mask(painted, size)
    if not where.any():
        raise InputError("The mask is black everywhere; make white what is to be painted anew.")
    names["mask"] = _named(mask, painted)
    return Start(to_tensor(to_rgb(picture, size)), where, inpainting, names)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB -> [1, 3, H, W] in [-1, 1]."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return values.float() / 127.5 - 1


def to_mask(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """[1, 1, H, W], 1 where the picture is to be painted: where it is lighter than middle gray."""
    gray = np.array(middle(image.convert("L"), size))
    return (torch.from_numpy(gray) >= 128).float()[None, None]


def shrink_mask(mask: Tensor, factor: int) -> Tensor:
    """[1, 1, H, W] -> [1, 1, H/f, W/f]: each latent with a pixel to be painted.

    diffusers looks at the upper left pixel of each alone.
    """
    return F.max_pool2d(mask, factor)


def _named(source: ImageSource, image: Image.Image) -> InputPicture:
    name = "" if isinstance(source, Image.Image) else Path(source).name
    return InputPicture(name=name, sha256=picture_hash(image))


def blend(
    denoiser: DenoiserFunction, held: Tensor, latents: Tensor, noise: Tensor
) -> DenoiserFunction:
    """`denoiser` held to known latents where `held` is 1: RePaint's equation 8 without resampling.

    Lugmayr et al. (2022). There x is the known latents with the picture's own noise, and their
    denoised is what they are; so every sampler carries them along.
    """

    def blended(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        x = torch.where(held > 0, latents + like(sigma, x) * noise, x)
        return torch.where(held > 0, latents, denoiser(x, sigma, cond))

    return blended
