"""Emoji scenes: pictures with captions, each a pure function of (seed, index)."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field, field_validator, model_validator

from latentdiff.config import Config
from latentdiff.data.sprites import SPRITES_FILE, load_sprites
from latentdiff.errors import InputError

Relation = Literal["left", "right", "above", "below"]
RELATIONS: tuple[Relation, ...] = ("left", "right", "above", "below")
OPPOSITE: dict[Relation, Relation] = {
    "left": "right",
    "right": "left",
    "above": "below",
    "below": "above",
}
PHRASES: dict[Relation, tuple[str, ...]] = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
SIDES: dict[Relation, tuple[str, str]] = {
    "left": ("on the left", "on the right"),
    "right": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
STYLES = ("a picture of", "an image of", "a drawing of", "an emoji of")

HELD_OUT_PAIRS = 0.10
HELD_OUT_COLOURS = 0.10
LOOKALIKES = 8
"""Of how many of the objects most like it one is drawn to replace an object."""
SPREAD = 0.14
"""How far two objects may stand from their middle line, as a share of the picture's side."""


class Concept(Config):
    """One thing that scenes show."""

    sprite: str
    """The sprite's name in the sprites file."""
    nouns: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    """What captions call it, the canonical noun first; each a countable singular."""
    weight: int = Field(default=1, gt=0, le=1000)
    """How often scenes show it, beside a concept of weight 1."""


Level = Annotated[int, Field(ge=0, le=255)]


