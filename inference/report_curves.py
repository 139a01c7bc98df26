"""The curves of a report: figures against settings, one another, and the number of pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from inference.measured import (
    FIRST,
    SETTINGS,
    Evaluation,
    best_of_models,
    better,
    figure_names,
    leaf,
    title,
)
from inference.plots import Mark, Series, front, plot
from latentdiff.charts import short
from latentdiff.page import COLOURS, key, panel

AXES = {"guidance_scale": "guidance", "num_inference_steps": "steps", "sampler": "samplers"}
FRONT = "Pareto front"


def settings_that_vary(
    points: Iterable[Evaluation], among: Sequence[str] = ("model", *SETTINGS)
) -> list[str]:
    """The names of settings that not all have alike; the model's where there are none."""
    settings = [point.settings for point in points]
    return [name for name in among if len({each[name] for each in settings}) > 1] or ["model"]


def against(axis: str, points: Sequence[Evaluation]) -> str:
    """Every figure over one setting, a series for each combination of the others."""
    others = [name for name in ("model", *SETTINGS) if name != axis]
    groups: dict[tuple[Any, ...], list[Evaluation]] = {}
    for point in points:
        groups.setdefault(tuple(point.settings[name] for name in others), []).append(point)
    lines = [group for group in groups.values() if len(group) > 1]
    if not lines:
        return ""
    varied = settings_that_vary([line[0] for line in lines], others)
    colours, names = colours_of(len(lines)), [line[0].told(varied) for line in lines]
    words = axis == "sampler"
    values = list(dict.fromkeys(point.settings[axis] for line in lines for point in line))
    places = {value: float(n if words else value) for n, value in enumerate(values)}
    labels = {place: str(v) if words else f"{v:g}" for v, place in places.items()}
    shown: dict[bool, list[str]] = {True: [], False: []}
    for name in figure_names(points):
        series = [
            Series(told, _marks(line, name, axis, places), joined=not words)
            for told, line in zip(names, lines, strict=True)
        ]
        if better(name) and any(one.marks for one in series):
            drawn = _side_by_side(series) if words else series
            steps, distance = axis == "num_inference_steps", better(name) < 0
            picture = plot(drawn, colours, labels, log_x=steps, log_y=distance)
            shown[leaf(name) in FIRST].append(panel(title(name), "", picture))
    return (
        f"<section><h2>Against {AXES[axis]}</h2>{key(map(escape, names), colours)}"
        f"{side_by_side(shown[True])}{folded('More figures', side_by_side(shown[False]))}</section>"
    )


def _marks(
    line: Sequence[Evaluation], name: str, axis: str, places: dict[Any, float]
) -> list[Mark]:
    marks = []
    for point in line:
        if name in point.figures:
            figure = point.figures[name]
            told = f"{point.told(('model', *SETTINGS))}: {figure}"
            place = places[point.settings[axis]]
            marks.append(Mark(place, figure.value, told, figure.low, figure.high))
    return sorted(marks, key=lambda mark: mark.x)


def _side_by_side(series: Sequence[Series]) -> list[Series]:
    """Marks of different series beside one another, where they would stand on one another."""
    apart, middle = 0.5 / len(series), (len(series) - 1) / 2
    return [
        Series(
            one.name,
            [Mark(m.x + apart * (number - middle), m.y, m.told, m.low, m.high) for m in one.marks],
            joined=False,
        )
        for number, one in enumerate(series)
    ]


