"""What the server answers to a request: REP and an address."""

import errno
from typing import Final

from gateway.proxy.address import SocketAddress, write_socket_address
from workers.socks.wire import (
    ADDRESS_TYPE_NOT_SUPPORTED,
    CONNECTION_REFUSED,
    GENERAL_FAILURE,
    HOST_UNREACHABLE,
    NETWORK_UNREACHABLE,
    NOT_ALLOWED,
    TTL_EXPIRED,
    VERSION,
)

_REPLY_FOR: Final = {
    errno.ECONNREFUSED: CONNECTION_REFUSED,
    errno.ENETUNREACH: NETWORK_UNREACHABLE,
    errno.ENETDOWN: NETWORK_UNREACHABLE,
    errno.EHOSTUNREACH: HOST_UNREACHABLE,
    errno.EHOSTDOWN: HOST_UNREACHABLE,
    errno.ETIMEDOUT: TTL_EXPIRED,
    errno.EACCES: NOT_ALLOWED,  # a firewall's rule, or a broadcast address
    errno.EPERM: NOT_ALLOWED,
    errno.EAFNOSUPPORT: ADDRESS_TYPE_NOT_SUPPORTED,
}


def reply_for(number: int | None) -> int:
    """Return the REP code for an errno."""
    return _REPLY_FOR.get(number or 0, GENERAL_FAILURE)


def write_reply(reply: int, address: SocketAddress) -> bytes:
    """Return a reply with an address as sockets have it."""
    return bytes((VERSION, reply, 0)) + write_socket_address(address)


def refusal(reply: int) -> bytes:
    """Return a reply that refuses, with zeros for the address."""
    return bytes((VERSION, reply, 0, 1, 0, 0, 0, 0, 0, 0))
