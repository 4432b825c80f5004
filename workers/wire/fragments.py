"""IP fragments: reassembly before anything looks at ports, and the cuts of what is too large for the device.

    fragment ─► take ─► Partial (by source, destination, identification) ··· complete ─► the whole packet, in the
                           │                                                            frame of its last fragment
                           └─ overlap, contradiction, too old, no room ─► dropped, counted

Fragments are copied out of their frames: few packets are cut, and a fragment that is kept must not cost the reader a
frame. What is kept is bounded in octets, in number and in time; when there is no room the oldest goes, because the
fragments of a packet come back to back, and those of a flood never end.

Overlapping fragments end the whole packet, with those that are still to come (RFC 5722, RFC 8200, 4.5; for IPv4 we do
the same, as Linux does). An exact copy is no overlap. An IPv6 fragment that is a whole packet is taken by itself (RFC
6946). No ICMP error is sent about packets that stay incomplete.
"""

from bisect import bisect_left
from mmap import mmap
from struct import Struct
from typing import Final

from workers.wire import ip, vnet
from workers.wire.checksum import checksum, verify

TIMEOUT: Final = 30.0  #: seconds from the first fragment on; Linux: net.ipv4.ipfrag_time (RFC 8200 says 60 at most)
MAX_OCTETS: Final = 4 << 20  #: of all fragments that are kept; Linux: net.ipv4.ipfrag_high_thresh
MAX_PACKETS: Final = 1024  #: of which fragments are kept
PACKET_COST: Final = 768  #: octets that we count for a packet beside its fragments', about what the objects take
FRAGMENT_COST: Final = 128  #: the same for a fragment beside its payload

#: what is counted, in the order of the words from `base` on
COUNTERS: Final = (
    "fragments",
    "reassembled",  # packets
    "fragments_duplicate",
    "fragments_malformed",  # lengths that contradict each other, a bad checksum, no transport header in the first one
    "fragments_too_big",  # of packets beyond 65,535 octets
    "fragments_overlapping",  # packets dropped for it
    "fragments_timed_out",  # packets that stayed incomplete
    "fragments_no_room",  # packets given up for newer ones
)
(_FRAGMENTS, _REASSEMBLED, _DUPLICATE, _MALFORMED, _TOO_BIG, _OVERLAPPING, _TIMED_OUT, _NO_ROOM) = range(len(COUNTERS))

_MORE4: Final = 0x2000
_OFFSET4: Final = 0x1FFF
_MORE6: Final = 1
_OFFSET6: Final = 0xFFF8
_LONGEST: Final = 65535
_NO_OFFLOAD: Final = bytes(vnet.SIZE)
_FRAGMENT6: Final = Struct(">BxH4s")  #: next header, offset and flag, identification (RFC 8200, 4.5)


class Partial:
    """A packet of which fragments have come."""

    __slots__ = ("begun_at", "data", "header", "octets", "spoilt", "starts", "total")

    def __init__(self, now: float) -> None:
        self.begun_at = now
        self.header = b""  #: what stands in front of the payload in the first fragment, ready for the whole packet
        self.starts: list[int] = []  #: offsets of the fragments, in order
        self.data: list[bytes] = []  #: their payloads
        self.octets = 0  #: of payload that have come
        self.total = -1  #: octets of payload in all; -1: the last fragment has not come
        self.spoilt = False  #: fragments overlapped or contradict each other: all that comes is dropped


