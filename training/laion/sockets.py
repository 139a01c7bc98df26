"""Sockets on which every wait has an end."""

from __future__ import annotations

import io
import socket
import time
from typing import Any


def left(deadline: float, most: float) -> float:
    """Seconds to wait now. Raises TimeoutError when there are none left."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return min(left, most)


class _Pieces(io.RawIOBase):
    """What arrives, each piece in its time and all before the deadline."""

    def __init__(self, connection: socket.socket, deadline: float, timeout: float) -> None:
        self._connection, self._deadline, self._timeout = connection, deadline, timeout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(left(self._deadline, self._timeout))
        return self._connection.recv_into(buffer)


class Timed:
    """As much of a socket as http.client uses; closed by whoever opened it."""

    def __init__(self, connection: socket.socket, deadline: float, timeout: float) -> None:
        self._connection, self._deadline, self._timeout = connection, deadline, timeout

    def sendall(self, data: bytes) -> None:
        self._connection.settimeout(left(self._deadline, self._timeout))
        self._connection.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Pieces(self._connection, self._deadline, self._timeout))

    def close(self) -> None:
        pass
