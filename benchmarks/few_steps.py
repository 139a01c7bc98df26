"""Few steps against many, on emoji scenes: DDPM's own 1,000 and four samplers with 4 to 50.

    python -m benchmarks.few_steps [--config configs/studies/few_steps.yaml]

Runs inference.report, which goes on where it was killed and makes a page of its own, and prints a
Markdown table of its evaluations: what of 200 pictures is right and in place, with Wilson's 95%
interval, and the Frechet distance by the bundled CLIP's features. The plot is
benchmarks/few_steps.svg.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.panels import Line, Panel, save
from inference.measured import Evaluation, Figure
from inference.report import ReportConfig, report
from latentdiff.config import load_yaml
from latentdiff.errors import run_command
from latentdiff.metrics.bootstrap import share_interval
from latentdiff.metrics.scene_accuracy import KINDS
from latentdiff.model_files import read_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/studies/few_steps.yaml"))
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("few_steps.svg"))
    options = parser.parse_args()
    config = load_yaml(ReportConfig, options.config)
    report(config)
    points = read_json(config.run_dir / "report.json")["points"]
    by_sampler: dict[str, list[Evaluation]] = {}
    for evaluation in map(Evaluation, points):
        by_sampler.setdefault(evaluation.settings["sampler"], []).append(evaluation)
    print(table(by_sampler))
    right_panel = panel("Objects right and in place", "% of pictures", by_sampler, right)
    far_panel = panel("Distance from real pictures", "Fréchet distance", by_sampler, far)
    save(options.plot, right_panel, far_panel)


def right(evaluation: Evaluation) -> Figure:
    """Percent of all pictures, of whatever kind, whose objects are right and in place."""
    shares = [evaluation.figures[f"{kind.name}.objects_in_place"].value for kind in KINDS]
    share, pictures = sum(shares) / len(shares), int(evaluation.results["pictures"])
    ends = share_interval(round(share / 100 * pictures), pictures)
    return Figure(share, 100 * ends.low, 100 * ends.high)


def far(evaluation: Evaluation) -> Figure:
    return evaluation.figures["features.clip.frechet"]


def panel(
    title: str,
    up: str,
    by_sampler: Mapping[str, Sequence[Evaluation]],
    figure: Callable[[Evaluation], Figure],
) -> Panel:
    lines = []
    for name, evaluations in by_sampler.items():
        steps = [each.settings["num_inference_steps"] for each in evaluations]
        values = [figure(each).value for each in evaluations]
        lines.append(Line(name, list(zip(steps, values, strict=True))))
    return Panel(title, "steps", up, lines, log_y=False)


def table(by_sampler: Mapping[str, Sequence[Evaluation]]) -> str:
    """Markdown."""
    lines = ["| sampler | steps | right and in place | Fréchet distance |", "|---" * 4 + "|"]
    for name, evaluations in by_sampler.items():
        for each in evaluations:
            found, steps = right(each), each.settings["num_inference_steps"]
            lines.append(
                f"| {name} | {steps:,} | {found.value:.1f}% ({found.low:.1f} to {found.high:.1f}) "
                f"| {far(each).value:.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
