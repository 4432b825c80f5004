"""Which bucket a frame belongs to: a keyed hash over fields of its 5-tuple, as network cards do it.

| protocol             | fields                                 | why                                              |
| -------------------- | -------------------------------------- | ------------------------------------------------ |
| TCP                  | both addresses, both ports             | one connection, one worker                       |
| UDP                  | source address and port                | one client socket keeps one mapping (RFC 4787)   |
| UDP, address-port    | both addresses, both ports             | the key udp-mapping: all workers for one socket  |
| ICMP echo            | source address and identifier          | the same                                         |
| ICMP error           | the 5-tuple that it quotes, turned     | it belongs to the flow                           |
| anything else        | both addresses                         | it is dropped and counted anyway                 |

A fragment has no bucket: the reader puts packets together first (workers/wire/fragments.py).

`hash(bytes)` is SipHash with a key for each process tree: 50 ns, and nobody outside can aim all flows at one worker.
"""

from mmap import mmap
from struct import Struct
from typing import Final

from workers.wire import ip

BUCKETS: Final = 256
FRAGMENT: Final = -1  #: in place of a bucket: a fragment has no ports, the whole packet has
#: version and IHL, fragment field, protocol, source address, source port (one unpack costs less than two slices)
_USUAL: Final = Struct(">10xB5xHxB2x4s4x2s")
_MASK: Final = BUCKETS - 1
_WITH_PORTS: Final = (ip.TCP, ip.UDP)
_ICMP_ERRORS: Final = frozenset((3, 4, 5, 11, 12))
_ICMPV6_ERRORS: Final = frozenset((1, 2, 3, 4))


def bucket_of(rx: mmap | bytes, at: int) -> int:
    """Return the bucket of a frame, or FRAGMENT; `at` is the address of its virtio_net_hdr."""
    first, fragment, protocol, source, port = _USUAL.unpack_from(rx, at)
    if first == 0x45 and not fragment & ip.IS_FRAGMENT:
        if protocol == ip.TCP:
            return hash(rx[at + 22 : at + 34]) & _MASK
        if protocol == ip.UDP:
            return hash(source + port) & _MASK
    elif first >> 4 == 6:
        protocol = rx[at + 16]
        if protocol == ip.TCP:
            return hash(rx[at + 18 : at + 54]) & _MASK
        if protocol == ip.UDP:
            return hash(rx[at + 18 : at + 34] + rx[at + 50 : at + 52]) & _MASK
    return _bucket_of_other(rx, at)


def bucket_by_destination(rx: mmap | bytes, at: int) -> int:
    """The same for udp-mapping = "address-port": what one client socket sends to two places may lie in two buckets."""
    first, fragment, protocol, _, _ = _USUAL.unpack_from(rx, at)
    if first == 0x45 and not fragment & ip.IS_FRAGMENT and protocol in _WITH_PORTS:
        return hash(rx[at + 22 : at + 34]) & _MASK
    if first >> 4 == 6 and rx[at + 16] in _WITH_PORTS:
        return hash(rx[at + 18 : at + 54]) & _MASK
    return _bucket_of_other(rx, at, True)


def _bucket_of_other(rx: mmap | bytes, at: int, by_destination: bool = False) -> int:
    """The same for packets with options or extension headers, and for ICMP."""
    protocol, transport, _, version = ip.locate(rx, at, 1 << 17)
    if protocol == ip.FRAGMENT:
        return FRAGMENT
    addresses = rx[at + 22 : at + 30] if version == 4 else rx[at + 18 : at + 50]
    half = len(addresses) // 2
    if protocol == ip.TCP or (by_destination and protocol == ip.UDP):
        return hash(addresses + rx[transport : transport + 4]) & _MASK
    if protocol == ip.UDP:
        return hash(addresses[:half] + rx[transport : transport + 2]) & _MASK
    if protocol == ip.ICMP and version == 4:
        if rx[transport] in _ICMP_ERRORS:
            return _bucket_of_quote(rx, transport + 8, 4, by_destination)
        return hash(addresses[:half] + rx[transport + 4 : transport + 6]) & _MASK
    if protocol == ip.ICMPV6:
        if rx[transport] in _ICMPV6_ERRORS:
            return _bucket_of_quote(rx, transport + 8, 6, by_destination)
        return hash(addresses[:half] + rx[transport + 4 : transport + 6]) & _MASK
    return hash(addresses) & _MASK


def _bucket_of_quote(rx: mmap | bytes, quote: int, version: int, by_destination: bool) -> int:
    """The bucket of the flow whose packet (from us to the client) an ICMP error quotes: its two ends swapped."""
    if version == 4:
        source, destination = rx[quote + 12 : quote + 16], rx[quote + 16 : quote + 20]
        protocol, transport = rx[quote + 9], quote + (rx[quote] & 0x0F) * 4
    else:
        source, destination = rx[quote + 8 : quote + 24], rx[quote + 24 : quote + 40]
        protocol, transport = rx[quote + 6], quote + 40
    source_port, destination_port = rx[transport : transport + 2], rx[transport + 2 : transport + 4]
    if protocol == ip.UDP and not by_destination:
        return hash(destination + destination_port) & _MASK
    if protocol in (ip.ICMP, ip.ICMPV6):  # an echo reply; its identifier is that of the request
        return hash(destination + rx[transport + 4 : transport + 6]) & _MASK
    return hash(destination + source + destination_port + source_port) & _MASK
