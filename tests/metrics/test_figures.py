"""Figures of rows: each by the module that defines it, on the rows that it is said to be of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import linalg

from latentdiff.config import load_yaml
from latentdiff.data.scenes import EmojiScenes, Placed, Scene, ScenesConfig
from latentdiff.metrics.figures import SCENE_COLUMNS, clip_figures, copies, distances, scene_figures
from latentdiff.metrics.kernel import cmmd, kid
from latentdiff.metrics.manifold import prdc
from latentdiff.metrics.neighbours import nearest
from latentdiff.metrics.scene_accuracy import Judge, shares

SCENES = Path(__file__).parents[2] / "configs/tiny/scenes.yaml"
GROUPS = {"cats": range(40), "dogs": range(40, 70)}
REAL_GROUPS = {"dogs": range(30), "birds": range(30, 90)}


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    drawn, real = rng.normal(size=(70, 4)), rng.normal(0.5, 1.5, size=(90, 4))
    return drawn.astype(np.float32), real.astype(np.float32)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """As the papers' code has it."""
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    between = np.square(a.mean(0) - b.mean(0)).sum()
    return float(between + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root))


def test_distances_are_of_all_and_of_each_group(rows: tuple[np.ndarray, np.ndarray]) -> None:
    drawn, real = rows
    found = distances(drawn, real, GROUPS, REAL_GROUPS)
    assert found["frechet"] == pytest.approx(frechet(drawn, real), rel=1e-5)
    assert found["frechet_by_group"].keys() == {"dogs"}
    dogs = frechet(drawn[40:70], real[:30])
    assert found["frechet_by_group"]["dogs"] == pytest.approx(dogs, rel=1e-5)
    low, high = found["frechet_interval"]
    assert 0 < high - low < 4 * found["frechet"]
    assert low < found["frechet"] < high
    counts, values = zip(*found["frechet_points"], strict=True)
    assert (counts[0], counts[-1], values[-1]) == (8, 70, found["frechet"])
    line = linalg.lstsq(np.array([[1, 1 / count] for count in counts]), np.array(values))[0]
    assert found["frechet_at_infinity"] == pytest.approx(line[0])
    assert found["kid_subset_size"] == 35
    assert (found["kid"], found["kid_deviation"]) == kid(drawn, real, subset_size=35)
    assert found.items() >= vars(prdc(real, drawn, 5)).items()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 6, 15, 16])
def test_few_pictures_give_the_figures_that_they_can(
    rows: tuple[np.ndarray, np.ndarray], count: int
) -> None:
    drawn, real = rows
    found = distances(drawn[:count], real, {}, REAL_GROUPS)
    assert ("frechet" in found) == (count >= 2)
    assert ("precision" in found) == (count >= 6)
    assert ("frechet_at_infinity" in found) == (count >= 16)
    assert ("kid" in found) == (count >= 4)


def test_clip_scores_are_of_own_prompts(rows: tuple[np.ndarray, np.ndarray]) -> None:
    drawn, real = rows
    found = clip_figures(drawn, 2 * drawn, None, GROUPS)
    assert found["clip_score"] == pytest.approx(100)
    assert "cmmd" not in found
    other = drawn.copy()
    other[:40] *= -1
    found = clip_figures(drawn, other, real, GROUPS)
    assert found["clip_score"] == pytest.approx(100 * 30 / 70)
    assert found["clip_score_by_group"] == pytest.approx({"cats": 0, "dogs": 100})
    assert found["cmmd"] == cmmd(drawn, real) > 0


def test_scenes_are_counted_as_the_judge_counts_them() -> None:
    """Rows of verdicts give the shares that `shares` gives of the verdicts."""
    config = load_yaml(ScenesConfig, SCENES)
    source, judge = EmojiScenes(config), Judge(config)
    fox = Scene((Placed("fox", 8, 8, 48),), None, "blue", "")
    robot = replace(fox, objects=(Placed("robot", 8, 8, 48),))
    shown = [fox, robot, replace(fox, background="red")]
    verdicts = [judge(source.render(scene), fox) for scene in shown]
    columns = [[v.objects_right, v.in_place, v.background_right, True, False] for v in verdicts]
    table = np.array([[*row, 20.0 + n] for n, row in enumerate(columns)], np.float32)
    both = np.concatenate([table, table[:1]])
    found = scene_figures(both, {"seen": range(3), "unseen": range(3, 4)}, ["unseen"])
    assert found["seen"].items() >= shares(verdicts).items()
    assert found["seen"]["real_renders"] == 100.0
    assert found["seen"]["vae_reconstructions"] == 0.0
    assert found["unseen"]["objects"] == 100.0
    assert found["vae_psnr_db"] == 20.0
    low, high = found["seen"]["intervals"]["objects"]
    assert low < 66.7 < high
    assert found["seen"]["intervals"].keys() == set(SCENE_COLUMNS[:-1])


def test_a_vae_that_gives_pictures_back_exactly_has_no_psnr() -> None:
    """JSON has no infinity."""
    table = np.array([[1, 1, 1, 1, 1, 30.0], [1, 1, 1, 1, 1, np.inf]], np.float32)
    found = scene_figures(table, {"a": range(1), "b": range(1, 2)}, ["a", "b"])
    assert not any(name.startswith("vae_psnr_db") for name in found)
    json.dumps(found, allow_nan=False)
    assert scene_figures(table, {"a": range(1), "b": range(1, 2)}, ["a"])["vae_psnr_db"] == 30.0


def test_intervals_are_of_so_many_of_each_kind(rows: tuple[np.ndarray, np.ndarray]) -> None:
    """Kinds that differ only from one another leave nothing to vary."""
    drawn, real = rows
    alike = np.concatenate([np.tile(drawn[:1], (40, 1)), np.tile(-drawn[:1], (30, 1))])
    texts = np.tile(drawn[:1], (70, 1))
    low, high = clip_figures(alike, texts, None, GROUPS)["clip_score_interval"]
    assert low == pytest.approx(high)
    low, high = distances(alike, real, GROUPS, REAL_GROUPS)["frechet_interval"]
    assert low == pytest.approx(high)
    low, high = distances(alike, real, {}, REAL_GROUPS)["frechet_interval"]
    assert high - low > 0.1
    table = np.ones((70, 6), np.float32)
    table[40:, -1] = 30
    low, high = scene_figures(table, GROUPS, list(GROUPS))["vae_psnr_db_interval"]
    assert low == high


def test_copies_are_found(rows: tuple[np.ndarray, np.ndarray]) -> None:
    drawn, real = rows
    training = drawn + np.float32(1e-3)
    found: dict[str, Any] = copies(nearest(drawn, training), nearest(real, training))
    assert found["closer"] == 1.0
    assert found["near"] == 1.0
    assert found["median_distance"] == pytest.approx(2e-3, rel=1e-2)
    assert copies(nearest(drawn, training), None).keys() == {"median_distance"}
