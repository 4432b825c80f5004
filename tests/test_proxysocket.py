"""The proxy's side of a flow: its FIN is a FIN, its RST is RST, whatever breaks is never a clean end of stream."""

import errno
import select
import socket
import time
from contextlib import suppress

import pytest

from tests.loopback import (
    ALL_OPTIONS,
    connected,
    received,
    relay_of,
    reset_by,
    slow,
    state,
)
from tests.one_worker import MASK, TRUSTED, OneWorker
from workers import counts
from workers.tcp.segment import ACK, FIN, PSH, RST


@pytest.fixture(params=[4, 6])
def version(request):
    return request.param


@pytest.fixture
def one():
    made = OneWorker()
    yield made
    made.close()


def assert_reset_behind(client, text):
    """The client reads the text, then RST, and no FIN."""
    answers = []

    def reset():
        answers.extend(client.unread())
        if client.acked != client.rcv_nxt:
            client.acknowledge()
        return any(answer.flags & RST for answer in answers)

    client.one.run_until(reset)
    assert not any(answer.flags & FIN for answer in answers)
    assert client.received == text
    assert next(answer for answer in answers if answer.flags & RST).seq == client.rcv_nxt
    assert not client.one.table
    assert client.one.counted(counts.TCP_RESET_BY_PROXY) == 1


# ── its RST ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("octets", [1, 5000, 40_000])
def test_text_before_a_reset_arrives_and_is_not_the_end_of_the_stream(one, version, octets):
    client, target = connected(one, ALL_OPTIONS, version)
    text = bytes(i % 251 for i in range(octets))
    assert target.send(text) == octets
    reset_by(target)  # before the relay has read anything
    assert_reset_behind(client, text)


def test_text_before_a_reset_arrives_although_the_window_was_shut(one):
    client, target = connected(one)
    client.wnd = 0
    client.acknowledge()
    target.sendall(b"the last words")
    reset_by(target)
    one.settle()
    client.wnd = 4
    client.acknowledge()
    one.settle()
    client.wnd = 1000
    assert_reset_behind(client, b"the last words")


def test_text_before_a_reset_arrives_although_sending_failed_first(one):
    """An HTTP server that answers early and closes on a request that still comes."""
    client, target = connected(one)
    with target:
        target.sendall(b"413 too large")
        reset_by(target)
        for _ in range(3):  # these find the broken connection before its events are looked at
            one.port.put(client.packet(ACK | PSH, bytes(1000)), TRUSTED)
            client.nxt = (client.nxt + 1000) & MASK
        one.worker._frames_wait(select.EPOLLIN, one.now)
        assert_reset_behind(client, b"413 too large")


def test_text_before_a_reset_arrives_although_text_waits_for_the_proxy(one):
    client, target = connected(one, ALL_OPTIONS)
    slow(one, target)
    while len(relay_of(one)._proxy.backlog) < 5000:
        client.push(bytes(1400))
    target.sendall(b"enough")
    reset_by(target)
    client.unread()
    assert_reset_behind(client, b"enough")


@pytest.mark.parametrize("octets", [0, 7, 100_000])
def test_a_reset_behind_the_end_of_file(one, octets):
    client, target = connected(one, ALL_OPTIONS)
    target.sendall(bytes(octets))
    target.shutdown(socket.SHUT_WR)
    if octets < 1000:
        client.answer(lambda answer: answer.flags & FIN)
    reset_by(target)
    client.wnd = 65535
    if octets:
        one.run_until(lambda: client.unread() and client.read(octets))
    one.settle()
    assert client.received == bytes(octets)


@pytest.mark.parametrize(
    "error", [errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET, errno.EPIPE]
)
@pytest.mark.parametrize("where", ["reading", "sending", "looking ahead", "sending what waited"])
def test_an_error_of_the_socket_is_a_reset(one, error, where):
    client, target = connected(one)
    with target:
        relay = relay_of(one)
        proxy = relay._proxy

        class Broken:
            """The relay's socket from now on: one error, then what the kernel says after it."""

            told = False

            def fail(self, *_):
                if not self.told:
                    self.told = True
                    raise OSError(error, "")
                return 0

            def read(self, *_):
                return self.fail() if where == "reading" else proxy_socket.recv_into(*_)

            def __getattr__(self, name):
                return getattr(proxy_socket, name)

        proxy_socket, broken = proxy._socket, Broken()
        proxy._socket = broken
        if where == "reading":
            proxy.recv_into = broken.read
        elif where == "sending":
            proxy.send = broken.fail
            proxy.recv_into = broken.fail  # after the error the kernel speaks of a clean end
            client.push(b"text")
        elif where == "looking ahead":
            broken.recv = broken.fail
            target.sendall(b"text")
            target.shutdown(socket.SHUT_WR)
        else:
            broken.send = broken.fail
            proxy.wait(b"text")
            relay.conn.rcv.pending += 4
            target.shutdown(socket.SHUT_WR)
        relay.socket_ready(select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP, one.now)
        assert_reset_behind(client, b"text" if where == "looking ahead" else b"")


