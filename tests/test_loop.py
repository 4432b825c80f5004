"""The supervisor's loop: descriptors, timers in order, signals noted once, and sleep."""

import os
import signal
import socket
import time

import pytest

from gateway.loop import WRITE, EventLoop, has_ended, wait_readable


@pytest.fixture
def loop():
    with EventLoop() as made:
        yield made


def turn_until(loop, condition, limit=10.0):
    ends_at = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < ends_at
        loop.run_once(0.1)


def test_timers_run_in_the_order_of_their_moments(loop):
    calls = []
    loop.call_later(0.02, lambda: calls.append("late"))
    loop.call_later(0.0, lambda: calls.append("first"))
    loop.call_later(0.0, lambda: calls.append("second"))
    turn_until(loop, lambda: len(calls) == 3)
    assert calls == ["first", "second", "late"]


def test_a_cancelled_timer_neither_runs_nor_wakes(loop):
    calls = []
    loop.call_later(0.0, lambda: calls.append(1)).cancel()
    begun_at = time.monotonic()
    loop.run_once(0.05)
    assert time.monotonic() - begun_at >= 0.04
    assert calls == []


def test_a_timer_may_set_another(loop):
    calls = []
    loop.call_later(0.0, lambda: loop.call_later(0.0, lambda: calls.append(1)))
    turn_until(loop, lambda: calls)


def test_descriptors(loop):
    left, right = socket.socketpair()
    with left, right:
        calls = []
        loop.register(left.fileno(), lambda: calls.append(left.recv(10)))
        right.send(b"x")
        turn_until(loop, lambda: calls)
        loop.modify(left.fileno(), lambda: calls.append(b"writable"), WRITE)
        loop.run_once(0.1)
        assert calls == [b"x", b"writable"]
        loop.unregister(left.fileno())
        loop.unregister(left.fileno())
        right.send(b"y")
        loop.run_once(0.0)
        assert len(calls) == 2


def test_who_is_unregistered_in_the_same_turn_is_not_called(loop):
    first, second = socket.socketpair(), socket.socketpair()
    calls = []

    def take(own, other):
        calls.append(own)
        loop.unregister(own)
        loop.unregister(other)

    ends = first[0].fileno(), second[0].fileno()
    loop.register(ends[0], lambda: take(ends[0], ends[1]))
    loop.register(ends[1], lambda: take(ends[1], ends[0]))
    first[1].send(b"x")
    second[1].send(b"x")
    loop.run_once(0.1)
    loop.run_once(0.0)
    assert len(calls) == 1
    for end in (*first, *second):
        end.close()


def test_signals_are_noted_and_given_back():
    before = signal.getsignal(signal.SIGUSR1)
    with EventLoop() as loop:
        noted = []
        loop.catch((signal.SIGUSR1,), noted.append)
        os.kill(os.getpid(), signal.SIGUSR1)
        turn_until(loop, lambda: noted)
        assert noted == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_wait_readable_is_bounded():
    left, right = socket.socketpair()
    with left, right:
        assert not wait_readable(left.fileno(), 0.01)
        assert not wait_readable(left.fileno(), -1.0)
        right.send(b"x")
        assert wait_readable(left.fileno(), 1.0)


def test_has_ended():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left:
        assert not has_ended(left.fileno())
        right.send(b"x")
        assert not has_ended(left.fileno())
        right.close()
        assert has_ended(left.fileno())
