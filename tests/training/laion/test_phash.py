"""The hash is the published one, copies have near hashes and little difference, others do not."""

from __future__ import annotations

import io

import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from training.laion.phash import (
    RADIUS,
    SIDE,
    candidates,
    difference,
    near_any,
    phash,
    trimmed_box,
    views,
)


def noise(seed: int, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def drawing(seed: int, size: tuple[int, int] = (200, 150)) -> Image.Image:
    """A few coloured shapes on white."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        x, y = random.uniform(20, 120), random.uniform(20, 90)
        w, h = random.uniform(15, 50, 2)
        colour = tuple(int(each) for each in random.integers(0, 200, 3))
        shape = draw.ellipse if random.uniform() < 0.5 else draw.rectangle
        shape((x, y, x + w, y + h), fill=colour)
    return image


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=quality)
    return Image.open(sink).convert("RGB")


def between(first: Image.Image, second: Image.Image) -> float:
    """The difference in the view where it is less."""
    (a, _), (b, _) = views(first), views(second)
    return float(difference(a, b).min())


# The hash


def test_the_hash_is_zauners() -> None:
    """DCT by scipy, lowest frequencies but the constant ones, above the median."""
    for seed in range(5):
        pixels = noise(seed)
        grey = pixels @ np.array([0.299, 0.587, 0.114])
        low = scipy.fft.dctn(grey, norm="ortho")[1:9, 1:9].ravel()
        bits = "".join("1" if each > np.median(low) else "0" for each in low)
        assert f"{phash(pixels[None])[0]:064b}" == bits


def test_a_picture_without_contrast_has_a_hash() -> None:
    flat = np.full((2, SIDE, SIDE, 3), [[[[10, 20, 30]]], [[[200, 200, 200]]]], np.uint8)
    assert phash(flat).tolist() == [0, 0]


# Candidates


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(2, 60), most=st.integers(0, 20))
def test_a_wide_window_finds_all_pairs_and_no_others(seed: int, count: int, most: int) -> None:
    random = np.random.default_rng(seed)
    hashes = random.integers(0, 2**64, count, dtype=np.uint64)
    hashes[count // 2 :] = hashes[: count - count // 2] ^ np.uint64(2**40 + 2**5)
    expected = {
        (i, j)
        for i in range(count)
        for j in range(i)
        if bin(int(hashes[i]) ^ int(hashes[j])).count("1") <= most
    }
    found = {
        (max(pair), min(pair))
        for first, second in candidates(hashes, most, count)
        for pair in zip(first.tolist(), second.tolist(), strict=True)
    }
    assert found == expected


def test_near_hashes_among_many_are_found_in_a_narrow_window() -> None:
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, 20_000, dtype=np.uint64)
    for number in range(500):
        flips = random.choice(64, 6, replace=False)
        hashes[10_000 + number] = hashes[number] ^ np.bitwise_or.reduce(
            np.uint64(1) << flips.astype(np.uint64)
        )
    found = {
        (min(pair), max(pair))
        for first, second in candidates(hashes, 6, 8)
        for pair in zip(first.tolist(), second.tolist(), strict=True)
    }
    assert len(found & {(n, n + 10_000) for n in range(500)}) >= 490


# The difference

SAME = {
    "JPEG": lambda image: jpeg(image, 60),
    "larger": lambda image: image.resize((400, 300), Image.Resampling.BICUBIC),
    "smaller": lambda image: image.resize((100, 75), Image.Resampling.BICUBIC),
    "cropped": lambda image: image.crop((3, 2, 198, 146)),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.1),
    "border": lambda image: ImageOps.expand(image, 4, "black"),
}


@pytest.mark.parametrize("name", SAME)
def test_copies_differ_little(name: str) -> None:
    for seed in range(8):
        image = drawing(seed)
        assert between(image, SAME[name](image)) < 0.008, seed


def test_others_differ_much() -> None:
    drawings = [drawing(seed) for seed in range(8)]
    for i, first in enumerate(drawings):
        for second in drawings[:i]:
            assert between(first, second) > 0.1


def test_colour_tells_pictures_apart_whose_luminance_is_the_same() -> None:
    red, blue = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(red).ellipse((10, 10, 50, 50), fill=(200, 0, 0))
    ImageDraw.Draw(blue).ellipse((10, 10, 50, 50), fill=(0, 44, 255))
    greys = [np.asarray(each.convert("L")).min() for each in (red, blue)]
    assert abs(int(greys[0]) - int(greys[1])) <= 8
    assert between(red, blue) > 0.1
    assert between(red, red.convert("L").convert("RGB")) < 0.008


@settings(max_examples=20, deadline=None)
@given(seeds=st.lists(st.integers(0, 99), min_size=2, max_size=4, unique=True))
def test_the_difference_is_symmetric_and_none_of_a_picture_with_itself(seeds: list[int]) -> None:
    pixels = np.stack([noise(seed) for seed in seeds])
    other = pixels[::-1].copy()
    np.testing.assert_allclose(difference(pixels, other), difference(other, pixels), rtol=1e-6)
    assert difference(pixels, pixels).max() < 1e-3


# The trimmed view


def test_margins_and_borders_are_trimmed() -> None:
    pixels = np.full((60, 80, 3), 255, np.uint8)
    pixels[10:40, 20:70] = noise(0, 50)[:30]
    assert trimmed_box(pixels) == (20, 10, 70, 40)
    pixels[:3] = pixels[-3:] = 0
    pixels[:, :3] = pixels[:, -3:] = 0
    assert trimmed_box(pixels) == (20, 10, 70, 40)


def test_a_picture_of_one_colour_has_no_margins() -> None:
    assert trimmed_box(np.full((60, 80, 3), 7, np.uint8)) == (0, 0, 80, 60)
    thumbnails, aspects = views(Image.new("RGB", (400, 200), "red"))
    assert (thumbnails == [255, 0, 0]).all()
    np.testing.assert_allclose(aspects, np.log(2), rtol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (33, 31)])
def test_pictures_of_any_shape_have_views(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "white")
    image.putpixel((size[0] // 2, size[1] // 2), (0, 0, 0))
    thumbnails, aspects = views(image)
    assert thumbnails.shape == (2, SIDE, SIDE, 3)
    assert np.isfinite(aspects).all()


@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=30),
    st.lists(st.lists(st.integers(0, 63), max_size=6), min_size=1, max_size=30),
    st.integers(0, 2**64 - 1),
)
def test_near_any_misses_no_hash(others: list[int], flips: list[list[int]], seed: int) -> None:
    """Hashes around one of the others, each with a few of its bits flipped."""
    others = [seed, *others]
    hashes = [others[number % len(others)] for number in range(len(flips))]
    for number, bits in enumerate(flips):
        for bit in bits:
            hashes[number] ^= 1 << bit
    expected = [any((a ^ b).bit_count() <= RADIUS for b in others) for a in hashes]
    found = near_any(np.array(hashes, np.uint64), np.array(others, np.uint64))
    assert found.tolist() == expected
