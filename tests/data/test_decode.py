"""Pictures from untrusted bytes: what comes out is upright sRGB, or a reason."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from latentdiff.data import decode as module
from latentdiff.data.decode import UnreadableImage, decode, measure

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
"""Of damaged metadata."""

WIDTH, HEIGHT = 20, 12
FILES = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
LOSSLESS: dict[str, dict[str, Any]] = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "BMP": {}}


def pixels(channels: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (HEIGHT, WIDTH, channels)[: 2 + (channels > 1)], dtype=np.uint8)


def encoded(values: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def reason(data: bytes) -> str:
    with pytest.raises(UnreadableImage) as error:
        decode(data)
    return error.value.reason


def check(data: bytes, expected: np.ndarray, atol: int = 0) -> None:
    image = decode(data)
    assert image.mode == "RGB"
    assert image.size == measure(io.BytesIO(data))
    np.testing.assert_allclose(np.asarray(image).astype(int), expected.astype(int), atol=atol)


# Formats


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_files_give_their_pixels(kind: str) -> None:
    check(encoded(pixels(), kind, **LOSSLESS[kind]), pixels())


def test_jpegs_give_what_pillow_decodes() -> None:
    data = encoded(pixels(), "JPEG")
    check(data, np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_pictures_the_first_is_taken(kind: str) -> None:
    colours = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "lime", "blue")]
    options = LOSSLESS.get(kind, {})
    data = encoded(colours[0], kind, save_all=True, append_images=colours[1:], **options)
    check(data, np.asarray(colours[0]))


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PCX"])
def test_other_formats_are_not_opened(kind: str) -> None:
    assert reason(encoded(pixels(), kind)) == "unknown format"


@pytest.mark.parametrize("data", [b"", b"\0", b"nonsense", b"%!PS-Adobe-3.0 EPSF-3.0", b"<svg/>"])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    assert reason(data) == "unknown format"
    with pytest.raises(UnreadableImage, match="unknown format"):
        measure(io.BytesIO(data))


# Turned


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(pixels(), kind, exif=exif, **LOSSLESS.get(kind, {}))
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
    assert upright.size == ((WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH))
    check(data, np.asarray(upright.convert("RGB")))


def test_orientation_6_has_its_top_on_the_right() -> None:
    """EXIF 2.32, section 4.6.4: 6 means that row 0 of the file is the picture's right side."""
    values = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    values[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.asarray(decode(encoded(values, "PNG", exif=exif)))
    assert upright.shape == (WIDTH, HEIGHT, 3)
    assert (upright[:, -1] == 255).all()
    assert (upright[:, :-1] == 0).all()


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"]
)
def test_damaged_exif_data_do_not_spoil_a_picture(exif: bytes) -> None:
    check(encoded(pixels(), "WEBP", lossless=True, exif=exif), pixels())


# Colours


def test_transparent_parts_are_white() -> None:
    values = pixels(4)
    alpha = values[..., 3:] / 255
    expected = np.rint(values[..., :3] * alpha + 255 * (1 - alpha))
    check(encoded(values, "PNG"), expected, atol=1)


