"""How many pictures a second are downloaded from this machine itself: ours beside img2dataset's.

    python -m benchmarks.laion_download [--pictures 2000] [--threads 32]

One shard by one worker process each, in turn, from one server that has nothing to do but answer;
img2dataset decodes every picture, as we do, and keeps the files' bytes (resize_mode=no,
skip_reencode). Core seconds are the processor time of the worker and of its decoder, the decoder's
start included and the worker's imports not. Peak memory is the worker's and its decoder's together,
each at its own peak (VmHWM). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.generate import machine

if TYPE_CHECKING:
    from img2dataset.downloader import Downloader

SIZE = (768, 512)
SPAWN = multiprocessing.get_context("spawn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=32)
    arguments = parser.parse_args()
    data = picture()
    ours, theirs = SPAWN.Pipe()
    server = SPAWN.Process(target=serve, args=(data, theirs), daemon=True)
    server.start()
    host = f"127.0.0.1:{ours.recv()}"
    results = {
        name: compared(name, host, arguments.pictures, arguments.threads)
        for name in ("ours", "img2dataset")
    }
    server.terminate()
    about = {"bytes": len(data), "size": SIZE, "pictures": arguments.pictures}
    print(json.dumps({"machine": machine(), **about, "threads": arguments.threads, **results}))


def picture() -> bytes:
    """A JPEG as photographs are: smooth, with some noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=85)
    return file.getvalue()


def serve(data: bytes, port: Connection) -> None:
    """The same picture to everyone, from a process of its own."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
    answer = head.encode() + data

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
            writer.close()
        except (OSError, asyncio.IncompleteReadError):
            pass

    async def forever() -> None:
        server = await asyncio.start_server(one, "127.0.0.1", 0, backlog=512)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(forever())


def compared(name: str, host: str, pictures: int, threads: int) -> dict[str, float]:
    """One shard in a process of its own."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=run, args=(name, host, pictures, threads, theirs))
    process.start()
    theirs.close()
    result: dict[str, float] = ours.recv()
    process.join()
    return result


def run(name: str, host: str, pictures: int, threads: int, result: Connection) -> None:
    from training.laion.guarded import reader

    with tempfile.TemporaryDirectory() as folder:
        selected, images = Path(folder, "selected"), Path(folder, "images")
        selected.mkdir()
        (images / "_tmp").mkdir(parents=True)
        rows = {
            "url": [f"http://{host}/{number}.jpg" for number in range(pictures)],
            "caption": ["a picture"] * pictures,
        }
        pq.write_table(pa.table(rows), selected / "part-00000.parquet")
        source = reader(selected, ["url", "caption"], images, pictures, set())
        make = guarded if name == "ours" else bare
        worker = make(images, source.column_list, host, pictures, threads)
        (shard,) = source
        before, began = processor_seconds(), time.perf_counter()
        with children_watched() as children:
            worker.download_shard(shard)
        seconds, used = time.perf_counter() - began, processor_seconds() - before
        (stats,) = images.glob("*_stats.json")
        assert json.loads(stats.read_bytes())["successes"] == pictures
    peak = (high_water(os.getpid()) + sum(children.values())) / 1024
    result.send(
        {
            "images_per_second": round(pictures / seconds, 1),
            "images_per_core_second": round(pictures / used, 1),
            "peak_mib": round(peak),
        }
    )


@contextmanager
def children_watched() -> Iterator[dict[int, int]]:
    """The most memory that each child of this process had, in KiB, by process id."""
    peaks: dict[int, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            for stat in Path("/proc").glob("[0-9]*/stat"):
                try:
                    parent = int(stat.read_text().rpartition(")")[2].split()[1])
                    if parent == os.getpid():
                        pid = int(stat.parent.name)
                        peaks[pid] = high_water(pid)
                except (OSError, StopIteration):  # it has ended
                    pass

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def high_water(pid: int) -> int:
    """KiB. Raises OSError or StopIteration where the process has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def processor_seconds() -> float:
    """Of this process and those that it waited for."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in both)


def guarded(images: Path, columns: list[str], host: str, pictures: int, threads: int) -> Downloader:
    from training.laion.download import DownloadConfig
    from training.laion.guarded import GuardedDownloader

    config = DownloadConfig(
        threads=threads, shard_size=pictures, per_host=threads, local_hosts=(host,)
    )
    return GuardedDownloader(config, images, columns)


def bare(images: Path, columns: list[str], host: str, pictures: int, threads: int) -> Downloader:
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    return Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=Resizer(256, "no", False, skip_reencode=True),
        thread_count=threads,
        save_caption=True,
        extract_exif=False,
        output_folder=str(images),
        column_list=columns,
        timeout=10,
        number_sample_per_shard=pictures,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=["noai", "noimageai"],
    )


if __name__ == "__main__":
    main()
