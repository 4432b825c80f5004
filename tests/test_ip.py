"""IP headers and buckets: no bytes raise; what belongs together lands together."""

import struct
from mmap import mmap

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.layout import FRAME_SIZE
from workers.wire import ip
from workers.wire.checksum import checksum
from workers.wire.flowkey import BUCKETS, FRAGMENT, bucket_by_destination, bucket_of

AT = FRAME_SIZE  #: the second frame: something stands before it
MEMORY = mmap(-1, 3 * FRAME_SIZE)
UNVERIFIED = bytes(10)
TRUSTED = b"\x01" + bytes(9)

address4 = st.binary(min_size=4, max_size=4)
address6 = st.binary(min_size=16, max_size=16)
port = st.integers(0, 65535)
addresses = st.one_of(st.tuples(address4, address4), st.tuples(address6, address6))


def put(packet, vnet=TRUSTED):
    MEMORY[AT : AT + 200] = b"\xee" * 200
    MEMORY[AT : AT + 10 + len(packet)] = vnet + packet
    return 10 + len(packet)


def packet_of(source, destination, protocol, data, options=b""):
    if len(source) == 4:
        header = struct.pack(
            ">BBHHHBBH4s4s", 0x45 + len(options) // 4, 0, 20 + len(options) + len(data), 0, 0, 64, protocol, 0,
            source, destination,
        ) + options  # fmt: skip
        return header[:10] + checksum(header).to_bytes(2, "big") + header[12:] + data
    return struct.pack(">IHBB16s16s", 6 << 28, len(data), protocol, 64, source, destination) + data


def ports(source, destination, rest=b"\x00" * 16):
    return struct.pack(">HH", source, destination) + rest


@given(st.binary(min_size=28, max_size=200), st.sampled_from((0x45, 0x46, 0x4F, 0x40, 0x60, 0x00)), st.booleans())
def test_locate_of_random_bytes(data, first, trusted):
    packet = bytes([first]) + data[1:]
    length = put(packet, TRUSTED if trusted else UNVERIFIED)
    protocol, transport, end, version = ip.locate(MEMORY, AT, length)
    assert version == first >> 4
    if protocol >= 0:
        assert AT + 10 + 20 <= transport <= end <= AT + length
    assert FRAGMENT <= bucket_of(MEMORY, AT) < BUCKETS


@given(st.binary(min_size=40, max_size=120), st.lists(st.sampled_from((0, 43, 44, 60, 6, 17, 58, 59)), max_size=12))
def test_locate_of_random_extension_headers(data, kinds):
    packet = bytearray(b"\x60\x00\x00\x00" + struct.pack(">H", len(data)) + b"\x00\x40" + bytes(32) + data)
    packet[6] = kinds[0] if kinds else 6
    for i, kind in enumerate(kinds[1:]):
        if 40 + 8 * i + 1 < len(packet):
            packet[40 + 8 * i], packet[40 + 8 * i + 1] = kind, 0
    length = put(bytes(packet))
    protocol, transport, end, _ = ip.locate(MEMORY, AT, length)
    if protocol >= 0:
        assert AT + 50 <= transport <= end == AT + length
    assert FRAGMENT <= bucket_of(MEMORY, AT) < BUCKETS


@given(st.binary(max_size=FRAME_SIZE - 1))
def test_bucket_of_random_frames_in_the_last_frame_of_the_pool(data):
    at = 2 * FRAME_SIZE
    MEMORY[at : at + FRAME_SIZE] = b"\xff" * FRAME_SIZE
    MEMORY[at : at + len(data)] = data
    assert FRAGMENT <= bucket_of(MEMORY, at) < BUCKETS


@pytest.mark.parametrize("first", [0x45, 0x4F, 0x60])
@pytest.mark.parametrize("protocol", [1, 6, 17, 58, 0, 43, 60])
def test_bucket_of_a_frame_full_of_the_largest_numbers(first, protocol):
    at = 2 * FRAME_SIZE
    MEMORY[at : at + FRAME_SIZE] = b"\xff" * FRAME_SIZE
    MEMORY[at] = 1
    MEMORY[at + 10] = first
    MEMORY[at + (19 if first != 0x60 else 16)] = protocol
    assert FRAGMENT <= bucket_of(MEMORY, at) < BUCKETS


