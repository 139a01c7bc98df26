"""The latent cache: what is written is read back, and nothing that is not whole."""

from __future__ import annotations

import dataclasses
import errno
import io
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
from PIL import Image

from latentdiff.data import cache, scan
from latentdiff.data import store as store_module
from latentdiff.data.cache import CacheKey, LatentCache, Shard
from latentdiff.data.cache_files import (
    READABLE,
    ShardRecords,
    finish,
    is_whole,
    missing_shards,
    prepare,
    write_shard,
)
from latentdiff.data.decode import UnreadableImage
from latentdiff.data.images import ImageTextSource
from latentdiff.data.scan import Scan
from latentdiff.data.store import Store
from latentdiff.errors import InputError

SHAPES = ((16, 24), (16, 16), (24, 16))
KEY = CacheKey(
    encoder="a" * 64,
    tokenizers="b" * 64,
    source="c" * 64,
    count=9,
    preprocessing="Lanczos, centre crop",
    shapes=SHAPES,
    flip=False,
    precision="no",
    shard_size=2,
    channels=3,
    scale_factor=4,
    towers=2,
    tokens=6,
)
KINDS = "TSWSX?WSW"
"""Nine pictures: tall, square or wide; X without a header, ? damaged behind it."""
NEVER_LOADED: list[str] = []


class Pictures(ImageTextSource):
    """Pictures by their kinds."""

    def __init__(self, kinds: str = KINDS) -> None:
        self.kinds, self.digest = kinds, "c" * 64
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.kinds)

    def size(self, index: int) -> tuple[int, int]:
        self.asked.append(index)
        if self.kinds[index] == "X":
            raise UnreadableImage("unknown format")
        return {"T": (30, 50), "S": (50, 51), "?": (50, 51), "W": (51, 30)}[self.kinds[index]]

    def image(self, index: int) -> Image.Image:
        raise NotImplementedError

    def caption(self, index: int) -> str:
        return f"caption {index}: ein Füchschen 🦊"

    def raw(self, index: int) -> bytes | None:
        raise NotImplementedError


def record(row: int, key: CacheKey, bucket: int) -> dict[str, np.ndarray]:
    """A function of the picture's number in the source, different in every value."""
    rng = np.random.default_rng(row)
    return {
        name: rng.integers(-500, 500, shape).astype(dtype)
        for name, (dtype, shape) in key.record_shapes(bucket).items()
    }


def shard_records(source: Pictures, scanned: Scan, shard: Shard, key: CacheKey) -> ShardRecords:
    rows = scanned.rows(shard.bucket, shard.first, shard.last).tolist()
    readable = [row for row in rows if source.kinds[row] != "?"]
    records = [record(row, key, shard.bucket) for row in readable]
    arrays = {
        name: np.stack([each[name] for each in records])
        if records
        else np.empty((0, *shape), dtype)
        for name, (dtype, shape) in key.record_shapes(shard.bucket).items()
    }
    return ShardRecords(
        **arrays,
        source=rows,
        captions=[source.caption(row) for row in rows],
        cut=[row % 3 for row in rows],
        sha256=[f"{row:064x}" for row in rows],
        status=[READABLE if row in readable else "damaged" for row in rows],
    )


def write(url: Path | str, key: CacheKey = KEY, kinds: str = KINDS) -> None:
    """What training.cache_latents does; killed anywhere, it can be called again."""
    store, source = Store(url), Pictures(kinds)
    prepare(store, key)
    if not is_whole(store):
        scan.scan(source, store)
        scanned = Scan(source, store, key.shapes)
        shards = key.shards(scanned.counts)
        for number in missing_shards(store, len(shards)):
            write_shard(store, key, number, shard_records(source, scanned, shards[number], key))
        finish(store, key, scanned)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "latents"
    write(path)
    return path


def numbering(kinds: str) -> list[list[int]]:
    """The source's rows of each bucket, in sample order."""
    return [[row for row, kind in enumerate(kinds) if kind == shape] for shape in "TSW"]


