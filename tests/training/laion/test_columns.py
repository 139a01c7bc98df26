"""Every release's own names and types, and what cannot be read."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.errors import InputError
from training.laion.columns import METADATA, SCHEMA, FamilyName, canonical, recognise

LAION_400M = ["SAMPLE_ID", "URL", "TEXT", "HEIGHT", "WIDTH", "LICENSE", "NSFW", "similarity"]
JOINED = ["URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "hash", "punsafe", "pwatermark"]
RELAION = ["url", "caption", "similarity", "hash", "pwatermark", "punsafe", "key", "status"]
RELAION += ["width", "height", "original_width", "original_height"]
SIZES = {"width": "WIDTH", "height": "HEIGHT"}
TAGS = {"similarity": "similarity", "punsafe": "punsafe", "pwatermark": "pwatermark"}
USUAL = {"url": "URL", "caption": "TEXT", **SIZES}


@pytest.mark.parametrize(
    ("family", "names", "expected"),
    [
        (
            "laion400m",
            LAION_400M,
            {**USUAL, "similarity": "similarity", "nsfw": "NSFW", "license": "LICENSE"},
        ),
        (
            "laion2b_en",
            [*LAION_400M, "LANGUAGE"],
            {**USUAL, "similarity": "similarity", "nsfw": "NSFW", "license": "LICENSE"}
            | {"language": "LANGUAGE"},
        ),
        ("laion2b_en", JOINED, USUAL | TAGS),
        ("laion_art", [*JOINED, "aesthetic"], USUAL | TAGS | {"aesthetic_v1": "aesthetic"}),
        (
            "laion_aesthetics_v1",
            [*JOINED, "aesthetic"],
            USUAL | TAGS | {"aesthetic_v1": "aesthetic"},
        ),
        (
            "laion_aesthetics_v2",
            [*JOINED, "AESTHETIC_SCORE"],
            USUAL | TAGS | {"aesthetic_v2": "AESTHETIC_SCORE"},
        ),
        (
            "laion_aesthetics_v2",
            [*JOINED, "aesthetic"],
            USUAL | TAGS | {"aesthetic_v2": "aesthetic"},
        ),
        (
            "laion_aesthetics_v2",
            [*JOINED, "prediction"],
            USUAL | TAGS | {"aesthetic_v2": "prediction"},
        ),
        (
            "relaion2b_en_research_safe",
            RELAION,
            {"url": "url", "caption": "caption"}
            | {"width": "original_width", "height": "original_height"}
            | TAGS,
        ),
        (
            "plain",
            ["Url", "Caption", "SHA256"],
            {"url": "Url", "caption": "Caption", "sha256": "SHA256"},
        ),
    ],
)
def test_the_columns_of_each_release(
    family: FamilyName, names: list[str], expected: dict[str, str]
) -> None:
    found = recognise(names, family, acknowledged=True)
    assert found.family == family
    assert found.columns == expected


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (LAION_400M, "laion2b_en"),
        (JOINED, "laion2b_en"),
        ([*JOINED, "AESTHETIC_SCORE"], "laion_aesthetics_v2"),
        (RELAION, "relaion2b_en_research"),
        (["url", "text"], "plain"),
    ],
)
def test_a_release_is_known_by_its_columns_in_any_case(names: list[str], family: str) -> None:
    for written in (names, [name.upper() for name in names], [name.lower() for name in names]):
        assert recognise(written, acknowledged=True).family == family


@pytest.mark.parametrize("names", [LAION_400M, JOINED, [*JOINED, "AESTHETIC_SCORE"]])
def test_what_was_withdrawn_is_refused_until_acknowledged(names: list[str]) -> None:
    with pytest.raises(InputError, match=r"December 2023 .*relaion2B-en-research-safe"):
        recognise(names)
    assert recognise(names, acknowledged=True)
    assert recognise(RELAION, "relaion2b_en_research_safe")
    with pytest.raises(InputError, match="laion400m"):
        recognise(LAION_400M, "laion400m")


@pytest.mark.parametrize("names", [["url", "caption"], JOINED, RELAION])
def test_what_img2dataset_wrote_does_not_show_its_release(names: list[str]) -> None:
    written = [*names, *({"key", "status", "error_message", "exif"} - set(names))]
    with pytest.raises(InputError, match="name the family"):
        recognise(written, acknowledged=True)
    assert recognise(written, "plain").family == "plain"


def test_an_aesthetic_score_of_unknown_kind_is_refused_until_somebody_says() -> None:
    names = [*RELAION, "aesthetic"]
    with pytest.raises(InputError, match="name the family"):
        recognise(names)
    for column in ("aesthetic_v1", "aesthetic_v2"):
        found = recognise(names, overrides={column: "aesthetic"}).columns
        assert {name for name in found if name.startswith("aesthetic")} == {column}
    other = recognise(
        [*JOINED, "aesthetic"],
        "laion_aesthetics_v2",
        {"aesthetic_v1": "aesthetic"},
        acknowledged=True,
    )
    assert other.columns["aesthetic_v1"] == "aesthetic"
    assert "aesthetic_v2" not in other.columns


def test_two_columns_for_one_thing_or_none_are_refused() -> None:
    with pytest.raises(InputError, match=r"URL and url; say .* columns\.url"):
        recognise(["URL", "url", "text"])
    assert recognise(["URL", "url", "text"], overrides={"url": "url"}).columns["url"] == "url"
    with pytest.raises(InputError, match="no caption"):
        recognise(["url", "label"])
    with pytest.raises(InputError, match="no one column label"):
        recognise(["url", "label", "label"], overrides={"caption": "label"})
    assert recognise(["url", "TEXT", "label"], overrides={"caption": "label"}).columns == {
        "url": "url",
        "caption": "label",
    }


def read(column: str, array: pa.Array) -> tuple[list[Any], int]:
    """One column's values as they are made canonical, and how many could not be read."""
    batch, unusable = canonical(pa.RecordBatch.from_arrays([array], ["x"]), {column: "x"})
    assert batch.schema == METADATA
    assert set(unusable) <= {column}
    return batch[column].to_pylist(), unusable[column]


