"""The cross-attention U-Net (Ronneberger et al. 2015; Rombach et al. 2022).

Its parameters are named as those of diffusers' UNet2DConditionModel; its weights load as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from latentdiff.config import Config, parse
from latentdiff.errors import InputError
from latentdiff.models.blocks import (
    BasicTransformerBlock,
    Downsample2D,
    KeysValues,
    ResnetBlock2D,
    TimestepEmbedding,
    Transformer2DModel,
    Upsample2D,
    timestep_embedding,
)

TextKeysValues: TypeAlias = list[KeysValues]
"""The text's keys and values for each cross-attention, in the order of the forward pass."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
}
"""Keys of a config.json with one choice here. Other foreign keys must be off: null, false or 0."""

UNUSED = {"addition_embed_type_num_heads", "upcast_attention"}
"""Keys that change nothing here, whatever their value."""


class UNetConfig(Config):
    """Sizes of the U-Net, in the names of UNet2DConditionModel's config.json."""

    sample_size: PositiveInt
    """Side of the latents it is trained on; it takes any other."""
    in_channels: PositiveInt = 4
    """Channels of the noised latents."""
    out_channels: PositiveInt = 4
    """Channels of the prediction."""
    block_out_channels: tuple[PositiveInt, ...] = Field(min_length=1)
    """Channels of each level, from the finest down."""
    down_block_types: tuple[Literal["CrossAttnDownBlock2D", "DownBlock2D"], ...]
    """Which levels attend, on the way down."""
    up_block_types: tuple[Literal["CrossAttnUpBlock2D", "UpBlock2D"], ...]
    """Which levels attend, on the way up, from the coarsest."""
    layers_per_block: PositiveInt = 2
    """Residual blocks of each level on the way down; one more on the way up."""
    cross_attention_dim: PositiveInt
    """Width D of the text embeddings."""
    attention_head_dim: PositiveInt | tuple[PositiveInt, ...] = 8
    """Number of heads, for all levels or each: diffusers' misnomer, kept for its files."""
    transformer_layers_per_block: PositiveInt | tuple[PositiveInt, ...] = 1
    """Transformer blocks after each residual block, for all levels or each."""
    use_linear_projection: bool = False
    """Whether the transformer's projections are stored as matrices instead of 1 x 1 kernels."""
    norm_num_groups: PositiveInt = 32
    """Groups of the group normalization; divides every channel count."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the residual blocks' normalization."""
    flip_sin_to_cos: bool = True
    """Whether the cosines of the timestep embedding come first."""
    freq_shift: float = 0
    """Shift of its frequencies' exponent."""
    downsample_padding: int = Field(default=1, ge=0, le=1)
    """Padding of the strided convolutions on all sides; 0 pads below and to the right only."""

    @model_validator(mode="after")
    def _consistent(self) -> UNetConfig:
        levels = len(self.block_out_channels)
        for name in (
            "down_block_types",
            "up_block_types",
            "attention_head_dim",
            "transformer_layers_per_block",
        ):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"{name} names {len(value)} levels, block_out_channels {levels}")
        if self.block_out_channels[0] % 2:
            raise ValueError("the first of block_out_channels must be even: sines and cosines")
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if channels % self.norm_num_groups or channels % heads:
                raise ValueError(
                    f"{channels} channels do not divide into {self.norm_num_groups} groups "
                    f"and {heads} heads"
                )
        return self

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each level."""
        return self._each(self.attention_head_dim)

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer blocks after each residual block, of each level."""
        return self._each(self.transformer_layers_per_block)

    def _each(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else value

    @classmethod
    def from_diffusers(cls, values: dict[str, Any]) -> UNetConfig:
        """The contents of a UNet2DConditionModel's config.json.

        Raises InputError naming a key that asks for something this network does not have.
        """
        wanted = {}
        for key, value in values.items():
            if key.startswith("_") or key in UNUSED:
                continue
            if key in cls.model_fields:
                wanted[key] = value
            elif (value not in NEUTRAL[key]) if key in NEUTRAL else value:
                raise InputError(
                    f"The U-Net's config.json asks for {key}: {value!r}, which is not supported; "
                    "use a model without it."
                )
        return parse(cls, wanted, "The U-Net's config.json")

    def to_diffusers(self) -> dict[str, Any]:
        """The values of a config.json that diffusers opens."""
        return {"_class_name": "UNet2DConditionModel", **self.model_dump(mode="json")}


class _Block(nn.Module):
    """Residual blocks of one level, each followed by a transformer where the level attends."""

    def __init__(
        self, config: UNetConfig, level: int, inputs: Sequence[int], attends: bool
    ) -> None:
        super().__init__()
        width, groups = config.block_out_channels[level], config.norm_num_groups
        time = 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock2D(channels, width, time, groups, config.norm_eps) for channels in inputs
        )
        if attends:
            self.attentions = nn.ModuleList(self._transformer(config, level) for _ in inputs)
        self.attends = attends

    @staticmethod
    def _transformer(config: UNetConfig, level: int) -> Transformer2DModel:
        return Transformer2DModel(
            config.block_out_channels[level],
            config.cross_attention_dim,
            config.heads[level],
            config.depths[level],
            config.norm_num_groups,
            config.use_linear_projection,
        )

    def layer(self, number: int, x: Tensor, time: Tensor, text: Iterator[KeysValues]) -> Tensor:
        x = self.resnets[number](x, time)
        return self.attentions[number](x, text) if self.attends else x


