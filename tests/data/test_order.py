"""The order of samples: whole epochs, whoever shares the work and wherever it resumes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.data.order import epoch_order, step_orders

SEEDS = st.integers(0, 2**64)
PROPERTY = settings(deadline=None)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """(count, batch_size), the batch no larger than the data."""
    count = draw(st.integers(1, 200))
    return count, draw(st.integers(1, count))


@PROPERTY
@given(SEEDS, st.integers(0, 10**6), st.integers(0, 300))
def test_an_epoch_is_a_permutation(seed: int, epoch: int, count: int) -> None:
    order = epoch_order(seed, epoch, count)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))


@PROPERTY
@given(SEEDS, sizes(), st.integers(1, 3))
def test_every_epoch_visits_each_sample_once_but_for_the_remainder(
    seed: int, sizes: tuple[int, int], epochs: int
) -> None:
    count, batch_size = sizes
    per_epoch = count // batch_size
    visited: dict[int, list[int]] = {}
    for epoch, samples in step_orders(seed, count, batch_size, range(epochs * per_epoch), 0, 1):
        assert len(samples) == batch_size
        visited.setdefault(epoch, []).extend(samples)
    assert list(visited) == list(range(epochs))
    for samples in visited.values():
        assert len(samples) == len(set(samples)) == count - count % batch_size
        assert set(samples) <= set(range(count))


@PROPERTY
@given(SEEDS, sizes(), st.integers(1, 8), st.integers(0, 1000))
def test_the_ranks_share_the_batches_of_one_process(
    seed: int, sizes: tuple[int, int], processes: int, first: int
) -> None:
    steps = range(first, first + 5)
    alone = list(step_orders(seed, *sizes, steps, 0, 1))
    ranks = [list(step_orders(seed, *sizes, steps, rank, processes)) for rank in range(processes)]
    for (epoch, batch), *shares in zip(alone, *ranks, strict=True):
        assert {share_epoch for share_epoch, _ in shares} == {epoch}
        joined = [sample for _, share in shares for sample in share]
        assert sorted(joined) == sorted(batch)
        lengths = [len(share) for _, share in shares]
        assert max(lengths) - min(lengths) <= 1


@PROPERTY
@given(SEEDS, sizes(), st.integers(0, 60), st.integers(0, 60))
def test_resuming_in_the_middle_continues_the_same_order(
    seed: int, sizes: tuple[int, int], first: int, length: int
) -> None:
    whole = list(step_orders(seed, *sizes, range(first + length), 0, 1))
    assert list(step_orders(seed, *sizes, range(first, first + length), 0, 1)) == whole[first:]


def test_seeds_and_epochs_are_shuffled_apart() -> None:
    orders = {
        (seed, epoch): epoch_order(seed, epoch, 1000) for seed in range(4) for epoch in range(4)
    }
    orders[-1, -1] = np.arange(1000)  # not shuffled at all
    keys = list(orders)
    for number, key in enumerate(keys):
        for other in keys[:number]:
            # Two independent permutations agree in Poisson(1) places.
            assert (orders[key] == orders[other]).sum() < 10, (key, other)


def test_each_place_gets_each_sample_equally_often() -> None:
    """Chi-squared over 2,000 epochs of 8 samples: 49 degrees of freedom, scaled by 8 / 7."""
    table = np.zeros((8, 8))
    for epoch in range(2000):
        table[np.arange(8), epoch_order(0, epoch, 8)] += 1
    assert 7 / 8 * np.square(table - 250).sum() / 250 < 49 + 5 * np.sqrt(2 * 49)
