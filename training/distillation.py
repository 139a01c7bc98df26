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
from latentdiff.errors import InputError
from latentdiff.request import default_guidance_scale, draws_in_few_steps, is_distilled
from latentdiff.scheduler_config import LCM
from training.config import DTYPES, Precision
from training.network import Text, TextToLatents
from training.objective import Draw, ObjectiveConfig


class DistillationConfig(Config):
    """A latent consistency model of the model in init_from."""

    steps: int = Field(default=50, ge=1, le=1000)
    """Of the teacher's DDIM: how far apart the two noise levels are at which the student agrees
    with itself."""
    guidance_scale: float | None = Field(default=None, ge=1)
    """The teacher's; it goes into the student's weights, which draw with 1. By default what
    `generate` takes."""


class Distillation:
    """The teacher, and what is learned from it.

    The teacher's U-Net is another copy of the model's, whole on each device, its weights too in the
    precision of the student's arithmetic; its text encoder is the student's, in fp32. The log's MFU
    counts what the student computes alone.
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
        if config.steps > len(parts.schedule):
            raise InputError(
                f"distillation.steps is {config.steps}, but {parts.name} has "
                f"{len(parts.schedule)} timesteps; take fewer."
            )
        self.parts, self.network = parts, network
        self.stride = len(parts.schedule) // config.steps
        self.dtype = DTYPES[mixed_precision]
        self.unet = copy.deepcopy(parts.unet).requires_grad_(False).eval()
        self.unet.to(dtype=self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.forward: Callable[..., Tensor] = self.unet.forward
        if compiled:
            self.forward = torch.compile(self.forward)
        given = config.guidance_scale
        self.guidance_scale = default_guidance_scale(parts) if given is None else given
        self.empty = network.tokenize("")

    def teacher(self, x: Tensor, sigma: Tensor, text: Text) -> Tensor:
        """The guided denoised [B, C, h, w] of x [B, C, h, w] at sigma [B], fp32."""
        self.unet.to(x.device)
        first = torch.ones_like(text.dropped[:1])
        hidden, pooled = self.network.encode(
            Text(
                torch.cat([self.empty[None].to(text.ids), text.ids]),
                torch.cat([text.sizes[:1], text.sizes]),
                torch.cat([first, text.dropped]),
            )
        )
        sizes = None if pooled is None else torch.cat([text.sizes, text.sizes]).to(x)
        pooled = None if pooled is None else self.both(pooled)
        cond = self.unet.condition(self.both(hidden), pooled, sizes)
        denoiser = Denoiser(self.predict, self.parts.schedule, self.parts.parameterization)
        return ClassifierFreeGuidance(denoiser, self.guidance_scale)(x, sigma, cond)

    def both(self, encoded: Tensor) -> Tensor:
        """[1 + B, ...] of the empty caption and B others -> [2B, ...], the empty ones first."""
        nothing, captions = encoded[:1], encoded[1:]
        return torch.cat([nothing.expand_as(captions), captions]).to(self.dtype)

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
        """The noise levels [B] between which the teacher steps from timestep [B]: at last to 0."""
        sigmas, before = self.parts.schedule.sigmas, timestep - self.stride
        following = torch.where(before >= 0, sigmas[before.clamp(min=0)], 0.0)
        return sigmas[timestep], following


def for_few_steps(parts: ModelParts) -> ModelParts:
    """The parts as a latent consistency model's: what draws with them takes `lcm` and few steps."""
    named = {"class_name": LCM, "timestep_spacing": "trailing"}
    levels = {"use_karras_sigmas": False, "use_exponential_sigmas": False}
    config = parts.scheduler_config.model_copy(update=named | levels)
    return dataclasses.replace(parts, scheduler_config=config)
