"""Datagrams inside the TCP connection to the proxy: each dialect both ways, what no frame holds, tunnels that stall."""

import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.shard import CLIENT6, Shard, datagrams, udp_packet, unreachable
from tests.socksproxy import Proxy
from workers import counts
from workers.socks import modes
from workers.udp import Udp
from workers.udp.tunnel import MAX_UNSENT

TARGET4 = b"\x08\x08\x08\x08"
TARGET6 = socket.inet_pton(socket.AF_INET6, "2606:4700::1111")
V4 = "01 08080808 0063"
V6 = "04 26064700000000000000000000001111 0063"
GOLDEN = {  # frames of b"hi" and b"you": request, stream up to IPv4, to IPv6; frame down
    modes.GOST: ("05 f3 00 01 000000000000", f"0002 00 {V4} 6869 0003 00 {V4} 796f75", f"0002 00 {V6} 6869"),
    modes.HEV: ("05 05 00 01 000000000000", f"0002 0a {V4} 6869 0003 0a {V4} 796f75", f"0002 16 {V6} 6869"),
    modes.UOT: (
        "05 01 00 03 17 73702e76322e7564702d6f7665722d7463702e61727061 0000",
        f"00 {V4} 00 08080808 0063 0002 6869 00 08080808 0063 0003 796f75",
        f"00 {V6} 01 26064700000000000000000000001111 0063 0002 6869",
    ),
}
DIALECTS = sorted(GOLDEN)


def make(**settings):
    shard = Shard(**{"scheme": "socks5", **settings})
    shard.udp = Udp(shard)
    shard.proxy = Proxy(shard)
    return shard


def end(shard):
    shard.proxy.stop()
    shard.close()


@pytest.fixture(params=DIALECTS)
def dialect(request):
    return request.param


@pytest.fixture
def shard(dialect):
    made = make(udp_mode=dialect)
    yield made
    end(made)


def opened(shard, **settings):
    """Let one datagram open a tunnel; return the proxy's end."""
    shard.receive(udp_packet(b"hi", **settings))
    shard.run_until(lambda: shard.proxy.stream)
    [control] = shard.proxy.clients
    return control


def test_golden_bytes(shard, dialect):
    request, stream, _ = GOLDEN[dialect]
    shard.receive(udp_packet(b"hi"), udp_packet(b"you"))
    up = bytes.fromhex(stream)
    shard.run_until(lambda: len(shard.proxy.stream) >= len(up))
    assert shard.proxy.requests == [bytes.fromhex(request)]
    assert shard.proxy.stream == up
    assert shard.counted(counts.UDP_DATAGRAMS_UP) == 2


def test_golden_bytes_to_ipv6(shard, dialect):
    opened(shard, source=CLIENT6, destination=TARGET6)
    assert shard.proxy.stream == bytes.fromhex(GOLDEN[dialect][2])


def frame(dialect, payload, host=TARGET4):
    length = len(payload).to_bytes(2)
    if dialect == modes.UOT:
        return b"\x00" + host + b"\x00\x63" + length + payload
    return length + (b"\x0a" if dialect == modes.HEV else b"\xff") + b"\x01" + host + b"\x00\x63" + payload


