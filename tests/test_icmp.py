"""ICMP of a worker: pings of our own addresses, and errors with all that forbids one."""

import socket

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.shard import OWN4, OWN6, Shard, whole_packets
from workers import counts
from workers.icmp import ADMIN, ERRORS_BURST, HOST, NET, PORT
from workers.wire.checksum import pseudo_sum, verify

CLIENT4 = bytes([198, 18, 0, 1])
CLIENT6 = socket.inet_pton(socket.AF_INET6, "fd72:6e67:7761:7900::1")
TARGET4 = bytes([192, 0, 2, 9])
TARGET6 = socket.inet_pton(socket.AF_INET6, "2001:db8::9")


@pytest.fixture
def shard():
    made = Shard()
    yield made
    made.close()


def echo(version, destination, payload, source=None, kind=None):
    data = dpkt.icmp.ICMP.Echo(id=7, seq=9, data=payload)
    if version == 4:
        message = dpkt.icmp.ICMP(type=8 if kind is None else kind, data=data)
        return bytes(dpkt.ip.IP(src=source or CLIENT4, dst=destination, p=1, ttl=3, data=message))
    message = dpkt.icmp6.ICMP6(type=128 if kind is None else kind, data=data)
    return bytes(
        dpkt.ip6.IP6(src=source or CLIENT6, dst=destination, nxt=58, hlim=3, plen=8 + len(payload), data=message)
    )


def datagram(version, payload=b"question", **fields):
    udp = dpkt.udp.UDP(sport=1000, dport=53, data=payload, ulen=8 + len(payload))
    if version == 4:
        return bytes(dpkt.ip.IP(**{"src": CLIENT4, "dst": TARGET4, "p": 17, "data": udp} | fields))
    return bytes(dpkt.ip6.IP6(**{"src": CLIENT6, "dst": TARGET6, "nxt": 17, "plen": len(udp), "data": udp} | fields))


def only(shard):
    """Return the one packet sent, its checksums verified."""
    [frame] = whole_packets(shard.sent)
    assert frame[:10] == bytes(10)
    packet = frame[10:]
    if packet[0] >> 4 == 4:
        assert verify(packet[:20])
        assert verify(packet[20:])
        assert int.from_bytes(packet[2:4]) == len(packet)
        return dpkt.ip.IP(packet)
    assert int.from_bytes(packet[4:6]) == len(packet) - 40
    assert verify(packet[40:], pseudo_sum(packet[8:24], packet[24:40], 58, len(packet) - 40))
    return dpkt.ip6.IP6(packet)


