"""Plots of what benchmarks measured: panels side by side, in one SVG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cycler import cycler
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.estimates import Estimate

STYLE = {
    "svg.fonttype": "none",  # text as text
    "svg.hashsalt": "latentdiff",  # the same plot is the same file
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "legend.frameon": False,
    "axes.prop_cycle": cycler(
        color=["#0072b2", "#d55e00", "#009e73", "#a6428c", "#b8860b", "#444444"]
    ),
}


@dataclass(frozen=True)
class Line:
    """Measured points (x, y) and the straight lines between them."""

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()
    """(low, high) of each point's y."""
    dashed: bool = False
    marked: bool = True


@dataclass(frozen=True)
class Panel:
    """One set of axes, x evenly by its factors, and y where log_y."""

    title: str
    across: str
    up: str
    lines: Sequence[Line]
    log_y: bool = True
    ticks: Sequence[float] = ()
    """Of x, where they are not chosen."""

    def draw(self, axes: Axes) -> None:
        for line in self.lines:
            x, y = zip(*line.points, strict=True)
            stroke = ("--" if line.dashed else "-") + ("o" if line.marked else "")
            (drawn,) = axes.plot(x, y, stroke, label=line.name, markersize=4)
            if line.intervals:
                low, high = zip(*line.intervals, strict=True)
                axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
        axes.set(xlabel=self.across, ylabel=self.up)
        axes.set(xscale="log", yscale="log" if self.log_y else "linear")
        if self.ticks:
            axes.set_xticks(self.ticks)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.legend(fontsize="small")


@dataclass(frozen=True)
class Dots:
    """One set of axes: a named row for each of the figures, with its interval."""

    title: str
    across: str
    rows: Mapping[str, Estimate]

    def draw(self, axes: Axes) -> None:
        for row, each in enumerate(self.rows.values()):
            ends = [[each.value - each.low], [each.high - each.value]]
            axes.errorbar(each.value, row, xerr=ends, fmt="o", capsize=3)
        axes.set(xlabel=self.across, ylim=(len(self.rows) - 0.5, -0.5))
        axes.set_yticks(range(len(self.rows)), list(self.rows))


def save(path: Path, *panels: Panel | Dots, height: float = 3.8) -> None:
    """Write the panels, side by side, as SVG; y of Dots is the first one's. height: inches."""
    rows = all(isinstance(panel, Dots) for panel in panels)
    with style.context(STYLE):
        figure = Figure(figsize=(4.8 * len(panels), height), layout="constrained")
        drawn = figure.subplots(1, len(panels), squeeze=False, sharey=rows)[0]
        for axes, panel in zip(drawn, panels, strict=True):
            panel.draw(axes)
            axes.set_title(panel.title, loc="left", fontsize="large", fontweight="bold")
        figure.savefig(path, format="svg", metadata={"Date": None})