@given(addresses, st.sampled_from((1, 6, 17, 47, 58)), st.binary(min_size=8, max_size=60))
def test_locate_agrees_with_dpkt(pair, protocol, data):
    packet = packet_of(pair[0], pair[1], protocol, data)
    length = put(packet, UNVERIFIED)
    assert ip.locate(MEMORY, AT, length) == (
        protocol,
        AT + length - len(data),
        AT + length,
        4 if len(pair[0]) == 4 else 6,
    )
    if len(pair[0]) == 4:
        assert dpkt.ip.IP(packet).p == protocol


def test_padding_behind_the_packet_is_left_out():
    packet = packet_of(b"abcd", b"efgh", 17, bytes(12))
    length = put(packet + bytes(6))
    assert ip.locate(MEMORY, AT, length)[2] == AT + 10 + len(packet)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({2: 0, 3: 19}, ip.MALFORMED),  # total length below the header's
        ({2: 1, 3: 0}, ip.MALFORMED),  # above what was read
        ({0: 0x44}, ip.MALFORMED),
        ({10: 0x12, 11: 0x34}, ip.BAD_CHECKSUM),
    ],
)
def test_reasons_to_drop(change, reason):
    packet = bytearray(packet_of(b"abcd", b"efgh", 17, bytes(12)))
    for at, octet in change.items():
        packet[at] = octet
    assert ip.locate(MEMORY, AT, put(bytes(packet), UNVERIFIED))[0] == reason


@pytest.mark.parametrize("bits", [0x2000, 0x0001, 0x1FFF])
def test_fragments(bits):
    packet = bytearray(packet_of(b"abcd", b"efgh", 17, bytes(12)))
    packet[6:8] = bits.to_bytes(2, "big")
    assert ip.locate(MEMORY, AT, put(bytes(packet)))[0] == ip.FRAGMENT
    packet6 = packet_of(bytes(16), bytes(16), 44, b"\x11" + bytes(15))
    assert ip.locate(MEMORY, AT, put(packet6))[0] == ip.FRAGMENT


@given(addresses, addresses, port, port, port)
def test_one_client_socket_has_one_bucket_for_udp(one, other, source, first, second):
    put(packet_of(one[0], one[1], 17, ports(source, first)))
    bucket = bucket_of(MEMORY, AT)
    if len(one[0]) == len(other[1]):
        put(packet_of(one[0], other[1], 17, ports(source, second)))
        assert bucket_of(MEMORY, AT) == bucket


@given(addresses, port, port, st.binary(max_size=50), st.integers(0, 255))
def test_all_segments_of_a_flow_have_one_bucket(pair, source, destination, text, tos):
    put(packet_of(pair[0], pair[1], 6, ports(source, destination)))
    bucket = bucket_of(MEMORY, AT)
    packet = bytearray(packet_of(pair[0], pair[1], 6, ports(source, destination, bytes(16) + text)))
    if len(pair[0]) == 4:
        packet[1] = tos
    put(bytes(packet))
    assert bucket_of(MEMORY, AT) == bucket


@given(st.tuples(address4, address4), port, port, st.sampled_from((6, 17)))
def test_ip_options_do_not_change_the_bucket(pair, source, destination, protocol):
    put(packet_of(pair[0], pair[1], protocol, ports(source, destination)))
    bucket = bucket_of(MEMORY, AT)
    put(packet_of(pair[0], pair[1], protocol, ports(source, destination), options=b"\x01" * 8))
    assert bucket_of(MEMORY, AT) == bucket


