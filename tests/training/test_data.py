"""Batches: the same samples however many processes and workers share them."""

from __future__ import annotations

import functools
import multiprocessing
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentdiff.data.decode import UnreadableImage
from latentdiff.data.order import Plan, Share, substitute
from latentdiff.errors import InputError
from training.data import (
    StepDataset,
    StepOrder,
    endless_orders,
    launched,
    loader,
    planned_orders,
    prefetch,
    to_network,
)


class Squares(StepDataset):
    """Sample n is {"value": n squared}, but for those that cannot be read."""

    def __init__(self, unreadable: frozenset[int] = frozenset()) -> None:
        self.unreadable = unreadable

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index in self.unreadable:
            raise UnreadableImage("damaged")
        return {"value": torch.tensor(index * index)}


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 5), st.integers(1, 9), st.integers(1, 9))
def test_the_ranks_share_data_without_end(
    first: int, steps: int, times: int, processes: int
) -> None:
    numbers, size = range(first, first + steps), times * processes
    taken = []
    parts = [endless_orders(numbers, size, Share(r, processes)) for r in range(processes)]
    for orders in zip(*parts, strict=True):
        assert all(epoch == 0 for epoch, _ in orders)
        taken += sorted(n for _, micro in orders for samples in micro for n in samples)
    assert taken == list(range(first * size, (first + steps) * size))


def test_the_ranks_share_a_plan() -> None:
    plan, steps = Plan(5, [30, 20], 6), range(3, 20)
    parts = [planned_orders(steps, plan, Share(rank, 2, 1)) for rank in range(2)]
    for step, *orders in zip(steps, *parts, strict=True):
        batch = plan.batch(step)
        assert [epoch for epoch, _ in orders] == [batch.epoch] * 2
        assert [[len(samples) for samples in micro] for _, micro in orders] == [[1, 1, 1]] * 2
        joined = [n for _, micro in orders for samples in micro for n in samples]
        assert sorted(joined) == sorted(batch.samples.tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_come_in_order_in_micro_batches(workers: int) -> None:
    orders = [
        StepOrder(0, [[3, 1], [2, 7]]),
        StepOrder(0, [[4, 1, 5]]),
        StepOrder(1, [[9], [8], [0]]),
    ]
    state = torch.get_rng_state()
    steps = list(loader(Squares(), iter(orders), workers))
    assert [
        StepOrder(micro[0].epoch, [batch.samples for batch in micro]) for micro in steps
    ] == orders
    for batch in (batch for micro in steps for batch in micro):
        assert batch.data["value"].tolist() == [number**2 for number in batch.samples]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_samples_are_replaced_and_told_of(workers: int) -> None:
    """The first substitute of 3 in epoch 1 cannot be read either."""
    again = substitute(0, 1, 3, 0, 0, 10)
    told: list[tuple[int, str]] = []
    steps = loader(
        Squares(frozenset({3, again})),
        [StepOrder(1, [[3, (again + 1) % 10 or 1]])],
        workers,
        functools.partial(_substitute, 10),
        lambda sample, reason: told.append((sample, reason)),
    )
    (micro,) = next(steps)
    assert micro.samples[0] == 3
    assert micro.data["value"][0] == substitute(0, 1, 3, 1, 0, 10) ** 2
    assert told == [(3, "damaged"), (again, "damaged")]


def test_closing_ends_the_workers() -> None:
    steps = loader(Squares(), (StepOrder(0, [[number]]) for number in range(10**6)), 1)
    assert next(steps)[0].samples == [0]
    assert multiprocessing.active_children()
    steps.close()
    assert not multiprocessing.active_children()


def _substitute(count: int, epoch: int, sample: int, attempt: int) -> int:
    return substitute(0, epoch, sample, attempt, 0, count)


def test_nothing_but_unreadable_samples_is_an_error() -> None:
    orders = [StepOrder(0, [[0]])]
    samples = Squares(frozenset(range(5)))
    with pytest.raises(InputError, match="None of the 5"):
        next(loader(samples, orders, 0, functools.partial(_substitute, 5)))
    with pytest.raises(UnreadableImage):
        next(loader(samples, orders, 0))


def test_a_disk_that_vanished_is_given_up_before_every_sample_was_tried() -> None:
    asked: list[int] = []

    class Vanished(StepDataset):
        def __getitem__(self, index: int) -> None:
            asked.append(index)
            raise UnreadableImage("missing")

    with pytest.raises(InputError, match=r"None of 101 samples.*\(the last: missing\)"):
        next(loader(Vanished(), [StepOrder(0, [[0]])], 0, functools.partial(_substitute, 10**6)))
    assert len(asked) == 101


@pytest.mark.parametrize("variables", ["RANK WORLD_SIZE", "PMI_RANK PMI_SIZE"])
def test_launchers_say_who_is_who(monkeypatch: pytest.MonkeyPatch, variables: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "PMI_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 1)
    for name, value in zip(variables.split(), ("3", "8"), strict=True):
        monkeypatch.setenv(name, value)
    assert launched() == (3, 8)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 20), st.integers(1, 5))
def test_prefetching_changes_nothing(count: int, depth: int) -> None:
    assert list(prefetch(range(count), depth)) == list(range(count))
    assert not threads()


def test_batches_are_made_ahead_up_to_the_depth() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    ahead = prefetch(source(), depth=3)
    assert next(ahead) == 0
    deadline = time.monotonic() + 30
    while len(made) < 5 and time.monotonic() < deadline:  # one taken, three ready, one in hand
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == list(range(5))
    ahead.close()


@pytest.mark.parametrize("taken", [1, 5])
def test_closing_ends_the_thread_and_closes_the_source(taken: int) -> None:
    closed: list[str] = []

    def endless() -> Iterator[int]:
        try:
            while True:
                yield len(closed)
        finally:
            closed.append(threading.current_thread().name)

    ahead = prefetch(endless(), depth=1)
    for _ in range(taken):
        next(ahead)
    ahead.close()
    assert not threads()
    assert closed == ["prefetch"]
    with pytest.raises(StopIteration):
        next(ahead)


def test_errors_come_after_the_batches_before_them() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise InputError("unreadable")

    ahead = prefetch(source())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(InputError, match="unreadable"):
        next(ahead)
    assert not threads()


def test_an_error_of_closing_is_raised_and_none_waits() -> None:
    class Source(Generator[int, None, None]):
        def send(self, value: None) -> int:
            raise StopIteration

        def throw(self, *error: Any) -> int:
            raise NotImplementedError

        def close(self) -> None:
            raise OSError("workers")

    with pytest.raises(OSError, match="workers"):
        next(prefetch(Source()))
    assert not threads()


def test_pictures_become_what_a_network_takes() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    images = to_network(levels, torch.device("cpu"))
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    expected = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
    assert (images.min(), images.max()) == (-1, 1)
