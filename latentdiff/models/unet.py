"""The cross-attention U-Net (Ronneberger et al. 2015; Rombach et al. 2022).

Its parameters are named as those of diffusers' UNet2DConditionModel; its weights load as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
"""Keys that change nothing here, whatever their value: blocks.attend always upcasts its scores."""


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
    addition_embed_type: Literal["text_time"] | None = None
    """SDXL's conditioning on a pooled text embedding and on numbers such as the picture's size."""
    addition_time_embed_dim: PositiveInt | None = None
    """Width of the sinusoidal embedding of each of those numbers."""
    projection_class_embeddings_input_dim: PositiveInt | None = None
    """Width of the pooled embedding and the embedded numbers together."""
    time_cond_proj_dim: PositiveInt | None = None
    """Width of the embedded guidance scale, for models distilled with it (Luo et al. 2023)."""

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
        for name in ("addition_time_embed_dim", "time_cond_proj_dim"):
            if (getattr(self, name) or 0) % 2:
                raise ValueError(f"{name} must be even: sines and cosines")
        widths = (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim)
        if any((width is None) != (self.addition_embed_type is None) for width in widths):
            raise ValueError("addition_embed_type and its widths come together or not at all")
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


@dataclass(frozen=True)
class Conditioning:
    """What a prompt is to the U-Net; it depends on neither x nor t. Made by UNet.condition."""

    text: list[KeysValues]
    """Keys and values of each cross-attention, in the order of the forward pass."""
    added: Tensor | None = None
    """[B, T], added to the timestep embedding: SDXL's pooled text and sizes."""
    extra: Tensor | None = None
    """[B, C', h, w], further channels of the sample: an inpainting mask and masked latents."""
    guidance: Tensor | None = None
    """[B, C_0], added to the timestep's sines and cosines: a distilled guidance scale."""

    def __getitem__(self, rows: slice) -> Conditioning:
        """Some of the batch; views, no copies."""
        added, extra, guidance = (
            None if value is None else value[rows]
            for value in (self.added, self.extra, self.guidance)
        )
        return Conditioning([(k[rows], v[rows]) for k, v in self.text], added, extra, guidance)


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

    def attend(self, number: int, x: Tensor, text: Iterator[KeysValues]) -> Tensor:
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
            x = self.attend(number, self.resnets[number](x, time), text)
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
        self,
        maps: list[Tensor],
        time: Tensor,
        text: Iterator[KeysValues],
        size: torch.Size | None,
    ) -> Tensor:
        """[B, C, h, w] -> [B, C, *size], the size of the next finer level; None in the finest.

        maps: those of the way down in their order, then x; it is emptied as they are used.
        """
        x = maps.pop()
        for number in range(len(self.resnets)):
            x = self.resnets[number](torch.cat([x, maps.pop()], dim=1), time)
            x = self.attend(number, x, text)
        return x if self.upsamplers is None else self.upsamplers[0](x, size)


