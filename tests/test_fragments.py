"""Fragments: any cut, order and copies give the packet back; overlaps end it; floods cost no more than the bounds."""

import itertools
import random
import struct
from mmap import mmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.layout import FRAME_SIZE
from tests.shard import VNET, udp_packet
from workers.wire import ip
from workers.wire.checksum import checksum
from workers.wire.flowkey import FRAGMENT, bucket_of
from workers.wire.fragments import COUNTERS, MAX_OCTETS, MAX_PACKETS, TIMEOUT, Reassembly

MEMORY = mmap(-1, 2 * FRAME_SIZE)
AT = FRAME_SIZE
TARGET6 = bytes(range(16))
CLIENT6 = bytes(range(16, 32))
BASE = 3  #: words of somebody else's in front of ours


class Machine:
    """A Reassembly, what it counted, and frames for it."""

    def __init__(self):
        self.words = memoryview(bytearray(8 * (BASE + len(COUNTERS)))).cast("Q")
        self.reassembly = Reassembly(self.words, BASE)

    def take(self, fragment, now=0.0, vnet=bytes(VNET)):
        """Return the packet that this fragment completed, None if there is none yet."""
        length = VNET + len(fragment)
        MEMORY[AT : AT + length + 64] = bytes(length + 64)
        MEMORY[AT : AT + length] = vnet + fragment
        length = self.reassembly.take(MEMORY, AT, length, now)
        assert 0 <= length <= FRAME_SIZE
        return MEMORY[AT + VNET : AT + length] if length else None

    def counted(self, name):
        return self.words[BASE + COUNTERS.index(name)]

    def bounded(self):
        kept = self.reassembly._partials.values()
        assert len(kept) <= MAX_PACKETS
        assert sum(len(data) for each in kept for data in each.data) <= self.reassembly._octets <= MAX_OCTETS
        if not kept:
            assert self.reassembly._octets == 0
        return True


