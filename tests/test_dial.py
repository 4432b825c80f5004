"""Dial: what a client hears while its SYN waits, of refusals, of `early-accept`, and of a flood."""

import errno
import select
import socket
from contextlib import closing

import dpkt
import pytest

from tests.loopback import Proxy, connected, listener, received, relay_of, reset_received
from tests.one_worker import MASK, TRUSTED, OneWorker, RawClient
from workers import counts
from workers.dial import EARLY_WINDOW
from workers.flows import SYNS_A_BREATH
from workers.tcp.segment import ACK, FIN, PSH, RST, SYN

TARGETS = {4: ("192.0.2.7", 80), 6: ("2001:db8::7", 80)}
NET, HOST, ADMIN = {4: (3, 0), 6: (1, 0)}, {4: (3, 1), 6: (1, 3)}, {4: (3, 13), 6: (1, 1)}
RESET = {4: None, 6: None}


@pytest.fixture(params=[4, 6])
def version(request):
    return request.param


@pytest.fixture
def one():
    made = OneWorker()
    yield made
    made.close()


def assert_refused(client, expected):
    """The next answer is RST, or an ICMP error of this type and code about the client's SYN."""
    answer = client.answer()
    if expected is None:
        assert (answer.flags, answer.seq, answer.ack) == (RST | ACK, 0, client.nxt)
        return
    if client.version == 4:
        icmp = dpkt.ip.IP(answer.packet).data
    else:
        icmp = dpkt.ip6.IP6(answer.packet).data
    assert (icmp.type, icmp.code) == expected
    assert client.packet(SYN, seq=client.iss, options="mss 1460")[:20] in answer.packet


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (1, RESET),
        (2, ADMIN),
        (3, NET),
        (4, HOST),
        (5, RESET),
        (6, HOST),
        (7, RESET),
        (8, NET),
        (9, RESET),
        (255, RESET),
    ],
)
def test_every_reply_code(reply, expected, version):
    with closing(Proxy(reply)) as proxy:
        client = RawClient(proxy.one, TARGETS[version])
        upstream, _ = proxy.serve(client)
        with upstream:
            assert_refused(client, expected[version])
            assert not proxy.one.table
            assert proxy.one.counted(counts.TCP_REFUSED) == 1


ERRORS = [
    (errno.ECONNREFUSED, RESET),
    (errno.ECONNRESET, RESET),
    (errno.ETIMEDOUT, RESET),
    (errno.ENOPROTOOPT, RESET),
    (errno.ENETUNREACH, NET),
    (errno.ENETDOWN, NET),
    (errno.EADDRNOTAVAIL, NET),
    (errno.EAFNOSUPPORT, NET),
    (errno.EHOSTUNREACH, HOST),
    (errno.EHOSTDOWN, HOST),
    (errno.ENONET, HOST),
    (errno.EACCES, ADMIN),
    (errno.EPERM, ADMIN),
]


class FailingSocket(socket.socket):
    """A socket whose connect fails with an error of the test's, at once or later."""

    error = 0
    at_once = True

    def connect_ex(self, address):
        if self.at_once:
            return self.error
        # A connection that is refused makes the event; its error is told by getsockopt below.
        with closing(listener()) as listening:
            closed = listening.getsockname()
        return super().connect_ex(closed)

    def getsockopt(self, level, option, *rest):
        if (level, option) == (socket.SOL_SOCKET, socket.SO_ERROR):
            return self.error
        return super().getsockopt(level, option, *rest)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(("error", "expected"), ERRORS)
def test_every_error_of_a_connect(one, monkeypatch, error, expected, version, at_once):
    def fails(family, kind):
        made = FailingSocket(socket.AF_INET, kind | socket.SOCK_NONBLOCK)
        made.error, made.at_once = error, at_once
        return made

    monkeypatch.setattr(one.worker.upstream, "open", fails)
    client = RawClient(one, TARGETS[version])
    client.syn()
    assert_refused(client, expected[version])
    assert not one.table
    assert one.counted(counts.TCP_CONNECT_TIMEOUTS) == (error == errno.ETIMEDOUT)


