"""Noise keyed by what it is for, never by the order of calls: no global generator anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, stream: str, epoch: int = 0, sample: int = 0) -> torch.Generator:
    """A CPU generator that is a function of its four keys alone.

    stream names the use ("noise", "timestep", ...), sample is a sample's number in its data set.
    """
    key = f"{seed}|{stream}|{epoch}|{sample}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big", signed=True))


def keyed_normal(
    seed: int, stream: str, epoch: int, samples: Sequence[int], shape: tuple[int, ...]
) -> Tensor:
    """N(0, 1) noise [B, *shape], fp32 on the CPU; row b depends on samples[b], not on the batch."""
    noise = torch.empty(len(samples), *shape)
    for row, sample in zip(noise, samples, strict=True):
        row.normal_(generator=generator(seed, stream, epoch, sample))
    return noise


def keyed_uniform(seed: int, stream: str, epoch: int, samples: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1), [B], fp32 on the CPU, keyed as keyed_normal."""
    values = torch.empty(len(samples))
    for row, sample in zip(values, samples, strict=True):
        row.uniform_(generator=generator(seed, stream, epoch, sample))
    return values


def picture_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """The initial noise of pictures, [B, *shape]: each its own generator's first draw.

    Equals diffusers' randn_tensor with one `torch.Generator("cpu").manual_seed(seed)` a picture.
    """
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    )
