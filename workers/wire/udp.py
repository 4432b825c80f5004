"""The headers in front of a datagram towards the device: virtio_net_hdr, IPv4 or IPv6, UDP.

Flow keys, as they stand in a packet without IP options or extension headers, from the source address on:

    IPv4: source 4, destination 4, source port 2, destination port 2        IPv6: 16, 16, 2, 2
"""

from struct import Struct
from typing import Final

from workers.wire.checksum import checksum, ones_sum
from workers.wire.vnet import GSO_UDP_L4, NEEDS_CSUM

UDP: Final = 17
HEADER_SIZE: Final = 8  #: octets of the UDP header
IPV4_OVERHEAD: Final = 28  #: octets of IPv4 and UDP header, as a path MTU counts them
IPV6_OVERHEAD: Final = 48
MAX_PACKET: Final = 65535  #: octets of an IP packet; for IPv6 (whose length field leaves out 40) we keep to it as well
TTL: Final = 64  # Linux: net.ipv4.ip_default_ttl

_IPV4: Final = Struct(">BBHHHBBH")
_IPV6: Final = Struct(">IHBB")
_UDP: Final = Struct(">HHHH")
_VNET: Final = Struct("<BBHHHH")
_LENGTH_AND_SUM: Final = Struct(">HH")
_DONT_FRAGMENT: Final = 0x4000


class DatagramHeaders:
    """Write the headers of datagrams from one source to one destination; nothing but lengths changes between them.

    The UDP checksum is left to the device: the field holds the pseudo-header's sum. The identification of IPv4 is 0
    with "don't fragment" set, an atomic datagram of RFC 6864.
    """

    __slots__ = (
        "_addresses",
        "_ip_sum",
        "_ports",
        "_udp_sum",
        "_version",
        "header",
        "key",
        "length",
        "longest",
        "max_payload",
        "size",
    )

    def __init__(
        self, source: bytes, source_port: int, destination: bytes, destination_port: int, mtu: int, key: object = None
    ) -> None:
        """Take packed addresses of one family; `mtu` is the device's. `key` is the caller's, to know the headers by."""
        self._addresses = source + destination
        self._ports = source_port.to_bytes(2, "big") + destination_port.to_bytes(2, "big")
        self.key = key
        self._udp_sum: int = ones_sum(self._addresses) + UDP
        self._ip_sum: int = 0  #: of an IPv4 header whose length and checksum are 0
        if len(source) == 4:
            self._version = 4
            self.length = 10 + IPV4_OVERHEAD  #: octets of all three headers
            self._ip_sum = ones_sum(_IPV4.pack(0x45, 0, 0, 0, _DONT_FRAGMENT, TTL, UDP, 0) + self._addresses)
        else:
            self._version = 6
            self.length = 10 + IPV6_OVERHEAD
        self.max_payload = mtu - self.length + 10  #: octets that fit a packet of the device; beyond, fragments
        #: octets that the length fields can say: of the IP packet, or of what is behind the IPv6 header
        self.longest = 65535 - (IPV4_OVERHEAD if self._version == 4 else HEADER_SIZE)
        self.size = -1  #: payload octets that `header` is for
        self.header = b""  #: of a packet with `size` octets, as of(size) returned it last

    def of(self, size: int) -> bytes:
        """Return the headers of one datagram with `size` octets of payload, which are remembered."""
        self.header = self._build(_VNET.pack(NEEDS_CSUM, 0, self.length - 10, 0, self.length - 18, 6), size)
        self.size = size
        return self.header

    def of_many(self, size: int, total: int) -> bytes:
        """Return the headers of a super-frame (USO) of `total` octets, to be cut into datagrams of `size`."""
        return self._build(_VNET.pack(NEEDS_CSUM, GSO_UDP_L4, self.length - 10, size, self.length - 18, 6), total)

    def of_fragmented(self, payload: bytes | memoryview) -> tuple[bytes, bytes]:
        """Return the IP header of a datagram that will be cut, and its UDP header with the checksum of the whole."""
        length = len(payload) + 8
        # A checksum of 0 would say "none": checksum() never gives it (RFC 768).
        field = checksum(payload, self._udp_sum + length + ones_sum(self._ports) + length)
        udp = self._ports + _LENGTH_AND_SUM.pack(length, field)
        if self._version == 6:
            return _IPV6.pack(6 << 28, length, UDP, TTL) + self._addresses, udp
        return _IPV4.pack(0x45, 0, length + 20, 0, 0, TTL, UDP, 0) + self._addresses, udp

    def _build(self, vnet: bytes, payload: int) -> bytes:
        length = payload + 8
        udp_sum = (self._udp_sum + length) % 65535 or 65535  # a field of 0 would say "no checksum"
        udp = self._ports + _LENGTH_AND_SUM.pack(length, udp_sum)
        if self._version == 6:
            return vnet + _IPV6.pack(6 << 28, length, UDP, TTL) + self._addresses + udp
        total = length + 20
        ip_sum = 65535 - (self._ip_sum + total) % 65535
        return vnet + _IPV4.pack(0x45, 0, total, 0, _DONT_FRAGMENT, TTL, UDP, ip_sum) + self._addresses + udp


def split_key(key: bytes) -> tuple[bytes, int, bytes, int]:
    """Return source, source port, destination and destination port of a flow key."""
    size = 4 if len(key) == 12 else 16
    ports = key[2 * size :]
    return (
        key[:size],
        int.from_bytes(ports[:2], "big"),
        key[size : 2 * size],
        int.from_bytes(ports[2:], "big"),
    )


def packet_of(key: bytes, payload: bytes) -> bytes:
    """Return a packet of this flow, as an ICMP error quotes it: what identifies the client's socket is right."""
    length = 8 + len(payload)
    if len(key) == 12:
        ip = _IPV4.pack(0x45, 0, 20 + length, 0, _DONT_FRAGMENT, TTL, UDP, 0) + key[:8]
        ip = ip[:10] + (65535 - ones_sum(ip)).to_bytes(2, "big") + ip[12:]
    else:
        ip = _IPV6.pack(6 << 28, length, UDP, TTL) + key[:32]
    return ip + key[-4:] + _LENGTH_AND_SUM.pack(length, 0) + payload
