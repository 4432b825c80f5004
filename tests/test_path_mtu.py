"""ICMP errors from the clients' side: "too big" makes segments smaller, if it can be believed."""

import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.loopback import ALL_OPTIONS, connected, relay_of
from tests.one_worker import MASK, TRUSTED, Answer, OneWorker
from workers import counts, icmperrors
from workers.tcp.segment import ACK, RST
from workers.wire.checksum import checksum, pseudo_sum

ROUTER = {4: socket.inet_aton("192.168.7.1"), 6: socket.inet_pton(socket.AF_INET6, "fd00:7::1")}
HEADERS = {4: 40, 6: 60}


@pytest.fixture(params=[4, 6])
def version(request):
    return request.param


@pytest.fixture
def one():
    made = OneWorker()
    yield made
    made.close()


def icmp(version, destination, kind, code, word, quote, source=None):
    """Make an ICMP error with a right checksum."""
    source = source or ROUTER[version]
    message = bytes((kind, code)) + bytes(2) + struct.pack(">I", word) + quote
    initial = 0 if version == 4 else pseudo_sum(source, destination, 58, len(message))
    message = message[:2] + checksum(message, initial).to_bytes(2, "big") + message[4:]
    if version == 4:
        header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(message), 0, 0, 64, 1, 0) + source + destination
        return header[:10] + checksum(header).to_bytes(2, "big") + header[12:] + message
    return struct.pack(">IHBB", 6 << 28, len(message), 58, 64) + source + destination + message


def too_big(answer, mtu, quoted=None):
    """Make the error of a router that cannot pass on a packet of ours; it quotes no more than RFC 792 demands."""
    version = answer.packet[0] >> 4
    quote = quoted or answer.packet[: 28 if version == 4 else 48]
    kind, code = (3, 4) if version == 4 else (2, 0)
    return icmp(version, answer.source, kind, code, mtu, quote)


def text_in_flight(one, version, octets=10_000, options=ALL_OPTIONS):
    """Return (client, target, text, the answers that carry it): sent, and not acknowledged."""
    client, target = connected(one, options, version)
    text = bytes(i % 251 for i in range(octets))
    target.sendall(text)
    answers = []

    def all_sent():
        answers.extend(Answer(frame) for frame in one.take_sent())
        return sum(map(len, [answer.text for answer in answers])) >= octets

    one.run_until(all_sent)
    return client, target, text, [answer for answer in answers if answer.text]


def test_too_big_makes_segments_smaller_and_sends_again_what_was_lost(one, version):
    client, target, text, [first, *_] = text_in_flight(one, version)
    with target:
        conn = relay_of(one).conn
        cwnd = conn.congestion.cwnd
        one.receive(too_big(first, 1400), vnet=bytes(10))
        assert conn.smss == 1400 - HEADERS[version] - 12
        assert one.counted(counts.TCP_PATH_MTU) == 1
        again = [answer for answer in client.unread() if answer.text]
        assert again[0].seq == first.seq
        assert all(answer.gso_size in (0, conn.smss) for answer in again)
        assert all(len(answer.text) <= conn.smss for answer in again if not answer.gso_size)
        assert conn.congestion.cwnd == cwnd  # it was no congestion
        assert client.read(len(text)) == text
        target.sendall(bytes(8000))
        client.read(len(text) + 8000)
        assert all(answer.gso_size in (0, conn.smss) for answer in client.unread())


def test_a_path_mtu_is_remembered_for_the_next_connections_and_forgotten(one, version):
    client, target, text, [first, *_] = text_in_flight(one, version)
    one.receive(too_big(first, 1300))
    client.read(len(text))
    client.send(RST)
    target.close()
    smss = 1300 - HEADERS[version] - 12
    _, second = connected(one, ALL_OPTIONS, version, 40001)
    with second:
        [conn] = [flow.conn for key, flow in one.table.items() if key[-4:-2] == (40001).to_bytes(2)]
        assert (conn.smss, conn.announced_mss) == (smss, 1500 - HEADERS[version])
        _, tiny = connected(one, "mss 536", version, 40002)
        with tiny:
            assert min(flow.conn.smss for flow in one.table.values()) == 536
    one.skip(601)
    one.take_sent()  # the ends of the others
    _, third = connected(one, ALL_OPTIONS, version, 40003)
    with third:
        [conn] = [flow.conn for key, flow in one.table.items() if key[-4:-2] == (40003).to_bytes(2)]
        assert conn.smss > smss
    assert not one.worker.tcp.icmp_errors._known


