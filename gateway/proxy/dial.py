"""Dial: a TCP connection to a host and port, from the lookup of its name to the address that answers."""

import errno
import socket
from typing import TYPE_CHECKING, Final, Protocol

from gateway.proxy.poll import READ, WRITE
from gateway.proxy.reply import reply_for
from gateway.proxy.resolve import Address
from workers.socks.wire import HOST_UNREACHABLE, Host

if TYPE_CHECKING:
    from gateway.proxy.server import Server

_CONNECTED: Final = (0, errno.EISCONN)
_UNDER_WAY: Final = (errno.EINPROGRESS, errno.EALREADY, errno.EINTR)


class Caller(Protocol):
    """Who wants the connection."""

    def connected(self, sock: socket.socket) -> None:
        """Take the socket, which the server knows and waits to read from."""

    def not_connected(self, reply: int, reason: str) -> None:
        """Hear why there is none: a REP code, and the name of a counter."""


class Dial:
    """One attempt; every address of a name gets its share of the time."""

    __slots__ = ("_addresses", "_caller", "_host", "_is_over", "_port", "_server", "_share", "_target")

    def __init__(self, server: "Server", host: Host, port: int, caller: Caller) -> None:
        self._server = server
        self._host = host
        self._port = port
        self._caller = caller
        self._addresses: list[Address] = []  #: still to be tried
        self._share = 0.0  #: seconds for each address
        self._target: socket.socket | None = None  #: the connection that is being made
        self._is_over = False

    def start(self) -> None:
        """Begin; the caller may hear of the end before this returns."""
        host = self._host
        if isinstance(host, str):
            # The resolver has its own timeouts; until then it is silent.
            self._server.resolver.lookup(host, self._resolved)
        elif len(host) == 4:
            self._resolved([(socket.AF_INET, socket.inet_ntop(socket.AF_INET, host))])
        else:
            self._resolved([(socket.AF_INET6, socket.inet_ntop(socket.AF_INET6, host))])

    def cancel(self) -> None:
        """Give up; the caller hears nothing more."""
        if not self._is_over:
            self._over()

    def expire(self) -> None:
        """Go on to the next address."""
        self._attempt_failed(errno.ETIMEDOUT)

    def _resolved(self, addresses: list[Address]) -> None:
        if self._is_over:
            return
        if not addresses:
            self._over()
            self._caller.not_connected(HOST_UNREACHABLE, "name-unknown")
            return
        self._addresses = addresses
        self._share = self._server.connect_timeout / len(addresses)
        self._try_next()

    def _try_next(self) -> None:
        family, host = self._addresses.pop(0)
        try:
            target = self._server.open_socket(family, socket.SOCK_STREAM)
        except OSError as error:
            self._attempt_failed(error.errno or 0)
            return
        target.setblocking(False)
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        target.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        outcome = target.connect_ex((host, self._port))
        if outcome == errno.EINPROGRESS:
            # To this machine the handshake is over by now, only connect() could not know: asking again saves a wakeup.
            outcome = target.connect_ex((host, self._port))
        self._target = target
        if outcome in _CONNECTED:
            self._server.add(target, READ, self._target_ready)
            self._connected(target)
        else:
            self._server.add(target, WRITE, self._target_ready)
            if outcome in _UNDER_WAY:
                self._server.expect(self, self._share)
            else:
                self._attempt_failed(outcome)

    def _target_ready(self, _: int) -> None:
        target = self._target
        if not target:
            return
        outcome = target.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if outcome:
            self._attempt_failed(outcome)
            return
        self._server.poller.change(target.fileno(), READ)
        self._connected(target)

    def _connected(self, target: socket.socket) -> None:
        self._target = None
        self._over()
        self._caller.connected(target)

    def _attempt_failed(self, number: int) -> None:
        if self._target:
            self._server.close(self._target)
            self._target = None
        if self._addresses:
            self._try_next()
            return
        self._over()
        self._caller.not_connected(reply_for(number), f"connect-{errno.errorcode.get(number, number)}")

    def _over(self) -> None:
        self._is_over = True
        self._server.settle(self)
        if self._target:
            self._server.close(self._target)
            self._target = None
