"""Which timesteps a network is trained at."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from latentdiff.config import Config


class TimestepConfig(Config):
    """The distribution of training timesteps over the noise schedule's T."""

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    """Every timestep alike (Ho et al. 2020), or the middle of the schedule more often (Esser et al.
    2024)."""
    mean: float = 0.0
    """m of the logit-normal: below zero less noise, above it more."""
    std: float = Field(default=1.0, gt=0)
    """s of the logit-normal."""
    first: int = Field(default=0, ge=0)
    """The lowest timestep that is drawn."""
    last: int | None = Field(default=None, ge=0)
    """The highest one; T - 1 by default."""

    @model_validator(mode="after")
    def _ordered(self) -> TimestepConfig:
        if self.last is not None and self.last < self.first:
            raise ValueError(f"last is {self.last}, less than first, {self.first}")
        return self


def timesteps(uniform: Tensor, count: int, config: TimestepConfig) -> Tensor:
    """Timesteps [B], int64, by the inverse of their distribution function.

    They are floor(T t) for t in [0, 1), given that it is from first to last. The logit-normal t is
    1 / (1 + exp(-(m + s z))) for a standard normal z: Esser et al. (2024), equation 19.

    Args:
        uniform: numbers in [0, 1), [B], one for each sample.
        count: T, the length of the noise schedule.
    """
    last = count - 1 if config.last is None else min(config.last, count - 1)
    first = min(config.first, last)
    edges = torch.tensor([first, last + 1], dtype=torch.float64, device=uniform.device) / count
    u = uniform.double()
    if config.distribution == "uniform":
        t = torch.lerp(edges[0], edges[1], u)
    else:
        shares = torch.special.ndtr((edges.logit() - config.mean) / config.std)
        z = torch.special.ndtri(torch.lerp(shares[0], shares[1], u))
        t = torch.sigmoid(config.mean + config.std * z)
    return (count * t).long().clamp(first, last)
