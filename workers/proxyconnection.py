"""ProxyConnection: a TCP connection to the proxy with one command on it, driven by the worker's loop.

UDP associations hang on one each, and so does each resolver that is asked over TCP. The owner is told:

    connected(bound, now)      the command succeeded
    refused(reply, now)        the proxy said no, with its REP code; the connection is closed
    lost(why, now)             the connection failed or ended; it is closed
    received(data, now)        what came behind a success
"""

from __future__ import annotations

import socket
from errno import EINPROGRESS, EOPNOTSUPP
from os import strerror
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from typing import TYPE_CHECKING, Final, Protocol

from workers import counts
from workers.socks.handshake import Handshake
from workers.socks.wire import REPLY_TEXT, Host, ProtocolError

if TYPE_CHECKING:
    from workers.worker import Worker

# Why a connection was lost
UNREACHABLE: Final = 0  #: the proxy's host or port does not answer
GARBAGE: Final = 1  #: it does not speak what it should, or refuses the password
CLOSED_EARLY: Final = 2  #: it closed before the request was sent
CLOSED_AT_REQUEST: Final = 3  #: it closed instead of a reply: how some servers say "command not supported"
CLOSED: Final = 4  #: it closed after the success

READ_SIZE: Final = 64 * 1024  # octets of one read; what a resolver may send in one message
MAX_UNSENT: Final = 256 * 1024  #: octets that may wait for a proxy that does not read


class Owner(Protocol):
    """Who is told what becomes of the connection."""

    def connected(self, bound: tuple[Host, int], now: float) -> None:
        """Take the success of the command, with BND.ADDR and BND.PORT."""

    def refused(self, reply: int, now: float) -> None:
        """Take a REP code other than 0."""

    def lost(self, why: int, now: float) -> None:
        """Take the end of the connection."""

    def received(self, data: bytes, now: float) -> None:
        """Take bytes that the other side sent after the success."""


class ProxyConnection:
    """One connection to the proxy; `peer` is the proxy's packed address."""

    __slots__ = (
        "_connecting",
        "_handshake",
        "_heard",
        "_owner",
        "_socket",
        "_unsent",
        "_worker",
        "peer",
        "peer_name",
    )

    def __init__(self, worker: Worker, owner: Owner, command: int, host: Host, port: int) -> None:
        """Begin to connect. OSError when there is no proxy, no way to it, no descriptor, or when a proxy of this kind
        cannot be asked for that; nothing is left then.

        `host` "" stands for zeros of the control connection's family, which UDP ASSOCIATE wants.
        """
        upstream = worker.upstream
        address = upstream.proxy
        if address is None:
            raise OSError("the proxy's name is not resolved")
        family = upstream.proxy_family
        self.peer_name = address[0]  #: numeric address of the proxy, with its scope
        #: the same packed
        self.peer = socket.inet_pton(family, address[0].partition("%")[0])
        handshake = upstream.handshake(command, host or bytes(len(self.peer)), port)
        if handshake.done:
            raise OSError(EOPNOTSUPP, f"the proxy cannot be asked: {REPLY_TEXT[handshake.reply]}")
        self._handshake: Handshake | None = handshake
        self._worker = worker
        self._owner = owner
        self._connecting = True
        self._heard = False  # the proxy has said something
        self._unsent = handshake.first_bytes
        opened = upstream.open(family, socket.SOCK_STREAM)
        try:
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            error = opened.connect_ex(address)
            if error not in (0, EINPROGRESS):
                raise OSError(error, "connect to the proxy")
            # Edge-triggered: one registration for the whole life, and nothing wakes us while nothing changes.
            worker.watch(opened.fileno(), EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, self._event)
        except BaseException:
            opened.close()
            raise
        self._socket: socket.socket | None = opened

    @property
    def unsent(self) -> int:
        """Octets that the socket did not take yet."""
        return len(self._unsent)

    def send(self, data: bytes) -> bool:
        """Send after the success; what the socket does not take waits. False: too much waits, or it is closed."""
        if self._socket is None or len(self._unsent) + len(data) > MAX_UNSENT:
            return False
        waits = bool(self._unsent)
        self._unsent += data
        if not waits:
            self._flush()
        return True

    def close(self) -> None:
        """Close the connection; the owner is told nothing more."""
        if self._socket is not None:
            self._worker.forget(self._socket.fileno())
            self._socket.close()
            self._socket = None
            self._handshake = None

    def _flush(self) -> None:
        if self._socket is not None and self._unsent:
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            except OSError:
                pass  # full: an edge will say when it is not; broken: the next event says how

    def _event(self, mask: int, now: float) -> None:
        if self._socket is None:
            return
        if self._connecting:
            error = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self._lose(UNREACHABLE, now, strerror(error))
                return
            if not mask & EPOLLOUT:
                return
            self._connecting = False
        self._flush()
        if mask & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            self._read(now)

    def _read(self, now: float) -> None:
        """Read until there is no more: the next edge comes only with new data."""
        while self._socket is not None:
            try:
                data = self._socket.recv(READ_SIZE)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                handshake = self._handshake
                if handshake is None:
                    self._lose(CLOSED, now)
                elif self._worker.upstream.pipelined and not self._heard:
                    # It does not take everything at once; the owner may try again.
                    self._worker.upstream.pipelining_failed()
                    self._lose(CLOSED, now)
                else:
                    self._lose(CLOSED_AT_REQUEST if handshake.requested else CLOSED_EARLY, now)
                return
            if self._handshake is None:
                self._owner.received(data, now)
            elif not self._advance(self._handshake, data, now):
                return

    def _advance(self, handshake: Handshake, data: bytes, now: float) -> bool:
        """Take one step of the handshake; False: it failed."""
        try:
            answer = handshake.receive(data)
        except ProtocolError as error:
            failed = self._worker.upstream.broken(error)
            self._worker.count[counts.PROXY_AUTH_FAILED if failed else counts.PROXY_PROTOCOL_ERRORS] += 1
            self._lose(GARBAGE, now)
            return False
        self._heard = True
        self._worker.upstream.answered()
        if answer:
            self._unsent += answer
            self._flush()
        if not handshake.done:
            return True
        if handshake.bound is None:
            self.close()
            self._owner.refused(handshake.reply, now)
            return False
        self._handshake = None
        self._owner.connected(handshake.bound, now)
        if handshake.surplus:
            self._owner.received(handshake.surplus, now)
        return True

    def _lose(self, why: int, now: float, reason: str = "it closed the connection before the request") -> None:
        if why in (UNREACHABLE, CLOSED_EARLY):
            proxy_unreachable(self._worker, reason)
        self.close()
        self._owner.lost(why, now)


def proxy_unreachable(worker: Worker, reason: str) -> None:
    """Count that the proxy is not there, and tell who watches over it."""
    worker.count[counts.PROXY_UNREACHABLE] += 1
    worker.upstream.failed(reason)
