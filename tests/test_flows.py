"""Flows of a whole worker: Dial, Relay, TimeWait between a raw client and real sockets on loopback."""

import errno
import select
import socket
import struct
from contextlib import closing

import dpkt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipc.layout import TX_LARGE
from tests.loopback import (
    ALL_OPTIONS,
    Proxy,
    connected,
    listener,
    received,
    relay_of,
    reset_by,
    reset_received,
    slow,
    state,
)
from tests.one_worker import MASK, TRUSTED, Answer, OneWorker, RawClient
from workers import counts
from workers.tcp.segment import ACK, FIN, PSH, RST, SYN


@pytest.fixture(params=[4, 6])
def version(request):
    return request.param


@pytest.fixture
def one():
    made = OneWorker()
    yield made
    made.close()


# ── the handshake ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_bytes_both_ways_and_a_clean_end(one, version):
    client, target = connected(one, ALL_OPTIONS, version)
    with target:
        client.push(b"question")
        assert received(one, target, 8) == b"question"
        target.sendall(b"answer")
        assert client.read(6) == b"answer"
        client.fin()
        assert received(one, target, 1) == b""
        target.close()
        client.answer(lambda answer: answer.flags & FIN)
        client.acknowledge()
        assert not one.table


def test_the_client_closes_second_and_its_end_is_acknowledged_again(one):
    client, target = connected(one)
    target.close()
    client.answer(lambda answer: answer.flags & FIN)
    client.fin()
    assert client.answer().flags == ACK
    assert state(one) == "TIME_WAIT"
    client.send(FIN | ACK, seq=client.nxt - 1)
    again = client.answer()
    assert (again.flags, again.ack) == (ACK, client.nxt)
    one.skip(62)
    assert not one.table


def test_a_newer_syn_takes_the_place_of_time_wait(one):
    with closing(listener()) as listening:
        client = RawClient(one, listening.getsockname())
        client.open()
        listening.accept()[0].close()
        client.answer(lambda answer: answer.flags & FIN)
        client.fin()
        assert state(one) == "TIME_WAIT"
        following = RawClient(one, listening.getsockname(), irs=client.nxt + 1000)
        following.open()
        target, _ = listening.accept()
        assert state(one) == "ESTABLISHED"
        target.close()


def test_a_pair_of_sockets_that_is_used_again_and_reset_leaves_the_gauges_right(one):
    with closing(listener()) as listening:
        client = RawClient(one, listening.getsockname())
        client.open()
        listening.accept()[0].close()
        client.answer(lambda answer: answer.flags & FIN)
        client.fin()
        following = RawClient(one, listening.getsockname(), irs=client.nxt + 1000)
        following.open()
        with listening.accept()[0]:
            following.send(RST | ACK)
            one.settle()
    assert not one.table
    assert (one.counted(counts.TCP_FLOWS), one.counted(counts.TCP_TIME_WAIT)) == (0, 0)


def test_an_older_syn_does_not_end_time_wait(one):
    with closing(listener()) as listening:
        client = RawClient(one, listening.getsockname())
        client.open()
        listening.accept()[0].close()
        client.answer(lambda answer: answer.flags & FIN)
        client.fin()
        client.unread()
        old = RawClient(one, listening.getsockname(), irs=client.iss - 5000)
        old.syn()
        assert old.answer().flags == ACK
        assert state(one) == "TIME_WAIT"


def test_reset_ends_time_wait(one):
    client, target = connected(one)
    target.close()
    client.answer(lambda answer: answer.flags & FIN)
    client.fin()
    client.unread()
    client.send(RST)
    assert not one.table


def test_no_answer_before_the_target_is_connected(one):
    with closing(listener(backlog=0)) as listening:
        fillers = []
        for _ in range(3):  # a full queue: further SYNs are not answered
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listening.getsockname())
            fillers.append(filler)
        client = RawClient(one, listening.getsockname())
        client.syn()
        one.settle()
        assert client.unread() == []
        client.send(SYN, seq=client.iss, options="mss 1460")  # the SYN again
        one.settle()
        assert client.unread() == []
        assert len(one.table) == 1
        one.skip(5.1)
        answer = client.answer()
        assert (answer.flags, answer.ack) == (RST | ACK, client.nxt)
        assert one.counted(counts.TCP_CONNECT_TIMEOUTS) == 1
        assert not one.table
        for filler in fillers:
            filler.close()


def test_reset_cancels_a_pending_connect(one):
    with closing(listener(backlog=0)) as listening:
        fillers = []
        for _ in range(3):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listening.getsockname())
            fillers.append(filler)
        client = RawClient(one, listening.getsockname())
        client.syn()
        client.send(RST, seq=client.nxt + 5)
        assert len(one.table) == 1
        client.send(RST)
        assert not one.table
        assert client.unread() == []
        for filler in fillers:
            filler.close()