@pytest.mark.parametrize("size", [0, 1, 56, 1400, 8000, 65000])
@pytest.mark.parametrize("version", [4, 6])
def test_a_ping_of_our_own_address_is_answered(shard, version, size):
    payload = bytes(range(251)) * (size // 251 + 1)
    shard.receive(echo(version, OWN4 if version == 4 else OWN6, payload[:size]), handler=shard.icmp.frame_arrives)
    packet = only(shard)
    assert (packet.src, packet.dst) == ((OWN4, CLIENT4) if version == 4 else (OWN6, CLIENT6))
    answer = packet.data
    assert answer.type == (0 if version == 4 else 129)
    assert (answer.data.id, answer.data.seq, bytes(answer.data.data)) == (7, 9, payload[:size])
    assert shard.counted(counts.ICMP_ECHO_REPLIES) == 1


@given(st.binary(max_size=64), st.sampled_from([4, 6]))
def test_checksums_of_answers_are_right_for_any_payload(payload, version):
    shard = Shard()
    shard.receive(echo(version, OWN4 if version == 4 else OWN6, payload), handler=shard.icmp.frame_arrives)
    only(shard)
    shard.close()


@pytest.mark.parametrize(
    "packet",
    [
        echo(4, TARGET4, b"x"),
        echo(6, TARGET6, b"x"),
        echo(4, OWN4, b"x", kind=0),
        echo(6, OWN6, b"x", kind=129),
        echo(4, OWN4, b"x", source=bytes(4)),
        echo(6, OWN6, b"x", source=bytes(16)),
    ],
)
def test_anything_else_is_ignored_and_counted(shard, packet):
    shard.receive(packet, handler=shard.icmp.frame_arrives)
    assert not shard.sent
    assert shard.counted(counts.ICMP_IGNORED) == 1


@pytest.mark.parametrize("version", [4, 6])
def test_wrong_checksums_and_short_messages_are_dropped(shard, version):
    good = echo(version, OWN4 if version == 4 else OWN6, b"payload")
    shard.receive(good[:-1] + b"!", handler=shard.icmp.frame_arrives)
    assert shard.counted(counts.BAD_CHECKSUM) == 1
    shard.receive(good[: (20 if version == 4 else 40) + 7], handler=shard.icmp.frame_arrives)
    assert shard.counted(counts.MALFORMED) == 1
    assert not shard.sent


@pytest.mark.parametrize(
    ("code", "kind4", "kind6"),
    [(NET, (3, 0), (1, 0)), (HOST, (3, 1), (1, 3)), (PORT, (3, 3), (1, 4)), (ADMIN, (3, 13), (1, 1))],
)
@pytest.mark.parametrize("version", [4, 6])
def test_an_error_quotes_the_packet(shard, version, code, kind4, kind6):
    about = datagram(version)
    shard.icmp.unreachable(about, code)
    packet = only(shard)
    assert (packet.src, packet.dst) == ((OWN4, CLIENT4) if version == 4 else (OWN6, CLIENT6))
    assert (packet.data.type, packet.data.code) == (kind4 if version == 4 else kind6)
    assert bytes(packet)[-len(about) :] == about
    assert shard.counted(counts.ICMP_ERRORS_SENT) == 1


@pytest.mark.parametrize(("version", "limit"), [(4, 576), (6, 1280)])
def test_an_error_is_cut_to_what_any_path_takes(shard, version, limit):
    shard.icmp.unreachable(datagram(version, bytes(4000)), PORT)
    only(shard)
    assert len(shard.sent[0]) == 10 + limit


@pytest.mark.parametrize(
    "about",
    [
        datagram(4, src=bytes(4)),
        datagram(4, src=bytes([127, 0, 0, 1])),
        datagram(4, src=bytes([224, 0, 0, 1])),
        datagram(4, src=b"\xff" * 4),
        datagram(4, dst=bytes([239, 1, 1, 1])),
        datagram(4, dst=b"\xff" * 4),
        datagram(4, _flags_offset=1),
        datagram(6, src=bytes(16)),
        datagram(6, src=b"\xff\x02" + bytes(14)),
        datagram(6, dst=b"\xff\x02" + bytes(14)),
        echo(4, TARGET4, b"x", kind=3),
        echo(4, TARGET4, b"x", kind=11),
        echo(6, TARGET6, b"x", kind=1),
        echo(6, TARGET6, b"x", kind=2),
        # behind a destination-options header, and behind a fragment header with an offset
        datagram(6, nxt=60, data=b"\x3a\0" + bytes(6) + b"\x01" + bytes(7)),
        datagram(6, nxt=44, data=b"\x11\0\0\x08" + bytes(12)),
        b"",
        b"\x45" + bytes(19),
        b"\x60" + bytes(44),
    ],
)
def test_no_error_about_what_the_rfcs_exempt(shard, about):
    shard.icmp.unreachable(about, PORT)
    assert not shard.sent


@given(st.binary(max_size=100), st.sampled_from([0x45, 0x4F, 0x60, 0x00]))
def test_no_packet_raises(garbage, first):
    shard = Shard()
    shard.icmp.unreachable(bytes([first]) + garbage, HOST)
    shard.close()


def test_an_echo_request_may_be_answered_by_an_error(shard):
    shard.icmp.unreachable(echo(4, TARGET4, b"x"), HOST)
    shard.icmp.unreachable(echo(6, TARGET6, b"x"), HOST)
    assert len(shard.sent) == 2


def test_errors_are_limited(shard):
    for _ in range(3 * ERRORS_BURST):
        shard.icmp.unreachable(datagram(4), PORT)
    assert ERRORS_BURST <= len(shard.sent) < 3 * ERRORS_BURST
    assert shard.counted(counts.ICMP_ERRORS_LIMITED) == 3 * ERRORS_BURST - len(shard.sent)


def test_without_an_address_of_our_own_there_is_no_error():
    shard = Shard(own_address6=b"")
    shard.icmp.unreachable(datagram(6), PORT)
    assert not shard.sent
    shard.close()
