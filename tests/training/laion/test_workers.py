"""Processes whose death is noticed, and which notice that of the one that began them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from latentdiff.errors import InputError
from training.laion import workers
from training.laion.workers import in_processes, in_turn

ROOT = Path(__file__).parents[3]


def test_results_that_wait_are_bounded() -> None:
    """They hold pictures: no more are begun than are taken, but `limit`."""
    begun: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        taken = []
        for result in in_turn(pool, lambda number: begun.append(number) or number, range(50), 8):
            taken.append(result)
            assert len(begun) <= len(taken) + 8
    assert sorted(taken) == list(range(50))


def noted(item: tuple[Path, bool]) -> tuple[bool, tuple[Path, bool]]:
    file, well = item
    with file.open("a") as tries:
        tries.write("x")
    return well, item


def test_what_fails_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "START", "fork")
    in_processes(2, noted, [(tmp_path / f"{number}", number % 2 == 0) for number in range(9)])
    tries = [(tmp_path / f"{number}").read_text() for number in range(9)]
    assert tries == ["x", "xx"] * 4 + ["x"]


def test_a_killed_worker_is_an_error_and_no_wait() -> None:
    with pytest.raises(InputError, match="run the step again"):
        in_processes(1, signal.raise_signal, [signal.SIGKILL] * 9)  # type: ignore[arg-type]


RUN = """
from training.laion.workers import in_processes
if __name__ == "__main__":
    work = "import time; print('begun', flush=True); time.sleep(600)"
    in_processes(2, exec, [work, work])
"""


def test_workers_end_with_the_process_that_began_them() -> None:
    """Or they would write beside those of the next run."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == [b"begun\n"] * 2
    process.kill()
    process.communicate(timeout=60)  # ends when nobody has its output open any more
