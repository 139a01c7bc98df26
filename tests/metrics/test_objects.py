"""The recogniser of objects, on scenes whose objects are known."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.config import load_yaml
from latentdiff.data.scenes import RELATIONS, EmojiScenes, Placed, Relation, Scene, ScenesConfig
from latentdiff.metrics.objects import (
    Found,
    Recogniser,
    both_in_place,
    find_background,
    relation_holds,
)

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = load_yaml(ScenesConfig, CONFIGS / "emoji/scenes.yaml")
SCENES = EmojiScenes(CONFIG)
KINDS = [(share, split) for share in (0.0, 1.0) for split in ("train", "held_out")]
COUNT = 60
FEW = CONFIG.concepts[:5]


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    return Recogniser(SCENES)


def noisy(picture: np.ndarray, seed: int) -> np.ndarray:
    """White noise of standard deviation 12 of 255, rounded and clipped to eight bits."""
    noise = np.random.default_rng(seed).normal(scale=12, size=picture.shape)
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


def clean(picture: np.ndarray, seed: int) -> np.ndarray:
    return picture


def scenes_of(kind: tuple[float, str]) -> list[Scene]:
    share, split = kind
    config = CONFIG.model_copy(update={"pair_share": share})
    source = EmojiScenes(config, "train" if split == "train" else "held_out")
    return [source.scene(1_000_000 + index) for index in range(COUNT)]


def right(found: list[Found], scene: Scene) -> bool:
    """Each object found by name, its centre within a quarter of its size."""
    found = sorted(found, key=lambda item: item.concept)
    wanted = sorted(scene.objects, key=lambda item: item.concept)
    return all(
        (item.concept == placed.concept)
        and abs(item.x - (placed.x + placed.size / 2)) <= placed.size / 4
        and abs(item.y - (placed.y + placed.size / 2)) <= placed.size / 4
        for item, placed in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("spoil", [clean, noisy])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_real_renders_are_recognised(
    recogniser: Recogniser,
    kind: tuple[float, str],
    spoil: Callable[[np.ndarray, int], np.ndarray],
) -> None:
    correct = {"objects": 0, "background": 0, "in place": 0}
    for seed, scene in enumerate(scenes_of(kind)):
        picture = spoil(SCENES.render(scene), seed)
        found, extra = recogniser.find(picture, len(scene.objects))
        assert extra is None
        correct["objects"] += right(found, scene)
        correct["background"] += find_background(picture, CONFIG.backgrounds) == scene.background
        names = [placed.concept for placed in scene.objects]
        correct["in place"] += scene.relation is None or both_in_place(found, names, scene.relation)
    assert min(correct.values()) >= 0.98 * COUNT, correct


def test_every_object_is_told_from_every_other(recogniser: Recogniser) -> None:
    """Each alone, small, on the two backgrounds that hide most: a confusion matrix's diagonal."""
    confused = []
    scene = next(scene for scene in map(SCENES.scene, itertools.count()) if not scene.relation)
    for concept, ground in itertools.product(SCENES.concepts, ("white", "black")):
        placed = dataclasses.replace(scene.objects[0], concept=concept, x=8, y=16, size=32)
        shown = dataclasses.replace(scene, objects=(placed,), background=ground)
        (found,), _ = recogniser.find(SCENES.render(shown), 1)
        if found != Found(concept, 8 + 16, 16 + 16, 32):
            confused.append((concept, ground, found))
    assert confused == []


def test_another_object_is_not_accepted(recogniser: Recogniser) -> None:
    """The verdict follows the picture: prompts with one object or the places exchanged fail."""
    accepted = 0
    for index, scene in enumerate(scenes_of((1.0, "train"))):
        assert scene.relation is not None
        first, second = (placed.concept for placed in scene.objects)
        third = next(n for n in list(SCENES.concepts)[index:] if n not in (first, second))
        shown = dataclasses.replace(scene.objects[1], concept=third)
        changed = dataclasses.replace(scene, objects=(scene.objects[0], shown))
        found, _ = recogniser.find(SCENES.render(changed), 2)
        accepted += both_in_place(found, [first, second], scene.relation)
        found, _ = recogniser.find(SCENES.render(SCENES.swapped(scene, 0)), 2)
        accepted += both_in_place(found, [first, second], scene.relation)
    assert accepted == 0


