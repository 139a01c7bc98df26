"""How long it takes from a prompt to a picture, cold and warm, and beside diffusers.

    python -m benchmarks.generate [--model DIRECTORY] [--repeats 5]

Prints one JSON object of medians in seconds. Cold times are whole processes. The last two lines
run the same weights, prompt, steps and guidance through latentdiff and through
diffusers.StableDiffusionPipeline, one after the other in turns, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = "a fox to the left of a red apple on a blue background"
SETTINGS: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 3.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="emoji", help="model directory or the bundled one")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    results = {"machine": machine(), "model": arguments.model, **SETTINGS}
    results |= cold(arguments.model, arguments.repeats)
    results |= warm(arguments.model, arguments.repeats)
    print(json.dumps(results, indent=2))


def machine() -> str:
    """The processor, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"


def cold(model: str, repeats: int) -> dict[str, float]:
    """Seconds of whole processes: importing the package, and the console command."""
    with tempfile.TemporaryDirectory() as directory:
        picture = str(Path(directory, "out.png"))
        command = [sys.executable, "-m", "latentdiff.cli", "generate", PROMPT, "--model", model]
        command += ["--seed", "7", "--output", picture]
        command += ["--steps", str(SETTINGS["num_inference_steps"])]
        command += ["--guidance-scale", str(SETTINGS["guidance_scale"])]
        return {
            "python_start": median(lambda: run([sys.executable, "-c", ""]), repeats),
            "import_latentdiff": median(
                lambda: run([sys.executable, "-c", "import latentdiff"]), repeats
            ),
            "help": median(lambda: run([*command[:3], "--help"]), repeats),
            "generate_cold": median(lambda: run(command), repeats),
        }


def warm(model: str, repeats: int) -> dict[str, float]:
    """Seconds a picture in one process, ours and diffusers' in turns."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from latentdiff import TextToImage
    from latentdiff.hub import model_path

    started = time.perf_counter()
    ours = TextToImage.load(model)
    loaded = time.perf_counter() - started
    theirs = StableDiffusionPipeline.from_pretrained(model_path(model), dtype=torch.float32)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)

    def our_picture() -> None:
        ours.generate(PROMPT, seed=7, sampler="ddim", **SETTINGS)

    def their_picture() -> None:
        theirs(PROMPT, generator=torch.Generator().manual_seed(7), **SETTINGS)

    our_picture()
    their_picture()
    pairs = [(seconds(our_picture), seconds(their_picture)) for _ in range(repeats)]
    return {
        "load": round(loaded, 3),
        "threads": torch.get_num_threads(),
        "generate_warm": round(statistics.median(a for a, _ in pairs), 3),
        "diffusers_warm": round(statistics.median(b for _, b in pairs), 3),
        "diffusers_over_ours": round(statistics.median(b / a for a, b in pairs), 3),
    }


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def median(work: Callable[[], None], repeats: int) -> float:
    return round(statistics.median(seconds(work) for _ in range(repeats)), 3)


if __name__ == "__main__":
    main()
