"""Charts of few measured points: with intervals, over any axis. Colours are the page's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from latentdiff.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Curve,
    Scale,
    frame,
    path,
    picture,
    short,
)

LETTER = 7.0
"""Width of a character below an axis, in pixels, about."""


@dataclass(frozen=True)
class Mark:
    """A measured point, what is told where the mouse rests on it, and the interval of y."""

    x: float
    y: float
    told: str
    low: float | None = None
    high: float | None = None
    label: str = ""
    """Written beside it."""


@dataclass(frozen=True)
class Series:
    """Marks of one colour, with a line through them if they are joined, and a dashed guide.

    A guide without marks has rings at its points.
    """

    name: str
    marks: Sequence[Mark]
    guide: Curve = ()
    joined: bool = True


def plot(
    series: Sequence[Series],
    colours: Sequence[str],
    labels: Mapping[float, str] | None = None,
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """One <svg>; labels: of x where the axis is not to choose its own.

    There must be a mark or a guide. log_x: x > 0, evenly by their factors; log_y: so are y where
    they are positive and span more than a factor of twenty.
    """
    across = _scale(_across(series), LEFT, WIDTH - RIGHT, log_x)
    heights = _heights(series)
    log_y = log_y and 0 < 20 * min(heights) < max(heights)
    up = _scale(heights, HEIGHT - BOTTOM, TOP, log_y)
    if labels is None:
        labels = {value: short(value) for value in across.ticks()}
    parts = frame(across, up, spaced(labels, across))
    for number, one in enumerate(series):
        colour = escape(colours[number % len(colours)])
        line = f'style="stroke:{colour}"'
        if one.guide:
            parts.append(f'<path class="guide" {line} d="{path(one.guide, across, up)}"/>')
        for x, y in () if one.marks else one.guide:
            parts.append(
                f'<circle class="ring" {line} cx="{across(x):.1f}" cy="{up(y):.1f}" r="6"/>'
            )
        places = [(mark.x, mark.y) for mark in one.marks]
        if one.joined and len(places) > 1:
            parts.append(f'<path class="curve" {line} d="{path(places, across, up)}"/>')
        for mark in one.marks:
            x, y = across(mark.x), up(mark.y)
            if mark.low is not None and mark.high is not None:
                ends = f"M{x:.1f} {up(mark.low):.1f}V{up(mark.high):.1f}"
                parts.append(f'<path class="interval" {line} d="{ends}"/>')
            parts.append(
                f'<circle style="fill:{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.2">'
                f"<title>{escape(mark.told)}</title></circle>"
            )
            if mark.label:
                text = escape(mark.label)
                parts.append(f'<text class="beside" x="{x + 5:.1f}" y="{y - 4:.1f}">{text}</text>')
    return picture(parts, ", ".join(one.name for one in series))


def spaced(labels: Mapping[float, str], across: Scale) -> dict[float, str]:
    """Those that do not run into the one before."""
    kept: dict[float, str] = {}
    edge = 0.0
    for value in sorted(labels):
        half = LETTER * len(labels[value]) / 2
        if across(value) - half >= edge:
            kept[value] = labels[value]
            edge = across(value) + half + LETTER
    return kept


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The Pareto front: where no other point has both less of the first and more of the second.

    Numbers of points by their first value, ascending; of equal ones only one.
    """
    order = sorted(range(len(points)), key=lambda number: (points[number][0], -points[number][1]))
    kept: list[int] = []
    for number in order:
        if not kept or points[number][1] > points[kept[-1]][1]:
            kept.append(number)
    return kept


def _heights(series: Sequence[Series]) -> list[float]:
    marks = [(mark.y, mark.low, mark.high) for one in series for mark in one.marks]
    heights = [value for ends in marks for value in ends if value is not None]
    return heights + [y for one in series for _, y in one.guide]


def _across(series: Sequence[Series]) -> list[float]:
    places = [mark.x for one in series for mark in one.marks]
    return places + [x for one in series for x, _ in one.guide]


def _scale(values: Sequence[float], start: float, end: float, logarithmic: bool) -> Scale:
    """Of all values, with a little room at both ends."""
    low, high = min(values), max(values)
    if logarithmic:
        room = (high / low) ** 0.04 if high > low else 2.0
        return Scale(low / room, high * room, start, end, logarithmic=True)
    extra = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low - extra, high + extra, start, end)
