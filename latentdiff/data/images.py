"""Image-text sources: numbered pictures with captions, drawn here or read from files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from latentdiff.config import Config, load_yaml
from latentdiff.data.buckets import fit
from latentdiff.data.decode import MAX_BYTES, UnreadableImage, decode, measure
from latentdiff.data.scenes import EmojiScenes, ScenesConfig
from latentdiff.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

PICTURES = ("image", "jpg", "jpeg", "png", "webp")
"""Columns that hold pictures, the first of these that there is, where none is named."""
CAPTIONS = ("text", "caption", "txt")
"""The same of captions."""


class SourceConfig(Config):
    """Pictures and their captions."""

    type: Literal["scenes", "folder", "parquet", "webdataset", "lockfile"]
    """scenes: emoji scenes, drawn as they are asked for. folder: picture files, with captions in
    metadata.jsonl or metadata.csv or in picture.txt beside picture.png. parquet: tables with the
    pictures' bytes inside. webdataset: tar files, as img2dataset writes them. datasets copies these
    two into its own cache (HF_DATASETS_CACHE) when they are first read. lockfile: what a lockfile
    keeps of the tar files in images/ beside it."""
    path: Path
    """The scenes' YAML file, the lockfile, the folder, or for the others a folder, a file or a
    pattern of files such as data/*.tar."""
    count: int | None = Field(default=None, gt=0)
    """How many of the pictures, from the first; all by default. Scenes have no end and need it."""
    split: str = "train"
    """Of scenes train or held_out; of a lockfile train or validation; of a folder of pictures a
    split that datasets finds in it; of tables the files with this word in their names, or for train
    all where none has it."""
    image_column: str | None = None
    """Where the pictures are; found by default: image, jpg, jpeg, png or webp."""
    caption_column: str | None = None
    """Where the captions are; found by default: text, caption or txt."""

    @model_validator(mode="after")
    def _whole(self) -> SourceConfig:
        if self.type == "scenes":
            if self.count is None:
                raise ValueError("scenes have no end: set count")
            if self.split not in ("train", "held_out"):
                raise ValueError("the split of scenes is train or held_out")
        if self.type == "lockfile" and self.split not in ("train", "validation"):
            raise ValueError("the split of a lockfile is train or validation")
        return self


class ImageTextSource(ABC):
    """Pictures numbered from 0."""

    digest: str
    """sha256 of what identifies the data."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels, from the header alone. Raises UnreadableImage."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """RGB. Raises UnreadableImage."""

    @abstractmethod
    def caption(self, index: int) -> str:
        """Empty where there is none."""

    @abstractmethod
    def raw(self, index: int) -> bytes | None:
        """The picture's file, of which `decode` makes the image; None for what is drawn.

        Raises UnreadableImage where it is missing.
        """


def open_source(config: SourceConfig) -> ImageTextSource:
    """Raises InputError when there is no such data, or no pictures or captions in it."""
    if next(_found(config.path), None) is None:
        raise InputError(f"There are no files at {config.path}; correct the source's path.")
    if config.type == "scenes":
        return ScenesSource(config)
    if config.type == "lockfile":
        from latentdiff.data.locked import LockedSource  # which builds on this module

        return LockedSource(config)
    return FolderSource(config) if config.type == "folder" else TableSource(config)


class ScenesSource(ImageTextSource):
    """Emoji scenes."""

    def __init__(self, config: SourceConfig) -> None:
        self.scenes = EmojiScenes(
            load_yaml(ScenesConfig, config.path),
            config.split,  # type: ignore[arg-type]
        )
        assert config.count is not None
        self.count = config.count
        self.digest = self.scenes.digest

    def __len__(self) -> int:
        return self.count

    def size(self, index: int) -> tuple[int, int]:
        return self.scenes.config.resolution, self.scenes.config.resolution

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.scenes.render(self.scenes.scene(index)))

    def caption(self, index: int) -> str:
        return self.scenes.scene(index).caption

    def raw(self, index: int) -> bytes | None:
        return None


class FolderSource(ImageTextSource):
    """A folder of picture files, in the order of their names.

    The digest is of the files' names and lengths, and of the captions.
    """

    def __init__(self, config: SourceConfig) -> None:
        if not config.path.is_dir():
            raise InputError(f"{config.path} is no folder; name one, or another type of source.")
        table = _load("imagefolder", config, data_dir=str(config.path), drop_labels=True)
        paths = [Path(value["path"]) for value in _undecoded(table, "image")["image"]]
        if config.caption_column is not None or set(CAPTIONS) & set(table.column_names):
            captions = table[_column(table, config.caption_column, CAPTIONS, config)]
        else:
            captions = [_beside(path) for path in paths]
            if not any(captions):
                raise InputError(
                    f"{config.path} has no captions: add metadata.jsonl with file_name and text, "
                    "or a .txt beside each picture."
                )
        both = sorted(zip(paths, map(_text, captions), strict=True))[: config.count]
        self.paths = [path for path, _ in both]
        self.captions = [caption for _, caption in both]
        self.digest = _digest(
            f"{os.path.relpath(path, config.path)}|{_length(path)}|{caption}"
            for path, caption in both
        )

    def __len__(self) -> int:
        return len(self.paths)

    def size(self, index: int) -> tuple[int, int]:
        try:
            with reading(self.paths[index]) as file:
                return measure(file)
        except UnreadableImage:  # or a disk that failed under Pillow, and fails here again
            return measure(io.BytesIO(self.raw(index)))

    def image(self, index: int) -> Image.Image:
        return decode(self.raw(index))

    def caption(self, index: int) -> str:
        return self.captions[index]

    def raw(self, index: int) -> bytes:
        with reading(self.paths[index]) as file:
            return file.read(MAX_BYTES + 1)


class TableSource(ImageTextSource):
    """Rows of parquet or tar files, read by datasets, undecoded and memory-mapped.

    The digest is of the files' names and lengths, and of which columns are used.
    """

    def __init__(self, config: SourceConfig) -> None:
        files = _tables(config)
        table = _load(config.type, config, data_files={config.split: list(map(str, files))})
        image = _column(table, config.image_column, PICTURES, config)
        caption = _column(table, config.caption_column, CAPTIONS, config)
        if config.count is not None:
            table = table.select(range(min(config.count, len(table))))
        self._images = _undecoded(table.select_columns([image]), image)
        self._captions = table.select_columns([caption])
        self._columns = image, caption
        self.digest = _digest(
            [config.type, config.split, image, caption]
            + [f"{file.relative_to(_root(config.path))}|{_length(file)}" for file in files]
        )

    def __len__(self) -> int:
        return len(self._images)

    def size(self, index: int) -> tuple[int, int]:
        return measure(io.BytesIO(self.raw(index)))

    def image(self, index: int) -> Image.Image:
        return decode(self.raw(index))

    def caption(self, index: int) -> str:
        return _text(self._captions[index][self._columns[1]])

    def raw(self, index: int) -> bytes:
        value = self._images[index][self._columns[0]]
        data = value and value["bytes"]
        if not data:
            raise UnreadableImage("missing")
        return data


def _load(builder: str, config: SourceConfig, **options: Any) -> Dataset:
    """One split as `datasets` reads it. Raises InputError where it does not."""
    import datasets

    try:
        return datasets.load_dataset(builder, split=config.split, **options)
    except Exception as error:  # its builders raise errors of many kinds
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(
            f"{config.path} cannot be read as {config.type}, split {config.split} ({reason})."
        ) from None


def _column(table: Dataset, named: str | None, usual: tuple[str, ...], config: SourceConfig) -> str:
    names = table.column_names
    for name in usual if named is None else (named,):
        if name in names:
            return name
    raise InputError(
        f"{config.path} has no column {named or ' or '.join(usual)} but {', '.join(names)}; "
        "set image_column and caption_column of the source."
    )


def _undecoded(table: Dataset, column: str) -> Dataset:
    import datasets

    try:
        return table.cast_column(column, datasets.Image(decode=False))
    except Exception:  # Arrow's errors are of many kinds
        raise InputError(f"The column {column} holds no pictures; set image_column.") from None


def _text(value: object) -> str:
    """A caption as it stands in a table: a text, none, or several of which the first is taken."""
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None or isinstance(value, str):
        return value or ""
    raise InputError(f"A caption is {value!r}, which is no text; set caption_column.")


def _beside(path: Path) -> str:
    """The caption in picture.txt beside picture.png."""
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8", errors="replace").strip() if text.is_file() else ""


def _root(path: Path) -> Path:
    """The directory that a path or a pattern starts from."""
    while not path.is_dir():
        path = path.parent
    return path


def _files(path: Path) -> list[Path]:
    """Every file of a folder, a file or a pattern, sorted."""
    return sorted(_found(path))


def _found(path: Path) -> Iterator[Path]:
    """The same as they are found."""
    if path.is_file():
        yield path
        return
    root = _root(path)
    pattern = "**/*" if root == path else path.relative_to(root).as_posix()
    yield from (file for file in root.glob(pattern) if file.is_file())


