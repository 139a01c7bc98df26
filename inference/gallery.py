"""The gallery in the README, with nothing picked by hand: seeds 0 to 31.

python -m inference.gallery [--model DIRECTORY] [--output gallery.png]

The prompts are the first eight of each kind that inference.evaluate asks for: one object and two,
drawn at random, in combinations seen in training and in held-out ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from latentdiff.errors import run_command
from latentdiff.metrics.scene_accuracy import KINDS, prompt_for
from latentdiff.pipeline import TextToImage
from latentdiff.sheet import labelled_sheet

EACH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the gallery.")
    parser.add_argument("--model", default=None, help="model directory (default: the bundled one)")
    parser.add_argument("--output", type=Path, default=Path("gallery.png"))
    options = parser.parse_args()
    model = TextToImage.load(options.model)
    scenes = model.parts.scenes()
    prompts = [prompt_for(scene) for kind in KINDS for scene in kind.scenes(scenes, EACH)]
    pictures = model.generate(prompts, seed=0)
    assert isinstance(pictures, list)
    labelled_sheet(pictures, prompts, columns=EACH, scale=2).save(options.output)
    print(options.output)


if __name__ == "__main__":
    run_command(main)
