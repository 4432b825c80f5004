"""Opening: a tunnel to another server, from the first SYN to the reply: dial → via → TLS → WebSocket → SOCKS5.

Each step waits for the one before: some servers read greedily and lose what comes too early. The steps stand in one
generator, `_route`.
"""

import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, Protocol

from gateway.proxy.dial import Dial
from gateway.proxy.httpclient import HttpClientStream
from gateway.proxy.stream import Layer, Layered, Owner, Stream
from gateway.proxy.tunnelurl import HTTP, TLS, WS, WSS
from gateway.proxy.websocket import WebSocket
from workers.socks.client import SocksHandshake
from workers.socks.handshake import Handshake
from workers.socks.tlsmethod import TlsMethodHandshake
from workers.socks.wire import CONNECT, GENERAL_FAILURE, TTL_EXPIRED, Host, ProtocolError

if TYPE_CHECKING:
    from gateway.proxy.forward import Forwarder
    from gateway.proxy.server import Server

OPEN_TIMEOUT: Final = 20.0  # seconds from the lookup to the reply, over all steps
NAMELESS_TIMEOUT: Final = 1.0  # seconds for the rest of a reply that gost v1 may have written without the address


class Caller(Protocol):
    """Who wants the tunnel."""

    def opened(self, stream: Layered, handshake: Handshake) -> None:
        """Take the stream, on which the command has been granted; the surplus is in the handshake."""

    def not_opened(self, reply: int, reason: str, refused: bool) -> None:
        """Hear a REP code and the name of a counter; `refused`: the other server did not want this command."""


class Opening(Owner):
    """One tunnel that is being made."""

    __slots__ = (
        "_bare",
        "_caller",
        "_dial",
        "_forwarder",
        "_handshake",
        "_http",
        "_is_over",
        "_nameless",
        "_server",
        "_steps",
        "_stream",
        "_surplus",
    )

    def __init__(
        self,
        server: "Server",
        forwarder: "Forwarder",
        command: int,
        host: Host,
        port: int,
        caller: Caller,
        *,
        nameless: bool = False,
    ) -> None:
        """`nameless`: the reply may be gost v1's over IPv6, which lacks the address."""
        self._server = server
        self._forwarder = forwarder
        self._caller = caller
        self._nameless = nameless
        self._dial: Dial | None = None
        self._stream: Layered | None = None
        self._handshake: Handshake | None = None  #: who takes what comes
        self._surplus = b""  #: what came behind the answer of one step belongs to the next
        self._http: HttpClientStream | None = None
        self._is_over = False
        self._bare = False  #: a reply is there but for its address
        self._steps = self._route(command, host, port)

    def start(self) -> None:
        """Begin; the caller may hear of the end before this returns."""
        first = self._forwarder.via or self._forwarder.url.proxy
        self._server.expect(self, OPEN_TIMEOUT)
        self._dial = Dial(self._server, first.host, first.port, self)
        self._dial.start()

    def cancel(self) -> None:
        """Give up; the caller hears nothing more."""
        if not self._is_over:
            self._over()
            if self._dial:
                self._dial.cancel()
            if self._stream:
                self._stream.close()

    def expire(self) -> None:
        """Give up, or take what is there of a reply."""
        if self._bare:
            self._granted()
        else:
            self._fail(TTL_EXPIRED, "tunnel-timeout", f"no answer in {OPEN_TIMEOUT:.0f} s")

    # Dial

    def connected(self, sock: socket.socket) -> None:
        self._dial = None
        if self._forwarder.url.carrier == HTTP:
            self._http = HttpClientStream(self._server, self._forwarder, sock, self)
            self._stream = self._http
        else:
            self._stream = Stream(self._server, sock, self)
        next(self._steps)()

    def not_connected(self, reply: int, reason: str) -> None:
        self._fail(reply, f"tunnel-{reason}", reason)

    # Stream

    def received(self, data: bytes) -> None:
        if self._is_over or not self._handshake or not self._stream:
            return
        handshake = self._handshake
        try:
            answer = handshake.receive(data)
        except ProtocolError as error:
            self._fail(GENERAL_FAILURE, f"tunnel-{error.reason}", str(error))
            return
        if answer:
            self._stream.write(answer)
        if handshake.done:
            if handshake.reply:
                self._refused(handshake.reply, f"tunnel-reply-{handshake.reply}")
                return
            self._surplus = handshake.surplus
            self._go_on()
        elif isinstance(handshake, TlsMethodHandshake) and handshake.wants_tls:
            handshake.wants_tls = False
            self._go_on()
        elif self._nameless and isinstance(handshake, SocksHandshake) and handshake.has_bare_reply:
            if self._stream.keeps_messages:
                self._granted()
            else:
                self._bare = True
                self._server.expect(self, NAMELESS_TIMEOUT)

    def opened(self) -> None:
        self._go_on()

    def ended(self) -> None:
        self._closed()

    def lost(self, number: int) -> None:
        self._closed()

    def _closed(self) -> None:
        if self._is_over:
            return
        if self._handshake and self._handshake.requested:
            self._refused(GENERAL_FAILURE, "tunnel-closed-at-request")  # how some servers say "not supported"
        else:
            self._fail(GENERAL_FAILURE, "tunnel-closed", "the connection is closed during the handshake")

    # Steps

    def _route(self, command: int, host: Host, port: int) -> Iterator[Callable[[], None]]:
        """Yield what to do after each other."""
        forwarder = self._forwarder
        url = forwarder.url
        if forwarder.via_handshake:
            via = forwarder.via_handshake(CONNECT, url.proxy.host, url.proxy.port)
            yield lambda: self._ask(via)
        if self._http:
            yield self._http.begin
        if url.carrier in (TLS, WSS):
            yield lambda: self._wrap(forwarder.tls.connect(url.proxy.host))
        if url.carrier in (WS, WSS):
            yield lambda: self._wrap(WebSocket(forwarder.authority, url.path))
        handshake = forwarder.handshake(command, host, port)
        yield lambda: self._ask(handshake)
        if isinstance(handshake, TlsMethodHandshake):
            yield lambda: self._wrap(forwarder.tls.connect(url.proxy.host))
            yield lambda: self._ask(handshake)
        yield self._granted

    def _go_on(self) -> None:
        if not self._is_over:
            next(self._steps)()

    def _ask(self, handshake: Handshake) -> None:
        self._handshake = handshake
        if handshake.done:  # the other server cannot be asked for that
            self._refused(handshake.reply, f"tunnel-reply-{handshake.reply}")
            return
        if self._stream:
            self._stream.write(handshake.first_bytes)
        surplus, self._surplus = self._surplus, b""
        if surplus:
            self.received(surplus)

    def _wrap(self, layer: Layer) -> None:
        self._handshake = None
        if self._stream:
            self._stream.push(layer, self._surplus)
            self._surplus = b""

    def _granted(self) -> None:
        stream = self._stream
        self._over()
        if stream and self._handshake:
            self._forwarder.works()
            self._caller.opened(stream, self._handshake)

    # Ends

    def _refused(self, reply: int, reason: str) -> None:
        """Hear no from the other server, which therefore is there."""
        self._over()
        if self._stream:
            self._stream.close()
        self._forwarder.works()
        self._caller.not_opened(reply, reason, True)

    def _fail(self, reply: int, reason: str, why: str) -> None:
        self._over()
        if self._dial:
            self._dial.cancel()
        if self._stream:
            self._stream.close()
        self._forwarder.fails(why)
        self._caller.not_opened(reply, reason, False)

    def _over(self) -> None:
        self._is_over = True
        self._server.settle(self)
