"""Programs on several processes, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(
    module: str, arguments: Sequence[str], processes: int = 2, **environment: str
) -> subprocess.Popen[str]:
    """`module` by accelerate, on CPUs, a thread for each process, and nobody says that it is so."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    command += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    own = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    own |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "-m", module, *arguments],
        cwd=ROOT,
        env=own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed_by(run: subprocess.Popen[str]) -> str:
    """What it prints, once all of its processes have ended well."""
    with run:
        try:
            printed, errors = run.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            run.terminate()  # the launcher ends its processes
            raise
    assert run.returncode == 0, errors[-4000:]
    return printed
