"""Stream: bytes both ways over one TCP connection, through whatever its carrier puts around them.

    owner ── write ──► layer ──► layer ──► socket          Layers are sans-IO: TLS, WebSocket (carrier.py).
          ◄─ received ─ layer ◄── layer ◄── socket         A Stream without any is the plain connection.

`Layered` is what carriers have in common; the HTTP carrier, which needs two connections, is another (httpcarrier.py).
What an owner is told comes from the loop, never from within a call that it makes itself.
"""

import errno
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from gateway.proxy.address import SocketAddress, unmapped
from gateway.proxy.poll import FAILED, READ, WRITE
from gateway.proxy.relay import RESET_ON_CLOSE
from workers.socks.wire import ProtocolError

if TYPE_CHECKING:
    from gateway.proxy.server import Server


MAX_ANSWERS: Final = 1 << 20  # bytes that may wait when a layer wants to answer by itself: pongs, alerts


class Layer(Protocol):
    """What a carrier puts around the bytes, without I/O."""

    ready: bool  #: its handshake is over
    ended: bool  #: the other side has said within the layer that no more comes
    keeps_messages: bool  #: what the other side wrote at once comes at once
    farewell: bytes  #: to be sent before the connection is closed after an error

    def start(self) -> bytes:
        """Return what goes out first."""

    def receive(self, data: bytes) -> tuple[list[bytes], bytes]:
        """Take bytes from below; return what goes up, and what goes down. Raises ProtocolError."""

    def send(self, data: bytes) -> bytes:
        """Return what goes down for `data`."""

    def finish(self) -> bytes:
        """Return what says to the other side that no more comes."""


class Owner:
    """Who is told what becomes of a stream; the empty answers are for those whom it does not concern."""

    __slots__ = ()

    def received(self, data: bytes) -> None:
        """Take what has come; after `hold` there may be a little more."""
        raise NotImplementedError

    def ended(self) -> None:
        """Hear that the other side sends no more."""
        raise NotImplementedError

    def lost(self, number: int) -> None:
        """Hear that the connection has failed, with its errno; the stream is closed."""
        raise NotImplementedError

    def opened(self) -> None:
        """Hear that the layer pushed last has done its handshake."""

    def drained(self) -> None:
        """Hear that all that was written is in the kernel."""


class Layered:
    """The layers, and the owner above them; a subclass moves the bytes below them."""

    __slots__ = ("_layers", "_server", "has_ended", "is_closed", "owner")

    def __init__(self, server: "Server", owner: Owner) -> None:
        self._server = server
        self._layers: list[Layer] = []  #: the one next to the wire first
        self.has_ended = False  #: the other side sends no more
        self.is_closed = False
        self.owner = owner

    @property
    def is_plain(self) -> bool:
        """Tell whether the socket below carries the owner's bytes as they are, and nothing waits."""
        return False

    @property
    def keeps_messages(self) -> bool:
        """Tell whether what the other side wrote at once comes in one call of `received`."""
        return bool(self._layers) and self._layers[-1].keeps_messages

    @property
    def backlog(self) -> int:
        """Return how many bytes wait for the kernel to take them."""
        raise NotImplementedError

    @property
    def local(self) -> SocketAddress:
        """Return this end's address. Raises OSError."""
        raise NotImplementedError

    @property
    def peer(self) -> SocketAddress:
        """Return the other end's address. Raises OSError."""
        raise NotImplementedError

    def push(self, layer: Layer, surplus: bytes = b"") -> None:
        """Put a layer between the owner and the rest; `surplus` has come already and belongs to it."""
        self._layers.append(layer)
        level = len(self._layers) - 1
        first = layer.start()
        if first:
            self._down(first, level)
        if surplus:
            self._server.soon(lambda: None if self.is_closed else self._up(surplus, level))

    def write(self, data: bytes) -> None:
        """Send; with one call one message or one segment goes out, if the connection keeps up."""
        if not self.is_closed:
            self._down(data, len(self._layers))

    def write_each(self, messages: Sequence[bytes]) -> None:
        """Send several messages at once; they stay apart only where the carrier keeps them so."""
        if not self.keeps_messages:
            self.write(b"".join(messages))
        elif not self.is_closed:
            upper = self._layers[-1]
            self._down(b"".join(map(upper.send, messages)), len(self._layers) - 1)

    def hold(self) -> None:
        """Read no more until `go_on`."""
        raise NotImplementedError

    def go_on(self) -> None:
        """Read again."""
        raise NotImplementedError

    def finish(self) -> None:
        """Say that no more is written; what waits goes out first. The other direction goes on."""
        raise NotImplementedError

    def close(self) -> None:
        """Close both directions; what waits is lost. The owner hears nothing of it."""
        raise NotImplementedError

    def abort(self) -> None:
        """Close with a reset, so that the other side sees that something has failed."""
        self.close()

    def _put(self, data: bytes) -> None:
        raise NotImplementedError

    def _down(self, data: bytes, level: int) -> None:
        for index in range(level - 1, -1, -1):
            data = self._layers[index].send(data)
        if data:
            self._put(data)

    def _last_words(self) -> None:
        """Send what the layers say at the end, the uppermost first."""
        for level in range(len(self._layers) - 1, -1, -1):
            layer = self._layers[level]
            words = layer.finish() if layer.ready else b""
            if words:
                self._down(words, level)

    def _up(self, data: bytes, level: int = 0) -> None:
        """Carry what has come through the layers from `level` on to the owner."""
        pieces = [data]
        ended = False
        while level < len(self._layers):
            layer = self._layers[level]
            was_ready = layer.ready
            out: list[bytes] = []
            try:
                for piece in pieces:
                    up, down = layer.receive(piece)
                    out += up
                    if down:
                        self._down(down, level)
                        if self.backlog > MAX_ANSWERS:
                            raise ProtocolError("carrier-flood", "a peer asks for answers and reads none")
            except ProtocolError as error:
                self._broken(error, layer, level)
                return
            pieces = out
            ended |= layer.ended
            level += 1
            if layer.ready and not was_ready and level == len(self._layers):
                self.owner.opened()  # which may push another
        for piece in pieces:
            if self.is_closed:
                return
            self.owner.received(piece)
        if ended:
            self._end()

    def _broken(self, error: ProtocolError, layer: Layer, level: int) -> None:
        self._server.complain(error)
        if layer.farewell:
            self._down(layer.farewell, level)
        self.close()
        self.owner.lost(errno.EPROTO)

    def _end(self) -> None:
        """Tell the owner once that no more comes."""
        if self.has_ended or self.is_closed:
            return
        self.has_ended = True
        if all(layer.ready for layer in self._layers):
            self.owner.ended()
        else:
            self.close()
            self.owner.lost(errno.ECONNRESET)