def test_a_transparent_palette_entry_is_white() -> None:
    image = Image.fromarray(pixels()).quantize(16)
    expected = np.asarray(image.convert("RGB")).copy()
    expected[np.asarray(image) == 3] = 255
    assert (np.asarray(image) == 3).any()
    check(encoded(image, "PNG", transparency=3), expected)


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_and_palettes_become_rgb(mode: str) -> None:
    image = Image.fromarray(pixels()).convert(mode)
    check(encoded(image, "PNG"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_high_bytes(kind: str) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
    check(encoded(values, kind), np.repeat((values // 256)[..., None], 3, axis=-1))


def test_cmyk_without_a_profile_is_the_complement() -> None:
    values = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    values[..., 0], values[: HEIGHT // 2, :, 3] = 255, 255
    image = Image.fromarray(values, "CMYK")
    expected = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    expected[HEIGHT // 2 :] = (0, 255, 255)
    check(encoded(image, "TIFF"), expected)
    check(encoded(image, "JPEG", quality=100, subsampling=0), expected, atol=4)


@pytest.mark.parametrize("mode", ["F", "LAB"])
def test_colours_without_a_meaning_are_refused(mode: str) -> None:
    assert reason(encoded(Image.new(mode, (WIDTH, HEIGHT)), "TIFF")) == "unknown colours"


def swapped_profile() -> bytes:
    """sRGB with the primaries of red and blue in each other's place, under another name."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    table = bytearray(profile)
    (count,) = struct.unpack_from(">I", table, 128)
    entries = {bytes(table[132 + 12 * n : 136 + 12 * n]): 132 + 12 * n for n in range(count)}
    red, blue = entries[b"rXYZ"], entries[b"bXYZ"]
    table[red : red + 4], table[blue : blue + 4] = b"bXYZ", b"rXYZ"
    renamed = bytes(table).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    assert renamed != bytes(table)
    return renamed


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_colour_profile_is_applied(kind: str) -> None:
    data = encoded(pixels(), kind, icc_profile=swapped_profile(), **LOSSLESS[kind])
    check(data, pixels()[..., ::-1], atol=2)


def test_a_colour_profile_is_applied_below_transparency() -> None:
    values = pixels(4)
    values[..., 3] = np.where(values[..., 3] > 127, 255, 0)
    expected = np.where(values[..., 3:] > 0, values[..., 2::-1], 255)
    check(encoded(values, "PNG", icc_profile=swapped_profile()), expected, atol=2)


@pytest.mark.parametrize("damage", ["nonsense", "half", "srgb", "of cmyk"])
def test_profiles_that_say_nothing_change_nothing(damage: str) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = {
        "nonsense": b"nonsense",
        "half": swapped_profile()[:200],
        "srgb": srgb,
        "of cmyk": swapped_profile().replace(b"RGB XYZ ", b"CMYKXYZ "),
    }[damage]
    check(encoded(pixels(), "PNG", icc_profile=profile), pixels())


# Damage, and bombs


@pytest.mark.parametrize("kind", FILES)
def test_half_a_file_is_damaged_though_its_header_is_whole(kind: str) -> None:
    data = encoded(Image.effect_noise((200, 200), 90).convert("RGB"), kind)
    half = data[: len(data) // 2]
    assert reason(half) in ("damaged", "unknown format")
    if kind in ("JPEG", "PNG", "GIF", "BMP"):
        assert reason(half) == "damaged"
        assert measure(io.BytesIO(half)) == (200, 200)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=12),
)
def test_any_damage_leaves_a_picture_or_a_reason(kind: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(encoded(pixels(), kind))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        size: tuple[int, int] | None = measure(io.BytesIO(bytes(data)))
    except UnreadableImage:
        size = None
    try:
        image = decode(bytes(data))
    except UnreadableImage:
        return
    assert (image.mode, image.size) == ("RGB", size)


def huge_png(width: int, height: int) -> bytes:
    """A header that announces many pixels, and a few of them."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(9460, 9460), (100_000, 1000), (50_000, 50_000)])
def test_a_picture_of_too_many_pixels_is_not_decompressed(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    def refuse(image: Image.Image) -> None:
        raise AssertionError("decompressed")

    monkeypatch.setattr(Image.Image, "load", refuse)
    assert reason(huge_png(*size)) == "too many pixels"
    with pytest.raises(UnreadableImage, match="too many pixels"):
        measure(io.BytesIO(huge_png(*size)))


def test_too_many_bytes_are_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(pixels(), "PNG")
    monkeypatch.setattr(module, "MAX_BYTES", len(data))
    check(data, pixels())
    monkeypatch.setattr(module, "MAX_BYTES", len(data) - 1)
    assert reason(data) == "too many bytes"
    with pytest.raises(UnreadableImage, match="too many bytes"):
        measure(io.BytesIO(data))
