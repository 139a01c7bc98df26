"""Figures are found with their intervals, named, and the best of them chosen."""

from __future__ import annotations

from typing import Any

import pytest

from inference.measured import (
    Evaluation,
    Figure,
    best,
    best_of_models,
    better,
    figure_names,
    figures_of,
    title,
)

RESULTS: dict[str, Any] = {
    "model": "x",
    "seed": 0,
    "guidance_scale": 4.0,
    "fixed": {"guidance_scale": 9.0},
    "one": {"objects_in_place": 97.5, "intervals": {"objects_in_place": [94.0, 99.0]}},
    "features": {
        "inception": {
            "frechet": 12.0,
            "frechet_interval": [11.0, 13.0],
            "frechet_points": [[9, 2]],
        },
        "clip": {"clip_score": 30.0, "clip_score_by_group": {"two": 3.0}},
    },
    "neighbours": {"pixels": {"closer": 0.5}},
}


def evaluation(model: str = "x", **clip: float) -> Evaluation:
    settings = {"sampler": "ddim", "num_inference_steps": 25, "guidance_scale": 4.0, "seed": 0}
    results = {"features": {"clip": clip}}
    return Evaluation({"directory": "", "model": model, "settings": settings, "results": results})


def test_all_figures_are_found_with_their_intervals() -> None:
    assert dict(figures_of(RESULTS)) == {
        "one.objects_in_place": Figure(97.5, 94.0, 99.0),
        "features.inception.frechet": Figure(12.0, 11.0, 13.0),
        "features.clip.clip_score": Figure(30.0),
        "features.clip.clip_score_by_group.two": Figure(3.0),
        "neighbours.pixels.closer": Figure(0.5),
    }
    assert str(Figure(97.5, 94.0, 99.0)) == "97.5 (94 to 99)"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("features.inception.frechet", "FID ↓"),
        ("features.inception.frechet_at_infinity", "FID at infinite N ↓"),
        ("features.clip.frechet", "Fréchet distance, clip ↓"),
        ("features.clip.clip_score_by_group.two", "CLIP score, clip, two ↑"),
        ("features.clip.frechet_by_group.art 2.0", "Fréchet distance, clip, art 2.0 ↓"),
        ("features.inception.frechet_by_group.two_held_out", "FID, two_held_out ↓"),
        ("one_held_out.objects_in_place", "% right and in place, one held out ↑"),
        ("neighbours.pixels.closer", "nearer to training than real ones, pixels"),
        ("vae_psnr_db", "VAE's PSNR, dB"),
    ],
)
def test_figures_have_names(name: str, expected: str) -> None:
    assert title(name) == expected
    assert better(name) == (expected[-1] == "↑") - (expected[-1] == "↓")


def test_the_best_is_the_lowest_or_the_highest() -> None:
    points = [
        evaluation("a", frechet=3.0, clip_score=1.0),
        evaluation("a", frechet=2.0),
        evaluation("b", frechet=9.0, clip_score=5.0),
    ]
    assert figure_names(points) == ["features.clip.frechet", "features.clip.clip_score"]
    assert best(points, "features.clip.frechet") is points[1]
    assert best(points, "features.clip.clip_score") is points[2]
    assert best_of_models(points, "features.clip.frechet") == points[1:]
    assert points[0].told(["model", "num_inference_steps", "guidance_scale"]) == (
        "a, 25 steps, guidance 4"
    )