# ── its FIN, and half-close ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("octets", [0, 10, 100_000])
def test_text_and_end_of_file_at_once_are_a_clean_end(one, octets):
    client, target = connected(one, ALL_OPTIONS)
    text = bytes(i % 251 for i in range(octets))
    target.sendall(text)
    target.close()
    client.read(octets)
    one.run_until(lambda: any(answer.flags & FIN for answer in client.unread()) or state(one) == "FIN_WAIT_2")
    client.acknowledge()
    assert client.received == text
    assert one.counted(counts.TCP_RESET_BY_PROXY) == 0
    assert not any(answer.flags & RST for answer in client.unread())


@pytest.mark.parametrize("first", ["client", "target"])
def test_half_closed_for_hours_while_text_flows(first):
    one = OneWorker(tcp_timeout=7440, tcp_half_closed_timeout=7200)
    client, target = connected(one, ALL_OPTIONS)
    with target:
        if first == "client":
            client.fin()
            assert received(one, target, 1) == b""
        else:
            target.shutdown(socket.SHUT_WR)
            client.answer(lambda answer: answer.flags & FIN)
            client.acknowledge()
        for hour in range(5):
            one.skip(3600)
            word = b"hour %d" % hour
            if first == "client":
                target.sendall(word)
                assert client.read(6 * hour + 6)[-6:] == word
            else:
                client.push(word)
                assert received(one, target, 6) == word
        one.skip(7100)
        assert one.table
        one.skip(200)
        assert not one.table
        assert one.counted(counts.TCP_IDLE_TIMEOUTS) == 1
    one.close()


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, 2, 1400])
def test_what_waits_for_a_slow_proxy_is_bounded_by_the_window(one, monkeypatch, size):
    """A client that ignores the window fills no memory: neither by octets nor by many small segments."""
    client, target = connected(one, ALL_OPTIONS)
    with target:
        relay = relay_of(one)
        limit = 50_000
        relay.conn.rcv.buffer = limit
        relay.conn.rcv.adv = client.nxt + limit & MASK  # that much was offered
        proxy = relay._proxy

        def full(text):
            raise BlockingIOError

        proxy.send = full
        sent = 0
        for _ in range(3 * limit // size if size > 100 else 70_000 // size):
            one.port.put(client.packet(ACK | PSH, bytes([sent % 251]) * size, seq=client.nxt + sent), TRUSTED)
            sent += size
            if len(one.port.waiting) == 100:
                one.worker._frames_wait(select.EPOLLIN, one.now)
                one.port.complete()
        assert limit - size < len(proxy.backlog) <= limit
        assert relay.conn.rcv.pending == len(proxy.backlog)
        assert proxy.backlog.__sizeof__() < 1.2 * limit
        assert client.unread()[-1].wnd == 0


def test_the_window_opens_by_what_the_proxy_took(one):
    client, target = connected(one, ALL_OPTIONS)
    with target:
        slow(one, target)
        while len(relay_of(one)._proxy.backlog) < 5000:
            client.push(bytes(1400))
        one.run_until(lambda: not target.recv(1 << 20) or not relay_of(one)._proxy.backlog)
        assert relay_of(one).conn.rcv.pending == 0
        assert relay_of(one)._proxy.send is not None


def test_text_that_outlives_its_flow_needs_no_event_that_was_lost(one):
    """The socket becomes writable in the breath in which the flow ends: its event comes to nobody."""
    client, target = connected(one, ALL_OPTIONS)
    with target:
        slow(one, target)
        relay = relay_of(one)
        sent = b""
        while len(relay._proxy.backlog) < 40_000:
            client.push(bytes([len(sent) % 251]) * 1400)
            sent += bytes([len(sent) % 251]) * 1400
        client.fin()
        target.shutdown(socket.SHUT_WR)
        client.answer(lambda answer: answer.flags & FIN)
        got = b""
        events = []
        deadline = time.monotonic() + 5
        while not any(mask & select.EPOLLOUT for _, mask in events):
            assert time.monotonic() < deadline, "the socket does not become writable"
            with suppress(BlockingIOError):
                got += target.recv(1 << 16)
            events += one.worker._epoll.poll(0.01)
        one.port.put(client.packet(ACK), TRUSTED)
        one.worker.handle([(one.port.fileno(), select.EPOLLIN), *events], one.now)
        assert not one.table
        got += received(one, target, len(sent) - len(got))
        assert got == sent
        assert received(one, target, 1) == b""


def test_an_end_of_file_that_no_event_has_told_of_yet(one):
    """The FIN comes between the event and the read: the socket reads 0 octets although nothing hung up."""
    client, target = connected(one)
    target.close()
    relay = relay_of(one)
    relay.socket_ready(select.EPOLLIN | select.EPOLLOUT, one.now)
    [answer] = client.unread()
    assert answer.flags & FIN
    assert state(one) == "FIN_WAIT_1"