def test_a_missing_object_is_not_accepted(recogniser: Recogniser) -> None:
    accepted = 0
    scenes = scenes_of((1.0, "train"))
    for scene in scenes:
        assert scene.relation is not None
        names = [placed.concept for placed in scene.objects]
        alone = dataclasses.replace(scene, objects=scene.objects[:1])
        found, _ = recogniser.find(SCENES.render(alone), 2)
        assert names[0] in [item.concept for item in found]
        accepted += both_in_place(found, names, scene.relation)
    # What is called the second object is then any of 69, in any of many places.
    assert accepted <= 0.02 * len(scenes)


def test_pictures_of_noise_are_accepted_at_most_by_chance(recogniser: Recogniser) -> None:
    rng = np.random.default_rng(0)
    accepted = 0
    for scene in scenes_of((0.0, "train")):
        picture = rng.integers(0, 256, (CONFIG.resolution, CONFIG.resolution, 3), dtype=np.uint8)
        (found,), _ = recogniser.find(picture, 1)
        accepted += found.concept == scene.objects[0].concept
    # 60 draws of 1 in 69: more than 5 has a probability below 0.001.
    assert accepted <= 5


def test_found_boxes_lie_in_the_picture(recogniser: Recogniser) -> None:
    for scene in scenes_of((1.0, "train"))[:20]:
        for item in recogniser.find(SCENES.render(scene), 2)[0]:
            half = item.size / 2
            assert half <= min(item.x, item.y)
            assert max(item.x, item.y) + half <= CONFIG.resolution


def test_the_search_is_least_squares_over_all_sprites_sizes_and_places() -> None:
    """By pasting every sprite everywhere, in a picture of noise where nothing stands out."""
    config = CONFIG.model_copy(
        update={"resolution": 24, "sizes": (12, 20), "pair_sizes": (12,), "concepts": FEW}
    )
    scenes = EmojiScenes(config)
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    ground = np.array(config.backgrounds[find_background(picture, config.backgrounds)]) / 255
    errors = {}
    for concept, size in itertools.product(scenes.concepts, config.sizes):
        colour, alpha = scenes.sprite(concept, size)
        for y, x in itertools.product(range(24 - size + 1), repeat=2):
            canvas = np.broadcast_to(ground, (24, 24, 3)).copy()
            canvas[y : y + size, x : x + size] *= 1 - alpha
            canvas[y : y + size, x : x + size] += colour
            errors[Found(concept, x + size / 2, y + size / 2, size)] = np.square(
                canvas - picture / 255
            ).sum()
    assert Recogniser(scenes).find(picture, 1)[0] == [min(errors, key=errors.__getitem__)]


def test_one_object_too_many_is_found(recogniser: Recogniser) -> None:
    """Of any size, beside one object or two, wherever it hides less than half of one."""
    rng, found, count = random.Random(0), 0, 0
    for index in itertools.count():
        scene = SCENES.scene(3_000_000 + index)
        size = rng.choice(CONFIG.sizes)
        x, y = rng.randrange(65 - size), rng.randrange(65 - size)
        if any(shared(placed, x, y, size) > 0.4 for placed in scene.objects):
            continue
        extra = Placed(rng.choice(list(SCENES.concepts)), x, y, size)
        picture = SCENES.render(dataclasses.replace(scene, objects=(*scene.objects, extra)))
        found += recogniser.find(picture, len(scene.objects))[1] is not None
        count += 1
        if count == 100:
            break
    assert found >= 95


def shared(placed: Placed, x: int, y: int, size: int) -> float:
    """Which part of the smaller box both share."""
    across = min(placed.x + placed.size, x + size) - max(placed.x, x)
    down = min(placed.y + placed.size, y + size) - max(placed.y, y)
    return max(across, 0) * max(down, 0) / min(placed.size, size) ** 2


def test_an_object_drawn_larger_than_asked_for_is_not_two(recogniser: Recogniser) -> None:
    """Of pairs' size the recogniser knows one; what the larger one shows around it is no other."""
    scene = next(scene for scene in map(SCENES.scene, itertools.count()) if not scene.relation)
    for concept in ("fox", "hamburger", "bus"):
        larger = Placed(concept, 8, 8, 48)
        picture = SCENES.render(dataclasses.replace(scene, objects=(larger,)))
        assert recogniser.find(picture, 1) == ([Found(concept, 32, 32, 48)], None)


# Backgrounds

