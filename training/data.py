"""Batches for the loop: which samples each step takes is decided outside, in the open."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate


class StepDataset(Dataset):  # type: ignore[type-arg]
    """Samples by number."""

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError


class _Numbered(Dataset):  # type: ignore[type-arg]
    def __init__(self, samples: StepDataset) -> None:
        self.samples = samples

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.samples[index]


def _collate(items: Sequence[tuple[int, Any]]) -> tuple[list[int], Any]:
    return [index for index, _ in items], default_collate([sample for _, sample in items])


def endless_orders(steps: range, batch_size: int, rank: int, processes: int) -> Iterator[list[int]]:
    """Sample numbers of this process at each step of a data set without end: step by step."""
    for step in steps:
        yield list(range(step * batch_size + rank, (step + 1) * batch_size, processes))


def loader(
    samples: StepDataset, orders: Iterable[list[int]], workers: int
) -> Iterator[tuple[list[int], Any]]:
    """(sample numbers, collated samples) for each list of sample numbers, in order."""
    return iter(
        DataLoader(
            _Numbered(samples),
            batch_sampler=orders,
            num_workers=workers,
            collate_fn=_collate,
        )
    )


def to_network(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] -> float in [-1, 1], channels last."""
    images = images.to(device, torch.float32).div(127.5).sub(1)
    return images.contiguous(memory_format=torch.channels_last)
