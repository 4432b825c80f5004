"""Session: a client from its first byte until its request is granted or refused; nothing here outlives that.

    _greeting → (_password) → _request ──CONNECT──► lookup → connect → reply → relay.py
                                       ──BIND─────► bind.py
                                       ──UDP──────► udp.py
                                       ──refused──► reply, then _linger until the client has read it

The state *is* a method; each returns early while bytes are missing, and goes on to the next with what is left: clients
may send all at once (RFC 1928 does not forbid it), or byte by byte. Bytes behind the request belong to the flow.
"""

import errno
import hmac
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from gateway.proxy import bind, udp
from gateway.proxy.poll import FAILED, READ, WRITE
from gateway.proxy.relay import relay
from gateway.proxy.reply import refusal, reply_for, success
from gateway.proxy.resolve import Address
from workers.socks.wire import (
    ADDRESS_TYPE_NOT_SUPPORTED,
    BIND,
    COMMAND_NOT_SUPPORTED,
    CONNECT,
    HOST_UNREACHABLE,
    NO_ACCEPTABLE_METHOD,
    NO_AUTHENTICATION,
    UDP_ASSOCIATE,
    USERNAME_PASSWORD,
    VERSION,
    Host,
    ProtocolError,
    parse_address,
)

if TYPE_CHECKING:
    from gateway.proxy.server import Server

READ_SIZE: Final = 4096  # bytes; a handshake is at most 257 + 513 + 262
LINGER_TIMEOUT: Final = 2.0  # seconds for a refused client to read why

_CONNECTED: Final = (0, errno.EISCONN)
_UNDER_WAY: Final = (errno.EINPROGRESS, errno.EALREADY, errno.EINTR)


