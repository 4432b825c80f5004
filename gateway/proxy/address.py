"""Socket addresses as the SOCKS wire wants them."""

import socket
from typing import Final, TypeAlias

from workers.socks.wire import write_address

SocketAddress: TypeAlias = tuple[str, int] | tuple[str, int, int, int]

_MAPPED: Final = "::ffff:"


def family_of(host: str) -> int:
    """Return the family of a numeric address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def unmapped(address: SocketAddress) -> SocketAddress:
    """Return the IPv4 address within an IPv4-mapped one: what a dual-stack listener calls an IPv4 client."""
    host = address[0]
    if host.startswith(_MAPPED) and "." in host:
        return host.removeprefix(_MAPPED), address[1]
    return address


def with_port(address: SocketAddress, port: int) -> SocketAddress:
    """Return the address with another port; its scope stays."""
    return (address[0], port, *address[2:])


def write_socket_address(address: SocketAddress) -> bytes:
    """Return ATYP, host and port; the scope is lost, the wire has none."""
    host = address[0].partition("%")[0]
    return write_address(socket.inet_pton(family_of(host), host), address[1])
