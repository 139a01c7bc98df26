"""The emoji sprites that scenes are made of, from one parquet file.

The art is Google's, under the SIL Open Font License 1.1 in OFL.txt.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from latentdiff.errors import InputError

SPRITES_FILE = Path(__file__).with_name("sprites.parquet")
SIDE = 128
"""Width and height of every sprite in pixels."""


@dataclass(frozen=True)
class Sprite:
    """One glyph of Noto Color Emoji: its Unicode short name, search words and picture."""

    name: str
    codepoints: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    encoded: bytes = field(repr=False)

    @functools.cached_property
    def image(self) -> Image.Image:
        """RGBA, 128 x 128. Raises InputError when the file holds anything else."""
        try:
            picture = Image.open(io.BytesIO(self.encoded), formats=("WEBP",))
            if (picture.mode, picture.size) == ("RGBA", (SIDE, SIDE)):
                picture.load()
                return picture
        except OSError:
            pass
        raise InputError(
            f"The sprite {self.name!r} is no RGBA picture of {SIDE} x {SIDE} pixels; "
            f"{SPRITES_FILE.name} is damaged."
        )


@functools.cache
def load_sprites() -> dict[str, Sprite]:
    """Every sprite by its name."""
    rows = pq.read_table(SPRITES_FILE).to_pylist()
    return {
        row["name"]: Sprite(
            name=row["name"],
            codepoints=row["codepoints"],
            keywords=tuple(row["keywords"]),
            group=row["group"],
            subgroup=row["subgroup"],
            encoded=row["image"],
        )
        for row in rows
    }
