"""A selection against plain Python, run again, broken off and refused."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from latentdiff.errors import InputError
from training.laion import metadata, select, selection
from training.laion.columns import SCHEMA
from training.laion.distinct import Spill
from training.laion.select import SelectConfig
from training.laion.selection import read_manifest


def drawn(seed: int, count: int) -> list[dict[str, Any]]:
    """Rows in the schema of LAION-Aesthetics v2, one in four of them seen before."""
    rng = random.Random(seed)
    made: list[dict[str, Any]] = []
    for number in range(count):
        if made and rng.random() < 0.25:
            row = dict(rng.choice(made), similarity=rng.random())
        else:
            row = {
                "URL": f"https://host{number % 5}.example/{seed}/{number}.jpg",
                "TEXT": rng.choice([f"picture {number}", f"a fox, {number}"] * 4 + ["", None]),
                "WIDTH": rng.choice([None, *range(200, 1200, 100)]),
                "HEIGHT": rng.randrange(200, 1200),
                "similarity": rng.random(),
                "hash": rng.getrandbits(63),
                "punsafe": rng.random(),
                "pwatermark": rng.choice([None, *[rng.random()] * 5]),
                "AESTHETIC_SCORE": rng.uniform(3, 8),
            }
        made.append(row)
    return made


def write(rows: list[dict[str, Any]], path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def config(path: Path | str, /, **values: Any) -> SelectConfig:
    made = {"metadata": str(path), "acknowledge_withdrawn": True, "rows_per_part": 100}
    return SelectConfig.model_validate(made | values)


def identifier(row: dict[str, Any]) -> str:
    return hashlib.sha256(f"{row['URL']}\n{row['TEXT']}".encode()).hexdigest()[:16]


def chosen(directory: Path) -> list[dict[str, Any]]:
    """The rows of a selection, in the order of its parts."""
    parts = [part["name"] for part in read_manifest(directory)["parts"]]
    tables = [pq.read_table(directory / "selected" / name) for name in parts]
    assert all(table.schema == SCHEMA for table in tables)
    return pa.concat_tables(tables).to_pylist()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((directory / "selected").iterdir())}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """1,200 of them in meta/, in two files and many batches."""
    monkeypatch.setattr(metadata, "BATCH", 64)
    monkeypatch.setattr(selection, "ROW_GROUP", 32)
    made = drawn(0, 1200)
    write(made[:500], tmp_path / "meta" / "part-0.snappy.parquet", row_group_size=200)
    write(made[500:], tmp_path / "meta" / "part-1.snappy.parquet")
    (tmp_path / "meta" / ".part-0.snappy.parquet.crc").write_bytes(b"crc\0")
    (tmp_path / "meta" / "_SUCCESS").touch()
    write(drawn(1, 10), tmp_path / "meta" / "earlier" / "part-0.parquet")
    return made


def test_a_selection_is_what_plain_python_selects(
    rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filters = {"min_width": 500, "below_pwatermark": 0.8, "domains_denied": ["host3.example"]}
    manifest = select.select(config(tmp_path / "meta", filters=filters), tmp_path / "out")

    left, seen, expected = [len(rows)], set(), list(rows)
    for holds in (
        lambda row: row["WIDTH"] is not None and row["WIDTH"] >= 500,
        lambda row: (
            row["pwatermark"] is not None and np.float32(row["pwatermark"]) < np.float32(0.8)
        ),
        lambda row: True,
        lambda row: bool(row["TEXT"]),
        lambda row: "host3" not in row["URL"],
        lambda row: not (identifier(row) in seen or seen.add(identifier(row))),
    ):
        expected = [row for row in expected if holds(row)]
        left.append(len(expected))
    assert len(expected) > 200
    assert [line["left"] for line in manifest["funnel"]] == left
    found = chosen(tmp_path / "out")
    assert [row["sample_id"] for row in found] == [identifier(row) for row in expected]
    columns = {"URL": "url", "TEXT": "caption", "WIDTH": "width", "HEIGHT": "height"}
    for theirs, ours in columns.items():
        assert [row[ours] for row in found] == [row[theirs] for row in expected]
    scores = {"similarity": "similarity", "punsafe": "punsafe", "AESTHETIC_SCORE": "aesthetic_v2"}
    for theirs, ours in scores.items():
        assert [row[ours] for row in found] == [np.float32(row[theirs]) for row in expected]
    assert {row["aesthetic_v1"] for row in found} == {None}

    parts = manifest["parts"]
    assert [part["rows"] for part in parts[:-1]] == [100] * (len(parts) - 1)
    for part in parts:
        content = (tmp_path / "out" / "selected" / part["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (
            part["bytes"],
            part["sha256"],
        )
    assert [entry["name"] for entry in manifest["metadata"]] == [
        "part-0.snappy.parquet",
        "part-1.snappy.parquet",
    ]
    said = capsys.readouterr().out
    assert "2 files as laion_aesthetics_v2: url from URL, caption from TEXT" in said
    assert "aesthetic_v2 from AESTHETIC_SCORE" in said
    for line in manifest["funnel"]:
        assert line["filter"] in said
        assert f"{line['left']:,}" in said
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "selected"]


def test_run_again_it_does_nothing_and_elsewhere_it_makes_the_same_bytes(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    asked = config(tmp_path / "meta", preset="sd2_base", filters={"max_punsafe": 0.9})
    first = select.select(asked, tmp_path / "out")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "selected").iterdir()}
    assert select.select(asked, tmp_path / "out") == first
    assert {path: path.stat().st_mtime_ns for path in written} == written
    select.select(asked, tmp_path / "other")
    assert contents(tmp_path / "other") == contents(tmp_path / "out")
    assert first["config"]["filters"]["max_punsafe"] == 0.9
    assert first["config"]["filters"]["min_aesthetic_v2"] == 4.5
    assert "stable-diffusion-2-base" in first["preset"]["source"]


def test_what_changed_makes_it_anew_unless_pictures_are_there(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    gone = tmp_path / "gone.txt"
    gone.write_text("host1.example\n", encoding="utf-8")
    asked = config(tmp_path / "meta", filters={"takedown": [str(gone)]})
    first = select.select(asked, tmp_path / "out")
    gone.write_text("host1.example\nhost2.example\n", encoding="utf-8")
    second = select.select(asked, tmp_path / "out")
    assert second["digest"] != first["digest"]
    assert {row["url"].split("/")[2] for row in chosen(tmp_path / "out")} == {
        f"host{number}.example" for number in (0, 3, 4)
    }
    (tmp_path / "out" / "images").mkdir()
    (tmp_path / "out" / "images" / "00000.tar").touch()
    assert select.select(asked, tmp_path / "out") == second
    gone.write_text("host3.example\n", encoding="utf-8")
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match="pictures of another selection"):
        select.select(asked, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    shutil.rmtree(tmp_path / "out" / "selected")
    with pytest.raises(InputError, match="pictures of another selection"):
        select.select(asked, tmp_path / "out")  # nobody knows of which
    record = {"selected": hashlib.sha256(before["manifest.json"]).hexdigest()}
    (tmp_path / "out" / "download.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="pictures of another selection"):
        select.select(asked, tmp_path / "out")
    assert not (tmp_path / "out" / "selected").exists()
    gone.write_text("host1.example\nhost2.example\n", encoding="utf-8")
    select.select(asked, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_selection_that_lost_a_file_is_none(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    asked = config(tmp_path / "meta")
    select.select(asked, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "selected" / "part-00001.parquet").unlink()
    with pytest.raises(InputError, match="run select first"):
        read_manifest(tmp_path / "out")
    select.select(asked, tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("broken", ["sift", "repeated", "write_parts", "publish"])
def test_broken_off_anywhere_the_earlier_selection_stays(
    rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    select.select(config(tmp_path / "meta", share=0.5), tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / select.STAGING / "spill").mkdir(parents=True)  # of one that was killed
    (tmp_path / "out" / select.STAGING / "spill" / "rows.arrow").write_bytes(b"half")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner = {"sift": select.Sieve, "repeated": Spill}.get(broken, select)
        patch.setattr(owner, broken, stop)
        with pytest.raises(KeyboardInterrupt):
            select.select(config(tmp_path / "meta"), tmp_path / "out")
    assert contents(tmp_path / "out") == before
    select.select(config(tmp_path / "meta"), tmp_path / "out")
    assert len(chosen(tmp_path / "out")) > json.loads(before["manifest.json"])["rows"]
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "selected"]


@pytest.mark.parametrize("limit", [1, 99, 100, 101, 333, 10_000])
def test_a_limit_keeps_the_first_rows(
    rows: list[dict[str, Any]], tmp_path: Path, limit: int
) -> None:
    select.select(config(tmp_path / "meta"), tmp_path / "all")
    manifest = select.select(config(tmp_path / "meta", limit=limit), tmp_path / "some")
    everything = chosen(tmp_path / "all")
    assert chosen(tmp_path / "some") == everything[:limit]
    assert manifest["funnel"][-1]["left"] == manifest["rows"] == min(limit, len(everything))


def test_a_limit_stops_reading(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    late = tmp_path / "meta" / "part-1.snappy.parquet"
    content = bytearray(late.read_bytes())
    content[4:2000] = bytes(1996)  # its pages, not its footer
    late.write_bytes(content)
    assert select.select(config(tmp_path / "meta", limit=50), tmp_path / "some")["rows"] == 50
    with pytest.raises(InputError, match=r"part-1.*damaged"):
        select.select(config(tmp_path / "meta"), tmp_path / "all")
    assert not (tmp_path / "all" / "selected").exists()


def test_filters_on_what_no_row_has_are_refused_before_anything_is_read(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    asked = {"filters": {"min_aesthetic_v1": 5}}
    with pytest.raises(InputError, match=r'aesthetic_v1.*"aesthetic_v1 >= 5"'):
        select.select(config(tmp_path / "meta", **asked), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    manifest = select.select(config(tmp_path / "meta", **asked, missing="keep"), tmp_path / "out")
    (line,) = (line for line in manifest["funnel"] if "aesthetic_v1" in line["filter"])
    assert (line["taken"], line["unknown"], line["left"]) == (0, 1200, 1200)


def test_the_original_laion_5b_is_not_read_by_accident(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="withdrew in December 2023"):
        select.select(SelectConfig(metadata=(str(tmp_path / "meta"),)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_when_nothing_is_left_it_says_where_it_went(
    rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="No row is left"):
        select.select(config(tmp_path / "meta", filters={"min_side": 5000}), tmp_path / "out")
    assert "shorter side >= 5000" in capsys.readouterr().out
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_tables_of_text(tmp_path: Path, suffix: str, delimiter: str) -> None:
    table = pa.table(
        {
            "Url": ["http://a.example/1", "http://a.example/2", "http://a.example/3"],
            "Caption": ['NA, "quoted"\tand\nbroken', "", "null"],
            "width": ["0512", "x", ""],
        }
    )
    path = tmp_path / f"links.{suffix}"
    pa_csv.write_csv(table, path, pa_csv.WriteOptions(delimiter=delimiter))
    manifest = select.select(SelectConfig(metadata=(str(path),)), tmp_path / "out")
    found = [(row["url"][-1], row["caption"], row["width"]) for row in chosen(tmp_path / "out")]
    assert found == [("1", 'NA, "quoted"\tand\nbroken', 512), ("3", "null", None)]
    assert manifest["unusable"] == {"width": 1}
    assert manifest["metadata"][0]["family"] == "plain"


def test_metadata_at_a_url(
    rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    folder = f"/{tmp_path.name}"
    for path in (tmp_path / "meta").glob("*.parquet"):
        memory.pipe_file(f"{folder}/{path.name}", path.read_bytes())
    try:
        there = select.select(config(f"memory:/{folder}/*.parquet"), tmp_path / "there")
    finally:
        memory.rm(folder, recursive=True)
    here = select.select(config(tmp_path / "meta" / "*.parquet"), tmp_path / "here")
    assert there["digest"] == here["digest"]
    assert there["metadata"] == here["metadata"]


def test_what_is_no_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no files"):
        select.select(config(tmp_path / "nothing*.parquet"), tmp_path / "out")
    (tmp_path / "a.parquet").write_bytes(b"crc\0" * 100)
    with pytest.raises(InputError, match=r"a\.parquet is damaged or no table"):
        select.select(config(tmp_path / "a.parquet"), tmp_path / "out")
    with pytest.raises(InputError, match="cannot be read"):
        select.select(config("nosuch://bucket/a.parquet"), tmp_path / "out")
    with pytest.raises(ValidationError, match="text: none of url, caption"):
        config(tmp_path, columns={"text": "x"})


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 3)), max_size=30), max_size=4)
)
@settings(deadline=None, max_examples=12)
def test_only_the_first_row_of_each_id_is_distinct(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[tuple[int, int]]]
) -> None:
    schema = pa.schema([("id", pa.uint64()), ("row", pa.int64())])
    seen: dict[int, int] = {}
    total = 0
    with Spill(tmp_path_factory.mktemp("spill"), schema, "id") as spill:
        for batch in batches:
            ids = [(first << 56) + last for first, last in batch]
            numbers = range(total, total + len(ids))
            total += len(ids)
            columns = [pa.array(ids, pa.uint64()), pa.array(numbers, pa.int64())]
            spill.append(pa.RecordBatch.from_arrays(columns, schema=schema))
            for each, row in zip(ids, numbers, strict=True):
                seen.setdefault(each, row)
            assert spill.repeated()[1] == total - len(seen)
        found = [piece["row"].to_pylist() for piece in spill.distinct(spill.repeated()[0])]
        assert [row for piece in found for row in piece] == sorted(seen.values())
