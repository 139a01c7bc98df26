"""Histograms: counted from any number of values, drawn as SVG files of their own."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from html import escape

import numpy as np

from latentdiff.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, short

MOST_BARS = 32
TAIL = 0.005
"""Share of the values that may lie on either side of the bars, so that a few do not set the scale.
"""
NEAR = 0.05
"""Of the scale: extremes as near as that to it are inside all the same."""
HEADER = 42
"""Pixels above the chart for its title."""

STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#57606a}.title{font-size:14px;fill:#1f2328}"
    ".end{text-anchor:end}.mid{text-anchor:middle}.grid{stroke:#d0d7de;stroke-width:1}"
    ".bar{fill:#0969da}.back{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#9198a1}.title{fill:#f0f6fc}"
    ".grid{stroke:#3d444d}.bar{fill:#4493f8}.back{fill:#0d1117}}"
)


@dataclass(frozen=True)
class Histogram:
    """Counts of values in [edges[i], edges[i + 1]); what lies outside is counted apart."""

    edges: list[float]
    """One more than counts, ascending."""
    counts: list[int]
    below: int
    above: int
    logarithmic: bool = False

    @property
    def total(self) -> int:
        return sum(self.counts) + self.below + self.above


def binned(values: np.ndarray, logarithmic: bool = False) -> Histogram:
    """The histogram of finite values, at least one; of positive ones where it is logarithmic.

    Edges are multiples of 1, 2 or 5 times a power of ten, or of equal ratios: 2 to the power of
    1, 1/2, 1/4 or 1/8. Whole numbers have bars at least 1 wide. All but a hundredth of the values
    are inside. Values are compared with edges in their own precision: 0.7 as float32 is not below
    the edge 0.7.
    """
    low, high = np.quantile(values, [TAIL, 1 - TAIL], method="nearest").tolist()
    near = NEAR * (high - low)
    least, most = values.min().item(), values.max().item()
    low, high = least if least >= low - near else low, most if most <= high + near else high
    edges = _ratios(low, high) if logarithmic else _multiples(low, high, values.dtype.kind == "i")
    exact = values.dtype if values.dtype.kind == "f" else np.float64
    places = np.searchsorted(np.array(edges, dtype=exact), values, side="right")
    counts = np.bincount(places, minlength=len(edges) + 1).tolist()
    return Histogram(edges, counts[1:-1], counts[0], counts[-1], logarithmic)


def _multiples(low: float, high: float, whole: bool) -> list[float]:
    rough = (high - low) / (MOST_BARS - 2) or abs(high) / MOST_BARS or 1.0
    power = math.floor(math.log10(rough))
    factor = next(each for each in (1, 2, 5, 10) if each * 10.0**power >= rough * (1 - 1e-9))
    if whole and factor * 10.0**power < 1:
        factor, power = 1, 0
    step = factor * 10.0**power
    first, last = math.floor(low / step), math.floor(high / step) + 1
    return [round(number * step, max(0, -power)) for number in range(first, last + 1)]


def _ratios(low: float, high: float) -> list[float]:
    octaves = math.log2(high / low)
    parts = next((each for each in (8, 4, 2) if octaves * each <= MOST_BARS - 2), 1)
    first, last = math.floor(math.log2(low) * parts), math.floor(math.log2(high) * parts) + 1
    return [2.0 ** (number / parts) for number in range(first, last + 1)]


def drawing(histogram: Histogram, title: str, unit: str = "") -> str:
    """An SVG file: bars under a title, each with its range and count as a tooltip.

    It is light or dark as its reader's screen is.
    """
    edges, counts = histogram.edges, histogram.counts
    across = Scale(edges[0], edges[-1], LEFT, WIDTH - RIGHT, histogram.logarithmic)
    up = Scale(0, max(*counts, 1) * 1.04, HEIGHT - BOTTOM, TOP)
    parts = [f'<rect class="back" width="{WIDTH}" height="{HEIGHT + HEADER}"/>']
    parts.append(f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>')
    parts.append(f'<text x="{LEFT}" y="36">{escape(_told(histogram, unit))}</text>')
    parts.append(f'<g transform="translate(0 {HEADER})">')
    for value in (mark for mark in up.ticks() if mark == int(mark)):
        y = up(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{short(value)}</text>')
    for (start, end), count in zip(itertools.pairwise(edges), counts, strict=True):
        x, right, y = across(start), across(end), up(count)
        parts.append(
            f'<rect class="bar" x="{x + 0.5:.1f}" y="{y:.1f}" width="{right - x - 1:.1f}" '
            f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{short(start)} to {short(end)}: '
            f"{count:,}</title></rect>"
        )
    for value in across.ticks():
        parts.append(
            f'<text class="mid" x="{across(value):.1f}" y="{HEIGHT - 6}">{short(value)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT + HEADER}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT + HEADER}" role="img" aria-label="{escape(title)}">'
        f"<style>{STYLE}</style>{''.join(parts)}</g></svg>\n"
    )


def _told(histogram: Histogram, unit: str) -> str:
    edges, unit = histogram.edges, f" {unit}" if unit else ""
    told = f"{histogram.total:,} samples"
    for count, side, edge in (
        (histogram.below, "below", edges[0]),
        (histogram.above, "from", edges[-1]),
    ):
        if count:
            told += f"; {count:,} {side} {short(edge)}{unit}" + (" on" if side == "from" else "")
    return told + (f"; in{unit}" if unit else "")
