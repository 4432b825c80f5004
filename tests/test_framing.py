"""UDP inside TCP: every dialect's golden bytes, any chunking, any garbage, and what is never written."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workers.socks.framing import (
    MAX_GOST,
    MAX_HEV,
    MAX_UOT,
    GostFraming,
    HevFraming,
    Uot2Framing,
    Uot2ServerFraming,
    UotFraming,
)
from workers.socks.wire import ProtocolError, datagram_header_length, write_datagram_header

V4 = write_datagram_header(b"\x01\x02\x03\x04", 53)
V6 = write_datagram_header(bytes(15) + b"\x01", 53)
NAME = write_datagram_header("example.com", 53)

# Where the two ends differ: what a server writes is read by a client.
PAIRS = {
    "gost": (GostFraming, GostFraming),
    "hev": (HevFraming, HevFraming),
    "uot1": (UotFraming, UotFraming),
    "uot2": (Uot2Framing, Uot2ServerFraming),
    "uot2-down": (Uot2ServerFraming, UotFraming),
}

GOLDEN = [
    (GostFraming, V4, "0002 00 01 01020304 0035 6869"),
    (GostFraming, V6, "0002 00 04 00000000000000000000000000000001 0035 6869"),
    (GostFraming, NAME, "0002 00 03 0b 6578616d706c652e636f6d 0035 6869"),
    (HevFraming, V4, "0002 0a 01 01020304 0035 6869"),
    (HevFraming, V6, "0002 16 04 00000000000000000000000000000001 0035 6869"),
    (HevFraming, NAME, "0002 12 03 0b 6578616d706c652e636f6d 0035 6869"),
    (UotFraming, V4, "00 01020304 0035 0002 6869"),
    (UotFraming, V6, "01 00000000000000000000000000000001 0035 0002 6869"),
    (UotFraming, NAME, "02 0b 6578616d706c652e636f6d 0035 0002 6869"),
]


@pytest.mark.parametrize(("framing", "header", "wire"), GOLDEN)
def test_golden_frames(framing, header, wire):
    wire = bytes.fromhex(wire)
    assert framing().frame(header, b"hi") == wire
    assert framing().receive(wire) == [header + b"hi"]


def test_the_exchange_seen_with_gost_1_7():
    sent = bytes.fromhex("0005 00 01 7f000001 4a38") + b"hello"
    answered = bytes.fromhex("0007 00 01 7f000001 4a38") + b"E:hello"
    header = write_datagram_header(b"\x7f\x00\x00\x01", 0x4A38)
    assert GostFraming().frame(header, b"hello") == sent
    assert GostFraming().receive(answered) == [header + b"E:hello"]


@pytest.mark.parametrize("byte_2", [0x00, 0x01, 0x0A, 0xFF])
def test_gost_ignores_the_fragment_byte(byte_2):
    wire = bytes((0, 2, byte_2)) + V4[3:] + b"hi"
    assert GostFraming().receive(wire) == [V4 + b"hi"]


def test_gost_takes_an_empty_datagram_and_goes_on():
    gost = GostFraming()
    assert gost.receive(V4 + bytes.fromhex("0002 00") + V4[3:] + b"hi") == [V4, V4 + b"hi"]


def test_frames_of_gost_v1_from_ipv6_lack_the_address():
    nameless = bytes.fromhex("0008 00 01 4a38") + b"8 octets"
    gost = GostFraming(by_message=True)
    assert gost.receive(nameless) == []
    assert gost.receive(bytes.fromhex("0002 00") + V4[3:] + b"hi") == [V4 + b"hi"]
    assert gost.nameless == 1


def test_a_message_of_many_frames_or_half_a_one_is_no_nameless_frame():
    gost = GostFraming(by_message=True)
    frame = bytes.fromhex("0004 00") + V4[3:] + b"four"  # its header alone looks like one of four bytes
    assert gost.receive(frame + frame) == [V4 + b"four"] * 2
    assert gost.receive(frame[:7]) == []
    assert gost.receive(frame[7:]) == [V4 + b"four"]
    assert gost.nameless == 0


def test_hev_and_gost_v3_headers_that_cannot_be():
    for wire in (
        bytes.fromhex("0002 ff 01 01020304 0035 6869"),  # gost v3
        bytes.fromhex("0002 00 01 01020304 0035 6869"),  # gost v1, v2
        bytes.fromhex("0002 04 01 01020304 0035 6869"),
        bytes.fromhex("000c 0a 07 01020304 0035 6869"),
    ):
        hev = HevFraming()
        assert hev.receive(wire) == []
        assert hev.error is not None
        assert hev.receive(bytes.fromhex("0002 0a 01 01020304 0035 6869")) == []


def test_uot_version_2_asks_once():
    client = Uot2Framing()
    assert client.frame(NAME, b"hi") == bytes.fromhex(
        "00 03 0b 6578616d706c652e636f6d 0035  02 0b 6578616d706c652e636f6d 0035 0002 6869"
    )
    assert client.frame(V4, b"hi") == bytes.fromhex("00 01020304 0035 0002 6869")


@pytest.mark.parametrize("is_connect", [1, 2, 0xFF])
def test_uot_version_2_connected(is_connect):
    server = Uot2ServerFraming()
    assert server.receive(bytes((is_connect,)) + bytes.fromhex("01 01020304 0035  0002 6869  0000  0001 61")) == [
        V4 + b"hi",
        V4,
        V4 + b"a",
    ]
    assert server.frame(V4, b"hi") == bytes.fromhex("0002 6869")


def test_uot_version_2_unconnected():
    server = Uot2ServerFraming()
    assert server.receive(bytes.fromhex("00 03 0b 6578616d706c652e636f6d 0035  00 01020304 0035 0002 6869")) == [
        V4 + b"hi"
    ]
    assert server.frame(V6, b"hi") == bytes.fromhex("01 00000000000000000000000000000001 0035 0002 6869")


@pytest.mark.parametrize(
    ("framing", "header", "length", "reason"),
    [
        (GostFraming, V4, 0, "datagram-empty"),
        (GostFraming, V4, MAX_GOST - 9, "datagram-oversize"),
        (HevFraming, V4, 0, "datagram-empty"),
        (HevFraming, V4, MAX_HEV - 6, "datagram-oversize"),
        (HevFraming, V6, MAX_HEV - 18, "datagram-oversize"),
        (HevFraming, write_datagram_header("x" * 249, 1), 1, "datagram-oversize"),
        (UotFraming, V4, MAX_UOT + 1, "datagram-oversize"),
        (Uot2Framing, V4, MAX_UOT + 1, "datagram-oversize"),
    ],
)
def test_what_breaks_the_peer_is_not_written(framing, header, length, reason):
    with pytest.raises(ProtocolError) as caught:
        framing().frame(header, bytes(length))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("framing", "header", "length"),
    [
        (GostFraming, V4, MAX_GOST - 10),
        (HevFraming, V4, 1493),
        (HevFraming, V6, 1481),
        (HevFraming, write_datagram_header("x" * 248, 1), 1),
        (UotFraming, V4, MAX_UOT),
        (UotFraming, V4, 0),
    ],
)
def test_the_largest_and_smallest(framing, header, length):
    assert framing().receive(framing().frame(header, bytes(length))) == [header + bytes(length)]


def chunks(data, cuts):
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


hosts = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16), st.text("abc.", max_size=60))
datagrams = st.tuples(
    st.builds(write_datagram_header, hosts, st.integers(0, 65535)), st.binary(min_size=1, max_size=40)
)
cuts = st.lists(st.integers(0, 2000), max_size=12)


@pytest.mark.parametrize("pair", PAIRS)
@given(sent=st.lists(datagrams, max_size=6), cuts=cuts)
def test_any_chunking_gives_the_same_datagrams(pair, sent, cuts):
    writer, reader = (make() for make in PAIRS[pair])
    stream = b"".join(writer.frame(header, memoryview(payload)) for header, payload in sent)
    received = [datagram for piece in chunks(stream, cuts) for datagram in reader.receive(piece)]
    assert received == [header + payload for header, payload in sent]
    assert reader.error is None
    assert not reader.is_in_frame


@pytest.mark.parametrize("framing", [GostFraming, HevFraming, UotFraming, Uot2ServerFraming])
@given(stream=st.binary(max_size=300), cuts=cuts)
@example(stream=bytes.fromhex("0002 0a 01 01020304 0035 6869 0001 0a 09 ff"), cuts=[])
@example(stream=bytes.fromhex("01 01 01020304 0035 0002 6869 ffff"), cuts=[3])
def test_random_bytes_are_datagrams_or_an_error_however_they_come(framing, stream, cuts):
    whole, pieces = framing(), framing()
    expected = whole.receive(stream)
    assert [datagram for piece in chunks(stream, cuts) for datagram in pieces.receive(piece)] == expected
    assert str(pieces.error) == str(whole.error)
    for datagram in expected:
        assert datagram_header_length(datagram)


def test_what_is_held_is_less_than_one_frame():
    gost = GostFraming()
    stream = b"\xff\xff\x00\x03\xff"
    for _ in range(66):
        assert gost.receive(stream) == []
        stream = bytes(1000)
    assert gost.is_in_frame
    assert gost.receive(bytes(262 + 65535 - 5 - 65000)) != []
    assert not gost.is_in_frame
