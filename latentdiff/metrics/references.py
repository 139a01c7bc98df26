"""The real pictures that drawn ones are compared with."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Annotated, Literal, TypeAlias

from PIL import Image
from pydantic import Field

from latentdiff.config import Config
from latentdiff.data.decode import UnreadableImage
from latentdiff.data.images import SourceConfig, open_source
from latentdiff.data.scenes import EmojiScenes, Placed, Scene
from latentdiff.data.sprites import SPRITES_FILE
from latentdiff.errors import InputError
from latentdiff.metrics.identity import digest_of
from latentdiff.metrics.prompts import JUDGED_BY, Prompts, Sha256
from latentdiff.model_files import file_digest

FIRST_RENDER = 1_000_000
"""Number of the first scene of a reference."""
TRIES = 50
"""Scenes looked at for each that a reference takes, before there are said to be too few others."""


class RendersReference(Config):
    """Renders of scenes of the prompts' kinds, each of another, and of none that they ask for."""

    type: Literal["renders"]
    """This kind."""
    count: int = Field(gt=0)
    """Of each kind."""


class SourcesReference(Config):
    """Pictures of data sets."""

    type: Literal["sources"]
    """This kind."""
    sources: dict[str, SourceConfig] = Field(min_length=1)
    """By names: all together are what all drawn pictures are compared with, and one that is named
    like a category of prompts is what those of the category are."""
    sha256: Sha256 | None = None
    """What evaluation.json says of them as fixed.reference, refused where it is another; null takes
    any. Of files it is the names, lengths and captions, not the pixels: it tells another selection
    or order, not a picture that was changed and kept its length."""


ReferenceConfig: TypeAlias = Annotated[
    RendersReference | SourcesReference, Field(discriminator="type")
]


class Reference:
    """Real pictures numbered from 0, those of one group next to each other.

    digest: sha256 of what identifies them.
    """

    def __init__(self, parts: dict[str, tuple[int, Callable[[int], Image.Image], str]]) -> None:
        self.groups: dict[str, range] = {}
        self._images: list[tuple[range, Callable[[int], Image.Image]]] = []
        first = 0
        for name, (count, image, _) in parts.items():
            self.groups[name] = range(first, first + count)
            self._images.append((self.groups[name], image))
            first += count
        self._count = first
        self.digest = digest_of(
            {name: [count, digest] for name, (count, _, digest) in parts.items()}
        )

    def __len__(self) -> int:
        return self._count

    def image(self, number: int) -> Image.Image:
        """RGB. Raises InputError where it cannot be read: a reference has all its pictures."""
        for numbers, image in self._images:
            if number in numbers:
                try:
                    return image(number - numbers.start)
                except UnreadableImage as error:
                    raise InputError(
                        f"Picture {number - numbers.start} of the reference cannot be read "
                        f"({error.reason}); restore it, or measure against other pictures."
                    ) from None
        raise IndexError(number)


class SeenScenes(Config):
    """The first scenes that the model was trained on."""

    type: Literal["seen_scenes"]
    """This kind."""
    count: int = Field(gt=0)
    """How many of them."""


TrainingConfig: TypeAlias = Annotated[SeenScenes | SourcesReference, Field(discriminator="type")]


def open_training(config: TrainingConfig, prompts: Prompts) -> Reference:
    """What a model learned from. Raises InputError when there are no such pictures."""
    if isinstance(config, SourcesReference):
        return open_reference(config, prompts)
    if prompts.asked is None:
        raise InputError("Training pictures of type seen_scenes are for prompts of type scenes.")
    source = EmojiScenes(prompts.asked.config)
    return Reference({"scenes": (config.count, renders(source, 0), source.digest)})


def open_reference(config: ReferenceConfig, prompts: Prompts) -> Reference:
    """Raises InputError when there are no such pictures, or others than the protocol names."""
    if isinstance(config, SourcesReference):
        opened = {name: open_source(source) for name, source in config.sources.items()}
        found = Reference({n: (len(s), s.image, s.digest) for n, s in opened.items()})
        if config.sha256 not in (None, found.digest):
            raise InputError(
                f"The reference is not what the protocol names: its sha256 is {found.digest}."
            )
        return found
    if prompts.asked is None:
        raise InputError("A reference of type renders is for prompts of type scenes.")
    shown = prompts.asked.config.model_dump(mode="json", include=set(JUDGED_BY))
    parts = {}
    for kind in prompts.asked.kinds:
        source = kind.source(prompts.asked.config)
        scenes = others(source, map(seen, prompts.asked.scenes), config.count)
        digest = digest_of([shown, list(map(repr, map(seen, scenes))), file_digest(SPRITES_FILE)])
        parts[kind.name] = (config.count, rendered(source, scenes), digest)
    return Reference(parts)


def others(source: EmojiScenes, asked: Iterable[Hashable], count: int) -> list[Scene]:
    """The first `count` scenes from FIRST_RENDER on that show what was not asked for, nor before.

    asked: what `seen` returns. Raises InputError when there are too few of them.
    """
    known, found = set(asked), list[Scene]()
    for number in range(FIRST_RENDER, FIRST_RENDER + TRIES * count):
        scene = source.scene(number)
        if seen(scene) not in known:
            known.add(seen(scene))
            found.append(scene)
        if len(found) == count:
            return found
    raise InputError(
        f"There are hardly {len(found)} scenes of a kind that the prompts do not ask for, and not "
        f"{count}; set a smaller count of the reference, or of the prompts."
    )


def seen(scene: Scene) -> tuple[str, tuple[Placed, ...]]:
    """What a picture of the scene depends on: its objects stand apart, in any order."""
    return scene.background, tuple(sorted(scene.objects, key=repr))


def rendered(source: EmojiScenes, scenes: Sequence[Scene]) -> Callable[[int], Image.Image]:
    """The pictures of these scenes."""
    return lambda number: Image.fromarray(source.render(scenes[number]))


def renders(source: EmojiScenes, first: int) -> Callable[[int], Image.Image]:
    """The pictures of scenes, numbered from scene `first`."""
    return lambda number: Image.fromarray(source.render(source.scene(first + number)))