def test_a_host_without_ipv6(one, monkeypatch):
    def refuse(family, kind):
        raise OSError(errno.EAFNOSUPPORT, "")

    monkeypatch.setattr(one.worker.upstream, "open", refuse)
    client = RawClient(one, TARGETS[6])
    client.syn()
    assert_refused(client, NET[6])
    assert not one.table


def test_silence_then_reset():
    with closing(Proxy()) as proxy:
        client = RawClient(proxy.one, TARGETS[4])
        client.syn()
        with proxy.listening.accept()[0]:
            proxy.one.skip(4.9)
            assert client.unread() == []
            proxy.one.skip(0.2)
            assert_refused(client, None)


# ── while the SYN waits ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_syn_again_is_not_answered_and_does_not_dial_twice():
    with closing(Proxy()) as proxy:
        one = proxy.one
        client = RawClient(one, TARGETS[4])
        client.syn()
        with proxy.listening.accept()[0]:
            for _ in range(3):
                client.send(SYN, seq=client.iss, options="mss 1460")
                one.settle()
            assert client.unread() == []
            proxy.listening.setblocking(False)
            with pytest.raises(BlockingIOError):
                proxy.listening.accept()


@pytest.mark.parametrize("flags", [RST, RST | ACK])
def test_reset_cancels_the_connect(flags):
    with closing(Proxy()) as proxy:
        one = proxy.one
        client = RawClient(one, TARGETS[4])
        client.syn()
        upstream, _ = proxy.listening.accept()
        with upstream:
            upstream.setblocking(False)
            assert received(one, upstream, 3)
            client.send(flags, seq=client.nxt)
            assert reset_received(one, upstream)
            assert not one.table
            assert client.unread() == []
            assert one.counted(counts.TCP_RESET_BY_CLIENT) == 1
            one.breathe()
            assert one.counted(counts.TCP_PENDING) == 0


def test_other_segments_change_nothing():
    with closing(Proxy()) as proxy:
        client = RawClient(proxy.one, TARGETS[4])
        client.syn()
        with proxy.listening.accept()[0]:
            for flags in (ACK, PSH | ACK, FIN | ACK, SYN | ACK, 0):
                client.send(flags, b"early", seq=client.nxt, ack=77)
            client.send(RST, seq=client.nxt + 1)
            client.send(RST, seq=client.iss - 1)
            assert client.unread() == []
            assert len(proxy.one.table) == 1


def test_a_client_that_began_anew_gets_the_answer_to_its_newer_syn():
    with closing(Proxy()) as proxy:
        old = RawClient(proxy.one, TARGETS[4], irs=MASK - 100)
        old.syn()
        client = RawClient(proxy.one, TARGETS[4], irs=1000)
        upstream, _ = proxy.serve(client)
        with upstream:
            answer = client.answer()
            assert (answer.flags, answer.ack) == (SYN | ACK, 1001)
            client.acknowledge()
            upstream.sendall(b"hello")
            assert client.read(5) == b"hello"
            assert proxy.one.counted(counts.TCP_OPENED) == 1


def test_a_refusal_quotes_the_newer_syn():
    with closing(Proxy(reply=4)) as proxy:
        RawClient(proxy.one, TARGETS[4], irs=500).syn()
        client = RawClient(proxy.one, TARGETS[4], irs=1000)
        upstream, _ = proxy.serve(client)
        with upstream:
            assert_refused(client, HOST[4])


def test_an_older_syn_is_a_late_duplicate():
    with closing(Proxy()) as proxy:
        client = RawClient(proxy.one, TARGETS[4], irs=1000)
        upstream, _ = proxy.serve(client)
        with upstream:
            RawClient(proxy.one, TARGETS[4], irs=900).syn()
            answer = client.answer()
            assert (answer.flags, answer.ack) == (SYN | ACK, 1001)


