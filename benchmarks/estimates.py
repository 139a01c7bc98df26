"""Figures of inference.evaluate's results over all kinds of scenes, with their 95% intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentdiff.metrics.bootstrap import share_interval
from latentdiff.metrics.scene_accuracy import KINDS


@dataclass(frozen=True)
class Estimate:
    """What was measured, and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} ({self.low:.1f} to {self.high:.1f})"


def right(results: Mapping[str, Any], what: str) -> Estimate:
    """Percent of all pictures, of whatever kind, that have `what` right; Wilson's interval.

    what: "objects", "objects_in_place" or "background".
    """
    share = sum(results[kind.name][what] for kind in KINDS) / len(KINDS)
    pictures = results["pictures"]
    ends = share_interval(round(share / 100 * pictures), pictures)
    return Estimate(share, 100 * ends.low, 100 * ends.high)


def frechet(results: Mapping[str, Any]) -> Estimate:
    """Distance by the bundled CLIP's features; a bootstrap's interval."""
    clip = results["features"]["clip"]
    return Estimate(clip["frechet"], *clip["frechet_interval"])


def clip_score(results: Mapping[str, Any]) -> Estimate:
    """By the bundled CLIP; a bootstrap's interval."""
    clip = results["features"]["clip"]
    return Estimate(clip["clip_score"], *clip["clip_score_interval"])