class UNet(nn.Module):
    """F(x, t, cond): a prediction of x's shape for each noised latent."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        time = 4 * widths[0]
        self.time_embedding = TimestepEmbedding(widths[0], time, config.time_cond_proj_dim)
        if (width := config.projection_class_embeddings_input_dim) is not None:
            self.add_embedding = TimestepEmbedding(width, time)
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(len(widths)))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(
            UpBlock(config, level) for level in reversed(range(len(widths)))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training keeps each block's inputs alone and computes the rest again: a third
        more time for much less memory, and the same gradients.
        """
        return any(block.gradient_checkpointing for block in self._recomputable)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        for block in self._recomputable:
            block.gradient_checkpointing = on

    @property
    def _recomputable(self) -> list[ResnetBlock2D | BasicTransformerBlock]:
        kinds = (ResnetBlock2D, BasicTransformerBlock)
        return [block for block in self.modules() if isinstance(block, kinds)]

    def condition(
        self,
        hidden: Tensor,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        extra: Tensor | None = None,
        guidance_scale: float | None = None,
    ) -> Conditioning:
        """Everything about a prompt that depends on neither x nor t: once, not in each step.

        Args:
            hidden: text embeddings [B, L, D].
            pooled: text embedding [B, P] of SDXL models, and of them alone.
            time_ids: their [B, 6] original height and width, top and left of the crop, target
                height and width, in pixels; of refiners [B, 5]: the first four, aesthetic score.
            extra: [B, C', h, w], concatenated to the scaled sample; inpainting models read the
                mask, 1 where they paint, then the latents of the masked picture.
            guidance_scale: of models that were distilled with it, and of them alone.

        Raises InputError for what the model needs and lacks, or has no use for.
        """
        config = self.config
        for name, value, width in (
            ("pooled", pooled, config.addition_time_embed_dim),
            ("time_ids", time_ids, config.addition_time_embed_dim),
            ("guidance_scale", guidance_scale, config.time_cond_proj_dim),
        ):
            if (value is None) != (width is None):
                raise InputError(f"This U-Net {'takes no' if width is None else 'needs'} {name}.")
        blocks = [block for block in self.modules() if isinstance(block, BasicTransformerBlock)]
        text = [block.attn2.keys_values(hidden) for block in blocks]
        added = guidance = None
        if pooled is not None and time_ids is not None and config.addition_time_embed_dim:
            added = self._added(pooled, time_ids, config.addition_time_embed_dim)
        if guidance_scale is not None and config.time_cond_proj_dim:
            # Luo et al. (2023), section 4.2, whose w is 0 without guidance.
            w = torch.full(hidden.shape[:1], 1000 * (guidance_scale - 1), device=hidden.device)
            waves = timestep_embedding(w, config.time_cond_proj_dim, flip=False, shift=1)
            guidance = self.time_embedding.cond_proj(waves.to(hidden.dtype))
        return Conditioning(text, added, extra, guidance)

    def _added(self, pooled: Tensor, time_ids: Tensor, width: int) -> Tensor:
        """Podell et al. (2023), section 2.2: sizes are embedded as timesteps are."""
        config = self.config
        waves = timestep_embedding(time_ids, width, config.flip_sin_to_cos, config.freq_shift)
        both = torch.cat([pooled, waves.flatten(1).to(pooled.dtype)], dim=1)
        if both.shape[1] != config.projection_class_embeddings_input_dim:
            raise InputError(
                f"pooled of width {pooled.shape[1]} and {time_ids.shape[1]} time_ids of {width} "
                f"each do not make {config.projection_class_embeddings_input_dim}."
            )
        return self.add_embedding(both)

    def forward(self, sample: Tensor, timestep: Tensor, cond: Tensor | Conditioning) -> Tensor:
        """Predict from noised latents.

        Args:
            sample: [B, C, h, w], already scaled by c_in.
            timestep: [B], in the training schedule's steps, fractions allowed.
            cond: text embeddings [B, L, D] for models that need no more, or what condition made.

        Returns:
            [B, C_out, h, w].

        Raises InputError when the sample's channels and the extra ones are not in_channels.
        """
        config = self.config
        if isinstance(cond, Tensor):
            cond = self.condition(cond)
        waves = timestep_embedding(
            timestep, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
        ).to(sample.dtype)
        if cond.guidance is not None:
            waves = waves + cond.guidance
        time = self.time_embedding(waves)
        if cond.added is not None:
            time = time + cond.added
        time = F.silu(time)

        x = sample if cond.extra is None else torch.cat([sample, cond.extra], dim=1)
        if x.shape[1] != config.in_channels:
            raise InputError(
                f"The U-Net takes {config.in_channels} channels but was given {x.shape[1]}; "
                "inpainting models need the mask and the masked latents."
            )
        keys_values = iter(cond.text)
        maps = [self.conv_in(x)]
        for down in self.down_blocks:
            maps += down(maps[-1], time, keys_values)
        maps.append(self.mid_block(maps[-1], time, keys_values))
        for up in self.up_blocks:
            rest = len(maps) - self.config.layers_per_block - 2
            # A shard's forward gets a copy of the list: the block's own part is cut off here.
            maps, own = maps[:rest], maps[rest:]
            maps.append(up(own, time, keys_values, maps[-1].shape[2:] if maps else None))
        return self.conv_out(F.silu(self.conv_norm_out(maps.pop())))
