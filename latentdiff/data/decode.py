"""Pictures from untrusted bytes: RGB, upright, in sRGB, or a reason why not."""

from __future__ import annotations

import functools
import io
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.Image import Transpose

from latentdiff.pictures import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
"""What is read, by Pillow's names; the first picture of those that hold several."""
MAX_BYTES = 128 << 20
MAX_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs: 256 MiB of RGB."""
MAX_PROFILE_BYTES = 4 << 20

Reason = Literal[
    "missing", "too many bytes", "unknown format", "too many pixels", "unknown colours", "damaged"
]

ORIENTATION = 0x0112
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""What turns a picture upright, by the orientation in its EXIF data."""
MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")
DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of 16-bit grey."""


class UnreadableImage(ValueError):
    """A picture that cannot be used, for one of a few reasons."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


def decode(data: bytes) -> Image.Image:
    """The picture in a file's bytes: RGB, turned as its EXIF data say, sRGB, on white.

    Sizes are checked before anything is decompressed, a colour profile is applied where it can be,
    and 16-bit grey keeps its high bytes. Raises UnreadableImage.
    """
    if len(data) > MAX_BYTES:
        raise UnreadableImage("too many bytes")
    image = _open(io.BytesIO(data))
    turn = UPRIGHT.get(_orientation(image))
    try:
        image.load()
        if image.mode in DEEP:
            image = _high_bytes(image)
        if image.mode not in MODES:
            raise UnreadableImage("unknown colours")
        image = _to_srgb(image)
        return image if turn is None else image.transpose(turn)
    except UnreadableImage:
        raise
    except Exception:  # damaged files make Pillow raise errors of any kind
        raise UnreadableImage("damaged") from None


def measure(file: BinaryIO) -> tuple[int, int]:
    """(width, height) of what decode makes of a file, from its header alone.

    Raises UnreadableImage where the header says that decode would.
    """
    if file.seek(0, io.SEEK_END) > MAX_BYTES:
        raise UnreadableImage("too many bytes")
    file.seek(0)
    image = _open(file)
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def _open(file: BinaryIO) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise UnreadableImage("too many pixels") from None
    except UnidentifiedImageError:
        raise UnreadableImage("unknown format") from None
    except Exception:  # as above
        raise UnreadableImage("damaged") from None
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage("too many pixels")
    return image


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1, upright, where the header says nothing. Pillow turns TIFFs itself."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1  # a PNG's EXIF data may follow the pixels, which a header does not
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data do not spoil the picture
        return 1
    return value if value in UPRIGHT else 1


def _high_bytes(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray((values >> 8).astype(np.uint8))


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode not in ("L", "CMYK"):
        image = to_rgb(image, image.size)
    elif image.has_transparency_data:
        return to_rgb(image, image.size)
    if isinstance(profile, bytes) and 0 < len(profile) <= MAX_PROFILE_BYTES:
        transform = _transform(profile, image.mode)
        if transform is not None:
            return transform.apply(image)
    return to_rgb(image, image.size)


def forget_profiles() -> None:
    """Free what is kept of the last pictures' colour profiles."""
    _transform.cache_clear()


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a colour profile to sRGB; None where there is nothing to do or it cannot be used."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(source):
            return None
        target = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(source, target, mode, "RGB")  # type: ignore[arg-type]
    except Exception:  # profiles are as often damaged as pictures, which remain usable without
        return None
