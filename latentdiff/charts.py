"""Curves as inline SVG, whose colours the page's style gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

POINTS = 500
"""As many points as a curve is drawn with; what lies between is averaged."""

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 24

Curve = Sequence[tuple[float, float]]
"""(step, value), steps ascending, values finite."""


@dataclass(frozen=True)
class Point:
    """Neighbouring values of a curve as one."""

    step: float
    mean: float
    low: float
    high: float


def thinned(curve: Curve, points: int = POINTS) -> list[Point]:
    """The curve with at most `points` points, each for equally many values; the last is whole."""
    count = min(points, len(curve))
    edges = [len(curve) * number // count for number in range(count + 1)] if count else [0]
    result = []
    for start, end in itertools.pairwise(edges):
        values = [value for _, value in curve[start:end]]
        mean = math.fsum(values) / len(values)
        result.append(Point(curve[end - 1][0], mean, min(values), max(values)))
    return result


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers, evenly apart, in [low, high]. low < high."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [number * step for number in range(first, last + 1)]


def short(value: float) -> str:
    """Four digits that say the most: 12,000 as 12k, 0.0000153 as 1.53e-05."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or not math.isfinite(value):
        return f"{value:.3g}"
    value = float(f"{value:.4g}")
    for least, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class Scale:
    """Values [low, high] onto [start, end] of the picture, evenly in the value or its logarithm."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        share = (min(max(value, low), high) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            return ticks(self.low, self.high)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            marks = [f * 10.0**p for p in powers for f in factors]
            if len(inside := [mark for mark in marks if self.low <= mark <= self.high]) >= 3:
                return inside
        return ticks(self.low, self.high)


def value_scale(curves: Sequence[Sequence[Point]], from_zero: bool) -> Scale:
    """Logarithmic where values are positive and span more than a factor of twenty.

    The range is that of the means, a little wider; extremes between them may leave it.
    """
    means = [point.mean for curve in curves for point in curve]
    low, high = min(means), max(means)
    start, end = HEIGHT - BOTTOM, TOP
    if low > 0 and high > 20 * low and not from_zero:
        return Scale(low / 1.15, high * 1.15, start, end, logarithmic=True)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    bottom = min(0.0, low) if from_zero else low - room
    return Scale(max(bottom, 0.0) if low >= 0 else bottom, high + room, start, end)


def frame(across: Scale, up: Scale, marks: Mapping[float, str]) -> list[str]:
    """The lines and numbers behind curves: round values of `up`, and `marks` by their labels."""
    parts = []
    for value in up.ticks():
        y = up(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{short(value)}</text>')
    for value, label in marks.items():
        x = across(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        if label:
            text = escape(label)
            parts.append(f'<text class="mid" x="{x:.1f}" y="{HEIGHT - 6}">{text}</text>')
    return parts


def chart(curves: Mapping[str, Curve], colours: Sequence[str], from_zero: bool = False) -> str:
    """One <svg> of curves over steps; each is drawn in its CSS colour.

    A curve alone has the extremes of what was averaged behind it. Curves may not be empty.
    """
    drawn = [thinned(curve) for curve in curves.values()]
    first = min(points[0].step for points in drawn)
    last = max(points[-1].step for points in drawn)
    across = Scale(first, last if last > first else first + 1, LEFT, WIDTH - RIGHT)
    up = value_scale(drawn, from_zero)
    marks = {value: short(value) if value == int(value) else "" for value in across.ticks()}
    parts = frame(across, up, marks)
    for number, (name, points) in enumerate(zip(curves, drawn, strict=True)):
        colour = escape(colours[number % len(colours)])
        if len(drawn) == 1 and len(curves[name]) > POINTS:
            edge = [(point.step, point.high) for point in points]
            edge += [(point.step, point.low) for point in reversed(points)]
            parts.append(
                f'<path class="range" style="fill:{colour}" d="{path(edge, across, up)}Z"/>'
            )
        line = path([(point.step, point.mean) for point in points], across, up)
        end = points[-1]
        told = f"{escape(name)}: {short(end.mean)} at step {end.step:,.0f}"
        parts.append(f'<path class="curve" style="stroke:{colour}" d="{line}"/>')
        parts.append(
            f'<circle style="fill:{colour}" cx="{across(end.step):.1f}" cy="{up(end.mean):.1f}" '
            f'r="2.5"><title>{told}</title></circle>'
        )
    return picture(parts, ", ".join(curves))


def path(points: Curve, across: Scale, up: Scale) -> str:
    """What draws straight lines from point to point."""
    return "M" + "L".join(f"{across(step):.1f} {up(value):.1f}" for step, value in points)


def picture(parts: Sequence[str], told: str) -> str:
    """One <svg> of its parts; `told` is what it says to those who cannot see it."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(told)}">'
        f"{''.join(parts)}</svg>"
    )
