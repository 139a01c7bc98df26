"""Lists that people keep: domains to take or to leave, and what is to be taken down."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from latentdiff.errors import InputError

NETLOC = re.compile(r"[^:]*://([^/\\?#]*)")
DOMAIN = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
REMEMBERED = 1 << 20
"""Hosts whose verdict is kept at once."""


class Domains:
    """A set of domains; what is below one belongs to it, too."""

    def __init__(self, domains: Iterable[str]) -> None:
        self._domains = frozenset(domains)
        self._verdicts: dict[str, bool] = {}

    def __bool__(self) -> bool:
        return bool(self._domains)

    def hold(self, url: str) -> bool:
        """Whether the host of an absolute URL is one of the domains, or below one."""
        found = NETLOC.match(url)
        netloc = found.group(1) if found else ""
        verdict = self._verdicts.get(netloc)
        if verdict is None:
            labels = host(netloc).split(".")
            verdict = any(".".join(labels[n:]) in self._domains for n in range(len(labels)))
            if len(self._verdicts) >= REMEMBERED:
                self._verdicts.clear()
            self._verdicts[netloc] = verdict
        return verdict


def host(netloc: str) -> str:
    """The host of "user@host:port", in lower case and as it is asked of name servers."""
    name = netloc.rpartition("@")[2]
    name = name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
    name = name.lower().rstrip(".")
    if not name.isascii():
        try:
            name = name.encode("idna").decode()
        except UnicodeError:
            pass
    return name


def read_domains(given: Sequence[str] | Path) -> Domains:
    """Domains as they are listed, or from a file of one per line.

    A leading "*." means what is meant without it. Raises InputError for what is no domain.
    """
    lines = _lines(given) if isinstance(given, Path) else enumerate(given, 1)
    where = f"{given}, line" if isinstance(given, Path) else "The list of domains, entry"
    return Domains(_domain(line, f"{where} {number}") for number, line in lines)


@dataclass(frozen=True)
class Takedown:
    """What must not be used, by any of its names. Some 150 bytes of memory an entry."""

    urls: frozenset[str] = frozenset()
    """Exactly as in the metadata."""
    sha256: frozenset[str] = frozenset()
    """Of the picture's file."""
    sample_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """Sorted, uint64."""
    domains: Domains = field(default_factory=lambda: Domains(()))

    def holds_ids(self, ids: np.ndarray) -> np.ndarray:
        """bool, for each of the ids [N], uint64."""
        if not len(self.sample_ids):
            return np.zeros(len(ids), dtype=bool)
        place = np.searchsorted(self.sample_ids, ids)
        return self.sample_ids[np.minimum(place, len(self.sample_ids) - 1)] == ids


def read_takedown(paths: Sequence[Path]) -> Takedown:
    """Lists of one entry per line: a URL, a domain, a sample_id or a sha256.

    Keys of downloaded pictures (digits) are for later steps and mean nothing here. "#" begins a
    comment. Raises InputError for what is none of these.
    """
    urls, domains, hashes, ids = set(), set(), set(), set()
    for path in paths:
        for number, line in _lines(path):
            if "://" in line:
                urls.add(line)
            elif re.fullmatch(r"[0-9a-fA-F]{64}", line):
                hashes.add(line.lower())
            elif re.fullmatch(r"[0-9a-fA-F]{16}", line):
                ids.add(int(line, 16))
            elif not line.isdigit():
                domains.add(_domain(line, f"{path}, line {number}", dotted=True))
    return Takedown(
        frozenset(urls), frozenset(hashes), np.array(sorted(ids), dtype=np.uint64), Domains(domains)
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered from 1, without comments and what is empty."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                entry = line.strip()
                if entry and not entry.startswith("#"):
                    yield number, entry
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The list {path} cannot be read ({error}); correct its path.") from None


def _domain(entry: str, where: str, dotted: bool = False) -> str:
    name = host(entry.strip().removeprefix("*").lstrip("."))
    if not DOMAIN.fullmatch(name) or (dotted and "." not in name):
        raise InputError(f"{where}: {entry!r} is no {'entry' if dotted else 'domain'}; correct it.")
    return name