def test_few_paths_are_remembered(one, monkeypatch):
    monkeypatch.setattr(icmperrors, "MAX_KNOWN", 3)
    errors = one.worker.tcp.icmp_errors
    for last in range(5):
        errors._learn(bytes((10, 0, 0, last)), 1000 + last, 0.0)
    errors._learn(bytes((10, 0, 0, 3)), 900, 0.0)
    assert list(errors._known) == [bytes((10, 0, 0, last)) for last in (2, 4, 3)]


@pytest.mark.parametrize(("mtu", "floor"), [(68, 552), (551, 552), (0, 1006), (1, 552)])
def test_the_floor_of_ipv4(one, mtu, floor):
    """Nothing, or next to nothing, is no MTU; a router that names none gets the next plateau (RFC 1191, 7.1)."""
    _, target, _, [first, *_] = text_in_flight(one, 4)
    with target:
        quote = first.packet[:2] + (1492).to_bytes(2, "big") + first.packet[4:28]
        one.receive(too_big(first, mtu, quote))
        assert relay_of(one).conn.smss == floor - 52


@pytest.mark.parametrize("mtu", [0, 68, 1279])
def test_the_floor_of_ipv6(one, mtu):
    _, target, _, [first, *_] = text_in_flight(one, 6)
    with target:
        one.receive(too_big(first, mtu))
        assert relay_of(one).conn.smss == 1280 - 72


@pytest.mark.parametrize("ahead", [-1, -70_000, 10_000, 1 << 31])
def test_a_forged_sequence_number_is_not_believed(one, version, ahead):
    """RFC 5927, 4.1: only what is in flight."""
    client, target, text, [first, *_] = text_in_flight(one, version)
    with target:
        at = HEADERS[version] - 20 + 4
        quote = first.packet[:at] + ((first.seq + ahead) & MASK).to_bytes(4, "big")
        with one.standstill():
            client.unread()  # the probe of a tail that was sent while the machine was slow
            one.receive(too_big(first, 600, quote))
            assert one.counted(counts.ICMP_STALE) == 1
            assert one.counted(counts.TCP_PATH_MTU) == 0
            assert client.unread() == []
        assert client.read(len(text)) == text


def test_a_larger_mtu_changes_nothing(one, version):
    client, target, _, [first, *_] = text_in_flight(one, version)
    with target:
        smss = relay_of(one).conn.smss
        with one.standstill():
            client.unread()
            for mtu in (1500, 9000, 65535):
                one.receive(too_big(first, mtu))
            assert relay_of(one).conn.smss == smss
            assert client.unread() == []
        assert one.counted(counts.TCP_PATH_MTU) == 0


def test_what_is_acknowledged_is_not_in_flight(one, version):
    client, target, text, [first, *_] = text_in_flight(one, version)
    with target:
        client.answers = []
        client.rcv_nxt = (client.rcv_nxt + len(text)) & MASK
        client.acknowledge()
        one.receive(too_big(first, 1300))
        assert one.counted(counts.ICMP_STALE) == 1


@pytest.mark.parametrize(
    ("kind4", "code4", "kind6", "code6"),
    [(3, 0, 1, 0), (3, 1, 1, 3), (3, 3, 1, 4), (3, 13, 1, 1), (11, 0, 3, 0), (12, 0, 4, 1)],
)
def test_other_errors_end_no_connection(one, version, kind4, code4, kind6, code6):
    """RFC 5461: all of them are soft."""
    client, target, text, [first, *_] = text_in_flight(one, version)
    with target:
        kind, code = (kind4, code4) if version == 4 else (kind6, code6)
        quote = first.packet[: 28 if version == 4 else 48]
        one.receive(icmp(version, first.source, kind, code, 0, quote))
        assert one.counted(counts.ICMP_SOFT_ERRORS) == 1
        assert client.read(len(text)) == text
        assert not any(answer.flags & RST for answer in client.unread())


