"""Only what may be asked is asked, and no answer does harm; each failure has its own reason."""

from __future__ import annotations

import datetime
import gzip
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from email.message import Message
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.training.laion.conftest import Web
from training.laion import fetch as module
from training.laion import politeness, sockets
from training.laion.addresses import is_public
from training.laion.fetch import FetchConfig, Fetched, Fetcher
from training.laion.opt_out import forbidding
from training.laion.politeness import Closed, Politeness, shared
from training.laion.urls import moved

BODY = b"\xff\xd8\xff" + bytes(range(256)) * 40
Fetch = Callable[..., Fetched]


TLS = ssl.create_default_context()


@pytest.fixture
def fetch(web: Web, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fetch]:
    """Fetches a URL with options in place of the defaults; the web may be local."""
    made: list[Fetcher] = []
    monkeypatch.setattr(ssl, "create_default_context", lambda: TLS)  # whose making takes long

    def run(url: str, **options: Any) -> Fetched:
        usual = {"timeout": 5, "backoff": 0, "retries": 0, "local_hosts": (web.host,)}
        made.append(Fetcher(FetchConfig(**(usual | options))))
        return made[-1](url)

    yield run
    for one in made:
        one.close()


@pytest.fixture
def no_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("connected")

    monkeypatch.setattr(socket, "create_connection", refuse)


# Answers


def test_a_file_comes_whole_with_what_was_said_of_it(web: Web, fetch: Fetch) -> None:
    url = web.add("/a.jpg", BODY, headers=(("Content-Type", "Image/JPEG; q=1"),))
    assert fetch(url) == Fetched(None, BODY, 200, url, "image/jpeg", "allowed")


def test_what_is_asked(web: Web, fetch: Fetch) -> None:
    url = web.add("/a%20b/%C3%A9.jpg?x=%26&y=%20", BODY)
    agent = "somebody/2 (+https://example.org/crawl)"
    plain = url.replace("%C3%A9", "é").replace("%20", " ")
    assert fetch(f" {plain}#fragment\n", user_agent=agent).body == BODY
    (request,) = web.requests
    assert request.headers == {
        "Host": web.host,
        "User-Agent": agent,
        "Accept": "image/*,*/*;q=0.5",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }


def test_paths_that_begin_with_two_slashes(web: Web, fetch: Fetch) -> None:
    asked: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.requestline)
        handler.send_error(404)

    web.route("/a.jpg", answer)  # as http.server understands it
    fetch(web.url("//a.jpg"))
    fetch(web.url("?b"))
    assert asked == ["GET //a.jpg HTTP/1.1"]
    assert web.requests[-1].path == "/?b"


@pytest.mark.parametrize("agent", ["", " a", "a ", "a\n", "a\r\nX: y", "a\tb", "\xe4", "/", "/2"])
def test_agents_that_are_no_header(agent: str) -> None:
    with pytest.raises(ValidationError, match="user_agent"):
        FetchConfig(user_agent=agent)


@pytest.mark.parametrize("agent", ["a", "a/2", "a (+https://example.org/crawl)"])
def test_agents(agent: str) -> None:
    assert FetchConfig(user_agent=agent).user_agent == agent


@pytest.mark.parametrize(
    ("status", "reason"),
    [(403, "403"), (404, "404"), (410, "410")]
    + [(status, "http error") for status in (204, 206, 300, 304, 400, 401, 418, 429, 500, 503)],
)
def test_statuses(web: Web, fetch: Fetch, status: int, reason: str) -> None:
    found = fetch(web.add("/a.jpg", BODY, status))
    assert (found.reason, found.http_status, found.body) == (reason, status, b"")
    assert web.count("/a.jpg") == 1


@pytest.mark.parametrize("said", ["text/html", "image/svg+xml", "image/tiff", "application/zip"])
def test_other_types_are_not_read(web: Web, fetch: Fetch, said: str) -> None:
    found = fetch(web.add("/a.jpg", BODY, headers=(("Content-Type", said),)))
    assert (found.reason, found.content_type) == ("content type", said)


def test_nothing_said_of_the_type_is_no_objection(web: Web, fetch: Fetch) -> None:
    assert fetch(web.add("/a.jpg", BODY, headers=())).body == BODY


