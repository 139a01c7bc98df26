"""Figures over all kinds of scenes, against scipy's own interval."""

from __future__ import annotations

from typing import Any

import pytest
from scipy.stats import binomtest

from benchmarks.estimates import clip_score, frechet, right
from latentdiff.metrics.scene_accuracy import KINDS

SHARES = (90.0, 85.0, 40.0, 12.5)


@pytest.fixture
def results() -> dict[str, Any]:
    clip = {
        "frechet": 3.5,
        "frechet_interval": [2.0, 5.0],
        "clip_score": 80.0,
        "clip_score_interval": [79.0, 81.0],
    }
    kinds = {
        kind.name: {"objects": share, "objects_in_place": 0.0}
        for kind, share in zip(KINDS, SHARES, strict=True)
    }
    return {"pictures": 160, "features": {"clip": clip}} | kinds


def test_right_is_of_all_pictures_together(results: dict[str, Any]) -> None:
    """36, 34, 16 and 5 of 40."""
    wilson = binomtest(91, 160).proportion_ci(0.95, "wilson")
    found = right(results, "objects")
    assert found.value == pytest.approx(100 * 91 / 160)
    assert (found.low, found.high) == pytest.approx((100 * wilson.low, 100 * wilson.high))
    assert right(results, "objects_in_place").value == 0


def test_intervals_go_with_their_figures(results: dict[str, Any]) -> None:
    assert str(frechet(results)) == "3.5 (2.0 to 5.0)"
    assert str(clip_score(results)) == "80.0 (79.0 to 81.0)"