COLOURS = {"red": (224, 32, 32), "green": (48, 160, 64), "white": (255, 255, 255)}


@given(st.sampled_from(sorted(COLOURS)), st.integers(0, 2**32))
def test_the_background_is_that_of_the_rim(name: str, seed: int) -> None:
    """Whatever stands in the middle, or over less than half of the rim."""
    rng = np.random.default_rng(seed)
    picture = np.broadcast_to(np.array(COLOURS[name], dtype=np.uint8), (16, 16, 3)).copy()
    picture[1:-1, 1:-1] = rng.integers(0, 256, (14, 14, 3))
    picture[:7] = rng.integers(0, 256, 3)
    assert find_background(picture, COLOURS) == name


def test_the_background_is_the_nearest_colour() -> None:
    picture = np.full((16, 16, 3), (200, 60, 60), dtype=np.uint8)
    assert find_background(picture, COLOURS) == "red"
    assert find_background(picture, {"pink": (255, 160, 200), "blue": (48, 88, 224)}) == "pink"


# Relations


def at(x: float, y: float, concept: str = "fox") -> Found:
    return Found(concept, x, y, 24)


@pytest.mark.parametrize(
    ("right", "down", "expected"),
    [
        (-20, 0, "left"),
        (-20, 19, "left"),
        (-20, -19, "left"),
        (20, 0, "right"),
        (20, -19, "right"),
        (0, -20, "above"),
        (19, -20, "above"),
        (0, 20, "below"),
        (-19, 20, "below"),
        (20, 20, None),
        (-20, 20, None),
        (0, 0, None),
    ],
)
def test_relations(right: float, down: float, expected: Relation | None) -> None:
    """The first stands `right` pixels to the right of and `down` below the second."""
    first, second = at(32 + right, 32 + down), at(32, 32)
    true = [relation for relation in RELATIONS if relation_holds(first, second, relation)]
    assert true == ([expected] if expected else [])


PLACES = st.tuples(st.integers(0, 64), st.integers(0, 64))


@given(PLACES, PLACES)
def test_at_most_one_relation_holds_and_its_opposite_from_the_other_side(
    one: tuple[int, int], two: tuple[int, int]
) -> None:
    first, second = at(*one), at(*two)
    true = [relation for relation in RELATIONS if relation_holds(first, second, relation)]
    across, down = abs(one[0] - two[0]), abs(one[1] - two[1])
    assert len(true) == (across != down)
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    reverse = [relation for relation in RELATIONS if relation_holds(second, first, relation)]
    assert [opposite[relation] for relation in true] == reverse


FOX, OWL, BUS = at(10, 30, "fox"), at(50, 30, "owl"), at(50, 30, "bus")


@pytest.mark.parametrize(
    ("found", "wanted", "relation", "verdict"),
    [
        ([FOX, OWL], ["fox", "owl"], "left", True),
        ([OWL, FOX], ["fox", "owl"], "left", True),
        ([FOX, OWL], ["owl", "fox"], "right", True),
        ([OWL, FOX], ["owl", "fox"], "right", True),
        ([FOX, OWL], ["fox", "owl"], "right", False),
        ([FOX, OWL], ["owl", "fox"], "left", False),
        ([FOX, OWL], ["fox", "owl"], "above", False),
        ([FOX, OWL], ["fox", "owl"], "below", False),
        ([FOX, BUS], ["fox", "owl"], "left", False),
        ([FOX, at(50, 30, "fox")], ["fox", "owl"], "left", False),
        ([OWL, BUS], ["fox", "owl"], "left", False),
        ([FOX], ["fox", "owl"], "left", False),
    ],
)
def test_both_in_place(
    found: list[Found], wanted: list[str], relation: Relation, verdict: bool
) -> None:
    assert both_in_place(found, wanted, relation) is verdict


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/scenes.yaml")), ids=lambda p: p.parent.name)
def test_relations_hold_of_every_real_scene(path: Path) -> None:
    config = load_yaml(ScenesConfig, path).model_copy(update={"pair_share": 1.0})
    source = EmojiScenes(config)
    for index in range(300):
        scene = source.scene(index)
        assert scene.relation is not None
        found = [
            Found(placed.concept, placed.x + placed.size / 2, placed.y + placed.size / 2, 1)
            for placed in scene.objects
        ]
        assert both_in_place(found, [item.concept for item in found], scene.relation)