class Stream(Layered):
    """A stream over one socket, which it owns."""

    __slots__ = ("_fd", "_finishing", "_interest", "_outbox", "sock")

    def __init__(self, server: "Server", sock: socket.socket, owner: Owner) -> None:
        """Take a connected socket over; if the server knows it already, it waits for READ there."""
        super().__init__(server, owner)
        self.sock = sock
        self._fd = sock.fileno()
        self._interest = READ
        self._outbox = bytearray()  #: what the kernel did not take yet
        self._finishing = False  #: FIN follows what is in the outbox, or has been sent
        if self._fd in server.poller.handlers:
            server.poller.handlers[self._fd] = self.ready
        else:
            server.add(sock, READ, self.ready)

    @property
    def is_plain(self) -> bool:
        return not (self._layers or self._outbox or self.has_ended or self._finishing or self.is_closed)

    @property
    def backlog(self) -> int:
        return len(self._outbox)

    @property
    def interest(self) -> int:
        """Return what the poller waits for, for whom takes the socket over."""
        return self._interest

    @property
    def local(self) -> SocketAddress:
        return unmapped(self.sock.getsockname())

    @property
    def peer(self) -> SocketAddress:
        return unmapped(self.sock.getpeername())

    def hold(self) -> None:
        if self._interest & READ and not self.is_closed:
            self._want(self._interest & ~READ)

    def go_on(self) -> None:
        if not (self._interest & READ or self.has_ended or self.is_closed):
            self._want(self._interest | READ)

    def finish(self) -> None:
        if self._finishing or self.is_closed:
            return
        self._last_words()
        self._finishing = True
        if not self._outbox:
            self._shut()

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._server.close(self.sock)

    def abort(self) -> None:
        if not self.is_closed:
            try:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            except OSError:
                pass  # it is gone already
            self.close()

    def ready(self, events: int) -> None:
        """Do what the poller says can be done."""
        if events & WRITE and self._interest & WRITE:
            self._flush()
        if self.is_closed:
            return
        if self._interest & READ:
            if events & ~WRITE:
                self._read()
        elif events & FAILED:
            self._failed()

    def _read(self) -> None:
        view = self._server.copy_view
        try:
            count = self.sock.recv_into(view)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error.errno or 0)
            return
        if not count:
            self._end()
        elif self._layers:
            self._up(bytes(view[:count]))
        else:
            self.owner.received(bytes(view[:count]))

    def _end(self) -> None:
        if self._interest & READ and not self.is_closed:
            self._want(self._interest & ~READ)
        super()._end()

    def _put(self, data: bytes) -> None:
        if self._finishing:
            return
        if self._outbox:
            self._outbox += data
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._later(self._fail, error.errno or 0)
            return
        if sent < len(data):
            self._outbox += memoryview(data)[sent:]
            self._want(self._interest | WRITE)

    def _flush(self) -> None:
        try:
            sent = self.sock.send(self._outbox)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error.errno or 0)
            return
        del self._outbox[:sent]
        if self._outbox:
            return
        self._want(self._interest & ~WRITE)
        if self._finishing:
            self._shut()
        if not self.is_closed:
            self.owner.drained()

    def _shut(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._later(self._fail, error.errno or 0)

    def _failed(self) -> None:
        """Judge a failure of a socket that is not read now: a reset ends it; a FIN each way may still hold data."""
        number = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self._fail(number)
        elif not self._interest:
            self._server.poller.mute(self._fd)  # it would be reported again and again

    def _fail(self, number: int) -> None:
        if not self.is_closed:
            self.close()
            self.owner.lost(number)

    def _later(self, call: Callable[[int], None], number: int) -> None:
        self._server.soon(lambda: call(number))

    def _want(self, interest: int) -> None:
        self._interest = interest
        self._server.poller.change(self._fd, interest)
