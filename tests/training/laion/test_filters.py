"""The conditions against plain Python, and the funnel's arithmetic."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.errors import InputError
from training.laion.columns import METADATA
from training.laion.filters import ID, FiltersConfig, Sieve, hexadecimal
from training.laion.lists import host, read_domains, read_takedown
from training.laion.presets import PRESETS, resolved

ROW: dict[str, Any] = {
    "url": "https://a.example.com/1.jpg",
    "caption": "a fox",
    "width": 640,
    "height": 480,
    "similarity": 0.3,
    "punsafe": 0.1,
    "nsfw": "UNLIKELY",
    "pwatermark": 0.2,
    "aesthetic_v1": 7.5,
    "aesthetic_v2": 5.0,
    "language": "en",
}


def rows(*changes: dict[str, Any]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([ROW | change for change in changes], schema=METADATA)


def kept(filters: FiltersConfig, *changes: dict[str, Any], **options: Any) -> list[int]:
    """Which of the rows pass."""
    marked = [change | {"license": str(number)} for number, change in enumerate(changes)]
    passed = Sieve(filters, **options).sift(rows(*marked))
    return [int(number) for number in passed["license"].to_pylist()]


@pytest.mark.parametrize(
    ("filters", "column", "values", "expected"),
    [
        ({"min_width": 640}, "width", [639, 640, 641, None], [1, 2]),
        ({"min_height": 480}, "height", [479, 480, None], [1]),
        ({"min_side": 480}, "width", [479, 480, 10_000, None], [1, 2]),
        ({"min_aspect": 0.5}, "width", [239, 240, 241], [1, 2]),
        ({"max_aspect": 2}, "width", [959, 960, 961], [0, 1]),
        ({"min_similarity": 0.3}, "similarity", [0.2999, 0.3, 0.31, None], [1, 2]),
        ({"max_punsafe": 0.1}, "punsafe", [0.0999, 0.1, 0.1001, None], [0, 1]),
        ({"below_punsafe": 0.1}, "punsafe", [0.0999, 0.1, 0.1001], [0]),
        ({"max_pwatermark": 0.5}, "pwatermark", [0.5, 0.501], [0]),
        ({"below_pwatermark": 0.5}, "pwatermark", [0.499, 0.5], [0]),
        ({"min_aesthetic_v1": 7}, "aesthetic_v1", [6.99, 7, None], [1]),
        ({"above_aesthetic_v1": 7}, "aesthetic_v1", [7, 7.01], [1]),
        ({"min_aesthetic_v2": 5}, "aesthetic_v2", [4.99, 5, None], [1]),
        ({"above_aesthetic_v2": 5}, "aesthetic_v2", [5, 5.01], [1]),
        ({"nsfw": ("UNLIKELY", "UNSURE")}, "nsfw", ["NSFW", "UNSURE", None, "UNLIKELY"], [1, 3]),
        ({"languages": ("en", "DE")}, "language", ["en", "de", "fr", None], [0, 1]),
        ({"min_caption_length": 3}, "caption", ["öö", "ööö"], [1]),
        ({"max_caption_length": 3}, "caption", ["ööö", "öööö"], [0]),
        ({}, "caption", ["a", "", " \n", None], [0]),
        (
            {},
            "url",
            [
                *("http://a.b/c", "HTTPS://a.b", "ftp://a.b", "//a.b", "data:image/png", None, ""),
                *("http://", "http:///a", "http://a.b/c d", "http://a.b/\n"),
                "https://a.b/" + "x" * 9000,
            ],
            [0, 1],
        ),
    ],
)
def test_each_condition_at_its_edge(
    filters: dict[str, Any], column: str, values: list[Any], expected: list[int]
) -> None:
    assert kept(FiltersConfig(**filters), *({column: value} for value in values)) == expected


def test_a_value_that_is_not_there_counts_as_it_is_said() -> None:
    filters = FiltersConfig(max_punsafe=0.5)
    changes: tuple[dict[str, Any], ...] = ({"punsafe": None}, {"punsafe": 0.4}, {"punsafe": 0.6})
    assert kept(filters, *changes) == [1]
    assert kept(filters, *changes, keep_unknown=True) == [0, 1]


@pytest.mark.parametrize(
    ("url", "below"),
    [
        ("https://example.com/x", True),
        ("https://EXAMPLE.com:8443", True),
        ("http://a.b.example.com/x", True),
        ("http://example.com./x", True),
        ("http://user:secret@img.example.com?x", True),
        ("http://evil.com/@example.com", False),
        ("http://evil.com\\@example.com", False),
        ("http://notexample.com/", False),
        ("http://example.com.evil.com/", False),
        ("http://com/", False),
    ],
)
def test_domains_and_what_is_below_them(tmp_path: Path, url: str, below: bool) -> None:
    listed = tmp_path / "domains.txt"
    listed.write_text("# a comment\n\n*.Example.com\n", encoding="utf-8")
    for given_as in (("example.com",), listed):
        assert kept(FiltersConfig(domains_allowed=given_as), {"url": url}) == [0] * below
        assert kept(FiltersConfig(domains_denied=given_as), {"url": url}) == [0] * (not below)


def test_names_beyond_ascii_are_compared_as_name_servers_see_them() -> None:
    domains = read_domains(("bücher.example",))
    assert domains.hold("http://shop.xn--bcher-kva.example/1.png")
    assert domains.hold("http://BÜCHER.example/1.png")
    assert host("[::1]:80") == "[::1]"


def test_a_list_that_is_no_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Sieve(FiltersConfig(domains_denied=tmp_path / "none.txt"))
    listed = tmp_path / "list.txt"
    listed.write_text("good.example\nnot a domain\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 2: 'not a domain'"):
        Sieve(FiltersConfig(domains_denied=listed))
    with pytest.raises(InputError, match=r"line 2"):
        Sieve(FiltersConfig(takedown=(listed,)))


def test_a_list_meets_batches_of_which_nothing_is_left_and_rows_without_a_url(
    tmp_path: Path,
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"host3.example\nhttps://a.example/1\n{2:064x}\n", encoding="utf-8")
    assert kept(FiltersConfig(min_width=641, takedown=(listed,)), {}, {}) == []
    for filters in ({"domains_allowed": ("example.com",)}, {"domains_denied": ("b.example",)}):
        assert kept(FiltersConfig(**filters), {"url": None}, {}) == [1]


def test_lists_may_begin_with_a_mark_and_have_comments_behind_entries(tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    text = "a.example.com # asked for\nhttps://b.example/#top\t# a fragment\n  000000012 #\n"
    listed.write_text("\ufeff" + text, encoding="utf-8")
    found = read_takedown((listed,))
    assert found.domains.hold("https://a.example.com/1.jpg")
    assert (found.urls, found.keys) == ({"https://b.example/#top"}, {"000000012"})
    listed.write_text("https://a.example/1 https://a.example/2\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 1: .* white space"):
        read_takedown((listed,))


def identifier(url: str, caption: str) -> str:
    return hashlib.sha256(f"{url}\n{caption}".encode()).hexdigest()[:16]


def test_takedown_by_url_domain_id_and_hash(tmp_path: Path) -> None:
    changes = [{"url": f"https://host{n}.example/{n}.jpg", "sha256": f"{n:064x}"} for n in range(8)]
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text(f"https://host1.example/1.jpg\n{2:064X}\n000000004\n", encoding="utf-8")
    taken = identifier("https://host5.example/5.jpg", "a fox")
    second.write_text(
        f"# removed\nhost3.example\n{taken}\nhttps://host6.example/\n", encoding="utf-8"
    )
    assert kept(FiltersConfig(takedown=(first, second)), *changes) == [0, 4, 6, 7]


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), max_size=8))
@settings(deadline=None)
def test_ids_are_the_first_digits_of_the_hash_of_url_and_caption(
    pairs: list[tuple[str, str]],
) -> None:
    changes = [{"url": f"http://a/{url}", "caption": f"x{caption}"} for url, caption in pairs]
    passed = Sieve(FiltersConfig()).sift(rows(*changes))
    expected = [
        identifier(*row)
        for row in zip(*(passed[n].to_pylist() for n in ("url", "caption")), strict=True)
    ]
    assert hexadecimal(passed[ID].to_numpy()).to_pylist() == expected


def test_a_share_is_a_function_of_the_ids_and_holds_the_smaller_ones() -> None:
    changes = [{"caption": f"picture {n}"} for n in range(2000)]
    quarter = kept(FiltersConfig(), *changes, share=0.25)
    half = kept(FiltersConfig(), *changes, share=0.5)
    assert set(quarter) < set(half)
    assert abs(len(half) - 1000) < 5 * np.sqrt(2000 * 0.25)
    backwards = kept(FiltersConfig(), *reversed(changes), share=0.5)
    assert sorted(1999 - n for n in backwards) == half


SCORES = st.none() | st.floats(0, 1, width=32)


@given(
    st.lists(
        st.tuples(
            SCORES, SCORES, st.none() | st.integers(1, 40), st.sampled_from(["", "ab", "abc"])
        )
    ),
    st.floats(0, 1),
    st.floats(0, 1),
    st.booleans(),
)
@settings(deadline=None)
def test_the_funnel_adds_up_and_order_takes_nobody_twice(
    drawn: list[tuple[float | None, float | None, int | None, str]],
    punsafe: float,
    pwatermark: float,
    keep: bool,
) -> None:
    names = ("punsafe", "pwatermark", "width", "caption")
    changes = [dict(zip(names, values, strict=True)) for values in drawn]
    filters = FiltersConfig(
        min_width=20, max_punsafe=punsafe, below_pwatermark=pwatermark, min_caption_length=3
    )
    sieve = Sieve(filters, keep)
    passed = sieve.sift(rows(*changes))

    def asked(row: dict[str, Any]) -> list[bool | None]:
        width, unsafe, mark = (row[name] for name in ("width", "punsafe", "pwatermark"))
        return [
            None if width is None else width >= 20,
            None if unsafe is None else bool(np.float32(unsafe) <= np.float32(punsafe)),
            None if mark is None else bool(np.float32(mark) < np.float32(pwatermark)),
            True,
            row["caption"] != "",
            len(row["caption"]) >= 3,
        ]

    left = [asked(row) for row in changes]
    assert sieve.rows == len(left)
    for number, condition in enumerate(sieve.conditions):
        known = [row for row in left if row[number] is not None]
        after = [row for row in left if (keep if row[number] is None else row[number])]
        assert condition.unknown == len(left) - len(known)
        assert condition.taken == len(left) - len(after)
        left = after
    assert len(passed) == len(left)


def test_presets_give_way_where_something_else_is_set() -> None:
    made = resolved("sd12", FiltersConfig(min_width=768, above_aesthetic_v2=None))
    assert (made.min_width, made.min_height) == (768, 512)
    assert (made.above_aesthetic_v2, made.below_pwatermark) == (None, 0.5)
    assert resolved("none", FiltersConfig(min_side=64)) == FiltersConfig(min_side=64)
    assert all(preset.source for preset in PRESETS.values())


def test_presets_ask_what_their_sources_say() -> None:
    changes: list[dict[str, Any]] = [
        {"width": 512, "height": 512, "aesthetic_v2": 5.01, "pwatermark": 0.49, "punsafe": 0.1},
        {"width": 511, "height": 900, "aesthetic_v2": 6, "pwatermark": 0.1, "punsafe": 0.1},
        {"width": 900, "height": 900, "aesthetic_v2": 5, "pwatermark": 0.1, "punsafe": 0.2},
        {"width": 900, "height": 900, "aesthetic_v2": 6, "pwatermark": 0.5, "punsafe": 0.1},
        {"width": 100, "height": 100, "aesthetic_v2": 4.5, "pwatermark": 0.9, "punsafe": 0.05},
    ]
    assert kept(PRESETS["sd12"].filters, *changes) == [0]
    assert kept(PRESETS["sd2_base"].filters, *changes) == [0, 1, 3, 4]
    assert kept(PRESETS["sd2_base_512"].filters, *changes) == [0, 3]
    assert kept(PRESETS["sd15"].filters, *changes) == [0, 1, 2, 3]
