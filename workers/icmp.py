"""ICMP and ICMPv6: answers to pings of our own addresses, and the errors that a host or router would send.

| code  | ICMP (RFC 792, 1812)                | ICMPv6 (RFC 4443)                 |
| ----- | ----------------------------------- | --------------------------------- |
| NET   | 3/0 net unreachable                 | 1/0 no route to destination       |
| HOST  | 3/1 host unreachable                | 1/3 address unreachable           |
| PORT  | 3/3 port unreachable                | 1/4 port unreachable              |
| ADMIN | 3/13 administratively prohibited    | 1/1 administratively prohibited   |
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Final

from dpkt.icmp import ICMP
from dpkt.icmp6 import ICMP6
from dpkt.ip import IP, IP_PROTO_ICMP, IP_PROTO_ICMP6
from dpkt.ip6 import IP6

from ipc.layout import SMALL_PAYLOAD
from workers import counts
from workers.fragmenting import Fragmenting
from workers.icmperrors import TYPES4, TYPES6
from workers.wire.checksum import checksum, pseudo_sum, verify
from workers.wire.vnet import SIZE as VNET
from workers.wire.vnet import TRUSTED

if TYPE_CHECKING:
    from workers.worker import Worker

NET: Final = 0
HOST: Final = 1
PORT: Final = 2
ADMIN: Final = 3

_CODES4: Final = (0, 1, 3, 13)  # of type 3, by the codes above
_CODES6: Final = (0, 3, 4, 1)  # of type 1
_UNREACHABLE4: Final = 3
_UNREACHABLE6: Final = 1
_ECHO4: Final = 8
_ECHO6: Final = 128
_ECHO_REPLY6: Final = 129

MAX_ERROR4: Final = 576  # octets; RFC 1812, 4.3.2.3
MAX_ERROR6: Final = 1280  # octets; RFC 4443, 2.4 (c): the IPv6 minimum MTU
ERRORS_PER_SECOND: Final = 1000  # Linux: net.ipv4.icmp_msgs_per_sec, for the whole host
ERRORS_BURST: Final = 50  # Linux: net.ipv4.icmp_msgs_burst
TTL: Final = 64  # Linux: net.ipv4.ip_default_ttl

_FRAGMENT_HEADER: Final = 44
_EXTENSIONS: Final = frozenset(
    (0, 43, 60, 135)
)  # hop-by-hop, routing, destination options, mobility: length in octet 1
_NO_OFFLOAD: Final = bytes(VNET)


class Icmp:
    """The ICMP of one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._port = worker.port
        self._count = worker.count
        self._mtu = worker.settings.mtu
        self._fragmenting = Fragmenting(worker.port, self._mtu, worker.count)
        self._own4 = worker.settings.own_address4
        self._own6 = worker.settings.own_address6
        self._tokens: float = ERRORS_BURST
        self._filled_at = 0.0

    # ── from the device ─────────────────────────────────────────────────────────────────────────────────────────

    def frame_arrives(self, at: int, transport: int, end: int, version: int, now: float) -> None:
        """Answer an echo request to one of our own addresses, and hand on an error; count anything else.

        `at` is where the frame begins, `transport` the ICMP header, `end` the end of the packet, in the RX memory.
        """
        rx = self._port.rx
        if end - transport < 8:
            self._count[counts.MALFORMED] += 1
            return
        if version == 4:
            source, destination = rx[at + 22 : at + 26], rx[at + 26 : at + 30]
            initial = 0
        else:
            source, destination = rx[at + 18 : at + 34], rx[at + 34 : at + 50]
            initial = pseudo_sum(source, destination, IP_PROTO_ICMP6, end - transport)
        message = rx[transport:end]
        if not rx[at] & TRUSTED and not verify(message, initial):
            self._count[counts.BAD_CHECKSUM] += 1
            return
        if message[0] in (TYPES4 if version == 4 else TYPES6):
            self._worker.tcp.icmp_errors.arrives(message, destination, version, now)
            return
        own, echo = (self._own4, _ECHO4) if version == 4 else (self._own6, _ECHO6)
        if message[0] != echo or message[1] or destination != own or not _may_be_answered(source):
            self._count[counts.ICMP_IGNORED] += 1
            return
        if version == 4:
            header = _ip4_header(own, source, end - transport)
            field = checksum(b"\0\0\0\0" + message[4:])
            answer = b"\0\0" + field.to_bytes(2, "big")
        else:
            header = _ip6_header(own, source, end - transport)
            field = checksum(b"\x81\0\0\0" + message[4:], pseudo_sum(own, source, IP_PROTO_ICMP6, end - transport))
            answer = b"\x81\0" + field.to_bytes(2, "big")
        if self._send(header + answer + message[4:]):
            self._count[counts.ICMP_ECHO_REPLIES] += 1

    # ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────

    def unreachable(self, packet: bytes, code: int) -> None:
        """Tell the source of an IP packet that it did not arrive; `code` is NET, HOST, PORT or ADMIN.

        `packet` begins with its IP header and holds at least 8 octets behind it. Nothing is sent about what RFC 1122,
        3.2.2 and RFC 4443, 2.4 (e) exempt, nor more than ERRORS_PER_SECOND (counted).
        """
        if not packet:
            return
        version = packet[0] >> 4
        own = self._own4 if version == 4 else self._own6
        if not own or not (_errors_allowed4(packet) if version == 4 else _errors_allowed6(packet)):
            return
        if not self._take_token():
            self._count[counts.ICMP_ERRORS_LIMITED] += 1
            return
        if version == 4:
            error = ICMP(
                type=_UNREACHABLE4, code=_CODES4[code], data=ICMP.Unreach(data=bytes(packet[: MAX_ERROR4 - 28]))
            )
            # Type of service 6 (internetwork control) as RFC 1812, 4.3.2.5 asks and Linux does.
            about: IP | IP6 = IP(src=own, dst=packet[12:16], tos=0xC0, ttl=TTL, p=IP_PROTO_ICMP, data=error)
        else:
            error = ICMP6(
                type=_UNREACHABLE6, code=_CODES6[code], data=ICMP6.Unreach(data=bytes(packet[: MAX_ERROR6 - 48]))
            )
            about = IP6(src=own, dst=packet[8:24], hlim=TTL, nxt=IP_PROTO_ICMP6, plen=len(error), data=error)
        if self._send(bytes(about)):
            self._count[counts.ICMP_ERRORS_SENT] += 1

    def _take_token(self) -> bool:
        now = monotonic()
        self._tokens = min(ERRORS_BURST, self._tokens + (now - self._filled_at) * ERRORS_PER_SECOND)
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _send(self, packet: bytes) -> bool:
        port = self._port
        length = VNET + len(packet)
        pool = port.small if length <= SMALL_PAYLOAD and len(packet) <= self._mtu else port.large
        try:
            frame = pool.take()
        except IndexError:
            self._count[counts.NO_FRAMES] += 1
            return False
        port.tx[frame : frame + length] = _NO_OFFLOAD + packet
        if len(packet) > self._mtu:
            header = 20 if packet[0] >> 4 == 4 else 40
            self._fragmenting.transmit(packet[:header], frame, frame + VNET + header, frame + length)
        else:
            port.transmit(frame, length)
        return True