@pytest.mark.parametrize(
    ("array", "expected", "unusable"),
    [
        (pa.array([512, None, 0, -1, 2**40]), [512, None, None, None, None], 3),
        (pa.array([512.0, None, math.nan, 0.0, 3e9]), [512, None, None, None, None], 2),
        (pa.array([b"512", b"\xff"]), [512, None], 1),
        (
            pa.array(["512", " 640.0 ", "", None, "n/a", "1e3", "nan", "-5"]),
            [512, 640, None, None, None, 1000, None, None],
            3,
        ),
        (pa.array(["7", "x", "7"]).dictionary_encode(), [7, None, 7], 1),
        (pa.array(["7", None], pa.large_string()), [7, None], 0),
        (pa.array([Decimal("512"), None]), [512, None], 0),
        (pa.array(np.array([512, 640], np.float16)), [512, 640], 0),
        (pa.array([[1], None]), [None, None], 1),
        (pa.nulls(2), [None, None], 0),
    ],
)
def test_sizes_of_any_type(array: pa.Array, expected: list[int | None], unusable: int) -> None:
    assert read("width", array) == (expected, unusable)


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_scores_of_any_precision(kind: pa.DataType) -> None:
    values = np.array([0.5, math.nan, math.inf, 2.0], kind.to_pandas_dtype())
    assert read("punsafe", pa.array(values)) == ([0.5, None, None, 2.0], 1)


def test_scores_are_float32_and_nothing_larger_fits() -> None:
    assert read("similarity", pa.array([0.1, 1e300, None])) == (
        [float(np.float32(0.1)), None, None],
        1,
    )
    assert read("aesthetic_v2", pa.array(["6.5", ".5", "five"])) == ([6.5, 0.5, None], 1)


DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("column", "values", "expected", "unusable"),
    [
        (
            "nsfw",
            ["UNLIKELY", "nsfw ", "Unsure", "SAFE", "", None],
            ["UNLIKELY", "NSFW", "UNSURE"],
            1,
        ),
        ("license", ["?", " CC-BY ", "", None], [None, "CC-BY"], 0),
        ("language", ["EN", " de", ""], ["en", "de"], 0),
        ("sha256", [DIGEST.upper(), "abc", None, ""], [DIGEST], 1),
        ("caption", [" as it is \n", "", None], [" as it is \n", ""], 0),
    ],
)
def test_texts(
    column: str, values: list[str | None], expected: list[str | None], unusable: int
) -> None:
    padded = expected + [None] * (len(values) - len(expected))
    assert read(column, pa.array(values)) == (padded, unusable)


def test_text_that_is_not_utf_8_is_unknown() -> None:
    good, bad = "Füchse".encode(), b"F\xfcchse"
    for kind in (pa.binary(), pa.large_binary()):
        assert read("caption", pa.array([good, bad, None], kind)) == (["Füchse", None, None], 1)
    lying = pa.array([good, bad, None], pa.binary()).view(pa.string())
    assert read("caption", lying) == (["Füchse", None, None], 1)


@given(st.lists(st.none() | st.text(max_size=12) | st.integers().map(str) | st.floats().map(repr)))
@settings(deadline=None)
def test_whatever_a_text_says_it_is_a_number_as_python_reads_it_or_unknown(
    values: list[str | None],
) -> None:
    found, unusable = read("similarity", pa.array(values, pa.string()))
    missed = 0
    for text, value in zip(values, found, strict=True):
        if value is not None:
            assert text is not None
            assert np.float32(float(text)) == np.float32(value)
        elif text is not None:
            plain = all(sign in "+-.0123456789eE" for sign in text.strip())
            try:
                readable = plain and abs(float(text)) <= float(np.finfo(np.float32).max)
            except ValueError:
                readable = False
            assert not readable
            missed += bool(text.strip())
    assert unusable == missed


def test_what_a_file_lacks_is_unknown() -> None:
    batch, unusable = canonical(pa.RecordBatch.from_pydict({"U": ["http://a"]}), {"url": "U"})
    assert batch["url"].to_pylist() == ["http://a"]
    assert all(batch[name].null_count == 1 for name in METADATA.names if name != "url")
    assert not unusable
    assert SCHEMA.names == ["sample_id", *METADATA.names]