def test_errors_that_are_about_nothing_of_ours(one, version):
    client, target, text, [first, *_] = text_in_flight(one, version)
    with target:
        quote = first.packet[: 28 if version == 4 else 48]
        kind, code = (3, 4) if version == 4 else (2, 0)
        wrong = icmp(version, ROUTER[version], kind, code, 1300, quote)  # not sent to whom it quotes
        short = icmp(version, first.source, kind, code, 1300, quote[:-5])
        no_tcp = bytearray(quote)
        no_tcp[9 if version == 4 else 6] = 17
        udp = icmp(version, first.source, kind, code, 1300, bytes(no_tcp))
        one.receive(wrong, short, udp)
        assert one.counted(counts.ICMP_IGNORED) == 3
        bad = bytearray(too_big(first, 1300))
        bad[-1] ^= 1
        one.receive(bytes(bad), vnet=bytes(10))
        assert one.counted(counts.BAD_CHECKSUM) == 1
        no_flow = bytearray(quote)
        no_flow[-8:-4] = client.ports  # the wrong way round
        one.receive(icmp(version, first.source, kind, code, 1300, bytes(no_flow)))
        assert one.counted(counts.ICMP_STALE) == 1
        assert one.counted(counts.TCP_PATH_MTU) == 0
        assert client.read(len(text)) == text


def test_an_error_about_a_syn_ack_or_a_time_wait_does_no_harm(one, version):
    client, target = connected(one, version=version)
    target.close()
    client.answer()
    client.fin()
    fin = client.answer()
    one.receive(too_big(fin, 1300))
    assert one.counted(counts.TCP_PATH_MTU) == 0


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from((4, 6)),
    st.integers(0, 20),
    st.binary(max_size=80),
    st.lists(st.tuples(st.integers(0, 75), st.integers(0, 255)), max_size=4),
)
def test_mutated_errors_raise_nothing(version, kind, quote, changes):
    one = OneWorker()
    try:
        client, target, text, [first, *_] = text_in_flight(one, version, 3000)
        with target:
            packet = bytearray(too_big(first, 1300))
            for at, octet in changes:
                packet[at % len(packet)] = octet
            one.receive(bytes(packet), icmp(version, first.source, kind, 4, 1300, quote), vnet=TRUSTED)
            client.read(len(text)) if one.table else None
            assert client.received in (text, b"")
    finally:
        one.close()


@pytest.mark.parametrize("mtu", [576, 1280, 1500, 9000, 65535])
def test_the_mss_is_what_the_device_leaves(mtu, version):
    if version == 6 and mtu < 1280:
        return
    one = OneWorker(mtu=mtu)
    client, target = connected(one, f"mss {mtu - HEADERS[version]},sackOK,TS val 1 ecr 0,nop,wscale 7", version)
    with target:
        conn = relay_of(one).conn
        assert conn.announced_mss == mtu - HEADERS[version]
        assert conn.smss == min(mtu - HEADERS[version], 65435) - 12
        text = bytes(i % 251 for i in range(300_000))
        view = memoryview(text)

        def feed():
            nonlocal view
            try:
                view = view[target.send(view) :]
            except BlockingIOError:
                pass
            for answer in client.unread():
                assert len(answer.packet) <= mtu or 0 < answer.gso_size <= conn.smss
            if client.acked != client.rcv_nxt:
                client.send(ACK)
            return len(client.received) == len(text)

        one.run_until(feed, 20)
        assert client.received == text
    one.close()


def test_without_an_mss_option_the_version_decides(one, version):
    """RFC 9293, 3.7.1: 536, and 1220 over IPv6."""
    _, target = connected(one, "nop", version)
    with target:
        assert relay_of(one).conn.smss == (536 if version == 4 else 1220)


def test_the_client_of_a_small_mss_decides(one, version):
    _, target = connected(one, "mss 700", version)
    with target:
        assert relay_of(one).conn.smss == 700
