"""A target in virtual time: what the worker takes for a connected socket, and the server behind it."""

from __future__ import annotations

import errno
import select
import socket
from dataclasses import dataclass
from math import inf
from random import Random
from typing import TYPE_CHECKING

from tests.simulation.world import STREAM

if TYPE_CHECKING:
    from tests.simulation.whole_worker import WholeWorker


@dataclass(frozen=True, slots=True)
class TargetTraits:
    """What the server behind the gateway does; octets, seconds."""

    capacity: int = 1 << 30  #: of the socket towards it
    reads: tuple[int, ...] = (65_000,)  #: how much comes at once
    pause: float = 0.0  #: between that
    connects: float = 0.001
    refuses: bool = False
    lingers: float = 0.0
    resets_after: float = inf
    waits: bool = False  #: it closes only when the client has


class Target:
    """A connected socket to a server that sends `total` octets of STREAM and takes as many as come."""

    traits: TargetTraits
    total: int  #: octets to send

    def __init__(self, shard: WholeWorker, fd: int) -> None:
        self.shard = shard
        self.fd = fd
        self.came = 0  #: octets that may be read
        self.read = 0  #: octets that were
        self.received = 0  #: octets from the client
        self.room = 0
        self.end_of_file = False  #: it has sent its FIN
        self.remote_closed = False  #: it has got one
        self.closed = False
        self.reset = False  #: it has got a RST
        self.broken = False  #: it has sent one
        self._blocked = False
        self._taking = False

    # ── as a socket ─────────────────────────────────────────────────────────────────────────────────────────────

    def fileno(self) -> int:
        assert not self.closed
        return self.fd

    def setsockopt(self, level: int, option: int, value: object) -> None:
        assert not self.closed
        if (level, option) == (socket.SOL_SOCKET, socket.SO_LINGER):
            self.reset = True

    def getsockopt(self, level: int, option: int) -> int:
        return errno.ECONNREFUSED if self.traits.refuses else errno.ECONNRESET

    def connect_ex(self, address: tuple[str, int]) -> int:
        world = self.shard.world
        flow = next((flow for flow in self.shard.flows.values() if flow.server_port == address[1]), None)
        if flow is None:  # noise that was a SYN
            self.broken = True
            return errno.ENETUNREACH
        flow.targets.append(self)
        self.traits = flow.traits
        self.total = flow.total
        self.room = flow.traits.capacity
        world.at(world.now + self.traits.connects, self._connected)
        return errno.EINPROGRESS

    def send(self, octets: memoryview | bytes) -> int:
        self._check()
        assert not self.remote_closed
        taken = min(len(octets), self.room)
        if not taken:
            self._blocked = True
            raise BlockingIOError
        at = self.received
        assert bytes(octets[:taken]) == STREAM[at : at + taken], f"wrong octets at {at}"
        self.received += taken
        if self.traits.capacity < 1 << 30:
            self._blocked = taken < len(octets)
            self.room -= taken
            if not self._taking:
                self._taking = True
                world = self.shard.world
                world.at(world.now + world.dice.random() * 0.3, self._takes)
        return taken

    def sendmsg(self, buffers: list[bytes]) -> int:
        return self.send(b"".join(buffers))

    def recv_into(self, view: memoryview) -> int:
        self._check()
        n = min(len(view), self.came - self.read)
        if not n and not self.end_of_file:
            raise BlockingIOError
        view[:n] = STREAM[self.read : self.read + n]
        self.read += n
        return n

    def recv(self, n: int, flags: int) -> bytes:
        assert flags == socket.MSG_PEEK
        self._check()
        if self.read == self.came and not self.end_of_file:
            raise BlockingIOError
        return STREAM[self.read : min(self.read + n, self.came)]

    def shutdown(self, how: int) -> None:
        assert how == socket.SHUT_WR
        self._check()
        self._fin()

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        if not self.reset and not self.broken:
            if not self.remote_closed:
                self._fin()
            assert self.read == self.came or self.broken, "closed over text"

    def _check(self) -> None:
        assert not self.closed
        if self.broken:
            raise ConnectionResetError(errno.ECONNRESET, "reset")

    # ── as a server ─────────────────────────────────────────────────────────────────────────────────────────────

    def _event(self) -> None:
        if not self.closed:
            self.shard.event(self)

    def mask(self) -> int:
        """Return what epoll would say now."""
        if self.broken:
            return select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLERR | select.EPOLLHUP
        mask = select.EPOLLOUT if self.room else 0
        if self.read < self.came or self.end_of_file:
            mask |= select.EPOLLIN
        if self.end_of_file:
            mask |= select.EPOLLRDHUP | (select.EPOLLHUP if self.remote_closed else 0)
        return mask

    def _connected(self, _: object) -> None:
        if self.closed:
            return
        if self.traits.refuses:
            self.broken = True
            self._event()
            return
        world = self.shard.world
        if self.traits.resets_after < inf:
            world.at(world.now + self.traits.resets_after, self._resets)
        if world.dice.random() < 0.5:
            self._sends(None)  # its first words come together with the connection
        else:
            world.at(world.now, self._sends)
        self._event()

    def _sends(self, _: object) -> None:
        """Send some, or the FIN."""
        if self.closed or self.broken:
            return
        world = self.shard.world
        traits = self.traits
        if self.came < self.total:
            self.came += min(world.dice.choice(traits.reads), self.total - self.came)
            if self.came < self.total:
                world.at(world.now + traits.pause, self._sends)
            elif not traits.waits or self.remote_closed:
                world.at(world.now + traits.lingers, self._closes)
            self._event()
        elif not traits.waits or self.remote_closed:
            self._closes(None)

    def _closes(self, _: object) -> None:
        if not self.end_of_file and not self.broken:
            self.end_of_file = True
            self._event()

    def _fin(self) -> None:
        assert not self.remote_closed
        self.remote_closed = True
        if self.traits.waits and self.came == self.total:
            self.shard.world.at(self.shard.world.now + self.traits.lingers, self._closes)

    def _resets(self, _: object) -> None:
        if not self.closed:
            self.broken = True
            self._event()

    def _takes(self, _: object) -> None:
        dice = self.shard.world.dice
        self._taking = False
        self.room = min(self.room + dice.choice((1000, 5000, 100_000)), self.traits.capacity)
        if self.room < self.traits.capacity and not self.closed:
            self._taking = True
            self.shard.world.at(self.shard.world.now + dice.random() * 0.3, self._takes)
        if self._blocked and not self.broken:
            self._blocked = False
            self._event()


def target_traits(dice: Random) -> TargetTraits:
    """Draw a server."""
    return TargetTraits(
        capacity=dice.choice((1 << 30, 1 << 30, 3000, 100_000)),
        reads=dice.choice(((65_000,), (1, 700, 20_000, 65_000), (100, 5000))),
        pause=dice.choice((0.0, 0.0, 0.0, 0.001, 0.05)),
        connects=dice.choice((0.0, 0.001, 0.5)),
        refuses=dice.random() < 0.02,
        lingers=dice.choice((0.0, 0.0, 0.0, 0.1, 100.0)),
        resets_after=dice.choice((0.0, 0.01, 0.2, 3.0)) * dice.random() if dice.random() < 0.04 else inf,
        waits=dice.random() < 0.3,
    )
