"""Pictures that are taken down: out of a run from its next epoch on, without a new cache."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from latentdiff.config import Config
from latentdiff.data.cache import INDEX
from latentdiff.data.locked import LockedSource
from latentdiff.data.lockfile import read_batches
from latentdiff.data.order import Plan, substitute
from latentdiff.errors import InputError
from latentdiff.model_files import read_json, staged_file, write_json
from training.data import StepOrder
from training.laion.listed import NAMES, Listed, read_list
from training.latents import CachedLatents, Latents, LiveLatents

RECORD = "takedown.json"
"""Which samples are out from which epoch on, in the run directory."""
MAX_RECORD_BYTES = 256 << 20
BATCH = 1 << 16


class TakedownConfig(Config):
    """Pictures that must not be trained on."""

    lists: tuple[Path, ...] = Field(min_length=1)
    """Files with one sha256, key, sample_id, URL or domain a line."""
    lockfile: Path | None = None
    """Where the pictures are from: what is no sha256 is looked up there. Of live pictures it is
    their source by default."""


class Removal:
    """Samples that are out from an epoch on, each replaced by another of its bucket.

    What was taken down once stays out, and from the same epoch on however often the run is resumed:
    run_dir/takedown.json says so. Raises InputError when that is of other data, or nothing is left
    of a bucket.

    digest: of the data. run_dir: None where no record is kept.
    """

    def __init__(
        self, plan: Plan, digest: str, run_dir: Path | None, listed: Iterable[int] = ()
    ) -> None:
        self.plan, self.digest = plan, digest
        self.path = None if run_dir is None else run_dir / RECORD
        self.since = self._read()
        """Sample to the first epoch without it."""
        self.listed = sorted(set(listed) - self.since.keys())
        """Those that are not out yet."""
        self._check()

    def begin(self, step: int, write: bool = False) -> None:
        """A run goes on at this step: what is listed is out from the next epoch's beginning on.

        write: whether this process keeps the record.
        """
        epoch = -(-step // self.plan.steps_per_epoch)
        self.since.update(dict.fromkeys(self.listed, epoch))
        if write and self.listed and self.path is not None:
            values = {"latents": self.digest, "since": sorted(self.since.items())}
            with staged_file(self.path) as staged:
                write_json(values, staged)
        self.listed = []

    def holds(self, epoch: int, sample: int) -> bool:
        """Whether the sample is out."""
        return self.since.get(sample, epoch + 1) <= epoch

    def replaced(self, orders: Iterable[StepOrder]) -> Iterator[StepOrder]:
        """The same orders with others in the place of what is out."""
        for epoch, micro_batches in orders:
            yield StepOrder(
                epoch,
                [[self.instead(epoch, sample) for sample in batch] for batch in micro_batches],
            )

    def instead(self, epoch: int, sample: int) -> int:
        """The sample itself, or another of the bucket, the same in every process."""
        if not self.holds(epoch, sample):
            return sample
        return next(self.others(epoch, sample))

    def others(self, epoch: int, sample: int) -> Iterator[int]:
        """Other samples of the bucket that are not out, in a keyed order.

        Raises InputError when there are no more.
        """
        bucket = bisect.bisect_right(self.plan.offsets, sample) - 1
        first, count = self.plan.offsets[bucket], self.plan.counts[bucket]
        for attempt in itertools.count():
            other = substitute(self.plan.seed, epoch, sample, attempt, first, count)
            if not self.holds(epoch, other):
                yield other

    def _check(self) -> None:
        out = sorted({*self.since, *self.listed})
        for bucket in self.plan.filled:
            first, last = self.plan.offsets[bucket], self.plan.offsets[bucket + 1]
            if bisect.bisect_left(out, last) - bisect.bisect_left(out, first) == last - first:
                raise InputError(
                    f"All {last - first} samples of a bucket are taken down; make a new cache "
                    "without them, or with fewer buckets."
                )

    def _read(self) -> dict[int, int]:
        if self.path is None or not self.path.is_file():
            return {}
        values = read_json(self.path, MAX_RECORD_BYTES)
        try:
            since = {int(sample): int(epoch) for sample, epoch in values["since"]}
            digest = values["latents"]
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{self.path} is damaged; restore it or choose another run_dir."
            ) from None
        if digest != self.digest:
            raise InputError(
                f"{self.path} is of other data than this run's; choose another run_dir."
            )
        return since


def listed_samples(config: TakedownConfig | None, latents: Latents) -> list[int]:
    """Numbers of the samples that are listed.

    Raises InputError when a list or the lockfile cannot be read, or a list names pictures by what
    only a lockfile knows and there is none.
    """
    if config is None:
        return []
    listed, lockfile = read_list(config.lists), config.lockfile
    if isinstance(latents, LiveLatents):
        source = latents.images.source
        if not isinstance(source, LockedSource):
            raise InputError(
                "Live pictures can be taken down where their source is a lockfile; make one, or "
                "delete the files."
            )
        rows = source.holding(_digests(listed, lockfile or latents.config.source.path))
        numbers = range(len(latents.images))
        return [number for number in numbers if latents.images.source_row(number) in rows]
    assert isinstance(latents, CachedLatents)
    if lockfile is None and listed.needs_names:
        raise InputError(
            "The takedown list has keys, sample_ids, URLs or domains, which the cache does not "
            "know; set takedown.lockfile to the lockfile of its pictures."
        )
    digests = pa.array(sorted(_digests(listed, lockfile)), pa.string())
    found: list[int] = []
    with pq.ParquetFile(latents.cache.store.local(INDEX)) as index:
        for batch in index.iter_batches(BATCH, columns=["key", "sha256"]):
            chosen = pc.and_(pc.is_in(batch["sha256"], digests), pc.is_valid(batch["key"]))
            found += batch.filter(chosen)["key"].to_pylist()
    return found


def _digests(listed: Listed, lockfile: Path | None) -> frozenset[str]:
    """sha256 of every listed picture, those of a lockfile by any of its names."""
    found = set(listed.others.sha256)
    if lockfile is not None:
        for table in read_batches(lockfile, NAMES):
            rows = table.filter(pa.array(listed.holds(table)))
            found.update(digest for digest in rows["sha256"].to_pylist() if digest)
    return frozenset(found)
