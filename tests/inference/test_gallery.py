"""The gallery shows the first prompts of the evaluation with seeds 0 to 31, whatever they draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from inference import gallery
from latentdiff.metrics.scene_accuracy import KINDS, prompt_for
from latentdiff.pipeline import TextToImage


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