def test_nothing_compressed_is_read(web: Web, fetch: Fetch) -> None:
    bomb = gzip.compress(bytes(32 << 20))
    headers = (("Content-Type", "image/png"), ("Content-Encoding", "gzip"))
    assert fetch(web.add("/a.png", bomb, headers=headers)).reason == "content encoding"


@pytest.mark.parametrize("length", [10**9, 10**30])
def test_too_much_announced(web: Web, fetch: Fetch, length: int) -> None:
    assert fetch(web.add("/a.jpg", BODY, length=length)).reason == "too many bytes"


def test_endless_bodies(web: Web, fetch: Fetch) -> None:
    url = web.endless("/a.jpg", b"x" * 65536)
    assert fetch(url, max_bytes=1 << 20).reason == "too many bytes"


def test_the_limit_itself_is_allowed(web: Web, fetch: Fetch) -> None:
    url = web.add("/a.jpg", BODY)
    assert fetch(url, max_bytes=len(BODY)).body == BODY
    assert fetch(url, max_bytes=len(BODY) - 1).reason == "too many bytes"


def chunks(handler: BaseHTTPRequestHandler, *pieces: bytes) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for piece in pieces:
        handler.wfile.write(piece)


def test_chunks(web: Web, fetch: Fetch) -> None:
    whole = (b"3\r\nabc\r\n", b"2\r\nde\r\n", b"0\r\n\r\n")
    assert fetch(web.route("/whole", lambda h: chunks(h, *whole))).body == b"abcde"
    assert fetch(web.route("/broken", lambda h: chunks(h, *whole[:2]))).reason == "truncated"
    huge = web.route("/huge", lambda h: chunks(h, *[b"10000\r\n" + bytes(65536) + b"\r\n"] * 99))
    assert fetch(huge, max_bytes=1 << 20).reason == "too many bytes"


def test_bodies_shorter_than_announced(web: Web, fetch: Fetch) -> None:
    url = web.add("/a.jpg", BODY, length=len(BODY) + 1)
    assert fetch(url, retries=1).reason == "truncated"
    assert web.count("/a.jpg") == 2


def test_bodies_longer_than_announced_end_where_they_said(web: Web, fetch: Fetch) -> None:
    assert fetch(web.add("/a.jpg", BODY, length=100)).body == BODY[:100]


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\x00\xff\xfe garbage\r\n\r\n",
        b"HTTP/1.1 999999 what\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 1000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ],
)
def test_what_is_no_http(web: Web, fetch: Fetch, said: bytes) -> None:
    url = web.route("/a.jpg", lambda handler: handler.wfile.write(said) and None)
    assert fetch(url).reason in ("http error", "connection")


# Time


def test_silence(web: Web, fetch: Fetch) -> None:
    assert fetch(web.silent("/a.jpg"), timeout=0.3).reason == "timeout"


def test_a_slow_drip_ends_at_the_deadline(web: Web, fetch: Fetch) -> None:
    """Though no piece is late."""
    url = web.endless("/a.jpg", b"x", seconds=0.02)
    assert fetch(url, timeout=5, deadline=0.3).reason == "timeout"


def test_slow_headers_end_at_the_deadline(web: Web, fetch: Fetch) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not web.closing.wait(0.02):
            handler.wfile.write(b"X")

    assert fetch(web.route("/a.jpg", answer), timeout=5, deadline=0.3).reason == "timeout"


def test_a_drip_through_redirects_ends_at_the_deadline(web: Web, fetch: Fetch) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        web.closing.wait(0.1)
        handler.send_response(302)
        handler.send_header("Location", "/a.jpg")
        handler.end_headers()

    url = web.route("/a.jpg", answer)
    assert fetch(url, deadline=0.3, max_redirects=1000).reason == "timeout"


def test_a_deadline_between_redirects_is_no_fault_of_the_name(
    web: Web, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*arguments: Any) -> str:
        time.sleep(0.3)
        return moved(*arguments)

    monkeypatch.setattr(module, "moved", slowly)
    url = web.redirect("/a.jpg", "/b.jpg")
    assert fetch(url, timeout=5, deadline=0.25).reason == "timeout"
    assert web.count("/b.jpg") == 0


def test_names_that_take_too_long(monkeypatch: pytest.MonkeyPatch, fetch: Fetch) -> None:
    asked = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: asked.wait(20))
    assert fetch("http://slow.test/", timeout=0.2).reason == "dns"
    asked.set()