def test_refused_becomes_reset(one, version):
    with closing(listener(version)) as listening:
        address = listening.getsockname()[:2]
    client = RawClient(one, address)
    client.syn()
    answer = client.answer()
    assert (answer.flags, answer.seq, answer.ack) == (RST | ACK, 0, client.nxt)
    assert one.counted(counts.TCP_REFUSED) == 1
    assert not one.table


@pytest.mark.parametrize("flags", [ACK, FIN | ACK, PSH | ACK, SYN | ACK, FIN, 0, SYN | FIN])
def test_segments_of_no_flow_are_reset(one, flags, version):
    client = RawClient(one, ("192.0.2.1" if version == 4 else "2001:db8::1", 80))
    client.send(flags, b"text", ack=12345)
    [answer] = client.unread()
    if flags & ACK:
        assert (answer.flags, answer.seq) == (RST, 12345)
    else:
        length = 4 + bool(flags & FIN) + bool(flags & SYN)
        assert (answer.flags, answer.seq, answer.ack) == (RST | ACK, 0, (client.iss + length) & MASK)
    assert one.counted(counts.TCP_UNKNOWN_FLOW) == 1


def test_a_reset_of_no_flow_is_not_answered(one):
    client = RawClient(one, ("192.0.2.1", 80))
    client.send(RST | ACK)
    client.send(RST)
    assert client.unread() == []


def test_our_own_addresses_have_no_services(one):
    client = RawClient(one, ("198.18.0.2", 80))
    client.syn()
    assert client.answer().flags == RST | ACK


def test_finished_connects_do_not_count_as_pending():
    one = OneWorker(max_pending=4)
    with closing(listener(backlog=0)) as stuck, closing(listener()) as listening:
        fillers = []
        for _ in range(3):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(stuck.getsockname())
            fillers.append(filler)
        RawClient(one, stuck.getsockname(), 30000).syn()
        targets = []
        for port in range(20):
            RawClient(one, listening.getsockname(), 40000 + port).open()
            targets.append(listening.accept()[0])
        one.breathe()
        assert one.counted(counts.TCP_SYN_DROPPED_PENDING) == 0
        assert one.counted(counts.TCP_PENDING) == 1
        for end in targets + fillers:
            end.close()
    one.close()


def test_pending_connects_are_bounded():
    one = OneWorker(max_pending=4)
    with closing(listener(backlog=0)) as stuck:
        fillers = []
        for _ in range(3):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(stuck.getsockname())
            fillers.append(filler)
        clients = [RawClient(one, stuck.getsockname(), 30000 + i) for i in range(10)]
        for client in clients:
            client.syn()
        assert len(one.table) == 4
        assert one.counted(counts.TCP_SYN_DROPPED_PENDING) == 6
        one.skip(5.1)
        assert not one.table
        for filler in fillers:
            filler.close()
    one.close()


def test_flows_are_bounded():
    one = OneWorker(max_flows=2)
    with closing(listener()) as listening:
        for port in range(2):
            RawClient(one, listening.getsockname(), 40000 + port).open()
        third = RawClient(one, listening.getsockname(), 41000)
        third.syn()
        one.settle()
        assert third.unread() == []
        assert one.counted(counts.TCP_SYN_DROPPED_FLOWS) == 1
    one.close()


def test_a_syn_that_offers_only_timestamps(one):
    with closing(listener()) as listening:
        client = RawClient(one, listening.getsockname())
        # A stranger's segment with other options of the same length stands in the memory before.
        client.send(ACK, options="mss 200,nop,nop,nop,wscale 9")
        client.unread()
        client.send(SYN, options="nop,nop,TS val 7 ecr 0", seq=client.iss)
        client.nxt = client.iss + 1
        answer = client.answer(lambda answer: answer.flags & SYN)
        assert answer.options.ts_present
        assert answer.options.window_scale == -1
        assert relay_of(one).conn.smss == 536 - 12


# ── SOCKS ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("piece", [1, 1000])
def test_connect_through_a_proxy_that_speaks_first(piece):
    with closing(Proxy(tail=b"220 hello\r\n")) as proxy:
        client = RawClient(proxy.one, ("192.0.2.7", 25))
        upstream, request = proxy.serve(client, piece)
        with upstream:
            assert request == b"\x05\x01\x00\x01" + bytes([192, 0, 2, 7]) + b"\x00\x19"
            assert client.answer().flags == SYN | ACK
            client.acknowledge()
            assert client.read(11) == b"220 hello\r\n"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [(1, None), (2, (3, 13)), (3, (3, 0)), (4, (3, 1)), (5, None), (6, (3, 1)), (7, None), (8, (3, 0)), (99, None)],
)
def test_refusals_are_what_a_host_would_say(reply, expected):
    with closing(Proxy(reply)) as proxy:
        client = RawClient(proxy.one, ("192.0.2.7", 80))
        upstream, _ = proxy.serve(client)
        with upstream:
            answer = client.answer()
            if expected is None:
                assert (answer.flags, answer.ack) == (RST | ACK, client.nxt)
            else:
                icmp = dpkt.ip.IP(answer.packet).data
                assert (icmp.type, icmp.code) == expected
                assert client.packet(SYN, seq=client.iss, options="mss 1460")[:20] in answer.packet
            assert not proxy.one.table
            assert proxy.one.counted(counts.TCP_REFUSED) == 1


