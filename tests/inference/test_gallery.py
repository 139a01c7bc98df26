"""The gallery shows the first prompts of the evaluation with seeds 0 to 31, whatever they draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inference import gallery
from latentdiff.metrics.scene_accuracy import KINDS, prompt_for
from latentdiff.pipeline import TextToImage
from latentdiff.sheet import MARGIN

BUNDLED = Path(__file__).parents[2] / "latentdiff/pretrained/emoji/gallery.png"


def test_nothing_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], Any]] = []

    def generate(self: TextToImage, prompts: list[str], *, seed: int) -> list[Image.Image]:
        asked.append((prompts, seed))
        return [Image.new("RGB", (64, 64)) for _ in prompts]

    monkeypatch.setattr(TextToImage, "generate", generate)
    output = tmp_path / "gallery.png"
    monkeypatch.setattr("sys.argv", ["gallery", "--output", str(output)])
    gallery.main()
    ((prompts, seed),) = asked
    scenes = TextToImage.load().parts.vocabulary
    assert scenes is not None
    assert len(prompts) == 32
    for number, kind in enumerate(KINDS):
        assert prompts[8 * number :][:8] == [prompt_for(one) for one in kind.scenes(scenes, 8)]
    assert seed == 0
    assert Image.open(output).width == 8 * (128 + 12)


def test_the_bundled_gallery_is_of_the_bundled_weights() -> None:
    """A picture of each kind, drawn again: seed 8 n, the first of row n."""
    model = TextToImage.load()
    prompts = [prompt_for(kind.scenes(model.parts.scenes(), 1)[0]) for kind in KINDS]
    seeds = [gallery.EACH * row for row in range(len(KINDS))]
    drawn = model.generate(prompts, seed=seeds)
    assert isinstance(drawn, list)
    with Image.open(BUNDLED) as opened:
        shown = np.asarray(opened.convert("RGB"), dtype=int)
    height = shown.shape[0] // len(KINDS)
    for row, picture in enumerate(drawn):
        top, left, side = row * height + MARGIN, MARGIN, 2 * picture.height
        cell = shown[top : top + side : 2, left : left + side : 2]
        assert np.abs(cell - np.asarray(picture, dtype=int)).max() <= 8
