"""Pictures in batches are those that single calls make."""

from __future__ import annotations

import numpy as np
import pytest

from latentdiff.drawing import DrawingConfig, drawn
from latentdiff.errors import InputError
from latentdiff.pipeline import TextToImage

PROMPTS = ["a fox", "a rocket", "an apple"]
CONFIG = DrawingConfig(seed=5, num_inference_steps=2, guidance_scale=3.0, sampler="euler")


@pytest.mark.parametrize("seeds", [None, [9, 0, 9]])
def test_picture_i_is_of_its_own_prompt_and_seed(
    tiny: TextToImage, seeds: list[int] | None
) -> None:
    found = list(drawn(tiny, PROMPTS, CONFIG, seeds, batch_size=2, height=32, width=64))
    for prompt, seed, picture in zip(PROMPTS, seeds or [5, 6, 7], found, strict=True):
        alone = tiny.generate(
            prompt,
            seed=seed,
            num_inference_steps=2,
            guidance_scale=3.0,
            sampler="euler",
            height=32,
            width=64,
        )
        assert picture.size == (64, 32)
        np.testing.assert_allclose(np.asarray(picture, int), np.asarray(alone, int), atol=1)


def test_pictures_come_batch_by_batch(tiny: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    made = tiny.generate

    def generate(prompts: list[str], **settings: object) -> object:
        asked.append(prompts)
        return made(prompts, **settings)

    monkeypatch.setattr(tiny, "generate", generate)
    pictures = drawn(tiny, PROMPTS, CONFIG, batch_size=2)
    next(pictures)
    assert asked == [["a fox", "a rocket"]]
    assert len(list(pictures)) == 2
    assert asked[1:] == [["an apple"]]


def test_what_cannot_be_drawn_is_refused(tiny: TextToImage) -> None:
    with pytest.raises(InputError, match="sampler"):
        next(drawn(tiny, PROMPTS, DrawingConfig(sampler="none")))
