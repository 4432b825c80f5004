"""The Internet checksum, against dpkt's."""

import struct

import dpkt
from hypothesis import given
from hypothesis import strategies as st

from workers.wire.checksum import checksum, ones_sum, pseudo_sum, verify
from workers.wire.udp import DatagramHeaders, packet_of, split_key

ADDRESS4 = st.binary(min_size=4, max_size=4)
ADDRESS6 = st.binary(min_size=16, max_size=16)
PORT = st.integers(0, 65535)


def same(left, right):
    """Compare checksums: 0 and 65,535 are both zero."""
    return left % 65535 == right % 65535


@given(st.binary(min_size=1, max_size=100))
def test_checksum_is_dpkt_s(data):
    assert same(checksum(data), dpkt.dpkt.in_cksum(data))
    assert same(65535 - ones_sum(data), dpkt.dpkt.in_cksum(data))


@given(st.binary(min_size=2, max_size=100), st.integers(0, 65534))
def test_what_includes_its_checksum_verifies(data, initial):
    data = data[: len(data) & ~1]
    field = checksum(data, initial)
    assert 0 <= field <= 65535
    assert verify(data + field.to_bytes(2), initial)
    assert not verify(data + (field ^ 0x1234).to_bytes(2), initial)


def test_an_odd_octet_is_the_high_one():
    assert checksum(b"\x12") == checksum(b"\x12\x00")
    assert checksum(b"") == 65535
    assert checksum(memoryview(b"\x12\x34\x56")) == checksum(b"\x12\x34\x56\x00")


@given(ADDRESS4, ADDRESS4, PORT, st.binary(max_size=50))
def test_pseudo_header_of_ipv4(source, destination, protocol, data):
    pseudo = source + destination + struct.pack(">HH", protocol & 0xFF, len(data))
    assert same(pseudo_sum(source, destination, protocol & 0xFF, len(data)), ones_sum(pseudo))


@given(ADDRESS6, ADDRESS6, st.integers(0, 255), st.integers(0, 65535))
def test_pseudo_header_of_ipv6(source, destination, protocol, length):
    pseudo = source + destination + struct.pack(">II", length, protocol)
    assert same(pseudo_sum(source, destination, protocol, length), ones_sum(pseudo))


@given(st.one_of(st.tuples(ADDRESS4, ADDRESS4), st.tuples(ADDRESS6, ADDRESS6)), PORT, PORT, st.binary(max_size=60))
def test_headers_of_datagrams_are_those_of_dpkt(addresses, sport, dport, payload):
    source, destination = addresses
    headers = DatagramHeaders(source, sport, destination, dport, 1500)
    packet = (headers.of(len(payload)) + payload)[10:]
    udp = dpkt.udp.UDP(sport=sport, dport=dport, ulen=8 + len(payload), data=payload)
    if len(source) == 4:
        expected = dpkt.ip.IP(src=source, dst=destination, p=17, ttl=64, df=1, data=udp)
        assert verify(packet[:20])
        size = 20
    else:
        expected = dpkt.ip6.IP6(src=source, dst=destination, nxt=17, hlim=64, plen=len(udp), data=udp)
        size = 40
    theirs = bytes(expected)
    assert packet[:10] == theirs[:10] and packet[12 : size + 6] == theirs[12 : size + 6]
    assert packet[size + 8 :] == theirs[size + 8 :] == payload
    field = int.from_bytes(packet[size + 6 : size + 8])
    assert field != 0
    completed = checksum(packet[size : size + 6] + bytes(2) + payload, field)
    assert same(completed, int.from_bytes(theirs[size + 6 : size + 8]))
    assert headers.of(len(payload)) == headers.header
    assert headers.size == len(payload)
    assert len(headers.header) == headers.length
    assert headers.max_payload == 1500 - size - 8


@given(st.one_of(st.tuples(ADDRESS4, ADDRESS4), st.tuples(ADDRESS6, ADDRESS6)), PORT, PORT, st.binary(max_size=60))
def test_quoted_packets_say_whose_they_are(addresses, sport, dport, payload):
    key = addresses[0] + addresses[1] + sport.to_bytes(2) + dport.to_bytes(2)
    assert split_key(key) == (addresses[0], sport, addresses[1], dport)
    packet = packet_of(key, payload)
    parsed = dpkt.ip.IP(packet) if len(key) == 12 else dpkt.ip6.IP6(packet)
    assert (parsed.src, parsed.dst) == addresses
    udp = dpkt.udp.UDP(packet[20 if len(key) == 12 else 40 :])
    assert (udp.sport, udp.dport, udp.ulen, bytes(udp.data)) == (sport, dport, 8 + len(payload), payload)
    if len(key) == 12:
        assert verify(packet[:20])
