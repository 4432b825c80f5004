"""The receiving half of TCP with a whole worker around it: ACKs of many flows, windows, TIME-WAIT, keepalive."""

from contextlib import closing

import pytest

from tests.one_worker import OneWorker
from tests.test_flows import connected, received

OPTIONS = "mss 1460,sackOK,nop,wscale 7"


class StillWorker(OneWorker):
    """A worker whose clock stands still except in skip(): what a slow machine does is no part of the test."""

    clock = 5000.0

    @property
    def now(self) -> float:
        return self.clock

    def skip(self, seconds: float) -> None:
        """Let time pass: timers run exactly when they are due."""
        end = self.clock + seconds
        while self.clock < end:
            next_at = min(self.worker.timers.next_at, self.worker.tcp.next_at)
            self.clock = min(max(next_at, self.clock + 0.0001), end)
            self.breathe()


@pytest.fixture
def one():
    with closing(StillWorker()) as made:
        yield made


def conn_of(one, client):
    """Return the connection of a client's flow."""
    [conn] = [flow.conn for key, flow in one.table.items() if client.ports in key]
    return conn


def pure_acks(client):
    return [answer.ack for answer in client.unread() if not answer.text]


def test_an_ack_that_waits_for_text_does_not_wait_behind_those_of_other_flows(one):
    first, target = connected(one, OPTIONS, port=1)
    second, other = connected(one, OPTIONS, port=2)
    with target, other:
        for client in (first, second):
            conn_of(one, client).pingpong = True
        first.push(b"one")
        one.skip(0.005)
        received(one, target, 3)
        target.send(b"two")  # carries the ACK; the queue's entry stays
        first.read(3)
        first.unread()
        one.skip(0.010)
        first.push(b"three")  # at 15 ms
        one.skip(0.015)
        second.push(b"four")  # at 30 ms
        one.skip(0.024)
        assert pure_acks(first) == []
        one.skip(0.002)
        assert pure_acks(first) == [first.nxt]
        assert pure_acks(second) == []
        one.skip(0.015)
        assert pure_acks(second) == [second.nxt]
