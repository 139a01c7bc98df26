"""How much of a picture survives the VAE."""

from __future__ import annotations

import numpy as np
import torch

from latentdiff.models.autoencoder import Autoencoder

BATCH_PIXELS = 64 * 64**2
"""What a batch holds at most, but for one picture."""


def psnr(pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
    """10 log10(255^2 / MSE) in dB of each picture; both uint8 [N, H, W, 3]. Equal ones: inf."""
    errors = pictures.astype(np.float64) - references.astype(np.float64)
    with np.errstate(divide="ignore"):
        values: np.ndarray = 10 * np.log10(255**2 / np.square(errors).mean(axis=(1, 2, 3)))
    return values


def batch_size(side: int) -> int:
    """Pictures of `side` x `side` pixels that a VAE takes at a time."""
    return max(1, BATCH_PIXELS // side**2)


@torch.inference_mode()
def reconstruct(autoencoder: Autoencoder, pictures: np.ndarray) -> np.ndarray:
    """Decode the posterior means of pictures, uint8 [N, H, W, 3], into as many of that size."""
    if not len(pictures):
        return pictures
    weight = next(autoencoder.parameters())
    decoded = []
    for batch in torch.from_numpy(pictures).split(batch_size(max(pictures.shape[1:3]))):
        images = batch.permute(0, 3, 1, 2).to(weight.device, weight.dtype).div(127.5).sub(1)
        latents = autoencoder.encode(images).mean.to(weight.dtype)
        values = autoencoder.decode(latents).float().clamp(-1, 1).add(1).mul(127.5).round()
        decoded.append(values.to(torch.uint8).permute(0, 2, 3, 1).cpu())
    return torch.cat(decoded).numpy()
