"""Emoji scenes: pure, true to their captions, and nothing held out ever trains."""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentdiff.config import load_yaml, parse
from latentdiff.data.scenes import (
    EmojiScenes,
    Scene,
    ScenesConfig,
    is_held_out_colour,
    is_held_out_pair,
)
from latentdiff.data.sprites import load_sprites
from latentdiff.errors import InputError

ROOT = Path(__file__).parents[2]
CONFIG = load_yaml(ScenesConfig, ROOT / "configs/emoji/scenes.yaml")
TRAIN, HELD_OUT = EmojiScenes(CONFIG), EmojiScenes(CONFIG, "held_out")
SPLITS = pytest.mark.parametrize("scenes", [TRAIN, HELD_OUT], ids=["train", "held_out"])
INDICES = st.integers(0, 2**40)
FEW = settings(deadline=None, max_examples=50)


def concepts(scene: Scene) -> list[str]:
    return [placed.concept for placed in scene.objects]


def with_values(**changes: Any) -> dict[str, Any]:
    return {**CONFIG.model_dump(), **changes}


# A function of (seed, index)

FINGERPRINT = """
import hashlib, sys
from latentdiff.config import load_yaml
from latentdiff.data.scenes import EmojiScenes, ScenesConfig
config = load_yaml(ScenesConfig, sys.argv[1])
digest = hashlib.sha256()
for split in ("train", "held_out"):
    scenes = EmojiScenes(config, split)
    for index in map(int, sys.argv[2:]):
        scene = scenes.scene(index)
        digest.update(repr((scene, scenes.recoloured(scene, 3))).encode())
        digest.update(scenes.render(scene).tobytes())
print(digest.hexdigest())
"""


