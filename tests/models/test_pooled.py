"""Latents that are means of pixels: the encoder, the identity, and models with such a VAE."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentdiff import TextToImage
from latentdiff.checkpoint import ModelParts, load_model, save_model
from latentdiff.errors import InputError
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.pooled import PooledVAE
from latentdiff.models.unet import UNet

IMAGES = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make(*channels: int) -> Autoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (
            Autoencoder(PooledVAE(block_out_channels=channels, norm_num_groups=4))
            .eval()
            .requires_grad_(False)
        )


def test_with_one_level_latents_are_pixels_both_ways() -> None:
    pixels = make(8)
    assert (pixels.scale_factor, pixels.latent_channels) == (1, 3)
    posterior = pixels.encode(IMAGES)
    assert posterior.mean.equal(IMAGES)
    noise = torch.ones_like(IMAGES)
    torch.testing.assert_close(posterior.sample(noise), IMAGES, atol=1e-6, rtol=0)
    assert pixels.decode(posterior.mean).equal(IMAGES)


@pytest.mark.parametrize("levels", [2, 3])
def test_with_more_they_are_means_of_blocks(levels: int) -> None:
    autoencoder, factor = make(*[8] * levels), 2 ** (levels - 1)
    assert autoencoder.scale_factor == factor
    blocks = IMAGES.numpy().reshape(2, 3, 16 // factor, factor, 24 // factor, factor)
    found = autoencoder.encode(IMAGES).mean
    np.testing.assert_allclose(found.numpy(), blocks.mean(axis=(3, 5)), atol=1e-6)
    assert autoencoder.decode(found).shape == IMAGES.shape


def test_only_what_makes_pixels_of_means_is_trained() -> None:
    trained = {
        name
        for name, value in PooledVAE(block_out_channels=(8, 8)).named_parameters()
        if value.requires_grad
    }
    assert {name.partition(".")[0] for name in trained} == {"decoder", "post_quant_conv"}


def test_standardized_latents_decode_to_what_they_did() -> None:
    autoencoder = make(8, 8)
    images = 0.3 * IMAGES + 0.4
    before = autoencoder.encode(images).mean
    decoded = autoencoder.decode(before)
    values = before.transpose(0, 1).flatten(1)
    autoencoder.standardize(values.mean(dim=1), values.std(dim=1))
    after = autoencoder.encode(images).mean
    values = after.transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.mean(dim=1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std(dim=1), torch.ones(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(autoencoder.decode(after), decoded, atol=1e-5, rtol=1e-4)


@pytest.fixture
def pixel_parts(tiny_parts: ModelParts) -> ModelParts:
    """The tiny model with a U-Net that draws pixels."""
    config = tiny_parts.unet.config.model_copy(update={"in_channels": 3, "out_channels": 3})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return dataclasses.replace(tiny_parts, unet=UNet(config).eval(), autoencoder=make(8))


def draw(model: TextToImage, **settings: int) -> np.ndarray:
    picture = model.generate("a fox", seed=3, num_inference_steps=2, **settings)
    return np.asarray(picture)


def test_a_model_of_pixels_is_saved_and_draws_alike(
    pixel_parts: ModelParts, tmp_path: Path
) -> None:
    save_model(pixel_parts, tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    assert isinstance(loaded.autoencoder.vae, PooledVAE)
    picture = draw(TextToImage(loaded))
    assert picture.shape == (8, 8, 3)  # the U-Net's sample_size
    assert (picture == draw(TextToImage(pixel_parts))).all()


def test_a_single_file_has_no_place_for_it(pixel_parts: ModelParts, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"PooledVAE.*directory"):
        save_model(pixel_parts, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_pixels_need_no_strips(pixel_parts: ModelParts) -> None:
    model = TextToImage(pixel_parts)
    assert (draw(model, tile=2) == draw(model)).all()


def test_small_pictures_are_made_larger_in_strips(pixel_parts: ModelParts) -> None:
    """And made smaller whole, which takes no memory to speak of."""
    small = make(8, 8, 8)
    latents = small.encode(IMAGES).mean
    assert small.encode(IMAGES, tile=1).mean.equal(latents)
    torch.testing.assert_close(
        small.decode(latents, tile=1), small.decode(latents), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("changes", [{"latent_channels": 4}, {"block_out_channels": []}])
def test_a_bad_config_is_refused_when_it_is_loaded(
    pixel_parts: ModelParts, tmp_path: Path, changes: dict[str, Any]
) -> None:
    save_model(pixel_parts, tmp_path / "model")
    file = tmp_path / "model" / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=r"vae/config.json"):
        load_model(str(tmp_path / "model"))


def test_what_training_leaves_keeps_pixels_in_half_precision(
    pixel_parts: ModelParts, tmp_path: Path
) -> None:
    """Standardized, and fp16 on the disk."""
    pixel_parts.autoencoder.standardize(torch.tensor([0.3, -0.2, 0.1]), torch.full((3,), 0.4))
    save_model(pixel_parts, tmp_path / "model", torch.float16)
    half = load_model(str(tmp_path / "model"), torch.float16).autoencoder
    latents = half.encode(IMAGES).mean
    torch.testing.assert_close(latents.mean(), IMAGES.mean() / 0.4 - 1 / 6, atol=0.1, rtol=0)
    decoded = half.decode(latents).float()
    torch.testing.assert_close(decoded, IMAGES, atol=1e-2, rtol=0)
