"""How the addresses of a corpus answer: as those of LAION do, and worse."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import MappingProxyType

from PIL import Image

Answer = Callable[[BaseHTTPRequestHandler, Path], None]

TYPES = {".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg"}
DRIP_SECONDS = 0.5
ENDLESS_BYTES = 1 << 30
"""What the endless body ends at, for the server's own sake."""
PATIENCE = 60.0
"""Seconds after which the silent address gives up, for the server's own sake."""


@dataclass(frozen=True)
class Behaviour:
    """What an address does in place of sending its picture at once."""

    share: float
    """Of all addresses; at least one has it."""
    answer: Answer
    reasons: tuple[str, ...] = field(default=())
    """Under one of which training.laion counts it; none where it comes to the picture."""


@dataclass(frozen=True)
class Link:
    """An address that is not the server's, with its {port} and one of its {path}s."""

    url: str
    reasons: tuple[str, ...] = ("private address",)
    """Under one of which training.laion counts it."""


def send(
    request: BaseHTTPRequestHandler,
    body: bytes,
    kind: str,
    status: int = 200,
    length: int | None = None,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> None:
    request.send_response(status)
    request.send_header("Content-Type", kind)
    request.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)


def picture(request: BaseHTTPRequestHandler, file: Path) -> None:
    send(request, file.read_bytes(), TYPES[file.suffix])


def with_header(name: str, value: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler, file: Path) -> None:
        send(request, file.read_bytes(), TYPES[file.suffix], headers={name: value})

    return answer


def status(code: int) -> Answer:
    def answer(request: BaseHTTPRequestHandler, file: Path) -> None:
        send(request, b"<html>There is no picture here.</html>", "text/html", code)

    return answer


def redirect(target: str) -> Answer:
    """`target`: with {path}, the address's own."""

    def answer(request: BaseHTTPRequestHandler, file: Path) -> None:
        request.send_response(302)
        request.send_header("Location", target.format(path=request.path))
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def moved(request: BaseHTTPRequestHandler, file: Path) -> None:
    """Once."""
    if request.path.startswith("/moved"):
        picture(request, file)
    else:
        redirect("/moved{path}")(request, file)


def busy(request: BaseHTTPRequestHandler, file: Path) -> None:
    """At first."""
    tried: set[str] = request.server.tried  # type: ignore[attr-defined]
    if request.path in tried:
        picture(request, file)
    else:
        tried.add(request.path)
        send(request, b"", "text/plain", 503, headers={"Retry-After": "0"})


def silent(request: BaseHTTPRequestHandler, file: Path) -> None:
    request.connection.settimeout(PATIENCE)
    request.rfile.read(1)  # until the other side goes away


def drip(request: BaseHTTPRequestHandler, file: Path) -> None:
    request.send_response(200)
    request.send_header("Content-Type", TYPES[file.suffix])
    request.send_header("Content-Length", str(file.stat().st_size))
    request.end_headers()
    for byte in file.read_bytes()[: int(PATIENCE / DRIP_SECONDS)]:
        request.wfile.write(bytes([byte]))
        request.wfile.flush()
        time.sleep(DRIP_SECONDS)


