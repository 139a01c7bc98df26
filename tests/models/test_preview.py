"""Previews: exact where the VAE is linear, like the picture on the bundled VAE, like TAESD."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor, nn

from latentdiff.data.scenes import EmojiScenes, ScenesConfig
from latentdiff.errors import InputError
from latentdiff.hub import model_path
from latentdiff.models.autoencoder import Autoencoder, Posterior
from latentdiff.models.preview import LatentPreview


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class LinearVAE(nn.Module):
    """Latents that are an affine map of the mean colours, with a channel of the grain besides."""

    scale_factor, latent_channels = 4, 5

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(random(3, 4))

    def encode(self, images: Tensor) -> Posterior:
        colours = F.avg_pool2d(images, 4)
        mixed = (colours.movedim(1, -1) @ self.mixing + 0.7).movedim(-1, 1)
        grain = F.avg_pool2d(images.mean(dim=1, keepdim=True).square(), 4)
        mean = torch.cat([mixed, grain], dim=1)
        return Posterior(mean, torch.zeros_like(mean))


@pytest.fixture(scope="module")
def linear() -> LatentPreview:
    return LatentPreview.fit(cast("Autoencoder", LinearVAE()))


def test_a_linear_vae_is_inverted_exactly(linear: LatentPreview) -> None:
    images = random(2, 3, 16, 24, seed=1).clamp(-1, 1)
    latents = LinearVAE().encode(images).mean.detach()
    colours = F.avg_pool2d(images, 4)
    torch.testing.assert_close(linear.to_images(latents).detach(), colours, atol=1e-4, rtol=0)
    expected = ((colours + 1) * 127.5).permute(0, 2, 3, 1)
    pixels = linear(latents)
    assert pixels.dtype == torch.uint8
    torch.testing.assert_close(pixels.float(), expected, atol=0.51, rtol=0)


def test_half_precision_latents(linear: LatentPreview) -> None:
    latents = random(1, 5, 4, 6)
    torch.testing.assert_close(
        linear(latents.half()).float(), linear(latents).float(), atol=2, rtol=0
    )


def test_pictures_have_the_size_asked_for(linear: LatentPreview) -> None:
    latents = random(2, 5, 4, 6)
    first, second = linear.pictures(latents, width=48, height=32)
    assert (first.mode, first.size) == ("RGB", (48, 32))
    assert first.tobytes() != second.tobytes()
    (small,) = linear.pictures(latents[:1], width=6, height=4)
    np.testing.assert_array_equal(np.asarray(small), linear(latents[:1])[0].numpy())


def test_what_is_not_finite_is_black(linear: LatentPreview) -> None:
    latents = LinearVAE().encode(torch.ones(1, 3, 8, 8)).mean.detach()
    latents[..., 0, 0] = float("nan")
    latents[..., 1, 1] = float("inf")
    pixels = linear(latents)[0]
    assert pixels[0, 0].eq(0).all()
    assert pixels[0, 1].eq(255).all()
    assert pixels[1, 0].eq(255).all()


def test_latents_of_another_vae_are_refused(linear: LatentPreview) -> None:
    with pytest.raises(InputError, match="4 channels but the preview reads 5"):
        linear(random(1, 4, 4, 4))


def test_previews_of_the_bundled_vae_are_like_the_pictures() -> None:
    """Measured: correlation 0.939, and 0.947 for the best affine map on these very scenes."""
    directory = model_path()
    config = ScenesConfig.model_validate_json((directory / "vocabulary.json").read_text())
    scenes = EmojiScenes(config)
    pixels = np.stack([scenes[index]["image"] for index in range(16)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    autoencoder = Autoencoder(AutoencoderKL.from_pretrained(directory / "vae").eval())
    with torch.no_grad():
        latents = autoencoder.encode(images).mean

    preview = LatentPreview.fit(autoencoder)
    seen = preview(latents).numpy().astype(float)
    small = (F.avg_pool2d(images, 8).permute(0, 2, 3, 1).numpy() + 1) * 127.5
    assert np.corrcoef(seen.ravel(), small.ravel())[0, 1] > 0.92
    assert np.sqrt(np.square(seen - small).mean()) < 30  # measured: 25
    np.testing.assert_array_equal(LatentPreview.fit(autoencoder)(latents), preview(latents))


@pytest.mark.parametrize("scaling", [1.0, 0.5])
def test_a_tiny_autoencoder_shows_what_diffusers_decodes(scaling: float) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        taesd = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=4,
            scaling_factor=scaling,
            shift_factor=0.25,
        ).eval()
    latents = random(2, 4, 6, 4)
    preview = LatentPreview.tiny(taesd)
    with torch.no_grad():
        image = taesd.decode(latents / scaling + 0.25).sample
    expected = ((image + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1)
    pixels = preview(latents)
    assert pixels.shape == (2, 12, 8, 3)
    torch.testing.assert_close(pixels.float(), expected, atol=0.51, rtol=0)
    assert [picture.size for picture in preview.pictures(latents, 32, 48)] == [(32, 48)] * 2
    with pytest.raises(InputError, match="reads 4"):
        preview(random(1, 16, 4, 4))
