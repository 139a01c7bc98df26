"""Serves what benchmarks.corpus.make wrote, well-behaved addresses and others.

    python -m benchmarks.corpus.serve --output runs/sprites/corpus
    python -m benchmarks.corpus.serve --output runs/sprites/corpus -- COMMAND ...

With a command, serves while it runs, and exits as it does.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.corpus.behaviour import BEHAVIOURS, picture, status
from benchmarks.corpus.make import SERVER
from latentdiff.errors import InputError, run_command


class Server(ThreadingHTTPServer):
    """Only paths of the corpus exist; what a request says is never opened as a file."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, corpus: Path, address: tuple[str, int]) -> None:
        rows = pq.read_table(corpus / "truth.parquet").to_pylist()
        self.pages = {row["path"]: row for row in rows if row["path"]}
        self.pictures = corpus / "pictures"
        self.tried: set[str] = set()
        super().__init__(address, Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away in the middle are what this is for."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.close_connection = True
        page = self.server.pages.get(self.path.removeprefix("/moved"))
        if page is None:
            status(404)(self, Path())
            return
        behaviour = BEHAVIOURS.get(page["behaviour"])
        answer = picture if behaviour is None else behaviour.answer
        answer(self, self.server.pictures / page["file"])

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


def address(server: str) -> tuple[str, int]:
    host, _, port = server.rpartition(":")
    return host, int(port)


@contextlib.contextmanager
def served(corpus: Path, server: str) -> Iterator[Server]:
    """The corpus on host:port while the block lasts."""
    with Server(corpus, address(server)) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="what make wrote")
    parser.add_argument("--server", default=SERVER, help="host:port")
    parser.add_argument("command", nargs="*", help="what to run meanwhile, after --")
    options = parser.parse_args()
    if not (options.output / "truth.parquet").is_file():
        raise InputError(f"There is no corpus in {options.output}; make it first.")
    print(f"serving {options.output} at http://{options.server}", flush=True)
    with served(options.output, options.server), contextlib.suppress(KeyboardInterrupt):
        if options.command:
            sys.exit(subprocess.run(options.command).returncode)
        threading.Event().wait()


if __name__ == "__main__":
    run_command(main)