def test_other_processes_other_hash_seeds_and_another_order_give_the_same_scenes() -> None:
    indices = [str(index) for index in (*range(30), 10**12)]
    path = str(ROOT / "configs/emoji/scenes.yaml")

    def fingerprint(hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", FINGERPRINT, path, *indices]
        return subprocess.run(
            command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout

    assert fingerprint("1") == fingerprint("2")

    forwards = [TRAIN.scene(index) for index in range(30)]
    backwards = [EmojiScenes(CONFIG).scene(index) for index in reversed(range(30))]
    assert forwards == backwards[::-1]


def test_a_copy_in_a_worker_process_draws_the_same() -> None:
    scene = TRAIN.scene(0)
    picture = TRAIN.render(scene)
    copy = pickle.loads(pickle.dumps(TRAIN))  # noqa: S301
    assert copy.scene(0) == scene
    np.testing.assert_array_equal(copy.render(scene), picture)


def test_other_seeds_indices_and_splits_give_other_scenes() -> None:
    other = EmojiScenes(CONFIG.model_copy(update={"seed": CONFIG.seed + 1}))
    sequences = [
        [source.scene(index) for index in range(start, start + 50)]
        for source, start in ((TRAIN, 0), (TRAIN, 50), (other, 0), (HELD_OUT, 0))
    ]
    scenes = list(itertools.chain(*sequences))
    assert len(set(scenes)) > 0.95 * len(scenes)


def test_an_item_is_the_scenes_picture_and_caption() -> None:
    item, scene = TRAIN[5], TRAIN.scene(5)
    assert item["caption"] == scene.caption
    np.testing.assert_array_equal(item["image"], TRAIN.render(scene))


# What is held out


def test_training_scenes_hold_nothing_that_is_held_out() -> None:
    for index in range(5000):
        scene = TRAIN.scene(index)
        for first, second in itertools.combinations(concepts(scene), 2):
            assert not is_held_out_pair(first, second)
        for noun in concepts(scene):
            assert not is_held_out_colour(noun, scene.background)


def test_held_out_scenes_hold_nothing_else() -> None:
    for index in range(2000):
        scene = HELD_OUT.scene(index)
        names = concepts(scene)
        if len(names) == 2:
            assert is_held_out_pair(*names)
        else:
            assert is_held_out_colour(names[0], scene.background)


def test_the_splits_together_leave_nothing_out() -> None:
    def seen(source: EmojiScenes) -> set[frozenset[str]]:
        pairs = EmojiScenes(source.config.model_copy(update={"pair_share": 1.0}), source.split)
        return {frozenset(concepts(pairs.scene(index))) for index in range(3000)}

    nouns = [concept.nouns[0] for concept in CONFIG.concepts[:16]]
    few = CONFIG.model_copy(update={"concepts": CONFIG.concepts[:16]})
    train, held_out = seen(EmojiScenes(few)), seen(EmojiScenes(few, "held_out"))
    assert not train & held_out
    assert train | held_out == {frozenset(pair) for pair in itertools.combinations(nouns, 2)}


def test_about_a_tenth_is_held_out() -> None:
    nouns = [concept.nouns[0] for concept in CONFIG.concepts]
    pairs = [is_held_out_pair(*pair) for pair in itertools.combinations(nouns, 2)]
    colours = [is_held_out_colour(*both) for both in itertools.product(nouns, CONFIG.backgrounds)]
    # Four standard deviations of a binomial share.
    for drawn in (pairs, colours):
        assert abs(np.mean(drawn) - 0.1) < 4 * np.sqrt(0.09 / len(drawn))


@given(st.text(), st.text())
def test_the_order_of_a_pair_does_not_matter(a: str, b: str) -> None:
    assert is_held_out_pair(a, b) == is_held_out_pair(b, a)


@given(st.text("abcdefgh ", min_size=1), st.text("abcdefgh ", min_size=1))
def test_what_is_held_out_is_held_out_for_ever(a: str, b: str) -> None:
    """The rule is a published function of the names: a change would leak into trained models."""

    def share(text: str) -> float:
        return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) / 2**64

    assert is_held_out_colour(a, b) == (share(f"colour|{a}|{b}") < 0.1)
    assert is_held_out_pair(a, b) == (share(f"pair|{min(a, b)}|{max(a, b)}") < 0.1)


def test_another_config_holds_the_same_things_out() -> None:
    other = ScenesConfig(
        seed=99,
        resolution=128,
        pair_share=1.0,
        sizes=(64,),
        pair_sizes=(48, 64),
        concepts=CONFIG.concepts[40:20:-1],
        backgrounds=dict.fromkeys(reversed(CONFIG.backgrounds), (1, 2, 3)),
    )
    mine = EmojiScenes(CONFIG.model_copy(update={"pair_share": 1.0}))
    theirs = EmojiScenes(other, "held_out")
    never = {frozenset(concepts(theirs.scene(index))) for index in range(500)}
    assert len(never) > 5
    assert not never & {frozenset(concepts(mine.scene(index))) for index in range(5000)}


# Where things are


@st.composite
def any_scenes(draw: st.DrawFn) -> EmojiScenes:
    side = draw(st.sampled_from([32, 40, 64, 128]))
    grids = [grid for grid in (1, 2, 4, 8, 16) if (side // 2) % grid == 0 and grid <= 0.14 * side]
    config = ScenesConfig(
        seed=draw(st.integers(0, 2**32)),
        resolution=side,
        pair_share=0.7,
        sizes=tuple(draw(st.lists(st.integers(1, side), min_size=1, max_size=3))),
        pair_sizes=tuple(draw(st.lists(st.integers(1, side // 2), min_size=1, max_size=3))),
        grid=draw(st.sampled_from(grids)),
        spread=draw(st.sampled_from([0.25, 0.4, 0.5])),
        concepts=CONFIG.concepts,
        backgrounds=CONFIG.backgrounds,
    )
    return EmojiScenes(config, draw(st.sampled_from(["train", "held_out"])))


@FEW
@given(any_scenes(), INDICES)
def test_boxes_lie_in_the_picture_on_the_grid_and_as_the_relation_says(
    scenes: EmojiScenes, index: int
) -> None:
    scene, config = scenes.scene(index), scenes.config
    for placed in scene.objects:
        assert placed.x >= 0 <= placed.y
        assert max(placed.x, placed.y) + placed.size <= config.resolution
        assert placed.x % config.grid == placed.y % config.grid == 0
    if scene.relation is None:
        (alone,) = scene.objects
        assert alone.size in config.sizes
        for start in (alone.x, alone.y):
            off = start + alone.size / 2 - config.resolution / 2
            assert abs(off) <= config.spread * config.resolution
        return
    first, second = scene.objects
    assert first.concept != second.concept
    assert {first.size, second.size} <= set(config.pair_sizes)
    assert true_of_boxes(scene, scene.relation)


def test_an_object_stands_at_every_place_within_the_spread_and_nowhere_else() -> None:
    """A box of 32 px in 64: its middle is 32 at 16, and 8 px from it at 8 and 24."""
    for spread, places in ((0, [16]), (0.125, [8, 16, 24]), (0.5, [0, 8, 16, 24, 32])):
        scenes = EmojiScenes(
            parse(ScenesConfig, with_values(spread=spread, sizes=[32], pair_share=0), "scenes")
        )
        boxes = [scenes.scene(index).objects[0] for index in range(600)]
        assert {(box.x, box.y) for box in boxes} == {(x, y) for x in places for y in places}


def true_of_boxes(scene: Scene, relation: str) -> bool:
    """The whole first box lies beyond the second's edge."""
    first, second = scene.objects
    return {
        "left": first.x + first.size <= second.x,
        "right": second.x + second.size <= first.x,
        "above": first.y + first.size <= second.y,
        "below": second.y + second.size <= first.y,
    }[relation]


def test_everything_occurs() -> None:
    scenes = [TRAIN.scene(index) for index in range(3000)]
    pairs = [scene for scene in scenes if scene.relation]
    assert abs(len(pairs) / len(scenes) - CONFIG.pair_share) < 0.04
    assert {scene.relation for scene in pairs} == {"left", "right", "above", "below"}
    assert {scene.background for scene in scenes} == set(CONFIG.backgrounds)
    assert {name for scene in scenes for name in concepts(scene)} == set(TRAIN.concepts)
    alone = [scene.objects[0] for scene in scenes if not scene.relation]
    assert {placed.size for placed in alone} == set(CONFIG.sizes)
    assert len({(placed.x, placed.y) for placed in alone}) > 10


def test_the_bundled_models_scenes_are_rich() -> None:
    assert len(CONFIG.backgrounds) >= 10
    assert len(CONFIG.concepts) >= 64
    assert len({concept.sprite for concept in CONFIG.concepts}) == len(CONFIG.concepts)


# What captions say

STYLE = "(?:a (?:picture|drawing) of |an (?:image|emoji) of )?"
SAYS = {
    "left": "(?:to the |on the )?left of",
    "right": "(?:to the |on the )?right of",
    "above": "above|over|on top of",
    "below": "below|under|beneath",
}
SIDES = {
    "left": ("on the left", "on the right"),
    "right": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
ARTICLE = "(?:an (?=[aeio]|u(?!fo))|a (?![aeio]|u(?!fo)))?"


def read(caption: str) -> list[tuple[list[str], str | None, str | None]]:
    """Every (canonical nouns, relation, colour) that a caption can mean."""
    canonical = {noun: concept.nouns[0] for concept in CONFIG.concepts for noun in concept.nouns}
    one, two = (f"{ARTICLE}(?P<{group}>{'|'.join(canonical)})" for group in ("one", "two"))
    colour = f"(?P<colour>{'|'.join(CONFIG.backgrounds)})"
    ground = f"{ARTICLE}{colour} background"
    clauses: list[tuple[str, str | None]] = [(one, None)]
    for side, phrases in SAYS.items():
        here, there = SIDES[side]
        clauses.append((f"{one} (?:{phrases}) {two}", side))
        clauses.append((f"{one} {here} and {two} {there}", side))
    meanings: list[tuple[list[str], str | None, str | None]] = []
    for clause, relation in clauses:
        words = STYLE + clause
        for whole in (
            words,
            f"{words} (?:on|in front of) {ground}",
            f"{words} on {colour}",
            f"{words}, {colour} background",
            f"{ground} with {words}",
        ):
            if match := re.fullmatch(whole, caption):
                groups = match.groupdict()
                nouns = [canonical[groups[name]] for name in ("one", "two") if groups.get(name)]
                meanings.append((nouns, relation, groups.get("colour")))
    return meanings


def check_caption(scene: Scene) -> None:
    meanings = read(scene.caption)
    assert len(meanings) == 1, scene.caption
    nouns, relation, colour = meanings[0]
    assert colour in (None, scene.background)
    if scene.relation is None:
        assert nouns == concepts(scene)
        return
    assert relation is not None
    boxes = {placed.concept: placed for placed in scene.objects}
    said = Scene(tuple(boxes[noun] for noun in nouns), None, scene.background, "")
    assert sorted(nouns) == sorted(concepts(scene))
    assert true_of_boxes(said, relation), scene


@SPLITS
def test_captions_are_true_and_say_one_thing(scenes: EmojiScenes) -> None:
    for index in range(1500):
        check_caption(scenes.scene(index))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.75, 1.0])
def test_captions_name_the_left_or_upper_object_first_as_often_as_asked(share: float) -> None:
    scenes = EmojiScenes(CONFIG.model_copy(update={"pair_share": 1.0, "reading_order": share}))
    drawn = [scenes.scene(index) for index in range(1500)]
    in_order = [read(scene.caption)[0][1] in ("left", "above") for scene in drawn]
    assert abs(np.mean(in_order) - share) <= 0.04 * (0 < share < 1)
    usual = EmojiScenes(CONFIG.model_copy(update={"pair_share": 1.0}))
    shown = [(scene.objects, scene.background) for scene in drawn[:99]]
    assert shown == [(s.objects, s.background) for s in map(usual.scene, range(99))]


def test_captions_vary() -> None:
    scenes = [TRAIN.scene(index) for index in range(3000)]
    captions = [scene.caption for scene in scenes]
    phrases = ["to the left of", " left of", "on the left of", "on the left and", "at the top and"]
    phrases += ["to the right of", " over ", "on top of", "below", "under", "beneath", "above"]
    phrases += ["in front of", ", blue background", "background with", "picture of", "emoji of"]
    for phrase in phrases:
        assert any(phrase in caption for caption in captions), phrase
    unnamed = [not read(caption)[0][2] for caption in captions[:500]]
    assert 0.15 < np.mean(unnamed) < 0.35
    for concept in CONFIG.concepts:
        mine = [scene.caption for scene in scenes if concept.nouns[0] in concepts(scene)]
        for noun in concept.nouns:
            assert any(noun in caption for caption in mine), noun


# What pictures show


def painted(config: ScenesConfig, scene: Scene) -> np.ndarray:
    """The same by Pillow's own resizing and compositing."""
    sprites = {concept.nouns[0]: concept.sprite for concept in config.concepts}
    size = (config.resolution, config.resolution)
    canvas = Image.new("RGBA", size, (*config.backgrounds[scene.background], 255))
    for placed in scene.objects:
        sprite = load_sprites()[sprites[placed.concept]].image
        layer = Image.new("RGBA", size)
        layer.paste(
            sprite.resize((placed.size, placed.size), Image.Resampling.BOX), (placed.x, placed.y)
        )
        canvas = Image.alpha_composite(canvas, layer)
    return np.asarray(canvas.convert("RGB"))


@SPLITS
def test_pictures_are_what_pillow_composites(scenes: EmojiScenes) -> None:
    for index in range(150):
        scene = scenes.scene(index)
        picture = scenes.render(scene)
        assert picture.shape == (CONFIG.resolution, CONFIG.resolution, 3)
        assert picture.dtype == np.uint8
        # Pillow rounds to eight bits at each of three steps, here only the end is rounded.
        difference = np.abs(picture.astype(int) - painted(CONFIG, scene))
        assert difference.max() <= 3
        assert difference.mean() < 0.3


@FEW
@given(any_scenes(), INDICES)
def test_the_background_is_untouched_around_the_boxes(scenes: EmojiScenes, index: int) -> None:
    scene = scenes.scene(index)
    picture, around = scenes.render(scene), np.ones((scenes.config.resolution,) * 2, dtype=bool)
    for placed in scene.objects:
        across = slice(placed.x, placed.x + placed.size)
        around[placed.y : placed.y + placed.size, across] = False
    assert (picture[around] == scenes.config.backgrounds[scene.background]).all()


def test_a_pair_leaves_the_corners_bare_and_shows_both() -> None:
    for index in range(200):
        scene = TRAIN.scene(index)
        ground = CONFIG.backgrounds[scene.background]
        picture = TRAIN.render(scene)
        if scene.relation is not None:
            assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == ground).all()
        for placed in scene.objects:
            box = picture[placed.y : placed.y + placed.size, placed.x : placed.x + placed.size]
            assert (box != ground).any(axis=-1).mean() > 0.1


def test_a_sprite_is_premultiplied_and_within_bounds() -> None:
    for concept in TRAIN.concepts:
        colour, alpha = TRAIN.sprite(concept, 24)
        assert colour.shape == (24, 24, 3)
        assert alpha.shape == (24, 24, 1)
        assert colour.min() >= 0
        assert alpha.max() <= 1
        assert (colour <= alpha + 1e-6).all()


# Scenes that differ in one thing


@SPLITS
def test_swapped_changes_places_and_nothing_else(scenes: EmojiScenes) -> None:
    for index in range(400):
        scene = scenes.scene(index)
        if scene.relation is None:
            continue
        swapped = scenes.swapped(scene, seed=index)
        boxes = [(placed.x, placed.y, placed.size) for placed in scene.objects]
        assert [(placed.x, placed.y, placed.size) for placed in swapped.objects] == boxes
        assert concepts(swapped) == concepts(scene)[::-1]
        assert (swapped.relation, swapped.background) == (scene.relation, scene.background)
        check_caption(swapped)
        assert swapped == scenes.swapped(scene, seed=index)
        assert (scenes.render(swapped) != scenes.render(scene)).any()


@SPLITS
def test_recoloured_changes_the_background_within_the_split(scenes: EmojiScenes) -> None:
    changed = 0
    for index in range(400):
        scene = scenes.scene(index)
        recoloured = scenes.recoloured(scene, seed=index)
        assert recoloured.objects == scene.objects
        assert recoloured.relation == scene.relation
        check_caption(recoloured)
        assert recoloured == scenes.recoloured(scene, seed=index)
        held_out = [is_held_out_colour(noun, recoloured.background) for noun in concepts(scene)]
        if scenes is TRAIN:
            assert not any(held_out)
            assert recoloured.background != scene.background
        elif scene.relation is None:
            assert all(held_out)
            others = set(CONFIG.backgrounds) - {scene.background}
            alone = not any(is_held_out_colour(concepts(scene)[0], colour) for colour in others)
            assert (recoloured.background == scene.background) == alone
        changed += recoloured.background != scene.background
    assert changed > 200


def test_variants_depend_on_their_seed() -> None:
    scene = next(scene for scene in map(TRAIN.scene, itertools.count()) if scene.relation)
    assert len({TRAIN.swapped(scene, seed).caption for seed in range(20)}) > 5
    assert len({TRAIN.recoloured(scene, seed).background for seed in range(40)}) > 5


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 60}, "resolution: .*multiple of 8"),
        ({"resolution": 0}, "resolution"),
        ({"sizes": (65,)}, "sizes must lie between 1 and the resolution, 64"),
        ({"sizes": ()}, "sizes"),
        ({"pair_sizes": (33,)}, "pair_sizes must lie between 1 and half the resolution, 32"),
        ({"grid": 5}, "grid must divide half the resolution, 32"),
        ({"grid": 16}, "grid must divide half the resolution, 32, and be at most 8"),
        ({"pair_share": 1.5}, "pair_share"),
        ({"spread": 0.6}, "spread"),
        (
            {"sizes": (36,), "spread": 0.03},
            "spread leaves an object of 36 pixels no place .* 0.0313",
        ),
        ({"backgrounds": {}}, "backgrounds"),
        ({"backgrounds": {"red": (256, 0, 0)}}, r"backgrounds\.red\.0"),
        ({"backgrounds": {"red": (0, -1, 0)}}, r"backgrounds\.red\.1"),
        ({"backgrounds": {"red": (0, 0)}}, r"backgrounds\.red"),
        ({"concepts": [{"sprite": "fox", "nouns": ["fox"]}]}, "concepts"),
        (
            {
                "concepts": [
                    {"sprite": "fox", "nouns": ["fox"]},
                    {"sprite": "lion", "nouns": ["lion", "fox"]},
                ]
            },
            "nouns used twice: fox",
        ),
        (
            {"concepts": [{"sprite": "fox", "nouns": []}, {"sprite": "lion", "nouns": ["lion"]}]},
            r"concepts\.0\.nouns",
        ),
        (
            {"concepts": [{"sprite": "fox", "nouns": [""]}, {"sprite": "lion", "nouns": ["lion"]}]},
            r"concepts\.0\.nouns\.0",
        ),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
    ],
)
def test_a_bad_config_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(ScenesConfig, with_values(**changes), "scenes.yaml")


def test_an_unknown_sprite_is_refused() -> None:
    values = [{"sprite": "fox", "nouns": ["fox"]}, {"sprite": "foxx", "nouns": ["vixen"]}]
    config = parse(ScenesConfig, with_values(concepts=values), "scenes.yaml")
    with pytest.raises(InputError, match="There are no sprites named foxx"):
        EmojiScenes(config)


@pytest.mark.parametrize("pair_share", [0.0, 1.0])
def test_a_split_without_scenes_is_refused(pair_share: float) -> None:
    """Two nouns and a colour of which nothing is held out: that split would be sought for ever."""
    nouns = [concept.nouns[0] for concept in CONFIG.concepts]
    first, second = next(
        pair
        for pair in itertools.combinations(nouns, 2)
        if not is_held_out_pair(*pair) and not any(is_held_out_colour(n, "blue") for n in pair)
    )
    config = CONFIG.model_copy(
        update={
            "pair_share": pair_share,
            "concepts": tuple(TRAIN.concepts[noun] for noun in (first, second)),
            "backgrounds": {"blue": (0, 0, 255)},
        }
    )
    assert EmojiScenes(config).scene(0).background == "blue"
    with pytest.raises(InputError, match="no scene of"):
        EmojiScenes(config, "held_out").scene(0)


@SPLITS
def test_replaced_changes_one_object_within_the_split(scenes: EmojiScenes) -> None:
    changed = 0
    for index in range(300):
        scene = scenes.scene(index)
        for number in range(len(scene.objects)):
            replaced = scenes.replaced(scene, number, seed=index)
            before, after = concepts(scene), concepts(replaced)
            assert [old == new for old, new in zip(before, after, strict=True)].count(False) <= 1
            changed += before[number] != after[number]
            boxes = [(placed.x, placed.y, placed.size) for placed in scene.objects]
            assert [(placed.x, placed.y, placed.size) for placed in replaced.objects] == boxes
            assert (replaced.relation, replaced.background) == (scene.relation, scene.background)
            check_caption(replaced)
            assert replaced == scenes.replaced(scene, number, seed=index)
            if scenes is TRAIN:
                assert not any(is_held_out_colour(n, scene.background) for n in after)
                assert len(after) == 1 or not is_held_out_pair(*after)
            elif len(after) == 2:
                assert is_held_out_pair(*after)
            else:
                assert is_held_out_colour(after[0], scene.background)
    assert changed > 300


def test_replacements_look_more_alike_than_chance() -> None:
    """Mean colours over the sprite at full size are nearer than those of two random sprites."""
    sprites = load_sprites()
    means = {}
    for concept in CONFIG.concepts:
        rgba = np.asarray(sprites[concept.sprite].image, dtype=float) / 255
        means[concept.nouns[0]] = (rgba[..., :3] * rgba[..., 3:]).mean(axis=(0, 1))

    def distance(a: str, b: str) -> float:
        return float(np.linalg.norm(means[a] - means[b]))

    chosen = [
        (scene.objects[0].concept, TRAIN.replaced(scene, 0, seed=0).objects[0].concept)
        for scene in map(TRAIN.scene, range(300))
    ]
    near = np.mean([distance(a, b) for a, b in chosen if a != b])
    assert near < 0.8 * np.mean([distance(a, b) for a, b in itertools.combinations(means, 2)])