def trade(points: Sequence[Evaluation]) -> str:
    """Every Frechet distance against every CLIP score, with the points that none betters."""
    kinds = settings_that_vary(points, ("model", "sampler"))
    apart = ("model", "sampler", "num_inference_steps", "seed")
    groups: dict[str, list[Evaluation]] = {}
    for point in sorted(points, key=lambda point: float(point.settings["guidance_scale"])):
        groups.setdefault(point.told(apart), []).append(point)
    shown = list(dict.fromkeys(point.told(kinds) for point in points))
    palette = dict(zip(shown, colours_of(len(shown)), strict=True)) | {FRONT: "var(--ink)"}
    colours = [*(palette[group[0].told(kinds)] for group in groups.values()), palette[FRONT]]
    panels = []
    names = figure_names(points)
    pairs = [
        (frechet, score)
        for frechet in names
        for score in names
        if (leaf(frechet), leaf(score)) == ("frechet", "clip_score")
    ]
    for frechet, score in pairs:
        both = [point for point in points if {frechet, score} <= point.figures.keys()]
        if len(both) < 2:
            continue
        places = [(p.figures[frechet].value, p.figures[score].value) for p in both]
        guide = [(places[number][1], places[number][0]) for number in front(places)]
        series = [
            Series(told, [_place(p, frechet, score, len(group) > 1) for p in group if p in both])
            for told, group in groups.items()
        ]
        picture = plot([*series, Series(FRONT, (), guide)], colours)
        panels.append(panel(f"{title(frechet)} against {title(score)}", "", picture))
    if not panels:
        return ""
    colour_key = key(map(escape, palette), list(palette.values()))
    return (
        "<section><h2>Likeness to real pictures against likeness to the prompt</h2><p>Joined "
        "points say their guidance. Nothing is better in both than what has a ring.</p>"
        f"{colour_key}{side_by_side(panels, 'large')}</section>"
    )


def _place(point: Evaluation, frechet: str, score: str, labelled: bool) -> Mark:
    y, x = point.figures[frechet], point.figures[score]
    told = f"{point.told(('model', *SETTINGS))}: {title(frechet)} {y}, {title(score)} {x}"
    label = f"{point.settings['guidance_scale']:g}" if labelled else ""
    return Mark(x.value, y.value, told, label=label)


def numbers(points: Sequence[Evaluation]) -> str:
    """The Frechet distance of subsets against 1 / size, of each model's best evaluation."""
    varied, panels = settings_that_vary(points), []
    for name in (name for name in figure_names(points) if leaf(name) == "frechet"):
        feature = name.split(".")[1]
        series, told, labels = [], [], {0.0: "∞"}
        for point in best_of_models(points, name):
            found = point.results["features"][feature]
            if "frechet_points" in found:
                own, value = point.told(varied), found["frechet_at_infinity"]
                marks, guide = line_of(found["frechet_points"], value)
                series.append(Series(own, marks, guide, joined=False))
                told.append(f"{escape(own)}<b>{short(value)} at ∞</b>")
                labels |= {1 / count: str(count) for count, _ in found["frechet_points"]}
        if series:
            colours = colours_of(len(series))
            picture = plot(series, colours, labels)
            panels.append(panel(title(name), key(told, colours), picture))
    if not panels:
        return ""
    return (
        "<section><h2>Against the number of pictures</h2><p>The fewer pictures, the larger the "
        "distance of one model. Dashed: value + slope / N by least squares (Chong and Forsyth "
        f"2020).</p>{side_by_side(panels, 'large')}</section>"
    )


def line_of(
    points: Sequence[Sequence[float]], value: float
) -> tuple[list[Mark], list[tuple[float, float]]]:
    """Marks of [N, distance] over 1 / N, and the two ends of the line value + slope / N.

    A line of least squares passes through the means of both, which give its slope.
    """
    slope = sum(y - value for _, y in points) / sum(1 / n for n, _ in points)
    least = min(n for n, _ in points)
    marks = [Mark(1 / n, y, f"{short(y)} of {n:,} pictures") for n, y in points]
    return marks, [(0.0, value), (1 / least, value + slope / least)]


def side_by_side(panels: Iterable[str], size: str = "") -> str:
    """Charts in rows, if there are any; size: "large" or ""."""
    charts = "".join(panels)
    return f'<div class="charts {size}">{charts}</div>' if charts else ""


def folded(summary: str, body: str) -> str:
    """What is a click away, if there is anything."""
    return f"<details><summary>{summary}</summary>{body}</details>" if body else ""


def colours_of(count: int) -> tuple[str, ...]:
    """The page's, or that many hues."""
    if count <= len(COLOURS):
        return COLOURS[:count]
    return tuple(f"hsl({360 * number // count} 62% 50%)" for number in range(count))
