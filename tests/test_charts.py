"""The arithmetic of curves, and what is drawn of them."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.charts import HEIGHT, POINTS, WIDTH, chart, short, thinned, ticks

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=200), st.integers(1, 60))
def test_thinning_keeps_means_extremes_and_the_end(values: list[float], points: int) -> None:
    curve = list(enumerate(values))
    thin = thinned(curve, points)
    assert len(thin) == min(points, len(values))
    assert (thin[-1].step, min(p.low for p in thin)) == (len(values) - 1, min(values))
    assert max(p.high for p in thin) == max(values)
    counts = [b - a for a, b in itertools.pairwise([-1, *(point.step for point in thin)])]
    assert max(counts) - min(counts) <= 1
    total = math.fsum(p.mean * count for p, count in zip(thin, counts, strict=True))
    assert math.isclose(total, math.fsum(values), rel_tol=1e-9, abs_tol=1e-3)


@given(finite, st.floats(1e-3, 1e6))
def test_ticks_are_round_few_and_inside(low: float, size: float) -> None:
    marks = ticks(low, low + size)
    assert 2 <= len(marks) <= 6
    step = marks[1] - marks[0]
    assert max(abs(math.log10(step / f) % 1 - 0.5) for f in (1, 2, 5)) > 0.499
    slack = 1e-5 * size
    assert all(low - slack <= mark <= low + size + slack for mark in marks)


@given(st.lists(st.lists(finite, min_size=1, max_size=30), min_size=1, max_size=4))
def test_charts_are_xml_and_stay_inside_their_frame(curves: list[list[float]]) -> None:
    drawn = chart({f"<{n}>&": list(enumerate(v)) for n, v in enumerate(curves)}, ["red", "blue"])
    picture = ET.fromstring(drawn)
    paths = [path.attrib["d"] for path in picture.findall("path[@class='curve']")]
    assert len(paths) == len(curves)
    for path, values in zip(paths, curves, strict=True):
        places = [tuple(map(float, place.split())) for place in path[1:].split("L")]
        assert len(places) == len(values)
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
        ups = [y for _, y in places]
        for (y, value), (other_y, other) in itertools.pairwise(zip(ups, values, strict=True)):
            assert (other - value) * (other_y - y) <= 1e-9  # up is less y


def test_a_curve_over_decades_is_logarithmic() -> None:
    """Equal factors, equal distances."""
    drawn = chart({"loss": [(n, 10.0**-n) for n in range(5)]}, ["red"])
    path = re.findall(r'class="curve"[^>]*d="M([^"]*)"', drawn)[0]
    heights = [float(place.split()[1]) for place in path.split("L")]
    gaps = [b - a for a, b in itertools.pairwise(heights)]
    assert min(gaps) > 20
    assert max(gaps) - min(gaps) < 0.3
    assert len(thinned([(n, 1.0) for n in range(POINTS + 1)])) == POINTS


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"), (12_000, "12k"), (2_500_000, "2.5M"), (0.10871, "0.1087"), (1.53e-5, "1.53e-05"),
        (9999.4, "9999"), (9999.7, "10k"), (-9999.7, "-10k"), (999_949, "999.9k"), (999_999, "1M"),
        (999_999_999, "1G"), (math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float, expected: str) -> None:
    assert short(value) == expected
