"""img2dataset's downloader with our fetching and our decoding in place of its own.

Imports img2dataset, so import this module only where it is needed. Every process that a distributor
starts imports it too: on several machines this checkout must be on each one's PYTHONPATH.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

# albumentations asks the network for a newer version of itself as soon as it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from img2dataset.downloader import Downloader, compute_key
from img2dataset.logger import CappedCounter, write_stats
from img2dataset.reader import Reader
from img2dataset.writer import WebDatasetSampleWriter

from latentdiff.model_files import sync
from training.laion.fetch import Fetched, Fetcher
from training.laion.inspection import Inspected, Inspectors
from training.laion.politeness import shared
from training.laion.workers import in_turn

if TYPE_CHECKING:
    from training.laion.download import DownloadConfig

SHARD_DIGITS = 5
ENDING = "jpg"
"""Of every picture in a tar, as img2dataset does it; the column format has the true one."""
RESERVED = {"width": "meta_width", "height": "meta_height", "sha256": "meta_sha256"}
"""Columns of the selection that img2dataset uses for what it finds."""
ADDED = pa.schema(
    [
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("sha256", pa.string()),
        ("opt_out", pa.string()),
        ("http_status", pa.int32()),
        ("final_url", pa.string()),
        ("content_type", pa.string()),
        ("bytes", pa.int64()),
        ("format", pa.string()),
    ]
)
"""What a shard's table has besides the selection's columns: img2dataset's, then ours."""


def reader(
    parts: Path, columns: list[str], images: Path, shard_size: int, done: set[int]
) -> Reader:
    """img2dataset's reader of a selection: shards of it that are not done, in order."""
    return Reader(
        str(parts),
        input_format="parquet",
        url_col="url",
        caption_col="caption",
        verify_hash_col=None,
        verify_hash_type=None,
        save_additional_columns=[name for name in columns if name not in ("url", "caption")],
        number_sample_per_shard=shard_size,
        done_shards=done,
        tmp_path=str(images / "_tmp"),
    )


class GuardedDownloader(Downloader):
    """Downloads one shard when it is called with (number, feather file), in any process.

    A shard's files appear all at once, its _stats.json last; without that it is no shard.
    """

    def __init__(self, config: DownloadConfig, images: Path, columns: list[str]) -> None:
        super().__init__(
            sample_writer_class=WebDatasetSampleWriter,
            resizer=None,
            thread_count=config.threads,
            save_caption=True,
            extract_exif=False,
            output_folder=str(images),
            column_list=columns,
            timeout=config.timeout,
            number_sample_per_shard=config.shard_size,
            oom_shard_count=SHARD_DIGITS,
            compute_hash="sha256",
            verify_hash_type=None,
            encode_format=ENDING,
            retries=config.retries,
            user_agent_token=None,
            disallowed_header_directives=None,
        )
        self.config = config

    def download_shard(self, row: tuple[int, str]) -> None:
        """Raises whatever the disk or the decoders raise; the distributor tries once more."""
        began = time.time()
        shard, feather = row
        with pa.OSFile(feather) as file:
            table = pa.ipc.open_file(file).read_all()
        table = table.rename_columns([RESERVED.get(name, name) for name in table.column_names])
        with _staged(shard, Path(self.output_folder)) as staging:
            statuses, reasons = self._write(table, shard, str(staging))
            write_stats(
                str(staging),
                shard,
                table.num_rows,
                statuses["success"],
                statuses["failed_to_download"],
                statuses["failed_to_resize"],
                began,
                time.time(),
                CappedCounter.load(reasons),
                SHARD_DIGITS,
            )
        Path(feather).unlink(missing_ok=True)

    def _write(self, table: pa.Table, shard: int, folder: str) -> tuple[Counter[str], Counter[str]]:
        """One shard's tar and table; how often each status and each reason came up."""
        schema = pa.schema([*table.schema, *ADDED])
        writer = self.sample_writer_class(shard, folder, True, SHARD_DIGITS, schema, ENDING)
        statuses: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        config = self.config
        politeness = shared(
            config.processes,
            config.per_host,
            config.host_interval,
            config.max_retry_after,
            config.max_busy,
        )
        with (
            closing(writer),
            closing(Fetcher(config, self.thread_count, politeness)) as fetcher,
            closing(Inspectors(config, config.decoders)) as inspectors,
            ThreadPoolExecutor(self.thread_count) as pool,
        ):

            def work(numbered: tuple[int, dict[str, Any]]) -> tuple[bytes | None, dict[str, Any]]:
                number, row = numbered
                key = compute_key(
                    number, shard, math.ceil(math.log10(self.number_sample_per_shard)), SHARD_DIGITS
                )
                body, found = sample(row, fetcher, inspectors)
                return body, row | {"key": key} | found

            rows = enumerate(table.to_pylist())
            for body, meta in in_turn(pool, work, rows, limit=2 * self.thread_count):
                writer.write(body, meta["key"], meta["caption"], meta)
                statuses[meta["status"]] += 1
                reasons[meta["error_message"] or "success"] += 1
        return statuses, reasons


def sample(
    row: dict[str, Any], fetch: Callable[[str], Fetched], inspect: Callable[[bytes], Inspected]
) -> tuple[bytes | None, dict[str, Any]]:
    """One picture's file, None where there is none to keep, and the columns ADDED but its key."""
    fetched = fetch(row["url"] or "")
    reason: str | None = fetched.reason
    status = "failed_to_download"
    digest, inspected = None, Inspected(None)
    if reason is None:
        digest = hashlib.sha256(fetched.body).hexdigest()
        if row.get("meta_sha256") and row["meta_sha256"].lower() != digest:
            reason = "hash mismatch"
    if reason is None:
        inspected = inspect(fetched.body)
        reason = inspected.reason
        status = "failed_to_resize" if reason else "success"
    return None if reason else fetched.body, {
        "status": status,
        "error_message": reason,
        "width": inspected.width,
        "height": inspected.height,
        "original_width": inspected.width,
        "original_height": inspected.height,
        "sha256": digest,
        "opt_out": fetched.opt_out,
        "http_status": fetched.http_status,
        "final_url": fetched.final_url,
        "content_type": fetched.content_type,
        "bytes": len(fetched.body) if digest else None,
        "format": inspected.format,
    }


@contextmanager
def _staged(shard: int, images: Path) -> Iterator[Path]:
    """A folder whose files go to `images` when the block ends well, the statistics last."""
    name = f"{shard:0{SHARD_DIGITS}d}"
    staging = images / "_tmp" / f"{name}.{uuid.uuid4().hex}"
    staging.mkdir(parents=True)
    try:
        yield staging
        files = [staging / f"{name}{ending}" for ending in (".tar", ".parquet", "_stats.json")]
        for file in files:
            sync(file)
        for file in files:
            file.replace(images / file.name)
        sync(images)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
