"""The gallery in the README: fixed prompts, fixed seeds, nothing picked by hand.

python -m inference.gallery [--model DIRECTORY] [--output gallery.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from latentdiff.errors import run_command
from latentdiff.pipeline import TextToImage
from latentdiff.sheet import labelled_sheet

PROMPTS = (
    "a fox on a blue background",
    "a red apple on a white background",
    "a panda on a pink background",
    "a rocket on a black background",
    "a sunflower on a gray background",
    "a house on a green background",
    "a slice of pizza on a purple background",
    "a penguin on a cyan background",
    "a butterfly on a yellow background",
    "a robot on an orange background",
    "an octopus on a white background",
    "a crown on a red background",
    "a fox to the left of a red apple on a blue background",
    "a rocket above a house on a black background",
    "a snowman to the right of a christmas tree on a cyan background",
    "a ghost below the moon on a purple background",
    "a whale under a cloud on a blue background",
    "a cat on the left and a dog on the right, green background",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the gallery.")
    parser.add_argument("--model", default=None, help="model directory (default: the bundled one)")
    parser.add_argument("--output", type=Path, default=Path("gallery.png"))
    options = parser.parse_args()
    pictures = TextToImage.load(options.model).generate(PROMPTS, seed=0)
    assert isinstance(pictures, list)
    labelled_sheet(pictures, PROMPTS, columns=6, scale=2).save(options.output)
    print(options.output)


if __name__ == "__main__":
    run_command(main)
