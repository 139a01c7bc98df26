"""The order of samples, a pure function of the seed and the step.

Nothing is kept between batches and no permutation is ever laid out in memory: a batch a billion
samples into a run costs what the first one does.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentdiff.errors import InputError

ROUNDS = 8
"""Of the Feistel network that permutes."""
JITTER_BITS = 20
"""Of the fraction by which a batch moves within its bucket's even spacing."""


@dataclass(frozen=True)
class Batch:
    """The samples of one optimizer step over all processes, all of one bucket."""

    epoch: int
    bucket: int
    samples: np.ndarray
    """Numbers over all buckets, int64 [batch_size]."""


class Plan:
    """Which samples each step takes, by random access.

    Bucket b holds the `counts[b]` sample numbers after those of bucket b - 1. Each epoch takes
    every sample once, but for a remainder of each bucket that fills no batch, another one each
    epoch. A bucket with fewer samples than batch_size is never seen. Batches of all buckets are
    spread evenly over the epoch.

    So that reading stays local, an epoch permutes blocks of `block` consecutive samples, and then
    samples within windows of about `window` blocks: a batch reads from `window` places or so,
    however many samples there are.

    Raises InputError when no bucket fills a batch.
    """

    def __init__(
        self, seed: int, counts: Sequence[int], batch_size: int, block: int = 1024, window: int = 16
    ) -> None:
        self.seed, self.counts, self.batch_size = seed, tuple(counts), batch_size
        self.block, self.window = block, window
        self.offsets = (0, *itertools.accumulate(self.counts))
        """The first number of each bucket, and of none."""
        self.filled = [n for n, count in enumerate(self.counts) if count >= batch_size]
        if not self.filled:
            most = max(self.counts, default=0)
            raise InputError(
                f"batch_size is {batch_size}, but no bucket holds more than {most} samples; "
                f"choose at most {most} or use more data."
            )
        self.steps = [self.counts[bucket] // batch_size for bucket in self.filled]
        self.steps_per_epoch = sum(self.steps)

    def batch(self, step: int) -> Batch:
        """The batch of optimizer step `step`, counted from 0 over all epochs."""
        epoch, turn = divmod(step, self.steps_per_epoch)
        bucket, place = self._turn(epoch, turn)
        places = np.arange(place * self.batch_size, (place + 1) * self.batch_size)
        rows = self._rows(places, epoch, bucket)
        return Batch(epoch, bucket, rows + self.offsets[bucket])

    def _turn(self, epoch: int, turn: int) -> tuple[int, int]:
        """Bucket, and number within the bucket, of batch `turn` of an epoch.

        Batch k of a bucket with s of them has its turn at time (k + u) / s, with a keyed u in
        [0, 1). Before time t the buckets together have t * steps_per_epoch turns, give or take
        one each, so only the few that lie about `turn` need be put in order.
        """
        total, slack = self.steps_per_epoch, 2 * len(self.steps)
        first = [max(turn - slack, 0) * steps // total for steps in self.steps]
        last = [min(steps, -(-(turn + slack + 1) * steps // total)) for steps in self.steps]
        lengths = np.subtract(last, first)
        bucket = np.repeat(np.arange(len(self.steps)), lengths)
        number = np.arange(len(bucket)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        number += np.repeat(first, lengths)
        key = _keys("turn", self.seed, epoch)[0]
        drawn = _mix(_mix(number.astype(np.uint64) ^ key) + bucket.astype(np.uint64))
        # Exact up to the one division, which IEEE 754 rounds alike everywhere.
        jitter = (drawn >> (64 - JITTER_BITS)) / (1 << JITTER_BITS)
        time = (number + jitter) / np.asarray(self.steps)[bucket]
        chosen = np.lexsort((number, bucket, time))[turn - sum(first)]
        return self.filled[bucket[chosen]], int(number[chosen])

    def _rows(self, places: np.ndarray, epoch: int, bucket: int) -> np.ndarray:
        """Rows of a bucket, from 0, that stand at some places of its order."""
        count, block = self.counts[bucket], self.block
        name = (self.seed, epoch, bucket)

        # Begun anywhere and closed to a ring, an order has no place that prefers some rows.
        places = (places + int(_keys("ring", *name)[0]) % count) % count

        windows = -(-count // (self.window * block))
        window = ((places + 1) * windows - 1) // count
        start = window * count // windows
        size = (window + 1) * count // windows - start
        numbers, number = np.unique(window, return_inverse=True)
        keys = np.stack([_keys("window", *name, int(window)) for window in numbers], axis=1)
        places = start + permute(places - start, size, keys[:, number])

        # The last block may be a short one; the others are permuted about wherever it stands.
        whole, short = divmod(count, block)
        *_, drawn = keys = _keys("blocks", *name)
        begin = int(drawn) % (whole + 1) * block
        inside = (places >= begin) & (places < begin + short)
        shifted = np.where(places < begin, places, places - short)
        slots = np.where(inside, 0, shifted // block)
        rows = permute(slots, max(whole, 1), keys[:, None]) * block + shifted % block
        return np.where(inside, whole * block + places - begin, rows)


def permute(index: np.ndarray, size: int | np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where keyed permutations of range(size) take each index, int64 [B].

    The generalized Feistel network with cycle walking of Black & Rogaway (2002), "Ciphers with
    arbitrary finite domains": a number below a * b >= size is a pair of digits, each in turn moved
    by a function of the other; what leaves the range goes round again.

    index: int64 [B] in [0, size); size: one or [B]; keys: uint64 [ROUNDS, 1] or [ROUNDS, B].
    """
    size = np.broadcast_to(np.asarray(size), index.shape)
    keys = np.broadcast_to(keys, (len(keys), *index.shape))
    high = np.ceil(np.sqrt(size)).astype(np.uint64)
    bases = high, -(-size // high.astype(np.int64)).astype(np.uint64)
    result, outside = index.copy(), np.arange(len(index))
    while len(outside):
        a, b = (base[outside] for base in bases)
        digits = list(np.divmod(result[outside].astype(np.uint64), b))
        for number, key in enumerate(keys[:, outside]):
            side, base = number % 2, (a, b)[number % 2]
            moved = digits[side] + ((_mix(digits[1 - side] ^ key) >> 32) * base >> 32)
            digits[side] = np.where(moved < base, moved, moved - base)
        result[outside] = (digits[0] * b + digits[1]).astype(np.int64)
        outside = outside[result[outside] >= size[outside]]
    return result


def _mix(values: np.ndarray) -> np.ndarray:
    """A hash of 64-bit integers: the finalizer of SplitMix64 (Steele, Lea & Flood 2014)."""
    values = (values ^ (values >> 30)) * 0xBF58476D1CE4E5B9
    values = (values ^ (values >> 27)) * 0x94D049BB133111EB
    return values ^ (values >> 31)


def _keys(use: str, *numbers: int) -> np.ndarray:
    """uint64 [ROUNDS], a function of the names alone."""
    name = "|".join((use, *map(str, numbers))).encode()
    digest = hashlib.blake2b(name, digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def substitute(seed: int, epoch: int, sample: int, attempt: int, first: int, count: int) -> int:
    """The sample that takes an unreadable one's place.

    It is another of the bucket's numbers first .. first + count - 1, for each attempt (from 0) a
    new one. Raises InputError when there are no more.
    """
    others = count - 1
    if attempt >= others:
        raise InputError(
            f"None of the {count} samples of a bucket can be read; look at the data's files."
        )
    keys = _keys("substitute", seed, epoch, sample)[:, None]
    step = 1 + int(permute(np.array([attempt]), others, keys)[0])
    return first + (sample - first + step) % count


@dataclass(frozen=True)
class Share:
    """One process's part of every batch."""

    rank: int = 0
    processes: int = 1
    micro_batch_size: int | None = None
    """Samples of one forward pass; None for all of the part at once."""

    def split(self, samples: Sequence[int] | np.ndarray) -> list[list[int]]:
        """The micro-batches of this process: every `processes`-th sample, cut into pieces."""
        own: list[int] = np.asarray(samples)[self.rank :: self.processes].tolist()
        size = self.micro_batch_size or len(own)
        return [own[first : first + size] for first in range(0, len(own), max(size, 1))]

    def check(self, batch_size: int) -> None:
        """Raises InputError when the micro-batches of all processes would not be of one size."""
        together = self.processes * (self.micro_batch_size or 1)
        if batch_size % together:
            who = "1 process" if self.processes == 1 else f"{self.processes} processes"
            pieces = "" if self.micro_batch_size is None else f" in {self.micro_batch_size}s"
            raise InputError(
                f"batch_size is {batch_size}, which {who} cannot share evenly{pieces}; choose a "
                f"multiple of {together}, such as {math.ceil(batch_size / together) * together}."
            )
