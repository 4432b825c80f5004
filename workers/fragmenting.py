"""Fragmenting: packets above the device's MTU go to the client as IP fragments.

    small frame: virtio_net_hdr, IP header      large frame:  UDP header │ payload …
                                      │                       └──────────┬┴────────┬──
                                      └─── gathered with ───► a slice ───┘

The payload is not copied: each fragment is headers in a small frame, and a slice of the large one.
"""

from os import urandom
from struct import Struct
from typing import Final

from workers import counts
from workers.port import Port
from workers.wire.checksum import checksum
from workers.wire.fragments import cuts
from workers.wire.vnet import SIZE as VNET

IPV4_HEADER: Final = 20  #: octets; we write no options
IPV6_HEADER: Final = 48  #: octets, with the fragment header
_NO_OFFLOAD: Final = bytes(VNET)
_MORE: Final = 0x2000
_LENGTH_ID_OFFSET: Final = Struct(">HHH")
_FRAGMENT6: Final = Struct(">BxH4s")  # RFC 8200, 4.5
_IPPROTO_FRAGMENT: Final = 44


class Fragmenting:
    """The fragments of one worker, of one protocol: IPv4 counts identifications for each (RFC 6864, 4.3)."""

    def __init__(self, port: Port, mtu: int, count: memoryview) -> None:
        self._port = port
        self._mtu = mtu
        self._count = count
        self._identification = int.from_bytes(urandom(2), "big")

    def transmit(self, header: bytes, frame: int, first: int, tail: int) -> None:
        """Send an IP packet as fragments; the large frame is given up.

        `header` is its IP header without options (lengths and checksum are ours); its payload, with a checksum that is
        right for the whole, stands at tx[first:tail] in the large frame that begins at `frame`.
        """
        port = self._port
        size = tail - first
        version = header[0] >> 4
        self._identification = self._identification + 1 & 0xFFFF
        identification = urandom(4)  # unpredictable, for IPv6: RFC 7739
        offsets = cuts(size, self._mtu, IPV4_HEADER if version == 4 else IPV6_HEADER)
        port.hold(frame)  # until all slices are on their way
        for offset in offsets:
            length = min(offsets.step, size - offset)
            more = offset + length < size
            if version == 4:
                headers = self._header4(header, length, offset >> 3 | (_MORE if more else 0))
            else:
                headers = (
                    header[:4]
                    + (8 + length).to_bytes(2, "big")
                    + bytes((_IPPROTO_FRAGMENT, header[7]))
                    + header[8:40]
                    + _FRAGMENT6.pack(header[6], offset | more, identification)
                )
            try:
                small = port.small.take()
            except IndexError:
                self._count[counts.NO_FRAMES] += 1
                break  # without this one the others are worth nothing
            headers = _NO_OFFLOAD + headers
            port.tx[small : small + len(headers)] = headers
            port.transmit(small, len(headers), True)
            port.transmit(first + offset, length)
        port.unhold(frame)

    def _header4(self, header: bytes, length: int, field: int) -> bytes:
        made = header[:2] + _LENGTH_ID_OFFSET.pack(20 + length, self._identification, field) + header[8:10]
        return made + checksum(made + header[12:20]).to_bytes(2, "big") + header[12:20]
