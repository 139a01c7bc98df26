"""Files that a web of strangers may send for a picture, each with what is to become of it."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms

WIDTH, HEIGHT = 120, 80


@dataclass(frozen=True)
class Case:
    data: bytes
    reason: str | None
    """None where the file is a good picture after all."""
    size: tuple[int, int] | None = None
    format: str | None = None


def good(data: bytes, format: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Case:
    return Case(data, None, size, format)


def picture(mode: str = "RGB", seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image:
    shape = (size[1], size[0], len(mode))[: 2 + (len(mode) > 1)]
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(values, mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, before: bytes = b"", pixels: bytes | None = None) -> bytes:
    """8-bit RGB; black where no pixels are given."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    if pixels is None:
        pixels = zlib.compress(bytes(height * (1 + 3 * width)), 1)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + before
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


def webp_canvas(width: int, height: int) -> bytes:
    """An extended WebP that promises a canvas and holds one small picture."""
    body = encoded(picture(size=(16, 16)), "WEBP")[12:]
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    extended = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + size
    return b"RIFF" + struct.pack("<I", 4 + len(extended) + len(body)) + b"WEBP" + extended + body


def many_scans(copies: int) -> bytes:
    """A progressive JPEG that says its last scan over and over: a little file, much to do."""
    data = encoded(Image.new("L", (3000, 3000)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * copies + b"\xff\xd9"


def animation(kind: str) -> bytes:
    first, *others = (picture(seed=seed) for seed in range(3))
    return encoded(first, kind, save_all=True, append_images=others, duration=100)


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("../../escaped.txt", "out")
    return file.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), "JPEG", exif=exif)


def profiled(profile: bytes) -> bytes:
    return encoded(picture(), "JPEG", icc_profile=profile)


def deep() -> bytes:
    values = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
    return encoded(Image.fromarray(values), "PNG")


def corpus() -> dict[str, Case]:
    """By name. Pictures are WIDTH x HEIGHT unless they say otherwise."""
    jpeg = encoded(picture(), "JPEG")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    bomb = zlib.compress(bytes(16 << 20), 9)
    return {
        "jpeg": good(jpeg, "JPEG"),
        "png": good(encoded(picture("RGBA"), "PNG"), "PNG"),
        "webp": good(encoded(picture(), "WEBP"), "WEBP"),
        "gif": good(encoded(picture("L"), "GIF"), "GIF"),
        "cmyk": good(encoded(picture("CMYK"), "JPEG"), "JPEG"),
        "16-bit": good(deep(), "PNG"),
        "exif-rotated": good(rotated(), "JPEG", (HEIGHT, WIDTH)),
        "icc": good(profiled(srgb), "JPEG"),
        "broken icc": good(profiled(b"\xff" * 3000), "JPEG"),
        "jpeg with a zip behind it": good(jpeg + archive(), "JPEG"),
        "jpeg with a page behind it": good(jpeg + svg, "JPEG"),
        "black": good(png(4000, 4000), "PNG", (4000, 4000)),
        "png promising pixels": Case(png(60_000, 60_000, pixels=b"x"), "too many pixels"),
        "png of many pixels": Case(png(9000, 9000, pixels=b"x"), "too many pixels"),
        "png longer than it says": good(png(WIDTH, HEIGHT, pixels=bomb), "PNG"),
        "png with a huge text": Case(
            png(WIDTH, HEIGHT, chunk(b"zTXt", b"a\0\0" + bomb)), "damaged"
        ),
        "png with a huge profile": Case(
            png(WIDTH, HEIGHT, chunk(b"iCCP", b"a\0\0" + bomb)), "damaged"
        ),
        "webp promising a canvas": Case(webp_canvas(16_384, 16_384), "too many pixels"),
        "gif promising a screen": Case(
            b"GIF89a"
            + struct.pack("<5H", 65535, 65535, 0, 0x2C00, 0)
            + struct.pack("<3H", 0, 65535, 65535)
            + b"\0\x08\0;",
            "too many pixels",
        ),
        "truncated jpeg": Case(jpeg[: len(jpeg) // 2], "truncated"),
        "truncated png": Case(encoded(picture(), "PNG")[:9000], "truncated"),
        "truncated webp": Case(encoded(picture(), "WEBP")[:2000], "damaged"),
        "truncated gif": Case(encoded(picture("L"), "GIF")[:3000], "truncated"),
        "magic alone": Case(b"\xff\xd8\xff", "damaged"),
        "animated gif": Case(animation("GIF"), "animated"),
        "animated png": Case(animation("PNG"), "animated"),
        "animated webp": Case(animation("WEBP"), "animated"),
        "tiff": Case(encoded(picture(), "TIFF"), "format"),
        "bmp": Case(encoded(picture(), "BMP"), "format"),
        "svg": Case(svg, "not an image"),
        "page": Case(b"<!doctype html><title>404</title>", "not an image"),
        "zip": Case(archive(), "not an image"),
        "postscript": Case(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        "pickle": Case(b"\x80\x04\x95cos\nsystem\n(S'touch escaped'\ntR.", "not an image"),
        "nothing": Case(b"", "not an image"),
    }