class ScenesConfig(Config):
    """What scenes are made of."""

    seed: int
    """Scene number `index` is a pure function of (seed, index)."""
    resolution: int = Field(gt=0, multiple_of=8)
    """Width and height in pixels."""
    pair_share: float = Field(ge=0, le=1)
    """Share of scenes that show two objects."""
    reading_order: float = Field(default=0.5, ge=0, le=1)
    """Share of their captions that name the left or the upper object first. At 1 the first word is
    the first place, which is far sooner learned than what "to the right of" does to it."""
    sizes: tuple[int, ...] = Field(min_length=1)
    """Sides in pixels of the square box of an object that stands alone."""
    spread: float = Field(default=0.5, ge=0, le=0.5)
    """How far its middle may lie from the picture's, across and down, as a share of the picture's
    side. At 0.5 it stands anywhere."""
    pair_sizes: tuple[int, ...] = Field(min_length=1)
    """The same of each of two objects; at most half the resolution."""
    grid: int = Field(default=1, gt=0)
    """Boxes start at multiples of it, in pixels. At the VAE's factor an object of one size has the
    same latents wherever it stands, which a small network learns far sooner."""
    concepts: tuple[Concept, ...] = Field(min_length=2)
    """Everything that scenes show."""
    backgrounds: dict[str, tuple[Level, Level, Level]] = Field(min_length=1)
    """Background colours by name, sRGB 0..255."""

    @model_validator(mode="after")
    def _fits(self) -> ScenesConfig:
        side = self.resolution
        if not all(0 < size <= side for size in self.sizes):
            raise ValueError(f"sizes must lie between 1 and the resolution, {side}")
        if not all(0 < size <= side // 2 for size in self.pair_sizes):
            raise ValueError(f"pair_sizes must lie between 1 and half the resolution, {side // 2}")
        if side // 2 % self.grid or self.grid > side * SPREAD:
            raise ValueError(
                f"grid must divide half the resolution, {side // 2}, and be at most "
                f"{int(side * SPREAD)}"
            )
        for size in self.sizes:
            nearest = min(abs(p - (side - size) / 2) for p in range(0, side - size + 1, self.grid))
            if nearest > self.spread * side:
                least = math.ceil(1e4 * nearest / side) / 1e4
                raise ValueError(
                    f"spread leaves an object of {size} pixels no place on the grid; it must be "
                    f"at least {least}"
                )
        return self

    @field_validator("concepts")
    @classmethod
    def _unique(cls, concepts: tuple[Concept, ...]) -> tuple[Concept, ...]:
        nouns = [noun for concept in concepts for noun in concept.nouns]
        if twice := {noun for noun in nouns if nouns.count(noun) > 1}:
            raise ValueError(f"nouns used twice: {', '.join(sorted(twice))}")
        return concepts


@dataclass(frozen=True)
class Placed:
    """An object in a scene: its canonical noun, its box's upper left corner and size in pixels."""

    concept: str
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class Scene:
    """One picture before it is drawn. The first object is `relation` of the second."""

    objects: tuple[Placed, ...]
    relation: Relation | None
    background: str
    caption: str


def _share(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def is_held_out_pair(a: str, b: str) -> bool:
    """Whether scenes with these two objects (canonical nouns, any order) never train a model."""
    first, second = sorted((a, b))
    return _share(f"pair|{first}|{second}") < HELD_OUT_PAIRS


def is_held_out_colour(concept: str, colour: str) -> bool:
    """Whether this object on this background never trains a model."""
    return _share(f"colour|{concept}|{colour}") < HELD_OUT_COLOURS


class EmojiScenes:
    """An endless set of captioned pictures.

    split "train" holds no held-out pair and no held-out (object, colour); in split "held_out"
    every single object stands on a colour held out for it, and every pair is a held-out pair.
    """

    def __init__(self, config: ScenesConfig, split: Literal["train", "held_out"] = "train") -> None:
        self.config = config
        self.split = split
        self.concepts = {concept.nouns[0]: concept for concept in config.concepts}
        sprites = load_sprites()
        if missing := [c.sprite for c in config.concepts if c.sprite not in sprites]:
            raise InputError(f"There are no sprites named {', '.join(missing)}.")
        self._sprites = {noun: sprites[c.sprite] for noun, c in self.concepts.items()}
        self._nouns, self._colours = list(self.concepts), list(config.backgrounds)
        self._weights = [concept.weight for concept in config.concepts]
        self._drawn: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
        self._near: dict[str, list[str]] = {}
        self._checked: set[int] = set()

    @property
    def digest(self) -> str:
        """sha256 of what the scenes are a function of: configuration, split and sprites."""
        words = f"{self.config.model_dump_json()}|{self.split}|".encode()
        return hashlib.sha256(words + SPRITES_FILE.read_bytes()).hexdigest()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """image: uint8 array [H, W, 3]; caption: str."""
        scene = self.scene(index)
        return {"image": self.render(scene), "caption": scene.caption}

    def scene(self, index: int) -> Scene:
        """Scene number `index` (any integer >= 0).

        Raises InputError when the split has no scene of as many objects.
        """
        rng = random.Random(f"{self.config.seed}|{self.split}|{index}")
        count = 2 if rng.random() < self.config.pair_share else 1
        if count not in self._checked:
            self._refuse_none(count)
            self._checked.add(count)
        while True:
            nouns = rng.sample(self._nouns, count, counts=self._weights)
            colour = rng.choice(self._colours)
            if len(set(nouns)) == count and self._belongs(nouns, colour):
                break
        relation = rng.choice(RELATIONS) if count == 2 else None
        objects = self._place(nouns, relation, rng)
        return Scene(objects, relation, colour, self._caption(objects, relation, colour, rng))

    def _refuse_none(self, count: int) -> None:
        groups = itertools.combinations(self._nouns, count)
        if not any(self._belongs(*both) for both in itertools.product(groups, self._colours)):
            raise InputError(
                f"These concepts and backgrounds make no scene of {count} for the split "
                f"{self.split!r}: add more of them."
            )

    def _belongs(self, nouns: Sequence[str], colour: str) -> bool:
        held_colour = any(is_held_out_colour(noun, colour) for noun in nouns)
        held_pair = len(nouns) == 2 and is_held_out_pair(nouns[0], nouns[1])
        if self.split == "train":
            return not held_colour and not held_pair
        return held_pair if len(nouns) == 2 else held_colour

    def _place(
        self, nouns: Sequence[str], relation: Relation | None, rng: random.Random
    ) -> tuple[Placed, ...]:
        config, side = self.config, self.config.resolution
        if relation is None:
            size = rng.choice(config.sizes)
            places = self.middle(size, config.spread)
            return (Placed(nouns[0], rng.choice(places), rng.choice(places), size),)
        placed = []
        for number, noun in enumerate(nouns):
            size = rng.choice(config.pair_sizes)
            lower = (number == 0) == (relation in ("left", "above"))
            along = rng.choice(range(0, side // 2 - size + 1, config.grid))
            along += 0 if lower else side // 2
            across = rng.choice(self.middle(size, SPREAD))
            x, y = (along, across) if relation in ("left", "right") else (across, along)
            placed.append(Placed(noun, x, y, size))
        return tuple(placed)

    def middle(self, size: int, spread: float) -> list[int]:
        """Where boxes of a size may start, across or down."""
        side = self.config.resolution
        return [
            place
            for place in range(0, side - size + 1, self.config.grid)
            if abs(place - (side - size) / 2) <= spread * side
        ]

    def _caption(
        self,
        objects: Sequence[Placed],
        relation: Relation | None,
        colour: str,
        rng: random.Random,
    ) -> str:
        articles = rng.random() < 0.75
        names = [self._name(placed.concept, articles, rng) for placed in objects]
        if relation is None:
            words = names[0]
        else:
            share = self.config.reading_order
            if rng.random() < (1 - share if relation in ("left", "above") else share):
                names.reverse()
                relation = OPPOSITE[relation]
            if rng.random() < 0.75:
                words = f"{names[0]} {rng.choice(PHRASES[relation])} {names[1]}"
            else:
                first, second = SIDES[relation]
                words = f"{names[0]} {first} and {names[1]} {second}"
        if articles and rng.random() < 0.2:
            words = f"{rng.choice(STYLES)} {words}"
        if rng.random() < 0.25:
            return words
        ground = f"{with_article(colour)} background" if articles else f"{colour} background"
        return rng.choice(
            (
                f"{words} on {ground}",
                f"{words} on {ground}",
                f"{words} on {colour}",
                f"{words}, {colour} background",
                f"{words} in front of {ground}",
                f"{ground} with {words}",
            )
        )

    def _name(self, concept: str, article: bool, rng: random.Random) -> str:
        noun = rng.choice(self.concepts[concept].nouns)
        return with_article(noun) if article else noun

    def swapped(self, scene: Scene, seed: int) -> Scene:
        """The same two objects in each other's places, with a caption of its own."""
        first, second = scene.objects
        objects = (
            replace(first, concept=second.concept),
            replace(second, concept=first.concept),
        )
        rng = random.Random(f"swapped|{seed}|{scene}")
        caption = self._caption(objects, scene.relation, scene.background, rng)
        return replace(scene, objects=objects, caption=caption)

    def recoloured(self, scene: Scene, seed: int) -> Scene:
        """The same objects on another background of the same split, with a caption of its own."""
        rng = random.Random(f"recoloured|{seed}|{scene}")
        nouns = [placed.concept for placed in scene.objects]
        colours = [
            colour
            for colour in self._colours
            if colour != scene.background and self._belongs(nouns, colour)
        ]
        colour = rng.choice(colours or [scene.background])
        caption = self._caption(scene.objects, scene.relation, colour, rng)
        return replace(scene, background=colour, caption=caption)

    def replaced(self, scene: Scene, number: int, seed: int) -> Scene:
        """Object `number` replaced by one that looks like it, with a caption of its own.

        Stays in the split; where no other object may stand there, the scene is as it was.
        """
        old = scene.objects[number].concept
        others = [placed.concept for placed in scene.objects if placed.concept != old]
        near = [
            noun
            for noun in self._lookalikes(old)
            if noun not in others and self._belongs([noun, *others], scene.background)
        ]
        rng = random.Random(f"replaced|{seed}|{number}|{scene}")
        noun = rng.choice(near[:LOOKALIKES] or [old])
        objects = list(scene.objects)
        objects[number] = replace(objects[number], concept=noun)
        caption = self._caption(objects, scene.relation, scene.background, rng)
        return replace(scene, objects=tuple(objects), caption=caption)

    def _lookalikes(self, concept: str) -> list[str]:
        """All other concepts, those first whose sprites, seen at 4 x 4 pixels, differ least."""
        if not self._near:
            blurs = np.stack(
                [np.concatenate(self.sprite(noun, 4), axis=-1).ravel() for noun in self._nouns]
            )
            distances = np.square(blurs[:, None] - blurs).sum(axis=-1)
            for noun, row in zip(self._nouns, distances, strict=True):
                order = [self._nouns[number] for number in row.argsort(kind="stable")]
                self._near[noun] = [other for other in order if other != noun]
        return self._near[concept]

    def sprite(self, concept: str, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The object at size x size pixels, in 0..1: premultiplied RGB [s, s, 3], alpha [s, s, 1].

        Kept for the next call; not to be written to.
        """
        if (concept, size) not in self._drawn:
            self._drawn[concept, size] = _scaled(self._sprites[concept].image, size)
        return self._drawn[concept, size]

    def render(self, scene: Scene) -> np.ndarray:
        """uint8 [H, W, 3]: the objects composited over the background (Porter & Duff 1984)."""
        side = self.config.resolution
        ground = np.array(self.config.backgrounds[scene.background], dtype=np.float32) / 255
        canvas = np.broadcast_to(ground, (side, side, 3)).copy()
        for placed in scene.objects:
            colour, alpha = self.sprite(placed.concept, placed.size)
            window = canvas[placed.y : placed.y + placed.size, placed.x : placed.x + placed.size]
            window *= 1 - alpha
            window += colour
        return np.rint(canvas * 255).astype(np.uint8)


def with_article(words: str) -> str:
    """The words after "a" or "an"."""
    vowel = words[0] in "aeiou" and not words.startswith(("uf", "uni"))
    return f"{'an' if vowel else 'a'} {words}"


def _scaled(picture: Image.Image, size: int) -> tuple[np.ndarray, np.ndarray]:
    rgba = np.asarray(picture, dtype=np.float32) / 255
    planes = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)
    scaled = np.stack(
        [
            np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BOX))
            for plane in np.moveaxis(planes, -1, 0)
        ],
        axis=-1,
    )
    return scaled[..., :3], scaled[..., 3:]
