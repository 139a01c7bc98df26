"""Charts of measured points: what is drawn where, and what a front is."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.plots import LETTER, Mark, Series, front, plot, spaced
from latentdiff.charts import HEIGHT, LEFT, RIGHT, WIDTH, Scale

NUMBERS = st.floats(-1e4, 1e4)
PLACES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=20)


def drawn(series: list[Series], **options: bool) -> ET.Element:
    return ET.fromstring(plot(series, ["red", "blue"], **options))  # type: ignore[arg-type]


@given(PLACES)
def test_the_front_is_what_nothing_betters(places: list[tuple[int, int]]) -> None:
    """Against the definition, point by point."""
    kept = [places[number] for number in front(places)]
    undominated = {
        (x, y)
        for x, y in places
        if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in places)
    }
    assert kept == sorted(undominated)


@given(
    st.lists(
        st.lists(st.tuples(NUMBERS, NUMBERS, st.floats(0, 100)), min_size=1, max_size=6),
        min_size=1,
        max_size=3,
    )
)
def test_everything_is_inside_the_frame(lines: list[list[tuple[float, float, float]]]) -> None:
    series = [
        Series(f"<{n}>&", [Mark(x, y, "<&", y - by, y + by) for x, y, by in line], ((0, 0), (1, 2)))
        for n, line in enumerate(lines)
    ]
    picture = drawn(series)
    circles = picture.findall("circle")
    assert len(circles) == sum(map(len, lines))
    for circle in circles:
        assert LEFT <= float(circle.attrib["cx"]) <= WIDTH - RIGHT
        assert 0 <= float(circle.attrib["cy"]) <= HEIGHT
    ends = [path.attrib["d"] for path in picture.findall("path[@class='interval']")]
    for circle, end in zip(circles, ends, strict=True):
        low, high = map(float, re.findall(r" ([\d.]+)V([\d.]+)", end)[0])
        assert 0 <= high <= float(circle.attrib["cy"]) <= low <= HEIGHT
    assert len(picture.findall("path[@class='guide']")) == len(lines)


def test_equal_factors_are_equal_distances_where_it_is_logarithmic() -> None:
    marks = [Mark(2.0**n, 1.0, "") for n in range(6)]
    picture = drawn([Series("steps", marks)], log_x=True)
    places = [float(circle.attrib["cx"]) for circle in picture.findall("circle")]
    gaps = [b - a for a, b in itertools.pairwise(places)]
    assert max(gaps) - min(gaps) < 0.3
    assert min(gaps) > 60


def test_heights_are_logarithmic_where_that_is_asked_and_shows_more() -> None:
    def gaps(values: list[float], **options: bool) -> list[float]:
        picture = drawn([Series("a", [Mark(n, y, "") for n, y in enumerate(values)])], **options)
        heights = [float(circle.attrib["cy"]) for circle in picture.findall("circle")]
        return [b - a for a, b in itertools.pairwise(heights)]

    factors = gaps([64.0, 16.0, 4.0, 1.0], log_y=True)
    assert max(factors) - min(factors) < 0.3
    for even in (gaps([61.0, 41.0, 21.0, 1.0]), gaps([16.0, 11.0, 6.0, 1.0], log_y=True)):
        assert max(even) - min(even) < 0.3


def test_a_front_of_one_is_seen() -> None:
    picture = drawn([Series("a", [Mark(0, 1, ""), Mark(1, 2, "")]), Series("front", (), [(1, 2)])])
    (ring,) = picture.findall("circle[@class='ring']")
    last = picture.findall("circle")[1]
    assert (ring.attrib["cx"], ring.attrib["cy"]) == (last.attrib["cx"], last.attrib["cy"])


def test_only_joined_marks_are_joined() -> None:
    marks = [Mark(0, 1, ""), Mark(1, 2, "")]
    joined, loose, alone = (
        Series("a", marks),
        Series("b", marks, joined=False),
        Series("c", marks[:1]),
    )
    assert len(drawn([joined, loose, alone]).findall("path[@class='curve']")) == 1


@pytest.mark.parametrize("logarithmic", [False, True])
def test_one_mark_alone_is_drawn(logarithmic: bool) -> None:
    (circle,) = drawn([Series("a", [Mark(4, 0, "")])], log_x=logarithmic).findall("circle")
    assert LEFT < float(circle.attrib["cx"]) < WIDTH - RIGHT


@given(st.dictionaries(st.floats(0, 1), st.text("ab∞1", min_size=1, max_size=9), max_size=30))
def test_labels_do_not_run_into_one_another(labels: dict[float, str]) -> None:
    across = Scale(0, 1, LEFT, WIDTH - RIGHT)
    kept = spaced(labels, across)
    assert kept.items() <= labels.items()
    assert not labels or min(labels) in kept
    for (a, one), (b, other) in itertools.pairwise(kept.items()):
        assert across(b) - across(a) >= LETTER * (len(one) + len(other)) / 2
