"""Picture files: read as people see them, written whole and with their recipe inside."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from latentdiff.errors import InputError

ImageSource: TypeAlias = Image.Image | str | os.PathLike[str]
"""A PIL image, or the path of a file that Pillow reads."""

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def read_image(source: ImageSource, what: str = "image") -> Image.Image:
    """The picture, turned as its EXIF data say. Raises InputError when it cannot be read."""
    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source)
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"{what} is a {type(source).__name__}; give a PIL image or a path.")
    path = Path(source)
    if not path.is_file():
        raise InputError(f"There is no {what} {path}.")
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except Exception as error:  # damaged files make Pillow raise errors of any kind
        raise InputError(f"The {what} {path} cannot be read ({error}).") from None


def to_rgb(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """RGB of the middle (width, height); transparent parts become white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return middle(image.convert("RGB"), size)


def middle(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle (width, height) of a picture that is at least so large."""
    left, top = ((had - kept) // 2 for had, kept in zip(image.size, size, strict=True))
    return image.crop((left, top, left + size[0], top + size[1]))


def check_output(path: Path) -> None:
    """Raises InputError for a path that save_picture could not write to."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path} must end in {', '.join(FORMATS)}.")
    if path.is_dir():
        raise InputError(f"{path} is a directory; give a file name in it.")
    if not path.parent.is_dir():
        raise InputError(f"There is no directory {path.parent}; make it first.")


def save_picture(image: Image.Image, path: str | os.PathLike[str], metadata: bool = True) -> None:
    """Write .png, .jpg or .webp; the file appears whole or not at all.

    A PNG keeps the texts in `image.info`, with `metadata`: for a picture of generate A1111's
    `parameters` and the recipe that `latentdiff replay` reads. Raises InputError when it cannot be
    written.
    """
    path = Path(path)
    check_output(path)
    image_format = FORMATS[path.suffix.lower()]
    options: dict[str, object] = {"quality": 95}
    if image_format == "PNG":
        text = PngInfo()
        for key, value in image.info.items() if metadata else ():
            if isinstance(key, str) and isinstance(value, str):
                text.add_itxt(key, value)
        options = {"pnginfo": text}
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        image.save(staging, image_format, **options)
        staging.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}).") from None
    finally:
        staging.unlink(missing_ok=True)
