"""Whether pictures show the scenes that their prompts ask for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from latentdiff.data.scenes import PHRASES, EmojiScenes, Scene, ScenesConfig, with_article
from latentdiff.metrics.objects import Found, Recogniser, both_in_place, find_background


@dataclass(frozen=True)
class Kind:
    """One of the four lists of prompts."""

    name: str
    split: Literal["train", "held_out"]
    pairs: bool
    title: str

    def source(self, config: ScenesConfig) -> EmojiScenes:
        """The split's scenes of one object or of two."""
        share = 1.0 if self.pairs else 0.0
        return EmojiScenes(config.model_copy(update={"pair_share": share}), self.split)

    def scenes(self, config: ScenesConfig, count: int) -> list[Scene]:
        """What the prompts ask for: the first `count` of them."""
        source = self.source(config)
        return [source.scene(index) for index in range(count)]


KINDS = (
    Kind("one", "train", False, "one object, on a background seen with it in training"),
    Kind("one_held_out", "held_out", False, "one object, on a background never seen with it"),
    Kind("two", "train", True, "two objects, seen together in training"),
    Kind("two_held_out", "held_out", True, "two objects, never seen together"),
)


def prompt_for(scene: Scene) -> str:
    """The plainest caption that says all of a scene."""
    names = [with_article(placed.concept) for placed in scene.objects]
    if scene.relation is not None:
        names.insert(1, PHRASES[scene.relation][0])
    return f"{' '.join(names)} on {with_article(scene.background)} background"


@dataclass(frozen=True)
class Verdict:
    """What one picture shows of what was asked for."""

    found: tuple[Found, ...]
    """As many objects as were asked for."""
    extra: Found | None
    """One more, if there is one."""
    background: str
    objects_right: bool
    """The objects are those that were asked for, and no more."""
    in_place: bool
    """That, and their relation holds."""
    background_right: bool


class Judge:
    """The recogniser and the questions put to it."""

    def __init__(self, config: ScenesConfig) -> None:
        self.backgrounds = config.backgrounds
        self.recogniser = Recogniser(EmojiScenes(config))

    def all(self, pictures: Iterable[np.ndarray], scenes: Iterable[Scene]) -> list[Verdict]:
        """One verdict on each picture."""
        return [self(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]

    def __call__(self, picture: np.ndarray, scene: Scene) -> Verdict:
        """picture: uint8 [H, W, 3]."""
        wanted = [placed.concept for placed in scene.objects]
        found, extra = self.recogniser.find(picture, len(wanted))
        background = find_background(picture, self.backgrounds)
        right = extra is None and sorted(item.concept for item in found) == sorted(wanted)
        in_place = right
        if right and scene.relation is not None:
            in_place = both_in_place(found, wanted, scene.relation)
        return Verdict(
            tuple(found), extra, background, right, in_place, background == scene.background
        )


def shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Shares of pictures that are right, in percent."""

    def percent(values: Sequence[bool]) -> float:
        return round(100 * sum(values) / len(values), 1)

    return {
        "objects": percent([verdict.objects_right for verdict in verdicts]),
        "objects_in_place": percent([verdict.in_place for verdict in verdicts]),
        "background": percent([verdict.background_right for verdict in verdicts]),
    }