def check_whole(latents: LatentCache, kinds: str = KINDS, key: CacheKey = KEY) -> None:
    expected = numbering(kinds)
    assert latents.key == key
    assert latents.counts == [len(rows) for rows in expected]
    assert len(latents) == sum(latents.counts)
    first = 0
    for bucket, rows in enumerate(expected):
        for flipped in (None, [bool(row % 2) for row in rows]) if rows else ():
            if flipped is not None and not key.flip:
                continue
            order = sorted(range(len(rows)), key=lambda place: place * 7 % 5)  # not in order
            mirrored = None if flipped is None else [flipped[place] for place in order]
            got = latents.read([first + place for place in order], mirrored)
            assert (got.mean.dtype, got.logvar.dtype) == (torch.float32, torch.float32)
            assert (got.ids.dtype, got.sizes.dtype) == (torch.int64, torch.int64)
            assert got.mean.shape[1:] == latents.latent_shapes[bucket]
            for n, place in enumerate(order):
                values = record(rows[place], key, bucket)
                view = 0 if mirrored is None else int(mirrored[n])
                np.testing.assert_array_equal(got.mean[n], values["moments"][view, 0])
                np.testing.assert_array_equal(got.logvar[n], values["moments"][view, 1])
                np.testing.assert_array_equal(got.ids[n], values["ids"])
                np.testing.assert_array_equal(got.sizes[n], values["sizes"])
        first += len(rows)
    source = Pictures(kinds)
    assert latents.captions() == [source.caption(row) for rows in expected for row in rows]


# Round trip


@settings(deadline=None, max_examples=20)
@given(st.text("TSWX?", min_size=1, max_size=25), st.integers(1, 9), st.booleans())
def test_every_sample_comes_back_under_its_number(
    tmp_path_factory: pytest.TempPathFactory, kinds: str, shard_size: int, flip: bool
) -> None:
    key = dataclasses.replace(KEY, count=len(kinds), shard_size=shard_size, flip=flip)
    path = tmp_path_factory.mktemp("latents")
    if set(kinds) <= {"X", "?"}:
        with pytest.raises(InputError, match=rf"none of {len(kinds)} pictures can be used"):
            write(path, key, kinds)
    else:
        write(path, key, kinds)
        latents = LatentCache(path)
        check_whole(latents, kinds, key)
        left_out = {"unknown format": kinds.count("X"), "damaged": kinds.count("?")}
        assert latents.unreadable == {name: count for name, count in left_out.items() if count}
        assert latents.cut == sum(row % 3 > 0 for rows in numbering(kinds) for row in rows)


def test_the_index_lists_every_picture_of_the_source(directory: Path) -> None:
    rows = {row["source"]: row for row in pq.read_table(directory / cache.INDEX).to_pylist()}
    assert sorted(rows) == list(range(len(KINDS)))
    samples = list(itertools.chain(*numbering(KINDS)))
    for number, kind in enumerate(KINDS):
        row = rows[number]
        expected = {"X": "unknown format", "?": "damaged"}.get(kind, READABLE)
        assert row["status"] == expected
        if kind in "X?":
            assert (row["key"], row["shard"], row["row"]) == (None, None, None)
            continue
        assert row["key"] == samples.index(number)
        assert (row["caption"], row["cut"]) == (Pictures().caption(number), number % 3)
        assert (row["sha256"], row["bucket"]) == (f"{number:064x}", "TSW".index(kind))
        arrays = safetensors(directory / f"shard-{row['shard']:06d}.safetensors")
        expected_record = record(number, KEY, row["bucket"])["moments"]
        np.testing.assert_array_equal(arrays["moments"][row["row"]], expected_record)


def safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def test_a_cache_at_a_url_is_read_through_a_local_copy(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/latents"
    write(url)
    latents = LatentCache(url, tmp_path / "copy")
    check_whole(latents)
    assert any((tmp_path / "copy").rglob("*.safetensors"))


@pytest.mark.parametrize("sample", [-1, 7])
def test_samples_outside_are_refused(directory: Path, sample: int) -> None:
    with pytest.raises(IndexError, match="samples 0 to 6"):
        LatentCache(directory).read([0, sample])


def test_samples_of_two_buckets_are_refused(directory: Path) -> None:
    with pytest.raises(ValueError, match="several buckets"):
        LatentCache(directory).read([0, 1])


def test_mirrored_samples_are_asked_of_a_cache_that_has_them(directory: Path) -> None:
    latents = LatentCache(directory)
    latents.read([1, 2], [False, False])
    with pytest.raises(InputError, match="make it with flip"):
        latents.read([1, 2], [False, True])


def test_opening_reads_the_manifest_alone(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name != cache.MANIFEST:
            path.unlink()
    latents = LatentCache(directory)
    assert (len(latents), latents.buckets) == (7, list(SHAPES))
    assert latents.latent_shapes == [(3, 6, 4), (3, 4, 4), (3, 4, 6)]


def test_a_cache_of_a_billion_records_opens_at_once(directory: Path) -> None:
    """From its manifest, which says in which shard each sample lies."""
    manifest = json.loads((directory / cache.MANIFEST).read_text())
    manifest["rows"] = [[4096] * 100_000, [4096, 1, 4095], [4096] * 144_000]
    (directory / cache.MANIFEST).write_text(json.dumps(manifest))
    latents = LatentCache(directory)
    assert latents.counts == [409_600_000, 8192, 589_824_000]
    for sample, shard in (
        (409_599_999, 99_999),
        (409_600_000 + 4096, 100_001),
        (409_600_000 + 4097, 100_002),
        (len(latents) - 4097, 244_001),
    ):
        with pytest.raises(InputError, match=rf"shard-{shard:06d}\.safetensors is missing"):
            latents.read([sample])


def test_only_so_many_shards_stay_open(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAPPED", 2)
    latents = LatentCache(directory)
    check_whole(latents)
    assert len(latents._mapped) == 2


def test_of_a_url_no_shard_is_mapped_that_the_local_copy_may_delete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cache, store_module):
        monkeypatch.setattr(module, "HELD", 3)
    url = f"memory://{tmp_path.name}/latents"
    write(url)
    latents = LatentCache(url, tmp_path / "copy", local_bytes=1)
    for samples in ([0], [1], [3], [0], [4], [6], [1, 3], [4, 6]):
        latents.read(samples)
        latents.captions()
        held = {path.name.partition(".")[2] for path in latents.store._copy._held}
        numbers = [latents._first[bucket] + shard for bucket, shard in latents._mapped]
        assert {f"shard-{number:06d}.safetensors" for number in numbers} <= held


# The scan of sizes


@settings(deadline=None, max_examples=20)
@given(st.text("TSWX", min_size=1, max_size=40), st.integers(1, 4), st.data())
def test_a_scan_parts_pictures_into_buckets(
    tmp_path_factory: pytest.TempPathFactory, kinds: str, processes: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "PART", 7)
        source, store = Pictures(kinds), Store(tmp_path_factory.mktemp("scan"))
        scan.scan(source, store, data.draw(st.integers(0, processes - 1)), processes)
        assert sorted(source.asked) == list(range(len(kinds)))
        source.asked.clear()
        scan.scan(source, store, 0, processes)  # nothing is left for another process
        assert source.asked == []
        scanned = Scan(source, store, SHAPES)
        expected = numbering(kinds)
        assert scanned.counts == [len(rows) for rows in expected]
        for bucket, rows in enumerate(expected):
            first = data.draw(st.integers(0, len(rows)))
            last = data.draw(st.integers(first, len(rows)))
            assert scanned.rows(bucket, first, last).tolist() == rows[first:last]
        bad = [(row, "unknown format") for row, kind in enumerate(kinds) if kind == "X"]
        assert list(scanned.unreadable()) == bad
        assert scanned.reasons().total() == len(bad)


def test_a_scan_keeps_nothing_of_a_disk_that_fails(tmp_path: Path) -> None:
    class Failing(Pictures):
        def size(self, index: int) -> tuple[int, int]:
            if index == 4:
                raise InputError("the disk")
            return super().size(index)

    with pytest.raises(InputError, match="the disk"):
        scan.scan(Failing(), Store(tmp_path))
    assert Store(tmp_path).names() == []


def test_a_scan_of_more_pictures_is_another_one(tmp_path: Path) -> None:
    """Scenes have one digest however many are asked for."""
    for count in (9, 5, 7):
        source = Pictures(KINDS[:count])
        scan.scan(source, Store(tmp_path))
        assert sum(Scan(source, Store(tmp_path), SHAPES).counts) == count - (count > 4)


@pytest.mark.parametrize("content", [b"nonsense", None])
def test_a_damaged_scan_is_named_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "copy"))
    store = Store(f"memory://{tmp_path.name}/latents-{content}")
    sink = io.BytesIO()
    pq.write_table(pa.table({"width": [1] * 9}), sink)
    store.write("scan-cccccccccccccccc-9-00000.parquet", content or sink.getvalue())
    with pytest.raises(InputError, match=rf"{store.url}/scan-c+-9-00000\.parquet is missing or da"):
        Scan(Pictures(), store, SHAPES)


# Keys