def packet_of(version, payload, options=b""):
    """Return a whole packet, of IPv4 with options or of IPv6 with an extension header if there are any."""
    if version == 4:
        packet = udp_packet(payload)
        if options:
            packet = bytes([0x45 + len(options) // 4]) + packet[1:20] + options + packet[20:]
            packet = packet[:2] + len(packet).to_bytes(2) + packet[4:10] + b"\0\0" + packet[12:]
            packet = packet[:10] + checksum(packet[: 20 + len(options)]).to_bytes(2) + packet[12:]
        return packet
    packet = udp_packet(payload, CLIENT6, destination=TARGET6)
    if options:
        extension = bytes((17, len(options) // 8)) + bytes(6) + options
        length = len(packet) - 40 + len(extension)
        packet = packet[:4] + length.to_bytes(2) + b"\0" + packet[7:40] + extension + packet[40:]
    return packet


def cut(packet, ends, identification=7, header=0):
    """Cut a packet's payload behind `header` octets at these offsets, multiples of 8; return the fragments."""
    version = packet[0] >> 4
    header = header or ((packet[0] & 15) * 4 if version == 4 else 40 if packet[6] == 17 else 48 + packet[41] * 8)
    payload = packet[header:]
    edges = [0, *ends, len(payload)]
    return [
        piece(packet[:header], payload[begin:end], begin, end < len(payload), identification)
        for begin, end in itertools.pairwise(edges)
    ]


def piece(header, data, offset, more, identification=7):
    if header[0] >> 4 == 4:
        made = header[:2] + struct.pack(
            ">HHH", len(header) + len(data), identification, offset // 8 | (0x2000 if more else 0)
        )
        made += header[8:10] + b"\0\0" + header[12:]
        return made[:10] + checksum(made).to_bytes(2) + made[12:] + data
    place = 6 if len(header) == 40 else 40
    fragment = struct.pack(">BxHI", header[place], offset | more, identification)
    made = header[:place] + b"\x2c" + header[place + 1 :]
    return made[:4] + (len(made) - 40 + 8 + len(data)).to_bytes(2) + made[6:] + fragment + data


@st.composite
def cut_packets(draw):
    """Draw a packet and its fragments, in order."""
    version = draw(st.sampled_from((4, 6)))
    payload = random.Random(draw(st.integers(0, 99))).randbytes(draw(st.integers(9, 300)))
    packet = packet_of(version, payload, draw(st.sampled_from((b"", b"\x01" * 8))))
    units = range(1, (len(payload) + 8 - 1) // 8 + 1)
    ends = sorted(draw(st.sets(st.sampled_from([unit * 8 for unit in units]), min_size=1)))
    return packet, cut(packet, [end for end in ends if end < len(payload) + 8])


def same(came, packet):
    """Whether two packets are the same but for what a fragment's header says of itself."""
    if packet[0] >> 4 == 4:
        size = (packet[0] & 15) * 4
        assert checksum(came[:size]) == 65535
        return came[:4] + came[8:10] + came[12:] == packet[:4] + packet[8:10] + packet[12:] and came[6:8] == b"\0\0"
    return came == packet


@given(cut_packets(), st.randoms(use_true_random=False))
def test_any_cut_in_any_order_with_copies(made, shuffle):
    packet, fragments = made
    machine = Machine()
    sent = fragments + shuffle.choices(fragments, k=shuffle.randrange(4))
    shuffle.shuffle(sent)
    came = []
    seen = set()
    for fragment in sent:
        MEMORY[AT : AT + VNET + len(fragment)] = bytes(VNET) + fragment
        if len(fragments) > 1:
            assert bucket_of(MEMORY, AT) == FRAGMENT
        whole = machine.take(fragment)
        seen.add(fragment)
        if whole is not None:
            assert len(seen) == len(fragments)
            came.append(whole)
            seen.clear()
    assert came
    assert all(same(whole, packet) for whole in came)
    MEMORY[AT : AT + VNET + len(came[0])] = bytes(VNET) + came[0]
    assert ip.locate(MEMORY, AT, VNET + len(came[0]))[0] == ip.UDP
    assert machine.bounded()


@given(cut_packets(), st.data())
def test_an_overlap_ends_the_packet_with_what_is_still_to_come(made, data):
    packet, fragments = made
    header = (packet[0] & 15) * 4 if packet[0] >> 4 == 4 else 40 if packet[6] == 17 else 48 + packet[41] * 8
    payload = packet[header:]
    which = data.draw(st.integers(0, (len(payload) - 1) // 8)) * 8
    long = data.draw(st.integers(1, 20)) * 8
    more = which + long < len(payload)
    other = piece(packet[:header], payload[which : which + long], which, more)
    if other in fragments or (not which and not more):
        return
    machine = Machine()
    order = data.draw(st.permutations([*fragments, other]))
    # Until both that overlap have come nobody can know; the packet is not to be whole before, either.
    at = order.index(other)
    if at == len(order) - 1:
        order = [other, *order[:-1]]
    assert not [whole for whole in map(machine.take, order) if whole is not None and not same(whole, packet)]
    assert machine.counted("fragments_overlapping") == 1 or machine.counted("reassembled") == 1
    assert machine.bounded()


@pytest.mark.parametrize("version", [4, 6])
def test_rfc_5722(version):
    packet = packet_of(version, bytes(100))
    one, two, three = cut(packet, [40, 80])
    header = 20 if version == 4 else 40
    machine = Machine()
    assert machine.take(one) is None
    assert machine.take(piece(packet[:header], bytes(16), 32, True)) is None
    assert machine.counted("fragments_overlapping") == 1
    for fragment in (two, three, one):
        assert machine.take(fragment) is None
    # Another packet of the same two ends is another packet; and after the time the identification is free again.
    assert [machine.take(each) for each in cut(packet, [40, 80], identification=8)][-1]
    assert [machine.take(each, now=TIMEOUT) for each in (one, two, three)][-1]


@pytest.mark.parametrize("version", [4, 6])
def test_exact_copies_are_no_overlap_but_other_octets_are(version):
    packet = packet_of(version, bytes(100))
    one, two = cut(packet, [40])
    machine = Machine()
    assert machine.take(one) is None
    assert machine.take(one) is None
    assert machine.counted("fragments_duplicate") == 1
    assert machine.take(two)
    assert machine.take(one) is None
    forged = one[:-1] + b"!"
    assert machine.take(forged) is None
    assert machine.take(two) is None
    assert machine.counted("fragments_overlapping") == 1


@pytest.mark.parametrize("version", [4, 6])
def test_two_ends_contradict_each_other(version):
    packet = packet_of(version, bytes(100))
    header = packet[: 20 if version == 4 else 40]
    for pieces in (
        [(bytes(8), 80, False), (bytes(8), 96, False)],
        [(bytes(8), 80, False), (bytes(8), 96, True)],
        [(bytes(8), 96, True), (bytes(8), 80, False)],
        [(bytes(8), 80, False), (bytes(8), 80, True)],
        [(bytes(8), 80, True), (bytes(8), 80, False)],
    ):
        machine = Machine()
        for data, offset, more in pieces:
            assert machine.take(piece(header, data, offset, more)) is None
        assert machine.counted("fragments_overlapping") == 1


def test_an_ipv6_fragment_that_is_a_whole_packet_stands_alone():
    """RFC 6946: whatever else there is with its identification."""
    packet = packet_of(6, b"x" * 100)
    machine = Machine()
    assert machine.take(cut(packet, [40])[0]) is None
    assert machine.take(piece(packet[:40], packet[40:], 0, False)) == packet
    assert machine.take(cut(packet, [40])[1]) == packet


@pytest.mark.parametrize("version", [4, 6])
def test_largest_packets(version):
    size = 65_507 if version == 4 else 65_527
    packet = packet_of(version, bytes(size))
    machine = Machine()
    came = [machine.take(each) for each in cut(packet, range(1448, size + 8, 1448))]
    assert came[:-1] == [None] * (len(came) - 1)
    assert same(came[-1], packet)
    # One octet more cannot be said in a length field.
    header = packet[: 20 if version == 4 else 40]
    assert (
        machine.take(piece(header, bytes(65_535 - 65_528 + 1 - (20 if version == 4 else 0) % 8), 65_528, False)) is None
    )
    assert machine.counted("fragments_too_big") == 1


def malformed():
    packet4, packet6 = packet_of(4, bytes(100)), packet_of(6, bytes(100))
    one4, one6 = cut(packet4, [40])[0], cut(packet6, [40])[0]
    yield "not a multiple of 8, IPv4", piece(packet4[:20], bytes(9), 0, True)
    yield "not a multiple of 8, IPv6", piece(packet6[:40], bytes(17), 0, True)
    yield "no payload, IPv4", piece(packet4[:20], b"", 8, True)
    yield "no payload, IPv6", piece(packet6[:40], b"", 8, True)
    yield "longer than the frame, IPv4", one4[:-1]
    yield "longer than the frame, IPv6", one6[:-1]
    yield "checksum, IPv4", one4[:8] + b"\0" + one4[9:]
    yield "a fragment in a fragment", piece(packet6[:6] + b"\x2c" + packet6[7:40], bytes(16), 0, True)
    yield (
        "no transport header in the first one",
        piece(packet6[:6] + b"\x3c" + packet6[7:40], b"\x11" + bytes(7), 0, True),
    )


@pytest.mark.parametrize("fragment", [pytest.param(each, id=name) for name, each in malformed()])
def test_malformed(fragment):
    machine = Machine()
    assert machine.take(fragment) is None
    assert machine.counted("fragments_malformed") == 1
    assert not machine.reassembly._partials


def test_a_super_segment_is_no_fragment():
    machine = Machine()
    assert machine.take(cut(packet_of(4, bytes(100)), [40])[0], vnet=b"\x01\x05" + bytes(8)) is None
    assert machine.counted("fragments_malformed") == 1


def test_time_is_bounded():
    one, two = cut(packet_of(4, bytes(100)), [40])
    machine = Machine()
    assert machine.take(one, now=100.0) is None
    assert machine.take(two, now=100.0 + TIMEOUT) is None
    assert machine.counted("fragments_timed_out") == 1
    assert machine.take(one, now=101.0 + TIMEOUT)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [8, 60_000])
def test_a_flood_is_bounded_and_fragments_that_come_together_pass(version, size):
    packet = packet_of(version, bytes(2000))
    header = packet[: 20 if version == 4 else 40]
    machine = Machine()
    fragment = bytearray(piece(header, bytes(size), 8, True))
    number = 4 if version == 4 else 44
    for flood in range(3000):
        fragment[number : number + 2] = flood.to_bytes(2)
        if version == 4:
            fragment[10:12] = b"\0\0"
            fragment[10:12] = checksum(bytes(fragment[:20])).to_bytes(2)
        assert machine.take(bytes(fragment)) is None
        if flood % 500 == 0:
            assert machine.bounded()
    assert machine.counted("fragments_no_room") >= 3000 - MAX_PACKETS
    assert [machine.take(each) for each in cut(packet, [1480], identification=50_000)][-1]
    assert machine.bounded()


def test_a_flood_of_one_packet_is_bounded():
    machine = Machine()
    packet = packet_of(4, bytes(20))
    for offset in range(8, 65_000, 16):
        machine.take(piece(packet[:20], bytes(8), offset, True))
    assert machine.bounded()
    machine.take(piece(packet[:20], bytes(16), 8, True))
    assert machine.counted("fragments_overlapping") == 1
    assert machine.bounded()


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from((0x45, 0x46, 0x60)), st.binary(min_size=20, max_size=90)), max_size=20))
def test_random_octets(frames):
    machine = Machine()
    for first, data in frames:
        fragment = bytearray(bytes([first]) + data)
        if first == 0x60:
            fragment[4:7] = bytes((0, max(len(fragment) - 40, 0), 44))
            fragment[8:40] = bytes(32)
        else:
            fragment[2:4] = len(fragment).to_bytes(2)
            fragment[12:20] = bytes(8)
        machine.take(bytes(fragment), vnet=b"\x01" + bytes(9))
        assert machine.bounded()
