"""Render the sprites file from the Noto Color Emoji font.

    python -m training.emoji_sprites

Needs Debian's packages fonts-noto-color-emoji, unicode-data and unicode-cldr-core, or the same
three files from elsewhere.
"""

from __future__ import annotations

import argparse
import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from latentdiff.data.sprites import SIDE, SPRITES_FILE
from latentdiff.errors import InputError, run_command

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
ANNOTATIONS = Path("/usr/share/unicode/cldr/common/annotations/en.xml")
BITMAP_SIZE = 109
"""The only size at which the font holds bitmaps."""
BITMAP_WIDTH = 136
"""Width of the font's bitmaps in pixels; they are 128 high, and none of their art is wider."""

SIGNS = {
    "alphanum",
    "arrow",
    "av-symbol",
    "currency",
    "gender",
    "geometric",
    "keycap",
    "math",
    "other-symbol",
    "punctuation",
    "religion",
    "transport-sign",
    "warning",
    "zodiac",
}
"""Subgroups of signs that are text or shapes rather than things."""

WRITING = {"hundred points", "zzz"}
"""Emoji of other subgroups that show nothing but digits or letters."""


@dataclass(frozen=True)
class Glyph:
    """One emoji of the Unicode list."""

    text: str
    name: str
    group: str
    subgroup: str


def single_concepts(emoji_test: Path) -> Iterator[Glyph]:
    """Fully qualified emoji that show one concept, in the list's order.

    Left out: flags, components, signs, writing, skin tones and every sequence joined by U+200D
    (professions, families, gender and hair variants).
    """
    group = subgroup = ""
    for line in emoji_test.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.split(":")[1].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.split(":")[1].strip()
        elif "; fully-qualified" in line:
            text = "".join(chr(int(code, 16)) for code in line.split(";")[0].split())
            name = line.split("# ")[1].split(" ", 2)[2].lower()
            variant = any(code == "\u200d" or "\U0001f3fb" <= code <= "\U0001f3ff" for code in text)
            if not (variant or group == "Flags" or subgroup in SIGNS or name in WRITING):
                yield Glyph(text, name, group, subgroup)


def read_keywords(annotations: Path) -> dict[str, list[str]]:
    """English search words by emoji text, without variation selectors."""
    root = ElementTree.parse(annotations).getroot()
    return {
        node.attrib["cp"]: [word.strip() for word in (node.text or "").split("|")]
        for node in root.iter("annotation")
        if node.get("type") is None
    }


def render(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The glyph in the middle of a transparent SIDE x SIDE picture, not scaled.

    None where the font has no picture. Raises InputError where it is larger than SIDE.
    """
    canvas = Image.new("RGBA", (BITMAP_WIDTH, BITMAP_WIDTH))
    ImageDraw.Draw(canvas).text((0, 0), text, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None or font.getlength(text) > BITMAP_WIDTH:
        return None
    glyph = canvas.crop(box)
    if max(glyph.size) > SIDE:
        raise InputError(
            f"The font's {text} is larger than {SIDE} pixels; use version 2.042 of it."
        )
    sprite = Image.new("RGBA", (SIDE, SIDE))
    sprite.paste(glyph, ((SIDE - glyph.width) // 2, (SIDE - glyph.height) // 2))
    pixels = np.array(sprite)
    pixels[pixels[..., 3] == 0] = 0
    return Image.fromarray(pixels)


def encode(picture: Image.Image) -> bytes:
    """Lossless WebP."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, quality=100, method=6, exact=True)
    return buffer.getvalue()


def build(font_file: Path, emoji_test: Path, annotations: Path) -> pa.Table:
    """One row for each single-concept glyph that the font holds.

    An emoji that has no keywords yet gets the words of its name.
    """
    for path in (font_file, emoji_test, annotations):
        if not path.is_file():
            raise InputError(
                f"{path} is missing: install fonts-noto-color-emoji, unicode-data and "
                "unicode-cldr-core, or name the file with an option."
            )
    try:
        font = ImageFont.truetype(str(font_file), BITMAP_SIZE)
    except OSError as error:
        raise InputError(
            f"{font_file} holds no pictures of size {BITMAP_SIZE} ({error}); "
            "give the NotoColorEmoji.ttf that has bitmaps."
        ) from None
    keywords = read_keywords(annotations)
    rows = []
    for glyph in single_concepts(emoji_test):
        picture = render(glyph.text, font)
        bare = glyph.text.replace("\ufe0f", "")
        if picture is not None:
            rows.append(
                {
                    "name": glyph.name,
                    "codepoints": " ".join(f"{ord(code):x}" for code in glyph.text),
                    "keywords": keywords.get(bare, glyph.name.split()),
                    "group": glyph.group,
                    "subgroup": glyph.subgroup,
                    "image": encode(picture),
                }
            )
    return pa.Table.from_pylist(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Render the sprites file from an emoji font.")
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--emoji-test", type=Path, default=EMOJI_TEST)
    parser.add_argument("--annotations", type=Path, default=ANNOTATIONS)
    parser.add_argument("--output", type=Path, default=SPRITES_FILE)
    options = parser.parse_args()
    table = build(options.font, options.emoji_test, options.annotations)
    pq.write_table(table, options.output, compression="none")
    print(f"{options.output}: {len(table)} sprites, {options.output.stat().st_size} bytes")


if __name__ == "__main__":
    run_command(main)
