"""The U-Net's blocks, their parameters named as diffusers names them.

Shapes: B pictures, C channels, h x w positions, N = h * w tokens, L text tokens, D text width,
H heads of width d. Feature maps are channels_last: [B, C, h, w] -> [B, N, C] then copies nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KeysValues: TypeAlias = tuple[Tensor, Tensor]
"""The keys and values of one cross-attention, each [B, H, L, d]."""


def recomputable(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For a block's forward: while block.gradient_checkpointing is set, only its inputs are kept.

    The backward pass computes the rest again: Chen et al. (2016). Gradients are the same.
    """

    @functools.wraps(forward)
    def run(block: nn.Module, *inputs: Any) -> Tensor:
        if not (block.gradient_checkpointing and torch.is_grad_enabled()):
            return forward(block, *inputs)
        again = functools.partial(forward, block)
        return checkpoint(again, *inputs, use_reentrant=False, preserve_rng_state=False)

    return run


def timestep_embedding(timestep: Tensor, width: int, flip: bool, shift: float) -> Tensor:
    """timestep [...] -> [..., width] of sines and cosines: Vaswani et al. (2017), section 3.5.

    flip puts the cosines first; shift is taken from the divisor of the exponent.
    """
    half = width // 2
    indices = torch.arange(half, dtype=torch.float32, device=timestep.device)
    frequencies = torch.exp(-math.log(10_000) * indices / (half - shift))
    angle = timestep.float()[..., None] * frequencies
    waves = (angle.cos(), angle.sin()) if flip else (angle.sin(), angle.cos())
    return torch.cat(waves, dim=-1)


class TimestepEmbedding(nn.Module):
    """The two-layer perceptron over the sinusoidal embedding; cond_proj is the U-Net's to add."""

    def __init__(self, width: int, out: int, condition: int | None = None) -> None:
        super().__init__()
        if condition is not None:
            self.cond_proj = nn.Linear(condition, width, bias=False)
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, embedding: Tensor) -> Tensor:
        """[B, width] -> [B, out]."""
        return self.linear_2(F.silu(self.linear_1(embedding)))


class ResnetBlock2D(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))) + time))): the residual block of Ho et al. (2020)."""

    gradient_checkpointing = False

    def __init__(self, inputs: int, outputs: int, time: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    @recomputable
    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, C_in, h, w], time [B, T] after its activation -> [B, C_out, h, w]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: q [B, H, N, d], k and v [B, H, L, d] -> [B, H, N, d].

    PyTorch keeps the scores in fp32 whatever q's dtype, so that they do not overflow in fp16.
    On CPUs bfloat16 is computed in fp32: PyTorch's bfloat16 backward pass is several times slower.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017)."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def keys_values(self, context: Tensor) -> KeysValues:
        """context [B, L, D] -> keys and values [B, H, L, d]."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(self, x: Tensor, keys_values: KeysValues | None = None) -> Tensor:
        """x [B, N, C] -> [B, N, C]; attends to itself unless given keys and values."""
        attended = attend(self._split(self.to_q(x)), *(keys_values or self.keys_values(x)))
        return self.to_out[0](attended.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, H * d] -> [B, H, N, d]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GEGLU(nn.Module):
    """x W gelu(x V): Shazeer (2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, hidden]."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Four times as wide inside; net.1 is diffusers' dropout, which is never used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward: Rombach et al. (2022), app. E."""

    gradient_checkpointing = False

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    @recomputable
    def forward(self, x: Tensor, text: KeysValues) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the positions of a feature map, with a residual around them."""

    def __init__(
        self, width: int, context: int, heads: int, depth: int, groups: int, linear: bool
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(width, context, heads) for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, text: Iterator[KeysValues]) -> Tensor:
        """x [B, C, h, w] -> [B, C, h, w]; takes one item of text for each block."""
        height = x.shape[2]
        h = self.norm(x)
        h = self.proj_in(_tokens(h)) if self.linear else _tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, next(text))
        h = _map(self.proj_out(h), height) if self.linear else self.proj_out(_map(h, height))
        return h + x


def _tokens(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, N, C]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _map(tokens: Tensor, height: int) -> Tensor:
    """[B, N, C] -> [B, C, h, w]."""
    return tokens.unflatten(1, (height, -1)).permute(0, 3, 1, 2)


class Downsample2D(nn.Module):
    """A convolution of stride 2."""

    def __init__(self, width: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, ceil(h / 2), ceil(w / 2)]; without padding, floor."""
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


def nearest(x: Tensor, size: torch.Size) -> Tensor:
    """Nearest neighbours: [B, C, h, w] -> [B, C, *size]."""
    batch, channels, height, width = x.shape
    if not (2 * height - size[0] in (0, 1) and 2 * width - size[1] in (0, 1)):
        return F.interpolate(x, size=tuple(size), mode="nearest")
    # Compiled for bf16 on a CPU, the gradient of F.interpolate came out as zeros (torch 2.13).
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
    doubled = pixels.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
    return doubled[..., : size[0], : size[1]]


class Upsample2D(nn.Module):
    """Nearest neighbours, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """[B, C, h, w] -> [B, C, *size]."""
        return self.conv(nearest(x, size))
