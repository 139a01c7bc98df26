"""Many pictures from a model, in batches: what evaluations draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL import Image
from pydantic import Field

from latentdiff.config import Config
from latentdiff.pipeline import TextToImage

BATCH = 8


class DrawingConfig(Config):
    """How pictures are drawn, all of them."""

    seed: int = Field(default=0, ge=0)
    """Picture i is drawn with seed + i."""
    num_inference_steps: int = Field(default=25, gt=0)
    """Steps of the sampler."""
    guidance_scale: float = Field(default=4.0, ge=0)
    """Classifier-free guidance."""
    sampler: str = "ddim"
    """The sampler's name."""


def drawn(
    model: TextToImage,
    prompts: Sequence[str],
    config: DrawingConfig,
    seeds: Sequence[int] | None = None,
    batch_size: int = BATCH,
    height: int | None = None,
    width: int | None = None,
) -> Iterator[Image.Image]:
    """One picture of each prompt, in order, as soon as its batch is drawn.

    seeds: one for each, instead of config.seed + i. batch_size: pictures drawn together, on which
    none depends. height, width: in pixels, by default the model's. Raises InputError as
    TextToImage.generate.
    """
    if seeds is None:
        seeds = range(config.seed, config.seed + len(prompts))
    for first in range(0, len(prompts), batch_size):
        here = slice(first, first + batch_size)
        made = model.generate(
            list(prompts[here]),
            seed=list(seeds[here]),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            sampler=config.sampler,
            batch_size=batch_size,
            height=height,
            width=width,
        )
        assert isinstance(made, list)
        yield from made
