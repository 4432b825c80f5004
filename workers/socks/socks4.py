"""The client's side of SOCKS4 and SOCKS4a, without I/O (Lee, "SOCKS: A protocol for TCP proxy across firewalls").

    04 CMD port address user 00            address 0.0.0.x: SOCKS4a, the target's name and 00 follow
    00 CODE port address                   CODE 5A: granted

It knows CONNECT and BIND for IPv4; 4a names, an IPv6 address among them as text (OpenSSH takes it; v2ray 4.34 says
success and ends).
"""

import socket
from typing import Final

from workers.socks.handshake import Handshake, Refused
from workers.socks.wire import (
    ADDRESS_TYPE_NOT_SUPPORTED,
    COMMAND_NOT_SUPPORTED,
    CONNECT,
    GENERAL_FAILURE,
    NETWORK_UNREACHABLE,
    NOT_ALLOWED,
    Host,
    ProtocolError,
)

GRANTED: Final = 0x5A
#: CODE → REP: 5B rejected or failed, 5C no identd to ask, 5D identd names somebody else
_REPLIES: Final = {0x5B: GENERAL_FAILURE, 0x5C: NOT_ALLOWED, 0x5D: NOT_ALLOWED}
_REPLY_LENGTH: Final = 8
MAX_FIELD: Final = 255  # octets of user and name; the protocol has no limit, servers do
_NAME_FOLLOWS: Final = b"\0\0\0\1"


def socks4_handshake(command: int, host: Host, port: int, user: str = "", names: bool = False) -> Handshake:
    """Ask for a connection; `names`: the proxy speaks 4a. What the protocol cannot say is refused at once."""
    if command != CONNECT:
        return Refused(COMMAND_NOT_SUPPORTED)
    name = b""
    if isinstance(host, str):
        name = host.encode("utf-8", "surrogateescape")
    elif len(host) == 16:
        name = socket.inet_ntop(socket.AF_INET6, host).encode()
    elif host[:3] == bytes(3) and host[3]:  # it would mean "a name follows"
        name = socket.inet_ntop(socket.AF_INET, host).encode()
    if name and not names:
        return Refused(ADDRESS_TYPE_NOT_SUPPORTED if isinstance(host, str) else NETWORK_UNREACHABLE)
    if b"\0" in name or len(name) > MAX_FIELD:
        return Refused(ADDRESS_TYPE_NOT_SUPPORTED)
    return Socks4Handshake(command, _NAME_FOLLOWS if name else bytes(host), port, user, name)  # type: ignore[arg-type]


class Socks4Handshake:
    """One request; see workers.socks.handshake.Handshake."""

    __slots__ = ("_held", "bound", "done", "first_bytes", "reply", "surplus")

    requested: bool = True

    def __init__(self, command: int, address: bytes, port: int, user: str, name: bytes) -> None:
        """`name` goes behind, if there is one. ValueError: the user id has a zero or more than 255 octets."""
        identity = user.encode("utf-8", "surrogateescape")
        if len(identity) > MAX_FIELD or b"\0" in identity:
            raise ValueError(f"user id of {len(identity)} octets: allowed are at most {MAX_FIELD}, none of them zero")
        self.first_bytes = b"\x04" + command.to_bytes() + port.to_bytes(2) + address + identity + b"\0"
        if name:
            self.first_bytes += name + b"\0"
        self._held = b""
        self.done = False
        self.reply = -1
        self.bound: tuple[Host, int] | None = None
        self.surplus = b""

    def receive(self, data: bytes) -> bytes:
        """Take the answer, in any pieces; there is never anything more to send."""
        if self.done:
            if self.bound is not None:
                self.surplus += data
            return b""
        data = self._held + data
        # The first octet is 0; some servers repeat the 4.
        if data and data[0] not in (0, 4):
            raise ProtocolError("socks-version", f"the proxy answers with version {data[0]}, not 0: no SOCKS4 proxy")
        if len(data) >= 2 and data[1] != GRANTED:
            self.done = True
            self.reply = _REPLIES.get(data[1], GENERAL_FAILURE)
        elif len(data) >= _REPLY_LENGTH:
            self.done = True
            self.reply = 0
            self.bound = bytes(data[4:8]), data[2] << 8 | data[3]
            self.surplus = bytes(data[_REPLY_LENGTH:])
        else:
            self._held = bytes(data)
        return b""
