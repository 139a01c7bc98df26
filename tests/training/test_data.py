"""Batches: the same samples however many processes and workers share them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.data import StepDataset, endless_orders, loader, to_network


class Squares(StepDataset):
    """Sample n is {"value": n squared}."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"value": torch.tensor(index * index)}


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 5), st.integers(1, 40), st.integers(1, 9))
def test_the_ranks_share_the_batches_of_one_process(
    first: int, steps: int, batch_size: int, processes: int
) -> None:
    numbers = range(first, first + steps)
    alone = list(endless_orders(numbers, batch_size, 0, 1))
    assert [sample for batch in alone for sample in batch] == list(
        range(first * batch_size, (first + steps) * batch_size)
    )
    ranks = [
        list(endless_orders(numbers, batch_size, rank, processes)) for rank in range(processes)
    ]
    for batch, *shares in zip(alone, *ranks, strict=True):
        assert sorted(sample for share in shares for sample in share) == batch
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_with_their_numbers(workers: int) -> None:
    orders = [[3, 1], [4, 1, 5], [9]]
    batches = list(loader(Squares(), orders, workers))
    assert [numbers for numbers, _ in batches] == orders
    for numbers, batch in batches:
        assert batch["value"].tolist() == [number**2 for number in numbers]


def test_pictures_become_what_a_network_takes() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    images = to_network(levels, torch.device("cpu"))
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    expected = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
    assert (images.min(), images.max()) == (-1, 1)