def test_names_that_are_none(
    monkeypatch: pytest.MonkeyPatch, fetch: Fetch, no_connections: None
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert fetch("http://nowhere.test/").reason == "dns"


# Trying again


def test_busy_servers_are_asked_again(web: Web, fetch: Fetch) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        busy = web.count("/a.jpg") < 3
        handler.send_response(503 if busy else 200)
        handler.send_header("Retry-After", "0")
        handler.end_headers()
        handler.wfile.write(b"" if busy else BODY)

    url = web.route("/a.jpg", answer)
    assert fetch(url, retries=1).reason == "http error"
    web.requests.clear()
    assert fetch(url, retries=2).body == BODY


def test_what_will_not_change_is_not_asked_again(web: Web, fetch: Fetch) -> None:
    for path, status in (("/403", 403), ("/404", 404), ("/410", 410), ("/400", 400)):
        fetch(web.add(path, status=status), retries=3)
        assert web.count(path) == 1


@pytest.mark.parametrize("dated", [False, True])
def test_retry_after_is_waited_for(
    web: Web, fetch: Fetch, monkeypatch: pytest.MonkeyPatch, dated: bool
) -> None:
    slept: list[float] = []
    later = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=30)
    said = format_datetime(later, usegmt=True) if dated else "30"
    url = web.add("/a.jpg", status=429, headers=(("Retry-After", said),))
    monotonic = time.monotonic
    own = SimpleNamespace(
        monotonic=lambda: monotonic() + sum(slept), sleep=slept.append, time=time.time
    )
    for one in (politeness, sockets, module):
        monkeypatch.setattr(one, "time", own)
    fetch(url, retries=1, max_retry_after=60)
    assert web.count("/a.jpg") == 2
    assert 20 < sum(slept) <= 30  # of which the first request took a little
    slept.clear()
    fetch(url, retries=1, max_retry_after=10)
    assert web.count("/a.jpg") == 3
    assert not slept


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(web: Web, fetch: Fetch, status: int) -> None:
    end = web.add("/end é.jpg".replace("é", "%E9").replace(" ", "%20"), BODY)
    start = web.redirect("/start", "end é.jpg", status)
    found = fetch(start)
    assert (found.body, found.final_url) == (BODY, end)


def test_five_redirects_and_no_more(web: Web, fetch: Fetch) -> None:
    web.add("/0", BODY)
    for number in range(1, 7):
        web.redirect(f"/{number}", f"/{number - 1}")
    assert fetch(web.url("/5")).body == BODY
    assert fetch(web.url("/6")).reason == "redirects"
    assert fetch(web.redirect("/loop", "/loop")).reason == "redirects"


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://10.1.2.3/", "private address"),
        ("http://169.254.169.254/latest/meta-data/", "private address"),
        ("//[::1]:80/", "private address"),
        ("file:///etc/passwd", "scheme"),
        ("ftp://127.0.0.1/", "scheme"),
        ("http://user:word@example.org/", "bad url"),
        ("http://[::1", "bad url"),
        ("http://exa mple.org/", "bad url"),
    ],
)
def test_redirects_to_what_is_not_asked(web: Web, fetch: Fetch, location: str, reason: str) -> None:
    assert fetch(web.redirect("/a.jpg", location)).reason == reason
    assert len(web.requests) == 1


def test_redirects_to_another_port_of_a_local_host(web: Web, fetch: Fetch) -> None:
    """One server of one's own opens no door to the others."""
    other = Web()
    try:
        url = web.redirect("/a.jpg", other.add("/b.jpg", BODY))
        assert fetch(url).reason == "private address"
        assert not other.requests
    finally:
        other.close()


# Addresses

