"""The names of CompVis/A1111 checkpoints: one table for each network, used to read and to write.

A table maps the dotted beginnings of diffusers' names to CompVis's; what follows is the same in
both. Fused attention weights and transposed or reshaped tensors, which no table of names can
express, are in `Layout`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Names = dict[str, str]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
CLIP_XL, OPEN_CLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
OPEN_CLIP_REFINER = "conditioner.embedders.0.model."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {
    "conv_shortcut": "nin_shortcut"
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_names(config: Mapping[str, Any]) -> Names:
    """For a UNet2DConditionModel's config.json: CompVis numbers its blocks in one sequence."""
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "time_embedding.cond_proj": "time_embed.cond_proj",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    layers, levels = config.get("layers_per_block", 2), len(config["block_out_channels"])
    number = 1
    for level in range(levels):
        for layer in range(layers):
            names |= _unet_layer(f"down_blocks.{level}", layer, f"input_blocks.{number}")
            number += 1
        if level < levels - 1:
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    names |= _inside("mid_block.resnets.0", "middle_block.0", _RESNET)
    names["mid_block.attentions.0"] = "middle_block.1"
    names |= _inside("mid_block.resnets.1", "middle_block.2", _RESNET)
    number = 0
    for level, kind in enumerate(config["up_block_types"]):
        for layer in range(layers + 1):
            names |= _unet_layer(f"up_blocks.{level}", layer, f"output_blocks.{number}")
            number += 1
        if level < levels - 1:
            place = 2 if "CrossAttn" in kind else 1
            upsampler = f"output_blocks.{number - 1}.{place}.conv"
            names[f"up_blocks.{level}.upsamplers.0.conv"] = upsampler
    return names


def _unet_layer(block: str, layer: int, theirs: str) -> Names:
    resnet = _inside(f"{block}.resnets.{layer}", f"{theirs}.0", _RESNET)
    return {**resnet, f"{block}.attentions.{layer}": f"{theirs}.1"}


def _inside(ours: str, theirs: str, table: Names) -> Names:
    return {f"{ours}.{one}": f"{theirs}.{other}" for one, other in table.items()}


def vae_names(config: Mapping[str, Any]) -> Names:
    """For an AutoencoderKL's config.json: CompVis numbers the decoder's levels from the finest."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels, layers = len(config["block_out_channels"]), config.get("layers_per_block", 1)
    for coder, up, count in (("encoder", "down", layers), ("decoder", "up", layers + 1)):
        names |= {f"{coder}.{name}": f"{coder}.{name}" for name in ("conv_in", "conv_out")}
        names[f"{coder}.conv_norm_out"] = f"{coder}.norm_out"
        for index in (0, 1):
            ours, theirs = f"{coder}.mid_block.resnets.{index}", f"{coder}.mid.block_{index + 1}"
            names |= _inside(ours, theirs, _VAE_RESNET)
        attention = f"{coder}.mid_block.attentions.0"
        names |= _inside(attention, f"{coder}.mid.attn_1", _VAE_ATTENTION)
        for level in range(levels):
            ours = f"{coder}.{up}_blocks.{level}"
            theirs = f"{coder}.{up}.{level if up == 'down' else levels - 1 - level}"
            for layer in range(count):
                block = f"{theirs}.block.{layer}"
                names |= _inside(f"{ours}.resnets.{layer}", block, _VAE_RESNET)
            names[f"{ours}.{up}samplers.0.conv"] = f"{theirs}.{up}sample.conv"
    return names


def open_clip_names(config: Mapping[str, Any]) -> Names:
    """For a CLIP text tower's config.json, in OpenCLIP's names."""
    names = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "text_projection.weight": "text_projection",
    }
    for number in range(config.get("num_hidden_layers", 12)):
        ours, theirs = f"text_model.encoder.layers.{number}", f"transformer.resblocks.{number}"
        names |= _inside(ours, theirs, _OPEN_CLIP_LAYER)
        for kind in ("weight", "bias"):
            names[f"{ours}.self_attn.in_proj_{kind}"] = f"{theirs}.attn.in_proj_{kind}"
    return names


def renamed(name: str, names: Names) -> str | None:
    """`name` by the longest of its dotted beginnings that is in the table, None where none is."""
    head = name
    while head and head not in names:
        head = head.rpartition(".")[0]
    return names[head] + name[len(head) :] if head else None


@dataclass(frozen=True)
class Layout:
    """How one network lies in a file: every name begins with `prefix`."""

    prefix: str
    names: Names | None = None
    """None where CompVis kept transformers' own names."""
    fused: bool = False
    """Whether queries, keys and values are one tensor, as in OpenCLIP."""

    def write(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by diffusers' names -> by CompVis's. Raises KeyError for a name without one."""
        written = {}
        for name, tensor in (_fused(state) if self.fused else state).items():
            theirs = renamed(name, self.names) if self.names is not None else name
            if theirs is None:
                raise KeyError(name)
            if name == "text_projection.weight":
                tensor = tensor.T
            if ".mid.attn_1." in theirs and tensor.dim() == 2:
                tensor = tensor[:, :, None, None]
            written[self.prefix + theirs] = tensor.contiguous()
        return written

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of write. What has no name here keeps CompVis's."""
        back = None if self.names is None else {theirs: o for o, theirs in self.names.items()}
        state = {}
        for name, tensor in tensors.items():
            bare = name.removeprefix(self.prefix)
            ours = bare if back is None else renamed(bare, back) or bare
            if ours == "text_projection.weight":
                tensor = tensor.T
            if ".mid.attn_1." in bare and bare.endswith("weight") and tensor.dim() > 2:
                tensor = tensor.flatten(1)
            state[ours] = tensor
        return dict(_split(state))


_SEPARATE = re.compile(r"(.*self_attn)\.([qkv])_proj\.(weight|bias)")
_FUSED = re.compile(r"(.*self_attn)\.in_proj_(weight|bias)")


def _fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as OpenCLIP's in_proj."""
    fused = {}
    for name, tensor in state.items():
        if match := _SEPARATE.fullmatch(name):
            attention, letter, kind = match.groups()
            if letter == "q":
                parts = [state[f"{attention}.{each}_proj.{kind}"] for each in "qkv"]
                fused[f"{attention}.in_proj_{kind}"] = torch.cat(parts)
        else:
            fused[name] = tensor
    return fused


def _split(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """OpenCLIP's in_proj as queries, keys and values."""
    for name, tensor in state.items():
        if match := _FUSED.fullmatch(name):
            attention, kind = match.groups()
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{attention}.{letter}_proj.{kind}", part
        else:
            yield name, tensor
