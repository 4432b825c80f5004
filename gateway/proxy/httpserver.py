"""The HTTP carrier of gost v1, the server's end: a stream over many requests on any number of connections.

GET /s2c                  200, chunked, without end: 36 bytes of token, then what the server writes, a chunk each
POST /c2s?token=TOKEN     the body is what the client writes; 200 once it is taken, and only then comes the next
the same, empty           the client writes no more
"""

import errno
import uuid
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs, urlsplit

import h11

from gateway.proxy.address import SocketAddress
from gateway.proxy.stream import Layered, Owner, Stream

if TYPE_CHECKING:
    import socket

    from gateway.proxy.server import Server

MAX_KEPT: Final = 128 * 1024  # bytes of a body that are waited for; a longer one is passed on in pieces
MAX_BODIES: Final = 8  # that wait for a client's stream to be read again; gost queues as many

# What a piece of a POST's body is
POST_GOES_ON: Final = 0  #: more of it follows
POST_ENDS: Final = 1  #: the end of it
POST_EMPTY: Final = 2  #: all of it, and nothing: the client writes no more

NOBODY: Final = Owner()  # owns a stream until somebody does

Opened = Callable[["HttpServerStream"], None]


class HttpListener:
    """The streams of all clients, by token."""

    __slots__ = ("_opened", "_server", "streams")

    def __init__(self, server: "Server", opened: Opened) -> None:
        """`opened` is given each new stream."""
        self._server = server
        self._opened = opened
        self.streams: dict[str, HttpServerStream] = {}

    def admit(self, sock: "socket.socket") -> None:
        """Serve requests on a connection."""
        HttpConnection(self._server, self, sock)

    def open(self, connection: "HttpConnection") -> None:
        """Begin a stream whose downlink the connection is."""
        token = str(uuid.uuid4())
        stream = self.streams[token] = HttpServerStream(self._server, self, token, connection)
        connection.send_chunk(token.encode())
        self._opened(stream)


class HttpConnection(Owner):
    """One connection of a client: its requests, one after the other, or the one that is a downlink."""

    __slots__ = ("_body", "_http", "_is_empty", "_listener", "_server", "_uplink", "downlink", "stream")

    def __init__(self, server: "Server", listener: HttpListener, sock: "socket.socket") -> None:
        self._server = server
        self._listener = listener
        self._http = h11.Connection(h11.SERVER)
        self._body = bytearray()  #: what has come of a POST's, and is not passed on yet
        self._is_empty = True  #: nothing has
        self._uplink: HttpServerStream | None = None  #: whose body is being read; the last, between requests
        self.downlink: HttpServerStream | None = None
        self.stream = Stream(server, sock, self)
        server.expect(self, server.handshake_timeout)

    # Owner

    def received(self, data: bytes) -> None:
        if not self.downlink:  # there is nothing to say on a connection that only listens
            self._work(data)

    def ended(self) -> None:
        self._gone()

    def lost(self, number: int) -> None:
        self._gone()

    def drained(self) -> None:
        if self.downlink:
            self.downlink.owner.drained()

    def expire(self) -> None:
        """Close a connection that has said nothing, or whose stream is no more."""
        if self._uplink and not self._uplink.is_closed:
            self._server.expect(self, self._server.idle_timeout)
        else:
            self.close()

    # What streams do with it

    def send_chunk(self, data: bytes) -> None:
        """Send a chunk of a downlink."""
        self.stream.write(self._http.send(h11.Data(data=data)) or b"")

    def end_chunks(self) -> None:
        """End a downlink."""
        self.stream.write(self._http.send(h11.EndOfMessage()) or b"")

    def taken(self, what: int) -> None:
        """Hear that a body, or a piece of one, has been taken; answer if it is complete, and go on."""
        if what != POST_GOES_ON:
            self._answer(200)
        self._server.soon(self._next)

    def close(self) -> None:
        """Close the connection; its stream hears nothing."""
        self._server.settle(self)
        self.stream.close()

    # Requests

    def _next(self) -> None:
        if not self.stream.is_closed:
            self.stream.go_on()
            self._work(b"")

    def _work(self, data: bytes) -> None:
        try:
            if data:
                self._http.receive_data(data)
            self._take_events()
        except h11.RemoteProtocolError as error:
            self._server.counters["http-failed"] += 1
            self._refuse(error.error_status_hint)

    def _take_events(self) -> None:
        while not self.stream.is_closed:
            event = self._http.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return
            if isinstance(event, h11.Request):
                if not self._request(event):
                    return
            elif isinstance(event, h11.Data) and self._uplink:
                self._body += event.data
                self._is_empty = False
                if len(self._body) > MAX_KEPT:
                    self._post(self._uplink, POST_GOES_ON)
                    return
            elif isinstance(event, h11.EndOfMessage) and self._uplink:
                self._post(self._uplink, POST_EMPTY if self._is_empty else POST_ENDS)
                return
            elif isinstance(event, h11.ConnectionClosed):
                self.close()

    def _post(self, uplink: "HttpServerStream", what: int) -> None:
        body = bytes(self._body)
        self._body.clear()
        uplink.post(body, self, what)

    def _request(self, request: h11.Request) -> bool:
        """Begin with a request; False if nothing more of it is wanted."""
        try:
            target = urlsplit(request.target.decode("ascii", "replace"))  # absolute-form as well, from proxies
        except ValueError:
            return self._refuse(400)
        if target.path == "/s2c":
            self._server.settle(self)
            self.stream.write(
                self._http.send(
                    h11.Response(
                        status_code=200,
                        headers=[("Content-Type", "text/plain; charset=utf-8"), ("Transfer-Encoding", "chunked")],
                    )
                )
                or b""
            )
            self._listener.open(self)
            return False
        if target.path != "/c2s":
            return self._refuse(404)
        if request.method != b"POST":
            return self._refuse(405)
        token = parse_qs(target.query).get("token", [""])[0]
        uplink = self._listener.streams.get(token)
        if not uplink:
            return self._refuse(400)
        self._uplink = uplink
        self._is_empty = True
        self._server.expect(self, self._server.idle_timeout)
        return True

    def _refuse(self, status: int) -> bool:
        """Answer a request with an error, and close."""
        self._server.counters[f"http-{status}"] += 1
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._answer(status, [("Connection", "close")])
        self._server.settle(self)
        self.stream.finish()
        self._uplink = None
        self._server.expect(self, self._server.handshake_timeout)
        return False

    def _answer(self, status: int, headers: list[tuple[str, str]] | None = None) -> None:
        response = h11.Response(status_code=status, headers=[("Content-Length", "0"), *(headers or [])])
        self.stream.write((self._http.send(response) or b"") + (self._http.send(h11.EndOfMessage()) or b""))
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        elif self._http.our_state is h11.MUST_CLOSE:
            self.stream.finish()

    def _gone(self) -> None:
        self.close()
        if self.downlink:
            self.downlink.fail()


