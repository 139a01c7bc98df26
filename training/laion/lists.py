"""Lists that people keep: domains to take or to leave, and what is to be taken down."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.errors import InputError

NETLOC = re.compile(r"[^:]*://([^/\\?#]*)")
DIGITS = re.compile(r"[0-9]+")
DOMAIN = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
COMMENT = re.compile(r"(^|\s)#.*")
REMEMBERED = 1 << 20
"""Hosts whose verdict is kept at once."""
NAMES = ("key", "sample_id", "sha256", "url")
"""Columns by which a list may name a picture; a domain is looked for in its URL."""


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


def host_of(url: str | None) -> str:
    """The host of a URL as `host` has it; "" where there is none."""
    found = NETLOC.match(url or "")
    return host(found.group(1)) if found else ""


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
    """What must not be used, by any of its names. Some 200 bytes of memory an entry."""

    keys: frozenset[str] = frozenset()
    """Of downloaded pictures; a selection has none yet."""
    urls: frozenset[str] = frozenset()
    """Exactly as in the metadata."""
    sha256: frozenset[str] = frozenset()
    """Of the picture's file."""
    sample_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """Sorted, uint64."""
    domains: Domains = field(default_factory=lambda: Domains(()))

    @property
    def needs_names(self) -> bool:
        """Whether more than sha256 is listed."""
        return bool(self.keys or self.urls or self.domains or len(self.sample_ids))

    def holds_ids(self, ids: np.ndarray) -> np.ndarray:
        """bool, for each of the ids [N], uint64."""
        if not len(self.sample_ids):
            return np.zeros(len(ids), dtype=bool)
        place = np.searchsorted(self.sample_ids, ids)
        return self.sample_ids[np.minimum(place, len(self.sample_ids) - 1)] == ids

    def holds(self, table: pa.Table) -> np.ndarray:
        """Which rows are listed, bool [N], by those of NAMES that the table has."""
        found = np.zeros(len(table), dtype=bool)
        for name in set(NAMES) & set(table.column_names):
            if len(self._values[name]):
                listed = pc.is_in(table[name], value_set=self._values[name])
                found |= listed.to_numpy()
        if self.domains and "url" in table.column_names:
            urls = table["url"].to_pylist()
            found |= np.array([self.domains.hold(url or "") for url in urls], dtype=bool)
        return found

    @cached_property
    def _values(self) -> dict[str, pa.Array]:
        ids = [f"{number:016x}" for number in self.sample_ids.tolist()]
        listed = (self.keys, ids, self.sha256, self.urls)
        return {
            name: pa.array(list(values), pa.string())
            for name, values in zip(NAMES, listed, strict=True)
        }


def read_takedown(paths: Sequence[Path]) -> Takedown:
    """Lists of one entry per line: a URL, a domain, a key, a sample_id or a sha256.

    "#" begins a comment, at the start of a line or after white space. Raises InputError for what is
    none of these.
    """
    keys, urls, domains, hashes, ids = set(), set(), set(), set(), set()
    for path in paths:
        for number, line in _lines(path):
            if DIGITS.fullmatch(line):  # of 16, or of 64, they may be another name as well
                keys.add(line)
            if "://" in line:
                urls.add(line)
            elif re.fullmatch(r"[0-9a-fA-F]{64}", line):
                hashes.add(line.lower())
            elif re.fullmatch(r"[0-9a-fA-F]{16}", line):
                ids.add(int(line, 16))
            elif line not in keys:
                domains.add(_domain(line, f"{path}, line {number}", dotted=True))
    return Takedown(
        frozenset(keys),
        frozenset(urls),
        frozenset(hashes),
        np.array(sorted(ids), dtype=np.uint64),
        Domains(domains),
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered from 1, without comments and what is empty."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                entry = COMMENT.sub("", line).strip()
                if len(entry.split()) > 1:
                    raise InputError(
                        f"{path}, line {number}: {entry!r} has white space in it; put one entry on "
                        'a line, and comments behind " #".'
                    )
                if entry:
                    yield number, entry
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The list {path} cannot be read ({error}); correct its path.") from None


def _domain(entry: str, where: str, dotted: bool = False) -> str:
    name = host(entry.strip().removeprefix("*").lstrip("."))
    if not DOMAIN.fullmatch(name) or (dotted and "." not in name):
        raise InputError(f"{where}: {entry!r} is no {'entry' if dotted else 'domain'}; correct it.")
    return name
