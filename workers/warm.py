"""Warm connections: to the proxy, with TCP's and SOCKS5's first round trips behind them, for flows to come (by key).

    fill ─► connecting ─► method, password ─► ready ── take ──► a Dial, which asks at once
                 └──────────────┴───────────────┴─ closed, too old, other address ─► another one

Nothing is kept before a first flow has come. None is older than LIFE: proxies give up on silent clients, and what they
have closed without our knowing costs its flow a second attempt.
"""

from __future__ import annotations

import socket
from collections import deque
from errno import EINPROGRESS
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from typing import TYPE_CHECKING, Final

from workers import counts
from workers.socks.client import SocksHandshake
from workers.socks.wire import ProtocolError

if TYPE_CHECKING:
    from workers.upstream import Address
    from workers.worker import Worker

LIFE: Final = (
    30.0  #: seconds; below what servers wait for a request (dante: 30, asked at once after the method: ssh: 60)
)
RETRY: Final = 5.0  #: seconds without a new one, after one was lost before it was of use
EVERYTHING: Final = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET
READ: Final = 512  # octets; an answer has two

Taken = tuple[socket.socket, SocksHandshake | None]


class WarmConnections:
    """Those of one worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        upstream = worker.upstream
        self._size = 0 if upstream.direct or upstream.rejects else worker.settings.warm_connections
        self._ready: deque[_Warm] = deque()  # the oldest first
        self._all: set[_Warm] = set()
        self._retry_at = 0.0
        self._is_armed = False

    def take(self, now: float) -> Taken | None:
        """Return a connected socket, watched for everything, and its handshake that waits for the request (SOCKS5).

        None: there is none. Another one is made in its place.
        """
        if not self._size:
            return None
        taken = None
        while self._ready and taken is None:
            warm = self._ready.popleft()
            if warm.address == self._worker.upstream.proxy:
                taken = warm.give()
                self._all.discard(warm)
                self._worker.count[counts.TCP_WARM_USED] += 1
            else:
                self.lost(warm, now, useful=True)
        self._fill(now)
        return taken

    def ready(self, warm: _Warm) -> None:
        """Keep one that only needs its request now."""
        self._ready.append(warm)
        self._worker.count[counts.TCP_WARM] = len(self._ready)

    def lost(self, warm: _Warm, now: float, useful: bool) -> None:
        """Close one; `useful`: it had become ready, and so may the next."""
        warm.close()
        self._all.discard(warm)
        if warm in self._ready:
            self._ready.remove(warm)
        if not useful:
            self._retry_at = now + RETRY
        self._worker.count[counts.TCP_WARM] = len(self._ready)

    def _fill(self, now: float) -> None:
        upstream = self._worker.upstream
        while len(self._all) < self._size and now >= self._retry_at and upstream.proxy is not None:
            try:
                self._all.add(_Warm(self, self._worker, upstream.proxy, now))
            except OSError:
                self._retry_at = now + RETRY
        self._worker.count[counts.TCP_WARM] = len(self._ready)
        if self._all and not self._is_armed:
            self._is_armed = True
            self._worker.timers.call_at(now + RETRY, self._look)

    def _look(self, now: float) -> None:
        """Replace the old ones, and those that were lost."""
        self._is_armed = False
        for warm in [warm for warm in self._all if now - warm.opened_at >= LIFE]:
            self.lost(warm, now, useful=True)
        self._fill(now)
        if self._size and not self._is_armed:
            self._is_armed = True
            self._worker.timers.call_at(now + RETRY, self._look)

    def stop(self) -> None:
        """Close all."""
        self._size = 0
        for warm in self._all:
            warm.close()
        self._all.clear()
        self._ready.clear()


class _Warm:
    """One connection."""

    __slots__ = ("_connections", "_handshake", "_is_ready", "_socket", "_worker", "address", "opened_at")

    def __init__(self, connections: WarmConnections, worker: Worker, address: Address, now: float) -> None:
        """Begin to connect. OSError: there is no descriptor, or no way."""
        self._connections = connections
        self._worker = worker
        self.address = address
        self.opened_at = now
        self._is_ready = False
        upstream = worker.upstream
        self._handshake = upstream.warm_handshake()
        self._socket = opened = upstream.open(upstream.proxy_family, socket.SOCK_STREAM, fast=False)
        try:
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            error = opened.connect_ex(address)
            if error not in (0, EINPROGRESS):
                raise OSError(error, "connect to the proxy")
            worker.watch(opened.fileno(), EVERYTHING, self._connected)
        except BaseException:
            opened.close()
            raise

    def give(self) -> Taken:
        """Hand the socket over; it stays watched, and the taker puts its own handler in the place of ours."""
        return self._socket, self._handshake

    def close(self) -> None:
        """Close the connection."""
        self._worker.forget(self._socket.fileno())
        self._socket.close()

    def _connected(self, mask: int, now: float) -> None:
        if mask & (EPOLLERR | EPOLLHUP):
            self._connections.lost(self, now, useful=False)
        elif mask & EPOLLOUT:
            self._worker.handlers[self._socket.fileno()] = self._answered
            if self._handshake is None:
                self._ready()
            else:
                self._send(self._handshake.first_bytes, now)
            if mask & ~EPOLLOUT:
                self._answered(mask, now)

    def _answered(self, mask: int, now: float) -> None:
        """Take the method, and what the proxy says to the password; anything else is the end."""
        if not mask & ~EPOLLOUT:
            return
        try:
            data = self._socket.recv(READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or self._is_ready or self._handshake is None:
            self._connections.lost(self, now, useful=self._is_ready)
            return
        try:
            message = self._handshake.receive(data)
        except ProtocolError:
            self._connections.lost(self, now, useful=False)  # a flow that asks by itself will count it
            return
        if message:
            self._send(message, now)
        elif self._handshake.ready:
            self._ready()

    def _ready(self) -> None:
        self._is_ready = True
        self._connections.ready(self)

    def _send(self, data: bytes, now: float) -> None:
        try:
            self._socket.send(data)
        except OSError:
            self._connections.lost(self, now, useful=False)
