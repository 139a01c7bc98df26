"""Figures of several evaluations side by side, if they compare.

python -m inference.compare runs/first/evaluate runs/second/evaluate ...

Prints a Markdown table with a column for each evaluation. Evaluations whose protocols have
different ids are refused, with the first thing in which they differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inference.measured import SETTINGS, figures_of
from latentdiff.errors import InputError, run_command
from latentdiff.metrics.protocol import refuse_unlike
from latentdiff.model_files import read_json


def read_evaluation(run_dir: Path) -> dict[str, Any]:
    """What is in evaluation.json. Raises InputError where it is not there or has no id."""
    if not (run_dir / "evaluation.json").is_file():
        raise InputError(f"There is no evaluation.json in {run_dir}; run inference.evaluate first.")
    results = read_json(run_dir / "evaluation.json")
    if not {"id", "fixed", "model"} <= results.keys():
        raise InputError(
            f"{run_dir / 'evaluation.json'} has no protocol's id; run inference.evaluate again."
        )
    return results


def table(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: a row for each figure, a column for each evaluation.

    Raises InputError unless all have one protocol's id.
    """
    first = evaluations[0]
    for other in evaluations[1:]:
        refuse_unlike(first, other)
    rows = [[f"{first['protocol']} {first['id']}", *(str(e["model"]) for e in evaluations)]]
    rows.append(["---"] * len(rows[0]))
    for name in SETTINGS:
        rows.append([name, *(str(e[name]) for e in evaluations)])
    columns = [{name: str(figure) for name, figure in figures_of(e)} for e in evaluations]
    for name in dict.fromkeys(name for column in columns for name in column):
        rows.append([name, *(column.get(name, "") for column in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    options = parser.parse_args()
    print(table([read_evaluation(run_dir) for run_dir in options.run_dirs]))


if __name__ == "__main__":
    run_command(main)
