"""WebSocket as a layer of a stream (RFC 6455): each write is a binary message, and what comes are bytes.

gost puts its SOCKS5 into WebSocket so: path / (v1) or /ws (v2), no protocol, no extensions, and a TCP FIN without a
Close frame at the end, for WebSocket has no half-close.
"""

from typing import Final

from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Message,
    Ping,
    RejectConnection,
    Request,
    TextMessage,
)
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from workers.socks.wire import ProtocolError

MAX_KEPT: Final = 128 * 1024  # bytes of a message that are waited for; a longer one is passed on in pieces

#: closed for what one side could not understand, mostly this one
_ERRORS: Final = (CloseReason.PROTOCOL_ERROR, CloseReason.UNSUPPORTED_DATA, CloseReason.INVALID_FRAME_PAYLOAD_DATA)

_NOT_HERE: Final = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class WebSocket:
    """One end of a WebSocket."""

    __slots__ = ("_head", "_kept", "_request", "_socket", "ended", "farewell", "keeps_messages", "ready")

    def __init__(self, host: str = "", path: str = "/") -> None:
        """With `host` (and port) the client's end, else the server's, which takes any path and origin."""
        self._request = Request(host=host, target=path) if host else None
        self._socket = WSConnection(ConnectionType.CLIENT if host else ConnectionType.SERVER)
        self._head = bytearray()  #: the end of what has come of a request
        self._kept = bytearray()  #: a message that is not complete
        self.ready = False
        self.ended = False
        self.keeps_messages = True
        self.farewell = b"" if host else _NOT_HERE

    def start(self) -> bytes:
        """Return the client's request for the upgrade."""
        return self._socket.send(self._request) if self._request else b""

    def receive(self, data: bytes) -> tuple[list[bytes], bytes]:
        """Take what has come; return whole messages, and what the protocol wants to be sent."""
        messages: list[bytes] = []
        rest = b""
        if not (self.ready or self._request):
            data, rest = self._split(data)
        answer = b""
        try:
            self._socket.receive_data(data)
            for event in self._socket.events():
                answer += self._take(event, messages)
        except (RemoteProtocolError, LocalProtocolError, UnicodeError) as error:  # the last for names of hosts
            raise ProtocolError("websocket-failed", f"WebSocket: {error}") from None
        if rest:
            more, down = self.receive(rest)
            return messages + more, answer + down
        return messages, answer

    def send(self, data: bytes) -> bytes:
        """Return one binary message."""
        return self._socket.send(Message(data=data))

    def finish(self) -> bytes:
        """Return nothing: the FIN of TCP says it, and the other direction goes on."""
        return b""

    def _split(self, data: bytes) -> tuple[bytes, bytes]:
        """Part a request from what comes behind it, which wsproto (1.3) drops at the server's end."""
        seen = len(self._head)
        self._head += data
        end = self._head.find(b"\r\n\r\n", max(0, seen - 3)) + 4
        if end < 4:
            del self._head[:-3]
            return data, b""
        cut = len(data) - (len(self._head) - end)
        self._head.clear()
        return data[:cut], data[cut:]

    def _take(self, event: object, messages: list[bytes]) -> bytes:
        if isinstance(event, BytesMessage | TextMessage):
            piece = event.data
            self._kept += piece.encode() if isinstance(piece, str) else piece
            if (event.message_finished or len(self._kept) > MAX_KEPT) and self._kept:
                messages.append(bytes(self._kept))
                self._kept.clear()
        elif isinstance(event, Ping):
            return self._socket.send(event.response())
        elif isinstance(event, CloseConnection):
            self.ended = True
            answer = self._socket.send(event.response())
            if event.code in _ERRORS:
                self.farewell = answer
                raise ProtocolError("websocket-failed", f"WebSocket: {event.reason or f'closed with {event.code}'}")
            return answer
        elif isinstance(event, Request):
            answer = self._socket.send(AcceptConnection())
            self.ready = True
            self.farewell = b""
            return answer
        elif isinstance(event, AcceptConnection):
            self.ready = True
        elif isinstance(event, RejectConnection):
            raise ProtocolError("websocket-refused", f"the server refuses WebSocket with status {event.status_code}")
        return b""
