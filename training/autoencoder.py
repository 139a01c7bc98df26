"""Train the VAE: reconstruction of pictures through a small, nearly standard normal latent.

accelerate launch -m training.autoencoder --config configs/emoji/autoencoder.yaml
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import Encoder
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from latentdiff.config import Config, load_config
from latentdiff.data.order import Share
from latentdiff.errors import InputError, run_command
from latentdiff.metrics.psnr import batch_size, psnr, reconstruct
from latentdiff.models.autoencoder import AnyVAE, Autoencoder
from latentdiff.models.pooled import PooledVAE
from latentdiff.rng import keyed_normal
from training.config import StepLosses, seeded
from training.crops import CropSource, FileCrops, SceneCrops
from training.data import MicroBatch, to_network
from training.encoder import ENCODER, encoder_digest, vae_to_train
from training.file_pictures import PicturesRunConfig
from training.loop import make_accelerator, train
from training.parallel import Wrapped, means, refuse_shards
from training.pictures import grid

V = TypeVar("V", bound=AnyVAE)

UNSEEN = 256
"""Pictures that the PSNR is the mean of."""
MEASURED = 1024
"""Pictures that the latents are standardized over."""


class VAEConfig(Config):
    """Sizes of an AutoencoderKL without attention, or of a PooledVAE: any picture size, crops train
    it.
    """

    encoder: Literal["learned", "means"] = "learned"
    """"means": latents are the means of blocks of pixels, or the pixels themselves where there is
    one level; only the decoder learns. See PooledVAE."""

    block_out_channels: tuple[int, ...] = Field(min_length=1)
    """Channels of each level from full resolution down; each level after the first halves it."""
    layers_per_block: int = Field(default=1, gt=0)
    """Residual blocks in a level of the encoder; the decoder has one more."""
    latent_channels: int = Field(gt=0)
    """Values per latent position; of means three."""
    norm_num_groups: int = Field(default=8, gt=0)
    """Groups of the group normalization; divides every channel count."""

    @model_validator(mode="after")
    def _three_means(self) -> VAEConfig:
        if self.encoder == "means" and self.latent_channels != 3:
            raise ValueError("latent_channels must be 3 where the latents are means of pixels")
        return self

    def build(self, sample_size: int) -> AnyVAE:
        """Initial weights: residual branches zero, the encoder Haar's, the posterior narrow."""
        if self.encoder == "means":
            return start_as_identity(
                PooledVAE(
                    block_out_channels=self.block_out_channels,
                    layers_per_block=self.layers_per_block,
                    norm_num_groups=self.norm_num_groups,
                )
            )
        levels = len(self.block_out_channels)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_num_groups,
            mid_block_add_attention=False,
            sample_size=sample_size,
            scaling_factor=1.0,
        )
        start_as_identity(vae)
        torch.nn.init.constant_(vae.quant_conv.bias[self.latent_channels :], -4.0)
        start_as_haar(vae.encoder)
        return vae


def start_as_identity(vae: V) -> V:
    """The same VAE, its residual branches zero."""
    for name, parameter in vae.named_parameters():
        if name.endswith("conv2.weight"):
            torch.nn.init.zeros_(parameter)
    return vae


