"""Verdicts on pictures whose scenes are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latentdiff.config import load_yaml
from latentdiff.data.scenes import EmojiScenes, Placed, Scene, ScenesConfig
from latentdiff.metrics.objects import Found
from latentdiff.metrics.psnr import reconstruct
from latentdiff.metrics.scene_accuracy import KINDS, Judge
from latentdiff.pipeline import TextToImage

CONFIG = load_yaml(ScenesConfig, Path(__file__).parents[2] / "configs/tiny/scenes.yaml")
ALONE = Scene((Placed("fox", 0, 0, 48),), None, "blue", "")
BESIDE = Scene((Placed("fox", 0, 16, 32), Placed("robot", 32, 16, 32)), "left", "red", "")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(CONFIG)


@pytest.mark.parametrize("scene", [ALONE, BESIDE], ids=["one", "two"])
def test_what_was_asked_for_is_right(judge: Judge, scene: Scene) -> None:
    verdict = judge(EmojiScenes(CONFIG).render(scene), scene)
    assert verdict.objects_right
    assert verdict.in_place
    assert verdict.background_right
    assert verdict.extra is None


@pytest.mark.parametrize(
    ("asked", "extra"),
    [
        (ALONE, Placed("robot", 32, 32, 32)),
        (ALONE, Placed("fox", 32, 32, 32)),
        (
            replace(BESIDE, objects=(Placed("fox", 0, 0, 32), Placed("robot", 32, 0, 32))),
            Placed("fox", 16, 32, 32),
        ),
        (replace(ALONE, objects=(Placed("fox", 0, 0, 32),)), Placed("robot", 16, 16, 48)),
    ],
    ids=["another", "the same once more", "a third", "a larger one"],
)
def test_an_object_that_nobody_asked_for_is_wrong(
    judge: Judge, asked: Scene, extra: Placed
) -> None:
    shown = replace(asked, objects=(*asked.objects, extra))
    verdict = judge(EmojiScenes(CONFIG).render(shown), asked)
    assert not verdict.objects_right
    assert not verdict.in_place
    assert verdict.background_right
    assert isinstance(verdict.extra, Found)


def test_what_the_vae_blurs_is_no_object() -> None:
    model = TextToImage.load("emoji").parts
    assert model.vocabulary is not None
    judge = Judge(model.vocabulary)
    for kind in KINDS:
        source, scenes = kind.source(model.vocabulary), kind.scenes(model.vocabulary, 8)
        pictures = np.stack([source.render(scene) for scene in scenes])
        verdicts = judge.all(reconstruct(model.autoencoder, pictures), scenes)
        assert [verdict.extra for verdict in verdicts] == [None] * 8


def test_exchanged_objects_are_right_and_out_of_place(judge: Judge) -> None:
    source = EmojiScenes(CONFIG)
    verdict = judge(source.render(source.swapped(BESIDE, 0)), BESIDE)
    assert verdict.objects_right
    assert not verdict.in_place
