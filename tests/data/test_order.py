"""The order of samples: whole epochs, whoever shares the work and wherever it resumes."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.data.order import ROUNDS, Plan, Share, permute, substitute
from latentdiff.errors import InputError

SEEDS = st.integers(0, 2**64)
PROPERTY = settings(deadline=None, max_examples=40)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Up to six buckets, the largest of which fills a batch; blocks and windows of a few rows."""
    counts = draw(st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any))
    batch_size = draw(st.integers(1, max(counts)))
    block, window = draw(st.integers(1, 20)), draw(st.integers(1, 5))
    return Plan(draw(SEEDS), counts, batch_size, block, window)


@PROPERTY
@given(plans(), st.integers(0, 10**6))
def test_an_epoch_takes_each_sample_once_but_for_the_remainders(plan: Plan, epoch: int) -> None:
    taken: list[list[int]] = [[] for _ in plan.counts]
    first = epoch * plan.steps_per_epoch
    for step in range(first, first + plan.steps_per_epoch):
        batch = plan.batch(step)
        assert batch.epoch == epoch
        assert batch.samples.dtype == np.int64
        assert batch.samples.shape == (plan.batch_size,)
        taken[batch.bucket] += batch.samples.tolist()
    assert plan.batch(first + plan.steps_per_epoch).epoch == epoch + 1
    begin = 0
    for samples, count in zip(taken, plan.counts, strict=True):
        assert len(samples) == len(set(samples)) == count - count % plan.batch_size
        assert set(samples) <= set(range(begin, begin + count))
        begin += count


@PROPERTY
@given(plans(), st.integers(0, 100))
def test_buckets_take_turns_in_proportion(plan: Plan, epoch: int) -> None:
    """Batch k of s comes at a time in [k / s, (k + 1) / s): that bounds how far one runs ahead."""
    total, buckets = plan.steps_per_epoch, len(plan.counts)
    turns: Counter[int] = Counter()
    for place in range(total):
        turns[plan.batch(epoch * total + place).bucket] += 1
        for bucket, count in enumerate(plan.counts):
            share = count // plan.batch_size / total
            assert abs(turns[bucket] - share * (place + 1)) <= 2 + buckets * share


def test_left_out_samples_are_others_each_epoch() -> None:
    plan = Plan(0, [10], 4, block=4, window=2)
    left = [
        set(range(10)).difference(*(plan.batch(2 * epoch + k).samples.tolist() for k in range(2)))
        for epoch in range(60)
    ]
    assert {len(samples) for samples in left} == {2}
    assert set().union(*left) == set(range(10))


@pytest.mark.parametrize(("block", "window"), [(1024, 16), (3, 1), (2, 2)])
def test_each_place_gets_each_sample_equally_often(block: int, window: int) -> None:
    """Chi-squared over 1,000 epochs of 8 samples: 49 degrees of freedom, scaled by 8 / 7."""
    plan = Plan(0, [8], 8, block, window)
    table = np.zeros((8, 8))
    for epoch in range(1000):
        table[np.arange(8), plan.batch(epoch).samples] += 1
    assert 7 / 8 * np.square(table - 125).sum() / 125 < 49 + 5 * np.sqrt(2 * 49)


def test_seeds_epochs_and_buckets_are_shuffled_apart() -> None:
    orders = {}
    for seed in range(4):
        plan = Plan(seed, [1000, 1000], 1000)
        for step in range(6):
            batch = plan.batch(step)
            orders[seed, batch.epoch, batch.bucket] = batch.samples % 1000
    assert len(orders) == 24
    orders[-1, -1, -1] = np.arange(1000)  # not shuffled at all
    keys = list(orders)
    for number, key in enumerate(keys):
        for other in keys[:number]:
            # Two independent permutations agree in Poisson(1) places.
            assert (orders[key] == orders[other]).sum() < 10, (key, other)


def test_what_stood_together_is_torn_apart_within_a_window() -> None:
    """The rank correlation of neighbours is that of independent draws: 0, give or take 1 / 128."""
    samples = Plan(3, [16 * 1024], 16 * 1024).batch(0).samples.astype(float)
    assert abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 5 / 128
    assert abs(np.corrcoef(samples, np.arange(len(samples)))[0, 1]) < 5 / 128


