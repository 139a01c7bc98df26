"""Which addresses of the network a picture may be asked of."""

from __future__ import annotations

import socket
from concurrent import futures
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

UNICAST = IPv6Network("2000::/3")
"""All of IPv6 that is given out to the public so far (RFC 4291, IANA's registry)."""
FORBIDDEN = (IPv4Network("192.0.0.0/24"), IPv4Network("168.63.129.16/32"))
"""IETF protocol assignments, where Oracle's cloud keeps its metadata, too, and which Python counts
as global in part; Azure's WireServer."""
NAT64 = IPv6Network("64:ff9b::/96")
"""IPv4 addresses as networks without IPv4 write them (RFC 6052)."""


def is_public(address: str) -> bool:
    """Whether anybody's machine may have this address: global, of one machine, and no disguise.

    An IPv4 address inside an IPv6 one (mapped, 6to4, Teredo, NAT64) is judged itself. Raises
    ValueError where it is no address.
    """
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        inner = _inside(ip)
        if not inner:
            return ip in UNICAST and ip.is_global
        return all(is_public(str(one)) for one in inner)
    forbidden = any(ip in network for network in FORBIDDEN)
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or forbidden)


def _inside(ip: IPv6Address) -> list[IPv4Address]:
    if ip.teredo is not None:
        return list(ip.teredo)
    if ip in NAT64:
        return [IPv4Address(int(ip) & 0xFFFFFFFF)]
    return [one for one in (ip.ipv4_mapped, ip.sixtofour) if one is not None]


class Resolver:
    """Addresses of host names, looked up by the system with a limit on its time."""

    def __init__(self, threads: int) -> None:
        self._pool = futures.ThreadPoolExecutor(threads, thread_name_prefix="resolver")

    def __call__(self, host: str, port: int, seconds: float) -> list[str]:
        """Raises OSError where there are none, TimeoutError after `seconds`."""
        lookup = self._pool.submit(
            socket.getaddrinfo, host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )
        try:
            found = lookup.result(timeout=seconds)
        except futures.TimeoutError:  # TimeoutError itself from Python 3.11 on
            lookup.cancel()
            raise TimeoutError from None
        return list(dict.fromkeys(str(address[0]) for *_, address in found))

    def close(self) -> None:
        """Without waiting for lookups that hang."""
        self._pool.shutdown(wait=False, cancel_futures=True)
