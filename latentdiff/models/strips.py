"""The VAE's convolutions strip by strip: the numbers of one pass in a fraction of its memory.

Tiles that are normalized each by itself come out in different tints, and blending hides only the
seams between them. Here every group normalization sees the statistics of the whole picture, and
every convolution the rows beyond its strip, so nothing is approximated and nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UpDecoderBlock2D
from torch import Tensor, nn

from latentdiff.errors import InputError

# B: batch, C: channels, H: height, W: width, G: groups of a normalization.


@dataclass(frozen=True)
class Activation:
    """A feature map [B, C, height, W] of which rows [start, stop) are computed when asked for."""

    height: int
    rows: Callable[[int, int], Tensor]
    stored: Tensor | None = None
    """All of it, where it has been computed."""

    @classmethod
    def of(cls, x: Tensor) -> Activation:
        return cls(x.shape[2], lambda start, stop: x[:, :, start:stop], x)

    def strips(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, up to `size` rows), from top to bottom."""
        for start in range(0, self.height, size):
            yield start, self.rows(start, min(start + size, self.height))

    def compute(self, size: int, into: Tensor | None = None) -> Activation:
        """Stored whole, in `into` if given: strip by strip, each read before it is written."""
        for start, strip in self.strips(size):
            if into is None:
                batch, channels, _, width = strip.shape
                last = strip.is_contiguous(memory_format=torch.channels_last)
                into = torch.empty(
                    (batch, channels, self.height, width),
                    dtype=strip.dtype,
                    device=strip.device,
                    memory_format=torch.channels_last if last else torch.contiguous_format,
                )
            into[:, :, start : start + strip.shape[2]] = strip
        assert into is not None
        return Activation.of(into)


@torch.no_grad()
def decode(decoder: Any, latents: Tensor, size: int) -> Tensor:
    """diffusers' VAE Decoder on latents [B, C, h, w], `size` rows of latents at a time.

    Raises InputError for a decoder with attention after its middle block.
    """
    _check_blocks(decoder.up_blocks, UpDecoderBlock2D)
    x = Activation.of(decoder.mid_block(decoder.conv_in(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _residual(resnet, x, size)
        if block.upsamplers is not None:
            size *= 2
            x = _upsampled(x, block.upsamplers[0].conv)
            if block is not decoder.up_blocks[-2]:  # the largest: rather computed thrice than kept
                x = x.compute(size)
    x = _activated(x, decoder.conv_norm_out, decoder.conv_act, size)
    image = _convolved(x, decoder.conv_out).compute(size).stored
    assert image is not None
    return image


@torch.no_grad()
def encode(encoder: Any, images: Tensor, size: int) -> Tensor:
    """diffusers' VAE Encoder on images [B, 3, H, W], `size` rows of latents at a time.

    Raises InputError for an encoder with attention before its middle block.
    """
    _check_blocks(encoder.down_blocks, DownEncoderBlock2D)
    size *= 2 ** (len(encoder.down_blocks) - 1)
    x = _convolved(Activation.of(images), encoder.conv_in).compute(size)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = _residual(resnet, x, size)
        if block.downsamplers is not None:
            size //= 2
            x = _downsampled(x, block.downsamplers[0].conv).compute(size)
    assert x.stored is not None
    hidden = encoder.mid_block(x.stored)
    return encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(hidden)))


def _check_blocks(blocks: nn.ModuleList, supported: type[nn.Module]) -> None:
    for block in blocks:
        if not isinstance(block, supported):
            raise InputError(
                f"A VAE with a {type(block).__name__} cannot run in strips; leave tile out."
            )


def _residual(block: Any, x: Activation, size: int) -> Activation:
    """A ResnetBlock2D without a time embedding. Overwrites x where it stands for itself."""
    first = _activated(x, block.norm1, block.nonlinearity, size)
    hidden = _convolved(first, block.conv1).compute(size)
    second = _activated(hidden, block.norm2, block.nonlinearity, size)
    residual = _convolved(second, block.conv2)
    shortcut = block.conv_shortcut or nn.Identity()
    total = Activation(
        x.height, lambda start, stop: shortcut(x.rows(start, stop)) + residual.rows(start, stop)
    )
    return total.compute(size, into=x.stored if block.conv_shortcut is None else None)


def _activated(x: Activation, norm: nn.GroupNorm, nonlinearity: nn.Module, size: int) -> Activation:
    """nonlinearity(norm(x)) with mean and variance over all rows, in fp32 like PyTorch's own."""
    mean, variance = _moments(x, norm.num_groups, size)
    scale = norm.weight.float() * _per_channel(torch.rsqrt(variance + norm.eps), norm)
    shift = norm.bias.float() - scale * _per_channel(mean, norm)

    def rows(start: int, stop: int) -> Tensor:
        strip = x.rows(start, stop)
        normal = torch.addcmul(shift[:, :, None, None], strip.float(), scale[:, :, None, None])
        return nonlinearity(normal.to(strip.dtype))

    return Activation(x.height, rows)


def _moments(x: Activation, groups: int, size: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, G] of each group over all rows."""
    shares, means, variances = [], [], []
    for _, strip in x.strips(size):
        values = strip.float().unflatten(1, (groups, -1))
        variance, mean = torch.var_mean(values, dim=(2, 3, 4), correction=0)
        shares.append(strip.shape[2] / x.height)
        means.append(mean)
        variances.append(variance)
    share = torch.tensor(shares, device=means[0].device)[:, None, None]
    each = torch.stack(means)
    mean = (share * each).sum(dim=0)
    return mean, (share * (torch.stack(variances) + (each - mean) ** 2)).sum(dim=0)


def _per_channel(values: Tensor, norm: nn.GroupNorm) -> Tensor:
    """[B, G] -> [B, C]."""
    return values.repeat_interleave(norm.num_channels // norm.num_groups, dim=1)


def _convolved(x: Activation, conv: nn.Conv2d) -> Activation:
    """A 3x3 convolution with a zero border of 1."""
    return Activation(
        x.height,
        lambda start, stop: _on(conv, _window(x, start - 1, stop + 1), columns=(1, 1)),
    )


def _downsampled(x: Activation, conv: nn.Conv2d) -> Activation:
    """A 3x3 convolution of stride 2 with zeros to the right and below."""
    return Activation(
        x.height // 2,
        lambda start, stop: _on(conv, _window(x, 2 * start, 2 * stop + 1), columns=(0, 1)),
    )


def _upsampled(x: Activation, conv: nn.Conv2d) -> Activation:
    """Each value four times, then a 3x3 convolution with a zero border of 1."""

    def doubled(start: int, stop: int) -> Tensor:
        strip = F.interpolate(x.rows(start // 2, (stop + 1) // 2), scale_factor=2.0, mode="nearest")
        return strip[:, :, start % 2 : start % 2 + stop - start]

    return _convolved(Activation(2 * x.height, doubled), conv)


def _window(x: Activation, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of x, zero beyond it."""
    first, last = max(start, 0), min(stop, x.height)
    return F.pad(x.rows(first, last), (0, 0, first - start, stop - last))


def _on(conv: nn.Conv2d, x: Tensor, columns: tuple[int, int]) -> Tensor:
    return F.conv2d(F.pad(x, columns), conv.weight, conv.bias, conv.stride)
