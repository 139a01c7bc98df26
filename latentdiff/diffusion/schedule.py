"""The noise schedule: alphas_cumprod of the DDPM papers <-> sigma, and the sigmas to sample at."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from latentdiff.errors import InputError

TimestepSpacing = Literal["trailing", "leading", "linspace"]
Spacing = Literal["trailing", "leading", "linspace", "karras", "exponential"]

SMALLEST_ALPHA = 1e-9
"""alphas_cumprod of zero-terminal-SNR and flow schedules ends at 0, where sigma is infinite; it is
raised to this, sigma = 3.2e4. A squared cosine's ends at 2.4e-9."""

KARRAS_RHO = 7.0
"""rho of Karras et al. (2022), equation 5."""


class Schedule:
    """T noise levels, sigma_t = sqrt((1 - alphas_cumprod_t) / alphas_cumprod_t), ascending.

    alphas_cumprod: [T], in [0, 1). Raises InputError where they do not fall strictly.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod.double().clamp(min=SMALLEST_ALPHA)
        if (self.alphas_cumprod.diff() >= 0).any():
            raise InputError(
                f"alphas_cumprod must fall at each timestep, and to {SMALLEST_ALPHA:g} only at the "
                "last; use smaller betas, a smaller shift or fewer timesteps."
            )
        exact = torch.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)
        self._log_sigmas = exact.log()
        self.sigmas = exact.float()

    @classmethod
    def linear(cls, beta_start: float, beta_end: float, steps: int) -> Schedule:
        """beta_t linear in t: Ho et al. (2020), section 4."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, beta_start: float, beta_end: float, steps: int) -> Schedule:
        """sqrt(beta_t) linear in t: Rombach et al. (2022) and Stable Diffusion."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
        return cls.from_betas(roots**2)

    @classmethod
    def squared_cosine(cls, steps: int) -> Schedule:
        """alphas_cumprod a squared cosine, betas at most 0.999: Nichol & Dhariwal (2021)."""
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        level = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls.from_betas((1 - level[1:] / level[:-1]).clamp(max=0.999))

    @classmethod
    def flow(cls, shift: float, steps: int) -> Schedule:
        """Rectified flow, x = (1 - t) x0 + t noise, whose sigma is t / (1 - t).

        t = shift u / (1 + (shift - 1) u) for u = 1/T, 2/T, ..., 1: Esser et al. (2024), equation
        23. shift > 0; 1 is none, and Stable Diffusion 3 has 3.
        """
        u = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        t = shift * u / (1 + (shift - 1) * u)
        return cls((1 - t) ** 2 / ((1 - t) ** 2 + t**2))

    @classmethod
    def from_betas(cls, betas: Tensor) -> Schedule:
        """alphas_cumprod_t = prod_{s <= t} (1 - beta_s): Ho et al. (2020), equation 4."""
        return cls(torch.cumprod(1 - betas.double(), dim=0))

    def zero_terminal_snr(self) -> Schedule:
        """The schedule moved until nothing of x0 is left at T: Lin et al. (2023), Algorithm 1.

        sqrt(alphas_cumprod) is shifted to end at 0 and scaled to begin where it began. SNR 0 is a
        sigma without end; SMALLEST_ALPHA takes its place.
        """
        roots = self.alphas_cumprod.sqrt()
        return Schedule(((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2)

    def __len__(self) -> int:
        return len(self.sigmas)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep in [0, T - 1] of each sigma, interpolated in log sigma; shape of sigma.

        Sigmas outside the schedule get its first or last timestep.
        """
        grid = self._log_sigmas.to(sigma.device)
        target = sigma.double().log().clamp(grid[0], grid[-1])
        upper = torch.searchsorted(grid, target).clamp(1, len(grid) - 1)
        lower = upper - 1
        share = (target - grid[lower]) / (grid[upper] - grid[lower])
        return (lower + share).float()

    def sigma(self, timestep: Tensor) -> Tensor:
        """The sigma of each timestep in [0, T - 1], fractions interpolated in log sigma."""
        grid = self._log_sigmas.to(timestep.device)
        lower = timestep.double().floor().clamp(0, len(grid) - 2).long()
        share = timestep.double() - lower
        return torch.lerp(grid[lower], grid[lower + 1], share).exp().float()

    def sampling_timesteps(
        self, num_inference_steps: int, spacing: TimestepSpacing = "trailing", steps_offset: int = 0
    ) -> Tensor:
        """The timesteps [N] a sampler visits, descending whole numbers.

        Table 2 of Lin et al. (2023): "trailing" starts at T - 1, "leading" steps from steps_offset
        up and misses T - 1, "linspace" includes both ends. 1 <= N <= T. An offset that would leave
        the schedule is cut to what fits.
        """
        total, count = len(self), num_inference_steps
        if spacing == "trailing":
            steps = torch.arange(count, dtype=torch.float64)
            return torch.round(total - steps * total / count).long() - 1
        if spacing == "leading":
            steps = (torch.arange(count) * (total // count)).flip(0)
            return steps + min(steps_offset, total - 1 - int(steps[0]))
        return torch.linspace(0, total - 1, count, dtype=torch.float64).flip(0).round().long()

    def sampling_sigmas(
        self, num_inference_steps: int, spacing: Spacing = "trailing", steps_offset: int = 0
    ) -> Tensor:
        """The sigmas [N + 1] a sampler visits, descending, and 0 at the end.

        The first three spacings have those of sampling_timesteps. "karras" goes from the largest
        sigma of the schedule to the smallest evenly in sigma^(1/7): Karras et al. (2022), equation
        5. "exponential" does so evenly in log sigma.
        """
        if spacing == "karras" or spacing == "exponential":
            first, last = self._log_sigmas[-1], self._log_sigmas[0]
            ramp = torch.linspace(0, 1, num_inference_steps, dtype=torch.float64)
            if spacing == "exponential":
                sigmas = torch.lerp(first, last, ramp).exp()
            else:
                first, last = (first / KARRAS_RHO).exp(), (last / KARRAS_RHO).exp()
                sigmas = torch.lerp(first, last, ramp) ** KARRAS_RHO
            return torch.cat([sigmas.float(), torch.zeros(1)])
        timesteps = self.sampling_timesteps(num_inference_steps, spacing, steps_offset)
        return torch.cat([self.sigmas[timesteps], torch.zeros(1)])
