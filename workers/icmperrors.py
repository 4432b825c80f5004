"""ICMP errors from the clients' side about TCP segments of ours: "too big" is obeyed, all others are soft (RFC 5461).

    outer IP │ ICMP type, code, MTU │ IP header of our packet │ ports, sequence number, …
                                    └────────── the quote: at least that much (RFC 792, RFC 4443) ──────────

What is learned of the way to a client is kept for some minutes: its next connections need not find out again.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from workers import counts
from workers.relay import Relay
from workers.tcp.pathmtu import is_in_flight
from workers.wire import ip

if TYPE_CHECKING:
    from workers.flows import TcpFlows

TYPES4: Final = frozenset((3, 4, 5, 11, 12))  #: errors of ICMP: unreachable, quench, redirect, time, parameter
TYPES6: Final = frozenset((1, 2, 3, 4))  #: of ICMPv6: unreachable, too big, time, parameter
_TOO_BIG4: Final = (3, 4)
_TOO_BIG6: Final = (2, 0)

MIN_MTU4: Final = 552  # octets; Linux net.ipv4.route.min_pmtu: less is an attack, or a link that fragments
MIN_MTU6: Final = 1280  # RFC 8201, 4: less is never believed
#: RFC 1191, 7.1: MTUs in use, for a router so old that it names none
PLATEAUS: Final = (32000, 17914, 8166, 4352, 2002, 1492, 1006, MIN_MTU4)
LIFETIME: Final = 600.0  # seconds; RFC 1191, 6.3; Linux net.ipv4.route.mtu_expires
MAX_KNOWN: Final = 1024  #: clients whose path MTU one worker remembers; the oldest is forgotten first

_QUOTE4: Final = Struct(">BxH5xB2x4s4s")  #: IHL, total length, protocol, source, destination
_QUOTE6: Final = Struct(">4xHB1x16s16s")  #: payload length, next header, source, destination
_QUOTE_TCP: Final = Struct(">2s2sI")  #: ports, sequence number


class IcmpErrors:
    """What one worker hears and knows of the ways to its clients."""

    def __init__(self, flows: TcpFlows) -> None:
        self._flows = flows
        self._known: dict[bytes, tuple[int, float]] = {}  # client → MSS on the way to it, when that is forgotten

    def arrives(self, message: bytes, destination: bytes, version: int, now: float) -> None:
        """Take an ICMP error whose checksum is right; `destination` is where it was sent to."""
        count = self._flows.count
        quoted = _parse4(message) if version == 4 else _parse6(message)
        if quoted is None or quoted[0] != destination:
            count[counts.ICMP_IGNORED] += 1  # not about TCP, or not about a packet of whom it was sent to
            return
        _, key, seq, length = quoted
        flow = self._flows.table.get(key)
        if not isinstance(flow, Relay) or not is_in_flight(flow.conn, seq):
            count[counts.ICMP_STALE] += 1
            return
        if (message[0], message[1]) != (_TOO_BIG4 if version == 4 else _TOO_BIG6):
            count[counts.ICMP_SOFT_ERRORS] += 1
            return
        if version == 4:
            mtu = message[6] << 8 | message[7]
            if not mtu:
                mtu = next((plateau for plateau in PLATEAUS if plateau < length), MIN_MTU4)
            mtu, headers = max(mtu, MIN_MTU4), 40
        else:
            mtu, headers = max(int.from_bytes(message[4:8], "big"), MIN_MTU6), 60
        if flow.lower_mss(mtu - headers, now):
            count[counts.TCP_PATH_MTU] += 1
            self._learn(key[: 4 if version == 4 else 16], mtu - headers, now)

    def _learn(self, client: bytes, mss: int, now: float) -> None:
        known = self._known
        known.pop(client, None)  # the newest stands last
        if len(known) >= MAX_KNOWN:
            del known[next(iter(known))]
        known[client] = mss, now + LIFETIME

    def mss_towards(self, client: bytes, now: float) -> int:
        """Return what the way to a client is known to take behind the TCP header; a lot while nothing is known."""
        if client not in self._known:
            return 65535
        mss, until = self._known[client]
        if now < until:
            return mss
        del self._known[client]
        return 65535


def _parse4(message: bytes) -> tuple[bytes, bytes, int, int] | None:
    """Return (our address, key of the flow, sequence number, length of the packet) of a quoted segment of ours."""
    if len(message) < 8 + 28:
        return None
    ihl, length, protocol, source, destination = _QUOTE4.unpack_from(message, 8)
    transport = 8 + (ihl & 15) * 4
    if protocol != ip.TCP or len(message) < transport + 8:
        return None
    sport, dport, seq = _QUOTE_TCP.unpack_from(message, transport)
    return source, destination + source + dport + sport, seq, length


def _parse6(message: bytes) -> tuple[bytes, bytes, int, int] | None:
    if len(message) < 8 + 48:
        return None
    length, protocol, source, destination = _QUOTE6.unpack_from(message, 8)
    if protocol != ip.TCP:  # we send no extension headers
        return None
    sport, dport, seq = _QUOTE_TCP.unpack_from(message, 48)
    return source, destination + source + dport + sport, seq, 40 + length
