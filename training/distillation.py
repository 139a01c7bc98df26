"""Distilling a model into one that draws in a few steps: Luo et al. (2023)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from latentdiff.checkpoint import ModelParts
from latentdiff.config import Config
from latentdiff.diffusion.consistency import consistency_loss
from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.guidance import ClassifierFreeGuidance
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import InputError
from latentdiff.request import default_guidance_scale, draws_in_few_steps, is_distilled
from latentdiff.scheduler_config import LCM
from training.config import DTYPES, Precision
from training.network import Text, TextToLatents
from training.objective import Draw, ObjectiveConfig


class DistillationConfig(Config):
    """A latent consistency model of the model in init_from."""

    steps: int = Field(default=50, ge=1, le=1000)
    """Of the teacher's DDIM: the noise levels that the student learns at."""
    guidance_scale: float | None = Field(default=None, ge=1)
    """The teacher's, which the student draws with at 1; by default what `generate` takes."""


class Distillation:
    """The teacher, and what is learned from it.

    The teacher's U-Net is another copy of the model's, whole on each device, in the arithmetic of
    mixed_precision; its text encoder is the student's.
    """

    def __init__(
        self,
        config: DistillationConfig,
        parts: ModelParts,
        network: TextToLatents,
        mixed_precision: Precision,
        compiled: bool,
    ) -> None:
        """Raises InputError where the model cannot be a teacher."""
        if draws_in_few_steps(parts) or is_distilled(parts):
            raise InputError(f"{parts.name} was distilled already; name its teacher in init_from.")
        if parts.scheduler_config.use_flow_sigmas:
            raise InputError(
                f"{parts.name} is a rectified flow; models of few steps are distilled from those "
                "that predict the noise, the velocity or the sample."
            )
        self.parts, self.network = parts, network
        self.dtype = DTYPES[mixed_precision]
        self.unet = copy.deepcopy(parts.unet).requires_grad_(False).eval()
        self.unet.to(dtype=self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.forward: Callable[..., Tensor] = self.unet.forward
        if compiled:
            self.forward = torch.compile(self.forward)
        given = config.guidance_scale
        self.guidance_scale = default_guidance_scale(parts) if given is None else given
        self.levels = levels(parts.schedule, config.steps)
        self.empty = network.tokenize("")

    def teacher(self, x: Tensor, sigma: Tensor, text: Text) -> Tensor:
        """The guided denoised [B, C, h, w] of x [B, C, h, w] at sigma [B], fp32."""
        self.unet.to(x.device)
        nothing = self.empty.to(text.ids).expand_as(text.ids)
        hidden, pooled = self.network.encode(
            Text(
                torch.cat([nothing, text.ids]),
                torch.cat([text.sizes, text.sizes]),
                torch.cat([torch.ones_like(text.dropped), text.dropped]),
            )
        )
        sizes = None if pooled is None else torch.cat([text.sizes, text.sizes]).to(self.dtype)
        pooled = None if pooled is None else pooled.to(self.dtype)
        cond = self.unet.condition(hidden.to(self.dtype), pooled, sizes)
        denoiser = Denoiser(self.predict, self.parts.schedule, self.parts.parameterization)
        return ClassifierFreeGuidance(denoiser, self.guidance_scale)(x, sigma, cond)

    def predict(self, x: Tensor, timestep: Tensor, cond: Any) -> Tensor:
        """The teacher's U-Net, whatever x's dtype."""
        return self.forward(x.to(self.dtype), timestep, cond)

    def losses(
        self, student: Denoiser, x0: Tensor, objective: ObjectiveConfig, draw: Draw, text: Text
    ) -> tuple[Tensor, Tensor]:
        """Loss [B] and timestep [B] of each sample; the streams are "timestep" and "noise"."""
        timestep = objective.timestep(draw, self.parts.schedule)
        sigma, following = (level.to(x0.device) for level in self.step_from(timestep))
        noise = draw("noise", tuple(x0.shape[1:])).to(x0.device)
        return consistency_loss(student, self.teacher, x0, sigma, following, noise, text), timestep

    def step_from(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The noise levels [B] between which the teacher's step lies that timestep [B] is in."""
        sigma = self.parts.schedule.sigmas[timestep]
        index = torch.searchsorted(self.levels, sigma).clamp(1, len(self.levels) - 1)
        return self.levels[index], self.levels[index - 1]


def for_few_steps(parts: ModelParts) -> ModelParts:
    """The parts as a latent consistency model's: what draws with them takes `lcm` and few steps."""
    named = {"class_name": LCM, "timestep_spacing": "trailing"}
    config = parts.scheduler_config.model_copy(update=named)
    return dataclasses.replace(parts, scheduler_config=config)


def levels(schedule: Schedule, steps: int) -> Tensor:
    """The teacher's noise levels [steps + 1], ascending from 0: DDIM's, trailing."""
    return schedule.sampling_sigmas(steps, "trailing").flip(0).contiguous()
