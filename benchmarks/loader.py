"""How many images a second the loader alone gives, from a latent cache.

    python -m benchmarks.loader [--cache DIRECTORY_OR_URL] [--batch-size 64] [--seconds 10]

What training.diffusion needs before a network is called, in one process with the threads that torch
takes: the plan, the records (moments, token ids, sizes), and all that is drawn for them (posterior
sample, noise, timestep, dropped captions). Without --cache it writes one of Stable Diffusion 1.5's
shapes at 512 x 512 pixels, of random numbers, and reads it back from the system's memory. Prints
one JSON object of images per second.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.generate import machine
from latentdiff.data.cache import CacheKey, LatentCache, Records
from latentdiff.data.cache_files import READABLE, ShardRecords, finish, prepare, write_shard
from latentdiff.data.images import ImageTextSource
from latentdiff.data.order import Plan, Share
from latentdiff.data.scan import Scan, scan
from latentdiff.data.store import Store
from latentdiff.models.autoencoder import Posterior
from latentdiff.rng import keyed_normal, keyed_uniform
from training.data import StepOrder, planned_orders, prefetch

KEY = CacheKey(
    encoder="",
    tokenizers="",
    source="",
    count=2048,
    preprocessing="",
    shapes=((512, 512),),
    flip=False,
    precision="no",
    shard_size=512,
    channels=4,
    scale_factor=8,
    towers=1,
    tokens=77,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", help="a finished cache; a new one by default")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if arguments.cache is None:
            write_cache(directory)
        cache = LatentCache(arguments.cache or directory)
        size, seconds = arguments.batch_size, arguments.seconds
        results = {
            "machine": machine(),
            "latents": cache.latent_shapes,
            "batch_size": size,
            "plan": rate(orders(cache, size), size, seconds),
            "plan_and_read": rate(records(cache, size), size, seconds),
            "plan_read_and_draw": rate(drawn(cache, size), size, seconds),
            "the_same_prefetched": rate(prefetch(drawn(cache, size)), size, seconds),
        }
    print(json.dumps(results, indent=2))


def orders(cache: LatentCache, batch_size: int) -> Iterator[StepOrder]:
    return planned_orders(range(1 << 40), Plan(0, cache.counts, batch_size), Share())


def records(cache: LatentCache, batch_size: int) -> Iterator[tuple[int, list[int], Records]]:
    for epoch, (samples,) in orders(cache, batch_size):
        yield epoch, samples, cache.read(samples)


def drawn(cache: LatentCache, batch_size: int) -> Iterator[object]:
    """Everything that a step's loss is a function of, on the CPU."""
    for epoch, samples, batch in records(cache, batch_size):
        shape = tuple(batch.mean.shape[1:])
        posterior = Posterior(batch.mean, batch.logvar)
        x0 = posterior.sample(keyed_normal(0, "posterior", epoch, samples, shape))
        noise = keyed_normal(0, "noise", epoch, samples, shape)
        timestep = keyed_uniform(0, "timestep", epoch, samples)
        dropped = keyed_uniform(0, "caption", epoch, samples)
        yield x0, noise, timestep, dropped, batch.ids, batch.sizes


def rate(batches: Iterator[object], batch_size: int, seconds: float) -> float:
    """Images per second, the first batches left out."""
    for _ in itertools.islice(batches, 3):
        pass
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += 1
    return round(count * batch_size / (time.perf_counter() - start), 1)


class Unseen(ImageTextSource):
    """Pictures of one size that nobody looks at."""

    digest = "unseen"

    def __len__(self) -> int:
        return KEY.count

    def size(self, index: int) -> tuple[int, int]:
        return KEY.shapes[0]

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", KEY.shapes[0])

    def caption(self, index: int) -> str:
        return ""

    def raw(self, index: int) -> bytes | None:
        return None


def write_cache(directory: str | Path) -> None:
    store, source, rng = Store(directory), Unseen(), np.random.default_rng(0)
    prepare(store, KEY)
    scan(source, store)
    scanned = Scan(source, store, KEY.shapes)
    shapes = {name: shape for name, (_, shape) in KEY.record_shapes(0).items()}
    for number, shard in enumerate(KEY.shards(scanned.counts)):
        rows = list(range(shard.first, shard.last))
        made = ShardRecords(
            moments=rng.standard_normal((len(rows), *shapes["moments"]), np.float32).astype("f2"),
            ids=np.zeros((len(rows), *shapes["ids"]), np.int32),
            sizes=np.zeros((len(rows), *shapes["sizes"]), np.int32),
            source=rows,
            captions=[""] * len(rows),
            cut=[0] * len(rows),
            sha256=[None] * len(rows),
            status=[READABLE] * len(rows),
        )
        write_shard(store, KEY, number, made)
    finish(store, KEY, scanned)


if __name__ == "__main__":
    main()
