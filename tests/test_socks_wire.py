"""SOCKS5 byte formats: known bytes, round trips, and every kind of garbage."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.socks.wire import (
    REPLY_TEXT,
    ProtocolError,
    datagram_header_length,
    parse_address,
    parse_datagram,
    write_address,
    write_datagram_header,
)

LOOPBACK6 = socket.inet_pton(socket.AF_INET6, "::1")

hosts = st.one_of(
    st.binary(min_size=4, max_size=4),
    st.binary(min_size=16, max_size=16),
    st.text(st.characters(codec="utf-8"), max_size=63),
)
ports = st.integers(0, 65535)


@pytest.mark.parametrize(
    ("host", "port", "wire"),
    [
        (b"\x01\x02\x03\x04", 53, "01 01020304 0035"),
        (LOOPBACK6, 65535, "04 00000000000000000000000000000001 ffff"),
        ("example.com", 80, "03 0b 6578616d706c652e636f6d 0050"),
        ("", 0, "03 00 0000"),
    ],
)
def test_known_addresses(host, port, wire):
    data = bytes.fromhex(wire)
    assert write_address(host, port) == data
    assert parse_address(b"??" + data + b"rest", 2) == (host, port, 2 + len(data))


@given(hosts, ports)
def test_what_is_written_is_read(host, port):
    data = write_address(host, port)
    for kind in (bytes, bytearray, memoryview):
        assert parse_address(kind(data), 0) == (host, port, len(data))
    assert all(parse_address(data[:n], 0) is None for n in range(len(data)))


@given(st.binary(max_size=300), st.integers(0, 5))
def test_any_bytes_are_an_address_or_an_error(data, at):
    try:
        parsed = parse_address(data, at)
    except ProtocolError as error:
        assert error.reason == "address-type"
        return
    if parsed:
        host, port, end = parsed
        assert write_address(host, port) == data[at:end]


@pytest.mark.parametrize(("host", "port"), [("x" * 256, 1), (b"12345", 1), (b"1234", 65536), (b"1234", -1)])
def test_what_has_no_form_is_refused(host, port):
    with pytest.raises(ValueError):
        write_address(host, port)


def test_the_datagram_of_rfc_1928():
    data = bytes.fromhex("0000 00 01 01020304 0035 6869")
    assert write_datagram_header(b"\x01\x02\x03\x04", 53) + b"hi" == data
    assert parse_datagram(data) == (b"\x01\x02\x03\x04", 53, 10)
    assert datagram_header_length(data) == 10


@given(hosts, ports, st.binary(max_size=20))
def test_datagrams_round_trip(host, port, payload):
    header = write_datagram_header(host, port)
    assert datagram_header_length(header + payload) == len(header)
    assert datagram_header_length(b"junk" + header + payload, 4) == len(header)
    assert parse_datagram(memoryview(header + payload)) == (host, port, len(header))


@given(st.binary(max_size=64))
def test_any_bytes_are_a_datagram_or_an_error(data):
    length = datagram_header_length(data)
    try:
        _, _, end = parse_datagram(data)
    except ProtocolError as error:
        assert error.reason in {"datagram-short", "datagram-fragment", "address-type"}
        assert error.reason == "datagram-fragment" or not length
    else:
        assert end == length <= len(data)


def test_a_fragment_is_named():
    with pytest.raises(ProtocolError) as caught:
        parse_datagram(bytes.fromhex("0000 81 01 01020304 0035 6869"))
    assert caught.value.reason == "datagram-fragment"


def test_every_reply_code_has_a_text():
    assert sorted(REPLY_TEXT) == list(range(9))
