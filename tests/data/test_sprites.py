"""The sprites file, and the program that renders it."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFont

from latentdiff.data.sprites import SIDE, SPRITES_FILE, Sprite, load_sprites
from latentdiff.errors import InputError
from training import emoji_sprites
from training.emoji_sprites import ANNOTATIONS, BITMAP_SIZE, EMOJI_TEST, FONT

LICENCE = SPRITES_FILE.with_name("OFL.txt")
VARIANTS = {*range(0x1F3FB, 0x1F400), 0x200D}
WRITING = {
    *range(0x100),  # digits of keycaps, and the signs of copyright and trade mark
    0x20E3,  # keycap
    *range(0x2100, 0x2200),  # letters and arrows
    *range(0x2460, 0x2500),  # letters in circles
    *range(0x1F100, 0x1F300),  # letters and ideographs in boxes, and the letters of flags
    0x1F4AF,  # hundred points
    0x1F4A4,  # zzz
    *range(0x1F520, 0x1F525),  # input symbols
}


def font() -> ImageFont.FreeTypeFont:
    if not FONT.is_file():
        pytest.skip("fonts-noto-color-emoji is not installed")
    return ImageFont.truetype(str(FONT), BITMAP_SIZE)


def test_at_least_a_thousand_sprites_in_eight_megabytes() -> None:
    assert len(load_sprites()) >= 1000
    assert SPRITES_FILE.stat().st_size <= 8_000_000


def test_names_and_codepoints_are_unique() -> None:
    rows = pq.read_table(SPRITES_FILE).to_pylist()
    assert len({row["name"] for row in rows}) == len(rows) == len(load_sprites())
    assert len({row["codepoints"] for row in rows}) == len(rows)


def test_each_sprite_is_one_concept() -> None:
    for sprite in load_sprites().values():
        codes = {int(code, 16) for code in sprite.codepoints.split()}
        assert not codes & (VARIANTS | WRITING), sprite.name
        assert "flag" not in sprite.subgroup


def test_names_are_plain_lower_case_english() -> None:
    for sprite in load_sprites().values():
        assert sprite.name == sprite.name.lower()
        assert re.fullmatch(r"[a-z0-9ñ .,:’'-]+", sprite.name), sprite.name
        assert sprite.keywords
        assert all(sprite.keywords)
        assert sprite.group


def test_every_picture_is_visible_and_transparent_somewhere() -> None:
    for sprite in load_sprites().values():
        pixels = np.asarray(sprite.image)
        assert pixels.shape == (SIDE, SIDE, 4)
        assert (pixels[..., 3] > 127).sum() > 200, sprite.name
        assert (pixels[..., 3] == 0).any(), sprite.name
        assert not pixels[pixels[..., 3] == 0].any(), sprite.name


@pytest.mark.parametrize(
    ("mode", "side", "keep"), [("RGB", SIDE, 1.0), ("RGBA", 64, 1.0), ("RGBA", SIDE, 0.5)]
)
def test_another_picture_is_refused(mode: str, side: int, keep: float) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side, side, len(mode)), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "WEBP", lossless=True)
    encoded = buffer.getvalue()[: int(keep * buffer.tell())]
    sprite = Sprite("fox", "1f98a", ("fox",), "Animals & Nature", "animal-mammal", encoded)
    with pytest.raises(InputError, match="'fox' is no RGBA picture of 128 x 128"):
        sprite.image  # noqa: B018


def test_the_licence_travels_with_the_art() -> None:
    text = LICENCE.read_text(encoding="utf-8")
    assert "SIL OPEN FONT LICENSE Version 1.1" in text
    assert "Google" in text


@pytest.mark.parametrize("name", ["fox", "red apple", "rocket", "snowman", "piñata"])
def test_rendering_again_gives_the_stored_pixels(name: str) -> None:
    sprite = load_sprites()[name]
    text = "".join(chr(int(code, 16)) for code in sprite.codepoints.split())
    again = emoji_sprites.render(text, font())
    assert again is not None
    np.testing.assert_array_equal(np.asarray(again), np.asarray(sprite.image))


def test_sequences_that_the_font_does_not_join_are_no_sprites() -> None:
    assert emoji_sprites.render("\U0001f98a\U0001f680", font()) is None


@pytest.mark.skipif(not EMOJI_TEST.is_file(), reason="unicode-data is not installed")
def test_the_stored_names_are_those_of_the_unicode_list() -> None:
    listed = {glyph.name for glyph in emoji_sprites.single_concepts(EMOJI_TEST)}
    assert set(load_sprites()) == listed


@pytest.mark.skipif(not ANNOTATIONS.is_file(), reason="unicode-cldr-core is not installed")
def test_the_stored_keywords_are_those_of_the_annotations() -> None:
    keywords = emoji_sprites.read_keywords(ANNOTATIONS)
    assert keywords["\U0001f34e"] == ["apple", "fruit", "red"]
    assert load_sprites()["red apple"].keywords == ("apple", "fruit", "red")


def test_stored_bytes_are_lossless() -> None:
    picture = load_sprites()["fox"].image
    again = Image.open(io.BytesIO(emoji_sprites.encode(picture)))
    np.testing.assert_array_equal(np.asarray(again), np.asarray(picture))


def test_a_missing_font_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="install fonts-noto-color-emoji"):
        emoji_sprites.build(tmp_path / "none.ttf", EMOJI_TEST, ANNOTATIONS)


def test_a_font_without_bitmaps_is_refused(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("font.ttf", "emoji-test.txt", "en.xml")]
    for file in files:
        file.write_text("no font")
    with pytest.raises(InputError, match="give the NotoColorEmoji"):
        emoji_sprites.build(*files)
