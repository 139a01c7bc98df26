"""A run as training.check looks at it, made of what a test names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from latentdiff.data.order import Share
from training.config import RunConfig


def context(config: RunConfig, **program: Any) -> Any:
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, gather=lambda values: values
    )
    return SimpleNamespace(
        config=config,
        program=SimpleNamespace(config=config, **program),
        accelerator=accelerator,
        share=Share(0, 1, None),
    )


def run_config(**values: Any) -> Any:
    values = {"max_steps": 100, "batch_size": 4, "seed": 0} | values
    return SimpleNamespace(**values)
