"""What training.check finds out about a run, and what it looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from torch import Tensor

from latentdiff.data.order import Share
from training.config import RunConfig
from training.loop import Run


@dataclass(frozen=True)
class Finding:
    """One sentence about a run."""

    level: Literal["ok", "warning", "FAIL"]
    sentence: str

    def __str__(self) -> str:
        return f"{self.level:>7}  {self.sentence}"


def judged(bad: bool, sentence: str, level: Literal["warning", "FAIL"] = "FAIL") -> Finding:
    return Finding(level if bad else "ok", sentence)


class Context:
    """A run as it would start, in a directory of its own.

    config: what it is configured by, its own run_dir included.
    """

    def __init__(
        self, config: RunConfig, program: Any, accelerator: Accelerator, scratch: Path
    ) -> None:
        self.config, self.program, self.accelerator = config, program, accelerator
        self.share = Share(
            accelerator.process_index, accelerator.num_processes, config.micro_batch_size
        )
        self.scratch = scratch
        self.run: Run | None = None
        """After check_step, if its steps went well."""
        self.averages: dict[str, Tensor] = {}
        """The EMA's before them."""

    def apart(self) -> RunConfig:
        """The same configuration, in the scratch directory and told to nobody."""
        return self.config.model_copy(update={"run_dir": self.scratch, "trackers": ()})


Check = Callable[[Context], Iterator[Finding]]
