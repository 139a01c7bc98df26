"""That the steps of a subset may be killed at any moment: the lockfile is what it would have been.

    python -m benchmarks.laion_kill_sweep [--kills 20] [--seed 0]

Makes the small web of benchmarks.corpus, serves it, and runs select, download and dedup once
undisturbed. Then again and again in new directories, each step with SIGKILL at a random moment of
the time that it took, and once more to its end. Every lockfile must have the bytes of the first.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.corpus.make import SERVER, make
from benchmarks.corpus.serve import served
from latentdiff.data.lockfile import LOCKFILE

DRAWINGS = 300
STEPS = ("select", "download", "dedup")


def begin(step: str, corpus: Path, directory: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "training.laion", step]
    command += ["--config", "configs/laion/sprites/laion.yaml", "--directory", str(directory)]
    command += ["--select.metadata", f"{corpus}/metadata/*.parquet"]
    command += [
        "--download.timeout",
        "6",
        "--download.deadline",
        "12",
    ]  # a slow machine is no fault
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(step: str, corpus: Path, directory: Path) -> float:
    """The seconds that a step takes to its end. Ends the benchmark where it fails."""
    start, run = time.monotonic(), begin(step, corpus, directory)
    _, errors = run.communicate()
    if run.returncode:
        raise SystemExit(f"{step} failed: {errors.decode()}")
    return time.monotonic() - start


def killed(step: str, corpus: Path, directory: Path, seconds: float) -> bool:
    """Whether the step was there to be killed after so many seconds."""
    run = begin(step, corpus, directory)
    try:
        run.wait(seconds)
    except subprocess.TimeoutExpired:
        run.kill()
    _, errors = run.communicate()  # what it began may hold its end of the pipe for a moment
    if run.returncode > 0:
        raise SystemExit(f"{step} failed: {errors.decode()}")
    return run.returncode < 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        corpus, whole = root / "corpus", root / "whole"
        make("sprites", corpus, Path(), DRAWINGS, SERVER)
        with served(corpus, SERVER):
            took = {step: finish(step, corpus, whole) for step in STEPS}
        expected = (whole / LOCKFILE).read_bytes()
        kills, others, rounds = 0, 0, 0
        while kills < options.kills:
            directory = root / f"round-{rounds}"
            with served(corpus, SERVER):  # anew: some addresses fail at first
                for step in STEPS:
                    kills += killed(step, corpus, directory, chance.uniform(0, took[step]))
                    finish(step, corpus, directory)
            others += (directory / LOCKFILE).read_bytes() != expected
            rounds += 1
            print(f"{kills} kills in {rounds} runs, other lockfiles {others}", flush=True)
    return int(others > 0)


if __name__ == "__main__":
    sys.exit(main())
