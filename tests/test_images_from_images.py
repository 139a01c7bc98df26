"""Pictures from pictures and masks, against diffusers' pipelines on the same weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image, ImageDraw

from latentdiff.checkpoint import ModelParts
from latentdiff.errors import InputError
from latentdiff.models.unet import UNet
from latentdiff.pipeline import TextToImage
from latentdiff.recipe import picture_hash, recipe_from_json

PROMPT = "a fox above a rocket"
SETTINGS: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 3.0}
OURS: dict[str, Any] = SETTINGS | {"sampler": "ddim"}


def pixels(images: Any) -> np.ndarray:
    return np.stack([np.asarray(one, dtype=int) for one in images])


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """80 x 48, a few shapes."""
    image = Image.new("RGB", (80, 48), "steelblue")
    draw = ImageDraw.Draw(image)
    draw.ellipse((8, 6, 40, 38), fill="orange")
    draw.rectangle((50, 20, 74, 44), fill="darkgreen")
    return image


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    """The left half, but for a few pixels."""
    image = Image.new("L", (80, 48))
    ImageDraw.Draw(image).rectangle((0, 0, 43, 40), fill="white")
    return image


@pytest.fixture(scope="module")
def inpainting(tiny_parts: ModelParts) -> TextToImage:
    """The tiny model with a U-Net of 9 channels."""
    config = tiny_parts.unet.config.model_copy(update={"in_channels": 9})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet(config).eval()
    state = unet.state_dict()
    own = tiny_parts.unet.state_dict()
    state |= {name: value for name, value in own.items() if name != "conv_in.weight"}
    unet.load_state_dict(state)
    return TextToImage(
        dataclasses.replace(tiny_parts, unet=unet, pipeline="StableDiffusionInpaintPipeline")
    )


@pytest.fixture
def _means(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers takes a random draw from the VAE's posterior; we take its mean."""
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean
    )


@pytest.mark.usefixtures("_means")
@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_from_a_picture_as_diffusers_does(
    tiny: TextToImage, tiny_model: Path, photo: Image.Image, strength: float
) -> None:
    theirs = StableDiffusionImg2ImgPipeline.from_pretrained(tiny_model, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    expected = theirs(
        [PROMPT, "a rocket"], image=[photo] * 2, strength=strength, generator=generators, **SETTINGS
    ).images
    ours = tiny.generate([PROMPT, "a rocket"], image=photo, strength=strength, seed=4, **OURS)
    assert np.abs(pixels(ours) - pixels(expected)).max() <= 2


@pytest.mark.usefixtures("_means")
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["blended", "trained"])
def test_into_a_mask_as_diffusers_does(
    tiny: TextToImage,
    inpainting: TextToImage,
    tmp_path: Path,
    photo: Image.Image,
    mask: Image.Image,
    kind: str,
    strength: float,
) -> None:
    """Where the mask is white: elsewhere diffusers decodes, and we keep, the picture.

    Without an inpainting model diffusers puts the picture back after each step, we before the
    next: the last step's is decoded beside the mask, so its border is left out.
    """
    model = tiny if kind == "blended" else inpainting
    model.save(tmp_path / "model")
    theirs = StableDiffusionInpaintPipeline.from_pretrained(
        tmp_path / "model", local_files_only=True
    )
    theirs.set_progress_bar_config(disable=True)
    (expected,) = theirs(
        PROMPT,
        image=photo,
        mask_image=mask,
        height=48,
        width=80,
        strength=strength,
        generator=torch.Generator().manual_seed(4),
        **SETTINGS,
    ).images
    ours = model.generate(PROMPT, image=photo, mask=mask, strength=strength, seed=4, **OURS)
    where = np.asarray(mask) > 127
    ours, expected = pixels([ours])[0], pixels([expected])[0]
    assert np.abs(ours - expected)[where].max() <= 2
    assert (ours == pixels([photo])[0])[~where].all()
    assert np.abs(ours - pixels([photo])[0])[where].mean() > 3


def test_more_strength_changes_more(tiny: TextToImage, photo: Image.Image) -> None:
    changes = [
        np.abs(
            pixels([tiny.generate(PROMPT, image=photo, strength=s, seed=1, **OURS)])
            - pixels([photo])
        ).mean()
        for s in (0.2, 0.6, 1.0)
    ]
    assert changes == sorted(changes)


