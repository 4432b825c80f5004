"""The HTTP carrier of gost v1, the client's end; httpserver.py has what goes over the wire.

    HttpClientStream   the downlink: one GET whose answer does not end
    _Uplink            one POST at a time, each with all that was written since the one before

Through an HTTP proxy the requests say the whole URL instead of asking for a tunnel.
"""

import errno
import socket
from typing import TYPE_CHECKING, Final

import h11

from gateway.proxy.address import SocketAddress
from gateway.proxy.dial import Dial
from gateway.proxy.stream import Layered, Owner, Stream
from workers.socks.http import basic_credentials
from workers.socks.wire import ProtocolError

if TYPE_CHECKING:
    from gateway.proxy.forward import Forwarder
    from gateway.proxy.server import Server

TOKEN_LENGTH: Final = 36  # bytes; a UUID as text
MAX_POST: Final = 64 * 1024  # bytes of one body
LAST_TIMEOUT: Final = 10.0  # seconds for the last POST, which tells the server that no more comes


class HttpClientStream(Layered, Owner):
    """A stream to a server; `owner.opened` is called once the server has given its token."""

    __slots__ = ("_downlink", "_forwarder", "_http", "_token", "_uplink")

    def __init__(self, server: "Server", forwarder: "Forwarder", sock: socket.socket, owner: Owner) -> None:
        """Use a connected socket for the downlink."""
        super().__init__(server, owner)
        self._forwarder = forwarder
        self._http = h11.Connection(h11.CLIENT)
        self._token = b""
        self._uplink: _Uplink | None = None  #: once there is a token
        self._downlink = Stream(server, sock, self)

    def begin(self) -> None:
        """Ask for the downlink."""
        request = h11.Request(method="GET", target=target(self._forwarder, "/s2c"), headers=fields(self._forwarder))
        self._downlink.write((self._http.send(request) or b"") + (self._http.send(h11.EndOfMessage()) or b""))

    @property
    def backlog(self) -> int:
        return self._uplink.backlog if self._uplink else 0

    @property
    def local(self) -> SocketAddress:
        return self._downlink.local

    @property
    def peer(self) -> SocketAddress:
        return self._downlink.peer

    def hold(self) -> None:
        self._downlink.hold()

    def go_on(self) -> None:
        self._downlink.go_on()

    def finish(self) -> None:
        if self._uplink:
            self._last_words()
            self._uplink.last()

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._downlink.close()
            if self._uplink:
                self._uplink.last()

    def _put(self, data: bytes) -> None:
        if self._uplink:
            self._uplink.write(data)

    # The downlink's owner

    def received(self, data: bytes) -> None:
        try:
            self._http.receive_data(data)
            while not self.is_closed:
                event = self._http.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    return
                if isinstance(event, h11.Response) and event.status_code != 200:
                    self.fails(ProtocolError("http-refused", f"GET /s2c is answered with {event.status_code}"))
                elif isinstance(event, h11.Data):
                    self._take(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                    self._end()
                    return
        except h11.RemoteProtocolError as error:
            self.fails(ProtocolError("http-failed", f"HTTP: {error}"))

    def ended(self) -> None:
        if not self.has_ended:
            self.lost(errno.ECONNRESET)  # in the middle of the answer

    def lost(self, number: int) -> None:
        if not self.is_closed:
            self.close()
            self.owner.lost(number)

    def fails(self, error: ProtocolError) -> None:
        """Give up for what the server has said."""
        if not self.is_closed:
            self._server.complain(error)
            self.lost(errno.EPROTO)

    def _take(self, data: bytes) -> None:
        if self._uplink:
            self._up(data)
            return
        self._token += data
        if len(self._token) < TOKEN_LENGTH:
            return
        token, rest = self._token[:TOKEN_LENGTH], self._token[TOKEN_LENGTH:]
        if not all(character in b"0123456789abcdefABCDEF-" for character in token):
            self.fails(ProtocolError("http-token", "the answer to GET /s2c does not begin with a token"))
            return
        self._uplink = _Uplink(self._server, self._forwarder, token.decode(), self)
        self.owner.opened()
        if rest:
            self._up(rest)


class _Uplink(Owner):
    """What the client writes, as bodies of POSTs; after the last one it closes itself."""

    __slots__ = (
        "_dial",
        "_forwarder",
        "_http",
        "_is_busy",
        "_is_last",
        "_is_over",
        "_is_said",
        "_server",
        "_stream",
        "_target",
        "_user",
        "_waiting",
    )

    def __init__(self, server: "Server", forwarder: "Forwarder", token: str, user: HttpClientStream) -> None:
        self._server = server
        self._forwarder = forwarder
        self._target = target(forwarder, f"/c2s?token={token}")
        self._user = user
        self._waiting = bytearray()  #: written, and not posted yet
        self._is_busy = False  #: a POST is not answered yet, or the connection is being made
        self._is_last = False  #: no more is written
        self._is_said = False  #: and the server has been told
        self._is_over = False  #: and has answered, or does not matter any more
        self._dial: Dial | None = None
        self._stream: Stream | None = None
        self._http = h11.Connection(h11.CLIENT)

    @property
    def backlog(self) -> int:
        """Return how many bytes wait for a POST; the end counts as one until it is taken."""
        return len(self._waiting) + (self._is_last and not self._is_over)

    def write(self, data: bytes) -> None:
        """Post bytes, as soon as the POST before is answered."""
        if not self._is_last:
            self._waiting += data
            self._post()

    def last(self) -> None:
        """Say with an empty POST that no more comes, after what waits."""
        if not self._is_last:
            self._is_last = True
            self._server.expect(self, LAST_TIMEOUT)
            self._post()
        elif not self._is_busy:
            self._close()

    def expire(self) -> None:
        """Give the last POST up."""
        self._close()

    def connected(self, sock: socket.socket) -> None:
        self._dial = None
        self._stream = Stream(self._server, sock, self)
        self._http = h11.Connection(h11.CLIENT)
        self._is_busy = False
        self._post()

    def not_connected(self, reply: int, reason: str) -> None:
        self._dial = None
        self._gone()

    def received(self, data: bytes) -> None:
        try:
            self._http.receive_data(data)
            while True:
                event = self._http.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    return
                if isinstance(event, h11.Response) and event.status_code != 200 and not self._is_last:
                    self._close()
                    self._user.fails(ProtocolError("http-refused", f"POST /c2s is answered with {event.status_code}"))
                    return
                if isinstance(event, h11.EndOfMessage):
                    self._answered()
                    return
        except h11.RemoteProtocolError as error:
            self._close()
            self._user.fails(ProtocolError("http-failed", f"HTTP: {error}"))

    def ended(self) -> None:
        if self._is_busy:
            self._gone()
        elif self._stream:  # an idle connection that the server, or a proxy, does not want to keep
            self._stream.close()
            self._stream = None

    def lost(self, number: int) -> None:
        self._gone()

    def _post(self) -> None:
        """Post what waits, or at the end nothing, unless a POST is under way."""
        if self._is_busy or not (self._waiting or (self._is_last and not self._is_said)):
            return
        self._is_busy = True
        if not self._stream:
            first = self._forwarder.via or self._forwarder.url.proxy
            self._dial = Dial(self._server, first.host, first.port, self)
            self._dial.start()
            return
        body = bytes(self._waiting[:MAX_POST])
        del self._waiting[:MAX_POST]
        self._is_said = not body
        # Without a Content-Type: Go's server would look for the token in a form, and eat the body.
        headers = [*fields(self._forwarder), ("Content-Length", str(len(body)))]
        request = h11.Request(method="POST", target=self._target, headers=headers)
        events: tuple[h11.Event, ...] = (request, h11.Data(data=body), h11.EndOfMessage())
        self._stream.write(b"".join(self._http.send(event) or b"" for event in events))

    def _answered(self) -> None:
        """Go on to the next POST, on the same connection if it is kept."""
        self._is_busy = False
        if self._is_said:
            self._close()
            if not self._user.is_closed:
                self._user.owner.drained()
            return
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        elif self._stream:
            self._stream.close()
            self._stream = None
        self._post()
        if not self._waiting and not self._user.is_closed:
            self._user.owner.drained()

    def _gone(self) -> None:
        self._close()
        self._user.lost(errno.ECONNRESET)

    def _close(self) -> None:
        self._server.settle(self)
        self._is_last = self._is_said = self._is_over = True
        self._waiting.clear()
        if self._dial:
            self._dial.cancel()
        if self._stream:
            self._stream.close()


def target(forwarder: "Forwarder", path: str) -> str:
    """Return the target of a request: the whole URL for a proxy (RFC 9112, 3.2.2)."""
    return f"http://{forwarder.authority}{path}" if forwarder.via else path


def fields(forwarder: "Forwarder") -> list[tuple[str, str]]:
    """Return the header fields of every request."""
    via = forwarder.via
    found = [("Host", forwarder.authority), ("User-Agent", "ringway")]
    if via and via.username:
        found.append(("Proxy-Authorization", basic_credentials(via.username, via.password)))
    return found