@pytest.mark.parametrize(
    "garbage",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x05\xff", b"\x04\x00", b"", b"\x05\x00\x06\x00\x00\x01" + bytes(6)],
)
def test_a_proxy_that_is_none(garbage):
    with closing(Proxy()) as proxy:
        client = RawClient(proxy.one, ("192.0.2.7", 80))
        client.syn()
        upstream, _ = proxy.listening.accept()
        upstream.sendall(garbage)
        upstream.close()
        assert client.answer().flags == RST | ACK
        assert not proxy.one.table


@pytest.mark.parametrize("fast_open", [False, True])
@pytest.mark.parametrize("piece", [1, 1000])
def test_a_pipelined_handshake_is_one_message(piece, fast_open):
    with closing(Proxy(tail=b"220 hello\r\n", pipelined=True, tcp_fast_open=fast_open)) as proxy:
        client = RawClient(proxy.one, ("192.0.2.7", 25))
        client.syn()
        upstream, _ = proxy.listening.accept()
        with upstream:
            upstream.setblocking(False)
            assert received(proxy.one, upstream, 13) == b"\x05\x01\x00\x05\x01\x00\x01\xc0\x00\x02\x07\x00\x19"
            stream = b"\x05\x00" + proxy.reply
            for start in range(0, len(stream), piece):
                upstream.sendall(stream[start : start + piece])
                proxy.one.settle()
            assert client.answer().flags == SYN | ACK
            client.acknowledge()
            assert client.read(11) == b"220 hello\r\n"


@pytest.mark.parametrize("answer", [b"", b"\x05\xff", b"\x05\x02"])
def test_a_proxy_that_loses_what_is_pipelined_is_asked_again_step_by_step(answer):
    with closing(Proxy(pipelined=True)) as proxy:
        client = RawClient(proxy.one, ("192.0.2.7", 25))
        client.syn()
        refused, _ = proxy.listening.accept()
        proxy.one.settle()
        refused.sendall(answer)
        refused.shutdown(socket.SHUT_WR)
        proxy.one.settle()
        upstream, _ = proxy.listening.accept()
        with refused, upstream:
            upstream.setblocking(False)
            assert received(proxy.one, upstream, 3) == b"\x05\x01\x00"
            upstream.sendall(b"\x05\x00")
            assert received(proxy.one, upstream, 10)[:3] == b"\x05\x01\x00"
            upstream.sendall(proxy.reply)
            assert client.answer().flags == SYN | ACK
            following = RawClient(proxy.one, ("192.0.2.7", 25), port=40001)
            following.syn()
            lockstep, _ = proxy.listening.accept()
            with lockstep:
                proxy.one.settle()
                assert lockstep.recv(100) == b"\x05\x01\x00"


def test_a_proxy_that_hangs_on_what_is_pipelined_costs_one_timeout():
    with closing(Proxy(pipelined=True)) as proxy:
        client = RawClient(proxy.one, ("192.0.2.7", 25))
        client.syn()
        upstream, _ = proxy.listening.accept()
        with upstream:
            proxy.one.settle()
            proxy.one.skip(5.1)
            assert client.answer().flags == RST | ACK
        assert not proxy.one.worker.upstream.pipelined


def test_fast_open_is_set_and_a_closed_port_is_seen():
    proxy = Proxy(pipelined=True, tcp_fast_open=True)
    with closing(proxy.one.worker.upstream.open(socket.AF_INET, socket.SOCK_STREAM)) as opened:
        assert opened.getsockopt(socket.IPPROTO_TCP, 30) == 1
    proxy.listening.close()
    client = RawClient(proxy.one, ("192.0.2.7", 25))
    client.syn()
    assert client.answer().flags == RST | ACK
    assert proxy.one.counted(counts.PROXY_UNREACHABLE) == 1
    proxy.one.close()


def accepted(proxy):
    upstream, _ = proxy.listening.accept()
    upstream.setblocking(False)
    return upstream


