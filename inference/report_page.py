"""run_dir/index.html of a report: curves, tables and pictures, readable without a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from inference.measured import (
    FIRST,
    Evaluation,
    best,
    best_of_models,
    better,
    figure_names,
    leaf,
    title,
)
from inference.report_curves import (
    AXES,
    against,
    folded,
    numbers,
    settings_that_vary,
    trade,
)
from latentdiff.charts import short
from latentdiff.metrics.rows import picture_file
from latentdiff.page import options, tiles, write_page

Report = Mapping[str, Any]
"""What is in report.json."""


def write_report_page(run_dir: Path, report: Report) -> Path:
    """Write run_dir/index.html of what is in report.json; returns its path.

    The page holds all but the pictures, to which it links where they are.
    """
    points = [Evaluation(values) for values in report["points"]]
    varied = settings_that_vary(points)
    sections = (
        _head(report, points, varied),
        *(against(axis, points) for axis in AXES),
        trade(points),
        numbers(points),
        _table(points, varied),
        _pictures(run_dir, report, points, varied),
        _neighbours(run_dir, report, points, varied),
        options(report["fixed"]),
    )
    page = run_dir / "index.html"
    write_page(page, f"{report['protocol']} {report['id']}", sections, STYLE)
    return page


def _head(report: Report, points: Sequence[Evaluation], varied: Sequence[str]) -> str:
    """The protocol, its id, and the best of the first figures with what it was drawn by."""
    found = []
    for name in figure_names(points):
        if leaf(name) in FIRST:
            point = best(points, name)
            label = f"{escape(title(name))}<br>{escape(point.told(varied))}"
            found.append((label, short(point.figures[name].value)))
    done, planned = len(points), report["planned"]
    state = f"{done} evaluations" if done == planned else f"{done} of {planned} evaluations so far"
    return (
        f"<header><h1>{escape(report['protocol'])}</h1><p>protocol <b>{escape(report['id'])}</b> · "
        f"{state} of {report['pictures']:,} pictures each · the best:</p>{tiles(found)}</header>"
    )


def _table(points: Sequence[Evaluation], varied: Sequence[str]) -> str:
    """All figures with their intervals: a row for each evaluation; the best are bold."""
    names = figure_names(points)
    tables = []
    for shown in (True, False):
        columns = [name for name in names if (leaf(name) in FIRST) == shown]
        head = "".join(f"<th>{escape(title(name))}" for name in columns)
        bests = {n: best(points, n).figures[n].value for n in columns if better(n)}
        rows = [
            f"<tr><th>{escape(point.told(varied))}"
            + "".join(f"<td>{_cell(point, name, bests.get(name))}" for name in columns)
            for point in points
        ]
        tables.append(f'<div class="wide"><table><tr><th>{head}{"".join(rows)}</table></div>')
    return (
        "<section><h2>Figures</h2><p>With 95% intervals: of the same model on other prompts and "
        f"seeds.</p>{tables[0]}{folded('More figures', tables[1])}</section>"
    )


def _cell(point: Evaluation, name: str, first: float | None) -> str:
    figure = point.figures.get(name)
    if figure is None:
        return ""
    value = short(figure.value)
    told = f"<b>{value}</b>" if figure.value == first else value
    if figure.low is None or figure.high is None:
        return told
    return f"{told} <small>{short(figure.low)} to {short(figure.high)}</small>"


def _pictures(
    run_dir: Path, report: Report, points: Sequence[Evaluation], varied: Sequence[str]
) -> str:
    """The first prompts of each kind, a column for each evaluation; seeds are the protocol's."""
    head = "".join(f"<th>{escape(p.told(varied)).replace(', ', '<br>')}" for p in points)
    rows = []
    for prompt in report["prompts"]:
        cells = [_image(run_dir, p.directory, "pictures", prompt["number"]) for p in points]
        if any(cells):
            pictures = "".join(f"<td>{cell}" for cell in cells)
            rows.append(f"<tr><th>{escape(prompt['text'])}{pictures}")
    if not rows:
        return ""
    return (
        "<section><h2>Pictures</h2><p>The first of each kind or category: none is chosen.</p>"
        f'<div class="wide"><table class="pictures"><tr><th>{head}{"".join(rows)}</table></div>'
        "</section>"
    )


def _neighbours(
    run_dir: Path, report: Report, points: Sequence[Evaluation], varied: Sequence[str]
) -> str:
    """Pictures of each model's best evaluation beside the training pictures nearest to them."""
    name = next((name for name in figure_names(points) if leaf(name) == "frechet"), None)
    chosen = points[:1] if name is None else best_of_models(points, name)
    parts = []
    for point in chosen:
        pairs = []
        for prompt in report["prompts"]:
            number = prompt["number"]
            near = _image(run_dir, point.directory, "neighbours", number)
            if near:
                drawn = _image(run_dir, point.directory, "pictures", number)
                text = escape(prompt["text"])
                pairs.append(f"<figure>{drawn}{near}<figcaption>{text}</figcaption></figure>")
        if pairs:
            found = "; ".join(
                f"{title(name)}: {short(figure.value)}"
                for name, figure in point.figures.items()
                if name.startswith("neighbours.")
            )
            parts.append(
                f"<h3>{escape(point.told(varied))}</h3><p>{escape(found)}</p>"
                f'<div class="pairs">{"".join(pairs)}</div>'
            )
    if not parts:
        return ""
    return (
        "<section><h2>Nearest training pictures</h2><p>Left what was drawn, right the training "
        "picture nearest to it in the first of the features. “Nearer to training than real ones” "
        "is 0.5 of a model that draws like the data and 1 of one that copies (Meehan et al. 2020)."
        f"</p>{''.join(parts)}</section>"
    )


def _image(run_dir: Path, directory: str, folder: str, number: int) -> str:
    """A picture that is there, linked to by its path from the page."""
    link = picture_file(Path(directory, folder), number).as_posix()
    if not (run_dir / link).is_file():
        return ""
    return f'<a href="{quote(link)}"><img src="{quote(link)}" alt="{number}" loading="lazy"></a>'


STYLE = """
.charts.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 540px), 1fr)) }
.beside { font-size: 10px }
.guide { fill: none; stroke-width: 1.5; stroke-dasharray: 5 4; opacity: .8 }
.ring { fill: none; stroke-width: 1 }
.interval { stroke-width: 1.5; opacity: .55 }
.key { font-size: 13px; margin: 6px 0 }
header b, td b { color: var(--ink) } td small { color: var(--dim); white-space: nowrap }
.wide { overflow-x: auto } .wide table { margin: 8px 0 }
.wide th, .wide td { white-space: nowrap; padding-bottom: 4px }
.pictures th, .pictures td { white-space: normal; padding-right: 6px; vertical-align: middle }
.pictures tr > th:first-child { width: 190px; min-width: 190px; position: sticky; left: 0;
  background: var(--paper) }
.pictures img, .pairs img { width: 96px; height: 96px; object-fit: contain; display: block;
  border-radius: 4px }
.pairs { display: flex; flex-wrap: wrap; gap: 14px; margin: 10px 0 }
.pairs figure { display: flex; flex-wrap: wrap; gap: 4px; width: 196px }
.pairs figcaption { color: var(--dim); font-size: 12px }
"""
