"""Optimizers, and their learning rate as a function of the global step."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.distributed.tensor import DTensor

from latentdiff.config import Config
from latentdiff.errors import InputError
from training.adafactor import Adafactor

TEXT_ENCODER = "text_encoder"
"""What the names of a text encoder's parameters begin with."""


class OptimizerConfig(Config):
    """An optimizer whose learning rate has a warm-up, a plateau and a cooldown."""

    name: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019); with moments of 8 bits (Dettmers et al. 2022), on NVIDIA
    GPUs; or Adafactor (Shazeer & Stern 2018), whose moments are smaller still and which has no
    momentum."""
    learning_rate: float = Field(gt=0)
    """The plateau's learning rate."""
    text_encoder_learning_rate: float | None = Field(default=None, gt=0)
    """The text encoder's on the plateau, where it is trained; learning_rate by default."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the first and second moments; Adafactor has its own."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, of weight matrices and kernels only."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps of linear rise from zero."""
    cooldown_steps: int = Field(default=0, ge=0)
    """Steps of fall to zero before `max_steps`; zero keeps the plateau to the end."""
    cooldown: Literal["linear", "cosine"] = "linear"
    """Shape of the fall. Over all steps after the warm-up, a cosine is the schedule of Loshchilov
    & Hutter (2017) without restarts."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""

    def rate(self, step: int, max_steps: int) -> float:
        """The learning rate of optimizer step `step` (from 0), a function of nothing else."""
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        left = max_steps - step
        fall = min(1.0, left / self.cooldown_steps) if self.cooldown_steps else 1.0
        if self.cooldown == "cosine":
            fall = math.sin(fall * math.pi / 2) ** 2  # (1 - cos(pi fall)) / 2
        return self.learning_rate * min(rise, fall)


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer of what requires grad, made once the parameters are where they stay.

    Each group says in "scale" what config.rate is multiplied by for it. Weight decay falls on
    matrices and kernels, not on biases and norms. Raises InputError for 8 bits where there is no
    bitsandbytes, no NVIDIA GPU, or parameters are sharded.
    """
    groups = parameter_groups(network, config)
    if config.name == "adafactor":
        return Adafactor(groups)
    if config.name == "adamw8bit":
        return _adamw8bit(groups, config)
    return torch.optim.AdamW(groups, betas=config.betas, fused=True)


def parameter_groups(network: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """What requires grad, by learning rate and by whether it decays; no group is empty."""
    scale = 1.0
    if config.text_encoder_learning_rate is not None:
        scale = config.text_encoder_learning_rate / config.learning_rate
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            key = scale if name.startswith(TEXT_ENCODER) else 1.0, decay
            members.setdefault(key, []).append(parameter)
    return [
        {
            "params": params,
            "lr": config.learning_rate * scale,
            "weight_decay": decay,
            "scale": scale,
        }
        for (scale, decay), params in members.items()
    ]


def _adamw8bit(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise InputError(
            "adamw8bit needs bitsandbytes; install it with: pip install 'latentdiff[8bit]'."
        ) from None
    parameters = [parameter for group in groups for parameter in group["params"]]
    if any(parameter.device.type != "cuda" for parameter in parameters):
        raise InputError("adamw8bit runs on NVIDIA GPUs; set optimizer.name to adamw or adafactor.")
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise InputError(
            "adamw8bit cannot share its state among processes (FSDP2); set optimizer.name to adamw "
            "or adafactor, or launch with DDP."
        )
    for parameter in parameters:  # bitsandbytes does it later, under moments of another order
        parameter.data = parameter.data.contiguous()
    return AdamW8bit(groups, lr=config.learning_rate, betas=config.betas)
