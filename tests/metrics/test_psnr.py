"""PSNR by hand, and reconstructions by diffusers' own AutoencoderKL."""

from __future__ import annotations

import numpy as np
import torch

from latentdiff.checkpoint import ModelParts
from latentdiff.metrics.psnr import BATCH_PIXELS, batch_size, psnr, reconstruct


def test_psnr_of_known_errors() -> None:
    black = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    pictures = black.copy()
    pictures[1] = 255
    pictures[2, :, :4] = 10
    values = psnr(pictures, black)
    assert values[0] == np.inf
    np.testing.assert_allclose(values[1:], [0, 10 * np.log10(255**2 / 50)])
    np.testing.assert_array_equal(psnr(black, pictures), values)


def test_reconstruct_is_the_vae_on_posterior_means(tiny_parts: ModelParts) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 64, 3), dtype=np.uint8)
    found = reconstruct(tiny_parts.autoencoder, pictures)
    assert found.shape == pictures.shape
    assert found.dtype == np.uint8
    with torch.no_grad():
        for picture, mine in zip(pictures, found, strict=True):
            image = torch.tensor(picture / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
            decoded = tiny_parts.autoencoder.vae(image).sample
            expected = ((decoded[0].permute(1, 2, 0).numpy() + 1) * 127.5).clip(0, 255)
            np.testing.assert_allclose(mine, expected, atol=0.51)


def test_reconstruct_nothing(tiny_parts: ModelParts) -> None:
    """As a process does that has no picture of its own."""
    nothing = np.empty((0, 32, 32, 3), dtype=np.uint8)
    assert reconstruct(tiny_parts.autoencoder, nothing).shape == nothing.shape


def test_large_pictures_come_in_small_batches() -> None:
    assert [batch_size(side) for side in (64, 128, 1024)] == [64, 16, 1]
    assert all(batch_size(side) * side**2 <= BATCH_PIXELS for side in range(1, 512))