PUBLIC = ["8.8.8.8", "93.184.216.34", "1.1.1.1", "2606:2800:220:1::1", "2a00:1450:4001::200e"]
PUBLIC += ["::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
NOT_PUBLIC = ["0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.9.9.9"]
NOT_PUBLIC += ["169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1"]
NOT_PUBLIC += ["192.0.0.8", "192.0.0.9", "192.0.0.192", "168.63.129.16", "::ffff:168.63.129.16"]
NOT_PUBLIC += ["192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1"]
NOT_PUBLIC += ["239.1.1.1", "240.0.0.1", "255.255.255.255"]
NOT_PUBLIC += ["::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "fc00::1"]
NOT_PUBLIC += ["fd12:3456::1", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1"]
NOT_PUBLIC += ["2001:db8::1", "64:ff9b::7f00:1", "64:ff9b:1::808:808", "2002:7f00:1::1"]
NOT_PUBLIC += ["2001:0:808:808::f5ff:fffe", "100::1", "5f00::1"]


SPELLINGS = ["localhost", "LOCALHOST", "127.0.0.1", "127.0.0.1.", "127.1", "2130706433"]
SPELLINGS += ["0x7f000001", "0177.0.0.1", "0", "[::1]", "10.0.0.1", "192.168.0.1"]
SPELLINGS += ["169.254.169.254", "[::ffff:127.0.0.1]", "①②⑦.⓪.⓪.①", "255.255.255.255"]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public(address: str) -> None:
    """IANA's special-purpose registries, and addresses at which clouds serve their metadata."""
    assert not is_public(address)


@given(st.ip_addresses(v=4))
def test_a_disguise_changes_nothing(address: ipaddress.IPv4Address) -> None:
    whole = int(address)
    for disguise in (0xFFFF << 32, 0x64FF9B << 96):
        assert is_public(str(ipaddress.IPv6Address(disguise + whole))) == is_public(str(address))
    sixtofour = ipaddress.IPv6Address((0x2002 << 112) + (whole << 80))
    assert is_public(str(sixtofour)) == is_public(str(address))


@pytest.mark.parametrize(
    "host",
    SPELLINGS,
)
def test_nobody_private_is_connected_to(fetch: Fetch, no_connections: None, host: str) -> None:
    assert fetch(f"http://{host}:8080/a.jpg").reason in ("private address", "dns")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "scheme"),
        ("a.jpg", "scheme"),
        ("//example.org/a.jpg", "scheme"),
        ("file:///etc/passwd", "scheme"),
        ("ftp://example.org/a.jpg", "scheme"),
        ("gopher://127.0.0.1:70/_x", "scheme"),
        ("data:image/png;base64,iVBORw0KGgo=", "scheme"),
        ("javascript:alert(1)", "scheme"),
        ("unix:///var/run/docker.sock", "scheme"),
        ("http://", "bad url"),
        ("http:///a.jpg", "bad url"),
        ("http://user@example.org/", "bad url"),
        ("http://example.org:port/", "bad url"),
        ("http://example.org:99999/", "bad url"),
        ("http://[127.0.0.1/", "bad url"),
        ("http://" + "a" * 9000, "bad url"),
        ("http://" + "a" * 64 + ".org/", "dns"),
        ("http://a..b/", "dns"),
        ("http://a\x00b/", "bad url"),
        ("http://[fe80::1%25lo]/", "bad url"),
        ("http://exa mple.org/", "bad url"),
    ],
)
def test_urls_that_nobody_is_asked_for(
    fetch: Fetch, no_connections: None, url: str, reason: str
) -> None:
    found = fetch(url)
    assert found.reason == reason
    assert (found.body, found.http_status, found.opt_out) == (b"", None, None)


@pytest.fixture(scope="module")
def fetcher() -> Fetcher:
    """To whom every name is 127.0.0.1."""
    made = Fetcher(FetchConfig(retries=0))
    made._resolve.close()
    made._resolve = lambda *_: ["127.0.0.1"]  # type: ignore[assignment]
    return made


@given(st.text(max_size=60))
def test_no_text_makes_it_fail(fetcher: Fetcher, text: str) -> None:
    for url in (text, f"http://{text}", f"http://example.org/{text}"):
        assert fetcher(url).reason in ("scheme", "bad url", "private address")


def test_the_address_that_was_judged_is_the_one_connected_to(
    monkeypatch: pytest.MonkeyPatch, fetch: Fetch
) -> None:
    """A name whose second answer is 127.0.0.1 is not asked a second time."""
    answers = iter(["93.184.216.34", "127.0.0.1"])
    asked: list[str] = []
    connected: list[object] = []

    def lookup(host: str, port: int, **_: object) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    def connect(address: object, timeout: float) -> None:
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket, "create_connection", connect)
    assert fetch("http://rebound.test/a.jpg").reason == "connection"
    assert asked == ["rebound.test"]
    assert connected == [("93.184.216.34", 80)]


