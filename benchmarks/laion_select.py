"""How fast metadata is selected, and that memory does not grow with it.

    python -m benchmarks.laion_select [--millions 1 3 10]

Prints a Markdown table. The rows are synthetic, in the schema of LAION-Aesthetics v2, one in ten of
them there twice, in parquet files of a million. Each measurement is a process of its own, from its
start to the finished selection: once with the conditions of Stable Diffusion v1-2, and once with
none, where every row is hashed, laid down and written. Rows/s are by the clock, and by the time of
all processors together, which other programs on the machine do not change. Memory is the peak of
what is resident; that of a process that has only imported the program is given for comparison.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.generate import machine

FILE, GROUP = 1_000_000, 100_000
PRESETS = ("sd12", "none")
CHILD = """
import re, sys, time
from pathlib import Path
start = time.perf_counter()
from training.laion.select import SelectConfig, select
rows = 0
if sys.argv[1:]:
    metadata, preset, directory = sys.argv[1:]
    config = SelectConfig(
        metadata=(metadata,), preset=preset, acknowledge_withdrawn=True
    )
    rows = select(config, Path(directory))["rows"]
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print([rows, time.perf_counter() - start, time.process_time(), peak / 1024])
"""
"""VmHWM, and not ru_maxrss, in which Linux counts the process that started this one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 3, 10])
    millions = parser.parse_args().millions
    print(f"{machine()}; imported, {measure()[3]:.0f} MiB\n")
    print("| rows | conditions | kept | rows/s | rows/s of processor | peak MiB |")
    print("|---" * 6 + "|")
    for count in millions:
        with tempfile.TemporaryDirectory() as folder:
            metadata = Path(folder, "metadata")
            metadata.mkdir()
            for number in range(count):
                write_file(number, metadata / f"part-{number:05d}.parquet")
            for preset in PRESETS:
                kept, *seconds, peak = measure(str(metadata), preset, f"{folder}/{preset}")
                clock, processor = (f"{count * FILE / each:,.0f}" for each in seconds)
                row = f"{count} M | {preset} | {kept:,} | {clock} | {processor} | {peak:.0f}"
                print(f"| {row} |", flush=True)


def measure(*arguments: str) -> tuple[int, float, float, float]:
    """(rows kept, seconds by the clock, seconds of processors, peak of resident MiB)."""
    command = [sys.executable, "-c", CHILD, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    kept, clock, processor, peak = json.loads(done.stdout.splitlines()[-1])
    return kept, clock, processor, peak


def write_file(number: int, path: Path) -> None:
    """A million rows, the last tenth with addresses and captions of the first."""
    rng = np.random.default_rng(number)
    with pq.ParquetWriter(path, table(rng, number * FILE, 1).schema) as writer:
        for group in range(FILE // GROUP):
            first = number * FILE + (0 if group == FILE // GROUP - 1 else group * GROUP)
            writer.write_table(table(rng, first, GROUP))


def table(rng: np.random.Generator, first: int, count: int) -> pa.Table:
    numbers = pc.cast(pa.array(np.arange(first, first + count)), pa.string())
    hosts = pc.cast(pa.array(np.arange(first, first + count) % 49_999), pa.string())
    return pa.table(
        {
            "URL": join(
                "https://images", hosts, ".example.com/wp-content/uploads/", numbers, ".jpg"
            ),
            "TEXT": join("A photograph of number ", numbers, ", oil on canvas, 40 by 60 cm"),
            "WIDTH": rng.integers(200, 2000, count).astype(np.float64),
            "HEIGHT": rng.integers(200, 2000, count).astype(np.float64),
            "similarity": rng.uniform(0.28, 0.45, count),
            "hash": rng.integers(0, 2**62, count),
            "punsafe": rng.random(count, np.float32) ** 3,
            "pwatermark": rng.random(count, np.float32),
            "AESTHETIC_SCORE": rng.normal(5, 0.8, count),
        }
    )


def join(*pieces: object) -> pa.Array:
    return pc.binary_join_element_wise(*pieces, "")


if __name__ == "__main__":
    main()
