"""A web server on this machine that answers as it is told, also as servers should not."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

Route = Callable[[BaseHTTPRequestHandler], None]


@dataclass(frozen=True)
class Request:
    path: str
    headers: dict[str, str]


class Web:
    """Routes by path, 404 elsewhere; every request is noted."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.routes: dict[str, Route] = {}
        self.requests: list[Request] = []
        self.closing = threading.Event()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.requests.append(Request(self.path, dict(self.headers.items())))
                route = web.routes.get(self.path)
                try:
                    if route is None:
                        self.send_error(404)
                    else:
                        route(self)
                except OSError:  # whoever asked has heard enough
                    pass

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *arguments: object) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        """serve_forever looks only now and then whether it is to end; this waits for nothing."""
        while not self.closing.is_set():
            try:
                self.server.process_request(*self.server.socket.accept())
            except OSError:  # of TLS as well
                pass

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server.server_address[1]}"

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def count(self, path: str) -> int:
        return sum(request.path == path for request in self.requests)

    def add(
        self,
        path: str,
        body: bytes = b"",
        status: int = 200,
        headers: tuple[tuple[str, str], ...] = (("Content-Type", "image/jpeg"),),
        length: int | None = None,
    ) -> str:
        """A plain answer, which may lie about its length; gives its URL."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            for name, value in headers:
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(body) if length is None else length))
            handler.end_headers()
            handler.wfile.write(body)

        return self.route(path, answer)

    def redirect(self, path: str, location: str, status: int = 302) -> str:
        return self.add(path, status=status, headers=(("Location", location),))

    def route(self, path: str, route: Route) -> str:
        self.routes[path] = route
        return self.url(path)

    def endless(self, path: str, piece: bytes, seconds: float = 0.0) -> str:
        """A body without an end, a piece at a time."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.send_header("Content-Type", "image/jpeg")
            handler.end_headers()
            while not self.closing.wait(seconds):
                handler.wfile.write(piece)

        return self.route(path, answer)

    def silent(self, path: str) -> str:
        """No answer at all."""
        return self.route(path, lambda handler: self.closing.wait(60) and None)

    def close(self) -> None:
        self.closing.set()
        self.server.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    yield server
    server.close()
