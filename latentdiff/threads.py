"""Processor cores that a launcher leaves idle."""

from __future__ import annotations

import os
import warnings

import torch


def warn_of_idle_cores(device: str) -> None:
    """Warn where accelerate's launcher gave the only process one of several cores to compute with.

    It does so unless --num_cpu_threads_per_process or OMP_NUM_THREADS tells it a number.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if device == "cpu" and launched and alone and torch.get_num_threads() == 1 < cores:
        warnings.warn(
            f"One of {cores} cores computes: accelerate launch gives a process one thread where "
            f"it is told no other number. Give it --num_cpu_threads_per_process {cores}.",
            stacklevel=2,
        )
