"""How often one host is asked."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime

MANY = 4096
"""Hosts beyond which those that nothing need be known of are forgotten."""


class Closed(Exception):
    """A host that nobody is to ask for a while."""


@dataclass
class _Host:
    running: int = 0
    """Requests."""
    free: float = 0.0
    """When the next may begin."""
    closed: float = 0.0
    """Until when nobody waits for that."""
    busy: int = 0
    """Answers in a row that said so."""


class Politeness:
    """At most so many requests to a host at a time, begun at least so many seconds apart.

    A host that asks for more than `max_wait` seconds without requests is closed for as long as it
    asks; one that says `max_busy` times in a row that it is busy, for `max_wait`.
    """

    def __init__(
        self,
        per_host: int,
        interval: float,
        max_wait: float,
        max_busy: int,
    ) -> None:
        self.per_host, self.interval = per_host, interval
        self.max_wait, self.max_busy = max_wait, max_busy
        self._changed = threading.Condition()
        self._hosts: dict[str, _Host] = {}
        self._many = MANY

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Waits until the host may be asked. Raises Closed, also while it waits."""
        with self._changed:
            while (host := self._host(name)).running >= self.per_host:
                self._check(host)
                self._changed.wait()
            host.running += 1
        try:
            while (wait := self._reserve(host)) > 0:
                time.sleep(min(wait, 1))
            yield
        finally:
            with self._changed:
                host.running -= 1
                self._changed.notify_all()

    def heard(self, name: str, wait: float = 0.0, busy: bool = False) -> None:
        """An answer of the host's: not to ask it for `wait` seconds, or that it is busy."""
        with self._changed:
            host, now = self._host(name), time.monotonic()
            host.busy = host.busy + 1 if busy else 0
            if wait > self.max_wait or host.busy >= self.max_busy:
                host.closed = max(host.closed, now + max(wait, self.max_wait))
                self._changed.notify_all()
            elif wait > 0:
                host.free = max(host.free, now + wait)

    def _host(self, name: str) -> _Host:
        if name not in self._hosts and len(self._hosts) >= self._many:
            now = time.monotonic()
            self._hosts = {
                name: host
                for name, host in self._hosts.items()
                if host.running or max(host.free, host.closed) > now
            }
            self._many = MANY + 2 * len(self._hosts)
        return self._hosts.setdefault(name, _Host())

    def _check(self, host: _Host) -> None:
        if host.closed > time.monotonic():
            raise Closed

    def _reserve(self, host: _Host) -> float:
        """0 where the host may be asked now, which is then taken; else the seconds to wait."""
        with self._changed:
            self._check(host)
            now = time.monotonic()
            wait = host.free - now
            if wait <= 0 and self.interval > 0:
                host.free = now + self.interval
            return wait


def retry_after(headers: Message) -> float:
    """Seconds that an answer asks to wait; 0 where it does not say, or not understandably."""
    said = (headers.get("Retry-After") or "").strip()
    if said.isdecimal():
        return float(said[:9])
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


@functools.cache
def shared(
    processes: int, per_host: int, interval: float, max_wait: float, max_busy: int
) -> Politeness:
    """The one of this process, whose share of a machine's requests is that of one of `processes`.

    A host has one connection of each process at least.
    """
    return Politeness(max(1, per_host // processes), interval * processes, max_wait, max_busy)
