"""Which rows of a table a takedown list names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from training.laion.lists import Takedown, read_takedown

NAMES = ("key", "sample_id", "sha256", "url")
"""Columns by which a list may name a picture; a domain is looked for in its URL."""


@dataclass(frozen=True)
class Listed:
    """What must not be used."""

    keys: frozenset[str]
    others: Takedown

    def __bool__(self) -> bool:
        return self.needs_names or bool(self.others.sha256)

    @property
    def needs_names(self) -> bool:
        """Whether more than sha256 is listed."""
        others = self.others
        return bool(self.keys or others.urls or others.domains or len(others.sample_ids))

    def holds(self, table: pa.Table) -> np.ndarray:
        """Which rows are listed, bool [N], by those of NAMES that the table has."""
        found = np.zeros(len(table), dtype=bool)
        if not self:
            return found
        columns = {
            name: table[name].to_pylist() if name in table.column_names else [None] * len(table)
            for name in NAMES
        }
        ids = {f"{number:016x}" for number in self.others.sample_ids.tolist()}
        for row, (key, sample_id, sha256, url) in enumerate(zip(*columns.values(), strict=True)):
            found[row] = (
                key in self.keys
                or sha256 in self.others.sha256
                or (url is not None and (url in self.others.urls or self.others.domains.hold(url)))
                or sample_id in ids
            )
        return found


def read_list(paths: Sequence[Path]) -> Listed:
    """Raises InputError when a list cannot be read or has a line that names nothing."""
    others = read_takedown(paths)
    lines = (line.strip() for path in paths for line in path.read_text("utf-8").splitlines())
    return Listed(frozenset(line for line in lines if line.isdigit()), others)