def test_one_private_address_among_public_ones_is_enough(
    monkeypatch: pytest.MonkeyPatch, fetch: Fetch, no_connections: None
) -> None:
    def lookup(host: str, port: int, **_: object) -> list[Any]:
        return [(2, 1, 6, "", (address, port)) for address in ("93.184.216.34", "10.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert fetch("http://both.test/").reason == "private address"


def test_proxies_of_the_environment_are_not_used(
    web: Web, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Web()
    try:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://{proxy.host}")
        assert fetch(web.add("/a.jpg", BODY)).body == BODY
        assert not proxy.requests
    finally:
        proxy.close()


def certificate(folder: Path) -> Path:
    """Of localhost, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "localhost.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_tls_is_verified(tmp_path: Path) -> None:
    pem = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    web = Web(context)
    web.add("/a.jpg", BODY)
    host = web.host.replace("127.0.0.1", "localhost")
    fetcher = Fetcher(FetchConfig(local_hosts=(host,), retries=0, timeout=5))
    try:
        assert fetcher(f"https://{host}/a.jpg").reason == "connection"
        fetcher._tls.load_verify_locations(pem)
        assert fetcher(f"https://{host}/a.jpg").body == BODY
        assert web.requests[-1].headers["Host"] == host
    finally:
        fetcher.close()
        web.close()


# Opting out


def headers_of(*pairs: tuple[str, str]) -> Message:
    message = Message()
    for name, value in pairs:
        message[name] = value
    return message


DIRECTIVES = FetchConfig().opt_out


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([], ""),
        (["noai"], "noai"),
        (["NoAI , noimageai"], "noai"),
        (["all", "noimageai"], "noimageai"),
        (["nofollow, noindex"], "noindex"),
        (["none"], "noindex"),
        (["index, follow"], ""),
        (["ourname: noai"], "noai"),
        (["OurName: nofollow, noimageindex"], "noimageindex"),
        (["img2dataset: noai"], "noai"),
        (["*: noai"], "noai"),
        (["otherbot: noai, noindex"], ""),
        (["otherbot: noai, ourname: noimageai"], "noimageai"),
        (["noindex, otherbot: nofollow"], "noindex"),
        (["otherbot: nofollow", "noai"], "noai"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], "noai"),
        (["unavailable_after: Sun, 06 Nov 2033 08:49:37 GMT, noai"], "noai"),
        (["unavailable_after: Sunday, 06-Nov-33 08:49:37 GMT, noai"], "noai"),
        (["ourname: unavailable_after: Sun, 06 Nov 2033 08:49:37 GMT, noai"], "noai"),
        (["otherbot: unavailable_after: Sun, 06 Nov 2033 08:49:37 GMT, noai"], ""),
        (["max-image-preview: large, noimageai"], "noimageai"),
        (["noarchive, nosnippet"], ""),
        (["", ",,:,"], ""),
    ],
)
def test_directives(values: list[str], found: str) -> None:
    headers = headers_of(*(("X-Robots-Tag", value) for value in values))
    assert forbidding(headers, DIRECTIVES, ("ourname", "img2dataset")) == found


def test_reservations_of_text_and_data_mining() -> None:
    assert forbidding(headers_of(("TDM-Reservation", " 1 ")), DIRECTIVES, ()) == "tdm-reservation"
    assert forbidding(headers_of(("TDM-Reservation", "0")), DIRECTIVES, ()) == ""


def test_opting_out_is_heard_before_the_picture(web: Web, fetch: Fetch) -> None:
    """Whose body never comes."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "image/jpeg")
        handler.send_header("X-Robots-Tag", "thatsus: noai")
        handler.end_headers()
        web.closing.wait(60)

    url = web.route("/a.jpg", answer)
    found = fetch(url, user_agent="ThatsUs/1.0 (+https://example.org)", timeout=20)
    assert (found.reason, found.opt_out, found.body) == ("opted out", "noai", b"")
    assert fetch(url, user_agent="another", timeout=0.3).opt_out == "allowed"


def test_opting_out_in_a_redirect(web: Web, fetch: Fetch) -> None:
    web.add("/b.jpg", BODY)
    headers = (("Location", "/b.jpg"), ("X-Robots-Tag", "noimageai"))
    assert fetch(web.add("/a.jpg", status=301, headers=headers)).opt_out == "noimageai"
    assert web.count("/b.jpg") == 0


def test_opting_out_can_be_narrowed(web: Web, fetch: Fetch) -> None:
    url = web.add("/a.jpg", BODY, headers=(("X-Robots-Tag", "noindex"),))
    assert fetch(url, opt_out=("noai",)).body == BODY


# Politeness


def test_a_host_has_no_more_connections_than_allowed(web: Web) -> None:
    lock, running, most = threading.Lock(), [0], [0]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        web.closing.wait(0.02)
        with lock:
            running[0] -= 1
        handler.send_response(404)
        handler.end_headers()

    url = web.route("/a.jpg", answer)
    fetcher = Fetcher(FetchConfig(per_host=3, local_hosts=(web.host,)), threads=12)
    threads = [threading.Thread(target=fetcher, args=(url,)) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fetcher.close()
    assert web.count("/a.jpg") == 24
    assert 1 <= most[0] <= 3


def test_requests_to_a_host_keep_their_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(
        politeness, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep)
    )
    polite = Politeness(per_host=2, interval=0.5, max_wait=60, max_busy=9)
    began = []
    for host in ("a", "b", "a", "a", "b"):
        with polite(host):
            began.append((host, clock.now))
    assert began == [("a", 100.0), ("b", 100.0), ("a", 100.5), ("a", 101.0), ("b", 101.0)]
    polite.heard("b", 7)
    with polite("b"):
        assert clock.now == 108.0


def test_a_host_that_asks_for_too_much_is_left_alone(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = web.add("/a.jpg", status=503, headers=(("Retry-After", "3600"),))
    other = web.add("/b.jpg", BODY)
    fetcher = Fetcher(FetchConfig(retries=3, local_hosts=(web.host,)))
    found = [fetcher(busy), fetcher(other), fetcher(busy)]
    assert [one.reason for one in found] == ["http error", "busy", "busy"]
    assert [one.http_status for one in found] == [503, None, None]
    assert len(web.requests) == 1
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 3601)
    monkeypatch.setattr(politeness, "time", later)
    assert fetcher(other).body == BODY
    fetcher.close()


def test_a_host_that_is_always_busy_is_left_alone(web: Web) -> None:
    busy, gone = web.add("/a.jpg", status=429), web.add("/b.jpg", status=404)
    fetcher = Fetcher(FetchConfig(retries=0, max_busy=3, local_hosts=(web.host,)))
    found = [fetcher(url).reason for url in (busy, busy, gone, busy, busy, busy, gone, busy)]
    fetcher.close()
    assert found == [*["http error"] * 2, "404", *["http error"] * 3, "busy", "busy"]


def test_what_was_said_in_an_earlier_try_is_why(web: Web) -> None:
    busy = web.add("/a.jpg", status=429)
    fetcher = Fetcher(FetchConfig(retries=5, backoff=0, max_busy=2, local_hosts=(web.host,)))
    found = fetcher(busy)
    fetcher.close()
    assert (found.reason, found.http_status, len(web.requests)) == ("http error", 429, 2)


def test_those_who_wait_for_a_host_hear_that_it_closed() -> None:
    polite = Politeness(per_host=1, interval=0, max_wait=60, max_busy=9)
    told = threading.Event()

    def ask() -> None:
        try:
            with polite("a"):
                pass
        except Closed:
            told.set()

    with polite("a"):
        thread = threading.Thread(target=ask)
        thread.start()
        polite.heard("a", 3600)
        assert told.wait(20)
    thread.join()
    with polite("b"):
        pass


def test_hosts_are_forgotten_but_those_that_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(politeness, "MANY", 4)
    polite = Politeness(per_host=1, interval=0, max_wait=60, max_busy=9)
    polite.heard("closed", 3600)
    for number in range(100):
        with polite(f"{number}"):
            pass
    assert len(polite._hosts) <= 8
    with pytest.raises(Closed), polite("closed"):
        pass


def test_a_process_has_its_share_of_what_a_machine_asks() -> None:
    one = shared(16, 40, 0.5, 60, 20)
    assert (one.per_host, one.interval) == (2, 8.0)
    assert shared(16, 40, 0.5, 60, 20) is one
    assert shared(16, 4, 0.5, 60, 20).per_host == 1
