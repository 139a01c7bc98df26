"""How fast pictures go through pipeline and metrics, and that memory does not grow with them.

    python -m benchmarks.evaluation_scale [--pictures 10000] [--model DIRECTORY]

Runs the protocol of emoji scenes on so many prompts in one process, from nothing, and prints a
Markdown table: a row for each tenth of the pictures, one for the real pictures before them and one
for the figures after. Memory is what is resident, looked at once a second. Plots the Frechet
distance against the number of pictures that it is taken of (benchmarks/evaluation_scale.svg), and
the line through it that ends at infinitely many (Chong and Forsyth 2020).
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks.generate import machine
from benchmarks.panels import Line, Panel, save
from latentdiff.config import load_yaml, parse
from latentdiff.metrics.evaluation import evaluate_protocol
from latentdiff.metrics.feature_files import PIECE
from latentdiff.metrics.protocol import Protocol
from latentdiff.metrics.scene_accuracy import KINDS
from latentdiff.pipeline import TextToImage

PROTOCOL = Path("configs/protocols/emoji_scenes.yaml")
PARTS = 10
LEAST = 1000
REFERENCE = 200
"""Of a kind; of some kinds hardly more are left where the prompts ask for thousands."""


@dataclass(frozen=True)
class Look:
    """What was there at a moment."""

    seconds: float
    pictures: int
    """Drawn and measured by then."""
    memory: float
    """MiB."""


class Watch(threading.Thread):
    """Looks once a second, as long as it is let."""

    def __init__(self, run_dir: Path, count: int) -> None:
        super().__init__(daemon=True)
        self.drawn, self.count, self.done = run_dir / "drawn", count, threading.Event()
        self.process, self.looks = psutil.Process(), list[Look]()

    def run(self) -> None:
        while not self.done.wait(1):
            pieces = sum(1 for _ in self.drawn.glob("pieces-*/*.safetensors"))
            memory = self.process.memory_info().rss / 2**20
            self.looks.append(Look(time.perf_counter(), min(PIECE * pieces, self.count), memory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--model", default="emoji", help="model directory or the bundled one")
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_suffix(".svg"))
    options = parser.parse_args()
    if options.pictures < LEAST:
        parser.error(f"--pictures must be at least {LEAST}, for the distance at infinitely many")
    count = options.pictures // len(KINDS)
    values = load_yaml(Protocol, PROTOCOL).model_dump() | {"count": count}
    values["reference"]["count"] = REFERENCE
    protocol = parse(Protocol, values, "--pictures")
    model = TextToImage.load(options.model)
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder), count * len(KINDS))
        watch.start()
        results = evaluate_protocol(model, protocol, Path(folder))
        watch.done.set()
        watch.join()
    print(machine(), "", table(watch.looks, count * len(KINDS)), sep="\n")
    assert results is not None
    clip = results["features"]["clip"]
    numbers, distances = zip(*clip["frechet_points"], strict=True)
    at_infinity = clip["frechet_at_infinity"]
    print(f"\nFréchet distance {clip['frechet']:.2f}, at infinitely many {at_infinity:.2f}")
    for kind in KINDS:
        found = results[kind.name]
        low, high = found["intervals"]["objects_in_place"]
        print(
            f"{kind.name}: right and in place {found['objects_in_place']}% ({low} to {high}), "
            f"background {found['background']}%"
        )
    save(options.plot, panel(numbers, distances))


def panel(numbers: Sequence[int], distances: Sequence[float]) -> Panel:
    """FID_N against N, and the least squares line through it, which is straight in 1/N."""
    slope, at_infinity = np.polyfit([1 / number for number in numbers], distances, 1)
    fitted = [(number, at_infinity + slope / number) for number in numbers]
    line = Line("straight in 1/N, by least squares", fitted, dashed=True, marked=False)
    measured = Line("measured", list(zip(numbers, distances, strict=True)))
    title = "The bias of the Fréchet distance"
    return Panel(title, "pictures N", "distance", [measured, line], log_y=False)


def table(looks: list[Look], count: int) -> str:
    """Markdown, from what was seen of `count` pictures."""
    first = next(number for number, look in enumerate(looks) if look.pictures)
    last = max(number for number, look in enumerate(looks) if look.pictures)
    lines = ["| | seconds | pictures/s | most MiB |", "|---|---|---|---|"]
    lines.append(row("real pictures", looks[: first + 1], 0))
    drawing, edge = looks[first : last + 1], 0
    for part in range(1, PARTS + 1):
        upto = next(
            (n for n, look in enumerate(drawing) if look.pictures >= count * part / PARTS),
            len(drawing) - 1,
        )
        seen = drawing[edge : upto + 1]
        lines.append(row(f"to {seen[-1].pictures:,}", seen, seen[-1].pictures - seen[0].pictures))
        edge = upto
    lines.append(row("figures", looks[last:], 0))
    return "\n".join(lines)


def row(name: str, looks: list[Look], pictures: int) -> str:
    seconds = looks[-1].seconds - looks[0].seconds
    speed = f"{pictures / seconds:.1f}" if pictures else ""
    return f"| {name} | {seconds:.0f} | {speed} | {max(look.memory for look in looks):.0f} |"


if __name__ == "__main__":
    main()
