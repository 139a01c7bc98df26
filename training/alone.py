"""One process at a time in a directory."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentdiff.errors import InputError

PATIENCE = 15.0
"""Seconds that the workers of a process which was killed may hold its directory."""


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Inside the block no other process of this machine works in the directory, which is made.

    Raises InputError where another does. The lock is the system's and dies with its process.
    """
    directory.mkdir(parents=True, exist_ok=True)
    held, until = os.open(directory, os.O_RDONLY), time.monotonic() + PATIENCE
    try:
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise InputError(
                        f"Another process works in {directory}; let it end, or choose another "
                        "directory."
                    ) from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(held)
