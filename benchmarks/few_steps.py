"""Few steps against many, on emoji scenes: DDPM's own 1,000 and four samplers with 4 to 50.

    python -m benchmarks.few_steps [--config configs/studies/report.yaml]

Runs inference.report, which goes on where it was killed and makes a page of its own, and prints a
Markdown table of its evaluations: what of 200 pictures is right and in place, with Wilson's 95%
interval, and the Frechet distance by the bundled CLIP's features with a bootstrap's. The plot is
benchmarks/few_steps.svg; its bands are the intervals.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.estimates import Estimate, frechet, right
from benchmarks.panels import Line, Panel, save
from latentdiff.config import read_yaml
from latentdiff.model_files import read_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/studies/report.yaml"))
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("few_steps.svg"))
    options = parser.parse_args()
    command = [sys.executable, "-m", "inference.report", "--config", str(options.config)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    run_dir = Path(read_yaml(options.config)["run_dir"])
    by_sampler: dict[str, list[Evaluation]] = {}
    points = read_json(run_dir / "report.json")["points"]
    for point in points:
        by_sampler.setdefault(point["settings"]["sampler"], []).append(Evaluation.of(point))
    print(f"protocol {points[0]['results']['id']}", "", table(by_sampler), sep="\n")
    save(
        options.plot,
        panel("Objects right and in place", "% of pictures", by_sampler, lambda each: each.right),
        panel("Distance from real pictures", "Fréchet distance", by_sampler, lambda each: each.far),
    )


@dataclass(frozen=True)
class Evaluation:
    """What one sampler does with so many steps."""

    steps: int
    right: Estimate
    """Percent of all pictures, of whatever kind, whose objects are right and in place."""
    far: Estimate
    """Frechet distance."""

    @classmethod
    def of(cls, point: Mapping[str, Any]) -> Evaluation:
        """From report.json."""
        results, settings = point["results"], point["settings"]
        placed = right(results, "objects_in_place")
        return cls(settings["num_inference_steps"], placed, frechet(results))


def panel(
    title: str,
    up: str,
    by_sampler: Mapping[str, Sequence[Evaluation]],
    estimate: Callable[[Evaluation], Estimate],
) -> Panel:
    lines = []
    for name, evaluations in by_sampler.items():
        estimates = [estimate(each) for each in evaluations]
        points = [(e.steps, f.value) for e, f in zip(evaluations, estimates, strict=True)]
        lines.append(Line(name, points, [(each.low, each.high) for each in estimates]))
    return Panel(title, "steps", up, lines, log_y=False)


def table(by_sampler: Mapping[str, Sequence[Evaluation]]) -> str:
    """Markdown."""
    lines = ["| sampler | steps | right and in place, % | Fréchet distance |", "|---" * 4 + "|"]
    for name, evaluations in by_sampler.items():
        for each in evaluations:
            lines.append(f"| {name} | {each.steps:,} | {each.right} | {each.far} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
