"""SoftwareOffload: does in Python what the kernel does for a TUN with vnet header and offloads.

It stands in front of a device that lacks any of these: a descriptor without vnet header, a socket that carries bare IP
packets, a kernel without USO. On read it adds the header; on write it completes the checksum and cuts super-segments
into packets. The frame itself is never changed: it may be sent again, and its payload is shared memory.
"""

from collections.abc import Iterator
from struct import Struct
from typing import Final

from gateway.device import CSUM, TSO4, TSO6, USO4, USO6, SocketDevice, TunDevice
from workers.wire.checksum import checksum, ones_sum, pseudo_sum
from workers.wire.vnet import GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, HEADER, NEEDS_CSUM, SIZE

_ZEROS: Final = memoryview(bytes(SIZE))
_U16: Final = Struct("!H")
_U32: Final = Struct("!I")

_TCP: Final = 6
_UDP: Final = 17
_FIN_PSH: Final = 0x09
_CWR: Final = 0x80
_UDP_CHECKSUM: Final = 6  #: where the field stands in the header (RFC 768)
_TCP_CHECKSUM: Final = 16  #: RFC 9293, 3.1


class SoftwareOffload:
    """A device that takes every frame, before one that does not."""

    def __init__(self, below: TunDevice | SocketDevice, *, header: bool) -> None:
        """`header` says whether the frames of `below` have a virtio_net_hdr."""
        self.name = below.name
        self.mtu = below.mtu
        self.features = below.features
        self.made = below.made
        self.fileno = below.fileno
        self.close = below.close
        self._below = below
        self._prefix = [_ZEROS] if header else []
        self._header = header
        self._checksums = header and bool(below.features & CSUM)
        takes = {
            GSO_NONE: True,
            GSO_TCPV4: header and bool(below.features & TSO4),
            GSO_TCPV6: header and bool(below.features & TSO6),
            GSO_UDP_L4: header and below.features & (USO4 | USO6) == USO4 | USO6,
        }
        self._splits = {kind for kind, taken in takes.items() if not taken}

    def readv(self, buffers: list[memoryview], /) -> int:
        """Read one frame; where the header is ours it is all zeros: one packet, checksums not verified."""
        if self._header:
            return self._below.readv(buffers)
        first = buffers[0]
        length = self._below.readv([first[SIZE:], *buffers[1:]])
        first[:SIZE] = _ZEROS
        return length + SIZE

    def write(self, frame: memoryview, /) -> int:
        """Write one frame, as writev does."""
        return self.writev([frame])

    def writev(self, pieces: list[memoryview], /) -> int:
        """Write one frame as the packets that it stands for.

        BlockingIOError when nothing could be sent; when only the rest could not, it is lost as on a full wire.
        ValueError when the frame's headers contradict each other.
        """
        frame = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
        flags, kind, _, size, start, offset = HEADER.unpack_from(frame)
        kind &= ~GSO_ECN
        packet = frame[SIZE:]
        if kind in self._splits:
            self._write_segments(packet, kind, size, start)
        elif flags & NEEDS_CSUM and not self._checksums:
            field = start + offset
            # The field holds the sum of the pseudo-header, so that it is one more word of the data (RFC 1624 at work).
            value = checksum(packet[start:])
            if offset != _UDP_CHECKSUM:
                value %= 65535  # TCP writes the zero plainly; for UDP it would say "none" (RFC 768)
            self._below.writev([*self._prefix, packet[:field], memoryview(_U16.pack(value)), packet[field + 2 :]])
        elif self._header:
            self._below.write(frame)
        else:
            self._below.write(packet)
        return len(frame)

    def _write_segments(self, packet: memoryview, kind: int, size: int, start: int) -> None:
        segments = udp_segments(packet, size, start) if kind == GSO_UDP_L4 else tcp_segments(packet, size, start)
        sent = False
        for headers, payload in segments:
            try:
                self._below.writev([*self._prefix, memoryview(headers), payload])
            except BlockingIOError:
                if not sent:
                    raise
                return
            sent = True


def tcp_segments(packet: memoryview, size: int, start: int) -> Iterator[tuple[bytearray, memoryview]]:
    """Cut a TCP super-segment into (headers, payload) of at most `size` octets of payload each.

    `start` is where the TCP header begins. As the kernel's tcp_gso_segment: the sequence number goes on, FIN and PSH
    stand on the last segment only, CWR on the first only (RFC 3168, 6.1.2), the IPv4 identification counts up.
    """
    end = start + (packet[start + 12] >> 4) * 4
    _check(packet, size, end, start + 20)
    (sequence,) = _U32.unpack_from(packet, start + 4)
    flags = packet[start + 13]
    last = len(packet) - size
    for number, at in enumerate(range(end, len(packet), size)):
        headers = bytearray(packet[:end])
        payload = packet[at : at + size]
        _U32.pack_into(headers, start + 4, sequence + (at - end) & 0xFFFFFFFF)
        keep = flags if at >= last else flags & ~_FIN_PSH
        headers[start + 13] = keep & ~_CWR if number else keep
        _U16.pack_into(headers, start + _TCP_CHECKSUM, 0)
        value = _finish(headers, payload, start, number, _TCP)
        _U16.pack_into(headers, start + _TCP_CHECKSUM, value % 65535)
        yield headers, payload


def udp_segments(packet: memoryview, size: int, start: int) -> Iterator[tuple[bytearray, memoryview]]:
    """Cut a UDP super-frame into (headers, payload) of one datagram each, with `size` octets but for the last."""
    end = start + 8
    _check(packet, size, end, end)
    for number, at in enumerate(range(end, len(packet), size)):
        headers = bytearray(packet[:end])
        payload = packet[at : at + size]
        _U16.pack_into(headers, start + 4, 8 + len(payload))
        _U16.pack_into(headers, start + _UDP_CHECKSUM, 0)
        # checksum() never gives 0, which UDP takes for "none" (RFC 768).
        _U16.pack_into(headers, start + _UDP_CHECKSUM, _finish(headers, payload, start, number, _UDP))
        yield headers, payload


def _check(packet: memoryview, size: int, end: int, least: int) -> None:
    if not size or not least <= end < len(packet):
        raise ValueError(f"super-segment of {len(packet)} octets with headers of {end}, to be cut at {size}")


def _finish(headers: bytearray, payload: memoryview, start: int, number: int, protocol: int) -> int:
    """Set the IP header's lengths, identification and checksum for one segment; return the transport's checksum."""
    transport = len(headers) - start + len(payload)
    if headers[0] >> 4 == 4:
        source, destination = headers[12:16], headers[16:20]
        _U16.pack_into(headers, 2, start + transport)
        (identification,) = _U16.unpack_from(headers, 4)
        _U16.pack_into(headers, 4, identification + number & 0xFFFF)
        _U16.pack_into(headers, 10, 0)
        _U16.pack_into(headers, 10, checksum(bytes(headers[: (headers[0] & 15) * 4])) % 65535)
    else:
        source, destination = headers[8:24], headers[24:40]
        _U16.pack_into(headers, 4, start - 40 + transport)
    # Transport headers have an even length, so the payload's words stay aligned.
    initial = pseudo_sum(bytes(source), bytes(destination), protocol, transport) + ones_sum(payload)
    return checksum(memoryview(headers)[start:], initial)