# ── early-accept ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_early_accept_answers_at_once_and_keeps_what_comes(version):
    with closing(Proxy(early_accept=True, tail=b"220 hello")) as proxy:
        one = proxy.one
        client = RawClient(one, TARGETS[version])
        client.open()
        client.push(b"question")
        client.fin()
        one.breathe()
        assert one.counted(counts.TCP_PENDING) == 1
        upstream, _ = proxy.handshake()
        with upstream:
            assert received(one, upstream, 9) == b"question"
            assert received(one, upstream, 1) == b""
            assert client.read(9) == b"220 hello"
            upstream.sendall(b", and good-bye")
            upstream.close()
            client.answer(lambda answer: answer.flags & FIN)
            assert client.received == b"220 hello, and good-bye"
            client.acknowledge()
        assert not one.table
        assert one.counted(counts.TCP_PENDING) == 0


def test_early_accept_keeps_a_bounded_amount():
    with closing(Proxy(early_accept=True)) as proxy:
        one = proxy.one
        client = RawClient(one, TARGETS[4])
        client.open("mss 1460,sackOK,TS val 1 ecr 0,nop,wscale 7")
        text = bytes(i % 251 for i in range(4 * EARLY_WINDOW))
        for at in range(0, len(text), 1000):  # whatever the window says
            client.send(ACK | PSH, text[at : at + 1000], seq=client.iss + 1 + at)
        relay = relay_of(one)
        assert 0 < len(relay._proxy.backlog) <= EARLY_WINDOW
        assert relay.conn.rcv.pending == len(relay._proxy.backlog)
        kept = len(relay._proxy.backlog)
        assert client.unread()[-1].wnd == 0
        upstream, _ = proxy.handshake()
        with upstream:
            assert client.answer(lambda answer: answer.wnd).ack == (client.iss + 1 + kept) & MASK
            client.nxt = (client.iss + 1 + kept) & MASK
            client.push(b"more")
            assert received(one, upstream, kept + 4) == text[:kept] + b"more"


@pytest.mark.parametrize("reply", [1, 3, 5])
def test_early_accept_makes_refusals_resets(reply):
    with closing(Proxy(early_accept=True, reply=reply)) as proxy:
        client = RawClient(proxy.one, TARGETS[4])
        client.open()
        client.push(b"question")
        upstream, _ = proxy.handshake()
        with upstream:
            answer = client.answer(lambda answer: answer.flags & RST)
            assert answer.seq == client.rcv_nxt
            assert not proxy.one.table
            assert proxy.one.counted(counts.TCP_REFUSED) == 1
            proxy.one.breathe()
            assert proxy.one.counted(counts.TCP_PENDING) == 0


def test_early_accept_times_out_with_reset():
    with closing(Proxy(early_accept=True)) as proxy:
        client = RawClient(proxy.one, TARGETS[4])
        client.open()
        with proxy.listening.accept()[0] as upstream:
            upstream.setblocking(False)
            proxy.one.skip(5.1)
            assert client.answer(lambda answer: answer.flags & RST).seq == client.rcv_nxt
            assert not proxy.one.table
            assert reset_received(proxy.one, upstream)


def test_a_reset_after_early_accept_cancels_the_connect():
    with closing(Proxy(early_accept=True)) as proxy:
        client = RawClient(proxy.one, TARGETS[4])
        client.open()
        with proxy.listening.accept()[0] as upstream:
            upstream.setblocking(False)
            client.send(RST)
            assert reset_received(proxy.one, upstream)
            assert not proxy.one.table
            proxy.one.breathe()
            assert proxy.one.counted(counts.TCP_PENDING) == 0


