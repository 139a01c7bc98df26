"""How well a CLIP finds the caption that a picture was drawn from, among those of other pictures.

python -m inference.retrieval --config configs/laion/openclipart/retrieval.yaml

Each of several models draws N held-out captions with the same seeds. A picture is right where its
own caption is the nearest to it of the N (top-1), or among the five nearest (top-5). The captions'
real pictures, judged in the same way, say what the CLIP can tell apart at best.
Prints one line of JSON, and writes it, a sheet of each model and one of all side by side.
"""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from latentdiff.config import load_config
from latentdiff.data.held_out import first_pairs
from latentdiff.data.images import SourceConfig, open_source
from latentdiff.drawing import DrawingConfig, drawn
from latentdiff.errors import run_command
from latentdiff.metrics.arrays import unit
from latentdiff.metrics.clip_features import ClipConfig, ClipExtractor
from latentdiff.model_files import staged_file, write_json
from latentdiff.pipeline import TextToImage
from latentdiff.sheet import labelled_sheet
from latentdiff.vocabulary import UnknownWordWarning

SHOWN = 48
BATCH = 64
"""Pictures, or captions, that the CLIP sees at a time."""


class RetrievalConfig(DrawingConfig):
    """A run of inference.retrieval; every model draws caption i with seed + i."""

    run_dir: Path
    """retrieval.json and the sheets go here."""
    models: dict[str, str] = Field(min_length=1)
    """What to draw with, by names of your own: directories, names on the hub, "emoji"."""
    clip: Path
    """Directory with clip/ and tokenizer/, written by training.clip."""
    source: SourceConfig
    """Pictures and captions that neither the models nor the CLIP learned from."""
    captions: int = Field(default=100, gt=1)
    """N: of the first pictures with captions that differ."""
    device: str = "cpu"
    """Where the models run: "cpu", "cuda", "cuda:1"."""


def similarities(clip: ClipExtractor, images: Tensor, captions: list[str]) -> Tensor:
    """Cosine of each picture (row) with each caption (column); images uint8 [N, 3, H, W]."""
    return compared(clip, [clip(batch) for batch in images.split(BATCH)], captions)


def compared(clip: ClipExtractor, batches: list[np.ndarray], captions: list[str]) -> Tensor:
    """The same of the CLIP's embeddings of pictures, [n, D] of each batch."""
    texts = [clip.text(captions[n : n + BATCH]) for n in range(0, len(captions), BATCH)]
    return torch.from_numpy(unit(np.concatenate(batches)) @ unit(np.concatenate(texts)).T)


def stacked(pictures: list[Image.Image]) -> Tensor:
    """uint8 [B, 3, H, W] of pictures of one size."""
    return torch.from_numpy(np.stack([np.array(picture) for picture in pictures])).movedim(-1, 1)


def ranks(similarity: Tensor) -> Tensor:
    """How many captions are nearer to picture i than caption i, or as near: [N], 0 at best.

    Those whose similarity is no number are the farthest.
    """
    similarity = similarity.masked_fill(similarity.isnan(), -torch.inf)
    own = similarity.diagonal()[:, None]
    return (similarity >= own).sum(dim=1) - 1


def figures(similarity: Tensor) -> dict[str, float]:
    """Shares of pictures whose caption is found, and the mean cosine with it."""
    place = ranks(similarity)
    return {
        "top_1": round(float((place < 1).float().mean()), 4),
        "top_5": round(float((place < 5).float().mean()), 4),
        "cosine": round(float(similarity.diagonal().mean()), 4),
    }


def draw(
    config: RetrievalConfig, name: str, captions: list[str], clip: ClipExtractor
) -> tuple[list[Image.Image], Tensor]:
    """By one of the models: the pictures that are shown, and the similarities of all."""
    model = TextToImage.load(config.models[name], device=config.device)
    warnings.simplefilter("ignore", UnknownWordWarning)
    pictures = iter(tqdm(drawn(model, captions, config), name, len(captions), unit="picture"))
    shown, batches = list[Image.Image](), list[np.ndarray]()
    while some := list(itertools.islice(pictures, BATCH)):
        shown += some[: SHOWN - len(shown)]
        batches.append(clip(stacked(some)))
    return shown, compared(clip, batches, captions)


def beside(pictures: list[Image.Image], side: int) -> Image.Image:
    """Squares in one row."""
    row = Image.new("RGB", (side * len(pictures), side))
    for number, picture in enumerate(pictures):
        row.paste(picture.resize((side, side)), (number * side, 0))
    return row


def retrieve(config: RetrievalConfig) -> dict[str, Any]:
    """All figures; see the module's text. Raises InputError for what is not there."""
    clip = ClipExtractor(ClipConfig(directory=config.clip))
    pairs = first_pairs(open_source(config.source), config.captions, clip.side)
    captions, count = pairs.captions, len(pairs.captions)
    results: dict[str, Any] = {
        "captions": count,
        "chance": {"top_1": round(1 / count, 4), "top_5": round(min(5 / count, 1), 4)},
        "real": figures(similarities(clip, pairs.images, captions)),
    }
    real = [Image.fromarray(image) for image in pairs.images[:SHOWN].permute(0, 2, 3, 1).numpy()]
    columns = {"real": real}
    for name in config.models:
        pictures, similarity = draw(config, name, captions, clip)
        columns[name] = pictures
        results[name] = figures(similarity)
        frames = ["green" if place < 1 else "gray" for place in ranks(similarity)[:SHOWN].tolist()]
        page = labelled_sheet(pictures, captions[:SHOWN], 8, 2, frames)
        save(page, config.run_dir / f"{name}.png")
    rows = [beside(list(shown), 2 * clip.side) for shown in zip(*columns.values(), strict=True)]
    save(
        labelled_sheet(rows, captions[:SHOWN], columns=4),
        config.run_dir / "side_by_side.png",
    )
    return results


def save(page: Image.Image, file: Path) -> None:
    with staged_file(file) as path:
        page.save(path, "PNG")


def main() -> None:
    config = load_config(RetrievalConfig)
    results = retrieve(config)
    with staged_file(config.run_dir / "retrieval.json") as path:
        write_json(results, path)
    print(json.dumps(results))


if __name__ == "__main__":
    run_command(main)
