"""A drawing as somebody's file on the web: of odd size and shape, in one of many encodings."""

from __future__ import annotations

import io
from random import Random

import numpy as np
from PIL import Image, ImageCms, ImageEnhance

ENCODINGS = {
    "jpeg": 58,
    "png": 18,
    "webp": 16,
    "cmyk": 2,
    "deep": 2,
    "turned": 2,
    "profile": 2,
}
"""How many in a hundred: deep is 16-bit grey, turned is upright by its EXIF data alone, profile
has an ICC profile in it."""
SUFFIXES = {"PNG": "png", "WEBP": "webp", "JPEG": "jpg"}
ORIENTATION = 0x0112


def resized(size: tuple[int, int], factor: float, least: int) -> tuple[int, int]:
    """Each side `factor` times as long, in pixels, and `least` of them or more."""
    width, height = size
    return max(least, round(width * factor)), max(least, round(height * factor))


def place(drawing: Image.Image, rng: Random) -> Image.Image:
    """On white, on a pale colour or on nothing, with margins of its own at each edge: RGBA."""
    longer = rng.uniform(0.45, 1.0)
    drawing = drawing.resize(resized(drawing.size, longer, 1))
    edge = 0.15 * max(drawing.size)
    left, top, right, bottom = (round(rng.uniform(0, edge)) for _ in range(4))
    background = (255, 255, 255, rng.choice((255, 255, 255, 0)))
    if rng.random() < 0.15:
        red, green, blue = (rng.randrange(190, 256) for _ in range(3))
        background = (red, green, blue, 255)
    size = drawing.width + left + right, drawing.height + top + bottom
    canvas = Image.new("RGBA", size, background)
    canvas.alpha_composite(drawing, (left, top))
    return canvas


def encode(picture: Image.Image, rng: Random) -> tuple[bytes, str]:
    """(file, its ending) of an RGBA picture."""
    (kind,) = rng.choices(list(ENCODINGS), list(ENCODINGS.values()))
    flat = Image.new("RGB", picture.size, "white")
    flat.paste(picture, mask=picture.getchannel("A"))
    quality = rng.randrange(70, 96)
    if kind == "png":
        return save(picture, "PNG")
    if kind == "webp":
        return save(picture, "WEBP", quality=quality)
    if kind == "cmyk":
        return save(flat.convert("CMYK"), "JPEG", quality=quality)
    if kind == "deep":
        grey = np.asarray(flat.convert("L"), dtype=np.uint16) * 257
        return save(Image.fromarray(grey), "PNG")
    if kind == "turned":
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        return save(flat.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=quality, exif=exif)
    if kind == "profile":
        profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
        profile[24:36] = bytes(12)  # when it was made, which is now
        return save(flat, "JPEG", quality=quality, icc_profile=bytes(profile))
    return save(flat, "JPEG", quality=quality)


def again(file: bytes, rng: Random) -> tuple[bytes, str]:
    """(file, its ending) of the same picture as others put it on the web: encoded, resized or
    brightened anew.
    """
    picture = Image.open(io.BytesIO(file))
    picture.load()
    rgba = picture.convert("RGBA")
    flat = Image.new("RGB", rgba.size, "white")
    flat.paste(rgba, mask=rgba.getchannel("A"))
    turned = picture.getexif().get(ORIENTATION) == 6
    flat = flat.transpose(Image.Transpose.ROTATE_270) if turned else flat
    way = rng.choice(("encoded", "resized", "brightened"))
    if way == "resized":
        scale = rng.choice((0.6, 0.8, 1.4))
        flat = flat.resize(resized(flat.size, scale, 16))
    if way == "brightened":
        flat = ImageEnhance.Brightness(flat).enhance(rng.choice((0.92, 0.96)))
    return save(flat, "JPEG", quality=rng.randrange(60, 91))


def save(picture: Image.Image, form: str, **options: object) -> tuple[bytes, str]:
    sink = io.BytesIO()
    picture.save(sink, form, **options)
    return sink.getvalue(), SUFFIXES[form]
