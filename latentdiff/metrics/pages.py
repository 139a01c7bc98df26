"""What people look at of an evaluation: sheets of pictures, and their nearest training pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from latentdiff.metrics.neighbours import nearest
from latentdiff.metrics.protocol import brought
from latentdiff.metrics.references import Reference
from latentdiff.metrics.rows import SHOWN, DrawnRows, picture_file
from latentdiff.metrics.scene_accuracy import Verdict
from latentdiff.model_files import staged_file
from latentdiff.sheet import labelled_sheet

SIDE = 128
"""Of pictures on a sheet, in pixels, about."""


def sheet(
    pictures: Sequence[np.ndarray], prompts: Sequence[str], verdicts: Sequence[Verdict]
) -> Image.Image:
    """Pictures framed green where all is right, else red, with what was found instead."""
    labels, frames = [], []
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        right = verdict.in_place and verdict.background_right
        shown = [*verdict.found, *([] if verdict.extra is None else [verdict.extra])]
        names = ", ".join(item.concept for item in shown)
        labels.append(prompt if right else f"{prompt} [found: {names}; {verdict.background}]")
        frames.append("green" if right else "red")
    images = [Image.fromarray(picture) for picture in pictures]
    return labelled_sheet(images, labels, 8, max(1, SIDE // images[0].width), frames)


def write_sheets(run_dir: Path, drawing: DrawnRows) -> None:
    """run_dir/NAME.png of the first pictures of each group, or pictures.png where there are none.

    Those of scenes are framed by whether they are right.
    """
    prompts = drawing.prompts
    for name, numbers in (prompts.groups or {"pictures": range(len(prompts.texts))}).items():
        shown = numbers[:SHOWN]
        images = [Image.open(picture_file(drawing.folder, number)) for number in shown]
        texts = [prompts.texts[number] for number in shown]
        if prompts.asked is not None:
            shape = (prompts.asked.config.resolution, prompts.asked.config.resolution)
            pictures = [brought(image, shape, drawing.protocol.resize) for image in images]
            scenes = [prompts.asked.scenes[number] for number in shown]
            page = sheet(pictures, texts, drawing.judge.all(pictures, scenes))
        else:
            width, height = images[0].size
            share = min(1.0, SIDE / width)
            shape = (round(width * share), round(height * share))
            small = [Image.fromarray(brought(image, shape, "lanczos")) for image in images]
            page = labelled_sheet(small, texts, 8, max(1, SIDE // shape[0]))
        with staged_file(run_dir / f"{name}.png") as path:
            page.save(path, "PNG")


def write_neighbours(
    run_dir: Path,
    drawing: DrawnRows,
    training: Reference,
    rows: dict[str, np.ndarray],
    training_rows: dict[str, np.ndarray],
) -> None:
    """run_dir/neighbours/NNNNNN.png: the training picture nearest to each picture that is shown.

    By the first of the features.
    """
    name, shown = next(iter(training_rows)), sorted(drawing.shown)
    found = nearest(rows[name][shown], training_rows[name])
    for number, row in zip(shown, found.rows.tolist(), strict=True):
        image = brought(training.image(row), drawing.features.shape, drawing.features.resize)
        with staged_file(picture_file(run_dir / "neighbours", number)) as path:
            Image.fromarray(image).save(path, "PNG")
