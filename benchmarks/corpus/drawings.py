"""Public-domain drawings with titles and keywords: where the pictures of a corpus come from.

openclipart: Debian's package openclipart-svg, 8,121 vector drawings with RDF metadata.
sprites: the 1,159 emoji that are bundled with latentdiff; nothing to download.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import multiprocessing
import re
import resource
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from PIL import Image

from latentdiff.data.sprites import load_sprites
from latentdiff.errors import InputError

MEMORY = 2 << 30
"""Bytes of address space that rasterising may add to what the process begins with."""
DEADLINE = 20.0
"""Seconds that one drawing may take."""
MAX_SVG_BYTES = 4 << 20
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
NO_KEYWORDS = re.compile(r"hash|0x[0-9a-f]+|\d+|.*theme.*|clip ?art|unsorted|upload.*")
"""Words that say nothing of what is drawn."""


class Drawing(NamedTuple):
    """One drawing on nothing."""

    name: str
    """Unique in its collection."""
    title: str
    keywords: tuple[str, ...]
    picture: Image.Image
    """RGBA."""

    @property
    def caption(self) -> str:
        """The title, then each keyword that it does not hold."""
        words = [self.title, *(word for word in self.keywords if word not in self.title)]
        return ", ".join(word for word in words if word)


def sprites(count: int | None = None) -> Iterator[Drawing]:
    """The first emoji sprites."""
    for sprite in list(load_sprites().values())[:count]:
        keywords = tuple(word for word in sprite.keywords if word != sprite.name)
        yield Drawing(sprite.name, sprite.name, keywords, sprite.image)


def openclipart(folder: Path, side: int, count: int | None = None) -> Iterator[Drawing]:
    """The SVG files below a folder, in the order of their names; `side`: pixels of the longer side.

    Titles that several files share are names of collections: the file's own name takes their place.
    A file that cannot be drawn within the limits, or shows nothing, is left out.
    """
    files = sorted(folder.rglob("*.svg"))[:count]
    if not files:
        raise InputError(
            f"There are no SVG files below {folder}; install Debian's package openclipart-svg, or "
            "unpack it with dpkg-deb -x and name its folder with --svg."
        )
    described = [describe(file) for file in files]
    shared = Counter(title for title, _ in described)
    with Rasteriser() as rasteriser:
        for file, (title, keywords) in zip(files, described, strict=True):
            picture = rasteriser.draw(file, side)
            if picture is None or picture.getbbox() is None:
                continue
            if not title or shared[title] > 2 or "clipart by" in title:
                title = words(re.sub(r"_\d+\w?$", "", file.stem))
            folders = file.relative_to(folder).parts[:-1]
            own = {word.rstrip("s"): word for word in (*map(words, folders[::-1]), *keywords[::-1])}
            kept = tuple(word for word in reversed(own.values()) if not NO_KEYWORDS.fullmatch(word))
            yield Drawing(file.relative_to(folder).as_posix(), title, kept, picture)


def words(text: str) -> str:
    """Lower case, spaces for underscores, hyphens and runs of spaces."""
    return " ".join(re.sub(r"[_\-]+", " ", text).lower().split())


def describe(file: Path) -> tuple[str, list[str]]:
    """(title, keywords) of one SVG file's RDF metadata; nothing where there is none that is read.

    expat itself bounds what entities may grow to.
    """
    if file.stat().st_size > MAX_SVG_BYTES:
        return "", []
    try:
        root = ElementTree.fromstring(file.read_bytes())
    except (ElementTree.ParseError, ValueError, LookupError):
        return "", []
    work = next((node for node in root.iter() if str(node.tag).endswith("}Work")), None)
    if work is None:
        return "", []
    title = work.findtext(f"{DUBLIN_CORE}title") or ""
    people = work.iterfind(f"{DUBLIN_CORE}creator//{DUBLIN_CORE}title")
    names = {words(node.text or "") for node in people}
    subjects = [words(node.text or "") for node in work.iterfind(f"{DUBLIN_CORE}subject//*")]
    return words(title), [word for word in subjects if len(word) > 1 and word not in names]


@dataclass
class Child:
    """A process that draws, and the way to it."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection


class Rasteriser:
    """Draws SVG files by resvg in a process that can open nothing, write nothing and has limited
    memory; where it dies or takes too long, the next drawing gets a new one.
    """

    def __init__(self) -> None:
        self.child: Child | None = None

    def __enter__(self) -> Rasteriser:
        return self

    def __exit__(self, *reason: object) -> None:
        self.end()

    def draw(self, file: Path, side: int) -> Image.Image | None:
        """RGBA, the longer side of `side` pixels; None where it cannot be drawn."""
        if file.stat().st_size > MAX_SVG_BYTES:
            return None
        child = self.child or self.begin()
        svg = file.read_bytes()
        try:
            child.pipe.send_bytes(json.dumps({"side": side}).encode() + b"\n" + svg)
            if child.pipe.poll(DEADLINE):
                png = child.pipe.recv_bytes()
                return Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGBA")
        except (EOFError, ConnectionError):  # it is gone
            pass
        except OSError:  # what it drew is no picture
            return None
        self.end()
        return None

    def begin(self) -> Child:
        context = multiprocessing.get_context("spawn")
        pipe, other = context.Pipe()
        process = context.Process(target=draw_forever, args=(other,), daemon=True)
        process.start()
        other.close()
        self.child = Child(process, pipe)
        return self.child

    def end(self) -> None:
        if self.child is not None:
            self.child.process.kill()
            self.child.process.join()
            self.child.pipe.close()
            self.child = None


def draw_forever(pipe: Connection) -> None:
    """The child: SVG files come in, PNG files go out; an empty one for what cannot be drawn."""
    from resvg_py import svg_to_bytes

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    draw = functools.partial(svg_to_bytes, skip_system_fonts=True, dpi=96)
    while True:
        try:
            line, _, svg = pipe.recv_bytes().partition(b"\n")
        except (EOFError, ConnectionError):
            return
        side, png = json.loads(line)["side"], b""
        with contextlib.suppress(ValueError):
            text = svg.decode("utf-8", "replace")
            width, height = png_size(draw(svg_string=text, width=64))
            longer = {"width": side} if width >= height else {"height": side}
            if max(width, height) <= 64 * 16:
                png = draw(svg_string=text, **longer)
        pipe.send_bytes(png)


def png_size(png: bytes) -> tuple[int, int]:
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
