"""SOCKS4 and SOCKS4a: golden bytes, any chunking, what the protocol cannot say."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.socks.socks4 import socks4_handshake
from workers.socks.wire import CONNECT, UDP_ASSOCIATE, ProtocolError

TARGET = b"\x01\x02\x03\x04"
GRANTED = bytes.fromhex("00 5a 0050 01020304")


def outcome(handshake):
    return handshake.done, handshake.reply, handshake.bound, handshake.surplus


@pytest.mark.parametrize(
    ("host", "user", "names", "wire"),
    [
        (TARGET, "", False, "04 01 0050 01020304 00"),
        (TARGET, "me", True, "04 01 0050 01020304 6d65 00"),
        (bytes(4), "", True, "04 01 0050 00000000 00"),
        ("a.example", "me", True, "04 01 0050 00000001 6d65 00 612e6578616d706c65 00"),
        (
            socket.inet_pton(socket.AF_INET6, "2001:db8::1"),
            "",
            True,
            "04 01 0050 00000001 00 323030313a6462383a3a31 00",
        ),
        (b"\0\0\0\x07", "", True, "04 01 0050 00000001 00 302e302e302e37 00"),
    ],
)
def test_requests(host, user, names, wire):
    handshake = socks4_handshake(CONNECT, host, 80, user, names)
    assert handshake.first_bytes == bytes.fromhex(wire)
    assert handshake.requested and not handshake.done


@pytest.mark.parametrize(
    ("command", "host", "names", "reply"),
    [
        (CONNECT, bytes(15) + b"\1", False, 3),
        (CONNECT, b"\0\0\0\1", False, 3),
        (CONNECT, "a.example", False, 8),
        (CONNECT, "a\0b", True, 8),
        (CONNECT, "a" * 256, True, 8),
        (UDP_ASSOCIATE, bytes(4), True, 7),
    ],
)
def test_what_it_cannot_say_is_refused_without_a_connection(command, host, names, reply):
    handshake = socks4_handshake(command, host, 80, "", names)
    assert (handshake.done, handshake.reply, handshake.bound, handshake.first_bytes) == (True, reply, None, b"")


@given(st.lists(st.integers(0, 20), max_size=12), st.sampled_from([b"\0", b"\4"]), st.binary(max_size=20))
def test_granted_in_any_pieces(cuts, first, surplus):
    handshake = socks4_handshake(CONNECT, TARGET, 80)
    stream = first + GRANTED[1:] + surplus
    at = 0
    for cut in [*cuts, len(stream)]:
        assert handshake.receive(stream[at : at + cut]) == b""
        at += cut
    assert outcome(handshake) == (True, 0, (TARGET, 80), surplus)


@pytest.mark.parametrize(("code", "reply"), [(0x5B, 1), (0x5C, 2), (0x5D, 2), (0, 1), (0xFF, 1)])
def test_refusals(code, reply):
    handshake = socks4_handshake(CONNECT, TARGET, 80)
    handshake.receive(b"\0" + bytes([code]))  # servers cut the rest short
    handshake.receive(bytes(6))
    assert outcome(handshake) == (True, reply, None, b"")


def test_a_user_id_must_fit():
    for user in ("u" * 256, "u\0v"):
        with pytest.raises(ValueError, match="user id"):
            socks4_handshake(CONNECT, TARGET, 80, user)


@given(st.binary(max_size=40))
def test_any_bytes(data):
    handshake = socks4_handshake(CONNECT, TARGET, 80)
    try:
        assert handshake.receive(data) == b""
    except ProtocolError as error:
        assert error.reason == "socks-version"
