"""A sheet of pictures with their prompts below them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 6
FONT_SIZE = 11
LINE = 13


def labelled_sheet(
    pictures: Sequence[Image.Image],
    labels: Sequence[str],
    columns: int,
    scale: int = 1,
    frames: Sequence[str] | None = None,
) -> Image.Image:
    """Pictures of one size in rows, enlarged `scale` times without smoothing.

    labels: one text for each, wrapped below it. frames: a colour name around each, if given.
    """
    width, height = (side * scale for side in pictures[0].size)
    font = ImageFont.load_default(FONT_SIZE)
    letters = max(8, int(width / font.getlength("abcdefghij") * 10))
    wrapped = [textwrap.wrap(label, letters) for label in labels]
    cell = (width + 2 * MARGIN, height + 2 * MARGIN + LINE * max(map(len, wrapped)))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        x = number % columns * cell[0] + MARGIN
        y = number // columns * cell[1] + MARGIN
        if frames is not None:
            box = (x - 3, y - 3, x + width + 2, y + height + 2)
            draw.rectangle(box, outline=frames[number], width=3)
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
        for row, line in enumerate(lines):
            draw.text((x, y + height + 2 + row * LINE), line, fill="black", font=font)
    return sheet