class Reassembly:
    """All packets that have come in part."""

    def __init__(self, count: memoryview, base: int) -> None:
        """Count in the words `count[base]` and following, which COUNTERS names."""
        self._count = count
        self._base = base
        self._partials: dict[bytes, Partial] = {}  # the oldest first
        self._octets = 0  # kept, with the costs

    def take(self, memory: mmap, at: int, length: int, now: float) -> int:
        """Take the fragment in the frame at `at`, of `length` octets with its virtio_net_hdr.

        Return the length of the whole packet, which now stands there in its place and whose checksum nobody has
        verified; or 0 if there is none, and the frame is free.
        """
        self._add(_FRAGMENTS)
        while self._partials:
            oldest = next(iter(self._partials.values()))
            if now - oldest.begun_at < TIMEOUT:
                break
            self._give_up(_TIMED_OUT)
        parsed = self._parse4(memory, at, length) if memory[at + 10] >> 4 == 4 else self._parse6(memory, at, length)
        if parsed is None:
            self._add(_MALFORMED)
            return 0
        key, header, offset, more, begin, end = parsed
        if offset + end - begin + len(header) - (40 if len(key) > 11 else 0) > _LONGEST:
            self._add(_TOO_BIG)
            return 0
        data = memory[begin:end]
        if not offset and not more:
            return self._finish(memory, at, header, data)
        if not self._insert(key, header, offset, more, data, now):
            return 0
        partial = self._partials[key]
        self._remove(key)
        return self._finish(memory, at, partial.header, b"".join(partial.data))

    def _insert(self, key: bytes, header: bytes, offset: int, more: bool, data: bytes, now: float) -> bool:
        """Keep a fragment; True: it was the one that its packet waited for."""
        partials = self._partials
        while self._octets + PACKET_COST + FRAGMENT_COST + len(data) > MAX_OCTETS:
            self._give_up(_NO_ROOM)
        partial = partials.get(key)
        if partial is None:
            if len(partials) >= MAX_PACKETS:
                self._give_up(_NO_ROOM)
            partial = partials[key] = Partial(now)
            self._octets += PACKET_COST
        if partial.spoilt:
            return False
        starts = partial.starts
        end = offset + len(data)
        place = bisect_left(starts, offset)
        if (
            place < len(starts)
            and starts[place] == offset
            and partial.data[place] == data
            and more == (end != partial.total)
        ):
            self._add(_DUPLICATE)
            return False
        if (
            (place and starts[place - 1] + len(partial.data[place - 1]) > offset)
            or (place < len(starts) and starts[place] < end)
            or (partial.total >= 0 and (not more or end > partial.total))
            or (not more and place < len(starts))
        ):
            self._spoil(partial)
            return False
        starts.insert(place, offset)
        partial.data.insert(place, data)
        partial.octets += len(data)
        self._octets += FRAGMENT_COST + len(data)
        if not offset:
            partial.header = header
        if not more:
            partial.total = end
        return partial.octets == partial.total

    def _finish(self, memory: mmap, at: int, header: bytes, payload: bytes) -> int:
        """Write the whole packet into the frame, its length into the IP header, and return the frame's length."""
        packet = bytearray(header)
        total = len(packet) + len(payload)
        if header[0] >> 4 == 4:
            packet[2:4] = total.to_bytes(2, "big")
            packet[10:12] = checksum(bytes(packet[:10] + b"\0\0" + packet[12:])).to_bytes(2, "big")
        else:
            packet[4:6] = (total - 40).to_bytes(2, "big")
        length = vnet.SIZE + total
        memory[at : at + length] = b"".join((_NO_OFFLOAD, packet, payload))
        self._add(_REASSEMBLED)
        return length

    def _spoil(self, partial: Partial) -> None:
        """Drop what has come of a packet; it stays in the table, so that what is to come is dropped, too."""
        self._octets -= partial.octets + len(partial.starts) * FRAGMENT_COST
        partial.starts.clear()
        partial.data.clear()
        partial.octets = 0
        partial.spoilt = True
        self._add(_OVERLAPPING)

    def _give_up(self, why: int) -> None:
        """Drop the oldest packet."""
        key = next(iter(self._partials))
        if not self._partials[key].spoilt:
            self._add(why)
        self._remove(key)

    def _remove(self, key: bytes) -> None:
        partial = self._partials.pop(key)
        self._octets -= PACKET_COST + partial.octets + len(partial.starts) * FRAGMENT_COST

    def _add(self, which: int) -> None:
        self._count[self._base + which] += 1

    # ── one fragment ────────────────────────────────────────────────────────────────────────────────────────────
    # Both return key, header of the whole packet (if this is the first fragment), offset, whether more follow, and
    # where the payload begins and ends; None: malformed.

    def _parse4(self, memory: mmap, at: int, length: int) -> tuple[bytes, bytes, int, bool, int, int] | None:
        flags, first, total, field, protocol = ip.HEADER4.unpack_from(memory, at)
        begin = at + vnet.SIZE + (first & 0x0F) * 4
        end = at + vnet.SIZE + total
        header = memory[at + vnet.SIZE : begin]
        if memory[at + 1] or len(header) < 20 or end <= begin or end > at + length:
            return None
        if not flags & vnet.TRUSTED and not verify(header):
            return None
        more = bool(field & _MORE4)
        if more and end - begin & 7:
            return None
        key = memory[at + 22 : at + 30] + memory[at + 14 : at + 16] + bytes((protocol,))
        # Whole packets have neither flags nor an offset.
        return key, header[:6] + b"\0\0" + header[8:], (field & _OFFSET4) * 8, more, begin, end

    def _parse6(self, memory: mmap, at: int, length: int) -> tuple[bytes, bytes, int, bool, int, int] | None:
        protocol, transport, end, _ = ip.locate(memory, at, length)
        begin = transport + _FRAGMENT6.size
        if memory[at + 1] or protocol != ip.FRAGMENT or end <= begin:
            return None
        following, field, identification = _FRAGMENT6.unpack_from(memory, transport)
        offset = field & _OFFSET6
        more = bool(field & _MORE6)
        if more and end - begin & 7:
            return None
        if not offset:
            # The first one has all headers (RFC 8200, 4.5), and no second fragment header.
            upper, where = ip.upper_layer(memory, following, begin, end)
            if upper < 0 or where + 8 > end:
                return None
        header = bytearray(memory[at + vnet.SIZE : transport])
        # The last header in front says what the fragment header said.
        place, beyond = 6, 40
        while beyond < len(header):
            place, beyond = beyond, beyond + 8 + header[beyond + 1] * 8
        header[place] = following
        key = memory[at + 18 : at + 50] + identification
        return key, bytes(header), offset, more, begin, end


def cuts(size: int, mtu: int, header: int) -> range:
    """Return the offsets at which `size` octets behind an IP header of `header` octets are cut for an MTU.

    Each piece but the last is as long as the distance to the next: a multiple of 8 octets (RFC 791, RFC 8200, 4.5).
    """
    return range(0, size, mtu - header & ~7)
