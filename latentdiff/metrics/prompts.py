"""The prompts of a protocol: of emoji scenes, of a data set's captions, or of a file."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from latentdiff.config import Config, load_yaml
from latentdiff.data.images import SourceConfig, open_source
from latentdiff.data.scenes import Scene, ScenesConfig
from latentdiff.data.sprites import SPRITES_FILE
from latentdiff.errors import InputError
from latentdiff.metrics.identity import digest_of
from latentdiff.metrics.scene_accuracy import KINDS, Kind, prompt_for
from latentdiff.model_files import file_digest
from latentdiff.request import MAX_PROMPT_CHARACTERS

MAX_FILE_BYTES = 1 << 30
GROUP_NAME = re.compile(r"\w[\w .-]*")
"""Names of categories are names of files: the sheets of their pictures."""
JUDGED_BY = ("resolution", "sizes", "pair_sizes", "concepts", "backgrounds")
"""What of scenes' configuration the recogniser and the renderer work with."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
KindName = Literal["one", "one_held_out", "two", "two_held_out"]


class ScenePrompts(Config):
    """The plainest captions of emoji scenes; prompt i of a kind is drawn with seed + i."""

    type: Literal["scenes"]
    """This kind."""
    scenes: Path | None = None
    """The scenes' YAML file; those that the model was trained on by default."""
    kinds: tuple[KindName, ...] = Field(
        default=("one", "one_held_out", "two", "two_held_out"), min_length=1
    )
    """One object or two, on a background or with a partner seen in training or never."""


class SourcePrompts(Config):
    """The captions of a data set, in its order; empty ones are left out."""

    type: Literal["source"]
    """This kind."""
    source: SourceConfig
    """Pictures and captions."""


class FilePrompts(Config):
    """The captions of a file; empty ones are left out."""

    type: Literal["file"]
    """This kind."""
    path: Path
    """A .txt with one a line, or a .jsonl or .parquet with columns."""
    sha256: Sha256 | None = None
    """Of the file, which is refused where it is another; null takes any."""
    column: str = "caption"
    """Where the captions are."""
    group_column: str | None = None
    """Where the category of each is, if figures of each category are wanted as well."""


PromptsConfig: TypeAlias = Annotated[
    ScenePrompts | SourcePrompts | FilePrompts, Field(discriminator="type")
]


@dataclass(frozen=True)
class AskedScenes:
    """What a recogniser needs to judge pictures of scenes."""

    config: ScenesConfig
    kinds: tuple[Kind, ...]
    scenes: list[Scene]
    """Of each prompt."""


@dataclass(frozen=True)
class Prompts:
    """Prompts in their order, those of one group next to each other."""

    texts: list[str]
    offsets: list[int]
    """Picture i is drawn with the protocol's seed + offsets[i]."""
    groups: dict[str, range]
    """The numbers of the prompts of each kind or category; empty where there are none."""
    asked: AskedScenes | None = None
    digest: str = field(init=False)
    """sha256 of the prompts, of what they are drawn with and of what they are judged by."""

    def __post_init__(self) -> None:
        groups = {name: [numbers.start, numbers.stop] for name, numbers in self.groups.items()}
        values: list[object] = [self.texts, self.offsets, groups]
        if self.asked is not None:
            scenes = [(s.relation, s.background, *map(repr, s.objects)) for s in self.asked.scenes]
            config = self.asked.config.model_dump(mode="json", include=set(JUDGED_BY))
            values += [scenes, config, file_digest(SPRITES_FILE)]
        object.__setattr__(self, "digest", digest_of(values))

    def stretches(self, numbers: range) -> Iterator[range]:
        """`numbers` cut where one group ends and the next begins."""
        cuts = {group.start for group in self.groups.values()} & {*numbers}
        edges = sorted({numbers.start, *cuts, numbers.stop})
        yield from (range(a, b) for a, b in itertools.pairwise(edges))


