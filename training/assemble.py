"""The parts that a run of training.diffusion starts from."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from pydantic import model_validator
from torch import nn

from latentdiff.checkpoint import ModelParts, load_model
from latentdiff.config import load_yaml
from latentdiff.data.scenes import ScenesConfig
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.blocks import BasicTransformerBlock
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.networks import load_text_encoder, load_vae
from latentdiff.scheduler_config import SchedulerConfig
from training.config import RunConfig, seeded


class PartsConfig(RunConfig):
    """What is trained and what it is trained with: a whole model, or parts, or both."""

    init_from: str | None = None
    """A model to start from: a directory, a name on the hub, one .safetensors file, or "emoji".
    What is named below replaces its parts; without it all of them are needed."""
    autoencoder: Path | None = None
    """Directory with vae/, whose encoder the cache was made with."""
    text_encoder: Path | None = None
    """Directory with text_encoder/ and tokenizer/: CLIP, T5, BERT or GPT-2."""
    scheduler: SchedulerConfig | None = None
    """The noise schedule, and what the U-Net predicts."""
    unet: UNetConfig | None = None
    """The network; with init_from it can only be what the model has."""
    gradient_checkpointing: bool = False
    """Compute activations anew in the backward pass: a third more time for much less memory."""
    scenes: Path | None = None
    """The scenes' YAML file; the finished model then says what it knows."""

    @model_validator(mode="after")
    def _whole(self) -> PartsConfig:
        parts = ("autoencoder", "text_encoder", "scheduler", "unet")
        missing = [name for name in parts if getattr(self, name) is None]
        if self.init_from is None and missing:
            raise ValueError(f"name {', '.join(missing)}, or a model in init_from")
        return self


def assemble(config: PartsConfig) -> ModelParts:
    """The parts that a run trains and conditions on, in fp32 on the CPU.

    Raises InputError when a directory is missing or the parts do not fit one another.
    """
    for folder, name in ((config.autoencoder, "vae"), (config.text_encoder, "text_encoder")):
        if folder is not None and not (folder / name).is_dir():
            raise InputError(f"{folder / name} is missing; train it first.")
    base = None if config.init_from is None else load_model(config.init_from)
    replaced: dict[str, Any] = {}
    if config.autoencoder is not None:
        replaced["autoencoder"] = Autoencoder(load_vae(config.autoencoder))
    if config.text_encoder is not None:
        replaced["text_encoder"] = named = load_text_encoder(config.text_encoder)
        if base is not None and differs(named, base.text_encoder):
            warnings.warn(
                f"The text encoder of {config.text_encoder} replaces that of {config.init_from}, "
                "whose U-Net learned to read the latter; leave text_encoder out to keep it.",
                stacklevel=2,
            )
    if config.scheduler is not None:
        replaced["scheduler_config"] = config.scheduler
    if config.scenes is not None:
        replaced["vocabulary"] = load_yaml(ScenesConfig, config.scenes)
    if base is None:
        assert config.unet is not None
        with seeded(config.seed):
            replaced["unet"] = UNet(config.unet)
            open_to_text(replaced["unet"])
        parts = ModelParts(**replaced)
    else:
        if config.unet not in (None, base.unet.config):
            raise InputError(
                f"init_from, {config.init_from}, has another U-Net than unet describes; leave "
                "unet out, or make it equal to the model's unet/config.json."
            )
        parts = dataclasses.replace(base, **replaced)
    check_fit(parts)
    return parts


def differs(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have other tensors, in the half precision that models are kept in."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() != theirs.keys() or any(
        not torch.equal(tensor.half(), theirs[name].half()) for name, tensor in mine.items()
    )


def check_fit(parts: ModelParts) -> None:
    """Raises InputError where the U-Net cannot read the latents or the text."""
    unet, width = parts.unet.config, parts.text_encoder.hidden_size
    if parts.inpaints:
        raise InputError("Inpainting U-Nets cannot be trained yet; start from a plain one.")
    if unet.cross_attention_dim != width:
        raise InputError(
            f"unet.cross_attention_dim is {unet.cross_attention_dim}, but the text encoder is "
            f"{width} wide; make them equal."
        )
    channels = parts.autoencoder.latent_channels
    for name in ("in_channels", "out_channels"):
        if getattr(unet, name) != channels:
            raise InputError(
                f"unet.{name} is {getattr(unet, name)}, but the autoencoder's latents have "
                f"{channels} channels; make them equal."
            )


TEXT_GAIN = 2.0
"""Gain of the values and outputs of cross-attention at the start."""


@torch.no_grad()
def open_to_text(unet: UNet) -> None:
    """Initial weights: PyTorch's, but the prediction zero and cross-attention orthogonal and loud.

    At first attention averages over all tokens, and what is left of one caption's difference from
    another is small beside the features it is added to. Louder, it is learned from in half the
    steps; so it is with residual branches that do not start at zero.
    """
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            for name in ("to_v.weight", "to_out.0.weight"):
                nn.init.orthogonal_(module.attn2.get_parameter(name), TEXT_GAIN)
    unet.conv_out.weight.zero_()
