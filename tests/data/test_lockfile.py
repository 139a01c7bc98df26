"""Lockfiles: the same rows make the same bytes, what contradicts itself is refused, and the
pictures that are kept come out of their tars as they went in.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from latentdiff.data import lockfile
from latentdiff.data.decode import UnreadableImage
from latentdiff.data.images import ImageTextSource, SourceConfig, open_source
from latentdiff.data.lockfile import (
    SCHEMA,
    check_lockfile,
    read_batches,
    read_info,
    read_rows,
    write_lockfile,
)
from latentdiff.errors import InputError


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 30 + number, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def kept(number: int, **changes: Any) -> dict[str, Any]:
    """A row whose picture is png(number)."""
    data = png(number)
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names) | {
        "key": f"{number:09d}",
        "sample_id": f"{number:016x}",
        "url": f"http://example.org/{number}.png",
        "sha256": hashlib.sha256(data).hexdigest(),
        "phash": f"{number:016x}",
        "status": "kept",
        "split": "validation" if number % 3 == 0 else "train",
        "opt_out": "allowed",
        "caption": f"caption {number}",
        "width": 30 + number,
        "height": 20,
        "bytes": len(data),
        "format": "PNG",
    }
    return row | changes


def lost(number: int, status: str = "404") -> dict[str, Any]:
    known = {name: kept(number)[name] for name in ("key", "sample_id", "url", "caption")}
    return dict.fromkeys(SCHEMA.names) | known | {"status": status}


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), SCHEMA)


def write(path: Path, *tables: pa.Table) -> lockfile.LockInfo:
    return write_lockfile(path, tables, "cats", "f" * 64, {"pyarrow": "1", "latentdiff": "2"})


# The file


def test_rows_come_back(tmp_path: Path) -> None:
    rows = [kept(0), lost(1), kept(2, split="train"), lost(3, "too small")]
    info = write(tmp_path / "lock.parquet", table(*rows))
    assert read_rows(tmp_path / "lock.parquet").to_pylist() == rows
    assert read_info(tmp_path / "lock.parquet") == info == check_lockfile(tmp_path / "lock.parquet")
    assert (info.name, info.rows, info.selected) == ("cats", 4, "f" * 64)
    some = read_rows(tmp_path / "lock.parquet", ["caption", "key"], "kept")
    assert some.to_pylist() == [
        {"caption": row["caption"], "key": row["key"]} for row in rows if row["status"] == "kept"
    ]
    assert len(read_rows(tmp_path / "lock.parquet", status="410")) == 0


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cuts=st.lists(st.integers(0, 12), max_size=4))
def test_bytes_do_not_depend_on_how_rows_come(
    cuts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lockfile, "ROW_GROUP", 5)
    whole = table(*[lost(number) if number % 4 == 1 else kept(number) for number in range(12)])
    ends = [0, *sorted(cuts), 12]
    write(tmp_path / "one", whole)
    pieces = [whole[first:last] for first, last in itertools.pairwise(ends)]
    write(tmp_path / "other", *pieces)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert [len(piece) for piece in read_batches(tmp_path / "one")] == [5, 5, 2]


def test_the_digest_is_of_key_sha256_status_split_and_caption(tmp_path: Path) -> None:
    def digest(**changes: Any) -> str:
        return write(tmp_path / "lock.parquet", table(kept(1, **changes))).digest

    before = digest()
    for name, value in [
        ("key", "000000007"),
        ("sha256", "0" * 64),
        ("split", "validation"),
        ("caption", "another"),
        ("caption", None),
    ]:
        assert digest(**{name: value}) != before
    assert digest(url="http://elsewhere.org", similarity=0.5, bucket="64x64") == before
    words = [[kept(1)[name] for name in ("key", "sha256", "status", "split", "caption")]]
    text = "".join(json.dumps(word) + "\n" for word in words)
    assert before == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([kept(1), kept(0)], "does not follow"),
        ([kept(1), kept(1)], "does not follow"),
        ([kept(0), kept(1, key="0000000001")], "differ in length"),
        ([kept(1, key="../../etc")], "no key"),
        ([kept(1, key=None)], "no key"),
        ([kept(1, key="9" * 19)], "no key"),
        ([kept(1, sha256=None)], "no sha256"),
        ([kept(1, opt_out=None)], "no opt_out"),
        ([kept(1, format=None)], "no format"),
        ([kept(1, split=None)], "no split"),
        ([kept(1, split="test")], "neither train nor validation"),
        ([kept(1, status="404")], "not kept has a split"),
        ([lost(1, status="duplicate: near")], "duplicate_of"),
        ([kept(1, duplicate_of="000000000")], "duplicate_of"),
        ([lost(1) | {"status": None}], "no status"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(
    rows: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "lock.parquet", table(*rows))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_changed_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "lock.parquet"
    write(path, table(*[kept(number) for number in range(9)]))
    metadata = pq.read_metadata(path).metadata[b"latentdiff"]
    changed = read_rows(path).set_column(9, "caption", pa.array(["another"] * 9))
    with pq.ParquetWriter(path, SCHEMA) as writer:
        writer.write_table(changed)
        writer.add_key_value_metadata({"latentdiff": metadata})
    with pytest.raises(InputError, match="damaged"):
        check_lockfile(path)


def test_damage_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "lock.parquet"
    write(path, table(*[kept(number) for number in range(9)]))
    whole = path.read_bytes()
    with pytest.raises(InputError, match="no lockfile at"):
        read_info(tmp_path / "none")
    path.write_bytes(whole[:-20])
    with pytest.raises(InputError, match="damaged"):
        read_info(path)
    flipped = bytearray(whole)
    flipped[60] ^= 0xFF
    path.write_bytes(flipped)
    with pytest.raises(InputError, match="damaged"):
        list(read_batches(path))
    pq.write_table(pa.table({"key": ["1"]}), path)
    with pytest.raises(InputError, match="no lockfile of this version"):
        read_info(path)
    pq.write_table(table(kept(0)), path)
    with pytest.raises(InputError, match="no lockfile of this version"):
        read_info(path)


# The source


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two tars of img2dataset's naming; of nine samples number 4 is lost."""
    (tmp_path / "images").mkdir()
    for shard, numbers in ((0, (2, 0, 1, 3)), (1, (5, 8, 6, 7))):
        with tarfile.open(tmp_path / "images" / f"{shard:05d}.tar", "w") as tar:
            for number in numbers:
                key = key_of(shard, number)
                for name, data in (
                    (f"{key}.jpg", png(number)),
                    (f"{key}.txt", b"what the tar says"),
                    (f"{key}.json", b"{}"),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    rows = [
        (lost if number == 4 else kept)(number) | {"key": key_of(number > 4, number)}
        for number in range(9)
    ]
    write(tmp_path / "lock.parquet", table(*rows))
    return tmp_path


def key_of(shard: int, number: int) -> str:
    return f"{shard:05d}{number:04d}"


def locked(directory: Path, **options: Any) -> ImageTextSource:
    path = directory / "lock.parquet"
    return open_source(SourceConfig(type="lockfile", path=path, **options))


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, [1, 2, 5, 7, 8]),
        ({"split": "validation"}, [0, 3, 6]),
        ({"count": 2}, [1, 2]),
        ({"count": 99}, [1, 2, 5, 7, 8]),
    ],
)
def test_kept_pictures_in_key_order(
    directory: Path, options: dict[str, Any], numbers: list[int]
) -> None:
    source = locked(directory, **options)
    assert len(source) == len(numbers)
    for index, number in enumerate(numbers):
        assert source.raw(index) == png(number)
        assert source.caption(index) == f"caption {number}"
        expected = Image.open(io.BytesIO(png(number)))
        assert source.size(index) == expected.size == source.image(index).size
        np.testing.assert_array_equal(np.asarray(source.image(index)), np.asarray(expected))