def test_the_recipe_names_the_pictures(
    tiny: TextToImage, tmp_path: Path, photo: Image.Image, mask: Image.Image
) -> None:
    photo.save(tmp_path / "photo.png")
    image = tiny.generate(
        PROMPT, image=tmp_path / "photo.png", mask=mask, strength=0.5, seed=1, **OURS
    )
    assert isinstance(image, Image.Image)
    recipe = recipe_from_json(image.info["latentdiff"])
    assert recipe.strength == 0.5
    assert recipe.image is not None
    assert recipe.mask is not None
    assert (recipe.image.name, recipe.image.sha256) == ("photo.png", picture_hash(photo))
    assert (recipe.mask.name, recipe.mask.sha256) == ("", picture_hash(mask))
    again = tiny.generate(**recipe.arguments(), image=photo, mask=mask)
    assert (pixels([again]) == pixels([image])).all()


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_sde", "heun", "unipc"])
def test_what_is_outside_the_mask_stays(
    tiny: TextToImage, photo: Image.Image, mask: Image.Image, sampler: str
) -> None:
    made = tiny.generate(PROMPT, image=photo, mask=mask, seed=2, **OURS | {"sampler": sampler})
    outside = np.asarray(mask) == 0
    assert (pixels([made])[0] == pixels([photo])[0])[outside].all()


def test_sides_are_cut_to_what_the_model_makes(tiny: TextToImage) -> None:
    """In the middle, without scaling: outside the mask every pixel is the picture's."""
    noise = np.random.default_rng(0).integers(0, 256, (53, 77, 3), dtype=np.uint8)
    mask = Image.new("L", (77, 53))
    ImageDraw.Draw(mask).rectangle((20, 20, 40, 30), fill="white")
    made = tiny.generate("fox", image=Image.fromarray(noise), mask=mask, num_inference_steps=2)
    assert isinstance(made, Image.Image)
    assert made.size == (72, 48)
    outside = np.asarray(mask)[2:50, 2:74] == 0
    assert (np.asarray(made) == noise[2:50, 2:74])[outside].all()


def test_a_mask_of_a_few_pixels_is_painted(tiny: TextToImage, photo: Image.Image) -> None:
    mask = Image.new("L", photo.size)
    ImageDraw.Draw(mask).rectangle((21, 22, 23, 23), fill="white")
    made = pixels([tiny.generate(PROMPT, image=photo, mask=mask, seed=1, **OURS)])[0]
    changed = (made != pixels([photo])[0]).any(axis=-1)
    assert changed[22:24, 21:24].all()
    assert changed.sum() == 6


def test_transparency_and_gray(tiny: TextToImage) -> None:
    """A transparent picture is the same as its white ground, a gray one as its RGB."""
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    pairs = [(clear, Image.new("RGB", (64, 64), "white"))]
    gray = Image.new("L", (64, 64), 90)
    pairs.append((gray, gray.convert("RGB")))
    for one, other in pairs:
        made = [
            tiny.generate("fox", image=x, strength=0.5, seed=1, num_inference_steps=4)
            for x in (one, other)
        ]
        assert (pixels(made[:1]) == pixels(made[1:])).all()


def test_an_inpainting_model_needs_both(inpainting: TextToImage, photo: Image.Image) -> None:
    with pytest.raises(InputError, match="give image= and mask="):
        inpainting.generate("fox")
    with pytest.raises(InputError, match="give mask= too"):
        inpainting.generate("fox", image=photo)


def test_an_inpainting_pipeline_may_have_a_plain_unet(
    tiny_parts: ModelParts, photo: Image.Image, mask: Image.Image
) -> None:
    """As in diffusers, it is then held to the picture outside the mask."""
    parts = dataclasses.replace(tiny_parts, pipeline="StableDiffusionInpaintPipeline")
    made = TextToImage(parts).generate(PROMPT, image=photo, mask=mask, seed=4, **OURS)
    expected = TextToImage(tiny_parts).generate(PROMPT, image=photo, mask=mask, seed=4, **OURS)
    assert (pixels([made]) == pixels([expected])).all()