def _tables(config: SourceConfig) -> list[Path]:
    """The files of one split. Raises InputError when there are none."""
    files, root = _files(config.path), _root(config.path)
    if config.path == root:
        suffix = ".tar" if config.type == "webdataset" else ".parquet"
        files = [file for file in files if file.suffix == suffix]
    word = re.compile(rf"(?<![a-z]){re.escape(config.split)}(?![a-z])", re.IGNORECASE)
    named = [file for file in files if word.search(file.relative_to(root).as_posix())]
    if not named and config.split != "train":
        files = []
    if not files:
        raise InputError(
            f"{config.path} has no {config.type} files of the split {config.split}; correct path "
            "or split."
        )
    return named or files


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Raises UnreadableImage where there is no file, and InputError when the disk fails."""
    try:
        with path.open("rb") as file:
            yield file
    except (FileNotFoundError, IsADirectoryError):
        raise UnreadableImage("missing") from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}); see to its disk, and run again."
        ) from None


def _digest(lines: Iterable[str]) -> str:
    total = hashlib.sha256()
    for line in lines:
        total.update(f"{len(line)}|{line}\n".encode())
    return total.hexdigest()


def squares(
    source: ImageTextSource, side: int, rows: Iterable[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """(row, picture) of each readable row, in order; pictures uint8 [side, side, 3]."""
    for row in rows:
        with contextlib.suppress(UnreadableImage):
            yield row, np.array(fit(source.image(row), (side, side))[0])
