"""Batches for the loop: which samples each step takes is decided outside, in the open."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from accelerate.utils import get_int_from_env
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from latentdiff.data.decode import UnreadableImage
from latentdiff.data.order import Plan, Share
from latentdiff.errors import InputError

T = TypeVar("T")

ATTEMPTS = 100
"""How many unreadable samples in a row are taken for bad data, and not for a disk that failed."""

Substitute = Callable[[int, int, int], int]
"""(epoch, sample, attempt) -> the sample that takes an unreadable one's place."""
Instead = Callable[[int, int], int]
"""(epoch, sample) -> the sample that is read for it."""
Report = Callable[[int, str], None]
"""Told the number of each sample that could not be read, and why."""


class StepOrder(NamedTuple):
    """What one process takes in one step: sample numbers of each of its micro-batches."""

    epoch: int
    micro_batches: list[list[int]]


class MicroBatch(NamedTuple):
    """Sample numbers and the samples themselves, collated."""

    epoch: int
    samples: list[int]
    """What was planned, and what noise is keyed by, whether or not another took its place."""
    data: Any


class StepDataset(Protocol):
    """Samples by number."""

    def __getitem__(self, index: int) -> Any: ...


def planned_orders(steps: range, plan: Plan, share: Share) -> Iterator[StepOrder]:
    """One process's part of each step of a plan."""
    for step in steps:
        batch = plan.batch(step)
        yield StepOrder(batch.epoch, share.split(batch.samples))


def endless_orders(steps: range, batch_size: int, share: Share) -> Iterator[StepOrder]:
    """The same of a data set without end, taken step by step."""
    for step in steps:
        samples = range(step * batch_size, (step + 1) * batch_size)
        yield StepOrder(0, share.split(samples))


class _MicroBatches(Dataset):  # type: ignore[type-arg]
    """(epoch, sample numbers) -> a micro-batch and what in it could not be read."""

    def __init__(
        self, samples: StepDataset, substitute: Substitute | None, instead: Instead | None
    ) -> None:
        self.samples, self.substitute, self.instead = samples, substitute, instead

    def __getitem__(self, order: tuple[int, list[int]]) -> tuple[MicroBatch, dict[int, str]]:
        epoch, numbers = order
        unreadable: dict[int, str] = {}
        data = default_collate([self.read(epoch, number, unreadable) for number in numbers])
        return MicroBatch(epoch, numbers, data), unreadable

    def read(self, epoch: int, number: int, unreadable: dict[int, str]) -> Any:
        taken = number if self.instead is None else self.instead(epoch, number)
        attempt = 0
        while True:
            try:
                return self.samples[taken]
            except UnreadableImage as error:
                unreadable[taken] = str(error)
                if self.substitute is None:
                    raise
                if attempt >= ATTEMPTS:
                    raise InputError(
                        f"None of {ATTEMPTS + 1} samples, {number} and those in its place, can be "
                        f"read (the last: {error}); look at the data's disk."
                    ) from None
            taken, attempt = self.substitute(epoch, number, attempt), attempt + 1


def _as_it_is(made: T) -> T:
    return made


def loader(
    samples: StepDataset,
    orders: Iterable[StepOrder],
    workers: int,
    substitute: Substitute | None = None,
    report: Report = lambda sample, reason: None,
    instead: Instead | None = None,
) -> Generator[list[MicroBatch], None, None]:
    """The micro-batches of each step, in order, made ahead by `workers` processes; 0 for this one.

    A sample that raises UnreadableImage is told to `report` and replaced by its substitute, the
    same whoever reads it; without `substitute` the error is raised. `instead`: which samples to
    read in the first place; each its own by default.
    """
    counts: deque[int] = deque()

    def pieces() -> Iterator[tuple[int, list[int]]]:
        for epoch, micro_batches in orders:
            counts.append(len(micro_batches))
            yield from ((epoch, numbers) for numbers in micro_batches)

    source = _MicroBatches(samples, substitute, instead)
    step: list[MicroBatch] = []
    made = DataLoader(
        source,
        batch_size=None,
        sampler=pieces(),
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),
    )
    for micro_batch, unreadable in made:
        for number, reason in unreadable.items():
            report(number, reason)
        step.append(micro_batch)
        if len(step) == counts[0]:
            counts.popleft()
            yield step
            step = []


def prefetch(batches: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """The same in the same order, made by a thread that keeps up to `depth` of them ready.

    What `batches` raises is raised here, in its place. Closing this generator ends the thread and
    then closes `batches`.
    """
    ready: queue.Queue[tuple[T, None] | tuple[None, BaseException]] = queue.Queue(depth)
    closed = threading.Event()

    def work() -> None:
        end: BaseException = StopIteration()
        try:
            iterator = iter(batches)
            try:
                for batch in iterator:
                    ready.put((batch, None))
                    if closed.is_set():
                        break
            finally:
                if isinstance(iterator, Generator):
                    iterator.close()
        except BaseException as error:
            end = error
        ready.put((None, end))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield batch  # type: ignore[misc]
    finally:
        closed.set()
        while thread.is_alive():  # it may wait to hand over what nobody takes any more
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.01)
        thread.join()


def launched() -> tuple[int, int]:
    """(rank, processes) as accelerate's launcher or MPI says, before the processes meet."""
    rank = get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"], 0)
    return rank, get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"], 1)


def to_network(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] -> float in [-1, 1], channels last."""
    images = images.to(device).to(torch.float32).div(127.5).sub(1)
    return images.contiguous(memory_format=torch.channels_last)
