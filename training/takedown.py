"""Pictures that are taken down: out of a run from its next epoch on, without a new cache."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch.distributed as dist
from pydantic import Field

from latentdiff.config import Config
from latentdiff.data.cache import INDEX
from latentdiff.data.locked import LockedSource
from latentdiff.data.lockfile import KEPT, read_batches
from latentdiff.data.order import Plan, substitute
from latentdiff.errors import InputError
from latentdiff.model_files import read_json, staged_file, write_json
from training.data import launched
from training.laion.lists import NAMES, Takedown, read_takedown
from training.latents import CachedLatents, Latents, LiveLatents

RECORD = "takedown.json"
"""Which samples are out from which epoch on, in the run directory;"""
HELD_OUT = "takedown_validation.json"
"""and which held-out samples are."""
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
    the record says so. Raises InputError when that is of other data, or nothing is left of a
    bucket.

    digest: of the data. record: the file that is kept of it. listed: None where there is no list.
    """

    def __init__(
        self, plan: Plan, digest: str, record: Path, listed: Iterable[int] | None = None
    ) -> None:
        self.plan, self.digest, self.record = plan, digest, record
        self.since = self._read()
        """Sample to the first epoch without it."""
        self.listed = None if listed is None else sorted(set(listed))
        self._check()

    def begin(self, step: int, write: bool = False) -> None:
        """A run goes on at this step: what is listed is out from the next epoch's beginning on.

        write: whether this process keeps the record, and says how many they are.
        """
        if self.listed is None:
            return
        epoch = -(-step // self.plan.steps_per_epoch)
        added = set(self.listed) - self.since.keys()
        self.since.update(dict.fromkeys(sorted(added), epoch))
        if write and added:
            values = {"latents": self.digest, "since": sorted(self.since.items())}
            with staged_file(self.record) as staged:
                write_json(values, staged)
        if write:
            print(self._told(len(added), epoch), flush=True)
        self.listed = None

    def _told(self, added: int, epoch: int) -> str:
        if not self.listed:
            return "takedown: the lists name none of this run's samples."
        earlier = len(self.listed or ()) - added
        told = (
            f"takedown: {added:,} samples are out from epoch {epoch} on" if added else "takedown:"
        )
        if earlier:
            told += f"{',' if added else ''} {earlier:,} are out since earlier"
        return f"{told}; {self.record} says which."

    def holds(self, epoch: int, sample: int) -> bool:
        """Whether the sample is out."""
        return self.since.get(sample, epoch + 1) <= epoch

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
        out = sorted({*self.since, *(self.listed or ())})
        for bucket in self.plan.filled:
            first, last = self.plan.offsets[bucket], self.plan.offsets[bucket + 1]
            if bisect.bisect_left(out, last) - bisect.bisect_left(out, first) == last - first:
                raise InputError(
                    f"All {last - first} samples of a bucket are taken down; make a new cache "
                    "without them, or with fewer buckets."
                )

    def _read(self) -> dict[int, int]:
        if not self.record.is_file():
            return {}
        values = read_json(self.record, MAX_RECORD_BYTES)
        try:
            since = {int(sample): int(epoch) for sample, epoch in values["since"]}
            digest = values["latents"]
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{self.record} is damaged; restore it or choose another run_dir."
            ) from None
        if digest != self.digest:
            raise InputError(
                f"{self.record} is of other data than this run's; choose another run_dir."
            )
        return since


def first_decides(make: Callable[[], Removal]) -> Removal:
    """What `make` gives the main process, in every process: a list may change while they read it.

    Raises its InputError in all of them.
    """
    made: list[Removal | InputError | None] = [None]
    if launched()[0] == 0:
        try:
            made = [make()]
        except InputError as error:
            made = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(made, src=0)
    (decided,) = made
    if isinstance(decided, InputError):
        raise decided
    assert decided is not None
    return decided


def listed_samples(config: TakedownConfig | None, latents: Latents) -> list[int] | None:
    """Numbers of the samples that are listed; None where there is no list.

    Raises InputError when a list or the lockfile cannot be read, or a list names pictures by what
    only a lockfile knows and there is none.
    """
    if config is None:
        return None
    listed, lockfile = read_takedown(config.lists), config.lockfile
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


def _digests(listed: Takedown, lockfile: Path | None) -> frozenset[str]:
    """sha256 of every listed picture, those of a lockfile by any of its names, and of those that
    are there in the place of a listed one.
    """
    found = set(listed.sha256)
    if lockfile is None:
        return frozenset(found)
    kept: set[str] = set()
    for table in read_batches(lockfile, (*NAMES, "duplicate_of")):
        rows = table.filter(pa.array(listed.holds(table)))
        found.update(rows["sha256"].drop_null().to_pylist())
        kept.update(rows["duplicate_of"].drop_null().to_pylist())
    keys = pa.array(list(kept), pa.string())
    for table in read_batches(lockfile, ("key", "sha256"), KEPT) if kept else ():
        rows = table.filter(pc.is_in(table["key"], value_set=keys))
        found.update(rows["sha256"].to_pylist())
    return frozenset(found)