class Session:
    """One client that has been accepted and has not got what it wants yet."""

    __slots__ = ("_addresses", "_client", "_inbox", "_interest", "_port", "_server", "_share", "_state", "_target")

    def __init__(self, server: "Server", client: socket.socket) -> None:
        """Own the client's socket from now on."""
        self._server = server
        self._client = client
        self._inbox = b""  #: what has come and is not understood yet
        self._interest = READ
        self._state: Callable[[Session], None] = Session._greeting
        self._target: socket.socket | None = None  #: the connection that is being made
        self._addresses: list[Address] = []  #: still to be tried
        self._port = 0
        self._share = 0.0  #: seconds for each address
        server.add(client, READ, self.ready)
        server.expect(self, server.handshake_timeout)

    def ready(self, events: int) -> None:
        """Read what the client sends and go as far as it reaches."""
        try:
            data = self._client.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._give_up("handshake-unfinished")
            return
        self._inbox += data  # less than READ_SIZE + 513: every state takes what is complete
        try:
            self._state(self)
        except OSError:
            self._give_up("handshake-unfinished")

    def expire(self) -> None:
        """Go on to the next address, refuse, or give up, whatever the time was meant for."""
        if self._target:
            self._attempt_failed(errno.ETIMEDOUT)
        else:
            self._give_up("handshake-timeout" if self._state is not Session._linger else "refused-unread")

    def _greeting(self) -> None:
        inbox = self._inbox
        if inbox[0] != VERSION:
            self._give_up("socks-version")
            return
        if len(inbox) < 2 or len(inbox) < 2 + inbox[1]:
            return
        end = 2 + inbox[1]
        offered = inbox[2:end]
        self._inbox = inbox[end:]
        if self._server.credentials and USERNAME_PASSWORD in offered:
            self._state = Session._password
            self._client.send(b"\x05\x02")
        elif not self._server.credentials and NO_AUTHENTICATION in offered:
            self._state = Session._request
            self._client.send(b"\x05\x00")
        else:
            self._refuse("method-refused", bytes((VERSION, NO_ACCEPTABLE_METHOD)))
            return
        if self._inbox:
            self._state(self)

    def _password(self) -> None:
        inbox = self._inbox
        if inbox[0] != 1:
            self._refuse("password-version", b"\x01\xff")
            return
        if len(inbox) < 2 or len(inbox) < 3 + inbox[1]:
            return
        username_end = 2 + inbox[1]
        end = username_end + 1 + inbox[username_end]
        if len(inbox) < end:
            return
        self._inbox = inbox[end:]
        username, password = self._server.credentials or (b"", b"")
        # Both are always compared, and in constant time, so that the time tells nothing.
        right = hmac.compare_digest(inbox[2:username_end], username)
        right &= hmac.compare_digest(inbox[username_end + 1 : end], password)
        if not right:
            self._refuse("password-refused", b"\x01\x01")
            return
        self._state = Session._request
        self._client.send(b"\x01\x00")
        if self._inbox:
            self._state(self)

    def _request(self) -> None:
        inbox = self._inbox
        if inbox[0] != VERSION:
            self._give_up("socks-version")
            return
        try:
            address = parse_address(inbox, 3)
        except ProtocolError as error:
            self.refuse(ADDRESS_TYPE_NOT_SUPPORTED, error.reason)
            return
        if address is None:
            return
        host, port, end = address
        self._inbox = inbox[end:]
        command = inbox[1]
        if command == CONNECT:
            self._connect_to(host, port)
        elif command == UDP_ASSOCIATE:
            self._hand_over(udp.associate)
        elif command == BIND:
            self._hand_over(lambda server, client, early: bind.bind(server, client, early, host))
        else:
            self.refuse(COMMAND_NOT_SUPPORTED, "command-not-supported")

    # CONNECT

    def _connect_to(self, host: Host, port: int) -> None:
        self._port = port
        self._server.poller.handlers[self._client.fileno()] = self._client_ready_early
        if isinstance(host, str):
            # The resolver has its own timeouts; then it is silent, and the client waits as it would for its own.
            self._server.settle(self)
            self._server.resolver.lookup(host, self._resolved)
        elif len(host) == 4:
            self._resolved([(socket.AF_INET, socket.inet_ntop(socket.AF_INET, host))])
        else:
            self._resolved([(socket.AF_INET6, socket.inet_ntop(socket.AF_INET6, host))])

    def _client_ready_early(self, events: int) -> None:
        """Leave in the kernel what a client sends before its target is there; only a reset ends it."""
        if events & FAILED and self._client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._give_up("client-reset")
        elif self._interest:
            self._interest = 0
            self._server.poller.change(self._client.fileno(), 0)
        elif events & FAILED:
            self._server.poller.mute(self._client.fileno())

    def _resolved(self, addresses: list[Address]) -> None:
        if self._state is Session._closed:
            return  # the client did not wait
        if not addresses:
            self.refuse(HOST_UNREACHABLE, "name-unknown")
            return
        self._addresses = addresses
        self._share = self._server.connect_timeout / len(addresses)
        self._try_next()

    def _try_next(self) -> None:
        family, host = self._addresses.pop(0)
        try:
            target = socket.socket(family, socket.SOCK_STREAM)
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

    def _attempt_failed(self, number: int) -> None:
        if self._target:
            self._server.close(self._target)
            self._target = None
        if self._addresses:
            self._try_next()
        else:
            self.refuse(reply_for(number), f"connect-{errno.errorcode.get(number, number)}")

    def _connected(self, target: socket.socket) -> None:
        try:
            reply = success(target)
            self._client.send(reply)
        except OSError:
            self._give_up("client-reset")
            return
        self._server.settle(self)
        self._server.counters["connected"] += 1
        relay(self._server, self._client, target, self._inbox, self._interest)

    # Ends

    def _hand_over(self, to: Callable[["Server", socket.socket, bytes], None]) -> None:
        """Let BIND or UDP ASSOCIATE take the client over, unless it cannot even begin."""
        try:
            to(self._server, self._client, self._inbox)
        except OSError as error:
            self.refuse(reply_for(error.errno), "socket-refused")
            return
        self._server.settle(self)

    def refuse(self, reply: int, reason: str) -> None:
        """Answer the request with a REP code other than success."""
        self._refuse(reason, refusal(reply))

    def _refuse(self, reason: str, answer: bytes) -> None:
        self._server.counters[reason] += 1
        # Closing with bytes unread would send RST, which may overtake the answer: send FIN, and wait for the client's.
        self._inbox = b""
        self._state = Session._linger
        fd = self._client.fileno()
        self._server.poller.handlers[fd] = self.ready
        if self._interest != READ:
            self._interest = READ
            self._server.poller.change(fd, READ)
        self._server.expect(self, LINGER_TIMEOUT)
        try:
            self._client.send(answer)
            self._client.shutdown(socket.SHUT_WR)
        except OSError:
            self._give_up(None)

    def _linger(self) -> None:
        self._inbox = b""

    def _closed(self) -> None:
        self._inbox = b""

    def _give_up(self, reason: str | None) -> None:
        if reason and self._state is not Session._linger:
            self._server.counters[reason] += 1
        self._state = Session._closed
        self._server.settle(self)
        self._server.close(self._client)
        if self._target:
            self._server.close(self._target)
            self._target = None
