"""URLs from strangers."""

from __future__ import annotations

import re
import string
from typing import Literal
from urllib.parse import SplitResult, quote, urljoin, urlsplit

PORTS = {"http": 80, "https": 443}
MAX_URL = 8192
HOST = re.compile(r"[a-z0-9._:-]+")
KEPT = "/%:=&?~+!$,;'@()*[]"
"""Of paths and queries, besides letters, digits and _.-"""


class UnusableUrl(ValueError):
    """A URL that is asked of nobody."""

    def __init__(self, reason: Literal["scheme", "bad url"]) -> None:
        super().__init__(reason)
        self.reason: Literal["scheme", "bad url"] = reason


def split(url: str) -> SplitResult:
    """An http or https URL in ASCII, its host in small letters, without credentials or fragment.

    Raises UnusableUrl.
    """
    if len(url) > MAX_URL:
        raise UnusableUrl("bad url")
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
    except ValueError:  # of idna as well
        raise UnusableUrl("bad url") from None
    if parts.scheme not in PORTS:
        raise UnusableUrl("scheme")
    if not HOST.fullmatch(host) or parts.username is not None or parts.password is not None:
        raise UnusableUrl("bad url")
    netloc = f"[{host}]" if ":" in host else host
    return SplitResult(
        parts.scheme,
        netloc if port is None else f"{netloc}:{port}",
        quote(parts.path, safe=KEPT) or "/",
        quote(parts.query, safe=KEPT),
        "",
    )


def port_of(parts: SplitResult) -> int:
    """The one that is named, or the scheme's."""
    return parts.port or PORTS[parts.scheme]


def moved(parts: SplitResult, location: str) -> str:
    """Where an answer's Location header points. Raises UnusableUrl."""
    try:
        return urljoin(parts.geturl(), quote(location, safe=string.punctuation, encoding="latin-1"))
    except ValueError:
        raise UnusableUrl("bad url") from None
