"""The fine-tunes of configs/laion at their true sizes: three steps each, with random weights.

    python -m benchmarks.laion_configs sd15_finetune
    python -m benchmarks.laion_configs sdxl_finetune --resolution 512 --lora "{rank: 16}"

Makes a model of the family, every network as large as the published ones, caches four pictures and
trains on two of them at a time, by the configuration's own cache_latents.yaml and diffusion.yaml,
until three steps are logged; then it is killed. Further options go to training.diffusion in the
place of the configuration's. Prints JSON: losses, the seconds a step but the first, and the peak
memory of training.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from benchmarks.generate import machine
from latentdiff.checkpoint import ModelParts, save_model
from latentdiff.errors import run_command
from latentdiff.families import PIPELINES, family_configs, family_index
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.text_encoder import TextEncoder, TextEncoders
from latentdiff.networks import build_tower, build_unet, build_vae
from latentdiff.scheduler_config import SchedulerConfig
from latentdiff.tokenizer_files import clip_tokenizer

ROOT = Path("configs/laion")
Predicted = Literal["epsilon", "v_prediction"]
FAMILIES: dict[str, tuple[str, Predicted, int]] = {
    "sd15_finetune": ("sd1", "epsilon", 512),
    "sd15_lora": ("sd1", "epsilon", 512),
    "sd21_finetune": ("sd2", "v_prediction", 768),
    "sdxl_finetune": ("sdxl", "epsilon", 1024),
}
"""Family, what it predicts, and the pixels of a side."""
PICTURES, BATCH, STEPS = 4, 2, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=FAMILIES)
    parser.add_argument("--resolution", type=int, help="pixels, in place of the family's own")
    parser.add_argument("--folder", type=Path, help="for models and runs; a temporary one")
    options, overrides = parser.parse_known_args()
    family, predicted, pixels = FAMILIES[options.name]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        run([sys.executable, "-c", BUILD.format(family, predicted, str(folder / "model"))])
        pictures(folder / "pictures", options.resolution or pixels)
        cache = {
            "run_dir": folder / "latents",
            "source": f"{{type: folder, path: {folder / 'pictures'}}}",
            "sizes.resolution": options.resolution or pixels,
            "model": folder / "model",
            "mixed_precision": "no",
            "workers": 0,
        }
        run(command(options.name, "cache_latents", cache))
        train = {
            "run_dir": folder / "run",
            "init_from": folder / "model",
            "cache": folder / "latents",
            "batch_size": BATCH,
            "micro_batch_size": 1,
            "log_every": 1,
            "optimizer.warmup_steps": 0,
        }
        steps = logged(command(options.name, "diffusion", train) + overrides, folder / "run")
    results: dict[str, Any] = {"machine": machine()}
    results["losses"] = [step["loss"] for step in steps]
    rates = [step["images_per_second"] for step in steps if "images_per_second" in step]
    results["seconds_a_step"] = [round(BATCH / rate, 1) for rate in rates]
    results["peak_memory_gib"] = max(step.get("peak_memory_gib", 0.0) for step in steps)
    print(json.dumps(results, indent=2))


BUILD = "from benchmarks.laion_configs import build; build({!r}, {!r}, {!r})"


def build(family: str, predicted: Predicted, directory: str) -> None:
    """A model directory, in fp16."""
    torch.manual_seed(0)
    configs, index = family_configs(family, predicted), family_index(family)
    towers = [
        TextEncoder(
            clip_tokenizer(**configs[name.replace("text_encoder", "tokenizer")]),
            build_tower(value[1])(configs[name]),
        )
        for name, value in index.items()
        if name.startswith("text_encoder")
    ]
    parts = ModelParts(
        build_unet(configs["unet"]),
        Autoencoder(build_vae(configs["vae"])),
        TextEncoders(towers) if len(towers) > 1 else towers[0],
        SchedulerConfig(prediction_type=predicted),
        pipeline=PIPELINES[family],
        force_zeros_for_empty_prompt=index["force_zeros_for_empty_prompt"],
    )
    save_model(parts, Path(directory), torch.float16)


def pictures(folder: Path, side: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        noise = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}")


def command(name: str, program: str, options: dict[str, Any]) -> list[str]:
    words = [sys.executable, "-m", f"training.{program}"]
    words += ["--config", str(ROOT / name / f"{program}.yaml")]
    for option, value in options.items():
        words += [f"--{option}", str(value)]
    return words


def run(words: list[str]) -> None:
    """Ends where the program fails. What it prints is no part of the results."""
    if subprocess.run(words, stdout=sys.stderr).returncode:
        raise SystemExit(f"{' '.join(words[1:3])} failed")


def logged(words: list[str], run_dir: Path) -> list[dict[str, Any]]:
    """What a run logs of its first steps, after which it is killed."""
    log = run_dir / "metrics.jsonl"
    with subprocess.Popen(words, stdout=sys.stderr) as process:
        while process.poll() is None:
            lines = log.read_text().splitlines() if log.exists() else []
            steps = [step for step in map(json.loads, lines) if "loss" in step]
            if len(steps) >= STEPS:
                process.kill()
                return steps
            time.sleep(0.5)
    raise SystemExit(f"{' '.join(words[1:3])} failed")


if __name__ == "__main__":
    run_command(main)
