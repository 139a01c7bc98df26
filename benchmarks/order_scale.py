"""What it costs to know which samples a step takes, from a thousand samples to a billion.

    python -m benchmarks.order_scale [--plot benchmarks/order_scale.svg]

Prints a Markdown table and writes its plot. Three ways:

- one process: one bucket, batches of 64;
- 1,024 processes: 50 buckets of aspect ratios, batches of 8 for each process. What is measured is
  one process's work, the plan of the whole batch and its own share of it; that the 1,024 shares
  make up the batch is checked once for each size;
- for comparison a permutation of all samples laid out in memory, as far as 10^7.

Times are of the processor, medians over batches anywhere in the first three epochs. The first batch
is the one at 7/10 of the epoch, where a run is taken up again: from nothing, the plan is made and
one batch of it. Memory is the peak of what Python and NumPy allocate in doing so.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.generate import machine
from benchmarks.panels import Line, Panel, save
from latentdiff.data.order import Plan, Share

BATCHES = 100
PROCESSES, MICRO_BATCH, BUCKETS = 1024, 8, 50
LARGEST_LAID_OUT = 10**7

Take = Callable[[int], object]
"""One process's part of a step."""


@dataclass(frozen=True)
class Cost:
    samples: int
    batch: float
    """Seconds."""
    first: float
    """Seconds."""
    memory: int
    """Bytes."""


def one_process(samples: int) -> tuple[int, Take]:
    plan, share = Plan(0, [samples], 64), Share()
    return plan.steps_per_epoch, lambda step: share.split(plan.batch(step).samples)


def many_processes(samples: int) -> tuple[int, Take]:
    plan = Plan(0, [samples // BUCKETS] * BUCKETS, PROCESSES * MICRO_BATCH)
    share = Share(PROCESSES // 3, PROCESSES, MICRO_BATCH)
    return plan.steps_per_epoch, lambda step: share.split(plan.batch(step).samples)


def laid_out(samples: int) -> tuple[int, Take]:
    """One epoch's permutation; made anew for each epoch, which its batches are not charged for."""
    order = np.random.default_rng(0).permutation(samples)
    steps = samples // 64
    return steps, lambda step: order[step % steps * 64 :][:64].tolist()


WAYS: dict[str, tuple[Callable[[int], tuple[int, Take]], range]] = {
    "one process": (one_process, range(3, 10)),
    "1,024 processes, 50 buckets": (many_processes, range(6, 10)),
    "permutation in memory": (laid_out, range(3, int(math.log10(LARGEST_LAID_OUT)) + 1)),
}
"""How to begin with a number of samples, and the powers of ten that it is tried for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("order_scale.svg"))
    path = parser.parse_args().plot
    one_process(1000)[1](0)  # what is imported and cached at the first call
    costs = {
        name: [measure(begin, 10**power) for power in powers]
        for name, (begin, powers) in WAYS.items()
    }
    for power in WAYS["1,024 processes, 50 buckets"][1]:
        check_shares(10**power)
    print(machine(), "", table(costs), sep="\n")
    first = {name: [(c.samples, 1e3 * c.first) for c in rows] for name, rows in costs.items()}
    memory = {name: [(c.samples, c.memory / 2**20) for c in rows] for name, rows in costs.items()}
    save(
        path,
        panel("Time to the first batch", "milliseconds", first),
        panel("Memory", "MiB at its peak", memory),
    )


def measure(begin: Callable[[int], tuple[int, Take]], samples: int) -> Cost:
    def first() -> float:
        start = time.process_time()
        steps, take = begin(samples)
        take(7 * steps // 10)
        return time.process_time() - start

    steps, take = begin(samples)
    rng, times = random.Random(0), []
    for _ in range(BATCHES):
        step = rng.randrange(3 * steps)
        start = time.process_time()
        take(step)
        times.append(time.process_time() - start)
    del take
    firsts = [first() for _ in range(9)]
    tracemalloc.start()
    first()
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Cost(samples, statistics.median(times), statistics.median(firsts), memory)


def check_shares(samples: int) -> None:
    """The micro-batches of 1,024 processes together are the batch."""
    plan = Plan(0, [samples // BUCKETS] * BUCKETS, PROCESSES * MICRO_BATCH)
    batch = plan.batch(plan.steps_per_epoch // 2).samples
    joined: list[int] = []
    for rank in range(PROCESSES):
        (micro_batch,) = Share(rank, PROCESSES, MICRO_BATCH).split(batch)
        joined += micro_batch
    assert sorted(joined) == sorted(batch.tolist())
    assert len(set(joined)) == len(batch)


def table(costs: dict[str, list[Cost]]) -> str:
    """Markdown."""
    lines = ["| | samples | ms a batch | ms to the first batch | peak MiB |", "|---" * 5 + "|"]
    for name, rows in costs.items():
        for cost in rows:
            lines.append(
                f"| {name} | 10^{round(math.log10(cost.samples))} | {1e3 * cost.batch:.2f} | "
                f"{1e3 * cost.first:.2f} | {cost.memory / 2**20:.2f} |"
            )
    return "\n".join(lines)


def panel(title: str, up: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> Panel:
    return Panel(title, "samples", up, [Line(name, points) for name, points in lines.items()])


if __name__ == "__main__":
    main()
