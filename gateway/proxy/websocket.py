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
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from workers.socks.wire import ProtocolError

MAX_KEPT: Final = 128 * 1024  # bytes of a message that are waited for; a longer one is passed on in pieces

_NOT_HERE: Final = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class WebSocket:
    """One end of a WebSocket."""

    __slots__ = ("_kept", "_request", "_socket", "ended", "farewell", "keeps_messages", "ready")

    def __init__(self, host: str = "", path: str = "/") -> None:
        """With `host` (and port) the client's end, else the server's, which takes any path and origin."""
        self._request = Request(host=host, target=path) if host else None
        self._socket = WSConnection(ConnectionType.CLIENT if host else ConnectionType.SERVER)
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
        answer = b""
        try:
            self._socket.receive_data(data)
            for event in self._socket.events():
                answer += self._take(event, messages)
        except (RemoteProtocolError, LocalProtocolError) as error:
            raise ProtocolError("websocket-failed", f"WebSocket: {error}") from None
        return messages, answer

    def send(self, data: bytes) -> bytes:
        """Return one binary message."""
        return self._socket.send(Message(data=data))

    def finish(self) -> bytes:
        """Return nothing: the FIN of TCP says it, and the other direction goes on."""
        return b""

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
            return self._socket.send(event.response())
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
