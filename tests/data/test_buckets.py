"""Aspect-ratio buckets: their sizes, whose picture is whose, how one is brought to the other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from latentdiff.data.buckets import SizesConfig, assign, fit, make_buckets, size_conditioning

SDXL = """
512 2048, 512 1984, 512 1920, 512 1856, 576 1792, 576 1728, 576 1664, 640 1600, 640 1536, 704 1472,
704 1408, 704 1344, 768 1344, 768 1280, 832 1216, 832 1152, 896 1152, 896 1088, 960 1088, 960 1024,
1024 1024"""
"""Podell et al. (2023), appendix I; each is there lying and standing."""


def test_they_are_among_sdxls() -> None:
    pairs = [tuple(map(int, pair.split())) for pair in SDXL.split(",")]
    theirs = {*pairs, *((b, a) for a, b in pairs)}
    mine = set(make_buckets(1024, 64, max_aspect=4.0))
    assert mine <= theirs
    assert {(1024, 1024), (512, 2048), (1344, 768), (832, 1216), (1152, 896)} <= mine
    assert len(mine) >= 30


@given(
    st.integers(4, 24).map(lambda n: 64 * n),
    st.sampled_from([8, 16, 32, 64]),
    st.floats(1, 4, allow_nan=False),
)
def test_each_is_as_large_as_the_square_allows(resolution: int, step: int, aspect: float) -> None:
    shapes = make_buckets(resolution, step, aspect)
    assert (resolution, resolution) in shapes
    assert len(set(shapes)) == len(shapes)
    assert {(h, w) for w, h in shapes} == set(shapes)
    assert sorted(shapes, key=lambda shape: shape[0] / shape[1]) == shapes
    for w, h in shapes:
        assert w % step == 0
        assert h % step == 0
        assert w * h <= resolution**2
        assert max(w, h) <= aspect * min(w, h)
        assert w * (h + step) > resolution**2 or (w + step) * h > resolution**2


def test_without_buckets_there_is_the_square_alone() -> None:
    assert SizesConfig(resolution=512).shapes() == [(512, 512)]
    assert SizesConfig(resolution=32).shapes() == [(32, 32)]
    assert SizesConfig(resolution=512, buckets=True).shapes() == make_buckets(512)
    with pytest.raises(ValidationError, match="step must be at most the resolution, 32"):
        SizesConfig(resolution=32, buckets=True)


# Assignment


@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_the_nearest_in_log_aspect_is_chosen(width: int, height: int) -> None:
    shapes = make_buckets(1024, 64, 4.0)
    chosen = int(assign(width, height, shapes))
    distances = [abs(math.log(width / height) - math.log(w / h)) for w, h in shapes]
    assert distances[chosen] == pytest.approx(min(distances), abs=1e-12)


def test_of_two_as_near_the_larger_is_chosen() -> None:
    assert assign(300, 100, [(512, 512), (1024, 1024), (256, 256)]).tolist() == 1


def test_many_are_assigned_as_one_is() -> None:
    shapes = make_buckets(512)
    rng = np.random.default_rng(0)
    width, height = rng.integers(1, 3000, (2, 5, 7))
    many = assign(width, height, shapes)
    assert many.shape == (5, 7)
    for place in np.ndindex(5, 7):
        assert many[place] == assign(width[place], height[place], shapes)


# Fitting


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
)
def test_a_picture_is_scaled_to_cover_and_its_middle_cut_out(
    size: tuple[int, int], eighths: tuple[int, int]
) -> None:
    shape = 8 * eighths[0], 8 * eighths[1]
    rng = np.random.default_rng(size[0])
    # Low contrast: Pillow cuts off what overshoots between its two passes.
    noise = rng.integers(100, 156, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    fitted, top, left = fit(picture, shape)
    assert fitted.size == shape
    scale = max(shape[0] / size[0], shape[1] / size[1])
    covering = [max(kept, round(had * scale)) for had, kept in zip(size, shape, strict=True)]
    assert (left, top) == ((covering[0] - shape[0]) // 2, (covering[1] - shape[1]) // 2)
    assert min(top, left) == 0  # one side fits
    scaled = picture.resize((covering[0], covering[1]), Image.Resampling.LANCZOS)
    expected = scaled.crop((left, top, left + shape[0], top + shape[1]))
    difference = np.asarray(fitted).astype(int) - np.asarray(expected).astype(int)
    assert abs(difference).max() <= 2


def test_a_picture_of_its_buckets_size_is_untouched() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    fitted, top, left = fit(Image.fromarray(noise), (96, 64))
    assert (top, left) == (0, 0)
    np.testing.assert_array_equal(np.asarray(fitted), noise)


def test_an_endless_strip_costs_no_more_than_its_middle() -> None:
    strip = Image.new("RGB", (200_000, 2), "red")
    fitted, top, left = fit(strip, (512, 512))
    assert (fitted.size, top) == ((512, 512), 0)
    assert left == (200_000 * 256 - 512) // 2
    assert fitted.getcolors() == [(512 * 512, (255, 0, 0))]


def test_size_conditioning_is_sdxls() -> None:
    """As diffusers' train_text_to_image_sdxl: sizes and the crop's corner, y before x."""
    _, top, left = fit(Image.new("RGB", (1600, 900)), (512, 512))
    assert (top, left) == (0, 199)
    conditioning = size_conditioning((1600, 900), top, left, (512, 512))
    assert conditioning == (900, 1600, 0, 199, 512, 512)
    assert size_conditioning((3, 4), 5, 6, (7, 8)) == (4, 3, 5, 6, 8, 7)
