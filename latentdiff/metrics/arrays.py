"""Feature arrays read a piece at a time: memory is flat however many rows there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from latentdiff.errors import InputError


class Features(Protocol):
    """One vector a row, [N, D]: an array, a numpy.memmap, or anything else that slices so."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""

    def __getitem__(self, rows: Any, /) -> Any:
        """The rows of a slice or of an array of numbers, as an array."""


@dataclass(frozen=True)
class Taken:
    """The rows of `features` with these numbers, in this order; read only where they are asked for.

    rows: integers [n]; the same one may stand there more than once.
    """

    features: Features
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, D)."""
        return (len(self.rows), *self.features.shape[1:])

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        return self.features[self.rows[rows]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.features[self.rows], dtype=dtype)


def blocks(features: Features, size: int) -> Iterator[np.ndarray]:
    """The rows in order as float64 [at most size, D]; raises InputError at one that is not finite.

    Costs a block of memory, 8 * size * D bytes, and reads each row once.
    """
    for start in range(0, features.shape[0], size):
        block = np.asarray(features[start : start + size], dtype=np.float64)
        if not np.isfinite(block).all():
            raise InputError(
                f"Rows {start} to {start + len(block) - 1} of the features hold a value that is "
                "not finite; draw and extract those pictures again, in float32."
            )
        yield block


def check_alike(x: Features, y: Features, least: int) -> None:
    """Raises InputError unless both are [N, D] of one D and have `least` rows or more."""
    if len(x.shape) != 2 or len(y.shape) != 2 or x.shape[1] != y.shape[1]:
        raise InputError(
            f"Features of shapes {list(x.shape)} and {list(y.shape)} do not compare; both must be "
            "[N, D] by one extractor."
        )
    if min(x.shape[0], y.shape[0]) < least:
        raise InputError(
            f"{x.shape[0]} and {y.shape[0]} feature vectors are too few; this figure takes at "
            f"least {least} of each."
        )


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows [N, D] scaled to length 1. Raises InputError for one of length 0."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not lengths.all():
        raise InputError("An embedding of length 0 has no direction; is its CLIP trained?")
    return rows / lengths
