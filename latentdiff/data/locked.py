"""The pictures that a lockfile keeps, read from the tar files beside it."""

from __future__ import annotations

import functools
import hashlib
import tarfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from latentdiff.data.decode import UnreadableImage, decode
from latentdiff.data.images import ImageTextSource, SourceConfig, reading
from latentdiff.data.lockfile import KEPT, number_of, read_batches, read_info
from latentdiff.errors import InputError

IMAGES = "images"
"""Folder of the tar files, beside the lockfile."""
BESIDE = ("txt", "json")
"""Endings of the files in a tar that lie beside the pictures."""
INDEXED = 512
"""Tars whose contents' places a process remembers, 24 bytes a picture."""
COLUMNS = ("key", "split", "sha256", "caption", "width", "height")


class LockedSource(ImageTextSource):
    """The kept samples of a split, in the order of their keys.

    Sizes and captions come from the lockfile; a picture must have the sha256 that stands there.
    Holds about 60 bytes a picture and its caption. The digest is the lockfile's and the split.
    """

    def __init__(self, config: SourceConfig) -> None:
        """Raises InputError when there is no lockfile, or no tar or nothing kept in the split."""
        self.tars = Tars(config.path.parent / IMAGES)
        info = read_info(config.path)
        tables, rows = [], 0
        for table in read_batches(config.path, COLUMNS, KEPT):
            table = table.filter(pc.equal(table["split"], config.split))
            tables.append(table)
            rows += len(table)
            if config.count is not None and rows >= config.count:
                break
        if not rows:
            raise InputError(
                f"{config.path} keeps no samples in the split {config.split}; look at its report."
            )
        kept = pa.concat_tables(tables)[: config.count]
        self._keys = kept["key"].cast(pa.int64()).to_numpy()
        self._digits = len(kept["key"][0].as_py())
        self._widths, self._heights = kept["width"].to_numpy(), kept["height"].to_numpy()
        self._sha256 = np.array([bytes.fromhex(each) for each in kept["sha256"].to_pylist()], "V32")
        self._captions = kept["caption"].cast(pa.large_string()).combine_chunks()
        self.digest = hashlib.sha256(f"{info.digest}|{config.split}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, index: int) -> str:
        """The sample's key in the lockfile."""
        return f"{self._keys[index]:0{self._digits}d}"

    def holding(self, sha256: Collection[str]) -> set[int]:
        """The numbers of the pictures with these digests."""
        wanted = {bytes.fromhex(each) for each in sha256}
        return {index for index, each in enumerate(self._sha256.tolist()) if each in wanted}

    def size(self, index: int) -> tuple[int, int]:
        return int(self._widths[index]), int(self._heights[index])

    def image(self, index: int) -> Image.Image:
        return decode(self.raw(index))

    def caption(self, index: int) -> str:
        return self._captions[index].as_py() or ""

    def raw(self, index: int) -> bytes:
        data = self.tars.read(self.key(index))
        if hashlib.sha256(data).digest() != self._sha256[index].tobytes():
            raise UnreadableImage("damaged")
        return data


class Tars:
    """Pictures by key in the tar files of a folder, as img2dataset writes them.

    A key begins with the name of its tar. Raises InputError when there is no tar.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        first = next(folder.glob("*.tar"), None)
        if first is None:
            raise InputError(
                f"There are no tar files in {folder}; download them with python -m training.laion "
                "download, or put them there."
            )
        self._digits = len(first.stem)
        self._places = functools.lru_cache(maxsize=INDEXED)(self._read_places)

    def __reduce__(self) -> tuple[type[Tars], tuple[Path]]:
        return Tars, (self.folder,)

    def read(self, key: str) -> bytes:
        """A picture's file. Raises UnreadableImage where it is missing, InputError when the disk
        fails or a tar is damaged.
        """
        shard, number = key[: self._digits], number_of(key)
        keys, offsets, lengths = self._places(shard)
        place = int(np.searchsorted(keys, number))
        if place == len(keys) or keys[place] != number:
            raise UnreadableImage("missing")
        with reading(self._path(shard)) as file:
            file.seek(int(offsets[place]))
            return file.read(int(lengths[place]))

    def _path(self, shard: str) -> Path:
        return self.folder / f"{shard}.tar"

    def _read_places(self, shard: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keys, sorted, and where in the tar their pictures begin and how long they are: int64."""
        places = []
        with reading(self._path(shard)) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        key, _, ending = member.name.partition(".")
                        if member.isreg() and ending not in BESIDE:
                            places.append((number_of(key), member.offset_data, member.size))
            except (tarfile.TarError, ValueError):
                raise InputError(
                    f"{file.name} is damaged; delete it and its .parquet and _stats.json, and "
                    "download it again."
                ) from None
        table = np.array(sorted(places), dtype=np.int64).reshape(-1, 3)
        return table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy()
