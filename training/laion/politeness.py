"""How often one host is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Politeness:
    """At most so many requests to a host at a time, begun at least so many seconds apart."""

    def __init__(self, per_host: int, interval: float) -> None:
        self.per_host, self.interval = per_host, interval
        self._changed = threading.Condition()
        self._running: dict[str, int] = {}
        self._next: dict[str, float] = {}

    @contextmanager
    def __call__(self, host: str) -> Iterator[None]:
        """Waits until the host may be asked."""
        with self._changed:
            while self._running.get(host, 0) >= self.per_host:
                self._changed.wait()
            self._running[host] = self._running.get(host, 0) + 1
        try:
            while (wait := self._reserve(host)) > 0:
                time.sleep(wait)
            yield
        finally:
            with self._changed:
                self._running[host] -= 1
                if not self._running[host]:
                    del self._running[host]
                self._changed.notify_all()

    def hold(self, host: str, seconds: float) -> None:
        """Nobody asks the host for so long."""
        with self._changed:
            self._next[host] = max(self._next.get(host, 0.0), time.monotonic() + seconds)

    def _reserve(self, host: str) -> float:
        """0 where the host may be asked now, which is then taken; else the seconds to wait."""
        with self._changed:
            now = time.monotonic()
            wait = self._next.get(host, 0.0) - now
            if wait <= 0 and self.interval > 0:
                self._next[host] = now + self.interval
            return wait
