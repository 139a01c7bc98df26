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
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    panels = (
        panel(followed, 0, "Deterministic samplers", "error of each sample (RMS)"),
        panel(spread, WIDTH // 2, "Stochastic samplers", "error of the standard deviation"),
    )
    path.write_text(svg("".join(panels)), encoding="utf-8")


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


# The plot: two panels side by side, both axes logarithmic.

WIDTH, HEIGHT = 1000, 430
LEFT, TOP, PANEL_WIDTH, PANEL_HEIGHT = 62, 62, 232, 296
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a6428c", "#b8860b", "#444444")


def panel(errors: Errors, shift: int, title: str, axis: str) -> str:
    """One set of axes with a curve for each sampler; those that coincide share one.

    Two calls of the network a step make a broken line.
    """
    values = [value for row in errors.values() for value in row]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def across(steps: float) -> float:
        share = math.log(steps / STEPS[0]) / math.log(STEPS[-1] / STEPS[0])
        return shift + LEFT + PANEL_WIDTH * share

    def down(error: float) -> float:
        return TOP + PANEL_HEIGHT * (high - math.log10(error)) / (high - low)

    right, bottom = across(STEPS[-1]), TOP + PANEL_HEIGHT
    parts = [text(shift + LEFT, TOP - 30, title, "title"), text(shift + LEFT, TOP - 12, axis)]
    for steps in STEPS:
        parts += [line(across(steps), TOP, across(steps), bottom)]
        parts += [text(across(steps), bottom + 18, str(steps), "middle")]
    for power in range(low, high + 1):
        height = down(10.0**power)
        exponent = str(power).replace("-", "−")
        tick = f'10<tspan dy="-5" font-size="9">{exponent}</tspan>'
        parts += [line(across(STEPS[0]), height, right, height)]
        parts += [text(shift + LEFT - 8, height + 4, tick, "end")]
    middle = shift + LEFT + PANEL_WIDTH / 2
    parts += [text(middle, bottom + 40, "steps", "middle")]

    curves = joined(errors)
    heights = apart({label: down(row[-1]) for label, row, _ in curves}, 30)
    for colour, (label, row, calls) in zip(COLOURS, curves, strict=False):
        points = [(across(n), down(value)) for n, value in zip(STEPS, row, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = ' stroke-dasharray="5 3"' if calls == 2 else ""
        parts += [f'<polyline points="{path}" stroke="{colour}"{dashes}/>\n']
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>\n' for x, y in points]
        height, note = heights[label], ", 2 calls a step" if calls == 2 else ""
        parts += [line(right + 4, points[-1][1], right + 14, height, "leader")]
        parts += [text(right + 18, height + 1, label, "name", colour)]
        parts += [text(right + 18, height + 14, f"order {order(row):.1f}{note}", "note")]
    return "".join(parts)


def joined(errors: Errors) -> list[tuple[str, list[float], int]]:
    """(label, errors, calls a step) of each curve."""
    curves: list[tuple[str, list[float], int]] = []
    for name, row in errors.items():
        for place, (label, other, calls) in enumerate(curves):
            if all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(row, other, strict=True)):
                curves[place] = (f"{label}, {name}", other, calls)
                break
        else:
            curves.append((name, row, 1 + (name in TWO_CALLS)))
    return curves


def apart(heights: dict[str, float], gap: float) -> dict[str, float]:
    """The heights moved so that no two labels are nearer than `gap`, about where they were."""
    placed = sorted(heights, key=heights.__getitem__)
    result = dict(heights)
    for _ in range(50):
        for above, below in itertools.pairwise(placed):
            if (missing := gap - (result[below] - result[above])) > 0:
                result[above] -= missing / 2
                result[below] += missing / 2
    return result


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>\n'


def text(x: float, y: float, content: str, kind: str = "", fill: str = "#24292f") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" fill="{fill}">{content}</text>\n'


def svg(content: str) -> str:
    style = """
text { font: 12px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
.title { font-size: 15px; font-weight: 600 }
.middle { text-anchor: middle }
.end { text-anchor: end }
.name { font-weight: 600 }
.note { font-size: 11px; fill: #6e7781 }
.grid { stroke: #e4e7eb; stroke-width: 1 }
.leader { stroke: #afb8c1; stroke-width: 1 }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round }
"""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}">\n<style>{style}</style>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>\n{content}</svg>\n'
    )


if __name__ == "__main__":
    main()
