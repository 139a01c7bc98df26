"""The latent cache: what is written is read back, and nothing that is not whole."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.data import cache
from latentdiff.data.cache import CacheKey, LatentCache, Records
from latentdiff.errors import InputError

KEY = CacheKey(
    encoder="a" * 64,
    tokenizer="b" * 64,
    source="c" * 64,
    precision="no",
    count=7,
    shard_size=3,
    latent_shape=(2, 4, 5),
    tokens=6,
)
NEVER_LOADED: list[str] = []


def records(samples: range, key: CacheKey = KEY) -> Records:
    """A function of the samples' numbers, different in every value."""
    rng = [np.random.default_rng(sample) for sample in samples]
    return Records(
        np.stack([r.normal(size=key.latent_shape) for r in rng]).astype(np.float16),
        np.stack([r.normal(size=key.latent_shape) for r in rng]).astype(np.float16),
        np.stack([r.integers(0, 50_000, key.tokens) for r in rng]).astype(np.int32),
        [f"caption {sample}: ein Füchschen 🦊" for sample in samples],
    )


def write(directory: Path, key: CacheKey = KEY) -> None:
    """What training.cache_latents does; killed anywhere, it can be called again."""
    cache.prepare(directory, key)
    for number in cache.missing_shards(directory, key):
        cache.write_shard(directory, number, records(key.samples(number), key))
    cache.finish(directory, key)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "latents"
    write(path)
    return path


def check_whole(directory: Path, key: CacheKey = KEY, order: list[int] | None = None) -> None:
    latents = LatentCache(directory)
    order = list(range(key.count)) if order is None else order
    assert len(latents) == key.count
    assert latents.key == key
    mean, logvar, ids = latents.read(order)
    assert (mean.dtype, logvar.dtype, ids.dtype) == (torch.float32, torch.float32, torch.int64)
    for row, sample in enumerate(order):
        expected = records(range(sample, sample + 1), key)
        np.testing.assert_array_equal(mean[row], expected.mean[0])
        np.testing.assert_array_equal(logvar[row], expected.logvar[0])
        np.testing.assert_array_equal(ids[row], expected.ids[0])
    assert latents.captions() == records(range(key.count), key).captions


# Round trip


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(1, 25), st.data())
def test_any_samples_in_any_order_come_back(
    tmp_path_factory: pytest.TempPathFactory, count: int, shard_size: int, data: st.DataObject
) -> None:
    key = dataclasses.replace(KEY, count=count, shard_size=shard_size)
    path = tmp_path_factory.mktemp("latents")
    write(path, key)
    order = st.lists(st.integers(0, count - 1), min_size=1, max_size=30)
    check_whole(path, key, data.draw(order))


def test_shards_part_the_samples() -> None:
    assert [list(KEY.samples(n)) for n in range(KEY.shards)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_the_index_finds_every_sample(directory: Path) -> None:
    rows = pq.read_table(directory / cache.INDEX).to_pylist()
    assert [row["key"] for row in rows] == list(range(KEY.count))
    for row in rows:
        moments = np.load(directory / f"shard-{row['shard']:05d}.moments.npy")
        np.testing.assert_array_equal(
            moments[row["row"], 0], records(range(row["key"], row["key"] + 1)).mean[0]
        )


@pytest.mark.parametrize("sample", [-1, 7])
def test_samples_outside_are_refused(directory: Path, sample: int) -> None:
    with pytest.raises(IndexError, match="samples 0 to 6"):
        LatentCache(directory).read([0, sample])


# Keys


def test_the_same_key_is_accepted_again(directory: Path) -> None:
    write(directory)
    check_whole(directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder": "d" * 64},
        {"tokenizer": "d" * 64, "tokens": 5},
        {"source": "d" * 64, "count": 8, "shard_size": 2},
        {"latent_shape": (2, 5, 4)},
    ],
)
def test_another_key_is_refused_with_what_differs(directory: Path, changes: dict[str, Any]) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    names = ", ".join(sorted(changes))
    with pytest.raises(InputError, match=f"holds a cache with another {names}; delete it"):
        cache.prepare(directory, dataclasses.replace(KEY, **changes))
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"encoder": "aa', b"\xff\xfe"])
def test_a_damaged_key_is_refused(directory: Path, content: bytes) -> None:
    (directory / "key.json").write_bytes(content)
    with pytest.raises(InputError, match=r"key\.json is missing or damaged"):
        cache.prepare(directory, KEY)


# What is missing or damaged


def test_a_directory_without_a_finished_cache_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match=r"no finished latent cache; run training"):
            LatentCache(path)


