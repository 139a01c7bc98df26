"""Evaluations and their figures: values, intervals, names, and which way is better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentdiff.charts import short

SETTINGS = ("sampler", "num_inference_steps", "guidance_scale", "seed")
"""What a protocol may leave free."""

FIRST = ("frechet", "clip_score", "objects_in_place")
"""What people look at first."""

WORDS = {"num_inference_steps": "{} steps", "guidance_scale": "guidance {:g}", "seed": "seed {}"}

TITLES = {
    "frechet": "Fréchet distance",
    "frechet_at_infinity": "Fréchet distance at infinite N",
    "kid": "KID",
    "kid_deviation": "KID's deviation between subsets",
    "cmmd": "CMMD",
    "clip_score": "CLIP score",
    "objects_in_place": "% right and in place",
    "objects": "% objects right",
    "background": "% background right",
    "vae_psnr_db": "VAE's PSNR, dB",
    "closer": "nearer to training than real ones",
    "near": "nearer to training than 99% of real ones",
}
LOWER_IS_BETTER = ("frechet", "frechet_at_infinity", "kid", "cmmd")
HIGHER_IS_BETTER = (
    "clip_score",
    "precision",
    "recall",
    "density",
    "coverage",
    "objects_in_place",
    "objects",
    "background",
)


@dataclass(frozen=True)
class Figure:
    """A figure and, where there is one, its interval."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return short(self.value)
        return f"{short(self.value)} ({short(self.low)} to {short(self.high)})"


class Evaluation:
    """What evaluation.json says (`results`), the settings and the model's name, and the figures."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.directory: str = values["directory"]
        self.settings: dict[str, Any] = {"model": values["model"], **values["settings"]}
        self.results: Mapping[str, Any] = values["results"]
        self.figures = dict(figures_of(self.results))

    def told(self, names: Sequence[str]) -> str:
        """The settings of these names: "ddim, 25 steps"."""
        return ", ".join(WORDS.get(name, "{}").format(self.settings[name]) for name in names)


def figures_of(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Figure]]:
    """(dotted name, figure) of all figures of an evaluation, such as features.clip.frechet."""
    intervals = results.get("intervals", {})
    for name, value in results.items():
        if isinstance(value, Mapping) and name not in ("fixed", "intervals"):
            yield from figures_of(value, f"{prefix}{name}.")
        elif isinstance(value, float) and name not in SETTINGS:
            ends = results.get(f"{name}_interval") or intervals.get(name) or (None, None)
            yield f"{prefix}{name}", Figure(value, *ends)


def figure_names(points: Sequence[Evaluation]) -> list[str]:
    """Of all figures that any of them has, FIRST ones first."""
    names = dict.fromkeys(name for point in points for name in point.figures)
    return sorted(names, key=lambda name: (*FIRST, leaf(name)).index(leaf(name)))


def leaf(name: str) -> str:
    """The last of a dotted name."""
    return name.rpartition(".")[2]


def of_group(name: str) -> tuple[str, str]:
    """(the figure's dotted name, the group) where a name ends in FIGURE_by_group.GROUP."""
    figure, cut, group = name.rpartition("_by_group.")
    return (figure, group) if cut else (name, "")


def better(name: str) -> int:
    """-1 where less of a figure is better, 1 where more is, else 0."""
    last = leaf(of_group(name)[0])
    return (last in HIGHER_IS_BETTER) - (last in LOWER_IS_BETTER)


def title(name: str) -> str:
    """A dotted name as people call it: "CLIP score, clip ↑"; the arrow points to what is better.

    FID is the Frechet distance of features that are called inception.
    """
    figure, group = of_group(name)
    *groups, last = figure.split(".")
    words = TITLES.get(last, last.replace("_", " "))
    of = " ".join(g.replace("_", " ") for g in groups if g not in ("features", "neighbours"))
    if of == "inception" and last.startswith("frechet"):
        words, of = words.replace("Fréchet distance", "FID"), ""
    told = ", ".join(filter(None, (words, of, group)))
    return f"{told}{('', ' ↑', ' ↓')[better(name)]}"


def best(points: Sequence[Evaluation], name: str) -> Evaluation:
    """The one with the best figure of a name that has a better way; one of them must have it."""
    having = [point for point in points if name in point.figures]
    return max(having, key=lambda point: better(name) * point.figures[name].value)


def best_of_models(points: Sequence[Evaluation], name: str) -> list[Evaluation]:
    """The best of each model that has such a figure."""
    models: dict[str, list[Evaluation]] = {}
    for point in points:
        if name in point.figures:
            models.setdefault(point.settings["model"], []).append(point)
    return [best(group, name) for group in models.values()]