def test_the_same_key_is_accepted_again(directory: Path) -> None:
    before = contents(directory)
    write(directory)
    assert contents(directory) == before


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder": "d" * 64},
        {"tokens": 5, "towers": 1},
        {"count": 8, "shard_size": 3, "source": "d" * 64},
        {"flip": True, "shapes": ((16, 16),)},
    ],
)
def test_another_key_is_refused_with_what_differs(directory: Path, changes: dict[str, Any]) -> None:
    before = contents(directory)
    names = ", ".join(sorted(changes))
    with pytest.raises(InputError, match=f"holds a cache with another {names}; delete it"):
        prepare(Store(directory), dataclasses.replace(KEY, **changes))
    assert contents(directory) == before
    assert dataclasses.replace(KEY, **changes).digest != KEY.digest


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"encoder": "aa', b"\xff\xfe", b"[" * 9999])
def test_a_damaged_key_is_refused(directory: Path, content: bytes) -> None:
    (directory / cache.KEY).write_bytes(content)
    with pytest.raises(InputError, match=r"key\.json is missing or damaged"):
        prepare(Store(directory), KEY)


# What is missing or damaged


def test_a_directory_without_a_finished_cache_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match=r"no finished latent cache; run training"):
            LatentCache(path)


def test_a_cache_cannot_be_finished_while_shards_are_missing(tmp_path: Path) -> None:
    store, source = Store(tmp_path), Pictures()
    prepare(store, KEY)
    scan.scan(source, store)
    scanned = Scan(source, store, SHAPES)
    shards = KEY.shards(scanned.counts)
    assert shards == [
        Shard(0, 0, 1),
        Shard(1, 0, 2),
        Shard(1, 2, 4),
        Shard(2, 0, 2),
        Shard(2, 2, 3),
    ]
    write_shard(store, KEY, 1, shard_records(source, scanned, shards[1], KEY))
    assert missing_shards(store, len(shards)) == [0, 2, 3, 4]
    with pytest.raises(InputError, match="lacks 4 of 5 shards; run again"):
        finish(store, KEY, scanned)
    with pytest.raises(InputError, match="no finished latent cache"):
        LatentCache(tmp_path)


def test_too_many_unreadable_pictures_leave_it_unfinished(directory: Path) -> None:
    """Two of nine are: one that the scan found and one that did not decode."""
    (directory / cache.MANIFEST).unlink()
    store = Store(directory)
    scanned = Scan(Pictures(), store, SHAPES)
    words = r"2 of 9 pictures cannot be read \(1 damaged, 1 unknown format\), more than .*0\.2;"
    with pytest.raises(InputError, match=words):
        finish(store, KEY, scanned, max_unreadable=0.2)
    assert not (directory / cache.MANIFEST).exists()
    finish(store, KEY, scanned, max_unreadable=0.25)
    check_whole(LatentCache(directory))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scribble(path: Path) -> None:
    path.write_bytes(b"{'descr" + path.read_bytes()[7:])


def one_row_less(path: Path) -> None:
    rewrite(path, lambda values: values[:-1])


def another_type(path: Path) -> None:
    rewrite(path, lambda values: values.astype(np.float64))


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    from safetensors.numpy import save_file

    arrays = {name: change(values) for name, values in safetensors(path).items()}
    save_file(arrays, path, {"key": KEY.digest})


@pytest.mark.parametrize(
    "damage", [Path.unlink, truncate, empty, scribble, one_row_less, another_type]
)
def test_a_damaged_shard_is_refused_and_can_be_made_again(
    directory: Path, damage: Callable[[Path], None]
) -> None:
    before = contents(directory)
    damage(directory / "shard-000001.safetensors")
    latents = LatentCache(directory)
    latents.read([0])
    latents.read([3])
    words = r"shard-000001\.safetensors is missing or damaged; delete shard-000001\.\* and run"
    with pytest.raises(InputError, match=words):
        latents.read([3, 1])
    for path in directory.glob("shard-000001.*"):
        path.unlink()
    write(directory)
    assert contents(directory) == before
    check_whole(LatentCache(directory))


def test_a_damaged_shard_is_not_finished(directory: Path) -> None:
    (directory / cache.MANIFEST).unlink()
    truncate(directory / "shard-000001.safetensors")
    with pytest.raises(InputError, match=r"shard-000001\.safetensors is missing or damaged"):
        write(directory)


