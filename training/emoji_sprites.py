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
"""The only size in points at which the font holds bitmaps; they are 136 x 128 pixels."""

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


@dataclass(frozen=True)
class Glyph:
    """One emoji of the Unicode list."""

    text: str
    name: str
    group: str
    subgroup: str


def single_concepts(emoji_test: Path) -> Iterator[Glyph]:
    """Fully qualified emoji that show one concept, in the list's order.

    Left out: flags, components, signs, skin tones and every sequence joined by U+200D (professions,
    families, gender and hair variants).
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
            joined = any(code in text for code in "\u200d\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe")
            if not (joined or "\U0001f3ff" in text or subgroup in SIGNS or group == "Flags"):
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
    """The glyph on a transparent SIDE x SIDE picture, or None where the font has no picture."""
    canvas = Image.new("RGBA", (136, 136))
    ImageDraw.Draw(canvas).text((0, 0), text, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None or font.getlength(text) > 136:
        return None
    glyph = canvas.crop(box)
    scale = min(1.0, SIDE / max(glyph.size))
    size = (round(glyph.width * scale), round(glyph.height * scale))
    if size != glyph.size:
        glyph = glyph.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    sprite = Image.new("RGBA", (SIDE, SIDE))
    sprite.paste(glyph, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    pixels = np.array(sprite)
    pixels[pixels[..., 3] == 0] = 0
    return Image.fromarray(pixels)


def encode(picture: Image.Image) -> bytes:
    """Lossless WebP."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, quality=100, method=6, exact=True)
    return buffer.getvalue()


def build(font_file: Path, emoji_test: Path, annotations: Path) -> pa.Table:
    """One row for each single-concept glyph that the font holds."""
    for path in (font_file, emoji_test, annotations):
        if not path.is_file():
            raise InputError(
                f"{path} is missing: install fonts-noto-color-emoji, unicode-data and "
                "unicode-cldr-core, or name the file with an option."
            )
    font = ImageFont.truetype(str(font_file), BITMAP_SIZE)
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
