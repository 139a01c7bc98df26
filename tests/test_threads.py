"""A launcher's one thread is told of, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest

from latentdiff.threads import warn_of_idle_cores

ASK = """
import os
from latentdiff.threads import warn_of_idle_cores
os.sched_getaffinity = lambda pid: range(8)
warn_of_idle_cores("cpu")
"""


def warned(*options: str) -> str:
    """What a process says whom accelerate launched."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    run = subprocess.run(
        [*command, *options, "--no_python", sys.executable, "-c", ASK],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stderr


def test_one_thread_of_many_cores_is_told_of_with_what_to_do() -> None:
    assert "One of 8 cores computes" in (said := warned())
    assert "--num_cpu_threads_per_process 8" in said


def test_told_how_many_there_is_nothing_to_say() -> None:
    assert "cores" not in warned("--num_cpu_threads_per_process", "2")


@pytest.mark.parametrize(
    ("device", "environment"),
    [("cuda", {}), ("cpu", {"WORLD_SIZE": "2"}), ("cpu", {"ACCELERATE_MIXED_PRECISION": None})],
    ids=["on a GPU", "among processes", "not launched"],
)
def test_elsewhere_there_is_nothing_to_say(
    device: str, environment: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    for name, value in ({"ACCELERATE_MIXED_PRECISION": "no"} | environment).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(
            name, value
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_idle_cores(device)