def test_reading_stays_local() -> None:
    """A batch of 256 would touch 250 of these 1,600 blocks if samples were drawn from them all."""
    plan = Plan(0, [1600 * 64 - 10], 256, block=64, window=4)
    touched = [
        len(set((plan.batch(step).samples // 64).tolist())) for step in range(plan.steps_per_epoch)
    ]
    assert max(touched) <= 3 * (4 + 2)  # a window's blocks, two of them in part; three windows
    assert np.mean(touched) < 2 * (4 + 2)


@PROPERTY
@given(SEEDS, st.integers(1, 300))
def test_permutations(seed: int, size: int) -> None:
    keys = np.random.default_rng(seed).integers(2**64, size=(ROUNDS, 1), dtype=np.uint64)
    assert sorted(permute(np.arange(size), size, keys).tolist()) == list(range(size))


def test_several_permutations_at_once_are_each_their_own() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 10**6, 64)
    keys = rng.integers(2**64, size=(ROUNDS, 64), dtype=np.uint64)
    index = rng.integers(sizes)
    together = permute(index, sizes, keys)
    alone = [permute(index[[n]], int(sizes[n]), keys[:, [n]])[0] for n in range(64)]
    assert together.tolist() == alone


def test_a_billion_samples_need_no_memory() -> None:
    counts = [10**9 // 50] * 50
    tracemalloc.start()
    try:
        plan = Plan(0, counts, 1024)
        for step in (0, plan.steps_per_epoch // 2, 7 * plan.steps_per_epoch - 1):
            batch = plan.batch(step)
            assert set((batch.samples // counts[0]).tolist()) == {batch.bucket}
            assert len(set(batch.samples.tolist())) == 1024
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_refuses_data_that_fill_no_batch() -> None:
    with pytest.raises(InputError, match="no bucket holds more than 7"):
        Plan(0, [3, 7], 8)
    with pytest.raises(InputError, match="more than 0"):
        Plan(0, [], 1)


@PROPERTY
@given(
    st.integers(1, 8),
    st.none() | st.integers(1, 8),
    st.integers(1, 4),
    st.integers(0, 10**9),
)
def test_the_processes_share_a_batch(
    processes: int, micro_batch_size: int | None, times: int, first: int
) -> None:
    size = processes * (micro_batch_size or 1) * times
    samples = np.arange(first, first + size)
    parts = []
    for rank in range(processes):
        share = Share(rank, processes, micro_batch_size)
        share.check(size)
        parts.append(share.split(samples))
        assert parts[-1] == share.split(range(first, first + size))
    lengths = {len(piece) for part in parts for piece in part}
    assert lengths == {micro_batch_size or times}
    joined = [sample for part in parts for piece in part for sample in piece]
    assert sorted(joined) == samples.tolist()
    alone = Share().split(samples)
    assert alone == [samples.tolist()]


@pytest.mark.parametrize(
    ("share", "batch_size", "even"),
    [
        (Share(0, 2), 6, True),
        (Share(0, 4), 6, False),
        (Share(0, 2, 3), 12, True),
        (Share(0, 2, 3), 8, False),
        (Share(0, 2, 3), 3, False),
    ],
)
def test_uneven_shares_are_refused(share: Share, batch_size: int, even: bool) -> None:
    expected = nullcontext() if even else pytest.raises(InputError, match="choose a multiple of")
    with expected:
        share.check(batch_size)


@PROPERTY
@given(SEEDS, st.integers(0, 99), st.integers(2, 40), st.integers(0, 1000), st.data())
def test_each_attempt_finds_another_substitute(
    seed: int, epoch: int, count: int, first: int, data: st.DataObject
) -> None:
    sample = data.draw(st.integers(first, first + count - 1))
    found = [substitute(seed, epoch, sample, attempt, first, count) for attempt in range(count - 1)]
    assert sorted([sample, *found]) == list(range(first, first + count))
    with pytest.raises(InputError, match="can be read"):
        substitute(seed, epoch, sample, count - 1, first, count)


def test_substitutes_differ_between_epochs() -> None:
    assert len({substitute(0, epoch, 5, 0, 0, 1000) for epoch in range(50)}) > 40


def test_the_order_is_what_it_was_when_runs_began_with_it() -> None:
    """A checkpoint says how many steps were taken, not which samples: the order never changes."""
    plan = Plan(7, [21, 34, 13], 4, 5, 2)
    taken = {step: plan.batch(step) for step in (0, 1, 16, 10**6)}
    assert {step: (b.epoch, b.bucket, b.samples.tolist()) for step, b in taken.items()} == {
        0: (0, 2, [56, 58, 59, 62]),
        1: (0, 0, [13, 14, 20, 11]),
        16: (1, 1, [31, 36, 30, 38]),
        10**6: (62500, 0, [8, 3, 10, 15]),
    }
    assert [substitute(7, 2, 5, attempt, 0, 50) for attempt in (1, 2, 3)] == [24, 8, 15]
