"""The sprites file, and the program that renders it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import ImageFont

from latentdiff.data.sprites import SIDE, SPRITES_FILE, load_sprites
from latentdiff.errors import InputError
from training import emoji_sprites
from training.emoji_sprites import ANNOTATIONS, BITMAP_SIZE, EMOJI_TEST, FONT

FLAGS = range(0x1F1E6, 0x1F200)
SKIN_TONES = range(0x1F3FB, 0x1F400)


def test_at_least_a_thousand_sprites_in_eight_megabytes() -> None:
    assert len(load_sprites()) >= 1000
    assert SPRITES_FILE.stat().st_size <= 8_000_000


def test_each_sprite_is_one_concept() -> None:
    for sprite in load_sprites().values():
        codes = {int(code, 16) for code in sprite.codepoints.split()}
        assert not codes & {*FLAGS, *SKIN_TONES, 0x200D, 0x20E3}, sprite.name
        assert not any(code < 0xA0 for code in codes), sprite.name


def test_names_are_plain_lower_case_english() -> None:
    for sprite in load_sprites().values():
        assert sprite.name == sprite.name.lower()
        assert re.fullmatch(r"[\w .,’'“”!&():ñã-]+", sprite.name), sprite.name
        assert sprite.keywords
        assert sprite.group


def test_every_picture_is_visible_and_transparent_somewhere() -> None:
    for sprite in load_sprites().values():
        pixels = np.asarray(sprite.image)
        assert pixels.shape == (SIDE, SIDE, 4)
        assert (pixels[..., 3] > 127).sum() > 200, sprite.name
        assert (pixels[..., 3] == 0).any(), sprite.name


@pytest.mark.skipif(not FONT.is_file(), reason="fonts-noto-color-emoji is not installed")
@pytest.mark.parametrize("name", ["fox", "red apple", "rocket", "snowman"])
def test_rendering_again_gives_the_stored_pixels(name: str) -> None:
    sprite = load_sprites()[name]
    text = "".join(chr(int(code, 16)) for code in sprite.codepoints.split())
    again = emoji_sprites.render(text, ImageFont.truetype(str(FONT), BITMAP_SIZE))
    assert again is not None
    np.testing.assert_array_equal(np.asarray(again), np.asarray(sprite.image))


@pytest.mark.skipif(not EMOJI_TEST.is_file(), reason="unicode-data is not installed")
def test_the_stored_names_are_those_of_the_unicode_list() -> None:
    listed = {glyph.name for glyph in emoji_sprites.single_concepts(EMOJI_TEST)}
    assert set(load_sprites()) <= listed


def test_a_missing_font_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match="fonts-noto-color-emoji"):
        emoji_sprites.build(tmp_path / "none.ttf", EMOJI_TEST, ANNOTATIONS)