def warmed(proxy, number=1):
    """Let a first flow have warm connections made; return the proxy's ends of them, with their method chosen."""
    client = RawClient(proxy.one, ("192.0.2.7", 25))
    client.syn()
    ends = [accepted(proxy) for _ in range(number + 1)]
    proxy.one.settle()
    for end in ends:
        assert received(proxy.one, end, 3) == b"\x05\x01\x00"
        end.sendall(b"\x05\x00")
        proxy.one.settle()
    asked = []
    for end in ends:
        try:
            asked.append(end.recv(100))
        except BlockingIOError:
            asked.append(b"")
    assert sorted(map(len, asked)) == [0] * number + [10]
    assert proxy.one.counted(counts.TCP_WARM) == number
    proxy.first = next(end for end, request in zip(ends, asked, strict=True) if request)
    client.send(RST)
    return [end for end, request in zip(ends, asked, strict=True) if not request]


def test_a_flow_on_a_warm_connection_waits_for_its_request_alone():
    with closing(Proxy(warm_connections=1)) as proxy:
        [end] = warmed(proxy)
        with end, proxy.first:
            client = RawClient(proxy.one, ("192.0.2.7", 80), port=40001)
            client.syn()
            assert received(proxy.one, end, 10) == b"\x05\x01\x00\x01\xc0\x00\x02\x07\x00\x50"
            end.sendall(proxy.reply + b"220 hello\r\n")
            assert client.answer().flags == SYN | ACK
            client.acknowledge()
            assert client.read(11) == b"220 hello\r\n"
            assert proxy.one.counted(counts.TCP_WARM_USED) == 1
            with accepted(proxy) as another:  # in its place
                proxy.one.settle()
                assert another.recv(100) == b"\x05\x01\x00"


@pytest.mark.parametrize("how", ["end", "reset"])
def test_a_warm_connection_that_the_proxy_has_closed_costs_its_flow_nothing(how, monkeypatch):
    with closing(Proxy(warm_connections=1)) as proxy:
        [end] = warmed(proxy)
        with proxy.first:
            take = proxy.one.worker.tcp.warm.take

            def take_and_close(now):
                taken = take(now)
                if taken is not None:  # its end is seen only after it was taken
                    (reset_by if how == "reset" else socket.socket.close)(end)
                return taken

            monkeypatch.setattr(proxy.one.worker.tcp.warm, "take", take_and_close)
            client = RawClient(proxy.one, ("192.0.2.7", 80), port=40001)
            client.syn()
            proxy.one.settle()
            with accepted(proxy) as first, accepted(proxy) as second:
                proxy.one.settle()
                greetings = [first.recv(100), second.recv(100)]
                assert greetings == [b"\x05\x01\x00"] * 2  # the flow's own, and a warm one
                for each in (first, second):
                    each.sendall(b"\x05\x00")
                proxy.one.settle()
                for each in (first, second):
                    try:
                        if each.recv(100):
                            each.sendall(proxy.reply)
                    except BlockingIOError:
                        pass
                assert client.answer().flags == SYN | ACK
            assert proxy.one.counted(counts.TCP_WARM_USED) == 1
            assert proxy.one.counted(counts.TCP_REFUSED) == 0


def test_warm_connections_that_the_proxy_closes_are_replaced_in_time():
    with closing(Proxy(warm_connections=2)) as proxy:
        ends = warmed(proxy, 2)
        with proxy.first:
            for end in ends:
                end.close()
            proxy.one.settle()
            assert proxy.one.counted(counts.TCP_WARM) == 0
            proxy.one.skip(5.1)
            for _ in range(2):
                accepted(proxy).close()
            proxy.one.settle()
            proxy.listening.setblocking(False)
            proxy.one.skip(3)  # closed before they were of use: not at once again
            with pytest.raises(BlockingIOError):
                proxy.listening.accept()


def test_a_warm_connection_does_not_grow_old():
    with closing(Proxy(warm_connections=1)) as proxy:
        [end] = warmed(proxy)
        with end, proxy.first:
            proxy.one.skip(36)
            assert received(proxy.one, end, 1) == b""
            accepted(proxy).close()


@pytest.mark.parametrize("scheme", ["direct", "reject"])
def test_without_a_proxy_nothing_is_warm(scheme):
    with closing(OneWorker(scheme=scheme, warm_connections=4)) as one:
        assert one.worker.tcp.warm.take(one.now) is None
        assert one.counted(counts.TCP_WARM) == 0


class OtherProxy(Proxy):
    """A proxy by hand that is asked once and answers once."""

    def __init__(self, scheme, answer, **settings):
        super().__init__(scheme=scheme, **settings)
        self.answer = answer

    def answer_once(self, client, octets):
        client.syn()
        upstream, _ = self.listening.accept()
        upstream.setblocking(False)
        request = received(self.one, upstream, octets)
        upstream.sendall(self.answer)
        return upstream, request


