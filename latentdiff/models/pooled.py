"""An autoencoder whose latents are small pictures: diffusion in pixels, and super-resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

CERTAIN = -30.0
"""The posterior's log-variance: no noise to speak of."""


class Means(nn.Module):
    """Pictures [B, 3, H, W] -> the means of their f x f blocks and a log-variance, [B, 6, h, w]."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        means = F.avg_pool2d(images, self.factor)
        return torch.cat([means, torch.full_like(means, CERTAIN)], dim=1)


class PooledVAE(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """In the place of diffusers' AutoencoderKL, with its attributes; latents have three channels.

    The encoder learns nothing. With one level latents are the pictures themselves, both ways, until
    they are standardized: a U-Net on them is DDPM's (Ho et al. 2020). With more, each halves the
    picture, and the decoder, AutoencoderKL's, learns to undo it: the super-resolution of cascades
    (Ho et al. 2021), without their diffusion.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,
        block_out_channels: tuple[int, ...],
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        latent_channels: int = 3,
        scaling_factor: float = 1.0,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        levels = len(block_out_channels)
        if latent_channels != 3 or not levels:
            raise ValueError("a PooledVAE has three latent channels and at least one level")
        self.encoder = Means(2 ** (levels - 1))
        self.quant_conv = nn.Conv2d(6, 6, 1)
        self.post_quant_conv = nn.Conv2d(3, 3, 1)
        self.decoder: nn.Module = nn.Identity()
        if levels > 1:
            self.decoder = Decoder(
                in_channels=3,
                out_channels=3,
                up_block_types=("UpDecoderBlock2D",) * levels,
                block_out_channels=block_out_channels,
                layers_per_block=layers_per_block,
                norm_num_groups=norm_num_groups,
                mid_block_add_attention=False,
            )
        for convolution in (self.quant_conv, self.post_quant_conv):
            nn.init.dirac_(convolution.weight)
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
        self.quant_conv.requires_grad_(False)  # it only takes the latents' standardization