def test_a_cache_cannot_be_finished_while_shards_are_missing(tmp_path: Path) -> None:
    cache.prepare(tmp_path, KEY)
    cache.write_shard(tmp_path, 1, records(KEY.samples(1)))
    assert cache.missing_shards(tmp_path, KEY) == [0, 2]
    with pytest.raises(InputError, match="lacks 2 of 3 shards; run again"):
        cache.finish(tmp_path, KEY)
    with pytest.raises(InputError, match="no finished latent cache"):
        LatentCache(tmp_path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scribble(path: Path) -> None:
    path.write_bytes(b"{'descr" + path.read_bytes()[7:])


def one_row_less(path: Path) -> None:
    if path.suffix == ".npy":
        np.save(path, np.load(path)[:-1])
    else:
        pq.write_table(pq.read_table(path).slice(1), path)


def another_type(path: Path) -> None:
    if path.suffix == ".npy":
        np.save(path, np.load(path).astype(np.float64))
    else:
        pq.write_table(pa.table({"text": ["a", "b", "c"]}), path)


DAMAGES = pytest.mark.parametrize(
    "damage", [Path.unlink, truncate, empty, scribble, one_row_less, another_type]
)


@DAMAGES
@pytest.mark.parametrize("part", ["moments.npy", "ids.npy"])
def test_a_damaged_shard_is_refused_and_the_others_read(
    directory: Path, part: str, damage: Callable[[Path], None]
) -> None:
    damage(directory / f"shard-00001.{part}")
    latents = LatentCache(directory)
    latents.read([0, 2, 6])
    with pytest.raises(InputError, match=rf"shard-00001\.{part} is missing or damaged") as error:
        latents.read([0, 4])
    assert "shard-00001.* and run training.cache_latents again" in str(error.value)


@DAMAGES
@pytest.mark.parametrize("part", ["moments.npy", "ids.npy", "captions.parquet"])
def test_a_damaged_shard_is_not_finished_and_can_be_made_again(
    tmp_path: Path, part: str, damage: Callable[[Path], None]
) -> None:
    cache.prepare(tmp_path, KEY)
    for number in range(KEY.shards):
        cache.write_shard(tmp_path, number, records(KEY.samples(number)))
    damage(tmp_path / f"shard-00000.{part}")
    with pytest.raises(InputError, match=r"missing or damaged|lacks 1 of 3 shards"):
        cache.finish(tmp_path, KEY)
    assert not (tmp_path / cache.MANIFEST).exists()
    for path in tmp_path.glob("shard-00000.*"):
        path.unlink()
    write(tmp_path)
    check_whole(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"latent_shape": [1, 2, 3]}', b'{"la'])
def test_a_damaged_manifest_is_refused(directory: Path, content: bytes) -> None:
    (directory / cache.MANIFEST).write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json is missing or damaged"):
        LatentCache(directory)


@pytest.mark.parametrize("damage", [Path.unlink, truncate, empty])
def test_a_damaged_index_is_refused(directory: Path, damage: Callable[[Path], None]) -> None:
    damage(directory / cache.INDEX)
    with pytest.raises(InputError, match=r"index\.parquet is missing or damaged"):
        LatentCache(directory).captions()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return NEVER_LOADED.append, ("unpickled",)


@pytest.mark.parametrize("part", ["moments.npy", "ids.npy"])
def test_pickles_are_refused_unread(directory: Path, part: str) -> None:
    path = directory / f"shard-00000.{part}"
    objects = np.empty(3, dtype=object)
    objects[:] = [Bomb(), Bomb(), Bomb()]
    for store in (lambda: np.save(path, objects), lambda: path.write_bytes(pickle.dumps(Bomb()))):
        store()
        with pytest.raises(InputError, match="missing or damaged"):
            LatentCache(directory).read([0])
    assert NEVER_LOADED == []


def test_objects_are_not_written(tmp_path: Path) -> None:
    cache.prepare(tmp_path, KEY)
    good = records(KEY.samples(0))
    bad = dataclasses.replace(good, ids=good.ids.astype(object))
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        cache.write_shard(tmp_path, 0, bad)
    assert 0 in cache.missing_shards(tmp_path, KEY)


# Interruptions


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_any_rename_nothing_looks_whole_and_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    real = os.replace
    renames = 1 + 3 * KEY.shards + 2
    for fatal in itertools.count():
        path, calls = tmp_path / str(fatal), itertools.count()

        def replace(
            source: Path,
            target: Path,
            fatal: int = fatal,
            calls: itertools.count[int] = calls,
        ) -> None:
            now = next(calls) == fatal
            if now and moment == "before":
                raise Killed
            real(source, target)
            if now:
                raise Killed

        monkeypatch.setattr(os, "replace", replace)
        try:
            write(path)
        except Killed:
            pass
        else:
            break
        finally:
            monkeypatch.setattr(os, "replace", real)

        if (fatal, moment) == (renames - 1, "after"):
            check_whole(path)
        else:
            with pytest.raises(InputError, match="no finished latent cache"):
                LatentCache(path)
            for number in set(range(KEY.shards)) - set(cache.missing_shards(path, KEY)):
                assert len(np.load(path / f"shard-{number:05d}.moments.npy")) == len(
                    KEY.samples(number)
                )
        write(path)
        check_whole(path)
        shutil.rmtree(path)
    assert fatal == renames


def test_half_a_file_is_never_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file appears by a rename, complete and already on the disk."""
    synced: set[int] = set()
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        real_sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    published: dict[str, bytes] = {}

    def replace(source: Path, target: Path) -> None:
        assert source.parent == target.parent
        assert os.stat(source).st_ino in synced
        published[target.name] = source.read_bytes()
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == published
    assert list(published)[-1] == cache.MANIFEST
    for number in range(KEY.shards):
        mine = [name for name in published if name.startswith(f"shard-{number:05d}")]
        assert mine[-1].endswith("captions.parquet")


def test_the_manifest_is_the_key(directory: Path) -> None:
    values = json.loads((directory / cache.MANIFEST).read_text())
    assert values == {**dataclasses.asdict(KEY), "latent_shape": [2, 4, 5]}