@given(st.tuples(address6, address6), port, port, st.sampled_from((6, 17)))
def test_extension_headers_do_not_change_the_bucket(pair, source, destination, protocol):
    data = ports(source, destination)
    put(packet_of(pair[0], pair[1], protocol, data))
    bucket = bucket_of(MEMORY, AT)
    put(packet_of(pair[0], pair[1], 60, bytes([protocol, 0]) + bytes(6) + data))
    assert bucket_of(MEMORY, AT) == bucket


@given(addresses, port, port, st.sampled_from((6, 17)), st.sampled_from((0, 1)))
def test_an_icmp_error_lands_where_the_flow_is(pair, source, destination, protocol, which):
    """A client's error quotes a packet that it got: from the target's address to its own."""
    client, target = pair
    put(packet_of(client, target, protocol, ports(source, destination)))
    bucket = bucket_of(MEMORY, AT)
    quote = packet_of(target, client, protocol, ports(destination, source))
    if len(client) == 4:
        error = packet_of(client, b"\x01\x02\x03\x04", 1, bytes([(3, 11)[which], 4]) + bytes(6) + quote[:28])
    else:
        error = packet_of(client, bytes(16), 58, bytes([(2, 1)[which], 0]) + bytes(6) + quote)
    put(error)
    assert bucket_of(MEMORY, AT) == bucket


@given(addresses, st.integers(0, 65535), st.integers(0, 65535))
def test_an_icmp_error_about_an_echo_reply_lands_where_the_pings_are(pair, identifier, number):
    client, target = pair
    protocol, request, reply = (1, 8, 0) if len(client) == 4 else (58, 128, 129)
    put(packet_of(client, target, protocol, struct.pack(">BBHHH", request, 0, 0, identifier, number)))
    bucket = bucket_of(MEMORY, AT)
    quote = packet_of(target, client, protocol, struct.pack(">BBHHH", reply, 0, 0, identifier, number))
    put(packet_of(client, target, protocol, bytes([3 if protocol == 1 else 1, 0]) + bytes(6) + quote))
    assert bucket_of(MEMORY, AT) == bucket


@given(addresses, addresses, st.integers(0, 65535), st.integers(0, 65535))
def test_pings_of_one_program_have_one_bucket(pair, other, identifier, sequence):
    def ping(target, number):
        kind, protocol = (8, 1) if len(target) == 4 else (128, 58)
        put(packet_of(pair[0], target, protocol, struct.pack(">BBHHH", kind, 0, 0, identifier, number)))
        return bucket_of(MEMORY, AT)

    if len(pair[0]) == len(other[1]):
        assert ping(pair[1], 1) == ping(other[1], sequence)


def test_address_port_mapping_spreads_one_client_socket():
    """One socket, 200 destinations, four workers: one by default, at least three with all five fields."""
    for first, second in (("c612 0001", "cb00 7100"), ("20" * 16, "30" * 15 + "00")):
        source, destination = bytes.fromhex(first), bytes.fromhex(second)
        usual, spread = set(), set()
        for number in range(200):
            target = destination[:-1] + bytes((number,))
            put(packet_of(source, target, 17, ports(5000, 443)))
            usual.add(bucket_of(MEMORY, AT) % 4)
            bucket = bucket_by_destination(MEMORY, AT)
            spread.add(bucket % 4)
            # What the client says of an answer belongs where its own datagrams go.
            quoted = packet_of(target, source, 17, ports(443, 5000))
            if len(source) == 4:
                put(packet_of(source, target, 1, b"\3\3" + bytes(6) + quoted))
            else:
                put(packet_of(source, target, 58, b"\1\4" + bytes(6) + quoted))
            assert bucket_by_destination(MEMORY, AT) == bucket
        assert len(usual) == 1
        assert len(spread) >= 3


@given(addresses, port, port, st.sampled_from((6, 17, 1, 58)))
def test_other_protocols_lie_in_the_same_bucket_either_way(pair, first, second, protocol):
    put(packet_of(pair[0], pair[1], protocol, ports(first, second)))
    if protocol != 17 and pair[0] != pair[1]:
        assert bucket_by_destination(MEMORY, AT) == bucket_of(MEMORY, AT)