def test_the_source_goes_to_other_processes(directory: Path) -> None:
    source = locked(directory)
    source.raw(0)
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301
    assert [copy.raw(index) for index in range(5)] == [source.raw(index) for index in range(5)]


def test_the_digest_is_the_lockfiles_and_the_split(directory: Path) -> None:
    assert locked(directory).digest == locked(directory, count=2).digest
    assert locked(directory).digest != locked(directory, split="validation").digest
    before = locked(directory).digest
    rows = read_rows(directory / "lock.parquet").to_pylist()
    write(directory / "lock.parquet", table(*rows))
    assert locked(directory).digest == before
    rows[1]["caption"] = "another"
    write(directory / "lock.parquet", table(*rows))
    assert locked(directory).digest != before


def test_pictures_other_than_the_lockfiles_are_not_read(directory: Path) -> None:
    source = locked(directory)
    tar = directory / "images" / "00000.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(png(1)) + 50] ^= 1
    tar.write_bytes(content)
    with pytest.raises(UnreadableImage, match="damaged"):
        source.raw(0)
    assert source.raw(1) == png(2)
    (directory / "images" / "00001.tar").unlink()
    with pytest.raises(UnreadableImage, match="missing"):
        source.raw(2)


def test_a_picture_that_is_not_in_its_tar_is_missing(directory: Path) -> None:
    (directory / "images" / "00001.tar").write_bytes(
        (directory / "images" / "00000.tar").read_bytes()
    )
    with pytest.raises(UnreadableImage, match="missing"):
        locked(directory).raw(2)


@pytest.mark.parametrize("name", ["../../etc/passwd.jpg", "9999999999999999999.jpg"])
def test_tars_with_other_names_are_refused(directory: Path, name: str) -> None:
    with tarfile.open(directory / "images" / "00000.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(InputError, match=r"00000.tar is damaged"):
        locked(directory).raw(0)


def test_what_is_missing_is_said(directory: Path) -> None:
    with pytest.raises(ValidationError, match="train or validation"):
        locked(directory, split="test")
    only_train = read_rows(directory / "lock.parquet").to_pylist()[1:3]
    write(directory / "lock.parquet", table(*only_train))
    with pytest.raises(InputError, match="no samples in the split validation"):
        locked(directory, split="validation")
    for tar in (directory / "images").iterdir():
        tar.unlink()
    with pytest.raises(InputError, match="no tar files"):
        locked(directory)
    (directory / "lock.parquet").unlink()
    with pytest.raises(InputError, match="no files at"):
        locked(directory)