class DownBlock(_Block):
    """A level on the way down; all its feature maps are kept for the way up."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        widths, count = config.block_out_channels, config.layers_per_block
        inputs = [widths[max(level - 1, 0)]] + [widths[level]] * (count - 1)
        super().__init__(config, level, inputs, "CrossAttn" in config.down_block_types[level])
        self.downsamplers = None
        if level < len(widths) - 1:
            downsampler = Downsample2D(widths[level], config.downsample_padding)
            self.downsamplers = nn.ModuleList([downsampler])

    def forward(self, x: Tensor, time: Tensor, text: Iterator[KeysValues]) -> list[Tensor]:
        """Every feature map of the level, the last one halved but in the coarsest level."""
        maps = []
        for number in range(len(self.resnets)):
            x = self.layer(number, x, time, text)
            maps.append(x)
        if self.downsamplers is not None:
            maps.append(self.downsamplers[0](x))
        return maps


class MidBlock(_Block):
    """Residual block, transformer, residual block, at the coarsest level."""

    def __init__(self, config: UNetConfig) -> None:
        level = len(config.block_out_channels) - 1
        super().__init__(config, level, [config.block_out_channels[level]] * 2, attends=False)
        self.attentions = nn.ModuleList([self._transformer(config, level)])

    def forward(self, x: Tensor, time: Tensor, text: Iterator[KeysValues]) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        x = self.attentions[0](self.resnets[0](x, time), text)
        return self.resnets[1](x, time)


class UpBlock(_Block):
    """A level on the way up; each residual block also sees a feature map of the way down."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        widths, count = config.block_out_channels, config.layers_per_block
        below = widths[min(level + 1, len(widths) - 1)]
        skips = [widths[level]] * count + [widths[max(level - 1, 0)]]
        carried = [below] + [widths[level]] * count
        inputs = [one + other for one, other in zip(carried, skips, strict=True)]
        position = len(widths) - 1 - level
        super().__init__(config, level, inputs, "CrossAttn" in config.up_block_types[position])
        self.upsamplers = nn.ModuleList([Upsample2D(widths[level])]) if level > 0 else None

    def forward(
        self, x: Tensor, maps: list[Tensor], time: Tensor, text: Iterator[KeysValues]
    ) -> Tensor:
        """[B, C, h, w] -> twice that size but in the finest level; takes its maps off the end."""
        for number in range(len(self.resnets)):
            x = self.layer(number, torch.cat([x, maps.pop()], dim=1), time, text)
        return x if self.upsamplers is None else self.upsamplers[0](x, maps[-1].shape[2:])


class UNet(nn.Module):
    """F(x, t, text): a prediction of x's shape for each noised latent."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(len(widths)))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(
            UpBlock(config, level) for level in reversed(range(len(widths)))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    @property
    def downsampling(self) -> int:
        """Latents' sides should be multiples of this."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def project_text(self, embeddings: Tensor) -> TextKeysValues:
        """Text embeddings [B, L, D] -> the keys and values of every cross-attention.

        They do not depend on x or t: compute them once per prompt, not once per step.
        """
        return [block.attn2.keys_values(embeddings) for block in self._transformer_blocks()]

    def _transformer_blocks(self) -> Iterator[BasicTransformerBlock]:
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            for module in block.modules():
                if isinstance(module, BasicTransformerBlock):
                    yield module

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor | TextKeysValues) -> Tensor:
        """Predict from noised latents.

        Args:
            sample: [B, C_in, h, w], already scaled by c_in.
            timestep: [B], in the training schedule's steps, fractions allowed.
            text: embeddings [B, L, D], or what project_text made of them.

        Returns:
            [B, C_out, h, w].
        """
        config = self.config
        keys_values = iter(self.project_text(text) if isinstance(text, Tensor) else text)
        waves = timestep_embedding(
            timestep, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
        )
        time = F.silu(self.time_embedding(waves.to(sample.dtype)))

        x = self.conv_in(sample)
        maps = [x]
        for down in self.down_blocks:
            maps += down(maps[-1], time, keys_values)
        x = self.mid_block(maps[-1], time, keys_values)
        for up in self.up_blocks:
            x = up(x, maps, time, keys_values)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
