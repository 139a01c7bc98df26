"""Downloaded files looked into by a process of its own (training.laion.decoder)."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from latentdiff.config import Config
from latentdiff.data.decode import MAX_PIXELS
from training.laion.decoder import OUT_OF_MEMORY, READABLE, InspectReason

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120
WALL = 4
"""Seconds on the clock for each second of processor time, before a decoder is ended."""
MAX_ANSWER = 1 << 10


class InspectConfig(Config):
    """What pictures may be like, and what looking into one may cost."""

    formats: tuple[Literal["JPEG", "PNG", "WEBP", "GIF"], ...] = ("JPEG", "PNG", "WEBP", "GIF")
    """Told by a file's first bytes; GIFs and the others only where they hold still."""
    max_pixels: int = Field(default=50_000_000, gt=0, le=MAX_PIXELS)
    """Width times height, checked before anything is decompressed."""
    decode_memory: int = Field(default=1536, ge=256)
    """MiB of addresses that a decoder may have (RLIMIT_AS), of which Python takes about 150."""
    decode_seconds: int = Field(default=20, gt=0)
    """Of processor time for one picture (RLIMIT_CPU)."""


@dataclass(frozen=True)
class Inspected:
    """A picture's size as people see it, upright, or why it is none."""

    reason: InspectReason | None
    width: int | None = None
    height: int | None = None
    format: str | None = None


class Inspector:
    """One decoder, begun when it is first needed and again after a picture that ended it."""

    def __init__(self, config: InspectConfig) -> None:
        self.config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None

    def __call__(self, data: bytes) -> Inspected:
        """Raises RuntimeError where no decoder starts."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        deadline = time.monotonic() + WALL * self.config.decode_seconds
        try:
            self._send(len(data).to_bytes(8, "big"), deadline)
            self._send(data, deadline)
            return _inspected(self._receive(deadline))
        except TimeoutError:
            self.close()
            return Inspected("decode timeout")
        except (OSError, ValueError, RecursionError):  # it is gone, or says what it should not
            return Inspected(self._ended())

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._line = None

    @property
    def pid(self) -> int | None:
        """Of the decoder, where one runs."""
        return None if self._process is None else self._process.pid

    def _start(self) -> None:
        self.close()
        options = {
            "memory": self.config.decode_memory << 20,
            "seconds": self.config.decode_seconds,
            "formats": self.config.formats,
            "max_pixels": self.config.max_pixels,
        }
        # Nothing of the environment but what Python and its libraries are found by.
        environment = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
            "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            # glibc keeps the room of one picture for the next: asking the system again costs more
            # than decoding does.
            "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
            "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
        }
        self._line, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "training.laion.decoder", json.dumps(options)],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        try:
            ready = self._receive(time.monotonic() + START_SECONDS) == {"ready": True}
        except (OSError, ValueError):
            ready = False
        if not ready:
            self.close()
            raise RuntimeError(
                "The process that decodes pictures did not start; see what "
                "`python -m training.laion.decoder` prints, and raise decode_memory."
            )

    def _ended(self) -> InspectReason:
        assert self._process is not None
        self._process.kill()
        status = self._process.wait()
        self.close()
        if status == OUT_OF_MEMORY:
            return "decode out of memory"
        return "decode timeout" if status == -signal.SIGXCPU else "decode crashed"

    def _send(self, data: bytes, deadline: float) -> None:
        assert self._line is not None
        self._line.settimeout(max(0.001, deadline - time.monotonic()))
        self._line.sendall(data)

    def _receive(self, deadline: float) -> dict[str, Any]:
        """One line of JSON, no longer than any that a decoder has to say."""
        assert self._line is not None
        line = b""
        while not line.endswith(b"\n"):
            self._line.settimeout(max(0.001, deadline - time.monotonic()))
            piece = self._line.recv(MAX_ANSWER)
            line += piece
            if not piece or len(line) > MAX_ANSWER:
                raise ValueError("no answer")
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError("no answer")
        return values


def _inspected(values: dict[str, Any]) -> Inspected:
    """A decoder's answer, believed as far as it can be one. Raises ValueError."""
    match values:
        case {"reason": str(reason)} if reason in get_args(InspectReason):
            return Inspected(reason)  # type: ignore[arg-type]
        case {"width": int(width), "height": int(height), "format": str(kind)}:
            if min(width, height) > 0 and width * height <= MAX_PIXELS and kind in READABLE:
                return Inspected(None, width, height, kind)
    raise ValueError("no answer")


class Inspectors:
    """Decoders for many threads, each of which takes one in turn."""

    def __init__(self, config: InspectConfig, count: int) -> None:
        self._all = [Inspector(config) for _ in range(count)]
        self._free: queue.SimpleQueue[Inspector] = queue.SimpleQueue()
        for inspector in self._all:
            self._free.put(inspector)

    def __call__(self, data: bytes) -> Inspected:
        with self._one() as inspector:
            return inspector(data)

    @contextmanager
    def _one(self) -> Iterator[Inspector]:
        inspector = self._free.get()
        try:
            yield inspector
        finally:
            self._free.put(inspector)

    def close(self) -> None:
        for inspector in self._all:
            inspector.close()