def _may_be_answered(source: bytes) -> bool:
    """Say whether an address can be that of one host."""
    if len(source) == 4:
        return source[0] not in (0, 127) and source[0] < 224
    return source[0] != 0xFF and source != bytes(16)


def _errors_allowed4(packet: bytes) -> bool:
    if len(packet) < 28 or packet[16] >= 224 or not _may_be_answered(packet[12:16]):
        return False
    if (packet[6] << 8 | packet[7]) & 0x1FFF:  # not the first fragment
        return False
    at = (packet[0] & 15) * 4
    return not (packet[9] == IP_PROTO_ICMP and (len(packet) <= at or packet[at] in TYPES4))  # RFC 1122, 3.2.2


def _errors_allowed6(packet: bytes) -> bool:
    if len(packet) < 48 or packet[24] == 0xFF or not _may_be_answered(packet[8:24]):
        return False
    protocol, at = packet[6], 40
    while at + 8 <= len(packet):
        if protocol == _FRAGMENT_HEADER:
            if (packet[at + 2] << 8 | packet[at + 3]) & 0xFFF8:
                return False
            protocol, at = packet[at], at + 8
        elif protocol in _EXTENSIONS:
            protocol, at = packet[at], at + 8 * (packet[at + 1] + 1)
        else:
            break
    if at >= len(packet):  # the headers go on behind what we see: it could be an error
        return False
    return not (protocol == IP_PROTO_ICMP6 and packet[at] < 128)


def _ip4_header(source: bytes, destination: bytes, payload: int) -> bytes:
    header = IP(src=source, dst=destination, ttl=TTL, p=IP_PROTO_ICMP, len=20 + payload)
    packed: bytes = header.pack_hdr()
    return packed[:10] + checksum(packed).to_bytes(2, "big") + packed[12:]


def _ip6_header(source: bytes, destination: bytes, payload: int) -> bytes:
    packed: bytes = IP6(src=source, dst=destination, hlim=TTL, nxt=IP_PROTO_ICMP6, plen=payload).pack_hdr()
    return packed
