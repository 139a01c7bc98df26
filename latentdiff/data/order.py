"""The order of samples, a pure function of (seed, epoch)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of range(count), int64 [count]."""
    key = hashlib.blake2b(f"order|{seed}|{epoch}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big"))).permutation(count)


def step_orders(
    seed: int, count: int, batch_size: int, steps: range, rank: int, processes: int
) -> Iterator[tuple[int, list[int]]]:
    """(epoch, sample numbers) of this process at each step.

    Every epoch visits every sample once, but for the remainder that fills no batch. The batches of
    a step, joined over the ranks, do not depend on the number of processes.
    """
    per_epoch = count // batch_size
    known = -1
    order = np.empty(0, dtype=np.int64)
    for step in steps:
        epoch, place = divmod(step, per_epoch)
        if epoch != known:
            order, known = epoch_order(seed, epoch, count), epoch
        batch = order[place * batch_size : (place + 1) * batch_size]
        yield epoch, batch[rank::processes].tolist()