@given(st.lists(st.integers(1, 40), max_size=20), st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_answers_in_any_pieces(cuts, payloads):
    for dialect in DIALECTS:
        shard = make(udp_mode=dialect)
        try:
            control = opened(shard)
            stream = b"".join(frame(dialect, payload) for payload in payloads)
            at = 0
            for cut in [*cuts, len(stream)]:
                control.send(stream[at : at + cut]) if at < len(stream) else None
                at += cut
                shard.poll(0)
            got = []

            def all_there(got=got, shard=shard):
                got.extend(one for sent in shard.sent for one in datagrams(sent))
                shard.sent.clear()
                return len(got) >= len(payloads)

            shard.run_until(all_there)
            assert [one[4] for one in got] == payloads
            assert {one[:2] for one in got} == {(TARGET4, 99)}
        finally:
            end(shard)


def test_garbage_ends_the_tunnel(shard):
    opened(shard).send(b"\x09" * 100)
    shard.run_until(lambda: not shard.counted(counts.UDP_ASSOCIATIONS))
    assert shard.counted(counts.UDP_DROPPED_BAD_HEADER) == 1


def test_empty_datagrams_are_never_sent(shard):
    opened(shard)
    before = shard.proxy.stream
    shard.receive(udp_packet(b""))
    shard.poll(0.01)
    assert shard.proxy.stream == before
    assert shard.counted(counts.UDP_DROPPED_EMPTY) == 1


@pytest.mark.parametrize(("dialect", "size"), [(modes.HEV, 1494), (modes.UOT, 16001)])
def test_what_the_peer_would_break_on_is_dropped(shard, size):
    opened(shard)
    before = shard.proxy.stream
    shard.receive(udp_packet(b"x" * size))
    shard.poll(0.01)
    assert shard.proxy.stream == before
    assert shard.counted(counts.UDP_DROPPED_TOO_BIG) == 1


@pytest.mark.parametrize("dialect", [modes.GOST])
def test_a_tunnel_that_stalls_drops_whole_frames_and_goes_on(shard):
    control = opened(shard)
    shard.forget(control.fileno())
    shard.unpolled = control
    shard._epoll.unregister(control)
    payload = b"x" * 1400
    for _ in range(20000):
        shard.receive(udp_packet(payload))
        if shard.counted(counts.UDP_DROPPED_TUNNEL):
            break
    assert shard.counted(counts.UDP_DROPPED_TUNNEL) == 1
    [association] = shard.udp._associations.values()
    assert MAX_UNSENT < association._control.unsent <= MAX_UNSENT + 1500
    sent = shard.counted(counts.UDP_DATAGRAMS_UP)
    # What has been taken arrives, in whole frames, and what comes now finds room again.
    stream = bytearray()
    control.setblocking(False)

    def drained():
        try:
            while data := control.recv(1 << 20):
                stream.extend(data)
        except BlockingIOError:
            pass
        return association._control.unsent == 0

    shard.run_until(drained, 20)
    shard.receive(udp_packet(b"last"))
    shard.run_until(lambda: drained() and stream.endswith(b"last"))
    one = frame(modes.GOST, payload).replace(b"\xff", b"\x00", 1)
    assert bytes(stream[: 1410 * (sent - 1)]) == one * (sent - 1)
    shard.watch(control.fileno(), 1, lambda mask, now: None)


def test_gost_1_is_found_where_gost_2_is_not():
    shard = make(udp_mode=modes.GOST)
    shard.proxy.replies = {0xF3: None, 3: 0}  # gost 1 closes at a command that it does not know
    opened(shard)
    assert [request[1] for request in shard.proxy.requests] == [0xF3, 3]
    assert shard.proxy.stream == bytes.fromhex(f"0002 00 {V4} 6869")
    shard.receive(udp_packet(b"hi", sport=2000))
    shard.run_until(lambda: len(shard.proxy.requests) == 3)
    assert shard.proxy.requests[2][1] == 3
    end(shard)


@pytest.mark.parametrize("reply", [7, 1, None])
def test_a_proxy_without_the_dialect(shard, dialect, reply):
    shard.proxy.reply = reply
    shard.receive(udp_packet(b"hi"))
    shard.run_until(lambda: shard.sent)
    assert unreachable(shard.sent[0])[:2] == (3, 3)
    assert shard.events == []  # nobody probes for what a person chose
    asked = len(shard.proxy.requests)
    shard.receive(udp_packet(b"hi", sport=2000))
    assert len(shard.proxy.requests) == asked


def test_auto_takes_what_a_probe_finds():
    shard = make(udp_mode=modes.AUTO)
    shard.proxy.replies = {3: 7}
    shard.receive(udp_packet(b"hi"))
    shard.run_until(lambda: shard.sent)
    assert shard.events == [{"event": "udp-failed"}]
    shard.udp.availability.use(modes.HEV)
    opened(shard)
    assert [request[1] for request in shard.proxy.requests] == [3, 5]
    end(shard)


def test_uot_through_an_http_proxy_needs_nothing_but_connect():
    shard = Shard(scheme="http", udp_mode=modes.AUTO, udp_found=modes.UOT)
    shard.udp = Udp(shard)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        shard.upstream.use_addresses([listener.getsockname()])
        shard.receive(udp_packet(b"hi"))
        control, _ = listener.accept()
        shard.poll(0.1)
        assert control.recv(1000).startswith(b"CONNECT sp.v2.udp-over-tcp.arpa:0 HTTP/1.1\r\n")
        control.send(b"HTTP/1.1 200 OK\r\n\r\n")
        shard.run_until(lambda: shard.counted(counts.UDP_DATAGRAMS_UP))
        assert control.recv(1000).endswith(b"hi")
        control.close()
    shard.close()


def test_gost_1_grants_an_association_and_answers_inside_tcp():
    shard = make(udp_mode=modes.AUTO)
    shard.receive(udp_packet(b"hi"))
    shard.run_until(lambda: shard.proxy.datagrams)
    [control] = shard.proxy.clients
    # What came to its port goes to the client of the connection, from wherever it came.
    control.send(b"\x00\x0c\x00\x01\x7f\x00\x00\x01\x12\x34" + bytes(12))
    shard.run_until(lambda: not shard.counted(counts.UDP_ASSOCIATIONS))
    assert shard.events == [{"event": "udp-found", "udp": "gost-v1"}]
    shard.receive(udp_packet(b"hi"))
    shard.run_until(lambda: shard.proxy.stream)
    assert shard.proxy.stream == bytes.fromhex(f"0002 00 {V4} 6869")
    assert len(shard.proxy.datagrams) == 1
    end(shard)
