"""The VAE between pictures and latents: it owns the latents' scale and shift."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from latentdiff.errors import InputError
from latentdiff.models import strips
from latentdiff.models.pooled import Means, PooledVAE

AnyVAE: TypeAlias = AutoencoderKL | PooledVAE


@dataclass(frozen=True)
class Posterior:
    """q(z|x) of Kingma & Welling (2014): a diagonal Gaussian over scaled latents.

    mean, logvar: [B, C, h, w].
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise; noise ~ N(0, I) of the mean's shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL(q(z|x) || N(0, I)) in nats for each latent value, [B, C, h, w]."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar)


class Autoencoder(nn.Module):
    """A VAE whose latents come out scaled: z = (z_vae - shift) * scaling."""

    def __init__(self, vae: AnyVAE) -> None:
        super().__init__()
        self.vae = vae

    @property
    def scale_factor(self) -> int:
        """Pixels per latent along each axis."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def scaling(self) -> float:
        return self.vae.config.scaling_factor

    @property
    def shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0

    @property
    def upcast(self) -> bool:
        """Whether encode and decode compute in fp32 although the weights are fp16.

        The config's force_upcast says that fp16 overflows in this VAE, as it does in SDXL's.
        """
        return self.vae.dtype == torch.float16 and bool(self.vae.config.force_upcast)

    def encode(self, images: Tensor, tile: int | None = None) -> Posterior:
        """images [B, 3, H, W] in [-1, 1] -> posterior over latents [B, C, H/f, W/f] in fp32.

        `tile` as in decode.
        """
        encoder = self._precise(self.vae.encoder)
        images = images.to(self._compute_dtype)
        if tile is None or isinstance(encoder, Means):
            moments = encoder(images)
        else:
            moments = _each(strips.encode, encoder, images, tile)
        if self.vae.quant_conv is not None:
            moments = self._precise(self.vae.quant_conv)(moments)
        mean, logvar = moments.float().chunk(2, dim=1)
        log_scaling = torch.log(torch.tensor(self.scaling))
        return Posterior(
            (mean - self.shift) * self.scaling, logvar.clamp(-30.0, 20.0) + 2 * log_scaling
        )

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """latents [B, C, h, w] -> images [B, 3, f*h, f*w], about [-1, 1], not clamped.

        With `tile` the pictures are decoded one by one and from strips of `tile` rows of latents,
        8 for instance: the same numbers to rounding, without gradients, in less memory. Raises
        InputError for a VAE of a kind that has no strips.
        """
        latents = (latents / self.scaling + self.shift).to(self._compute_dtype)
        if self.vae.post_quant_conv is not None:
            latents = self._precise(self.vae.post_quant_conv)(latents)
        decoder = self._precise(self.vae.decoder)
        if tile is None or isinstance(decoder, nn.Identity):
            return decoder(latents)
        return _each(strips.decode, decoder, latents, tile)

    @property
    def _compute_dtype(self) -> torch.dtype:
        return torch.float32 if self.upcast else self.vae.dtype

    def _precise(self, part: nn.Module) -> nn.Module:
        """`part`, or where the VAE must not run in fp16 a copy of it in fp32."""
        return copy.deepcopy(part).float() if self.upcast else part

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """Reconstruction from one posterior sample (noise: [B, C, h, w]), and the posterior."""
        posterior = self.encode(images)
        return self.decode(posterior.sample(noise)), posterior

    @torch.no_grad()
    def standardize(self, mean: Tensor, std: Tensor) -> None:
        """Fold a per-channel standardization of the latents into the 1x1 convolutions beside them.

        mean, std: [C], measured on posterior samples. Afterwards each latent channel has mean 0
        and variance 1 over the same pictures, which is what noise ~ N(0, I) is measured against,
        and reconstructions are what they were. Needs quant_conv and post_quant_conv.
        """
        into: Any = self.vae.quant_conv
        back: Any = self.vae.post_quant_conv
        channels = self.latent_channels
        centre = mean / self.scaling + self.shift
        into.weight[:channels] /= std[:, None, None, None]
        into.bias[:channels] = (into.bias[:channels] - centre) / std + self.shift
        into.bias[channels:] -= 2 * std.log()
        back.bias += (back.weight[:, :, 0, 0] * (centre - std * self.shift)).sum(dim=1)
        back.weight *= std[None, :, None, None]


def _each(function: Any, part: nn.Module, batch: Tensor, tile: int) -> Tensor:
    if tile < 1:
        raise InputError(f"tile is {tile}; it must be a number of rows, 1 or more.")
    return torch.cat([function(part, one, tile) for one in batch.split(1)])