def open_prompts(
    config: PromptsConfig, count: int | None, vocabulary: ScenesConfig | None = None
) -> Prompts:
    """The first `count` prompts of each group, all by default.

    vocabulary: the scenes that the model was trained on, if any. Raises InputError when there are
    no such prompts, or fewer.
    """
    if isinstance(config, ScenePrompts):
        return _of_scenes(config, count, vocabulary)
    if isinstance(config, SourcePrompts):
        source = open_source(config.source)
        captions = (source.caption(row) for row in range(len(source)))
        rows: Iterable[tuple[str, str]] = ((caption, "") for caption in captions)
        where = config.source.path
    else:
        rows, where = _rows(config), config.path
    grouped: dict[str, list[str]] = {}
    for caption, group in rows:
        texts = grouped.setdefault(group, [])
        if caption.strip() and (count is None or len(texts) < count):
            texts.append(caption)
        if group == "" and len(texts) == count:  # there is one group, and it is full
            break
    for group, texts in grouped.items():
        if group and not texts:
            raise InputError(f"All captions of {group} at {where} are empty; leave its rows out.")
        if count is not None and len(texts) < count:
            named = f" of {group}" if group else ""
            raise InputError(f"{where} has {len(texts)} captions{named} and not {count}.")
    texts = [text for group in grouped.values() for text in group]
    if not texts:
        raise InputError(f"There are no captions at {where}.")
    if longest := [text for text in texts if len(text) > MAX_PROMPT_CHARACTERS]:
        raise InputError(
            f"A caption at {where} is longer than {MAX_PROMPT_CHARACTERS} characters: "
            f"{longest[0][:40]!r}..."
        )
    sizes = {group: len(some) for group, some in grouped.items() if group}
    return Prompts(texts, list(range(len(texts))), _ranges(sizes))


def _of_scenes(config: ScenePrompts, count: int | None, vocabulary: ScenesConfig | None) -> Prompts:
    scenes = vocabulary if config.scenes is None else load_yaml(ScenesConfig, config.scenes)
    if scenes is None:
        raise InputError(
            "The model has no vocabulary.json, so it is none of emoji scenes; name scenes in the "
            "protocol's prompts, or another protocol."
        )
    if count is None:
        raise InputError("Scenes have no end; set the protocol's count.")
    kinds = tuple(kind for kind in KINDS if kind.name in config.kinds)
    asked = [scene for kind in kinds for scene in kind.scenes(scenes, count)]
    return Prompts(
        [prompt_for(scene) for scene in asked],
        list(range(count)) * len(kinds),
        _ranges({kind.name: count for kind in kinds}),
        AskedScenes(scenes, kinds, asked),
    )


def _ranges(sizes: dict[str, int]) -> dict[str, range]:
    """Each group's numbers, one after another."""
    ranges, first = {}, 0
    for name, size in sizes.items():
        ranges[name] = range(first, first + size)
        first += size
    return ranges


def _rows(config: FilePrompts) -> list[tuple[str, str]]:
    """(caption, group) of each row of a file. Raises InputError."""
    path = config.path
    if not path.is_file():
        raise InputError(f"There is no file of captions at {path}; the protocol says which it is.")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InputError(f"{path} is larger than 1 GiB, too large for captions.")
    if config.sha256 is not None and file_digest(path) != config.sha256:
        raise InputError(
            f"{path} is not the file that the protocol names: its sha256 is {file_digest(path)}."
        )
    names = [config.column, *filter(None, [config.group_column])]
    try:
        if path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8").splitlines()
            table = pa.table({config.column: lines})
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                table = pa.Table.from_pylist([json.loads(line) for line in file if line.strip()])
        else:
            table = pq.read_table(path)
        missing = [name for name in names if name not in table.column_names]
        columns = [table[name].to_pylist() for name in names if not missing]
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        pa.ArrowException,
        RecursionError,
    ) as error:
        raise InputError(f"{path} cannot be read as captions ({error}).") from None
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}; set column and group_column.")
    groups = columns[1] if len(columns) > 1 else [""] * len(columns[0])
    rows = [(text or "", group or "") for text, group in zip(columns[0], groups, strict=True)]
    if not all(isinstance(text, str) for row in rows for text in row):
        raise InputError(f"The columns {names} of {path} hold other things than texts.")
    if config.group_column is not None:
        for number, (_, group) in enumerate(rows, start=1):
            if not GROUP_NAME.fullmatch(group):
                raise InputError(
                    f"The category of row {number} of {path}, {group[:40]!r}, is no name; name "
                    "each with letters, digits, underscores and, after the first of them, spaces, "
                    "dots and dashes."
                )
    return rows