def test_early_accept_without_a_descriptor_is_silent(monkeypatch):
    def refuse(family, kind):
        raise OSError(errno.EMFILE, "")

    one = OneWorker(early_accept=True)
    monkeypatch.setattr(one.worker.upstream, "open", refuse)
    client = RawClient(one, TARGETS[4])
    client.syn()
    assert client.unread() == []
    assert one.counted(counts.TCP_SYN_DROPPED_DESCRIPTORS) == 1
    one.close()


@pytest.mark.parametrize("early", [True, False])
def test_no_room_in_epoll(monkeypatch, early):
    """fs.epoll.max_user_watches is a limit of its own."""

    def refuse(fd, mask, handler):
        raise OSError(errno.ENOSPC, "")

    with closing(Proxy(early_accept=early)) as proxy:
        one = proxy.one
        monkeypatch.setattr(one.worker.tcp, "watch", refuse)
        client = RawClient(one, TARGETS[4])
        client.syn()
        assert client.unread() == []
        assert not one.table
        assert one.worker.tcp.pending == 0
        assert one.counted(counts.TCP_SYN_DROPPED_DESCRIPTORS) == 1
        with proxy.listening.accept()[0] as upstream:
            upstream.setblocking(False)
            assert reset_received(one, upstream)


def test_early_accept_refuses_honestly_what_fails_at_once(monkeypatch, version):
    def fails(family, kind):
        made = FailingSocket(socket.AF_INET, kind | socket.SOCK_NONBLOCK)
        made.error = errno.ENETUNREACH
        return made

    one = OneWorker(early_accept=True)
    monkeypatch.setattr(one.worker.upstream, "open", fails)
    client = RawClient(one, TARGETS[version])
    client.syn()
    assert_refused(client, NET[version])
    one.close()


def test_pending_connects_are_bounded_with_early_accept():
    with closing(Proxy(early_accept=True, max_pending=3)) as proxy:
        for port in range(5):
            RawClient(proxy.one, TARGETS[4], 30000 + port).syn()
        assert len(proxy.one.table) == 3
        assert proxy.one.counted(counts.TCP_SYN_DROPPED_PENDING) == 2


# ── a flood ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_breath_begins_few_new_flows_and_serves_those_that_run(one):
    client, target = connected(one)
    with target, closing(listener(backlog=200)) as listening:
        packets = [
            RawClient(one, listening.getsockname(), 30000 + port).packet(SYN, options="mss 1460")
            for port in range(SYNS_A_BREATH + 30)
        ]
        for at, text in ((0, b"a flow"), (50, b" that"), (len(packets) + 2, b" runs")):
            packets.insert(at, client.packet(ACK | PSH, text))
            client.nxt = (client.nxt + len(text)) & MASK
        for packet in packets:
            one.port.put(packet, TRUSTED)
        one.worker._frames_wait(select.EPOLLIN, one.now)
        assert target.recv(100) == b"a flow that runs"
        assert one.worker.tcp.pending == SYNS_A_BREATH
        assert one.counted(counts.TCP_SYN_DROPPED_PENDING) == 30


def test_a_flood_evicts_nobody_and_stops_no_flow():
    one = OneWorker(max_pending=8)
    client, target = connected(one)
    with target, closing(listener(backlog=0)) as stuck:
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(stuck.getsockname())
        first = [RawClient(one, stuck.getsockname(), 30000 + port) for port in range(8)]
        for waiting in first:
            waiting.syn()
        before = set(one.table)
        for breath in range(20):
            packets = [
                RawClient(one, stuck.getsockname(), 31000 + 50 * breath + port).packet(SYN, options="mss 1460")
                for port in range(50)
            ]
            packets.insert(25, client.packet(ACK | PSH, b"text"))
            client.nxt = (client.nxt + 4) & MASK
            one.receive(*packets)
        assert set(one.table) == before
        assert one.counted(counts.TCP_SYN_DROPPED_PENDING) == 20 * 50
        assert received(one, target, 80) == b"text" * 20
        target.sendall(b"answer")
        assert client.read(6) == b"answer"
        for filler in fillers:
            filler.close()
    one.close()
