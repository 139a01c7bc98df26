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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.convergence import (
    COLOURS,
    LEFT,
    PANEL_HEIGHT,
    PANEL_WIDTH,
    TOP,
    WIDTH,
    apart,
    line,
    svg,
    text,
)
from benchmarks.generate import machine
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
    panels = (
        panel(costs, 0, "Time to the first batch", "milliseconds", lambda cost: 1e3 * cost.first),
        panel(costs, WIDTH // 2, "Memory", "MiB at its peak", lambda cost: cost.memory / 2**20),
    )
    path.write_text(svg("".join(panels)), encoding="utf-8")


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


def panel(
    costs: dict[str, list[Cost]],
    shift: int,
    title: str,
    axis: str,
    value: Callable[[Cost], float],
) -> str:
    """One set of axes, both logarithmic, with a curve for each way."""
    values = [value(cost) for rows in costs.values() for cost in rows]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    powers = range(3, 10)

    def across(samples: float) -> float:
        share = (math.log10(samples) - powers[0]) / (powers[-1] - powers[0])
        return shift + LEFT + PANEL_WIDTH * share

    def down(figure: float) -> float:
        return TOP + PANEL_HEIGHT * (high - math.log10(figure)) / (high - low)

    right, bottom = across(10.0 ** powers[-1]), TOP + PANEL_HEIGHT
    parts = [text(shift + LEFT, TOP - 30, title, "title"), text(shift + LEFT, TOP - 12, axis)]
    for power in powers:
        x = across(10.0**power)
        parts += [line(x, TOP, x, bottom), text(x, bottom + 18, raised(power), "middle")]
    for power in range(low, high + 1):
        height = down(10.0**power)
        parts += [line(across(10.0 ** powers[0]), height, right, height)]
        parts += [text(shift + LEFT - 8, height + 4, raised(power), "end")]
    parts += [text(shift + LEFT + PANEL_WIDTH / 2, bottom + 40, "samples", "middle")]

    heights = apart({name: down(value(rows[-1])) for name, rows in costs.items()}, 30)
    for colour, (name, rows) in zip(COLOURS, costs.items(), strict=False):
        points = [(across(cost.samples), down(value(cost))) for cost in rows]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts += [f'<polyline points="{path}" stroke="{colour}"/>\n']
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>\n' for x, y in points]
        end, height = points[-1], heights[name]
        parts += [line(end[0] + 4, end[1], right + 14, height, "leader")]
        words, _, note = name.partition(", ")
        parts += [text(right + 18, height + (1 if note else 4), words, "name", colour)]
        parts += [text(right + 18, height + 14, note, "note")] if note else []
    return "".join(parts)


def raised(power: int) -> str:
    """Ten to a power, in SVG."""
    exponent = str(power).replace("-", "−")
    return f'10<tspan dy="-5" font-size="9">{exponent}</tspan>'


if __name__ == "__main__":
    main()
