"""Latent consistency distillation: what a student that draws in a few steps learns."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import DenoiserFunction, like

HUBER = 0.00054
"""c of the pseudo-Huber distance over the root of the number of values: Song & Dhariwal (2023)."""


def consistency_loss(
    student: DenoiserFunction,
    teacher: DenoiserFunction,
    x0: Tensor,
    sigma: Tensor,
    following: Tensor,
    noise: Tensor,
    cond: Any,
) -> Tensor:
    """Distance between the student's estimates at both ends of a step of its teacher, [B], fp32.

    Lines 6 to 9 of Algorithm 1 of Luo et al. (2023), but that the teacher's guidance is one and not
    drawn, and that the target is the student's own without gradient and not its average's, with
    the distance that Song & Dhariwal (2023) found for consistency training without a teacher. The
    consistency function f is the student's D wherever there is noise, as the sampler `lcm` takes
    it, and f(x, 0) = x. Nothing is drawn here.

    Distances are weighed by sqrt(1 + 1 / sigma^2): so they are those of the velocity of Salimans &
    Ho (2022), whatever the network predicts. Where there is little noise the teacher alone is
    learned from; unweighted, the student drifts away from it there.

    Args:
        student: D(x, sigma, cond), differentiable.
        teacher: D(x, sigma, cond) under guidance; no gradient is taken of it.
        x0, noise: clean latents and N(0, I) noise [B, C, h, w].
        sigma, following: where the teacher's step begins and ends, sigma > following >= 0, [B].
        cond: what both are conditioned on, passed through.
    """
    x0, noise, sigma, following = (v.float() for v in (x0, noise, sigma, following))
    x = x0 + like(sigma, x0) * noise
    with torch.no_grad():
        guided = teacher(x, sigma, cond)
        # DDIM, in these coordinates Euler's method: Song et al. (2021), equation 13.
        earlier = guided + like(following / sigma, x) * (x - guided)
        noisy = following > 0
        target = student(earlier, torch.where(noisy, following, sigma), cond)
        target = torch.where(like(noisy, x), target, earlier)
    return (1 + sigma**-2).sqrt() * pseudo_huber(student(x, sigma, cond), target)


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c of each sample, [B]: Song & Dhariwal (2023), equation 7.

    a, b: [B, ...] of n values each; c = 0.00054 sqrt(n).
    """
    difference = (a - b).flatten(1)
    c = HUBER * math.sqrt(difference.shape[1])
    return (difference.square().sum(dim=1) + c**2).sqrt() - c
