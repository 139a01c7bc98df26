"""Processor cores that a launcher leaves idle."""

from __future__ import annotations

import os
import warnings

import torch


def warn_of_idle_cores(device: str) -> None:
    """Warn where accelerate's launcher gave the only process one of several cores to compute with.

    It sets OMP_NUM_THREADS to 1 unless it is told a number; on a CPU that costs all other cores.
    """
    cores = os.cpu_count() or 1
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if device == "cpu" and launched and alone and torch.get_num_threads() == 1 < cores:
        warnings.warn(
            f"One of {cores} cores computes: accelerate launch gives a process one thread. Give "
            f"it --num_cpu_threads_per_process {cores}, or set OMP_NUM_THREADS={cores}.",
            stacklevel=2,
        )