def endless(request: BaseHTTPRequestHandler, file: Path) -> None:
    request.send_response(200)
    request.send_header("Content-Type", "image/jpeg")
    request.end_headers()
    data = file.read_bytes() + bytes(1 << 20)
    for _ in range(ENDLESS_BYTES // len(data)):
        request.wfile.write(data)


def broken_off(request: BaseHTTPRequestHandler, file: Path) -> None:
    data = file.read_bytes()
    send(request, data[: len(data) // 2], TYPES[file.suffix], length=len(data))


def cut(request: BaseHTTPRequestHandler, file: Path) -> None:
    """A file that was damaged before it came here."""
    data = file.read_bytes()
    send(request, data[: len(data) // 2], TYPES[file.suffix])


def huge(request: BaseHTTPRequestHandler, file: Path) -> None:
    send(request, b"", TYPES[file.suffix], length=1 << 40)


def packed(request: BaseHTTPRequestHandler, file: Path) -> None:
    """An encoding that nobody asked for: a hundred times as much when it is unpacked."""
    body = zlib.compress(file.read_bytes() + bytes(64 << 20), 1)
    send(request, body, TYPES[file.suffix], headers={"Content-Encoding": "deflate"})


def other(body: bytes, kind: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler, file: Path) -> None:
        send(request, body, kind)

    return answer


def bomb(side: int = 60_000) -> bytes:
    """A PNG of side x side pixels in a few hundred bytes of header and nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20), 9)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def animation() -> bytes:
    frames = [Image.new("RGB", (96, 96), colour) for colour in ("red", "blue")]
    sink = io.BytesIO()
    frames[0].save(sink, "GIF", save_all=True, append_images=frames[1:])
    return sink.getvalue()


HTML = b"<!DOCTYPE html><html><script>fetch('//127.0.0.1')</script></html>"
SVG = (
    b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY e SYSTEM "file:///etc/passwd">]>'
    b'<svg xmlns="http://www.w3.org/2000/svg" width="300" height="300"><text>&e;</text></svg>'
)

BEHAVIOURS = {
    "moved": Behaviour(0.02, moved),
    "busy": Behaviour(0.01, busy),
    "opted out for another": Behaviour(0.01, with_header("X-Robots-Tag", "otherbot: noai")),
    "404": Behaviour(0.04, status(404), ("404",)),
    "403": Behaviour(0.01, status(403), ("403",)),
    "410": Behaviour(0.01, status(410), ("410",)),
    "500": Behaviour(0.003, status(500), ("http error",)),
    "opted out": Behaviour(0.015, with_header("X-Robots-Tag", "noai, noimageai"), ("opted out",)),
    "not indexed": Behaviour(0.005, with_header("X-Robots-Tag", "noindex"), ("opted out",)),
    "web page": Behaviour(0.015, other(HTML, "text/html"), ("content type",)),
    "web page as JPEG": Behaviour(0.003, other(HTML, "image/jpeg"), ("not an image", "format")),
    "SVG as JPEG": Behaviour(0.003, other(SVG, "image/jpeg"), ("not an image", "format")),
    "cut": Behaviour(0.01, cut, ("truncated", "damaged")),
    "broken off": Behaviour(0.003, broken_off, ("truncated", "http error")),
    "silent": Behaviour(0.001, silent, ("timeout",)),
    "drip": Behaviour(0.001, drip, ("timeout",)),
    "endless": Behaviour(0.001, endless, ("too many bytes",)),
    "huge": Behaviour(0.002, huge, ("too many bytes",)),
    "packed": Behaviour(0.002, packed, ("content encoding",)),
    "bomb": Behaviour(0.002, other(bomb(), "image/png"), ("too many pixels",)),
    "animated": Behaviour(0.003, other(animation(), "image/gif"), ("animated",)),
    "circle": Behaviour(0.002, redirect("{path}"), ("redirects",)),
    "to a private address": Behaviour(0.002, redirect("http://10.0.0.1/"), ("private address",)),
    "to metadata": Behaviour(
        0.001, redirect("http://169.254.169.254/latest/meta-data/"), ("private address",)
    ),
    "to a file": Behaviour(0.001, redirect("file:///etc/passwd"), ("scheme",)),
}

LINKS = {
    "loopback": Link("http://127.0.0.1:1/a.jpg"),
    "loopback of IPv6": Link("http://[::1]:{port}{path}"),
    "loopback as a number": Link("http://2130706433:1{path}"),
    "private network": Link("http://192.168.0.1/a.jpg"),
    "cloud metadata": Link("http://169.254.169.254/latest/meta-data/iam.jpg"),
    "a file": Link("file:///etc/passwd", ("scheme",)),
    "another scheme": Link("gopher://127.0.0.1:{port}{path}", ("scheme",)),
}
"""Addresses that nobody may follow."""