@torch.no_grad()
def start_as_haar(encoder: Encoder) -> None:
    """Let an encoder whose residual branches are zero begin as a Haar wavelet transform.

    Every 2x2 block of each of c channels becomes its mean and its three differences (Haar 1910), 4c
    channels, means first, as far as there are channels; the other filters keep a third of their
    random start. So all of a picture reaches the first step's latents, not a blur of it.
    """
    known = encoder.conv_in.in_channels
    _pass_through(encoder.conv_in.weight, known)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                known = min(known, resnet.conv_shortcut.out_channels)
                _pass_through(resnet.conv_shortcut.weight, known)
        if block.downsamplers is None:
            continue
        weight = block.downsamplers[0].conv.weight
        weight /= 3
        known, before = min(4 * known, len(weight)), known
        for row in range(known):
            band, channel = divmod(row, before)
            sign_y, sign_x = 1 - 2 * (band // 2), 1 - 2 * (band % 2)
            weight[row] = 0
            weight[row, channel, :2, :2] = 0.5 * torch.tensor(
                [[1, sign_x], [sign_y, sign_x * sign_y]]
            )


def _pass_through(weight: Tensor, known: int) -> None:
    """The first `known` channels come out as they went in; other filters are cut to a third."""
    weight /= 3
    middle = weight.shape[-1] // 2
    weight[:known] = 0
    weight[range(known), range(known), middle, middle] = 1


class AutoencoderConfig(PicturesRunConfig):
    """A run of training.autoencoder."""

    crop: int = Field(gt=0)
    """Side of the square crops that it trains on, in pixels; a multiple of the VAE's factor."""
    vae: VAEConfig | None = None
    """The network, from random weights; or"""
    init_from: str | None = None
    """the model whose VAE is trained on: a directory, also one with vae/ alone, a name on the hub,
    one .safetensors file, or "emoji". Its latents change, and a U-Net must learn them anew, unless
    """
    decoder_only: bool = False
    """the encoder stays as it is: then the model's U-Net and caches of its latents go with the new
    decoder as they went with the old one."""
    pixel_loss: Literal["l1", "l2"] = "l1"
    """Distance of the pixels: "l1" keeps edges, "l2" is what PSNR measures."""
    edge_weight: float = Field(default=1.0, ge=0)
    """Weight of the L1 distance between the pictures' finite differences, which keeps edges."""
    kl_weight: float = Field(ge=0)
    """Weight of the KL divergence in nats per latent value; with decoder_only without effect."""

    @model_validator(mode="after")
    def _one_start(self) -> AutoencoderConfig:
        if (self.vae is None) == (self.init_from is None):
            raise ValueError("name either vae or init_from to start from")
        if self.decoder_only and self.init_from is None:
            raise ValueError(
                "decoder_only keeps the encoder as it is, which takes a trained one: name init_from"
            )
        return self


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Finite differences along both axes."""
    return images.diff(dim=-1), images.diff(dim=-2)


def open_crops(config: AutoencoderConfig) -> CropSource:
    """Raises InputError when there are none, or where they are smaller than the crops."""
    pictures: CropSource
    if config.scenes is not None:
        pictures = SceneCrops(config.scenes, config.seed)
    else:
        assert config.pictures is not None
        pictures = FileCrops(config.pictures, config.seed)
    if config.crop > pictures.resolution:
        raise InputError(
            f"crop is {config.crop}, but the pictures have a side of {pictures.resolution} pixels; "
            "make it smaller."
        )
    return pictures


def start(config: AutoencoderConfig, sample_size: int) -> Autoencoder:
    """What is trained; of an encoder that stays nothing requires grad.

    Raises InputError where latents could not be standardized in the end.
    """
    if config.init_from is not None:
        vae = vae_to_train(config.init_from)
    else:
        assert config.vae is not None
        with seeded(config.seed):
            vae = config.vae.build(sample_size)
    if config.decoder_only:
        for name, parameter in vae.named_parameters():
            if name.startswith(ENCODER):
                parameter.requires_grad_(False)
    elif None in (vae.quant_conv, vae.post_quant_conv):
        raise InputError(
            f"The VAE of {config.init_from} has no 1x1 convolutions beside its latents to "
            "standardize them with; set decoder_only."
        )
    return Autoencoder(vae)


class AutoencoderProgram:
    """Reconstruction (L1 or L2 on pixels, L1 on edges) + beta KL (Kingma & Welling 2014)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        self.config = config
        self.pictures = open_crops(config)
        self.network = start(config, self.pictures.resolution)
        self.inputs = self.pictures.inputs
        if config.decoder_only:
            self.inputs = self.inputs | {"encoder": encoder_digest(self.network)}
        factor = self.network.scale_factor
        if config.crop % factor:
            raise InputError(
                f"crop is {config.crop}, but a latent of this VAE is {factor} pixels wide; make it "
                "a multiple of that."
            )
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def unreadable(self) -> dict[int, str]:
        return self.pictures.unreadable

    def batches(self, steps: range, share: Share) -> Generator[list[MicroBatch], None, None]:
        config = self.config
        return self.pictures.crops(steps, config.batch_size, share, config.crop, config.workers)

    def losses(
        self, forward: Callable[..., Any], batch: MicroBatch, device: torch.device
    ) -> StepLosses:
        images = to_network(batch.data, device)
        side = self.config.crop // self.network.scale_factor
        shape = (self.network.latent_channels, side, side)
        noise = keyed_normal(self.config.seed, "posterior", 0, batch.samples, shape).to(device)
        decoded, posterior = forward(images, noise)
        decoded = decoded.float()
        l1, mse = F.l1_loss(decoded, images), F.mse_loss(decoded, images)
        pixel = l1 if self.config.pixel_loss == "l1" else mse
        edge = sum(F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(images), strict=True))
        kl = posterior.kl().mean()
        loss = pixel + self.config.edge_weight * edge + self.config.kl_weight * kl
        psnr = 10 * torch.log10(4 / mse.detach())
        return StepLosses(loss, {"l1": l1.detach(), "kl": kl.detach(), "psnr": psnr})

    def validation(
        self, forward: Callable[..., Any], device: torch.device, share: Share
    ) -> tuple[float, int] | None:
        """None: samples and the PSNR at the end are of pictures that it never saw."""
        return None

    def evaluate(self, done: int, wrapped: Wrapped) -> dict[str, float]:
        """PSNR of unseen pictures, in dB."""
        accelerator = wrapped.accelerator
        pictures = self.pictures.unseen(UNSEEN)[
            accelerator.process_index :: accelerator.num_processes
        ]
        quality = psnr(reconstruct(self.network, pictures), pictures)
        return means(accelerator, {"evaluation/psnr": (float(quality.sum()), len(quality))})

    def samples(self, device: torch.device) -> Image.Image:
        """Pictures it never saw above their reconstructions."""
        pictures = self.pictures.unseen(12)
        rows = np.concatenate([pictures, reconstruct(self.network, pictures)])
        scale = max(1, 128 // self.pictures.resolution)
        return grid([Image.fromarray(picture) for picture in rows], len(pictures), scale)

    def finish(self, directory: Path, device: torch.device) -> None:
        """Standardize the latents over the training pictures, unless they are to stay as they are,
        then save vae/.
        """
        if not self.config.decoder_only:
            pictures = self.pictures.whole(MEASURED)
            self.network.standardize(*latent_moments(self.network, pictures, device))
        self.network.vae.save_pretrained(directory / "vae")
        unseen = self.pictures.unseen(UNSEEN)
        quality = psnr(reconstruct(self.network, unseen), unseen).mean()
        print(f"PSNR of {len(unseen)} unseen pictures: {quality:.2f} dB")


@torch.no_grad()
def latent_moments(
    autoencoder: Autoencoder, pictures: Iterator[np.ndarray], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] of posterior samples of pictures, uint8 [H, W, 3]."""
    latents: list[Tensor] = []
    first = next(pictures)
    pictures, done = chain([first], pictures), 0
    while batch := list(islice(pictures, batch_size(max(first.shape)))):
        images = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
        posterior = autoencoder.encode(to_network(images, device))
        numbers = range(done, done + len(batch))
        noise = keyed_normal(0, "moments", 0, numbers, tuple(posterior.mean.shape[1:]))
        latents.append(posterior.sample(noise.to(device)))
        done += len(batch)
    values = torch.cat(latents).transpose(0, 1).flatten(1)
    return values.mean(dim=1), values.std(dim=1)


def main() -> None:
    refuse_shards("training.autoencoder")
    config = load_config(AutoencoderConfig)
    accelerator: Accelerator = make_accelerator(config)
    train(AutoencoderProgram(config), config, accelerator)


if __name__ == "__main__":
    run_command(main)