HTTP_REQUEST = b"CONNECT 192.0.2.7:25 HTTP/1.1\r\nHost: 192.0.2.7:25\r\n\r\n"
SOCKS4_REQUEST = b"\x04\x01\x00\x19\xc0\x00\x02\x07me\x00"
OTHERS = [
    ("http", HTTP_REQUEST, b"HTTP/1.1 200 Connection established\r\nX: " + b"y" * 1000 + b"\r\n\r\n", {}),
    ("socks4", SOCKS4_REQUEST, b"\x00\x5a" + bytes(6), {"username": "me"}),
    ("socks4a", SOCKS4_REQUEST, b"\x00\x5a" + bytes(6), {"username": "me"}),
]


@pytest.mark.parametrize(("scheme", "request_", "answer", "settings"), OTHERS)
def test_other_kinds_of_proxy(scheme, request_, answer, settings):
    with closing(OtherProxy(scheme, answer + b"220 hello\r\n", **settings)) as proxy:
        client = RawClient(proxy.one, ("192.0.2.7", 25))
        upstream, request = proxy.answer_once(client, len(request_))
        with upstream:
            assert request == request_
            assert client.answer().flags == SYN | ACK
            client.acknowledge()
            assert client.read(11) == b"220 hello\r\n"
            client.push(b"EHLO")
            assert received(proxy.one, upstream, 4) == b"EHLO"


@pytest.mark.parametrize(
    ("scheme", "answer", "expected"),
    [
        ("http", b"HTTP/1.1 403 Filtered\r\n\r\n<html>", (3, 13)),
        ("http", b"HTTP/1.1 503 No\r\n\r\n", (3, 1)),
        ("http", b"HTTP/1.1 407 No\r\n\r\n", None),
        ("http", b"SSH-2.0-OpenSSH\r\n", None),
        ("socks4", b"\x00\x5b" + bytes(6), None),
        ("socks4", b"\x00\x5d" + bytes(6), (3, 13)),
    ],
)
def test_refusals_of_other_kinds(scheme, answer, expected):
    with closing(OtherProxy(scheme, answer)) as proxy:
        client = RawClient(proxy.one, ("192.0.2.7", 80))
        upstream, _ = proxy.answer_once(client, 9)
        with upstream:
            answer = client.answer()
            if expected is None:
                assert (answer.flags, answer.ack) == (RST | ACK, client.nxt)
            else:
                icmp = dpkt.ip.IP(answer.packet).data
                assert (icmp.type, icmp.code) == expected
            assert not proxy.one.table


def test_socks4_has_no_ipv6_and_nobody_is_asked():
    with closing(Proxy(scheme="socks4")) as proxy:
        client = RawClient(proxy.one, ("2001:db8::1", 80))
        client.syn()
        assert dpkt.ip6.IP6(client.answer().packet).data.type == 1  # destination unreachable
        assert not proxy.one.table
        proxy.listening.settimeout(0)
        with pytest.raises(BlockingIOError):
            proxy.listening.accept()


def test_reject_resets_whatever_comes(version):
    with closing(OneWorker(scheme="reject")) as one:
        client = RawClient(one, ("192.0.2.7" if version == 4 else "2001:db8::1", 80))
        client.syn()
        answer = client.answer()
        assert (answer.flags, answer.ack) == (RST | ACK, client.nxt)
        assert one.counted(counts.TCP_REFUSED) == 1
        assert not one.table


def test_a_silent_proxy_is_given_up():
    with closing(Proxy()) as proxy:
        client = RawClient(proxy.one, ("192.0.2.7", 80))
        client.syn()
        upstream, _ = proxy.listening.accept()
        with upstream:
            proxy.one.settle()
            proxy.one.skip(5.1)
            assert client.answer().flags == RST | ACK
            assert proxy.one.counted(counts.TCP_CONNECT_TIMEOUTS) == 1


def test_a_proxy_that_is_not_there():
    proxy = Proxy()
    proxy.listening.close()
    client = RawClient(proxy.one, ("192.0.2.7", 80))
    client.syn()
    assert client.answer().flags == RST | ACK
    assert proxy.one.counted(counts.PROXY_UNREACHABLE) == 1
    proxy.close()


# ── half-close and reset ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_client_closes_first_and_still_reads(one, version):
    client, target = connected(one, version=version)
    with target:
        client.push(b"request")
        client.fin()
        assert received(one, target, 1000) == b"request"
        assert received(one, target, 1) == b""
        target.sendall(bytes(50_000))
        assert client.read(50_000) == bytes(50_000)
        assert state(one) == "CLOSE_WAIT"


