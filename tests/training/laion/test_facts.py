"""Facts are what counting one row after the other finds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentdiff.data.lockfile import SCHEMA
from latentdiff.errors import InputError
from tests.training.laion.lock_of import lock, row, rows
from training.laion import facts as facts_module
from training.laion.facts import SCORES, facts, hosts, words


def test_counts_are_those_of_the_rows(tmp_path: Path) -> None:
    content = rows(200)
    found, kept = facts(lock(tmp_path, content)), [r for r in content if r["status"] == "kept"]
    assert found["samples"] == 200
    assert found["status"] == Counter(r["status"] for r in content)
    about = found["kept"]
    assert about["samples"] == len(kept) == 150
    assert about["bytes"] == sum(r["bytes"] for r in kept)
    assert about["split"] == Counter(r["split"] for r in kept)
    assert about["format"] == Counter(r["format"] for r in kept)
    assert about["nsfw"] == {"unknown": 150}
    assert found["domains"] == 3
    assert about["domain"] == Counter(urlsplit(r["url"]).hostname for r in kept)
    for name in ("sha256", "status", "opt_out", *SCORES):
        assert about["carried"][name] == sum(r.get(name) is not None for r in kept)
    assert found["distinct_captions"] == len({r["caption"] for r in kept})


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 5000), st.integers(1, 5000), st.none() | st.floats(0, 1, width=32)
        ),
        min_size=1,
        max_size=40,
    )
)
def test_quantiles_are_values_in_their_place(tmp_path: Path, values: list[Any]) -> None:
    content = [
        row(number, width=width, height=height, punsafe=score)
        for number, (width, height, score) in enumerate(values)
    ]
    numbers = facts(lock(tmp_path, content))["numbers"]
    columns: dict[str, list[float]] = {
        "width": [width for width, _, _ in values],
        "shorter_side": [min(width, height) for width, height, _ in values],
        "aspect": [width / height for width, height, _ in values],
        "punsafe": [score for _, _, score in values if score is not None],
        "pwatermark": [],
    }
    for name, column in columns.items():
        about = numbers[name]
        assert about["samples"] == len(column)
        if column:
            assert about["minimum"] == pytest.approx(min(column), rel=1e-5)
            assert about["maximum"] == pytest.approx(max(column), rel=1e-5)
            below = sum(value < about["median"] * (1 - 1e-5) for value in column)
            above = sum(value > about["median"] * (1 + 1e-5) for value in column)
            assert max(below, above) <= (len(column) + 1) / 2
            bars = about["histogram"]
            assert sum(bars["counts"]) + bars["below"] + bars["above"] == len(column)


@given(st.lists(st.text("ab .,\n\t\u00a0é漢", max_size=20), min_size=1, max_size=20))
def test_words_are_parted_by_white_space(captions: list[str]) -> None:
    column = pa.chunked_array([pa.array(captions)])
    assert words(column).to_pylist() == [len(caption.split()) for caption in captions]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://Example.ORG/a.jpg?x=//b.example", "example.org"),
        ("http://a.example:8080/x", "a.example"),
        ("http://user@a.example/x@y", "a.example"),
        ("http://[2001:db8::1]:80/x", "[2001:db8::1]"),
        ("https://a.example?q", "a.example"),
        ("nonsense", "unknown"),
    ],
)
def test_hosts(url: str, host: str) -> None:
    assert hosts(pa.chunked_array([[url]])).to_pylist() == [host]


def test_what_crosses_the_split_is_counted(tmp_path: Path) -> None:
    content = [row(number, split="train" if number < 10 else "validation") for number in range(20)]
    clean = facts(lock(tmp_path, content))
    assert clean["in_both_splits"] == {"sha256": 0, "phash": 0}
    content[12]["sha256"], content[13]["phash"] = content[3]["sha256"], content[4]["phash"]
    near = int(content[4]["phash"], 16)
    content[14]["phash"], content[15]["phash"] = f"{near ^ 0x8001_0000_0001:016x}", "0" * 16
    content[5]["phash"] = f"{0x1001_0001_0001:016x}"  # four bits from it
    leaking = facts(lock(tmp_path, content))
    assert leaking["in_both_splits"] == {"sha256": 1, "phash": 2}
    assert leaking["distinct_pictures"] == 19


def test_of_names_without_number_the_commonest_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts_module, "NAMED", 3)
    names = ["a"] * 9 + ["b"] * 7 + ["c"] * 5 + ["d"] * 4 + ["e"] * 2
    urls = [f"https://{name}.example/{number}" for number, name in enumerate(names)]
    values = zip(names, urls, strict=True)
    content = [row(n, license=name, language=name, url=url) for n, (name, url) in enumerate(values)]
    found = facts(lock(tmp_path, content))
    expected = {"a": 9, "b": 7, "others": 6, "c": 5}
    for column in ("license", "language", "domain"):
        counts = found["kept"][column]
        assert {name.partition(".")[0]: count for name, count in counts.items()} == expected
    assert found["domains"] == 5
    counts = Counter(names)
    monkeypatch.setattr(facts_module, "COUNTED", 2)
    facts_module._bounded(counts)
    assert counts == {"a": 9, "b": 7, "others": 11}


def test_nothing_kept_has_no_numbers(tmp_path: Path) -> None:
    found = facts(lock(tmp_path, [row(number, "404") for number in range(3)]))
    assert found["kept"]["samples"] == 0
    assert found["numbers"]["width"] == {"samples": 0}
    assert found["in_both_splits"] == {"sha256": 0, "phash": 0}


def test_no_place_of_the_machine_is_in_them(tmp_path: Path) -> None:
    found = facts(lock(tmp_path, rows()))
    assert found["selection"]["metadata"] == [
        {"name": "part-0.parquet", "bytes": 123, "family": "laion_aesthetics_v2"}
    ]
    assert str(tmp_path) not in str(found)
    assert "somebody" not in str(found)


def test_they_are_a_function_of_the_files(tmp_path: Path) -> None:
    first, second = (facts(lock(tmp_path / each, rows())) for each in "ab")
    assert first == second


def test_the_selection_must_be_the_lockfiles(tmp_path: Path) -> None:
    directory = lock(tmp_path, rows())
    manifest = directory / "selected" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("/data/of/somebody/*", "/moved/*"))
    facts(directory)  # the same, wherever it lies
    manifest.write_text(manifest.read_text().replace('"taken": 7', '"taken": 8'))
    with pytest.raises(InputError, match="not the selection"):
        facts(directory)
    manifest.unlink()
    with pytest.raises(InputError, match="no finished selection"):
        facts(directory)


def test_a_damaged_lockfile_is_refused(tmp_path: Path) -> None:
    directory = lock(tmp_path, rows())
    content = bytearray((directory / "lock.parquet").read_bytes())
    content[40] ^= 1
    (directory / "lock.parquet").write_bytes(content)
    with pytest.raises(InputError):
        facts(directory)


def test_the_rows_of_these_tests_are_whole() -> None:
    assert {key for each in rows() for key in each} <= set(SCHEMA.names)
