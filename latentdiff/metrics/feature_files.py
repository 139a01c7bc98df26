"""Rows of numbers of many pictures, made in pieces by several processes, kept in mapped files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from latentdiff.errors import InputError
from latentdiff.metrics.identity import digest_of, first_difference
from latentdiff.model_files import read_json, staged_file, write_json

PIECE = 32
"""Pictures whose rows are written together: what a process loses at most when it is stopped."""


class FeatureFiles:
    """One row of float32 for each picture under each name: NAME.npy in a folder.

    Until all are there they stand in pieces, whole or not at all. Processes share nothing but the
    folder and never wait for one another, so that any of them may be killed and the same command
    continues.

    Args:
        folder: made where it is not there.
        count: N, of pictures.
        widths: D of each name.
        identity: plain values that the rows are a function of.

    Raises InputError when the folder holds rows of something else, and names the difference.
    """

    def __init__(
        self, folder: Path, count: int, widths: Mapping[str, int], identity: Mapping[str, Any]
    ) -> None:
        self.folder, self.count, self.widths = folder, count, dict(widths)
        known, values = folder / "identity.json", {**identity, "widths": self.widths}
        self._pieces = folder / f"pieces-{digest_of(values)[:16]}"
        if known.is_file() and (differs := first_difference(read_json(known), values)):
            raise InputError(
                f"{folder} holds features of something else ({differs}); choose another directory, "
                "or delete this one."
            )
        with staged_file(known) as path:
            write_json(values, path)

    @property
    def whole(self) -> bool:
        """Whether all rows are in their final files."""
        return all(self._file(name).is_file() for name in self.widths)

    def missing(self) -> list[int]:
        """The numbers of the pieces that are still to be made."""
        made = {path.stem for path in self._pieces.glob("*.safetensors")}
        if self.whole:  # asked last: pieces go only after that
            return []
        numbers = range(-(-self.count // PIECE))
        return [number for number in numbers if f"{number:06d}" not in made]

    def fill(
        self,
        rows: Callable[[range], Mapping[str, np.ndarray]],
        rank: int = 0,
        processes: int = 1,
        progress: Callable[[int], object] = lambda made: None,
    ) -> None:
        """Make every missing piece: this process's own, then what the others lack.

        rows: of pictures first to last, at most PIECE, the arrays [n, D] by name; it must depend on
        the pictures' numbers alone. progress is told how many rows are done, by anyone.
        """
        while missing := self.missing():
            progress(self.count - min(len(missing) * PIECE, self.count))
            own = [number for number in missing if number % processes == rank]
            # Others' from the end, which their owners come to last, each process a different one.
            number = own[0] if own else missing[-1 - len(missing) * rank // processes]
            first = number * PIECE
            made = rows(range(first, min(first + PIECE, self.count)))
            self._write(number, made)
        progress(self.count)

    def _write(self, number: int, made: Mapping[str, np.ndarray]) -> None:
        if self.whole:  # another process was faster, and the pieces are gone
            return
        arrays = {name: np.ascontiguousarray(made[name], np.float32) for name in self.widths}
        with staged_file(self._pieces / f"{number:06d}.safetensors") as path:
            save_file(arrays, path)

    def finish(self) -> dict[str, np.ndarray]:
        """All rows by name, [N, D], mapped from the files that this makes of the pieces.

        For one process of an evaluation, after fill; evaluations may share the folder.
        """
        for name in self.widths:
            if not self._file(name).is_file():
                try:
                    self._gather(name)
                except FileNotFoundError:  # another evaluation has gathered them all meanwhile
                    if not self.whole:
                        raise
        shutil.rmtree(self._pieces, ignore_errors=True)
        return {name: np.load(self._file(name), mmap_mode="r") for name in self.widths}

    def _gather(self, name: str) -> None:
        with staged_file(self._file(name)) as path:
            rows = np.lib.format.open_memmap(
                path, mode="w+", dtype=np.float32, shape=(self.count, self.widths[name])
            )
            for first in range(0, self.count, PIECE):
                piece = self._pieces / f"{first // PIECE:06d}.safetensors"
                rows[first : first + PIECE] = load_file(piece)[name]
            rows.flush()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npy"
