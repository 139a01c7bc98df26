"""One file from the web, as far as that can be done without trusting anyone on it."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from dataclasses import dataclass
from email.message import Message
from typing import Literal
from urllib.parse import SplitResult

from pydantic import Field

from latentdiff.config import Config
from training.laion.addresses import Resolver, is_public
from training.laion.opt_out import forbidding
from training.laion.politeness import Closed, Politeness, retry_after
from training.laion.sockets import Timed, left
from training.laion.urls import PORTS, UnusableUrl, moved, port_of, split

FetchReason = Literal[
    "bad url",
    "scheme",
    "busy",
    "dns",
    "private address",
    "connection",
    "timeout",
    "403",
    "404",
    "410",
    "http error",
    "redirects",
    "opted out",
    "content type",
    "content encoding",
    "too many bytes",
    "truncated",
]
"""Why there is no file."""

REDIRECTS = (301, 302, 303, 307, 308)
AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which another try may do better."""
BUSY = (429, 503)
"""Answers that are about the host, not the file."""
MAX_ADDRESSES = 4
"""Of one host, tried one after the other."""
CHUNK = 1 << 16


class FetchConfig(Config):
    """How files are asked for, and how much may come back."""

    user_agent: str = Field(
        default="latentdiff", pattern=r"^[!-.0-~]([ -~]*[!-~])?$", max_length=200
    )
    """Sent to every server. Add where you can be reached: latentdiff (+https://example.org/crawl).
    What stands before the first space or slash is the name that sites address in X-Robots-Tag."""
    timeout: float = Field(default=10, gt=0)
    """Seconds to connect, and between two pieces of an answer."""
    deadline: float = Field(default=60, gt=0)
    """Seconds for one try altogether, redirects included."""
    max_bytes: int = Field(default=16 << 20, gt=0)
    """Of one file."""
    max_redirects: int = Field(default=5, ge=0)
    """Followed one after the other for one file."""
    retries: int = Field(default=2, ge=0)
    """After timeouts, broken connections and answers that a server gives when it is busy."""
    backoff: float = Field(default=1, ge=0)
    """Seconds before the first retry, twice as many before each further one."""
    max_retry_after: float = Field(default=60, ge=0)
    """Seconds that a host may ask to wait (Retry-After). One that asks for more is left alone for
    so long: its other files are "busy", without being asked for."""
    max_busy: int = Field(default=20, gt=0)
    """Answers 429 or 503 in a row after which a host is left alone for max_retry_after seconds."""
    per_host: int = Field(default=8, gt=0)
    """Connections to one host at a time, of a machine; divided between its processes, each of which
    has one at least."""
    host_interval: float = Field(default=0, ge=0)
    """Seconds between the beginnings of two requests to one host, of a machine on the average; each
    process waits as many times that as there are processes."""
    content_types: tuple[str, ...] = (
        "image/jpeg",
        "image/jpg",
        "image/pjpeg",
        "image/png",
        "image/x-png",
        "image/webp",
        "image/gif",
        "application/octet-stream",
        "binary/octet-stream",
        "",
    )
    """What an answer may say that it is; "" where it says nothing. The file itself decides."""
    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex", "tdm-reservation")
    """Directives in an answer's headers that end it before the picture is read."""
    local_hosts: tuple[str, ...] = ()
    """HOST:PORT as URLs spell it, which may have an address that is not public; all others may not.
    For servers of one's own."""


@dataclass(frozen=True)
class Fetched:
    """What became of one URL."""

    reason: FetchReason | None
    """None where `body` is a whole file."""
    body: bytes = b""
    http_status: int | None = None
    final_url: str | None = None
    """Of the last server that was asked, after redirects."""
    content_type: str | None = None
    opt_out: str | None = None
    """allowed, or the directive that forbids; None where no server said anything."""


class _Failed(Exception):
    def __init__(self, reason: FetchReason, again: bool = False, wait: float = 0) -> None:
        super().__init__(reason)
        self.reason, self.again, self.wait = reason, again, wait


@dataclass
class _Seen:
    """What is known of a try while it lasts."""

    http_status: int | None = None
    final_url: str | None = None
    content_type: str | None = None
    opt_out: str | None = None