class HttpServerStream(Layered):
    """A client's stream; the downlink is one connection, the uplink whichever posts."""

    __slots__ = ("_bodies", "_connection", "_finished", "_held", "_listener", "_token")

    def __init__(self, server: "Server", listener: HttpListener, token: str, connection: HttpConnection) -> None:
        super().__init__(server, NOBODY)
        self._listener = listener
        self._token = token
        self._connection = connection
        self._bodies: deque[tuple[bytes, HttpConnection, int]] = deque()  #: that wait for `go_on`
        self._held = False
        self._finished = False
        connection.downlink = self

    @property
    def backlog(self) -> int:
        return self._connection.stream.backlog

    @property
    def local(self) -> SocketAddress:
        return self._connection.stream.local

    @property
    def peer(self) -> SocketAddress:
        return self._connection.stream.peer

    def post(self, body: bytes, connection: HttpConnection, what: int) -> None:
        """Take a body or a piece of one, now or once the stream is read again; the connection hears of it then."""
        if self.is_closed or self.has_ended:
            connection.taken(what)
        elif self._held and len(self._bodies) < MAX_BODIES:
            connection.stream.hold()
            self._bodies.append((body, connection, what))
        elif self._held:
            connection.close()  # a client waits for one answer before it posts the next
        else:
            connection.taken(what)
            if body:
                self._up(body)
            if what == POST_EMPTY:
                self._end()

    def hold(self) -> None:
        self._held = True

    def go_on(self) -> None:
        if self._held:
            self._held = False
            self._server.soon(self._take_bodies)

    def finish(self) -> None:
        if not self._finished and not self.is_closed:
            self._last_words()
            self._finished = True
            self._connection.end_chunks()

    def close(self) -> None:
        if not self.is_closed:
            self.finish()
            self.is_closed = True
            self._listener.streams.pop(self._token, None)
            while self._bodies:
                _, connection, what = self._bodies.popleft()
                connection.taken(what)
            self._connection.close()

    def abort(self) -> None:
        self._finished = True  # without an end, so that the client knows that something is missing
        self.close()

    def fail(self) -> None:
        """Hear that the downlink is gone."""
        if not self.is_closed:
            self._finished = True
            self.close()
            self.owner.lost(errno.ECONNRESET)

    def _take_bodies(self) -> None:
        while self._bodies and not self._held and not self.is_closed:
            self.post(*self._bodies.popleft())

    def _put(self, data: bytes) -> None:
        if not self._finished:
            self._connection.send_chunk(data)