@pytest.mark.parametrize("name", ["shard-000003.parquet", cache.INDEX, cache.MANIFEST])
def test_what_a_finished_cache_lost_is_made_again(directory: Path, name: str) -> None:
    before = contents(directory)
    (directory / name).unlink()
    write(directory)
    assert contents(directory) == before


@pytest.mark.parametrize("error", [InputError("give it credentials"), OSError(errno.EIO, "disk")])
def test_what_keeps_a_file_from_being_fetched_is_not_called_damage(
    directory: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    latents = LatentCache(directory)

    def local(store: Store, name: str) -> Path:
        raise error

    monkeypatch.setattr(Store, "local", local)
    for read in (lambda: latents.read([0]), latents.captions):
        with pytest.raises(type(error), match=str(error.args[-1])):
            read()
    with pytest.raises(type(error), match=str(error.args[-1])):
        Scan(Pictures(), latents.store, SHAPES)


def test_a_disk_that_fails_is_not_called_damage(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    latents = LatentCache(directory)
    monkeypatch.setattr(np, "memmap", fails)
    monkeypatch.setattr(pq, "read_table", fails)
    for read in (lambda: latents.read([0]), latents.captions):
        with pytest.raises(OSError, match="Input/output"):
            read()


def test_a_shard_of_another_key_is_refused(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write(other, dataclasses.replace(KEY, encoder="d" * 64))
    name = "shard-000000.safetensors"
    shutil.copyfile(other / name, directory / name)
    with pytest.raises(InputError, match="missing or damaged"):
        LatentCache(directory).read([0])


def test_finishing_fetches_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    real = Store.local

    def local(store: Store, name: str) -> Path:
        fetched.append(name)
        return real(store, name)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Store, "local", local)
    write(f"memory://{tmp_path.name}/latents")
    assert fetched
    assert not [name for name in fetched if name.endswith(".safetensors")]


def test_of_two_that_begin_a_cache_at_once_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees no key, and the other's is written after its own."""
    other, real = dataclasses.replace(KEY, encoder="d" * 64), Store.write

    def write_first(store: Store, name: str, content: bytes) -> None:
        real(store, name, content)
        monkeypatch.setattr(Store, "write", real)
        (tmp_path / cache.KEY).unlink()
        prepare(store, other)

    monkeypatch.setattr(Store, "write", write_first)
    with pytest.raises(InputError, match="another encoder"):
        prepare(Store(tmp_path), KEY)


def test_a_damaged_table_is_not_finished(directory: Path) -> None:
    (directory / cache.MANIFEST).unlink()
    path = directory / "shard-000001.parquet"
    whole = path.read_bytes()
    for content in (b"", whole[:-1], table(pq.read_table(path).slice(1)), table(pa.table({}))):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"shard-000001\.parquet is missing or damaged"):
            write(directory)
    assert not (directory / cache.MANIFEST).exists()


def table(values: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(values, sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"key": {"shapes": [1]}, "rows": []}', b'{"la']
)
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


def test_pickles_are_refused_unread(directory: Path) -> None:
    path = directory / "shard-000000.safetensors"
    objects = io.BytesIO()
    np.save(objects, np.array([Bomb()], dtype=object))
    for content in (pickle.dumps(Bomb()), objects.getvalue()):
        path.write_bytes(content)
        with pytest.raises(InputError, match="missing or damaged"):
            LatentCache(directory).read([0])
    assert NEVER_LOADED == []


@pytest.mark.parametrize(
    "offsets", [[0, 10**15], [-64, 0], [10**15, 10**15 + 64], ["a", "b"], [0.5, 1.5], None, []]
)
def test_a_shards_header_cannot_point_outside(directory: Path, offsets: Any) -> None:
    path = directory / "shard-000000.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["moments"]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(InputError, match="missing or damaged"):
        LatentCache(directory).read([0])


# Interruptions


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_any_rename_nothing_looks_whole_and_the_same_command_continues(
    tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """To the same bytes."""
    real = os.replace
    renames = 1 + 1 + 2 * 5 + 2  # the key, the scan, the shards, index and manifest
    for fatal in itertools.count():
        path, calls = tmp_path / str(fatal), itertools.count()

        def replace(
            source: Path, target: Path, fatal: int = fatal, calls: itertools.count[int] = calls
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
        if (fatal, moment) != (renames - 1, "after"):
            with pytest.raises(InputError, match="no finished latent cache"):
                LatentCache(path)
        write(path)
        assert contents(path) == contents(directory)
        shutil.rmtree(path)
    assert fatal == renames
