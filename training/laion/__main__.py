"""A subset of LAION, step by step:

    python -m training.laion select --config configs/laion/sd15_finetune/laion.yaml
    python -m training.laion download --config ...
    python -m training.laion dedup --config ...
    python -m training.laion card --config ...
    python -m training.laion report --config ...

Each step can be run again at any time: it goes on where it was stopped, or makes the same files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from latentdiff.config import load_config
from latentdiff.errors import InputError, run_command
from training.laion.card import card
from training.laion.config import LaionConfig
from training.laion.dedup import dedup
from training.laion.download import download
from training.laion.report import report
from training.laion.select import select

STEPS: dict[str, Callable[[LaionConfig], object]] = {
    "select": lambda config: select(config.select, config.directory),
    "download": lambda config: download(config.download, config.directory),
    "dedup": lambda config: dedup(config.dedup, config.name, config.directory),
    "card": lambda config: card(config.card, config.name, config.directory),
    "report": lambda config: report(config.directory),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """`STEP --config FILE.yaml` and overrides; of sys.argv by default. Raises InputError."""
    step, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if step in ("-h", "--help"):
        print(__doc__)
        return
    if step not in STEPS:
        raise InputError(f"Name a step before the options: {', '.join(STEPS)}.")
    STEPS[step](load_config(LaionConfig, rest))


if __name__ == "__main__":
    run_command(main)
