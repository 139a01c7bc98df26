"""The step `download`: the selected pictures, fetched by img2dataset under our guards."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow.parquet as pq
from pydantic import Field, model_validator

from latentdiff.errors import InputError
from latentdiff.model_files import file_digest, read_json, staged_file, write_json
from training.alone import alone_in
from training.laion.decoder import InspectReason
from training.laion.fetch import FetchConfig, FetchReason
from training.laion.inspection import InspectConfig
from training.laion.workers import in_processes

REASONS: tuple[str, ...] = tuple(
    dict.fromkeys((*get_args(FetchReason), "hash mismatch", *get_args(InspectReason)))
)
"""Every error_message there is, each counted on its own."""
MAX_SHARDS = 100_000
"""As many as names of five digits can number."""
RECORD = "download.json"
"""Which selection images/ belongs to, beside it."""


class DownloadConfig(FetchConfig, InspectConfig):
    """How the selected pictures are downloaded."""

    distributor: Literal["multiprocessing", "pyspark", "ray"] = "multiprocessing"
    """Processes of this machine, or img2dataset's: pyspark joins the session that is there, ray the
    cluster of RAY_ADDRESS. Their machines share the directory, and have this checkout on
    PYTHONPATH."""
    processes: int = Field(default=1, gt=0)
    """Each downloads one shard at a time; as many as there are cores."""
    threads: int = Field(default=64, gt=0)
    """Of each process: files on their way at once. A process holds at most 3 x threads x max_bytes
    of them in memory: as many again that wait to be written, and a second copy of those that have
    just come."""
    decoders: int = Field(default=1, gt=0)
    """Decoding processes of each process, of decode_memory each at most."""
    shard_size: int = Field(default=10_000, gt=1)
    """Samples of each tar file."""
    subjob_size: int = Field(default=1000, gt=0)
    """Shards that pyspark is given at a time."""

    @model_validator(mode="after")
    def _reachable(self) -> DownloadConfig:
        if self.deadline < self.timeout:
            raise ValueError("deadline is for a whole try: not less than timeout")
        return self


def download(config: DownloadConfig, directory: Path) -> dict[str, int]:
    """Fetch what selected/ lists into images/, from where an earlier call was stopped.

    Returns how many samples there are by outcome, "success" and REASONS, and prints it. Raises
    InputError where nothing was selected, images/ is of another selection, another process is at
    work, img2dataset or its distributor is not installed, a worker was killed, or shards failed for
    good.
    """
    directory = directory.resolve()  # which workers need not be in
    selected, images = directory / "selected", directory / "images"
    parts = sorted(selected.glob("*.parquet"))
    if not parts or not (selected / "manifest.json").is_file():
        raise InputError(f"{selected} has no selection in it; run the step select first.")
    expected = _shards(parts, config.shard_size)
    with alone_in(directory):
        _check_record(config, directory)
        images.mkdir(exist_ok=True)
        shutil.rmtree(images / "_tmp", ignore_errors=True)
        missing = expected - _done(images)
        if missing:
            _run(config, parts[0], images, expected - missing)
            missing = expected - _done(images)
        if missing:
            raise InputError(
                f"{len(missing)} of {len(expected)} shards failed, for reasons that stand above; "
                "run the step again to go on."
            )
        counts = _counts(images, expected)
    _print(counts)
    return counts


def _run(config: DownloadConfig, part: Path, images: Path, done: set[int]) -> None:
    _check_installed(config.distributor)
    from training.laion.guarded import GuardedDownloader, reader

    columns = pq.read_schema(part).names
    (images / "_tmp").mkdir()
    source = reader(part.parent, columns, images, config.shard_size, done)
    worker = GuardedDownloader(config, images, source.column_list)
    with _logged(images, done):
        if config.distributor == "multiprocessing":
            in_processes(config.processes, worker, source)
        else:
            from img2dataset import distributor

            distribute = getattr(distributor, f"{config.distributor}_distributor")
            distribute(config.processes, worker, source, config.subjob_size, 1)
    shutil.rmtree(images / "_tmp", ignore_errors=True)


def _check_installed(distributor: str) -> None:
    if importlib.util.find_spec("img2dataset") is None:
        raise InputError(
            "img2dataset, which downloads, is not installed; pip install 'latentdiff[laion]'."
        )
    if distributor != "multiprocessing" and importlib.util.find_spec(distributor) is None:
        raise InputError(f"{distributor} is not installed; pip install {distributor}.")


@contextmanager
def _logged(images: Path, done: set[int]) -> Iterator[None]:
    """img2dataset's logger, which prints rates, in a thread: its process outlives a killed run."""
    from img2dataset.logger import LoggerProcess

    logger = LoggerProcess(str(images), False, None, {})
    logger.done_shards = done
    thread = threading.Thread(target=logger.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        logger.q.put("stop")
        thread.join()
        logger.q.close()


def _check_record(config: DownloadConfig, directory: Path) -> None:
    """Raises InputError where images/ was begun with another selection or in other shards."""
    manifest = file_digest(directory / "selected" / "manifest.json")
    record = {"selected": manifest, "shard_size": config.shard_size}
    path = directory / RECORD
    if path.exists() and read_json(path) != record:
        raise InputError(
            f"{directory / 'images'} was begun with another selection or shard_size; remove it and "
            f"{path} to download anew, or choose another directory."
        )
    with staged_file(path) as staging:
        write_json(record, staging)


def _shards(parts: list[Path], shard_size: int) -> set[int]:
    """The numbers of all shards, as img2dataset's reader gives them out. Raises InputError."""
    rows = [pq.read_metadata(part).num_rows for part in parts]
    count = sum(math.ceil(number / shard_size) for number in rows)
    if count > MAX_SHARDS:
        raise InputError(f"{count} shards are more than {MAX_SHARDS}; raise shard_size.")
    return set(range(count))


def _done(images: Path) -> set[int]:
    return {int(file.name.partition("_")[0]) for file in images.glob("*_stats.json")}


def _counts(images: Path, shards: set[int]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for shard in shards:
        stats: dict[str, Any] = json.loads((images / f"{shard:05d}_stats.json").read_bytes())
        total.update(stats["status_dict"])
    return {name: total[name] for name in ("success", *REASONS) if total[name]}


def _print(counts: dict[str, int]) -> None:
    total = sum(counts.values())
    print(f"{counts.get('success', 0):,} of {total:,} pictures are there. What became of all:")
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"  {name:<20} {count:>12,} {count / total:>7.2%}")
