"""The process that looks into downloaded files: no files, no sockets, little memory, little time.

Started by training.laion.inspection, one picture at a time: 8 bytes of length and the file come in
on standard input, one line of JSON goes out. Whatever a picture does to a decoder, it does it here.

Covered: no descriptor can be opened besides the three that are, and so no file read or written and
nobody connected to; memory and processor time end; no privilege comes back. Not covered, should a
decoder be made to run foreign code: system calls that need no descriptor, such as removing files by
name, signals to processes of the same user and, for root, new processes. Run the step download as
a user of its own, or in a container, where that matters.
"""

from __future__ import annotations

import ctypes
import io
import json
import math
import resource
import sys
import time
import warnings
from typing import Any, Literal

from PIL import Image, ImageCms

from latentdiff.data.decode import UnreadableImage, decode, forget_profiles

InspectReason = Literal[
    "not an image",
    "format",
    "animated",
    "too many pixels",
    "truncated",
    "damaged",
    "decode out of memory",
    "decode timeout",
    "decode crashed",
]
"""Why a file is no picture to train on."""

OUT_OF_MEMORY = 3
"""Exit status where a file has no room at all: what is left of it would be read as the next."""
READABLE = ("JPEG", "PNG", "WEBP", "GIF")
MAGIC = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (8, b"WEBP", "WEBP"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyphei", "HEIF"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\0\0\x01\0", "ICO"),
    (0, b"8BPS", "PSD"),
)
"""How pictures begin: offset, bytes, format."""


class Refused(Exception):
    """A file that is no picture to train on."""

    def __init__(self, reason: InspectReason) -> None:
        super().__init__(reason)
        self.reason: InspectReason = reason


def sniff(data: bytes) -> str | None:
    """The format that a file's first bytes claim; None where it is no picture of any kind."""
    for offset, magic, name in MAGIC:
        if data.startswith(magic, offset) and (name != "WEBP" or data.startswith(b"RIFF")):
            return name
    return None


def inspect(data: bytes, formats: tuple[str, ...], max_pixels: int) -> tuple[int, int, str]:
    """(width, height, format) of a still picture that decodes whole, upright. Raises Refused."""
    kind = sniff(data)
    if kind is None:
        raise Refused("not an image")
    if kind not in formats:
        raise Refused("format")
    try:
        _check_header(data, kind, max_pixels)
        return *decode(data).size, kind
    except (Refused, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise Refused("too many pixels") from None
    except Exception as error:  # damaged files make Pillow raise errors of any kind
        cause = error.__context__ if isinstance(error, UnreadableImage) else error
        if isinstance(cause, MemoryError):
            raise MemoryError from None
        raise Refused("truncated" if "truncated" in str(cause).lower() else "damaged") from None


def _check_header(data: bytes, kind: str, max_pixels: int) -> None:
    if kind == "WEBP":  # of which Pillow makes room for the whole canvas when it opens it
        _check_pixels(_webp_size(data), max_pixels)
    with Image.open(io.BytesIO(data), formats=[kind]) as image:
        _check_pixels(image.size, max_pixels)
        # A JPEG with several pictures is a photograph and its preview.
        if kind != "JPEG" and getattr(image, "is_animated", False):
            raise Refused("animated")


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise Refused("too many pixels")


def _webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) by the header: RFC 9649, sections 2.5 to 2.7; (0, 0) where it has none."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        return 1 + _little(data[24:27]), 1 + _little(data[27:30])
    if chunk == b"VP8L":
        bits = _little(data[21:25])
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        return _little(data[26:28]) & 0x3FFF, _little(data[28:30]) & 0x3FFF
    return 0, 0


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")


def warm() -> None:
    """Load all that decoding can need, for afterwards no file can be opened."""
    Image.init()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in READABLE:
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, kind, exif=exif, icc_profile=profile)
        inspect(file.getvalue(), (kind,), 64)
        for broken in (file.getvalue()[:40], file.getvalue()[:-20]):
            try:
                inspect(broken, (kind,), 64)
            except Refused:
                pass


PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
CAPABILITY_VERSION = 0x20080522
"""linux/prctl.h and linux/capability.h."""


def give_up_privileges() -> None:
    """No capabilities, root's neither, and none from any program: limits cannot be raised again.

    Of this thread, which is the only one. Raises OSError.
    """
    system = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):  # fails for who has none, and for those that do not exist
        system.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if system.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or system.capset(header, nothing):
        raise OSError(ctypes.get_errno(), "privileges cannot be given up")


def confine(memory: int) -> None:
    """No descriptor beside those that are open, nothing written, `memory` bytes, for good."""
    give_up_privileges()
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (limit, limit))


def _allow(seconds: int) -> None:
    """So much processor time from now on; the system ends a process that takes more."""
    used = math.ceil(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, resource.RLIM_INFINITY))


def main() -> None:
    options: dict[str, Any] = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    warm()
    confine(options["memory"])
    _answer({"ready": True})
    while len(header := sys.stdin.buffer.read(8)) == 8:
        _allow(options["seconds"])
        try:
            data = sys.stdin.buffer.read(int.from_bytes(header, "big"))
        except MemoryError:
            sys.exit(OUT_OF_MEMORY)
        forget_profiles()
        try:
            width, height, kind = inspect(data, tuple(options["formats"]), options["max_pixels"])
            _answer({"width": width, "height": height, "format": kind})
        except Refused as refusal:
            _answer({"reason": refusal.reason})
        except MemoryError:
            _answer({"reason": "decode out of memory"})


def _answer(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
