"""What the U-Net learns: Algorithm 1 of Ho et al. (2020), with what later papers put into it."""

from __future__ import annotations

from typing import Any, Protocol

from pydantic import Field
from torch import Tensor

from latentdiff.config import Config
from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.loss import Weighting, diffusion_loss, min_snr, offset_noise, uniform
from latentdiff.diffusion.parameterization import Parameterization
from latentdiff.diffusion.schedule import SMALLEST_ALPHA, Schedule
from latentdiff.diffusion.timesteps import TimestepConfig, timesteps


class Draw(Protocol):
    """Random numbers for a batch of B samples, keyed by sample, never by the order of calls."""

    def __call__(self, stream: str, shape: tuple[int, ...] | None) -> Tensor:
        """N(0, 1) numbers [B, *shape]; without a shape uniform ones in [0, 1), [B]."""


class ObjectiveConfig(Config):
    """The loss and what is drawn for it."""

    min_snr_gamma: float | None = Field(default=None, gt=0)
    """gamma of the loss weights of Hang et al. (2023), 5 there; none for uniform weights."""
    timesteps: TimestepConfig = TimestepConfig()
    """Which timesteps it trains at."""
    offset_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of the noise's mean (Guttenberg 2023); 0.05 to 0.1 where it is used."""
    input_perturbation: float = Field(default=0.0, ge=0)
    """Standard deviation of the noise that the network sees and does not predict (Ning et al.
    2023); 0.1 where it is used."""
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of captions replaced by the empty one, for classifier-free guidance."""

    def streams(self, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...] | None]]:
        """All that losses and dropped will draw for latents of `shape` [C, h, w]."""
        drawn: list[tuple[str, tuple[int, ...] | None]] = [("timestep", None), ("caption", None)]
        drawn.append(("noise", shape))
        if self.offset_noise:
            drawn.append(("offset", (shape[0], *(1 for _ in shape[1:]))))
        if self.input_perturbation:
            drawn.append(("perturbation", shape))
        return drawn

    def dropped(self, draw: Draw) -> Tensor:
        """Whose caption is replaced by the empty one, [B]: Ho & Salimans (2022), Algorithm 1."""
        return draw("caption", None) < self.caption_dropout

    def timestep(self, draw: Draw, schedule: Schedule) -> Tensor:
        """The timestep of each sample, [B], int64."""
        return timesteps(draw("timestep", None), len(schedule), self.timesteps)

    def losses(
        self, denoiser: Denoiser, x0: Tensor, draw: Draw, cond: Any
    ) -> tuple[Tensor, Tensor]:
        """Loss [B] and timestep [B] of each sample; lines 2 to 5 of Algorithm 1 but the gradient.

        x0: clean latents [B, C, h, w]; what is drawn is moved to them. The streams are "timestep",
        "noise" and, where configured, "offset" and "perturbation".
        """
        schedule, shape = denoiser.schedule, tuple(x0.shape[1:])
        timestep = self.timestep(draw, schedule)
        noise = draw("noise", shape)
        if self.offset_noise:
            offset = draw("offset", (shape[0], *(1 for _ in shape[1:])))
            noise = offset_noise(noise, offset, self.offset_noise)
        perturbation = None
        if self.input_perturbation:
            perturbation = self.input_perturbation * draw("perturbation", shape)
            perturbation = perturbation.to(x0.device)
        sigma = schedule.sigmas[timestep].to(x0.device)
        noise = noise.to(x0.device)
        weighting = self.weighting(schedule)
        loss = diffusion_loss(denoiser, x0, sigma, noise, cond, weighting, perturbation)
        return loss, timestep

    def weighting(self, schedule: Schedule) -> Weighting:
        """The weights of the squared error of F; with a floor where the SNR ends at zero."""
        if self.min_snr_gamma is None:
            return uniform
        gamma, ends_at_zero = self.min_snr_gamma, schedule.alphas_cumprod[-1] <= SMALLEST_ALPHA
        return min_snr(gamma, floor=min(gamma, 1.0) if ends_at_zero else 0.0)

    def weights(self, schedule: Schedule, parameterization: Parameterization) -> Tensor:
        """The weight at each timestep [T]."""
        c_out = parameterization.c_out(schedule.sigmas)
        return self.weighting(schedule)(schedule.sigmas, c_out)
