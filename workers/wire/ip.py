"""IP headers of frames: where the transport header stands, or why the packet is dropped.

The usual IPv4 header without options is parsed in line by the worker (`HEADER4`); `locate` knows all others.
"""

from mmap import mmap
from struct import Struct
from typing import Final

from workers.wire import vnet
from workers.wire.checksum import verify

ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
ICMPV6: Final = 58

#: from the virtio_net_hdr on: its flags, then version and IHL, total length, fragment field, protocol
HEADER4: Final = Struct(">B9xBxH2xHxB")
IS_FRAGMENT: Final = 0x3FFF  #: of the fragment field: more fragments, or an offset

# Extension headers of IPv6 that may stand before the transport header (RFC 8200, 4).
_HOP_BY_HOP: Final = 0
_ROUTING: Final = 43
_FRAGMENT: Final = 44
_DESTINATION: Final = 60
_MAX_EXTENSIONS: Final = 8

# Reasons to drop a packet, in the place of a protocol number.
MALFORMED: Final = -1
FRAGMENT: Final = -2
BAD_CHECKSUM: Final = -3


def locate(rx: mmap | bytes, at: int, length: int) -> tuple[int, int, int, int]:
    """Return (protocol or reason, address of the transport header, address behind the packet, version).

    `at` is the address of the frame, `length` what the device read, the virtio_net_hdr included.
    """
    version = rx[at + vnet.SIZE] >> 4
    if version == 4:
        return _locate4(rx, at, length)
    if version == 6:
        return _locate6(rx, at, length)
    return MALFORMED, 0, 0, version


def _locate4(rx: mmap | bytes, at: int, length: int) -> tuple[int, int, int, int]:
    if length < vnet.SIZE + 20:
        return MALFORMED, 0, 0, 4
    flags, first, total, fragment, protocol = HEADER4.unpack_from(rx, at)
    header = (first & 0x0F) * 4
    transport = at + vnet.SIZE + header
    end = at + vnet.SIZE + total
    if header < 20 or total < header or total > length - vnet.SIZE:
        return MALFORMED, 0, 0, 4
    if not flags & vnet.TRUSTED and not verify(rx[at + vnet.SIZE : transport]):
        return BAD_CHECKSUM, 0, 0, 4
    if fragment & IS_FRAGMENT:
        return FRAGMENT, 0, 0, 4
    return protocol, transport, end, 4


def _locate6(rx: mmap | bytes, at: int, length: int) -> tuple[int, int, int, int]:
    if length < vnet.SIZE + 40:
        return MALFORMED, 0, 0, 6
    ip = at + vnet.SIZE
    end = ip + 40 + (rx[ip + 4] << 8 | rx[ip + 5])
    if end > at + length:
        return MALFORMED, 0, 0, 6
    protocol, transport = upper_layer(rx, rx[ip + 6], ip + 40, end)
    if protocol == MALFORMED:
        return MALFORMED, 0, 0, 6
    return protocol, transport, end, 6


def upper_layer(rx: mmap | bytes, following: int, transport: int, end: int) -> tuple[int, int]:
    """Go through the extension headers of IPv6 that begin at `transport` with a header of the kind `following`.

    Return (protocol or reason, address of the transport header); with FRAGMENT, that of the fragment header.
    """
    for _ in range(_MAX_EXTENSIONS):
        if following in (TCP, UDP, ICMPV6):
            return following, transport
        if following == _FRAGMENT:
            return FRAGMENT, transport
        if following not in (_HOP_BY_HOP, _ROUTING, _DESTINATION):
            return following, transport
        if transport + 8 > end:
            return MALFORMED, 0
        following, transport = rx[transport], transport + 8 + rx[transport + 1] * 8
        if transport > end:
            return MALFORMED, 0
    return MALFORMED, 0
