"""How fast each sampler comes to what can be computed exactly.

    python -m benchmarks.convergence [--plot benchmarks/convergence.svg]

Prints two Markdown tables and writes their plot. Every run goes from Stable Diffusion's largest
sigma to its smallest, 14.6 to 0.029, over Karras's spacing; the jump from there to 0, which is of
first order for every sampler, is left out. Nothing is drawn at random.

Deterministic samplers follow the probability flow of a mixture of three Gaussians on a line. The
flow keeps the order of points, so it takes each quantile at the first sigma to the same quantile
at the last: that is the solution in closed form. The error is the root mean square over 256
quantiles; the data has a standard deviation of about 1.

Stochastic samplers have no such solution for each sample; what they must get right is the
distribution. For Gaussian data every result is a weighted sum of the noises that went in, and the
weights are computed, not sampled. The error is that of the standard deviation, relative.

lcm is in neither: with the true consistency function it is exact after any number of steps
(tests/diffusion/test_samplers.py), with a denoiser it comes to nothing.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.panels import Line, Panel, save
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.diffusion.schedule import Schedule

STEPS = (5, 10, 20, 40, 80)
DETERMINISTIC = ("ddim", "euler", "heun", "dpm2", "dpmpp_2m", "unipc")
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde")
TWO_CALLS = ("heun", "dpm2", "dpmpp_sde")

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([-1.0, 0.4, 1.7], dtype=torch.float64)
STD = 0.3

Errors = dict[str, list[float]]
"""By sampler, one for each of STEPS."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("convergence.svg"))
    path = parser.parse_args().plot
    followed = {name: [flow_error(name, count) for count in STEPS] for name in DETERMINISTIC}
    spread = {name: [spread_error(name, count) for count in STEPS] for name in STOCHASTIC}
    print(table("Error of each sample", followed), table("Error of the spread", spread), sep="\n\n")
    save(
        path,
        panel("Deterministic samplers", "error of each sample (RMS)", followed),
        panel("Stochastic samplers", "error of the standard deviation", spread),
    )


def levels(steps: int) -> Tensor:
    """Sigmas [steps + 1] of Karras's spacing, without the 0 at the end."""
    schedule = Schedule.scaled_linear(0.00085, 0.012, 1000)
    return schedule.sampling_sigmas(steps + 1, "karras")[:-1].double()


def mixture(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
    """E[x0 | x] of the mixture: each Gaussian's own, by its share of the density at x."""
    sigma, point = sigma[:, None], x.flatten()[:, None]
    variance = STD**2 + sigma**2
    share = torch.softmax(WEIGHTS.log() - (point - MEANS) ** 2 / (2 * variance), dim=1)
    means = (STD**2 * point + sigma**2 * MEANS) / variance
    return (share * means).sum(dim=1).reshape(x.shape)


def quantiles(levels: Tensor, sigma: Tensor) -> Tensor:
    """Where the mixture with noise sigma has the cumulative probabilities `levels`, by halving."""
    spread = torch.sqrt(STD**2 + sigma**2)
    low, high = torch.full_like(levels, -100.0), torch.full_like(levels, 100.0)
    for _ in range(80):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle[:, None] - MEANS) / spread) @ WEIGHTS < levels
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def flow_error(name: str, steps: int) -> float:
    """Root mean square error of the points that a deterministic sampler comes to."""
    sigmas = levels(steps)
    chances = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    start, end = quantiles(chances, sigmas[0]), quantiles(chances, sigmas[-1])
    *_, last = SAMPLERS[name](mixture, start[:, None, None, None], sigmas)
    return float((last.x.flatten() - end).square().mean().sqrt())


def spread_error(name: str, steps: int) -> float:
    """Relative error of the standard deviation of N(0, 1/4) data at the last sigma.

    Row k of x holds the weight of the k-th of all noises that go in.
    """
    sigmas, variance = levels(steps), 0.25
    unit = torch.eye(2 + 2 * steps, dtype=torch.float64)[:, :, None, None, None]

    def gaussian(x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        return variance * x / (variance + sigma[:, None, None, None] ** 2)

    start = (variance + sigmas[0] ** 2).sqrt() * unit[0]
    *_, last = SAMPLERS[name](gaussian, start, sigmas, noise=lambda index: unit[1 + index])
    return abs(float(last.x.square().sum() / (variance + sigmas[-1] ** 2)) ** 0.5 - 1)


def order(errors: list[float]) -> float:
    """The power of the step that the error falls with, from the last two."""
    return math.log2(errors[-2] / errors[-1])


def table(title: str, errors: Errors) -> str:
    """Markdown."""
    lines = [
        f"| {title} | calls a step | {' | '.join(f'{n} steps' for n in STEPS)} | order |",
        "|---" * (len(STEPS) + 3) + "|",
    ]
    for name, values in errors.items():
        cells = " | ".join(f"{value:.1e}" for value in values)
        lines.append(f"| {name} | {1 + (name in TWO_CALLS)} | {cells} | {order(values):.1f} |")
    return "\n".join(lines)


def panel(title: str, up: str, errors: Errors) -> Panel:
    """A line for each sampler; those that coincide share one. Two calls a step make it broken."""
    lines: list[Line] = []
    for name, row in errors.items():
        for place, other in enumerate(lines):
            if all(
                math.isclose(a, b, rel_tol=1e-6)
                for a, (_, b) in zip(row, other.points, strict=True)
            ):
                lines[place] = replace(other, name=f"{other.name}, {name}")
                break
        else:
            dashed = name in TWO_CALLS
            note = ", 2 calls a step" if dashed else ""
            lines.append(Line(name + note, list(zip(STEPS, row, strict=True)), dashed=dashed))
    return Panel(title, "steps", up, lines, ticks=STEPS)


if __name__ == "__main__":
    main()