class Fetcher:
    """Files by their URLs, for many threads.

    Only http and https; names are resolved once and the address that was judged public is the one
    connected to, again after every redirect; no proxies, no cookies, no credentials, nothing
    compressed; every wait has an end.
    """

    def __init__(
        self, config: FetchConfig, threads: int = 1, politeness: Politeness | None = None
    ) -> None:
        """`politeness`: what is known of hosts already; by default nothing is."""
        self.config = config
        self.agents = (config.user_agent.replace("/", " ").split()[0].lower(), "img2dataset")
        self._resolve = Resolver(threads)
        self._politeness = politeness or Politeness(
            config.per_host, config.host_interval, config.max_retry_after, config.max_busy
        )
        self._tls = ssl.create_default_context()

    def close(self) -> None:
        self._resolve.close()

    def __call__(self, url: str) -> Fetched:
        """Never raises for anything that a URL or a server does."""
        failed: Fetched | None = None
        for attempt in range(self.config.retries + 1):
            seen = _Seen()
            try:
                return Fetched(None, self._follow(url, seen), **vars(seen))
            except UnusableUrl as failure:
                return Fetched(failure.reason, **vars(seen))
            except Closed:
                return failed or Fetched("busy", **vars(seen))
            except _Failed as failure:
                failed = Fetched(failure.reason, **vars(seen))
                last = attempt == self.config.retries
                if last or not failure.again or failure.wait > self.config.max_retry_after:
                    return failed
                time.sleep(max(failure.wait, self.config.backoff * 2**attempt))
        raise AssertionError("unreachable")

    def _follow(self, url: str, seen: _Seen) -> bytes:
        spent = 0.0
        for _ in range(self.config.max_redirects + 1):
            parts = split(url)
            with self._politeness(parts.netloc):
                began = time.monotonic()
                found = self._ask(parts, began + self.config.deadline - spent, seen)
                spent += time.monotonic() - began
            if isinstance(found, bytes):
                return found
            url = found
        raise _Failed("redirects")

    def _ask(self, parts: SplitResult, deadline: float, seen: _Seen) -> bytes | str:
        """The file, or where it is said to be instead."""
        seen.final_url = parts.geturl()
        try:
            with self._connect(parts, deadline) as connection:
                return self._converse(connection, parts, deadline, seen)
        except TimeoutError:
            raise _Failed("timeout", again=True) from None
        except OSError:  # of TLS as well
            raise _Failed("connection", again=True) from None
        except http.client.HTTPException:
            raise _Failed("http error", again=True) from None
        except UnusableUrl:
            raise
        except ValueError:  # hosts that no name can be
            raise UnusableUrl("bad url") from None

    def _connect(self, parts: SplitResult, deadline: float) -> socket.socket:
        host, port = str(parts.hostname), port_of(parts)
        seconds = left(deadline, self.config.timeout)
        try:
            addresses = self._resolve(host, port, seconds)
        except TimeoutError:
            raise _Failed("dns", again=True) from None
        except (OSError, UnicodeError) as error:
            passing = getattr(error, "errno", None) == socket.EAI_AGAIN
            raise _Failed("dns", again=passing) from None
        name = parts.netloc if parts.port else f"{parts.netloc}:{port}"
        if name not in self.config.local_hosts and not all(map(is_public, addresses)):
            raise _Failed("private address")
        last = OSError("no address")
        for address in addresses[:MAX_ADDRESSES]:
            try:
                connection = socket.create_connection(
                    (address, port), left(deadline, self.config.timeout)
                )
            except OSError as failure:
                last = failure
                continue
            if parts.scheme == "http":
                return connection
            with connection:  # which the TLS socket takes over
                return self._tls.wrap_socket(connection, server_hostname=host)
        raise last

    def _converse(
        self, connection: socket.socket, parts: SplitResult, deadline: float, seen: _Seen
    ) -> bytes | str:
        request = http.client.HTTPConnection(str(parts.hostname), port_of(parts))
        request.default_port = PORTS[parts.scheme]  # type: ignore[misc]
        request.sock = Timed(connection, deadline, self.config.timeout)  # type: ignore[assignment]
        headers = {
            "User-Agent": self.config.user_agent,
            "Accept": "image/*,*/*;q=0.5",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        request.request("GET", target, headers=headers)
        answer = request.getresponse()
        seen.http_status = answer.status
        wait = retry_after(answer.headers) if answer.status in AGAIN else 0.0
        self._politeness.heard(parts.netloc, wait, answer.status in BUSY)
        location = answer.headers.get("Location")
        elsewhere = answer.status in REDIRECTS and location is not None
        if not elsewhere:
            _check_status(answer.status, wait)
        seen.opt_out = forbidding(answer.headers, self.config.opt_out, self.agents) or "allowed"
        if seen.opt_out != "allowed":
            raise _Failed("opted out")
        if elsewhere:
            return moved(parts, str(location))
        self._check_type(answer.headers, seen)
        return self._read(answer)

    def _check_type(self, headers: Message, seen: _Seen) -> None:
        seen.content_type = (
            (headers.get("Content-Type") or "").partition(";")[0].strip().lower()[:100]
        )
        if seen.content_type not in self.config.content_types:
            raise _Failed("content type")
        if (headers.get("Content-Encoding") or "identity").strip().lower() != "identity":
            raise _Failed("content encoding")

    def _read(self, answer: http.client.HTTPResponse) -> bytes:
        announced = answer.length
        if announced is not None and announced > self.config.max_bytes:
            raise _Failed("too many bytes")
        body = bytearray()
        try:
            while piece := answer.read(CHUNK):
                body += piece
                if len(body) > self.config.max_bytes:
                    raise _Failed("too many bytes")
        except http.client.IncompleteRead:
            raise _Failed("truncated", again=True) from None
        if announced is not None and len(body) < announced:
            raise _Failed("truncated", again=True)
        return bytes(body)


def _check_status(status: int, wait: float) -> None:
    match status:
        case 200:
            return
        case 403:
            raise _Failed("403")
        case 404:
            raise _Failed("404")
        case 410:
            raise _Failed("410")
    raise _Failed("http error", again=status in AGAIN, wait=wait)
