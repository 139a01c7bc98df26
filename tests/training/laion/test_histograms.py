"""Histograms count every value once, and their drawings show the counts."""

from __future__ import annotations

import itertools
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.charts import BOTTOM, HEIGHT, TOP, WIDTH
from training.laion.histograms import HEADER, MOST_BARS, Histogram, binned, drawing

SVG = "{http://www.w3.org/2000/svg}"
FLOATS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300)


def counted(
    values: list[float], histogram: Histogram, precision: type[np.floating[Any]] = np.float64
) -> tuple[int, list[int], int]:
    """Below, in each bar, above: one value at a time."""
    edges = [float(precision(edge)) for edge in histogram.edges]
    inside = [
        sum(start <= value < end for value in values) for start, end in itertools.pairwise(edges)
    ]
    below, above = (sum(v < edges[0] for v in values), sum(v >= edges[-1] for v in values))
    return below, inside, above


@settings(deadline=None)
@given(FLOATS)
def test_each_value_is_in_the_bar_that_covers_it(values: list[float]) -> None:
    histogram = binned(np.array(values, dtype=np.float32))
    found = counted(values, histogram, np.float32)
    assert found == (histogram.below, histogram.counts, histogram.above)
    assert histogram.total == len(values)
    assert histogram.edges == sorted(set(histogram.edges))


@settings(deadline=None)
@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=300), st.booleans())
def test_whole_numbers_too_and_logarithmically(values: list[int], logarithmic: bool) -> None:
    histogram = binned(np.array(values, dtype=np.int32), logarithmic)
    assert counted(values, histogram) == (histogram.below, histogram.counts, histogram.above)
    edges = histogram.edges
    if logarithmic:
        ratios = [end / start for start, end in itertools.pairwise(edges)]
        assert min(abs(ratios[0] - 2 ** (1 / parts)) for parts in (1, 2, 4, 8)) < 1e-9
        assert ratios == pytest.approx([ratios[0]] * len(ratios))
    else:
        assert all(edge == int(edge) for edge in edges)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=100, max_size=200))
@settings(deadline=None, max_examples=30)
def test_few_values_are_outside(values: list[float]) -> None:
    histogram = binned(np.array(values, dtype=np.float32))
    assert histogram.below + histogram.above <= 0.01 * len(values) + 1
    assert len(histogram.counts) <= MOST_BARS


def test_one_far_value_does_not_set_the_scale() -> None:
    values = np.concatenate([np.linspace(0, 0.99, 999), [1e6]])
    histogram = binned(values)
    assert histogram.edges[-1] < 2
    assert histogram.above == 1


@pytest.mark.parametrize(
    ("value", "logarithmic"),
    [(0.0, False), (0.3, False), (-7.0, False), (512.0, False), (0.3, True), (512.0, True)],
)
def test_a_single_value_has_a_bar(value: float, logarithmic: bool) -> None:
    histogram = binned(np.full(7, value), logarithmic)
    assert (histogram.below, sum(histogram.counts), histogram.above) == (0, 7, 0)


def test_tenths_are_in_bars_of_their_own_in_either_precision() -> None:
    for precision in (np.float32, np.float64):
        histogram = binned(np.array([tenth / 10 for tenth in range(11)] * 9, dtype=precision))
        assert sorted(histogram.counts)[-11:] == [9] * 11


def test_edges_are_round() -> None:
    histogram = binned(np.linspace(0.2, 0.5, 1000).astype(np.float32))
    assert [f"{edge:.2f}" for edge in histogram.edges] == [
        f"{edge:g}".ljust(4, "0") for edge in histogram.edges
    ]


def test_bars_are_as_high_as_their_counts() -> None:
    histogram = Histogram([0.0, 1.0, 2.0, 3.0], [1200, 300, 0], below=4, above=5)
    root = ElementTree.fromstring(drawing(histogram, "Sides <&>", "pixels"))
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.get("class") == "bar"]
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert heights[1] / heights[0] == pytest.approx(300 / 1200, abs=0.01)
    assert heights[2] == 0
    told = [bar.findtext(f"{SVG}title") for bar in bars]
    assert told == ["0 to 1: 1,200", "1 to 2: 300", "2 to 3: 0"]
    texts = " ".join(text.text or "" for text in root.iter(f"{SVG}text"))
    assert "Sides <&>" in texts
    assert "1,509 samples" in texts
    assert "4 below 0 pixels" in texts
    assert "5 from 3 pixels on" in texts


@settings(deadline=None)
@given(FLOATS)
def test_drawings_are_xml_and_stay_inside_their_frame(values: list[float]) -> None:
    text = drawing(binned(np.array(values, dtype=np.float32)), "Values")
    root = ElementTree.fromstring(text)
    assert root.get("viewBox") == f"0 0 {WIDTH} {HEIGHT + HEADER}"
    for bar in root.iter(f"{SVG}rect"):
        if bar.get("class") == "bar":
            x, y, width, height = (float(bar.attrib[k]) for k in ("x", "y", "width", "height"))
            assert x >= 0
            assert x + width <= WIDTH
            assert width > 0
            assert y >= TOP
            assert y + height <= HEIGHT - BOTTOM + 0.1
    assert not re.search(r"nan|inf", text.split("</style>")[1])
