"""Where datagrams go after UDP ASSOCIATE: what the proxy says is often wrong, so what it is must be judged."""

import socket
from typing import Final

from workers.public import is_public
from workers.socks.wire import Host

AUTO: Final = "auto"
PEER: Final = "peer"
AS_TOLD: Final = "as-told"


def relay_address(setting: str, bound: tuple[Host, int], peer: bytes) -> tuple[bytes, int]:
    """Return the packed address and port to which the datagrams of an association are sent.

    `bound` is BND.ADDR and BND.PORT, `peer` the proxy's end of the control connection, `setting` the key udp-address.
    The port is always BND.PORT. The address: some servers say 0.0.0.0, a name, an address of the other IP version
    or one of a network that nobody here can reach; then the peer's is right (seen in servers of every kind).
    """
    host, port = bound
    if setting == PEER:
        return peer, port
    if setting not in (AUTO, AS_TOLD):
        family = socket.AF_INET6 if ":" in setting else socket.AF_INET
        return socket.inet_pton(family, setting), port
    if isinstance(host, str) or not any(host):
        return peer, port
    if len(host) == 16 and host.startswith(bytes(10) + b"\xff\xff"):
        host = host[12:]  # gost ≥ 2.11.5 says ::ffff:a.b.c.d over IPv4
    if setting == AS_TOLD:
        return host, port
    usable = len(host) == len(peer) and (is_public(host) or _is_near(host, peer))
    return (host if usable else peer), port


def _is_near(address: bytes, peer: bytes) -> bool:
    """Say whether an address that is not public is of the proxy's own network: who reaches one reaches both.

    "Both are private" is not enough: what servers advertise without being told is often an inner address of theirs.
    """
    if len(peer) == 4:
        return address[0] == peer[0] == 127 or address[:3] == peer[:3]
    return address[:8] == peer[:8]