def test_the_target_closes_first_and_still_reads(one, version):
    client, target = connected(one, version=version)
    with target:
        target.sendall(b"banner")
        target.shutdown(socket.SHUT_WR)
        client.answer(lambda answer: answer.flags & FIN)
        client.acknowledge()
        assert client.received == b"banner"
        assert state(one) == "FIN_WAIT_2"
        sent = b""
        for i in range(50):
            client.push(bytes([i]) * 1000)
            sent += bytes([i]) * 1000
        assert received(one, target, 50_000) == sent
        one.skip(10)
        assert not any(answer.flags & RST for answer in client.unread())


def test_nothing_is_asked_of_a_client_that_has_our_fin(one):
    client, target = connected(one)
    with target:
        target.shutdown(socket.SHUT_WR)
        client.answer(lambda answer: answer.flags & FIN)
        client.acknowledge()
        slow(one, target)
        sent = 0
        while not relay_of(one)._proxy.backlog:  # the target does not read
            client.push(bytes(1400))
            sent += 1400
        assert received(one, target, sent) == bytes(sent)
        one.settle()
        client.unread()
        one.skip(5)
        assert client.unread() == []  # no probe of a window that nobody needs


def push_until_it_waits(client, relay):
    """Push text until some of it waits for the target; return all of it."""
    sent = b""
    while len(relay._proxy.backlog) < 5000:
        text = bytes([len(sent) // 1400 % 256]) * 1400
        client.push(text)
        sent += text
    return sent


def assert_all_arrives(one, target, sent):
    got = b""
    while data := received(one, target, 1):
        got += data
    assert len(got) == len(sent)
    assert got == sent


def test_text_that_waits_for_the_target_outlives_the_connection(one):
    """The target closes its way, reads slowly, and the client's last text and FIN wait for it."""
    client, target = connected(one, ALL_OPTIONS)
    with target:
        slow(one, target)
        target.shutdown(socket.SHUT_WR)
        client.answer(lambda answer: answer.flags & FIN)
        client.acknowledge()
        sent = push_until_it_waits(client, relay_of(one))
        client.fin()
        one.settle()
        assert_all_arrives(one, target, sent)


def test_text_that_waits_for_the_target_outlives_the_last_acknowledgement(one):
    """The same when the client closes first."""
    client, target = connected(one, ALL_OPTIONS)
    with target:
        slow(one, target)
        sent = push_until_it_waits(client, relay_of(one))
        client.fin()
        target.shutdown(socket.SHUT_WR)
        client.answer(lambda answer: answer.flags & FIN)
        client.acknowledge()
        one.settle()
        assert_all_arrives(one, target, sent)


def test_reset_by_the_client_resets_the_target(one):
    client, target = connected(one)
    with target:
        client.push(b"x")
        client.send(RST | ACK)
        assert reset_received(one, target)
        assert not one.table
        assert one.counted(counts.TCP_RESET_BY_CLIENT) == 1


@pytest.mark.parametrize("when", ["idle", "after its end of file", "with text in flight", "after the client's end"])
def test_reset_by_the_target_resets_the_client(one, when):
    client, target = connected(one)
    if when == "after its end of file":
        target.shutdown(socket.SHUT_WR)
        client.answer(lambda answer: answer.flags & FIN)
        client.acknowledge()
    elif when == "with text in flight":
        target.sendall(b"text")
        client.answer(lambda answer: answer.text)
    elif when == "after the client's end":
        client.fin()
        one.settle()
    reset_by(target)
    answer = client.answer(lambda answer: answer.flags & RST)
    assert answer.ack == client.nxt
    assert not one.table
    assert one.counted(counts.TCP_RESET_BY_PROXY) == 1


# ── windows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", ["mss 1460", ALL_OPTIONS])
def test_a_slow_target_shrinks_the_window_and_opens_it_again(one, options):
    client, target = connected(one, options)
    with target:
        scale = 7 if options == ALL_OPTIONS else 0
        slow(one, target)
        sent = 0
        edge = client.nxt
        window = 65535
        while window:
            client.push(bytes(min(window, 1400)))
            sent += min(window, 1400)
            for answer in client.unread():
                edge = (answer.ack + (answer.wnd << scale)) & MASK
            window = (edge - client.nxt) & MASK
            assert sent < 20 << 20
        assert len(relay_of(one)._proxy.backlog)
        client.send(ACK, seq=client.nxt - 1)  # a probe
        assert client.answer().wnd == 0
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        assert received(one, target, sent) == bytes(sent)
        assert client.answer(lambda answer: answer.wnd).ack == client.nxt
        client.push(b"more")
        assert received(one, target, 4) == b"more"


def test_a_closed_window_is_probed_and_opens(one):
    client, target = connected(one)
    with target:
        client.wnd = 0
        client.acknowledge()
        target.sendall(b"text")
        one.settle()
        assert client.unread() == []
        for _ in range(15):
            one.skip(61)
            probes = client.unread()
            assert probes
            assert all((probe.seq, probe.text) == (client.rcv_nxt - 1, b"") for probe in probes)
            client.acknowledge()
        client.wnd = 2
        client.acknowledge()
        assert client.answer().text == b"te"
        client.wnd = 65535
        client.acknowledge()
        assert client.read(4) == b"text"


def test_a_client_that_does_not_answer_probes_is_given_up(one):
    client, target = connected(one)
    with target:
        client.wnd = 0
        client.acknowledge()
        target.sendall(b"text")
        one.settle()
        one.skip(700)
        assert client.unread()[-1].flags & RST
        assert not one.table
        assert one.counted(counts.TCP_RETRANSMIT_TIMEOUTS) == 1


@pytest.mark.parametrize("length", [1, 1000, 4096, 4097, 14_600])
@pytest.mark.parametrize("options", ["mss 1460", ALL_OPTIONS])
def test_lost_text_comes_again_after_the_timeout(one, options, length):
    client, target = connected(one, options)
    with target:
        text = bytes(i % 253 for i in range(length))
        target.sendall(text)
        one.run_until(lambda: sum(len(Answer(frame).text) for frame in one.port.sent) >= length)
        one.take_sent()  # all lost
        one.skip(1.5)
        assert client.read(length) == text
        target.sendall(b"end")
        assert client.read(length + 3) == text + b"end"
        assert len(one.port.large.free) == TX_LARGE
        assert one.counted(counts.TCP_RETRANSMITTED) >= 1


def test_three_duplicates_retransmit_at_once_out_of_the_held_frame(one):
    client, target = connected(one)
    with target:
        text = bytes(i % 253 for i in range(14_600))
        target.sendall(text)
        one.run_until(lambda: sum(len(Answer(frame).text) for frame in one.port.sent) >= len(text))
        one.take_sent()
        held = len(one.port._held)
        assert held >= 1
        for _ in range(3):
            client.acknowledge()
        [again] = [answer for answer in client.unread() if answer.text]
        assert again.text == text[:1460]
        assert len(one.port._held) == held
        assert client.read(len(text)) == text
        assert not one.port._held


def test_a_client_that_is_gone_is_given_up(one):
    _, target = connected(one)
    with target:
        target.sendall(bytes(10_000))
        one.settle()
        one.skip(400)
        assert not one.table
        assert reset_received(one, target)
        assert Answer(one.take_sent()[-1]).flags & RST


def test_a_client_that_is_gone_before_the_handshake_is_given_up(one):
    with closing(listener()) as listening:
        client = RawClient(one, listening.getsockname())
        client.syn()
        client.answer()
        with listening.accept()[0] as target:
            one.skip(200)
            syns = [answer for answer in client.unread() if answer.flags == SYN | ACK]
            assert len(syns) == 5
            assert not one.table
            assert reset_received(one, target)


def test_idle_flows_end():
    one = OneWorker(tcp_timeout=100)
    client, target = connected(one)
    with target:
        one.skip(90)
        client.acknowledge()
        one.skip(90)
        assert one.table
        one.skip(40)
        assert not one.table
        assert client.answer().flags & RST
        assert reset_received(one, target)
    one.close()


# ── order, batches ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_acknowledgement_for_a_batch(one):
    client, target = connected(one)
    with target:
        packets = []
        for i in range(10):
            packets.append(client.packet(ACK, bytes([i]) * 1000))
            client.nxt = (client.nxt + 1000) & MASK
        one.receive(*packets)
        [ack] = client.unread()
        assert ack.ack == client.nxt
        assert received(one, target, 10_000) == b"".join(bytes([i]) * 1000 for i in range(10))


def test_segments_out_of_order_arrive_in_order(one):
    client, target = connected(one)
    with target:
        pieces = [(start, bytes([start // 100]) * 150) for start in range(0, 2000, 100)]
        start = client.nxt
        for offset, text in [*pieces[::2], *pieces[:0:-2], pieces[0]]:
            client.send(ACK, text, seq=start + offset)
        client.send(FIN | ACK, seq=start + 2050)
        got = received(one, target, 2051)
        assert len(got) == 2050
        assert received(one, target, 1) == b""
        for at, octet in enumerate(got[:2000]):
            assert octet in (at // 100, at // 100 - 1)


def test_wrong_checksums_are_counted_not_delivered(one):
    client, target = connected(one)
    with target:
        one.receive(client.packet(ACK, b"x"), vnet=bytes(10))
        assert one.counted(counts.BAD_CHECKSUM) == 1


def test_no_descriptor_left(one, monkeypatch):
    def refuse(family, kind):
        raise OSError(errno.EMFILE, "")

    monkeypatch.setattr(one.worker.upstream, "open", refuse)
    client = RawClient(one, ("192.0.2.1", 80))
    client.syn()
    assert client.unread() == []
    assert not one.table
    assert one.counted(counts.TCP_SYN_DROPPED_DESCRIPTORS) == 1


def test_bulk_both_ways_leaves_no_frame(one, version):
    client, target = connected(one, ALL_OPTIONS, version)
    with target:
        down = bytes(i * 7 % 251 for i in range(1 << 20))
        client.wnd = 60_000
        view = memoryview(down)

        def feed():
            nonlocal view
            try:
                view = view[target.send(view) :]
            except BlockingIOError:
                pass
            client.unread()
            if client.acked != client.rcv_nxt:
                client.acknowledge()
            return len(client.received) == len(down)

        one.run_until(feed, 20)
        assert client.received == down
        client.acknowledge()
        assert not one.port._held


# ── garbage ─────────────────────────────────────────────────────────────────────────────────────────────────────────

mutations = st.lists(
    st.tuples(
        st.sampled_from(("new", "old", "relative", "random")),
        st.integers(0, 63),  # flags
        st.sampled_from((0, 1, -1, 100, 1000, 65_535, -1000, 1 << 31)),  # of the sequence number
        st.sampled_from((0, 1, -1, 100, 1000, 65_535, -1000, 1 << 31)),  # of the ACK
        st.binary(max_size=30) | st.just(bytes(1400)),
        st.sampled_from(("", "mss 1460", "nop,nop,TS val 5 ecr 6", "mss 1,wscale 14", "mss 65535,TS val 1 ecr 2")),
        st.lists(st.tuples(st.integers(0, 79), st.integers(0, 255)), max_size=4),  # octets that are changed
        st.integers(0, 3),  # octets cut off
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from((4, 6)), st.sampled_from(("mss 1460", ALL_OPTIONS)), mutations, st.booleans())
def test_mutated_segments_raise_nothing_and_leave_nothing(version, options, segments, trusted):
    one = OneWorker()
    try:
        client, target = connected(one, options, version)
        with target:
            target.sendall(b"something in flight")
            for kind, flags, seq, ack, text, words, changes, cut in segments:
                if kind == "new":
                    client.ports = struct.pack(">H", 40000 + seq % 100) + client.ports[2:]
                packet = bytearray(
                    client.packet(
                        flags | (ACK if kind == "relative" else 0),
                        text,
                        seq=client.nxt + seq if kind != "random" else seq * 77_777,
                        ack=client.rcv_nxt + ack,
                        options=words,
                    )
                )
                for at, octet in changes if kind == "random" else ():
                    packet[at % len(packet)] = octet
                packet = packet[: len(packet) - cut]
                one.receive(bytes(packet), vnet=TRUSTED if trusted else bytes(10))
                one.skip(0.3)
    finally:
        one.close()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=120), max_size=20), st.booleans())
def test_random_frames_raise_nothing(packets, trusted):
    one = OneWorker()
    try:
        one.receive(*packets, vnet=TRUSTED if trusted else bytes(10))
    finally:
        one.close()


def test_an_event_of_a_closed_socket_never_reaches_the_next_one_with_its_number(one):
    worker = one.worker
    reached = []

    def closes_and_opens(mask, now):
        worker.forget(901)
        worker.handlers[901] = lambda mask, now: reached.append("new")

    worker.handlers[900] = closes_and_opens
    worker.handlers[901] = lambda mask, now: reached.append("old")
    worker.handle([(900, select.EPOLLIN), (901, select.EPOLLOUT)], one.now)
    assert reached == []
    worker.handle([(901, select.EPOLLIN)], one.now)
    assert reached == ["new"]
    worker.forget(900)
    worker.forget(901)


def test_what_breaks_in_one_flow_leaves_the_others_their_turn(one, monkeypatch):
    pairs = [connected(one, port=40000 + number) for number in range(3)]
    relays = list(one.table.values())

    def breaks(now):
        raise ZeroDivisionError

    class Broken:
        read_again = ack_at_end_of_batch = staticmethod(breaks)

    for (_, target), relay in zip(pairs, relays, strict=True):
        target.sendall(b"answer")
        relay._readable = relay._in_queue = True
    one.worker.tcp.ready.extend([relays[0], Broken(), relays[1], relays[2]])
    one.worker.tcp.acks.extend([Broken()])
    for relay in relays:
        relay._in_acks = True
        relay.conn.ack_due = 2
        one.worker.tcp.acks.append(relay)
    for call in (one.worker.tcp.end_of_batch, one.worker.tcp.run):
        with pytest.raises(ZeroDivisionError):
            call(one.now)
        call(one.now)
    assert not one.worker.tcp.acks and not one.worker.tcp.ready
    assert len(one.take_sent()) == 6
    for _, target in pairs:
        target.close()
